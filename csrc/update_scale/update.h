// SPDX-License-Identifier: Apache-2.0
// update_scale_: one transition of the loss scale.

#pragma once

#include <cstdint>
#include <limits>

#include "../common/host_device.h"
#include "../common/tensor.h"

namespace mpk {

struct ScaleOptions {
  double growth_factor, backoff_factor;
  int64_t growth_interval, hysteresis;
  double min_scale, max_scale;
};

struct ScaleState {
  float* grad_scale;
  int32_t *growth_tracker, *hysteresis_tracker;
  int64_t *skipped, *skipped_in_a_row;
};

inline ScaleState scale_state(const Tensor& grad_scale, const Tensor& growth_tracker, const Tensor& hysteresis_tracker,
                              const Tensor& skipped) {
  STD_TORCH_CHECK(skipped.dim() == 1 && skipped.size(0) == 2, "skipped must have 2 elements");
  int64_t* counts = skipped.mutable_data_ptr<int64_t>();
  return {grad_scale.number<float>(), growth_tracker.number<int32_t>(), hysteresis_tracker.number<int32_t>(), counts,
          counts + skipped.stride(0)};
}

// One more, or as many as the type can say.
template <class I>
MPK_HOST_DEVICE inline void count_up(I& count) {
  if (count < std::numeric_limits<I>::max()) count += 1;
}

MPK_HOST_DEVICE inline void back_off(const ScaleState& s, const ScaleOptions& o) {
  *s.growth_tracker = 0;
  count_up(*s.skipped);
  count_up(*s.skipped_in_a_row);
  const int32_t hysteresis_left = *s.hysteresis_tracker > 0 ? *s.hysteresis_tracker - 1 : 0;
  *s.hysteresis_tracker = hysteresis_left;
  if (hysteresis_left > 0) return;
  const float scale = static_cast<float>(*s.grad_scale * o.backoff_factor);  // round: fp64 -> fp32
  const float least = static_cast<float>(o.min_scale);
  *s.grad_scale = scale < least ? least : scale;
}

MPK_HOST_DEVICE inline void grow(const ScaleState& s, const ScaleOptions& o) {
  *s.skipped_in_a_row = 0;
  count_up(*s.growth_tracker);
  if (*s.growth_tracker < o.growth_interval) return;
  *s.growth_tracker = 0;
  *s.hysteresis_tracker = static_cast<int32_t>(o.hysteresis);
  const float scale = static_cast<float>(*s.grad_scale * o.growth_factor);  // round: fp64 -> fp32
  const float most = static_cast<float>(o.max_scale);
  *s.grad_scale = scale > most ? most : scale;
}

MPK_HOST_DEVICE inline void update_scale(const ScaleState& s, const ScaleOptions& o, float found_inf) {
  if (found_inf != 0) {  // NOTE: true for NaN
    back_off(s, o);
  } else {
    grow(s, o);
  }
}

}  // namespace mpk
