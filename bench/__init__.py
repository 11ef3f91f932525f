# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: every case is checked against the reference before it is timed."""
