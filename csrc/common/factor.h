// SPDX-License-Identifier: Apache-2.0
// Whether a step is taken, and the one factor that unscales and clips.

#pragma once

#include <cmath>

#include "host_device.h"

namespace mpk {

// NOTE: false for NaN.
MPK_HOST_DEVICE inline bool is_good_scale(float grad_scale) { return grad_scale > 0 && grad_scale <= 3.402823466e+38f; }

MPK_HOST_DEVICE inline bool takes_step(float found_inf, float grad_scale) {
  return found_inf == 0 && is_good_scale(grad_scale);
}

// The reciprocal is taken in fp64.
MPK_HOST_DEVICE inline double inv_scale(float grad_scale) { return 1.0 / grad_scale; }

// min(1, max_norm / (grad_norm + 1e-6)), NaN where the norm is; the addend is that of torch.nn.utils.clip_grad_norm_.
MPK_HOST_DEVICE inline double clip_factor(double grad_norm, double max_norm) {
  const double clip = max_norm / (grad_norm + 1e-6);
  return clip > 1 ? 1 : clip;
}

}  // namespace mpk
