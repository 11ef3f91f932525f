// SPDX-License-Identifier: Apache-2.0
// update_scale_ on the CPU.

#include "../common/native_op.h"
#include "update.h"

namespace mpk {
namespace {

void update_scale_(Tensor grad_scale, Tensor growth_tracker, Tensor hysteresis_tracker, Tensor skipped, Tensor found_inf,
                   double growth_factor, double backoff_factor, int64_t growth_interval, int64_t hysteresis, double min_scale,
                   double max_scale) {
  const ScaleState state = scale_state(grad_scale, growth_tracker, hysteresis_tracker, skipped);
  const ScaleOptions options{growth_factor, backoff_factor, growth_interval, hysteresis, min_scale, max_scale};
  update_scale(state, options, *found_inf.number<float>());
}

const NativeOp registered("update_scale_", Device::kCpu, update_scale_);

}  // namespace
}  // namespace mpk
