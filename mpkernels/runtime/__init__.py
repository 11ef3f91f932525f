# SPDX-License-Identifier: Apache-2.0
"""What chooses kernels at run time: verdicts of a proof on this GPU, and the agreement of ranks on them."""
