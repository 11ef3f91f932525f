// SPDX-License-Identifier: Apache-2.0
// The rules there are. A rule is an optimizer's update:
//
//     kName, kStateNames, kRequiredStates   its private op and the lists of states, of which the last can be optional
//     Options, Parameters                   the numbers of a call
//     Scalars<T>                            what the elements of a tensor share, made in fp64 of Options, the factor of the
//                                           gradients and the steps taken so far; T is the master's type
//     with_variant(options, states, f)      f(Variant{}) for one of the loops that the rule has
//     Variant::kStates, Variant::element    the update of one element, on the CPU and on the GPU
//
// cpu.cpp and cuda.cu have a loop around it each.

#pragma once

#include "adamw.h"
#include "lion.h"
#include "sgd.h"

namespace mpk {

// f(Rule{}) for each.
template <class F>
void for_each_rule(const F& f) {
  f(Adamw{});
  f(Sgd{});
  f(Lion{});
}

}  // namespace mpk
