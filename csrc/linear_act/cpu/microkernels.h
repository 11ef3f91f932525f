// SPDX-License-Identifier: Apache-2.0
// The micro-kernels of linear_act's CPU GEMM for one ISA: packing with conversion to fp32, the register tile, and the
// dot-product for few rows. dispatch.h includes this once per ISA, hence no include guard, in a namespace that defines kWidth
// (fp32 elements of a vector), kMR (rows of the register tile), and, by intrinsics, fma, widen and narrow.

using V = float __attribute__((vector_size(4 * kWidth)));

constexpr int64_t kNR = 2 * kWidth;  // columns of a panel and of the register tile

template <class Vector>
inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class Vector>
inline void store(float* to, const Vector& v) {
  std::memcpy(to, &v, sizeof(v));
}

// ----- packing -----

// Eight 8-bit floats by way of fp16, of which e5m2 is the upper byte. The bits of e4m3fn, moved to where fp16 has exponent and
// mantissa, are 2^-8 times the number; 480 would be next to the largest, and is NaN.
template <class From>
inline V8 load8_of_8_bits(const From* from) {
  using Bytes = uint8_t __attribute__((vector_size(8)));
  using Bits = uint16_t __attribute__((vector_size(16)));
  constexpr bool kIsE4M3 = std::is_same_v<From, Float8_e4m3fn>;
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  Bits bits = __builtin_convertvector(bytes, Bits);
  bits = kIsE4M3 ? (bits & 0x7f) << 7 | (bits & 0x80) << 8 : bits << 8;
  Half halves[8];
  std::memcpy(static_cast<void*>(halves), &bits, sizeof(bits));
  const V8 v = widen(halves);
  if constexpr (!kIsE4M3) return v;
  const U8 number = reinterpret_cast<U8>(v * 0x1p8f);
  constexpr uint32_t k480 = 0x43f00000;
  return reinterpret_cast<V8>(number | reinterpret_cast<U8>((number & 0x7fffffff) == k480));
}

// Eight elements, rounded to Compute, in fp32.
template <class Compute, class From>
inline V8 load8(const From* from) {
  if constexpr (sizeof(From) == 1) {
    return load8_of_8_bits(from);
  } else if constexpr (std::is_same_v<From, Half>) {
    return widen(from);
  } else if constexpr (std::is_same_v<From, BFloat16>) {
    uint16_t __attribute__((vector_size(16))) bits;
    std::memcpy(&bits, from, sizeof(bits));
    return reinterpret_cast<V8>(__builtin_convertvector(bits, U8) << 16);
  } else if constexpr (std::is_same_v<Compute, Half>) {
    Half rounded[8];
    narrow(load<V8>(from), rounded);  // round: fp32 -> fp16
    return widen(rounded);
  } else if constexpr (std::is_same_v<Compute, BFloat16>) {
    const V8 v = load<V8>(from);
    const U8 bits = reinterpret_cast<U8>(v);
    const U8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;  // round: fp32 -> bf16
    return v == v ? reinterpret_cast<V8>(rounded) : v;
  } else {
    return load<V8>(from);
  }
}

template <class Compute, class From>
inline float load1(const From* from) {
  From x;
  std::memcpy(&x, from, sizeof(x));            // `from` need not be aligned
  return convert<float>(convert<Compute>(x));  // round: From -> Compute
}

inline void transpose(V8 (&v)[8]) {
  V8 w[8];
  for (int i = 0; i < 8; i += 2) {
    w[i] = MPK_SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    w[i + 1] = MPK_SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    v[i] = MPK_SHUFFLE(w[i], w[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    v[i + 1] = MPK_SHUFFLE(w[i], w[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    v[i + 2] = MPK_SHUFFLE(w[i + 1], w[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    v[i + 3] = MPK_SHUFFLE(w[i + 1], w[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    w[i] = MPK_SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    w[i + 4] = MPK_SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) v[i] = w[i];
}

// to[i * to_pitch + j] = from[i * pitch + j] for i < count, j < length.
template <class Compute, class From>
void widen_rows(const void* from_bytes, int64_t pitch, int64_t count, int64_t length, float* to, int64_t to_pitch) {
  for (int64_t i = 0; i < count; ++i) {
    const From* row = static_cast<const From*>(from_bytes) + i * pitch;
    float* widened = to + i * to_pitch;
    int64_t j = 0;
    for (; j + 8 <= length; j += 8) store(widened + j, load8<Compute>(row + j));
    for (; j < length; ++j) widened[j] = load1<Compute>(row + j);
  }
}

// to[j * to_pitch + i] = from[i * pitch + j] for i < count, j < length: rows become columns.
template <class Compute, class From>
void widen_transposed(const void* from_bytes, int64_t pitch, int64_t count, int64_t length, float* to, int64_t to_pitch) {
  const From* from = static_cast<const From*>(from_bytes);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const From* rows = from + i * pitch;
    int64_t j = 0;
    for (; j + 8 <= length; j += 8) {
      V8 v[8];
      for (int r = 0; r < 8; ++r) v[r] = load8<Compute>(rows + r * pitch + j);
      transpose(v);
      for (int r = 0; r < 8; ++r) store(to + (j + r) * to_pitch + i, v[r]);
    }
    for (; j < length; ++j) {
      for (int r = 0; r < 8; ++r) to[j * to_pitch + i + r] = load1<Compute>(rows + r * pitch + j);
    }
  }
  for (; i < count; ++i) {
    for (int64_t j = 0; j < length; ++j) to[j * to_pitch + i] = load1<Compute>(from + i * pitch + j);
  }
}

// ----- the register tile -----

// acc (R, kNR) = [acc +] a (R, K) @ panel (K, kNR). Each element is one chain of fused multiply-adds in the order of K,
// whatever R is.
template <int R>
void tile(const float* a, int64_t a_pitch, const float* panel, int64_t K, float* acc, int64_t acc_pitch, bool add) {
  V sum[R][2] = {};
  for (int64_t k = 0; k < K; ++k) {
    const V left = load<V>(panel + k * kNR), right = load<V>(panel + k * kNR + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V x = a[r * a_pitch + k] - V{};
      sum[r][0] = fma(x, left, sum[r][0]);
      sum[r][1] = fma(x, right, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float* to = acc + r * acc_pitch;
    store(to, add ? load<V>(to) + sum[r][0] : sum[r][0]);
    store(to + kWidth, add ? load<V>(to + kWidth) + sum[r][1] : sum[r][1]);
  }
}

template <size_t... R>
constexpr std::array<Tile, sizeof...(R)> tiles(std::index_sequence<R...>) {
  return {tile<R + 1>...};
}

constexpr auto kTiles = tiles(std::make_index_sequence<kMR>());

// ----- few rows -----

// sums[r * sums_pitch] = x[r] . weight for R rows of x, zero-padded to a multiple of kDotPadding. Each element of the weight is
// read from memory, once: a software prefetch brings it to the L2 cache, because L1 holds x. Blocks of kBlock are summed
// separately, as k-blocks of tiles are.
template <int R, class Compute, class From>
void dot(const void* weight_bytes, const float* x, int64_t x_pitch, int64_t length, float* sums, int64_t sums_pitch) {
  constexpr int kUnroll = R <= 2 ? 4 : 2;
  constexpr int64_t kStep = 8 * kUnroll, kBlock = 1024, kPrefetchDistance = 8192 / sizeof(From);
  static_assert(kDotPadding % kStep == 0 && kBlock % kStep == 0);
  const From* weight = static_cast<const From*>(weight_bytes);
  V8 sum[R][kUnroll] = {};
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, length);
    V8 block[R][kUnroll] = {};
    const auto step = [&](const From* w, int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const V8 v = load8<Compute>(w + 8 * u);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) block[r][u] = fma(load<V8>(x + r * x_pitch + k + 8 * u), v, block[r][u]);
      }
    };
    int64_t k = begin;
    for (; k + kStep <= end; k += kStep) {
      __builtin_prefetch(weight + k + kPrefetchDistance, /*rw=*/0, /*locality=*/2);
      step(weight + k, k);
    }
    if (k < end) {
      From rest[kStep] = {};
      std::memcpy(static_cast<void*>(rest), weight + k, (end - k) * sizeof(From));
      step(rest, k);
    }
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < kUnroll; ++u) sum[r][u] += block[r][u];
    }
  }
  for (int r = 0; r < R; ++r) {
    V8 v = sum[r][0] + sum[r][1];
    if constexpr (kUnroll == 4) v += sum[r][2] + sum[r][3];
    sums[r * sums_pitch] = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
}

// ----- what dispatch.h refers to -----

template <class Compute, class From>
constexpr MicroKernels kMicroKernels = {
    widen_rows<Compute, From>,
    widen_transposed<Compute, From>,
    {dot<1, Compute, From>, dot<2, Compute, From>, dot<3, Compute, From>, dot<4, Compute, From>},
};

inline const MicroKernels& micro_kernels(ScalarType compute, ScalarType from) {
  if (from == ScalarType::Float8_e4m3fn) return kMicroKernels<float, Float8_e4m3fn>;
  if (from == ScalarType::Float8_e5m2) return kMicroKernels<float, Float8_e5m2>;
  if (from == ScalarType::Half) return kMicroKernels<Half, Half>;
  if (from == ScalarType::BFloat16) return kMicroKernels<BFloat16, BFloat16>;
  if (compute == ScalarType::Half) return kMicroKernels<Half, float>;
  if (compute == ScalarType::BFloat16) return kMicroKernels<BFloat16, float>;
  return kMicroKernels<float, float>;
}

constexpr IsaKernels kKernels = {kMR, kNR, kTiles.data(), micro_kernels};
