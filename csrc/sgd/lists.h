// SPDX-License-Identifier: Apache-2.0
// The lists of an sgd_ call, checked.

#pragma once

#include "../common/tensor_list.h"

namespace mpk {

struct SgdLists {
  TensorList masters, grads, momentum_buffers, copies, steps;

  SgdLists(const Tensor& masters, const Tensor& grads, const Tensor& momentum_buffers, const Tensor& copies,
           const Tensor& steps)
      : masters("masters", masters),
        grads("grads", grads),
        momentum_buffers("momentum_buffers", momentum_buffers),
        copies("copies", copies),
        steps("steps", steps) {
    check_steps(this->steps, this->masters);
    check_list("grads", this->grads, this->masters);
    check_list("copies", this->copies, this->masters, /*may_be_empty=*/true);
    check_state("momentum_buffers", this->momentum_buffers, this->masters, this->momentum_buffers);
  }
};

}  // namespace mpk
