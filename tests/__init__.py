# SPDX-License-Identifier: Apache-2.0
"""Tests of mpkernels: one file per op, every tolerance in bounds.py."""
