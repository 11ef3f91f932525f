// SPDX-License-Identifier: Apache-2.0
// grad_stats_ on the GPU: a block for each chunk; the last block of a tensor sums its chunks, the last of the call gives the
// verdict. Every sum has an order of its own, whatever block is first or last.

#include <map>
#include <mutex>
#include <utility>

#include "../common/dtype.h"
#include "../common/factor.h"
#include "../common/last_block.cuh"
#include "../common/launch.h"
#include "../common/multi_tensor.cuh"
#include "../common/native_op.h"
#include "../common/stream.h"
#include "../common/tensor_list.h"
#include "../common/vector.cuh"
#include "update.h"

namespace mpk {
namespace {

constexpr int kLanes = 32;
constexpr int kInFlight = 4;           // 16-byte loads of a thread
constexpr int kBlocksPerSm = 4;        // at least; asked for none, the compiler saves registers and puts off loads
constexpr int64_t kMostChunks = 4096;  // or the sum of one large tensor's, by one block, takes as long as its chunks

__device__ Stats from_lane_above(const Stats& stats, int distance) {
  Stats other;
  other.amax = __shfl_down_sync(~0u, stats.amax, distance);
  other.squares = __shfl_down_sync(~0u, stats.squares, distance);
  other.nonfinite = __shfl_down_sync(~0u, static_cast<long long>(stats.nonfinite), distance);
  return other;
}

// The sum of a warp, in its lane 0.
__device__ Stats reduce_warp(Stats sum) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum.merge(from_lane_above(sum, distance));
  return sum;
}

// The sum of a block, in its thread 0.
__device__ Stats reduce_block(const Stats& share) {
  __shared__ Stats sums[kThreads];
  Stats sum = share;
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kLanes) return sum;
  for (int i = threadIdx.x + kLanes; i < kThreads; i += kLanes) sum.merge(sums[i]);
  return reduce_warp(sum);
}

// The sum of what blocks have found, by a block, in its thread 0: of each thread kAtOnce sums in a fixed order, for which as
// many loads are on their way.
__device__ Stats sum_of_blocks(const Stats* from, int64_t count) {
  constexpr int kAtOnce = 2;
  Stats sums[kAtOnce] = {};
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += kAtOnce * kThreads) {
    Stats next[kAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (i + k * kThreads < count) next[k] = load_of_blocks(from + i + k * kThreads);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sums[k].merge(next[k]);
  }
  sums[0].merge(sums[1]);
  return reduce_block(sums[0]);
}

// ----- the argument -----

struct Verdict {
  const float* grad_scale;  // null: 1
  float* found_inf;
  double* amax;
  int64_t* nonfinite;
  double* grad_norm;  // null where it is not asked for
  int64_t amax_stride, nonfinite_stride;

  __device__ float scale() const { return grad_scale == nullptr ? 1 : *grad_scale; }
};

struct StatsArguments {
  Verdict verdict;
  Stats* chunks;      // of this launch
  Stats* rows;        // of the call; nonfinite is 1 where the tensor overflows
  int64_t row_count;  // 0 if another launch of the call follows
  unsigned* tickets;  // of each tensor, and one of the launch
  TensorTable<1, 128> tensors;
};
static_assert(sizeof(StatsArguments) <= kArgumentBytes);
constexpr int kTickets = kMostTensors + 1;

// ----- chunks -----

// The largest magnitude, as bits and with NaN above inf. Two 16-bit numbers at a time: shifted to the upper end of a word, of
// which the lower half decides nothing, so that each takes two instructions.
template <class T, int N>
__device__ inline typename Bits<T>::type largest_magnitude(const Elements<T, N> (&x)[kInFlight]) {
  using I = typename Bits<T>::type;
  if constexpr (sizeof(T) == 2) {
    uint32_t largest[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      uint32_t words[(N + 1) / 2];
      if constexpr (N == 1) {
        words[0] = c10::bit_cast<uint16_t>(x[k]);
      } else {
        memcpy(words, &x[k], sizeof(words));
      }
#pragma unroll
      for (const uint32_t word : words) {
        largest[0] = max(largest[0], word << 17);
        largest[1] = max(largest[1], word << 1);
      }
    }
    return static_cast<I>(max(largest[0], largest[1]) >> 17);
  } else {
    I largest = 0;
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
#pragma unroll
      for (int j = 0; j < N; ++j) largest = max(largest, c10::bit_cast<I>(x[k].at[j]) & Bits<T>::kMagnitude);
    }
    return largest;
  }
}

// One thread's share of a chunk. What is not finite is counted only where the largest magnitude says that there is some.
template <class T, bool kNorm>
struct Share {
  using I = typename Bits<T>::type;
  double scale = 1;  // of the squares
  I amax = 0;
  int64_t nonfinite = 0;
  double squares = 0;

  __device__ void add(T grad) {
    double x = convert<double>(grad);
    if constexpr (std::is_same_v<T, double>) x *= scale;
    squares = fma(x, x, squares);
  }

  // N elements kInFlight times over, read again.
  template <int N>
  __device__ void count(const T* grad, int64_t begin, int64_t end) {
#pragma unroll 1
    for (int i = 0; i < kInFlight * N; ++i) {
      const int64_t at = begin + i / N * int64_t{kThreads} * N + i % N;
      if (at >= end) return;
      Elements<T, 1> x;
      load<LoadReadOnly>(grad + at, x);
      I count = 0;
      grad_stats_element<T>(c10::bit_cast<I>(x.at[0]), amax, count);
      nonfinite += count;
    }
  }

  template <int N>
  __device__ void add_span(const T* grad, int64_t begin, int64_t end) {
    constexpr int64_t kStride = int64_t{kThreads} * N;
    for (int64_t i = begin + int64_t{threadIdx.x} * N; i < end; i += kStride * kInFlight) {
      Elements<T, N> x[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        memset(&x[k], 0, sizeof(x[k]));  // zeros add nothing
        if (i + k * kStride < end) load<LoadReadOnly>(grad + i + k * kStride, x[k]);
      }
      const I largest = largest_magnitude(x);
      if (largest >= Bits<T>::kInf) {
        count<N>(grad, i, end);
      } else {
        amax = max(amax, largest);
      }
      if constexpr (kNorm) {
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
#pragma unroll
          for (int j = 0; j < N; ++j) add(x[k].at[j]);
        }
      }
    }
  }

  __device__ void add_all(const T* grad, int64_t begin, int64_t end) {
    constexpr int N = kWidest / sizeof(T);
    const int64_t past = reinterpret_cast<uintptr_t>(grad) / sizeof(T) % N;
    const int64_t head = begin + (N - past) % N, body = head < end ? head : end, tail = body + (end - body) / N * N;
    add_span<N>(grad, body, tail);
#pragma unroll 1
    for (int part = 0; part < 2; ++part) add_span<1>(grad, part ? tail : begin, part ? end : body);
  }

  __device__ Stats stats() const { return {convert<double>(c10::bit_cast<T>(amax)), squares, nonfinite}; }
};

template <class T, bool kNorm>
__device__ Stats stats_of(const char* data, int64_t begin, int64_t end) {
  const T* grad = reinterpret_cast<const T*>(data);
  Share<T, kNorm> share;
  share.add_all(grad, begin, end);
  if constexpr (kNorm && std::is_same_v<T, double>) {
    const double scale = square_scale(size_class(share.stats().amax));
    if (scale != 1 && share.amax > 0) {
      share = {scale};
      share.add_all(grad, begin, end);
    }
  }
  return share.stats();
}

template <bool kNorm>
__device__ Stats stats_of(const char* grad, ScalarType dtype, int64_t begin, int64_t end) {
  if (dtype == ScalarType::Half) return stats_of<Half, kNorm>(grad, begin, end);
  if (dtype == ScalarType::BFloat16) return stats_of<BFloat16, kNorm>(grad, begin, end);
  if (dtype == ScalarType::Float) return stats_of<float, kNorm>(grad, begin, end);
  return stats_of<double, kNorm>(grad, begin, end);
}

// ----- tensors and the verdict, by the last block of each -----

__device__ void finish_tensor(const StatsArguments& a, int i) {
  const Stats stats = sum_of_blocks(a.chunks + a.tensors.first_chunk[i], a.tensors.end_chunk(i) - a.tensors.first_chunk[i]);
  if (threadIdx.x != 0) return;
  const Verdict& verdict = a.verdict;
  const int64_t row = a.tensors.row[i];
  const double inv = inv_scale(verdict.scale());
  const bool is_double = a.tensors.grad_dtype[i] == ScalarType::Double;
  const bool too_large = is_double ? overflows<double>(stats.amax, inv) : overflows<float>(stats.amax, inv);
  verdict.amax[row * verdict.amax_stride] = stats.amax;
  verdict.nonfinite[row * verdict.nonfinite_stride] = stats.nonfinite;
  store_for_blocks(a.rows + row, {stats.amax, stats.squares, stats.nonfinite > 0 || too_large});
}

__device__ void finish_call(const StatsArguments& a) {
  const Stats total = sum_of_blocks(a.rows, a.row_count);
  if (threadIdx.x != 0) return;
  const float scale = a.verdict.scale();
  *a.verdict.found_inf = !is_good_scale(scale) || total.nonfinite > 0;
  if (a.verdict.grad_norm != nullptr) *a.verdict.grad_norm = total.norm(inv_scale(scale));
}

template <bool kNorm>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) stats_kernel(MPK_GRID_CONSTANT(StatsArguments) a) {
  // map block to chunk
  const TensorChunk chunk = a.tensors.find(blockIdx.x);
  const int i = chunk.tensor;

  // load / accumulate
  const Stats share = stats_of<kNorm>(a.tensors.data[0][i], a.tensors.grad_dtype[i], chunk.begin, chunk.end);

  // store
  const Stats stats = reduce_block(share);
  if (threadIdx.x == 0) store_for_blocks(a.chunks + blockIdx.x, stats);
  if (!is_last_block(a.tickets + i, a.tensors.end_chunk(i) - a.tensors.first_chunk[i])) return;
  finish_tensor(a, i);
  if (is_last_block(a.tickets + kMostTensors, a.tensors.count) && a.row_count > 0) finish_call(a);
}

// ----- on the host -----

// Depends on the sizes alone, and so do the cuts and the norm's bits.
int64_t chunk_length(const TensorList& grads) {
  int64_t total = 0;
  for (int64_t i = 0; i < grads.size(); ++i) total += grads.numel(i);
  return kChunkUnit * std::max<int64_t>((total + kChunkUnit * kMostChunks - 1) / (kChunkUnit * kMostChunks), 1);
}

// kTickets of a launch, 0 before and after it: the stream's, whose launches follow one another. A CUDA graph can be replayed
// beside the stream that it was captured in, and has its own.
Scratch<unsigned> tickets_for(const Tensor& like, cudaStream_t stream) {
  const auto make = [&] {
    const Scratch<unsigned> tickets(like, kTickets);
    check_cuda(cudaMemsetAsync(tickets.data(), 0, kTickets * sizeof(unsigned), stream));
    return tickets;
  };
  if (is_capturing(stream)) return make();
  static std::mutex mutex;
  static auto& of_streams =
      *new std::map<std::pair<int32_t, cudaStream_t>, Scratch<unsigned>>;  // at exit CUDA may be gone before it
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<int32_t, cudaStream_t> key{like.get_device_index(), stream};
  const auto found = of_streams.find(key);
  return found != of_streams.end() ? found->second : of_streams.emplace(key, make()).first->second;
}

void launch_table(StatsArguments& a, const Tensor& like, cudaStream_t stream) {
  const Scratch<Stats> chunks(like, a.tensors.chunks);
  a.chunks = chunks.data();
  if (a.verdict.grad_norm != nullptr) {
    launch<stats_kernel<true>>(a.tensors.chunks, kThreads, 0, stream, a);
  } else {
    launch<stats_kernel<false>>(a.tensors.chunks, kThreads, 0, stream, a);
  }
}

void grad_stats_(Tensor grads_, std::optional<Tensor> grad_scale, Tensor found_inf, Tensor amax, Tensor nonfinite,
                 std::optional<Tensor> grad_norm) {
  const TensorList grads("grads", grads_);
  check_vector("amax", amax, grads.size());
  check_vector("nonfinite", nonfinite, grads.size());
  const OnDevice device(found_inf);
  const Scratch<Stats> rows(found_inf, grads.size());
  const Scratch<unsigned> tickets = tickets_for(found_inf, device.stream());
  StatsArguments a;
  a.verdict = {address_of<float>(grad_scale),
               found_inf.number<float>(),
               amax.mutable_data_ptr<double>(),
               nonfinite.mutable_data_ptr<int64_t>(),
               address_of<double>(grad_norm),
               amax.stride(0),
               nonfinite.stride(0)};
  a.rows = rows.data();
  a.tickets = tickets.data();
  const int64_t length = chunk_length(grads);
  a.tensors.clear(length);
  for (int64_t row = 0; row < grads.size(); ++row) {
    const int i = a.tensors.add(row, grads.numel(row));
    a.tensors.grad_dtype[i] = grads.dtype(row);
    a.tensors.data[0][i] = grads.data(row);
    const bool is_last = row + 1 == grads.size();
    if (!a.tensors.is_full() && !is_last) continue;
    a.row_count = is_last ? grads.size() : 0;
    launch_table(a, found_inf, device.stream());
    a.tensors.clear(length);
  }
}

const NativeOp registered("grad_stats_", Device::kCuda, grad_stats_);

}  // namespace
}  // namespace mpk
