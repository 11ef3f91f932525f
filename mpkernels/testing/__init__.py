# SPDX-License-Identifier: Apache-2.0
"""What holds implementations against fp64: bounds, cases, guarded memory. For tests, bench, the tuner and the proof on a GPU.

Needs numpy, and is imported by none of the package's modules when it is imported.
"""
