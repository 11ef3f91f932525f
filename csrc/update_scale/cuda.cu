// SPDX-License-Identifier: Apache-2.0
// update_scale_ on the GPU: one thread.

#include "../common/launch.h"
#include "../common/native_op.h"
#include "../common/stream.h"
#include "update.h"

namespace mpk {
namespace {

__global__ void update_scale_kernel(ScaleState state, ScaleOptions options, const float* found_inf) {
  update_scale(state, options, *found_inf);
}

void update_scale_(Tensor grad_scale, Tensor growth_tracker, Tensor hysteresis_tracker, Tensor skipped, Tensor found_inf,
                   double growth_factor, double backoff_factor, int64_t growth_interval, int64_t hysteresis, double min_scale,
                   double max_scale) {
  const OnDevice device(grad_scale);
  const ScaleState state = scale_state(grad_scale, growth_tracker, hysteresis_tracker, skipped);
  const ScaleOptions options{growth_factor, backoff_factor, growth_interval, hysteresis, min_scale, max_scale};
  launch<update_scale_kernel>(1, 1, 0, device.stream(), state, options, found_inf.number<float>());
}

const NativeOp registered("update_scale_", Device::kCuda, update_scale_);

}  // namespace
}  // namespace mpk
