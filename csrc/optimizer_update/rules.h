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

#include "../common/native_op.h"
#include "adamw.h"
#include "lion.h"
#include "sgd.h"

namespace mpk {

// The private op of each on a device, whose calls Update<Rule>::update runs.
template <template <class Rule> class Update>
bool register_rules(Device device) {
  [[maybe_unused]] static const NativeOp registered[] = {
      {Adamw::kName, device, PrivateOp<Adamw, Update<Adamw>>::call},
      {Sgd::kName, device, PrivateOp<Sgd, Update<Sgd>>::call},
      {Lion::kName, device, PrivateOp<Lion, Update<Lion>>::call},
  };
  return true;
}

}  // namespace mpk
