// SPDX-License-Identifier: Apache-2.0
// Vectors of elements between global memory and registers, by the widest accesses, of up to 16 bytes.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace mpk {

constexpr int kWidest = 16;  // bytes

template <class E, int N>
struct Elements {
  E at[N];
};

template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// N elements of kSize bytes are read as words of this many bytes, and must lie at a multiple of it.
constexpr int word_bytes(int n, int size) { return n * size < kWidest ? n * size : kWidest; }

__device__ inline bool is_aligned(const void* address, int bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// ld.global.nc: for what another kernel of the step reads again soon.
struct LoadReadOnly {
  template <class W>
  __device__ static W read(const W* from) {
    return __ldg(from);
  }
};

// ld.global.cs: for what nothing reads again before the next step.
struct LoadStreaming {
  template <class W>
  __device__ static W read(const W* from) {
    return __ldcs(from);
  }
};

template <class Load, int N, class E>
__device__ inline void load(const E* from, Elements<E, N>& to) {
  using Word = typename WordOf<word_bytes(N, sizeof(E))>::type;
  constexpr int kWords = sizeof(to) / sizeof(Word);
  Word words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = Load::read(reinterpret_cast<const Word*>(from) + i);
  memcpy(&to, words, sizeof(to));
}

template <int N, class E>
__device__ inline void store(E* to, const Elements<E, N>& from) {
  using Word = typename WordOf<word_bytes(N, sizeof(E))>::type;
  constexpr int kWords = sizeof(from) / sizeof(Word);
  Word words[kWords];
  memcpy(words, &from, sizeof(from));
#pragma unroll
  for (int i = 0; i < kWords; ++i) __stcs(reinterpret_cast<Word*>(to) + i, words[i]);
}

}  // namespace mpk
