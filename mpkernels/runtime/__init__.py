# SPDX-License-Identifier: Apache-2.0
"""What runs below the ops: the compiled library, the choice of an implementation, verdicts and tables, compute copies."""
