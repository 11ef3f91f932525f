// SPDX-License-Identifier: Apache-2.0
// grad_stats_ on the CPU: one parallel region over all tensors, every gradient read once.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>

#include "../common/clones.h"
#include "../common/factor.h"
#include "../common/fetch.h"
#include "../common/runs.h"
#include "update.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace mpk {
namespace {

struct Stats {
  double amax = 0;
  int64_t nonfinite = 0;
  double squares = 0;
};

// A piece of a tensor is scanned for its largest magnitude, as bits and with NaN above inf; what is not finite is counted only
// where that says that there is something to count.

template <class T>
typename Bits<T>::type magnitude(T x) {
  return c10::bit_cast<typename Bits<T>::type>(x) & Bits<T>::kMagnitude;
}

template <class T>
MPK_CLONES typename Bits<T>::type largest_magnitude(const T* grad, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  typename Bits<T>::type lanes[kLine] = {};
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    if (kFetchesAhead) fetch_line_ahead<4096>(grad + i);
    for (int64_t lane = 0; lane < kLine; ++lane) lanes[lane] = std::max(lanes[lane], magnitude(grad[i + lane]));
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] = std::max(lanes[lane], magnitude(grad[i]));
  return *std::max_element(lanes, lanes + kLine);
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
    if (kFetchesAhead) fetch_line_ahead<4096>(grad + i);
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
// gcc 12 does not vectorize the conversions of fp16. The same bits as above: a square of fp16 is exact, so that a fused
// multiply-add rounds as an addition does.
__attribute__((target("avx2,fma,f16c"))) int16_t largest_magnitude_and_squares_of_half(const Half* grad, int64_t n,
                                                                                       double& squares) {
  const __m256i kept = _mm256_set1_epi16(Bits<Half>::kMagnitude);
  __m256i amax = {};
  __m256d quads[kLanes / 4] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (kFetchesAhead) fetch_line_ahead<4096>(grad + i);
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(grad + i));
    amax = _mm256_max_epi16(amax, _mm256_and_si256(bits, kept));
    for (int64_t half = 0; half < 2; ++half) {
      const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(grad + i + 8 * half)));
      const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
      quads[2 * half] = _mm256_fmadd_pd(low, low, quads[2 * half]);
      quads[2 * half + 1] = _mm256_fmadd_pd(high, high, quads[2 * half + 1]);
    }
  }
  Lanes<Half> lanes;
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes.amax), amax);
  for (int64_t quad = 0; quad < kLanes / 4; ++quad) _mm256_store_pd(lanes.squares + 4 * quad, quads[quad]);
  return finish(lanes, grad + i, n - i, squares);
}

const bool has_f16c_and_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif

template <class T>
auto find_largest_magnitude_and_squares() {
#ifdef __x86_64__
  if constexpr (std::is_same_v<T, Half>) {
    if (has_f16c_and_fma) return largest_magnitude_and_squares_of_half;
  }
#endif
  return largest_magnitude_and_squares<T>;
}

// The count of what is not finite in a piece, and the largest magnitude that is not NaN.
template <class T>
int64_t count(const T* grad, int64_t n, typename Bits<T>::type& amax) {
  using I = typename Bits<T>::type;
  static_assert(Runs::kLength <= std::numeric_limits<I>::max());
  I found = amax = 0;
  for (int64_t i = 0; i < n; ++i) grad_stats_element<T>(c10::bit_cast<I>(grad[i]), amax, found);
  return found;
}

template <class T>
void stats_run(const void* grads, int64_t begin, int64_t end, bool with_norm, Stats& stats) {
  const T* grad = static_cast<const T*>(grads) + begin;
  const int64_t n = end - begin;
  auto amax = with_norm ? find_largest_magnitude_and_squares<T>()(grad, n, stats.squares) : largest_magnitude(grad, n);
  if (amax >= Bits<T>::kInf) stats.nonfinite = count(grad, n, amax);
  stats.amax = convert<double>(c10::bit_cast<T>(amax));
}

auto find_run(ScalarType dtype) {
  if (dtype == ScalarType::Half) return stats_run<Half>;
  if (dtype == ScalarType::BFloat16) return stats_run<BFloat16>;
  if (dtype == ScalarType::Float) return stats_run<float>;
  STD_TORCH_CHECK(dtype == ScalarType::Double, "grads must be floating point");
  return stats_run<double>;
}

Stats total(const Runs& runs, int64_t tensor, const std::vector<Stats>& pieces) {
  Stats sum;
  if (runs.numel(tensor) == 0) return sum;
  for (int64_t i = runs.first_piece(tensor); i <= runs.last_piece(tensor); ++i) {
    sum.amax = std::max(sum.amax, pieces[i].amax);
    sum.nonfinite += pieces[i].nonfinite;
    sum.squares += pieces[i].squares;
  }
  return sum;
}

std::vector<Stats> stats_of_pieces(const Runs& runs, const TensorList& grads, bool with_norm) {
  std::vector<Stats> pieces(runs.pieces());
  runs.parallel_for_each([&](int64_t i, int64_t begin, int64_t end, int64_t piece) {
    find_run(grads.dtype(i))(grads.data(i), begin, end, with_norm, pieces[piece]);
  });
  return pieces;
}

void grad_stats_(Tensor grads_, std::optional<Tensor> grad_scale, Tensor found_inf, Tensor amax, Tensor nonfinite,
                 std::optional<Tensor> grad_norm) {
  const TensorList grads("grads", grads_);
  const Runs runs(grads);
  const std::vector<Stats> pieces = stats_of_pieces(runs, grads, grad_norm.has_value());
  const float scale = value_of<float>(grad_scale).value_or(1);
  const double inv = inv_scale(scale);
  bool bad = !is_good_scale(scale);
  double squares = 0;
  for (int64_t i = 0; i < grads.size(); ++i) {
    const Stats stats = total(runs, i, pieces);
    amax.mutable_data_ptr<double>()[i * amax.stride(0)] = stats.amax;
    nonfinite.mutable_data_ptr<int64_t>()[i * nonfinite.stride(0)] = stats.nonfinite;
    const bool is_double = grads.dtype(i) == ScalarType::Double;
    bad |= stats.nonfinite > 0 || (is_double ? overflows<double> : overflows<float>)(stats.amax, inv);
    squares += stats.squares;
  }
  *found_inf.mutable_data_ptr<float>() = bad;
  if (grad_norm) *grad_norm->mutable_data_ptr<double>() = std::sqrt(squares) * inv;
}

}  // namespace
}  // namespace mpk

STABLE_TORCH_LIBRARY_IMPL(mpkernels_C, CPU, m) { m.impl("grad_stats_", TORCH_BOX(&mpk::grad_stats_)); }
