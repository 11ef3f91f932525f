// SPDX-License-Identifier: Apache-2.0
// How a C++ function becomes a function of the extension module. csrc/ops.cpp has the schemas, csrc/common/python.cpp the
// module; a file with kernels registers what implements an op on a device:
//
//     const NativeOp registered("quantize", Device::kCpu, quantize);
//
// torch's dispatcher has no part in it: boxing the arguments of a call takes longer than many a kernel.

#pragma once

#include <cstddef>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tensor.h"

namespace mpk {

struct PythonObject;    // a PyObject
struct PythonError {};  // thrown where a Python exception is set

// The arguments of one call from Python. What is missing at the end is absent, 0 or false; a Tensor is never missing.
class Arguments {
 public:
  Arguments(PythonObject* const* objects, size_t count) : objects_(objects), count_(count) {}

  bool is_cuda() const { return is_cuda_; }  // whether one of the tensors so far is on a GPU

  template <class T>
  T get(size_t i) {
    if constexpr (std::is_default_constructible_v<T>) {
      if (i >= count_) return T{};
    }
    return to(std::in_place_type<T>, objects_[i]);
  }

 private:
  Tensor to(std::in_place_type_t<Tensor>, PythonObject* object);
  std::optional<Tensor> to(std::in_place_type_t<std::optional<Tensor>>, PythonObject* object);
  static ScalarType to(std::in_place_type_t<ScalarType>, PythonObject* object);
  static int64_t to(std::in_place_type_t<int64_t>, PythonObject* object);
  static bool to(std::in_place_type_t<bool>, PythonObject* object);
  static double to(std::in_place_type_t<double>, PythonObject* object);
  static std::optional<double> to(std::in_place_type_t<std::optional<double>>, PythonObject* object);

  PythonObject* const* objects_;
  size_t count_;
  bool is_cuda_ = false;
};

PythonObject* to_python(bool value);
PythonObject* to_python(int64_t value);
PythonObject* to_python(const std::tuple<int64_t, int64_t>& value);
PythonObject* none();

// Other threads run Python while it lives.
class WithoutGil {
 public:
  WithoutGil();
  ~WithoutGil();
  WithoutGil(const WithoutGil&) = delete;

 private:
  void* state_;
};

enum class Device { kCpu, kCuda, kNone };  // kNone: the op has no tensors

// One function that implements an op, in a list that is made while the library is loaded.
class __attribute__((visibility("hidden"))) NativeOp {
 public:
  using Function = void (*)();
  using Call = PythonObject* (*)(Arguments& arguments, Function on_cpu, Function on_cuda);

  template <class R, class... A>
  NativeOp(const char* name, Device device, R (*function)(A...))
      : name(name),
        device(device),
        parameters(sizeof...(A)),
        function(reinterpret_cast<Function>(function)),
        call(convert_and_call<R, A...>),
        next(first) {
    first = this;
  }

  const char* const name;
  const Device device;
  const size_t parameters;
  const Function function;
  const Call call;  // the same for every function of such a type
  const NativeOp* const next;
  inline static const NativeOp* first = nullptr;

 private:
  template <class R, class... A>
  static PythonObject* convert_and_call(Arguments& arguments, Function on_cpu, Function on_cuda) {
    return call_with<R, A...>(arguments, on_cpu, on_cuda, std::index_sequence_for<A...>());
  }

  template <class R, class... A, size_t... i>
  static PythonObject* call_with(Arguments& arguments, Function on_cpu, Function on_cuda, std::index_sequence<i...>) {
    const std::tuple<A...> values{arguments.get<A>(i)...};  // braces: from the first to the last
    const auto function = reinterpret_cast<R (*)(A...)>(choose(arguments, on_cpu, on_cuda));
    const auto run = [&] {
      const WithoutGil released;
      return std::apply(function, values);
    };
    if constexpr (std::is_void_v<R>) {
      run();
      return none();
    } else {
      return to_python(run());
    }
  }

  static Function choose(const Arguments& arguments, Function on_cpu, Function on_cuda);
};

}  // namespace mpk
