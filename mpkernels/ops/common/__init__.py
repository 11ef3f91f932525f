# SPDX-License-Identifier: Apache-2.0
"""What several ops share: casts, layouts, memory, lists of tensors."""
