// SPDX-License-Identifier: Apache-2.0
// MPK_HOST_DEVICE: a formula that the CPU and the CUDA kernels share.

#pragma once

#ifdef __CUDACC__
#define MPK_HOST_DEVICE __host__ __device__
#else
#define MPK_HOST_DEVICE
#endif
