// SPDX-License-Identifier: Apache-2.0
// What the optimizer steps share on the GPU: the verdict and the scalars, the way of a chunk through registers, step counts.

#pragma once

#include <optional>
#include <vector>

#include "dtype.h"
#include "factor.h"
#include "launch.h"
#include "multi_tensor.cuh"
#include "stream.h"
#include "tensor_list.h"
#include "vector.cuh"

namespace mpk {

constexpr int kBlocksPerSm = 2;  // at least; asked for more, the compiler spills

// The call's scalars, those on the device by their address; null where the caller gave none.
struct StepInputs {
  const float *grad_scale, *found_inf;
  const double* grad_norm;
  double max_norm;
  bool maximize;
  double lr_value;  // read at the call, where lr is on the CPU
  const float* lr_float;
  const double* lr_double;

  __device__ float scale() const { return grad_scale == nullptr ? 1 : *grad_scale; }

  __device__ bool taken() const { return takes_step(found_inf == nullptr ? 0 : *found_inf, scale()); }

  // What a gradient is multiplied by: unscales, clips, and negates with maximize.
  __device__ double factor() const {
    double factor = inv_scale(scale());
    if (grad_norm != nullptr) factor *= clip_factor(*grad_norm, max_norm);
    return maximize ? -factor : factor;
  }

  __device__ double lr() const { return lr_double != nullptr ? *lr_double : lr_float != nullptr ? *lr_float : lr_value; }
};

// The lists that every update has, in the order of its table.
struct UpdateLists {
  const TensorList &masters, &grads, &copies, &steps;
};
enum UpdateList { kMaster, kGrad, kCopy, kStep, kFirstState };

template <class T>
const T* address_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline void refuse_frozen_lr(const char* op, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check_cuda(cudaStreamIsCapturing(stream, &status));
  STD_TORCH_CHECK(status == cudaStreamCaptureStatusNone, op,
                  ": lr is on the CPU and would be frozen in the CUDA graph; pass it as a tensor on the device");
}

inline StepInputs step_inputs(const char* op, cudaStream_t stream, const Tensor& lr, bool maximize,
                              const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                              const std::optional<Tensor>& grad_norm, std::optional<double> max_norm) {
  StepInputs in{};
  in.grad_scale = address_of<float>(grad_scale);
  in.found_inf = address_of<float>(found_inf);
  if (max_norm) in.grad_norm = grad_norm.value().const_data_ptr<double>();
  in.max_norm = max_norm.value_or(0);
  in.maximize = maximize;
  if (!is_on_device(lr)) {
    refuse_frozen_lr(op, stream);
    in.lr_value = real_value(lr);
  } else if (lr.scalar_type() == ScalarType::Double) {
    in.lr_double = lr.const_data_ptr<double>();
  } else {
    in.lr_float = lr.const_data_ptr<float>();
  }
  return in;
}

// ----- on the device -----

// Gradients and copies have their dtype asked for at run time, once a vector: a kernel for each combination would be twenty
// kernels for one, and a launch for each.

template <int N>
__device__ inline bool is_vector(const char* data, ScalarType dtype, int64_t i) {
  const int size = size_of(dtype);
  return is_aligned(data + i * size, word_bytes(N, size));
}

template <int N, class E>
__device__ inline bool is_vector(const E* data) {
  return is_aligned(data, word_bytes(N, sizeof(E)));
}

template <class To, class From, int N>
__device__ inline Elements<To, N> converted(const Elements<From, N>& from) {
  Elements<To, N> to;
#pragma unroll
  for (int k = 0; k < N; ++k) to.at[k] = convert<To>(from.at[k]);  // round: From -> To
  return to;
}

// N gradients as they lie in memory, so that loading them does not wait for converting them. None is wider than T, the
// master's type.
template <class T, int N>
class RawGrad {
 public:
  __device__ void load(const char* data, ScalarType dtype, int64_t i) {
    if (dtype == ScalarType::Float) {
      load_as<uint32_t>(data, i);
    } else if (dtype == ScalarType::Double) {
      load_as<T>(data, i);
    } else {
      load_as<uint16_t>(data, i);
    }
  }

  __device__ Elements<T, N> get(ScalarType dtype) const {
    if (dtype == ScalarType::Half) return get_as<Half>();
    if (dtype == ScalarType::BFloat16) return get_as<BFloat16>();
    if (dtype == ScalarType::Float) return get_as<float>();
    return get_as<T>();
  }

 private:
  template <class Bits>
  __device__ void load_as(const char* data, int64_t i) {
    Elements<Bits, N> bits;
    mpk::load<PassCache>(reinterpret_cast<const Bits*>(data) + i, bits);
    keep(bits);
  }

  template <class G>
  __device__ void keep(const Elements<G, N>& grad) {
    if constexpr (sizeof(grad) == 2) {
      uint16_t low;
      memcpy(&low, &grad, sizeof(low));
      words_[0] = low;
    } else {
      memcpy(words_, &grad, sizeof(grad));
    }
  }

  template <class G>
  __device__ Elements<T, N> get_as() const {
    Elements<G, N> grad;
    if constexpr (sizeof(grad) == 2) {
      const uint16_t low = static_cast<uint16_t>(words_[0]);
      memcpy(&grad, &low, sizeof(grad));
    } else {
      memcpy(&grad, words_, sizeof(grad));
    }
    return converted<T>(grad);
  }

  uint32_t words_[N * sizeof(T) / sizeof(uint32_t)];  // NOTE: whole words only, or the compiler puts them into memory
};

template <int N, class T>
__device__ inline void store_copy(char* copy, ScalarType dtype, int64_t i, const Elements<T, N>& w) {
  if (dtype == ScalarType::Half) {
    store(reinterpret_cast<Half*>(copy) + i, converted<Half>(w));
  } else if (dtype == ScalarType::BFloat16) {
    store(reinterpret_cast<BFloat16*>(copy) + i, converted<BFloat16>(w));
  } else if (dtype == ScalarType::Float) {
    store(reinterpret_cast<float*>(copy) + i, converted<float>(w));
  } else {
    store(reinterpret_cast<double*>(copy) + i, converted<double>(w));
  }
}

// N elements at a time by each thread, kInFlight times over before the first is used. Neighbours read neighbours, so that a
// warp's access is one stretch of memory whatever the list's dtype.
template <int N, int kInFlight, class Update>
__device__ inline void update_span(const Update& update, int64_t begin, int64_t end) {
  constexpr int64_t kStride = int64_t{kThreads} * N;
  for (int64_t i = begin + int64_t{threadIdx.x} * N; i < end; i += kStride * kInFlight) {
    typename Update::template Values<N> values[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (i + k * kStride < end) update.load(i + k * kStride, values[k]);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (i + k * kStride < end) update.step_and_store(i + k * kStride, values[k]);
    }
  }
}

// Vectors where all lists of the tensor are aligned at the same element, single elements before, behind, and where they are
// never aligned together.
template <class T, class Update>
__device__ inline void update_chunk(const Update& update, const TensorChunk& chunk) {
  constexpr int N = kWidest / sizeof(T);
  const int64_t past = reinterpret_cast<uintptr_t>(update.master) / sizeof(T) % N;
  int64_t body = chunk.begin + (N - past) % N;  // a chunk begins at a multiple of N
  if (body > chunk.end || !update.template aligned<N>(body)) body = chunk.end;
  const int64_t tail = body + (chunk.end - body) / N * N;
  update_span<N, 2>(update, body, tail);
#pragma unroll 1
  for (int part = 0; part < 2; ++part) update_span<1, 2>(update, part ? tail : chunk.begin, part ? chunk.end : body);
}

// How many steps tensor i of a table has taken: the optimizer's own count, fp32, which stays at 2^24 as torch's does.
template <class Table>
__device__ inline float steps_taken(const Table& table, int i) {
  return *reinterpret_cast<const float*>(table.data[kStep][i]);
}

struct AdvanceArguments {
  static constexpr int kCapacity = (kArgumentBytes - sizeof(StepInputs) - sizeof(int64_t)) / sizeof(float*);

  StepInputs step;
  int64_t count;
  float* steps[kCapacity];
};

// One block, after the last launch of the update: no other block reads the counts any more.
static __global__ void __launch_bounds__(kThreads) advance_kernel(MPK_GRID_CONSTANT(AdvanceArguments) a) {
  if (!a.step.taken()) return;
  for (int64_t i = threadIdx.x; i < a.count; i += kThreads) *a.steps[i] += 1;
}

// ----- on the host -----

inline void advance_steps(const TensorList& steps, const StepInputs& in, cudaStream_t stream) {
  AdvanceArguments a;
  a.step = in;
  for (int64_t begin = 0; begin < steps.size(); begin += a.count) {
    a.count = std::min<int64_t>(steps.size() - begin, a.kCapacity);
    for (int64_t i = 0; i < a.count; ++i) a.steps[i] = reinterpret_cast<float*>(steps.data(begin + i));
    launch(advance_kernel, 1, kThreads, 0, stream, a);
  }
}

// launch_as(T{}, S{}, rows) for each dtype T of a master and S of its moments that occur together.
template <class F>
void for_each_dtypes(const TensorList& masters, const TensorList& states, const F& launch_as) {
  std::vector<int64_t> rows[4];
  for (int64_t i = 0; i < masters.size(); ++i) {
    const bool is_double = masters.dtype(i) == ScalarType::Double;
    const bool is_narrow = !states.empty() && states.dtype(i) == ScalarType::BFloat16;
    rows[2 * is_narrow + is_double].push_back(i);
  }
  if (!rows[0].empty()) launch_as(float{}, float{}, rows[0]);
  if (!rows[1].empty()) launch_as(double{}, double{}, rows[1]);
  if (!rows[2].empty()) launch_as(float{}, BFloat16{}, rows[2]);
  if (!rows[3].empty()) launch_as(double{}, BFloat16{}, rows[3]);
}

// Fills the table with the tensors of `rows`, `states` behind the lists that every update has, and calls go() whenever it
// is full and at the end.
template <class Table, class Go>
void for_each_table(Table& table, const std::vector<int64_t>& rows, const UpdateLists& lists,
                    const std::vector<const TensorList*>& states, const Go& go) {
  const auto flush = [&] {
    if (table.chunks > 0) go();
    table.clear(kChunkUnit);
  };
  table.clear(kChunkUnit);
  for (const int64_t row : rows) {
    const int i = table.add(row, lists.masters.numel(row));
    table.grad_dtype[i] = lists.grads.dtype(row);
    table.copy_dtype[i] = lists.copies.dtype(row);
    table.data[kMaster][i] = lists.masters.data(row);
    table.data[kGrad][i] = lists.grads.data(row);  // never written
    table.data[kCopy][i] = lists.copies.numel(row) ? lists.copies.data(row) : nullptr;
    table.data[kStep][i] = lists.steps.data(row);
    for (size_t k = 0; k < states.size(); ++k) table.data[kFirstState + k][i] = states[k]->data(row);
    if (table.is_full()) flush();
  }
  flush();
}

}  // namespace mpk
