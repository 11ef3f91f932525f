// SPDX-License-Identifier: Apache-2.0
// The lists of an adamw_ call, checked.

#pragma once

#include "../common/tensor_list.h"

namespace mpk {

struct AdamwLists {
  TensorList masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies, steps;

  AdamwLists(const Tensor& masters, const Tensor& grads, const Tensor& exp_avgs, const Tensor& exp_avg_sqs,
             const Tensor& max_exp_avg_sqs, const Tensor& copies, const Tensor& steps)
      : masters("masters", masters),
        grads("grads", grads),
        exp_avgs("exp_avgs", exp_avgs),
        exp_avg_sqs("exp_avg_sqs", exp_avg_sqs),
        max_exp_avg_sqs("max_exp_avg_sqs", max_exp_avg_sqs),
        copies("copies", copies),
        steps("steps", steps) {
    check_steps(this->steps, this->masters);
    check_list("grads", this->grads, this->masters);
    check_list("copies", this->copies, this->masters, /*may_be_empty=*/true);
    check_list("exp_avgs", this->exp_avgs, this->masters);
    check_list("exp_avg_sqs", this->exp_avg_sqs, this->masters);
    for (const auto* state : {&this->exp_avgs, &this->exp_avg_sqs, &this->max_exp_avg_sqs}) {
      check_state("moments", *state, this->masters, this->exp_avgs);
    }
  }
};

}  // namespace mpk
