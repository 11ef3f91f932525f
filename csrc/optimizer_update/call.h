// SPDX-License-Identifier: Apache-2.0
// A call of a rule's private op, the function of that op's signature, which makes one, and what a step is of its scalars.

#pragma once

#include <array>
#include <iterator>
#include <utility>
#include <vector>

#include "../common/factor.h"
#include "../common/tensor_list.h"

namespace mpk {

// The types of a rule's numbers between lr and maximize, in the order of its schema and of its Options.
template <class...>
struct ParameterTypes {};

template <class Rule>
constexpr int kStateLists = std::size(Rule::kStateNames);

// The lists of a call, checked. states: those that are given; a rule can do without the last ones.
struct UpdateLists {
  TensorList masters, grads, copies, steps;
  std::vector<TensorList> states;
};

template <class Rule>
UpdateLists make_lists(const Tensor& masters, const Tensor& grads, const std::array<Tensor, kStateLists<Rule>>& states,
                       const Tensor& copies, const Tensor& steps) {
  UpdateLists lists{{"masters", masters}, {"grads", grads}, {"copies", copies}, {"steps", steps}, {}};
  lists.states.reserve(kStateLists<Rule>);
  check_steps(lists.steps, lists.masters);
  check_list("grads", lists.grads, lists.masters);
  check_list("copies", lists.copies, lists.masters, /*may_be_empty=*/true);
  for (int k = 0; k < kStateLists<Rule>; ++k) {
    const char* name = Rule::kStateNames[k];
    const TensorList state(name, states[k]);
    if (state.empty() && k >= Rule::kRequiredStates) break;
    lists.states.push_back(state);
    check_state(name, state, lists.masters, lists.states[0]);
  }
  return lists;
}

template <class Rule>
struct UpdateCall {
  UpdateLists lists;
  Tensor on;  // lies where the lists' tensors do
  Tensor lr;
  typename Rule::Options options;  // lr is 0: a kernel reads it
  bool maximize;
  std::optional<Tensor> grad_scale, found_inf, grad_norm;
  std::optional<double> max_norm;
};

// The call's scalars, by their address where they are tensors; null where the caller gave none.
struct StepInputs {
  const float *grad_scale, *found_inf;
  const double* grad_norm;
  double max_norm;
  bool maximize;
  double lr_value;  // of an lr that a kernel cannot read
  const float* lr_float;
  const double* lr_double;

  MPK_HOST_DEVICE float scale() const { return grad_scale == nullptr ? 1 : *grad_scale; }

  MPK_HOST_DEVICE bool taken() const { return takes_step(found_inf == nullptr ? 0 : *found_inf, scale()); }

  // What a gradient is multiplied by: unscales, clips, and negates with maximize.
  MPK_HOST_DEVICE double factor() const {
    double factor = inv_scale(scale());
    if (grad_norm != nullptr) factor *= clip_factor(*grad_norm, max_norm);
    return maximize ? -factor : factor;
  }

  MPK_HOST_DEVICE double lr() const { return lr_double != nullptr ? *lr_double : lr_float != nullptr ? *lr_float : lr_value; }
};

template <class Rule>
StepInputs step_inputs(const UpdateCall<Rule>& call) {
  StepInputs in{};
  in.grad_scale = address_of<float>(call.grad_scale);
  in.found_inf = address_of<float>(call.found_inf);
  if (call.max_norm) in.grad_norm = call.grad_norm.value().template number<double>();
  in.max_norm = call.max_norm.value_or(0);
  in.maximize = call.maximize;
  if (call.lr.scalar_type() == ScalarType::Double) {
    in.lr_double = call.lr.template number<double>();
  } else {
    in.lr_float = call.lr.template number<float>();
  }
  return in;
}

// Update::update(call) as a function of the private op's arguments.
template <class Rule, class Update, class = std::make_index_sequence<kStateLists<Rule>>, class = typename Rule::Parameters>
struct PrivateOp;

template <size_t>
using TensorAt = Tensor;

template <class Rule, class Update, size_t... k, class... Parameter>
struct PrivateOp<Rule, Update, std::index_sequence<k...>, ParameterTypes<Parameter...>> {
  // Whether the step was taken.
  static bool call(Tensor masters, Tensor grads, TensorAt<k>... states, Tensor copies, Tensor steps, Tensor on, Tensor lr,
                   Parameter... parameters, bool maximize, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                   std::optional<Tensor> grad_norm, std::optional<double> max_norm) {
    return Update::update(UpdateCall<Rule>{make_lists<Rule>(masters, grads, {states...}, copies, steps),
                                           on,
                                           lr,
                                           {/*lr=*/0, parameters...},
                                           maximize,
                                           grad_scale,
                                           found_inf,
                                           grad_norm,
                                           max_norm});
  }
};

}  // namespace mpk
