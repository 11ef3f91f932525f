// SPDX-License-Identifier: Apache-2.0
// grad_stats_ on the CPU: one parallel region over all tensors, every gradient read once.

#include <torch/csrc/stable/library.h>

#include "../common/clones.h"
#include "../common/factor.h"
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

// A block is looked at twice where the norm is asked for: the second look finds it in the first-level cache, and is what the
// memory has time for the next block in. kBlock elements of 16 bits are kAhead bytes.
constexpr int64_t kBlock = 2048, kAhead = 4096;

template <class T>
MPK_CLONES void magnitude_block(const void* grad, int64_t n, Stats& stats) {
  using I = typename Bits<T>::type;
  const I* __restrict__ bits = static_cast<const I*>(grad);
  I amax = 0, count = 0;
  constexpr int64_t kLine = 64 / sizeof(T), kStretch = 4 * kLine;
  int64_t i = 0;
  for (; i + kStretch <= n; i += kStretch) {
    for (int64_t j = 0; j < kStretch; j += kLine) __builtin_prefetch(reinterpret_cast<const char*>(bits + i + j) + kAhead);
    for (int64_t j = 0; j < kStretch; ++j) grad_stats_element<T>(bits[i + j], amax, count);
  }
  for (; i < n; ++i) grad_stats_element<T>(bits[i], amax, count);
  stats.amax = std::max(stats.amax, convert<double>(c10::bit_cast<T>(amax)));
  stats.nonfinite += count;
}

// The sum has an order of its own, of kLanes partial sums, which is also what lets the compiler vectorize it.
constexpr int64_t kLanes = 16;

template <class T>
double total(const double (&sums)[kLanes], const T* tail, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += convert<double>(tail[i]) * convert<double>(tail[i]);
  for (const double lane : sums) sum += lane;
  return sum;
}

template <class T>
MPK_CLONES double sum_of_squares(const void* grads, int64_t n) {
  const T* grad = static_cast<const T*>(grads);
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double x = convert<double>(grad[i + lane]);
      sums[lane] += x * x;
    }
  }
  return total(sums, grad + i, n - i);
}

#ifdef __x86_64__
// gcc 12 does not vectorize the conversions of fp16. The same bits as above: a square of fp16 is exact, so that a fused
// multiply-add rounds as an addition does.
__attribute__((target("avx2,fma,f16c"))) double sum_of_squares_of_half(const void* grads, int64_t n) {
  const Half* grad = static_cast<const Half*>(grads);
  __m256d quads[kLanes / 4] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(reinterpret_cast<const char*>(grad + i) + kAhead);
    for (int64_t half = 0; half < 2; ++half) {
      const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(grad + i + 8 * half)));
      const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
      quads[2 * half] = _mm256_fmadd_pd(low, low, quads[2 * half]);
      quads[2 * half + 1] = _mm256_fmadd_pd(high, high, quads[2 * half + 1]);
    }
  }
  alignas(32) double sums[kLanes];
  for (int64_t quad = 0; quad < kLanes / 4; ++quad) _mm256_store_pd(sums + 4 * quad, quads[quad]);
  return total(sums, grad + i, n - i);
}

const bool has_f16c_and_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif

template <class T>
auto find_sum_of_squares() {
#ifdef __x86_64__
  if (std::is_same_v<T, Half> && has_f16c_and_fma) return sum_of_squares_of_half;
#endif
  return sum_of_squares<T>;
}

template <class T>
void stats_run(const void* grads, int64_t begin, int64_t end, bool with_norm, Stats& stats) {
  const T* grad = static_cast<const T*>(grads);
  const auto squares = find_sum_of_squares<T>();
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    magnitude_block<T>(grad + i, n, stats);
    if (with_norm) stats.squares += squares(grad + i, n);
  }
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
