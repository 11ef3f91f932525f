// SPDX-License-Identifier: Apache-2.0
// linear_act's GEMM on the CPU, out = round(act(a @ b.T + bias)), and its operators. Operands are rounded to the compute dtype
// as they are packed; products and sums are fp32, for bf16 and 8 bits by the bf16 dot-product instructions where the CPU has
// them. The same bits with any number of threads.
//
//   isa.h           which instruction sets there are        pack.h       operands into scratch memory, per k-block
//   dispatch.h      the micro-kernels of an ISA             epilogue.h   accumulators to the output
//   microkernels.h  register tiles, packing, dot-products   vnni.h       the bf16 dot-product and when it is safe

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "../../common/check.h"
#include "../../common/native_op.h"
#include "activation_backward.h"
#include "dispatch.h"
#include "epilogue.h"
#include "pack.h"
#include "partition.h"
#include "vnni.h"

namespace mpk {
namespace {

// ----- the product by register tiles -----

struct Block {
  int64_t row, column, rows, columns;  // of out
};

// bf16_dot: null for products in fp32.
void multiply_block(const IsaKernels& isa, const Bf16DotKernel* bf16_dot, const Matrix& a, const Matrix& b, const Output& out,
                    const Block& block) {
  Scratch& scratch = thread_scratch();
  // k-blocks of equal length, because the longest chain of sums rounds most.
  const Partition k_blocks(std::max<int64_t>(a.columns, 1), kKC, 2 * kVnniStep, 1);
  for (int64_t k = 0; k == 0 || k < a.columns; k += k_blocks.length) {
    const int64_t K = std::min(k_blocks.length, a.columns - k);
    uint16_t min_a = kAllZero;
    if (bf16_dot != nullptr) min_a = pack_vnni_a(isa, a, block.row, k, block.rows, K, scratch);
    bool is_a_packed = false;
    for (int64_t j = 0; j < block.columns; j += isa.nr) {
      const int64_t columns = std::min(isa.nr, block.columns - j);
      float* acc = scratch.acc + j;
      if (bf16_dot != nullptr &&
          products_stay_normal(min_a, pack_vnni_panel(isa, b, block.column + j, k, columns, K, scratch))) {
        for (int64_t i = 0; i < block.rows; i += bf16_dot->mr) {
          bf16_dot->tile(scratch.vnni_a + i * Scratch::kVnniPitch, Scratch::kVnniPitch, scratch.vnni_panel, (K + 1) / 2,
                         std::min(bf16_dot->mr, block.rows - i), acc + i * kNC, kNC, k > 0);
        }
        continue;
      }
      if (!is_a_packed) a.widen(block.row, k, block.rows, K, scratch.a, Scratch::kPitch);
      is_a_packed = true;
      b.widen_transposed(block.column + j, k, columns, K, scratch.panel, isa.nr);
      for (int64_t i = 0; i < block.rows; i += isa.mr) {
        const Tile tile = isa.tiles[std::min(isa.mr, block.rows - i) - 1];
        tile(scratch.a + i * Scratch::kPitch, Scratch::kPitch, scratch.panel, K, acc + i * kNC, kNC, k > 0);
      }
    }
  }
  out.finish(block.row, block.column, block.rows, block.columns, scratch.acc, kNC, scratch.bias);
}

void multiply_by_tiles(const IsaKernels& isa, const Bf16DotKernel* bf16_dot, const Matrix& a, const Matrix& b,
                       const Output& out) {
  const int64_t work = a.rows * b.rows * (a.columns + 1), threads = threads_for(work, kProductsPerThread);
  const auto down = bf16_dot == nullptr ? Partition(a.rows, kMC, isa.mr, 1) : Partition(a.rows, kVnniMC, bf16_dot->mr, 1);
  const Partition across(b.rows, kNC, isa.nr, (threads + down.count - 1) / down.count);
  const int64_t blocks = down.count * across.count, grain = kProductsPerThread / (work / blocks + 1) + 1;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    if (bf16_dot != nullptr) bf16_dot->begin();
    for (int64_t block = begin; block < end; ++block) {
      const int64_t m = block / across.count * down.length, n = block % across.count * across.length;
      const int64_t rows = std::min(down.length, a.rows - m), columns = std::min(across.length, b.rows - n);
      multiply_block(isa, bf16_dot, a, b, out, {m, n, rows, columns});
    }
    if (bf16_dot != nullptr) bf16_dot->end();
  });
}

// ----- few rows: dot-products, b read in place -----

struct alignas(64) DotPadding {
  float x[kDotPadding] = {};
};

void multiply_few_rows(const Matrix& a, const Matrix& b, const Output& out) {
  const int64_t pitch = (a.columns / kDotPadding + 1) * kDotPadding;
  std::vector<DotPadding> padded(a.rows * pitch / kDotPadding);
  float* x = padded.data()->x;
  a.widen(0, 0, a.rows, a.columns, x, pitch);
  const Dot dot = b.kernels->dot[a.rows - 1];
  const int64_t grain = kElementsPerThread / (a.columns + 1) + 1;
  torch::stable::parallel_for(0, b.rows, grain, [&](int64_t begin, int64_t end) {
    Scratch& scratch = thread_scratch();
    for (int64_t n = begin; n < end; n += kNC) {
      const int64_t columns = std::min(kNC, end - n);
      for (int64_t j = 0; j < columns; ++j) {
        dot(b.at(n + j, 0), x, pitch, a.columns, scratch.acc + j, kNC);
      }
      out.finish(0, n, a.rows, columns, scratch.acc, kNC, scratch.bias);
    }
  });
}

// batch_invariant: one order of the sums for any number of rows, and instructions that do not depend on the values.
void multiply(const IsaKernels& isa, ScalarType compute_dtype, const Matrix& a, const Matrix& b, const Output& out,
              bool batch_invariant = false) {
  STD_TORCH_CHECK(a.columns == b.columns && out.has_size(a.rows, b.rows), "a result must be as large as the product");
  if (a.rows == 0 || b.rows == 0) return;
  if (a.rows <= kFewRows && b.column_stride == 1 && !batch_invariant) {
    multiply_few_rows(a, b, out);
  } else {
    multiply_by_tiles(isa, batch_invariant ? nullptr : isa.dot_kernel_for(compute_dtype), a, b, out);
  }
}

// ----- the operators -----

void linear_act_multiply(Tensor a, Tensor b, std::optional<Tensor> bias, ScalarType compute_dtype, int64_t activation,
                         bool batch_invariant, Tensor out, std::optional<Tensor> saved, std::optional<Tensor> a_scale,
                         std::optional<Tensor> b_scale, int64_t isa_number) {
  const IsaKernels& isa = select_kernels(static_cast<Isa>(isa_number));
  multiply(isa, compute_dtype, Matrix("a", a, compute_dtype, isa), Matrix("b", b, compute_dtype, isa),
           Output(out, bias, activation, saved, a_scale, b_scale), batch_invariant);
}

// Of bf16, read where it lies.
uint16_t min_nonzero_magnitude(Matrix matrix) {
  if (matrix.column_stride != 1) matrix = matrix.transposed();
  std::atomic<uint16_t> least = kAllZero;
  torch::stable::parallel_for(0, matrix.rows, kElementsPerThread / (matrix.columns + 1) + 1, [&](int64_t begin, int64_t end) {
    uint16_t found = kAllZero;
    for (int64_t i = begin; i < end; ++i) found = std::min(found, min_nonzero_magnitude(matrix.at(i, 0), matrix.columns));
    uint16_t before = least;
    while (found < before && !least.compare_exchange_weak(before, found)) {
    }
  });
  return least;
}

// Whether the bf16 dot-product instructions of another library flush nothing in a @ b.T + bias. From 2^-100 on a bias in fp32
// is a multiple of 2^-123.
bool linear_act_products_stay_normal(Tensor a, Tensor b, std::optional<Tensor> bias) {
  constexpr ScalarType bf16 = ScalarType::BFloat16;
  STD_TORCH_CHECK(a.scalar_type() == bf16 && b.scalar_type() == bf16, "a and b must be bfloat16");
  const IsaKernels& isa = select_kernels(Isa::kAuto);
  const auto min_magnitude = [&](const Tensor& t) { return min_nonzero_magnitude(Matrix("an operand", t, bf16, isa)); };
  if (!products_stay_normal(min_magnitude(a), min_magnitude(b))) return false;
  if (!bias) return true;
  STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous(), "bias must be contiguous and fp32");
  const auto* values = static_cast<const float*>(bias->const_data_ptr());
  return std::none_of(values, values + bias->numel(), [](float x) { return x != 0 && std::fabs(x) < 0x1p-100f; });
}

// Whether `tensor` is a matrix of the size of `like` whose rows are contiguous, or absent.
bool is_like(const std::optional<Tensor>& tensor, const Tensor& like) {
  if (!tensor) return true;
  const bool as_large = tensor->dim() == 2 && tensor->size(0) == like.size(0) && tensor->size(1) == like.size(1);
  return as_large && (tensor->numel() == 0 || tensor->size(1) == 1 || tensor->stride(1) == 1);
}

// Any subset of the gradients. saved: the preactivation, of a ReLU its output; grad_z: memory for the gradient of the
// preactivation, which the products read. adds_grad_weight: to what is in grad_weight.
void linear_act_gradients(Tensor grad_out, std::optional<Tensor> saved, int64_t activation, std::optional<Tensor> x,
                          Tensor weight, ScalarType compute_dtype, std::optional<Tensor> grad_z, std::optional<Tensor> grad_x,
                          std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias, bool adds_grad_weight) {
  STD_TORCH_CHECK(grad_out.dim() == 2 && is_like(grad_out, grad_out) && is_like(saved, grad_out) && is_like(grad_z, grad_out),
                  "grad_out, saved and grad_z must be matrices of one size whose rows have no gaps");
  STD_TORCH_CHECK((activation == 0) == !saved, "an activation needs what it saved");
  STD_TORCH_CHECK(!saved || grad_z || (!grad_x && !grad_weight), "products of what an activation changed need grad_z");
  STD_TORCH_CHECK(!grad_bias || (grad_bias->dim() == 1 && grad_bias->size(0) == grad_out.size(1) && grad_bias->is_contiguous()),
                  "grad_bias must be contiguous and as long as a row of grad_out");
  if (grad_z || grad_bias) activation_backward(grad_out, saved, activation, grad_z, grad_bias);
  if (!grad_x && !grad_weight) return;
  const IsaKernels& isa = select_kernels(Isa::kAuto);
  const Matrix a("grad_z", grad_z ? *grad_z : grad_out, compute_dtype, isa);
  if (grad_x) {
    multiply(isa, compute_dtype, a, Matrix("weight", weight, compute_dtype, isa).transposed(), Output(*grad_x));
  }
  if (grad_weight) {
    STD_TORCH_CHECK(x, "grad_weight needs x");
    const Output out = adds_grad_weight ? Output::sum(*grad_weight) : Output(*grad_weight);
    multiply(isa, compute_dtype, a.transposed(), Matrix("x", *x, compute_dtype, isa).transposed(), out);
  }
}

const NativeOp registered[] = {
    {"linear_act_multiply", Device::kCpu, linear_act_multiply},
    {"linear_act_products_stay_normal", Device::kCpu, linear_act_products_stay_normal},
    {"linear_act_gradients", Device::kCpu, linear_act_gradients},
};

}  // namespace
}  // namespace mpk
