// SPDX-License-Identifier: Apache-2.0
// The update of a chunk on the GPU: vectors of gradients, states and copies, and the loop over them.

#pragma once

#include "../common/dtype.h"
#include "../common/multi_tensor.cuh"
#include "../common/vector.cuh"

namespace mpk {

// The lists of a table, in their order; the states are the last.
enum UpdateList { kMaster, kGrad, kCopy, kFirstState };

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
    mpk::load<LoadStreaming>(reinterpret_cast<const Bits*>(data) + i, bits);
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

// One tensor of an update by one variant of a rule, and what its elements share.
template <class Variant, class Scalars, class T, class S, class = std::make_index_sequence<Variant::kStates>>
struct TensorUpdate;

template <class Variant, class Scalars, class T, class S, size_t... k>
struct TensorUpdate<Variant, Scalars, T, S, std::index_sequence<k...>> {
  static constexpr int kStates = std::max(Variant::kStates, 1);  // an array has at least one element

  const char* grad;
  ScalarType grad_dtype, copy_dtype;
  char* copy;  // null where none is wanted
  T* master;
  S* states[kStates];  // NOTE: indexed by constants only, or the compiler puts the struct into memory
  Scalars scalars;

  // Tensor i of a table.
  template <class Table>
  __device__ TensorUpdate(const Table& table, int i, const Scalars& scalars)
      : grad(table.data[kGrad][i]),
        grad_dtype(table.grad_dtype[i]),
        copy_dtype(table.copy_dtype[i]),
        copy(table.data[kCopy][i]),
        master(reinterpret_cast<T*>(table.data[kMaster][i])),
        states{reinterpret_cast<S*>(table.data[kFirstState + k][i])...},
        scalars(scalars) {}

  template <int N>
  struct Values {
    RawGrad<T, N> grad;
    Elements<T, N> w;
    Elements<S, N> states[kStates];
  };

  template <int N>
  __device__ bool aligned(int64_t i) const {
    return is_vector<N>(grad, grad_dtype, i) && (copy == nullptr || is_vector<N>(copy, copy_dtype, i)) &&
           is_aligned(master + i, kWidest) && (is_vector<N>(states[k] + i) && ...);
  }

  template <int N>
  __device__ void load(int64_t i, Values<N>& x) const {
    x.grad.load(grad, grad_dtype, i);
    mpk::load<LoadStreaming>(master + i, x.w);
    (mpk::load<LoadStreaming>(states[k] + i, x.states[k]), ...);
  }

  template <int N>
  __device__ void step_and_store(int64_t i, Values<N>& x) const {
    const Elements<T, N> g = x.grad.get(grad_dtype);
#pragma unroll
    for (int j = 0; j < N; ++j) Variant::element(scalars, i + j, g.at[j], x.w.at[j], x.states[k].at[j]...);
    store(master + i, x.w);
    (store(states[k] + i, x.states[k]), ...);
    if (copy != nullptr) store_copy(copy, copy_dtype, i, x.w);
  }
};

// N elements at a time by each thread, kInFlight times over before the first is used. Neighbours read neighbours, so that a
// warp's access is one stretch of memory whatever the list's dtype.
template <int N, int kInFlight, class Update>
__device__ inline void update_vectors(const Update& update, int64_t begin, int64_t end) {
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
  update_vectors<N, 2>(update, body, tail);
#pragma unroll 1
  for (int part = 0; part < 2; ++part) update_vectors<1, 2>(update, part ? tail : chunk.begin, part ? chunk.end : body);
}

}  // namespace mpk
