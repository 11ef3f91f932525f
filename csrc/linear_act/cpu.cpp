// SPDX-License-Identifier: Apache-2.0
// linear_act's products on the CPU: out = round(act(a @ b.T + bias)), operands rounded to the compute dtype as they are read,
// products and sums in fp32, those of bf16 by pairs where the CPU has that; nothing else written. The same bits with any number
// of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../common/cast.h"
#include "../common/check.h"
#include "../common/clones.h"

// Function by function, which clang does otherwise.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MPK_INTEL_LOOPS
#include <immintrin.h>
#if defined(__linux__) && __GNUC__ >= 12
#define MPK_PAIRS
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "activation.h"
#include "cpu_pairs.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // of passing vectors: no function that does is called from another file

#if defined(__clang__) || __GNUC__ >= 12
#define MPK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MPK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I8{__VA_ARGS__})
#endif

namespace mpk {
namespace {

// ----- loops by instruction set -----

using V8 = float __attribute__((vector_size(32)));
using U8 = uint32_t __attribute__((vector_size(32)));
using I8 = int32_t __attribute__((vector_size(32)));

constexpr int64_t kFewRows = 4;      // of a: up to here reading b costs more than multiplying with it, so it is read as it lies
constexpr int64_t kDotPadding = 32;  // elements

using Widen = void (*)(const void* from, int64_t pitch, int64_t count, int64_t length, float* to, int64_t to_pitch);
using Dot = void (*)(const void* weight, const float* x, int64_t x_pitch, int64_t length, float* sums, int64_t sums_pitch);
using Tile = void (*)(const float* a, int64_t a_pitch, const float* panel, int64_t depth, float* acc, int64_t acc_pitch,
                      bool add);

// For a matrix of one dtype and one compute dtype.
struct Loops {
  Widen rows, transposed;
  Dot dot[kFewRows];  // of 1 row of x, of 2, ...
};

struct InstructionSet {
  int64_t lanes;          // numbers in a register that is multiplied: of fp32, or of bf16 where there are pairs
  int64_t rows, columns;  // of a tile
  const Tile* tiles;      // of 1 row, of 2, ...
  const Loops& (*loops)(ScalarType compute, ScalarType from);
  const Pairs* pairs = nullptr;  // of bf16

  const Pairs* pairs_in(ScalarType compute) const { return compute == ScalarType::BFloat16 ? pairs : nullptr; }
};

namespace any {
constexpr int kLanes = 4, kRows = 4;
template <class Vector>
inline Vector fma(const Vector& a, const Vector& b, const Vector& c) {
  return a * b + c;
}
inline V8 widen(const Half* from) {
  V8 v;
  for (int i = 0; i < 8; ++i) v[i] = convert<float>(from[i]);
  return v;
}
inline void narrow(const V8& v, Half* to) {
  for (int i = 0; i < 8; ++i) to[i] = convert<Half>(v[i]);  // round: fp32 -> fp16
}
#include "cpu_loops.h"
}  // namespace any

namespace any_by_pairs {
constexpr int kLanes = 16, kRows = 4;
using any::fma, any::narrow, any::widen;
#include "cpu_loops.h"
}  // namespace any_by_pairs

#ifdef MPK_INTEL_LOOPS
#define MPK_F16C                                                                                                               \
  inline V8 widen(const Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }       \
  inline void narrow(V8 v, Half* to) {                                                                                         \
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); /* round: fp32 -> fp16 */ \
  }

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
constexpr int kLanes = 8, kRows = 6;  // 12 sums, 2 vectors of the panel and x in 16 registers
inline V8 fma(V8 a, V8 b, V8 c) { return _mm256_fmadd_ps(a, b, c); }
MPK_F16C
#include "cpu_loops.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
constexpr int kLanes = 16, kRows = 14;  // 28 sums, 2 vectors of the panel and x in 32 registers
using V16 = float __attribute__((vector_size(64)));
inline V8 fma(V8 a, V8 b, V8 c) { return _mm256_fmadd_ps(a, b, c); }
inline V16 fma(V16 a, V16 b, V16 c) { return _mm512_fmadd_ps(a, b, c); }
MPK_F16C
#include "cpu_loops.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

constexpr InstructionSet with_pairs(InstructionSet set, int64_t lanes, const Pairs* pairs) {
  set.lanes = lanes;
  set.pairs = pairs;
  return set;
}

constexpr InstructionSet kAnyByPairs = with_pairs(any_by_pairs::kInstructionSet, 2, &kPairsByNumbers);
#ifdef MPK_PAIRS
constexpr InstructionSet kAvx512Bf16 = with_pairs(avx512::kInstructionSet, 32, &kPairsByVectors);
constexpr InstructionSet kAmx = with_pairs(avx512::kInstructionSet, 512, &kPairsByAmx);
#endif

// The fastest first.
std::vector<const InstructionSet*> instruction_sets() {
  std::vector<const InstructionSet*> found;
#ifdef MPK_INTEL_LOOPS
  const auto has = [](bool a, bool b, bool c) { return a && b && c; };
  if (has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("f16c"))) {
    if (has(__builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl"))) {
      found.push_back(&avx512::kInstructionSet);
#ifdef MPK_PAIRS
      // Intel's multiply pairs by AVX-512 BF16 more slowly than single ones by AVX-512.
      if (has_avx512_bf16()) found.insert(__builtin_cpu_is("intel") ? found.end() : found.begin(), &kAvx512Bf16);
      if (has_amx()) found.insert(found.begin(), &kAmx);
#endif
    }
    found.push_back(&avx2::kInstructionSet);
  }
#endif
  found.insert(found.end(), {&any::kInstructionSet, &kAnyByPairs});
  return found;
}

// `lanes`: 0 for the fastest that this CPU has.
const InstructionSet& instruction_set(int64_t lanes) {
  static const std::vector<const InstructionSet*> found = instruction_sets();
  if (lanes == 0) return *found.front();
  const auto at = std::find_if(found.begin(), found.end(), [&](const auto* set) { return set->lanes == lanes; });
  STD_TORCH_CHECK(at != found.end(), "this CPU has no registers of ", lanes, " numbers to multiply");
  return **at;
}

// ----- operands and result -----

// Sizes and strides in elements; of two dimensions one has stride 1.
struct Matrix {
  Matrix(const char* name, const Tensor& tensor, ScalarType compute, const InstructionSet& set)
      : data(static_cast<const char*>(tensor.const_data_ptr())),
        rows(tensor.size(0)),
        columns(tensor.size(1)),
        row_stride(rows <= 1 ? 1 : tensor.stride(0)),
        column_stride(columns <= 1 ? 1 : tensor.stride(1)),
        loops(&set.loops(compute, tensor.scalar_type())),
        size(size_of(tensor.scalar_type())) {
    const ScalarType from = tensor.scalar_type();
    const bool widens = from == compute || (compute == ScalarType::Float && size == 2);
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && (widens || from == ScalarType::Float), name,
                    " must be a matrix in the compute dtype or fp32");
    STD_TORCH_CHECK(row_stride == 1 || column_stride == 1, name, " must have rows or columns without gaps");
  }

  Matrix transposed() const {
    Matrix other = *this;
    std::swap(other.rows, other.columns);
    std::swap(other.row_stride, other.column_stride);
    return other;
  }

  // Whether the bf16 of a row lie in pairs that could be read as one fp32.
  bool has_pairs() const { return size == 2 && column_stride == 1 && row_stride % 2 == 0; }

  // Whether the first and second of pairs lie in columns without gaps.
  bool has_pairs_across() const { return size == 2 && row_stride == 1; }

  // The matrix of pairs, which `moves` carries as they are.
  Matrix in_pairs(const Loops& moves) const {
    Matrix other = *this;
    other.columns /= 2;
    other.row_stride /= 2;
    other.size = 4;
    other.loops = &moves;
    return other;
  }

  const char* at(int64_t row, int64_t column) const { return data + (row * row_stride + column * column_stride) * size; }

  // to[i * pitch + j] = element (row + i, column + j).
  void widen(int64_t row, int64_t column, int64_t count, int64_t length, float* to, int64_t pitch) const {
    if (column_stride == 1)
      loops->rows(at(row, column), row_stride, count, length, to, pitch);
    else
      loops->transposed(at(row, column), column_stride, length, count, to, pitch);
  }

  // to[j * pitch + i] = element (row + i, column + j).
  void widen_transposed(int64_t row, int64_t column, int64_t count, int64_t length, float* to, int64_t pitch) const {
    if (column_stride == 1)
      loops->transposed(at(row, column), row_stride, count, length, to, pitch);
    else
      loops->rows(at(row, column), column_stride, length, count, to, pitch);
  }

  const char* data;
  int64_t rows, columns, row_stride, column_stride;
  const Loops* loops;
  int64_t size;
};

MPK_CLONES void add(float* z, const float* bias, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] += bias[i];
}

class Output {
 public:
  // saved: filled with what the activation is applied to.
  Output(const Tensor& out, const std::optional<Tensor>& bias, int64_t activation, const std::optional<Tensor>& saved)
      : data_(static_cast<char*>(out.mutable_data_ptr())),
        pitch_(out.size(1)),
        size_(size_of(out.scalar_type())),
        round_(find_cast(ScalarType::Float, out.scalar_type())),
        activate_(activation_loops(activation).activate) {
    STD_TORCH_CHECK(out.is_cpu() && out.dim() == 2 && out.is_contiguous(), "out must be a contiguous matrix");
    if (saved) {
      STD_TORCH_CHECK(saved->is_cpu() && saved->dim() == 2 && saved->size(0) == out.size(0) && saved->size(1) == out.size(1) &&
                          saved->is_contiguous(),
                      "saved must be a contiguous matrix as large as out");
      saved_ = static_cast<char*>(saved->mutable_data_ptr());
      saved_size_ = size_of(saved->scalar_type());
      round_saved_ = find_cast(ScalarType::Float, saved->scalar_type());
    }
    if (!bias) return;
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == out.size(1) && bias->is_contiguous(),
                    "bias must be contiguous and as long as a row of out");
    bias_ = static_cast<const char*>(bias->const_data_ptr());
    bias_size_ = size_of(bias->scalar_type());
    widen_bias_ = find_cast(bias->scalar_type(), ScalarType::Float);
  }

  // out[row + i, column + j] = round(act(acc[i * pitch + j] + bias[column + j])); acc is overwritten. scratch: of `columns`.
  void finish(int64_t row, int64_t column, int64_t rows, int64_t columns, float* acc, int64_t pitch, float* scratch) const {
    if (bias_ != nullptr) widen_bias_(bias_ + column * bias_size_, scratch, columns);
    for (int64_t i = 0; i < rows; ++i) {
      float* z = acc + i * pitch;
      if (bias_ != nullptr) add(z, scratch, columns);
      const int64_t at = (row + i) * pitch_ + column;
      if (saved_ != nullptr) round_saved_(z, saved_ + at * saved_size_, columns);  // round: fp32 -> saved
      if (activate_ != nullptr) activate_(z, columns);
      round_(z, data_ + at * size_, columns);  // round: fp32 -> out
    }
  }

 private:
  char* data_;
  int64_t pitch_, size_;
  Cast round_;
  void (*activate_)(float* z, int64_t n);
  char* saved_ = nullptr;
  int64_t saved_size_ = 0;
  Cast round_saved_ = nullptr;
  const char* bias_ = nullptr;
  int64_t bias_size_ = 0;
  Cast widen_bias_ = nullptr;
};

// ----- the product -----

constexpr int64_t kDepth = 256;       // of a panel at most, which stays in the first cache
constexpr int64_t kRowsOfTask = 192;  // what a task has of a, and its sums, stay in the second
constexpr int64_t kColumnsOfTask = 256;

// Of a thread, and kept: fresh memory costs page faults.
struct Scratch {
  static constexpr int64_t kPitch = kDepth + 16;  // rows of a power of 2 would share their places in the cache
  alignas(64) float a[(kRowsOfTask + 16) * kPitch];
  alignas(64) float panel[kDepth * 32];
  alignas(64) float acc[(kRowsOfTask + 16) * kColumnsOfTask];
  alignas(64) float bias[kColumnsOfTask];

  static constexpr int64_t kPairPitch = kDepth / 2 + kPairsAtOnce;
  alignas(64) float pairs_of_a[(kRowsOfTask + 16) * kPairPitch];
  alignas(64) float pairs_of_panel[kDepth / 2 * kPairColumns];
};
static_assert(kDepth % (2 * kPairsAtOnce) == 0 && kDepth / 2 <= Scratch::kPitch);

Scratch& scratch() {
  static thread_local const std::unique_ptr<Scratch> mine(new Scratch);
  return *mine;
}

// [0, size) in pieces of one length, a multiple of `unit`: at most `most` long, and `wanted` of them where there are as many.
struct Pieces {
  Pieces(int64_t size, int64_t most, int64_t unit, int64_t wanted) {
    const int64_t pieces = std::max((size + most - 1) / most, wanted);
    length = ((size + pieces - 1) / pieces + unit - 1) / unit * unit;
    count = (size + length - 1) / length;
  }
  int64_t length, count;
};

// A thread that is woken for less costs more than it saves.
constexpr int64_t kProductsOfThread = 1 << 20;
constexpr int64_t kElementsOfThread = 1 << 15;  // as torch's

int64_t threads_for(int64_t work, int64_t of_thread) {
  return std::min<int64_t>(torch::stable::get_num_threads(), work / of_thread + 1);
}

struct Task {
  int64_t row, column, rows, columns;
};

// Elements [k, k + depth) of some rows of a into `pairs_of_a`, row by row, ending in zeros; returns the least of all.
uint16_t pair_rows_of(const InstructionSet& set, const Matrix& a, int64_t row, int64_t k, int64_t rows, int64_t depth,
                      Scratch& mine) {
  const int64_t pairs = (depth + 1) / 2;
  const Loops& moves = set.loops(ScalarType::Float, ScalarType::Float);
  if (a.has_pairs() && depth % 2 == 0) {
    a.in_pairs(moves).widen(row, k / 2, rows, pairs, mine.pairs_of_a, Scratch::kPairPitch);
  } else if (a.has_pairs_across() && depth % 2 == 0) {
    constexpr int64_t kAcross = kRowsOfTask + 16;
    for (int64_t j = 0; j < pairs; ++j) pair_up(a.at(row, k + 2 * j), a.at(row, k + 2 * j + 1), rows, mine.a + j * kAcross);
    moves.transposed(mine.a, kAcross, pairs, rows, mine.pairs_of_a, Scratch::kPairPitch);
  } else {
    a.widen(row, k, rows, depth, mine.a, Scratch::kPitch);
    pair_rows(mine.a, Scratch::kPitch, rows, depth, mine.pairs_of_a, Scratch::kPairPitch);
  }
  uint16_t least = kNone;
  for (int64_t i = 0; i < rows; ++i) {
    float* to = mine.pairs_of_a + i * Scratch::kPairPitch;
    std::fill(to + pairs, to + whole_pairs(pairs), 0);
    least = std::min(least, least_of(to, pairs));
  }
  return least;
}

// The same of some rows of b, which become columns of `pairs_of_panel`; those that it has beside them are zeros.
uint16_t pair_panel_of(const InstructionSet& set, const Matrix& b, int64_t row, int64_t k, int64_t rows, int64_t depth,
                       Scratch& mine) {
  const int64_t pairs = (depth + 1) / 2;
  float* to = mine.pairs_of_panel;
  if (rows < kPairColumns) std::fill_n(to, pairs * kPairColumns, 0);
  if (b.has_pairs() && depth % 2 == 0) {
    b.in_pairs(set.loops(ScalarType::Float, ScalarType::Float)).widen_transposed(row, k / 2, rows, pairs, to, kPairColumns);
  } else if (b.has_pairs_across() && depth % 2 == 0) {
    for (int64_t j = 0; j < pairs; ++j) pair_up(b.at(row, k + 2 * j), b.at(row, k + 2 * j + 1), rows, to + j * kPairColumns);
  } else {
    b.widen_transposed(row, k, rows, depth, mine.panel, kPairColumns);
    pair_panel(mine.panel, rows, depth, to);
  }
  std::fill(to + pairs * kPairColumns, to + whole_pairs(pairs) * kPairColumns, 0);
  return least_of(to, pairs * kPairColumns);
}

// pairs: null for products in fp32.
void multiply_task(const InstructionSet& set, const Pairs* pairs, const Matrix& a, const Matrix& b, const Output& out,
                   const Task& task) {
  Scratch& mine = scratch();
  const Pieces along(std::max<int64_t>(a.columns, 1), kDepth, 2 * kPairsAtOnce, 1);  // even ones: the longest chain rounds most
  for (int64_t k = 0; k == 0 || k < a.columns; k += along.length) {
    const int64_t depth = std::min(along.length, a.columns - k);
    uint16_t least = kNone;
    if (pairs != nullptr) least = pair_rows_of(set, a, task.row, k, task.rows, depth, mine);
    bool has_a = false;
    for (int64_t j = 0; j < task.columns; j += set.columns) {
      const int64_t columns = std::min(set.columns, task.columns - j);
      float* acc = mine.acc + j;
      if (pairs != nullptr && are_large(least, pair_panel_of(set, b, task.column + j, k, columns, depth, mine))) {
        for (int64_t i = 0; i < task.rows; i += pairs->rows) {
          pairs->tile(mine.pairs_of_a + i * Scratch::kPairPitch, Scratch::kPairPitch, mine.pairs_of_panel, (depth + 1) / 2,
                      std::min(pairs->rows, task.rows - i), acc + i * kColumnsOfTask, kColumnsOfTask, k > 0);
        }
        continue;
      }
      if (!has_a) a.widen(task.row, k, task.rows, depth, mine.a, Scratch::kPitch);
      has_a = true;
      b.widen_transposed(task.column + j, k, columns, depth, mine.panel, set.columns);
      for (int64_t i = 0; i < task.rows; i += set.rows) {
        const Tile tile = set.tiles[std::min(set.rows, task.rows - i) - 1];
        tile(mine.a + i * Scratch::kPitch, Scratch::kPitch, mine.panel, depth, acc + i * kColumnsOfTask, kColumnsOfTask, k > 0);
      }
    }
  }
  out.finish(task.row, task.column, task.rows, task.columns, mine.acc, kColumnsOfTask, mine.bias);
}

void multiply_by_tiles(const InstructionSet& set, const Pairs* pairs, const Matrix& a, const Matrix& b, const Output& out) {
  const int64_t work = a.rows * b.rows * (a.columns + 1), threads = threads_for(work, kProductsOfThread);
  const Pieces down(a.rows, kRowsOfTask, pairs == nullptr ? set.rows : pairs->rows, 1);
  const Pieces across(b.rows, kColumnsOfTask, set.columns, (threads + down.count - 1) / down.count);
  const int64_t tasks = down.count * across.count, grain = kProductsOfThread / (work / tasks + 1) + 1;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    if (pairs != nullptr) pairs->begin();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m = task / across.count * down.length, n = task % across.count * across.length;
      const int64_t rows = std::min(down.length, a.rows - m), columns = std::min(across.length, b.rows - n);
      multiply_task(set, pairs, a, b, out, {m, n, rows, columns});
    }
    if (pairs != nullptr) pairs->end();
  });
}

struct DotPadding {
  alignas(64) float x[kDotPadding] = {};
};

void multiply_few_rows(const Matrix& a, const Matrix& b, const Output& out) {
  const int64_t pitch = (a.columns / kDotPadding + 1) * kDotPadding;
  std::vector<DotPadding> padded(a.rows * pitch / kDotPadding);
  float* x = padded.data()->x;
  a.widen(0, 0, a.rows, a.columns, x, pitch);
  const Dot dot = b.loops->dot[a.rows - 1];
  const int64_t grain = kElementsOfThread / (a.columns + 1) + 1;
  torch::stable::parallel_for(0, b.rows, grain, [&](int64_t begin, int64_t end) {
    Scratch& mine = scratch();
    for (int64_t n = begin; n < end; n += kColumnsOfTask) {
      const int64_t columns = std::min(kColumnsOfTask, end - n);
      for (int64_t j = 0; j < columns; ++j) {
        dot(b.at(n + j, 0), x, pitch, a.columns, mine.acc + j, kColumnsOfTask);
      }
      out.finish(0, n, a.rows, columns, mine.acc, kColumnsOfTask, mine.bias);
    }
  });
}

// batch_invariant: one order of the sums for any number of rows, and no choice of instructions by what lies in them.
void multiply(const InstructionSet& set, const Pairs* pairs, const Matrix& a, const Matrix& b, const Tensor& out,
              bool batch_invariant, const std::optional<Tensor>& bias = std::nullopt, int64_t activation = 0,
              const std::optional<Tensor>& saved = std::nullopt) {
  STD_TORCH_CHECK(a.columns == b.columns && out.dim() == 2 && out.size(0) == a.rows && out.size(1) == b.rows,
                  "a result must be as large as the product");
  if (a.rows == 0 || b.rows == 0) return;
  if (a.rows <= kFewRows && b.column_stride == 1 && !batch_invariant) {
    multiply_few_rows(a, b, Output(out, bias, activation, saved));
  } else {
    multiply_by_tiles(set, batch_invariant ? nullptr : pairs, a, b, Output(out, bias, activation, saved));
  }
}

// ----- before the products of backward -----

// The columns of a matrix in fp32; of a tensor that is not there, nothing.
struct Columns {
  explicit Columns(const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    data = static_cast<char*>(const_cast<void*>(tensor->const_data_ptr()));
    pitch = tensor->dim() == 2 ? tensor->stride(0) : 0;
    size = size_of(tensor->scalar_type());
    widen = find_cast(tensor->scalar_type(), ScalarType::Float);
    round = find_cast(ScalarType::Float, tensor->scalar_type());
  }
  void* at(int64_t row, int64_t column) const { return data + (row * pitch + column) * size; }

  char* data = nullptr;
  int64_t pitch = 0, size = 0;
  Cast widen = nullptr, round = nullptr;
};

// grad_z = the gradient before the activation; grad_bias = its sum over rows, unrounded, first within blocks of them.
void activation_backward(const Tensor& grad_out_, const std::optional<Tensor>& saved_, int64_t activation,
                         const std::optional<Tensor>& grad_z_, const std::optional<Tensor>& grad_bias_) {
  const int64_t M = grad_out_.size(0), N = grad_out_.size(1);
  if (N == 0) return;
  const Columns grad_out(grad_out_), saved(saved_), grad_z(grad_z_), grad_bias(grad_bias_);
  const auto gradient = activation_loops(activation).gradient;
  const Pieces across(N, kColumnsOfTask, 16, threads_for(M * N, kElementsOfThread));
  const int64_t grain = kElementsOfThread / (M * across.length + 1) + 1;
  torch::stable::parallel_for(0, across.count, grain, [&](int64_t begin, int64_t end) {
    float *grad = scratch().acc, *z = grad + kColumnsOfTask, *sum = z + kColumnsOfTask, *block = sum + kColumnsOfTask;
    for (int64_t n = begin * across.length; n < std::min(end * across.length, N); n += across.length) {
      const int64_t columns = std::min(across.length, N - n);
      std::fill_n(sum, columns, 0);
      std::fill_n(block, columns, 0);
      for (int64_t m = 0; m < M; ++m) {
        grad_out.widen(grad_out.at(m, n), grad, columns);
        if (gradient != nullptr) {
          saved.widen(saved.at(m, n), z, columns);
          gradient(grad, z, columns);
        }
        if (grad_z.data != nullptr) grad_z.round(grad, grad_z.at(m, n), columns);  // round: fp32 -> grad_z
        add(block, grad, columns);
        if (m % kRowsOfTask == kRowsOfTask - 1 || m == M - 1) {
          add(sum, block, columns);
          std::fill_n(block, columns, 0);
        }
      }
      if (grad_bias.data != nullptr) grad_bias.round(sum, grad_bias.at(0, n), columns);  // round: fp32 -> grad_bias
    }
  });
}

// ----- the ops -----

void linear_act_multiply(Tensor a, Tensor b, std::optional<Tensor> bias, ScalarType compute_dtype, int64_t activation,
                         bool batch_invariant, Tensor out, std::optional<Tensor> saved, int64_t lanes) {
  const InstructionSet& set = instruction_set(lanes);
  multiply(set, set.pairs_in(compute_dtype), Matrix("a", a, compute_dtype, set), Matrix("b", b, compute_dtype, set), out,
           batch_invariant, bias, activation, saved);
}

// Whether `tensor` is a matrix of this size whose rows have no gaps, or is not there.
bool is_like(const std::optional<Tensor>& tensor, const Tensor& like) {
  if (!tensor) return true;
  const bool as_large = tensor->dim() == 2 && tensor->size(0) == like.size(0) && tensor->size(1) == like.size(1);
  return tensor->is_cpu() && as_large && (tensor->numel() == 0 || tensor->size(1) == 1 || tensor->stride(1) == 1);
}

// Any subset of the gradients. saved: what the activation was applied to, of a ReLU what it returned; grad_z: room for the
// gradient before the activation, for the products.
void linear_act_gradients(Tensor grad_out, std::optional<Tensor> saved, int64_t activation, std::optional<Tensor> x,
                          Tensor weight, ScalarType compute_dtype, std::optional<Tensor> grad_z, std::optional<Tensor> grad_x,
                          std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias) {
  STD_TORCH_CHECK(grad_out.dim() == 2 && is_like(grad_out, grad_out) && is_like(saved, grad_out) && is_like(grad_z, grad_out),
                  "grad_out, saved and grad_z must be matrices of one size whose rows have no gaps");
  STD_TORCH_CHECK((activation == 0) == !saved, "an activation needs what it saved");
  STD_TORCH_CHECK(!saved || grad_z || (!grad_x && !grad_weight), "products of what an activation changed need grad_z");
  STD_TORCH_CHECK(!grad_bias || (grad_bias->dim() == 1 && grad_bias->size(0) == grad_out.size(1) && grad_bias->is_contiguous()),
                  "grad_bias must be contiguous and as long as a row of grad_out");
  if (grad_z || grad_bias) activation_backward(grad_out, saved, activation, grad_z, grad_bias);
  if (!grad_x && !grad_weight) return;
  const InstructionSet& set = instruction_set(0);
  const Pairs* pairs = set.pairs_in(compute_dtype);
  const Matrix a("grad_z", grad_z ? *grad_z : grad_out, compute_dtype, set);
  if (grad_x) {
    multiply(set, pairs, a, Matrix("weight", weight, compute_dtype, set).transposed(), *grad_x, false);
  }
  if (grad_weight) {
    STD_TORCH_CHECK(x, "grad_weight needs x");
    multiply(set, pairs, a.transposed(), Matrix("x", *x, compute_dtype, set).transposed(), *grad_weight, false);
  }
}

}  // namespace
}  // namespace mpk

STABLE_TORCH_LIBRARY_IMPL(mpkernels_C, CPU, m) {
  m.impl("linear_act_multiply", TORCH_BOX(&mpk::linear_act_multiply));
  m.impl("linear_act_gradients", TORCH_BOX(&mpk::linear_act_gradients));
}
