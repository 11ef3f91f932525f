// SPDX-License-Identifier: Apache-2.0
// grad_stats_ on the CPU: one parallel region over all tensors, every gradient read once. And amax_, of one tensor.

#include <algorithm>
#include <cstring>
#include <numeric>

#include "../common/chunk_partition.h"
#include "../common/clones.h"
#include "../common/factor.h"
#include "../common/native_op.h"
#include "../common/prefetch.h"
#include "update.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace mpk {
namespace {

// A segment of a tensor is scanned for its largest magnitude, as bits and with NaN above inf; what is not finite is counted
// only where that says that there is something to count.

template <class T>
typename Bits<T>::type magnitude(T x) {
  return c10::bit_cast<typename Bits<T>::type>(x) & Bits<T>::kMagnitude;
}

// In a vector by name: GCC 12 makes scalars of the lanes of an array beside the prefetch.
template <class T>
MPK_CLONES typename Bits<T>::type largest_magnitude(const T* grad, int64_t n) {
  using I = typename Bits<T>::type;
  typedef I Line __attribute__((vector_size(64)));
  constexpr int64_t kLine = 64 / sizeof(T), kPlaces = 4;
  Line lanes = {};
  const auto scan = [&](const T* at) __attribute__((always_inline)) {
    Line line;
    std::memcpy(&line, at, sizeof line);
    line &= Bits<T>::kMagnitude;
    lanes = line > lanes ? line : lanes;
  };
  // AMD's prefetchers follow several places at once, and bring more than they do of one.
  const int64_t apart = kPrefetches ? 0 : n / (kPlaces * kLine) * kLine;
  for (int64_t at = 0; at < apart; at += kLine) {
    for (int64_t place = 0; place < kPlaces; ++place) scan(grad + place * apart + at);
  }
  int64_t i = kPlaces * apart;
  for (; i + kLine <= n; i += kLine) {
    if (kPrefetches) prefetch_line<4096>(grad + i);
    scan(grad + i);
  }
  I amax = 0;
  for (int64_t lane = 0; lane < kLine; ++lane) amax = std::max<I>(amax, lanes[lane]);
  for (; i < n; ++i) amax = std::max(amax, magnitude(grad[i]));
  return amax;
}

// The sum has an order of its own, of kLanes partial sums, which is also what lets the compiler vectorize it.
constexpr int64_t kLanes = 16;

template <class T>
struct Lanes {
  alignas(32) typename Bits<T>::type amax[kLanes] = {};
  alignas(32) double squares[kLanes] = {};
};

template <class T>
typename Bits<T>::type finish(const Lanes<T>& lanes, const T* tail, int64_t n, double& squares) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += convert<double>(tail[i]) * convert<double>(tail[i]);
  squares += std::accumulate(lanes.squares, lanes.squares + kLanes, sum);
  return std::max(largest_magnitude(tail, n), *std::max_element(lanes.amax, lanes.amax + kLanes));
}

// Adds to `squares` in one loop with the comparison, so that arithmetic and memory have the same time.
template <class T>
MPK_CLONES typename Bits<T>::type largest_magnitude_and_squares(const T* grad, int64_t n, double& squares) {
  Lanes<T> lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (kPrefetches) prefetch_line<4096>(grad + i);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes.amax[lane] = std::max(lanes.amax[lane], magnitude(grad[i + lane]));
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double x = convert<double>(grad[i + lane]);
      lanes.squares[lane] += x * x;
    }
  }
  return finish(lanes, grad + i, n - i, squares);
}

#ifdef __x86_64__
// The same for 16-bit numbers, with the same bits. Conversions to fp64 would take longest: instead the bits of an fp32 (a bf16
// is the upper half of one) are shifted to where an fp64 has its own, which makes them those of the number times 2^-896.
template <class T>
struct Squares;  // `add` takes kLanes numbers

template <>
struct Squares<Half> {
  __m256d sums[4] = {};  // times 2^-896; of elements 0 2 4 6, 1 3 5 7, 8 10 12 14, 9 11 13 15

  MPK_AVX2 void add(const Half* grad) {
    const __m256i high = _mm256_set1_epi64x(0xFFFFFFFF00000000);
    for (int64_t j = 0; j < 2; ++j) {
      const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(grad + 8 * j)));
      const __m256i square = _mm256_castps_si256(_mm256_mul_ps(x, x));             // exact
      const __m256i even = _mm256_mul_epu32(square, _mm256_set1_epi64x(1 << 29));  // drops the odd ones and shifts
      const __m256i odd = _mm256_srli_epi64(_mm256_and_si256(square, high), 3);
      sums[2 * j] = _mm256_add_pd(sums[2 * j], _mm256_castsi256_pd(even));
      sums[2 * j + 1] = _mm256_add_pd(sums[2 * j + 1], _mm256_castsi256_pd(odd));
    }
  }
  double lane(int64_t i) const { return sums[i / 8 * 2 + i % 2][i % 8 / 2] * 0x1p896; }
};

template <>
struct Squares<BFloat16> {
  __m256d sums[4] = {};  // of elements 0 4 8 12, 1 5 9 13 and so on

  MPK_AVX2 void add(const BFloat16* grad) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(grad));
    for (int64_t j = 0; j < 4; ++j) {
      const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi64x(int64_t{0x7FFF} << 16 * j));
      const __m256i shifted = j < 3 ? _mm256_slli_epi64(magnitude, 45 - 16 * j) : _mm256_srli_epi64(magnitude, 3);
      const __m256d x = _mm256_mul_pd(_mm256_castsi256_pd(shifted), _mm256_set1_pd(0x1p896));
      sums[j] = _mm256_fmadd_pd(x, x, sums[j]);  // a square is exact: as rounded as an addition
    }
  }
  double lane(int64_t i) const { return sums[i % 4][i / 4]; }
};

template <class T>
MPK_AVX2 int16_t largest_magnitude_and_squares_of_16_bits(const T* grad, int64_t n, double& squares) {
  const __m256i kept = _mm256_set1_epi16(Bits<T>::kMagnitude);
  __m256i amax = {};
  Squares<T> sums;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (i % (2 * kLanes) == 0) prefetch_line<4096>(grad + i);  // on AMD's CPUs too
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(grad + i));
    amax = _mm256_max_epi16(amax, _mm256_and_si256(bits, kept));
    sums.add(grad + i);
  }
  Lanes<T> lanes;
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes.amax), amax);
  if (*std::max_element(lanes.amax, lanes.amax + kLanes) >= Bits<T>::kInf) {  // whose bits are not shifted to an inf
    return largest_magnitude_and_squares(grad, n, squares);
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes.squares[lane] = sums.lane(lane);
  return finish(lanes, grad + i, n - i, squares);
}
#endif

template <class T>
auto find_largest_magnitude_and_squares() {
#ifdef __x86_64__
  if constexpr (sizeof(T) == 2) {
    if (has_avx2) return largest_magnitude_and_squares_of_16_bits<T>;
  }
#endif
  return largest_magnitude_and_squares<T>;
}

// Of numbers times `scale`, in the same order.
MPK_CLONES double scaled_squares(const double* grad, int64_t n, double scale) {
  Lanes<double> lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double x = grad[i + lane] * scale;
      lanes.squares[lane] += x * x;
    }
  }
  double sum = 0;
  for (; i < n; ++i) sum += grad[i] * scale * (grad[i] * scale);
  return std::accumulate(lanes.squares, lanes.squares + kLanes, sum);
}

// The count of what is not finite in a segment, and the largest magnitude that is not NaN.
template <class T>
int64_t count(const T* grad, int64_t n, typename Bits<T>::type& amax) {
  using I = typename Bits<T>::type;
  static_assert(ChunkPartition::kLength <= std::numeric_limits<I>::max());
  I found = amax = 0;
  for (int64_t i = 0; i < n; ++i) grad_stats_element<T>(c10::bit_cast<I>(grad[i]), amax, found);
  return found;
}

template <class T>
void segment_stats(const void* grads, int64_t begin, int64_t end, bool with_norm, Stats& stats) {
  const T* grad = static_cast<const T*>(grads) + begin;
  const int64_t n = end - begin;
  auto amax = with_norm ? find_largest_magnitude_and_squares<T>()(grad, n, stats.squares) : largest_magnitude(grad, n);
  if (amax >= Bits<T>::kInf) stats.nonfinite = count(grad, n, amax);
  stats.amax = convert<double>(c10::bit_cast<T>(amax));
  if constexpr (std::is_same_v<T, double>) {
    const double scale = square_scale(size_class(stats.amax));
    if (with_norm && scale != 1 && stats.amax > 0) stats.squares = scaled_squares(grad, n, scale);
  }
}

auto find_segment_stats(ScalarType dtype) {
  return with_float("grads", dtype, [](auto x) { return segment_stats<decltype(x)>; });
}

Stats total(const ChunkPartition& partition, int64_t tensor, const std::vector<Stats>& segments) {
  Stats sum{};
  if (partition.numel(tensor) == 0) return sum;
  for (int64_t i = partition.first_segment(tensor); i <= partition.last_segment(tensor); ++i) sum.merge(segments[i]);
  return sum;
}

std::vector<Stats> stats_of_segments(const ChunkPartition& partition, const TensorList& grads, bool with_norm) {
  std::vector<Stats> segments(partition.segments());
  partition.parallel_for_each([&](int64_t i, int64_t begin, int64_t end, int64_t segment) {
    find_segment_stats(grads.dtype(i))(grads.data(i), begin, end, with_norm, segments[segment]);
  });
  return segments;
}

void grad_stats_(Tensor grads_, std::optional<Tensor> grad_scale, Tensor found_inf, Tensor amax, Tensor nonfinite,
                 std::optional<Tensor> grad_norm) {
  const TensorList grads("grads", grads_);
  check_vector("amax", amax, grads.size());
  check_vector("nonfinite", nonfinite, grads.size());
  const ChunkPartition partition(grads);
  const std::vector<Stats> segments = stats_of_segments(partition, grads, grad_norm.has_value());
  const float scale = grad_scale ? *grad_scale->number<float>() : 1;
  const double inv = inv_scale(scale);
  bool bad = !is_good_scale(scale);
  Stats all{};
  for (int64_t i = 0; i < grads.size(); ++i) {
    const Stats stats = total(partition, i, segments);
    amax.mutable_data_ptr<double>()[i * amax.stride(0)] = stats.amax;
    nonfinite.mutable_data_ptr<int64_t>()[i * nonfinite.stride(0)] = stats.nonfinite;
    const bool is_double = grads.dtype(i) == ScalarType::Double;
    bad |= stats.nonfinite > 0 || (is_double ? overflows<double> : overflows<float>)(stats.amax, inv);
    all.merge(stats);
  }
  *found_inf.number<float>() = bad;
  if (grad_norm) *grad_norm->number<double>() = all.norm(inv);
}

// ----- a watch: mpkernels/precision/taps.py -----

template <class T>
typename Bits<T>::type largest_magnitude_in_parallel(const T* x, int64_t n) {
  constexpr int64_t kLength = ChunkPartition::kLength;
  std::vector<typename Bits<T>::type> chunks((n + kLength - 1) / kLength);
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), /*grain_size=*/2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) chunks[i] = largest_magnitude(x + i * kLength, std::min(kLength, n - i * kLength));
  });
  return *std::max_element(chunks.begin(), chunks.end());
}

// The largest magnitude of n elements, NaN above inf; nothing where -inf is to be ignored and is all that is infinite.
template <class T>
std::optional<double> amax_of(const void* data, int64_t n, bool ignores_minus_inf) {
  using I = typename Bits<T>::type;
  const T* x = static_cast<const T*>(data);
  const I amax = n <= ChunkPartition::kLength ? largest_magnitude(x, n) : largest_magnitude_in_parallel(x, n);
  const auto is_inf = [](T value) { return c10::bit_cast<I>(value) == Bits<T>::kInf; };
  if (ignores_minus_inf && amax == Bits<T>::kInf && std::none_of(x, x + n, is_inf)) return std::nullopt;
  return convert<double>(c10::bit_cast<T>(amax));
}

// f(pointer to the first number of a table, of fp32 or fp64)
template <class F>
void with_numbers(Tensor& table, const F& f) {
  STD_TORCH_CHECK(table.is_contiguous(), "table must be contiguous");
  if (table.scalar_type() == ScalarType::Double) {
    f(table.mutable_data_ptr<double>());
  } else {
    f(table.mutable_data_ptr<float>());
  }
}

// The number at `index` of `table` is raised; what is below 0 there is below every magnitude.
void amax_(Tensor x, Tensor table, int64_t index, bool ignores_minus_inf) {
  STD_TORCH_CHECK(index >= 0 && index < table.numel(), "index must be in the table");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  if (x.numel() == 0) return;
  const auto find_amax = with_float("x", x.scalar_type(), [](auto number) { return amax_of<decltype(number)>; });
  const std::optional<double> amax = find_amax(x.const_data_ptr(), x.numel(), ignores_minus_inf);
  if (!amax) return;
  with_numbers(table, [&](auto* numbers) {
    auto& number = numbers[index];
    if (number == number && !(number >= *amax)) number = *amax;
  });
}

// `last` becomes `table`, with the scale at `index`, and the table is filled with `nothing`.
void end_step_(Tensor table, Tensor last, std::optional<Tensor> scale, int64_t index, double nothing) {
  STD_TORCH_CHECK(table.scalar_type() == last.scalar_type() && table.numel() == last.numel(), "last must be like table");
  STD_TORCH_CHECK(index >= 0 && index < table.numel(), "index must be in the table");
  with_numbers(table, [&](auto* numbers) {
    if (scale) numbers[index] = *scale->number<float>();
    with_numbers(last, [&](auto* copied) { std::copy(numbers, numbers + table.numel(), copied); });
    std::fill(numbers, numbers + table.numel(), nothing);
  });
}

const NativeOp registered[] = {
    {"grad_stats_", Device::kCpu, grad_stats_},
    {"amax_", Device::kCpu, amax_},
    {"end_step_", Device::kCpu, end_step_},
};

}  // namespace
}  // namespace mpk
