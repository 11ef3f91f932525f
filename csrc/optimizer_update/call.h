// SPDX-License-Identifier: Apache-2.0
// A call of a rule's private op, and the function of that op's signature, which makes one.

#pragma once

#include <array>
#include <iterator>
#include <utility>
#include <vector>

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

// Update::update(call) as a function of the private op's arguments, for TORCH_BOX.
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
    return Update::update(UpdateCall<Rule>{make_lists<Rule>(masters, grads, {std::move(states)...}, copies, steps),
                                           std::move(on),
                                           std::move(lr),
                                           {/*lr=*/0, parameters...},
                                           maximize,
                                           std::move(grad_scale),
                                           std::move(found_inf),
                                           std::move(grad_norm),
                                           max_norm});
  }
};

}  // namespace mpk
