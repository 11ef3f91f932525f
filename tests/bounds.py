# SPDX-License-Identifier: Apache-2.0
"""Every bound that a test compares with; no test has a tolerance of its own."""

# ----- linear_act: forward and backward ---------------------------------------------------------------


# ----- optimizer steps ---------------------------------------------------------------
