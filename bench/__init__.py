# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `python -m bench` checks every case against fp64, times it, and writes rows."""
