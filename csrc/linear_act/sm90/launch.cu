// SPDX-License-Identifier: Apache-2.0
// The operators of linear_act on Hopper: arguments checked, tensor maps encoded, the GEMM in its three roles and the passes
// around it launched. Sizes are positive.

#include "common/check.h"
#include "common/clusters.h"
#include "common/native_op.h"
#include "common/stream.h"
#include "kernel.cuh"
#include "select.cuh"

namespace mpk {
namespace {

constexpr int64_t kMaxSize = (int64_t{1} << 31) - 512;  // so that coordinates of a tile past the end fit an int

// A matrix that TMA can read or write, on the device of `like`.
void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " must be ", rows, " x ",
                  columns);
  STD_TORCH_CHECK(rows > 0 && columns > 0 && rows <= kMaxSize && columns <= kMaxSize, name, " is empty or too large");
  const int64_t bytes = size_of(tensor.scalar_type());
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && tensor.stride(0) * bytes % 16 == 0;
  STD_TORCH_CHECK(tensor.stride(1) == 1 && (tensor.stride(0) >= columns || rows == 1) && aligned, name,
                  " must have contiguous rows at multiples of 16 bytes");
  check_same_device(name, tensor, like);
}

TensorMap map_of(const Tensor& tensor, int box_rows) {
  const int64_t columns = tensor.size(1), pitch = std::max(tensor.stride(0), (columns + 7) / 8 * 8);  // of one row it is free
  return encode_tensor_map(tensor.const_data_ptr(), tensor.scalar_type(), tensor.size(0), columns, pitch, box_rows);
}

// Of a rows x columns matrix.
Mask mask_of(const std::optional<Tensor>& mask, int64_t rows, int64_t columns, const Tensor& like) {
  if (!mask) return {};
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Int && mask->dim() == 2 && mask->size(0) == rows &&
                      mask->size(1) == ceil_div(columns, 32) && (mask->stride(1) == 1 || mask->size(1) == 1),
                  "mask must be int32 ", rows, " x ", ceil_div(columns, 32), " with contiguous rows");
  check_same_device("mask", *mask, like);
  return {static_cast<uint32_t*>(mask->mutable_data_ptr()), mask->stride(0)};
}

// Memory for column sums, or null.
float* column_sums_of(const std::optional<Tensor>& sums, int64_t rows, int64_t columns, const Tensor& like) {
  if (!sums) return nullptr;
  STD_TORCH_CHECK(sums->scalar_type() == ScalarType::Float && sums->is_contiguous() && sums->numel() == rows * columns,
                  "column sums must be float32 ", rows, " x ", columns, ", contiguous");
  check_same_device("column sums", *sums, like);
  return sums->mutable_data_ptr<float>();
}

BiasVector bias_vector(const std::optional<Tensor>& bias, int64_t columns, const Tensor& like) {
  if (!bias) return {};
  check_vector("bias", *bias, columns);
  check_same_device("bias", *bias, like);
  return {static_cast<const char*>(bias->const_data_ptr()), bias->stride(0), bias->scalar_type()};
}

// num_sms: the persistent grid has at most so many blocks.
struct TileConfig {
  int64_t block_n, cluster, num_sms;
  bool ping_pong;
};

template <Role kRole, class T, class Out, class Tile>
void launch_gemm(const GemmArguments& g, const TileConfig& config, cudaStream_t stream) {
  const int64_t tiles = ceil_div(g.M, kBlockM * g.cluster) * ceil_div(g.N, Tile::kN) * g.splits;
  STD_TORCH_CHECK(tiles <= kMaxSize, "too many tiles");
  const unsigned grid = static_cast<unsigned>(std::min(tiles, std::max<int64_t>(config.num_sms / g.cluster, 1)) * g.cluster);
  launch_clusters<gemm_kernel<kRole, T, Out, Tile>>(grid, g.cluster, kGemmThreads, sizeof(SharedStorage<Tile>), stream, g);
}

template <Role kRole, class T>
void launch_gemm(const GemmArguments& g, const TileConfig& config, ScalarType out, cudaStream_t stream) {
  const auto launch_as = [&](auto tile) {
    if (out == ScalarType::Float) return launch_gemm<kRole, T, float, decltype(tile)>(g, config, stream);
    launch_gemm<kRole, T, T, decltype(tile)>(g, config, stream);
  };
  if (config.ping_pong) return launch_as(Tile<192, KernelSchedule::kPingPong>());
  if (config.block_n == 256) return launch_as(Tile<256, KernelSchedule::kCooperative>());
  if (config.block_n == 192) return launch_as(Tile<192, KernelSchedule::kCooperative>());
  launch_as(Tile<128, KernelSchedule::kCooperative>());
}

// out (M x N, of each split below that of the previous one) = a b over K; the rest of `g` is the epilogue's.
template <Role kRole>
void run_gemm(GemmArguments g, const Tensor& a, const Tensor& b, const Tensor& out, int64_t K, const TileConfig& config,
              cudaStream_t stream) {
  STD_TORCH_CHECK((config.block_n == 128 || config.block_n == 192 || config.block_n == 256) &&
                      (config.cluster == 1 || config.cluster == 2) && config.num_sms > 0,
                  "block_n must be 128, 192 or 256, cluster 1 or 2, blocks positive");
  STD_TORCH_CHECK(!config.ping_pong || config.block_n == 192, "ping-pong needs a block_n of 192, got ", config.block_n);
  const ScalarType dtype = a.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Half || dtype == ScalarType::BFloat16) && b.scalar_type() == dtype &&
                      (out.scalar_type() == dtype || out.scalar_type() == ScalarType::Float),
                  "operands must both be float16 or bfloat16, the result of their dtype or float32");
  g.K = static_cast<int>(K);
  g.cluster = static_cast<int>(config.cluster);
  g.a = map_of(a, is_a_transposed(kRole) ? kBlockK : kBlockM);
  g.b = map_of(b, is_b_transposed(kRole) ? kBlockK : static_cast<int>(config.block_n / config.cluster));
  g.out = map_of(out, kWarpgroupRows);
  if (dtype == ScalarType::Half) {
    launch_gemm<kRole, Half>(g, config, out.scalar_type(), stream);
  } else {
    launch_gemm<kRole, BFloat16>(g, config, out.scalar_type(), stream);
  }
}

// The GEMM of an M x N result. With split-K, `out` is the workspace: float32, one partial result per split, each padded to a
// multiple of kSplitAlignment rows, one below the other; their sum has the epilogue.
GemmArguments gemm_of(int64_t M, int64_t N, int64_t K, int64_t splits, bool has_epilogue, const char* name, const Tensor& out,
                      const Tensor& like) {
  STD_TORCH_CHECK(splits >= 1 && splits <= ceil_div(K, kBlockK), "more splits than k-blocks");
  STD_TORCH_CHECK(splits == 1 || (out.scalar_type() == ScalarType::Float && !has_epilogue),
                  "the workspace must be float32, without an epilogue");
  const int64_t split_rows = splits == 1 ? M : ceil_div(M, kSplitAlignment) * kSplitAlignment;
  check_matrix(name, out, splits * split_rows, N, like);
  GemmArguments g{};
  g.M = static_cast<int>(M);
  g.N = static_cast<int>(N);
  g.splits = static_cast<int>(splits);
  g.split_rows = static_cast<int>(split_rows);
  return g;
}

// ----- the operators -----

void fprop(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu, Tensor out, std::optional<Tensor> mask,
           int64_t block_n, int64_t cluster, int64_t num_sms, bool ping_pong, int64_t splits) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  check_matrix("x", x, M, K, x);
  check_matrix("weight", weight, N, K, x);
  GemmArguments g = gemm_of(M, N, K, splits, bias || relu || mask, "out", out, x);
  g.bias = bias_vector(bias, N, x);
  g.relu = relu;
  g.mask = mask_of(mask, M, N, x);
  const OnDevice device(x);
  run_gemm<Role::kFprop>(g, x, weight, out, K, {block_n, cluster, num_sms, ping_pong}, device.stream());
}

void dgrad(Tensor grad_z, Tensor weight, std::optional<Tensor> mask, Tensor grad_x, std::optional<Tensor> column_sums,
           int64_t block_n, int64_t cluster, int64_t num_sms, bool ping_pong, int64_t splits) {
  const int64_t M = grad_z.size(0), N = grad_z.size(1), K = weight.size(1);
  check_matrix("grad_z", grad_z, M, N, grad_z);
  check_matrix("weight", weight, N, K, grad_z);
  GemmArguments g = gemm_of(M, K, N, splits, mask || column_sums, "grad_x", grad_x, grad_z);
  g.mask = mask_of(mask, M, K, grad_z);
  g.column_sums = column_sums_of(column_sums, ceil_div(M, kWarpgroupRows), K, grad_z);
  const OnDevice device(grad_z);
  run_gemm<Role::kDgrad>(g, grad_z, weight, grad_x, N, {block_n, cluster, num_sms, ping_pong}, device.stream());
}

void wgrad(Tensor grad_z, Tensor x, Tensor out, int64_t splits, int64_t block_n, int64_t cluster, int64_t num_sms,
           bool ping_pong, bool adds) {
  const int64_t M = grad_z.size(0), N = grad_z.size(1), K = x.size(1);
  check_matrix("grad_z", grad_z, M, N, grad_z);
  check_matrix("x", x, M, K, grad_z);
  GemmArguments g = gemm_of(N, K, M, splits, adds, "out", out, grad_z);
  if (adds) {
    g.added_to = out.const_data_ptr<float>();
    g.added_to_pitch = out.stride(0);
  }
  const OnDevice device(grad_z);
  run_gemm<Role::kWgrad>(g, grad_z, x, out, M, {block_n, cluster, num_sms, ping_pong}, device.stream());
}

template <class G, class T>
void launch_select(const Tensor& grad_out, const std::optional<Tensor>& mask, const std::optional<Tensor>& grad_z,
                   const std::optional<Tensor>& sums, cudaStream_t stream) {
  SelectArguments<G, T> a{};
  a.rows = grad_out.size(0);
  a.columns = grad_out.size(1);
  a.grad_out = static_cast<const G*>(grad_out.const_data_ptr());
  a.grad_out_strides[0] = grad_out.stride(0);
  a.grad_out_strides[1] = grad_out.stride(1);
  a.vectors = grad_out.stride(1) == 1 && grad_out.stride(0) * sizeof(G) % kWidest == 0 &&
              reinterpret_cast<uintptr_t>(a.grad_out) % kWidest == 0;
  a.mask = mask_of(mask, a.rows, a.columns, grad_out);
  if (grad_z) {
    check_matrix("grad_z", *grad_z, a.rows, a.columns, grad_out);
    a.grad_z = static_cast<T*>(grad_z->mutable_data_ptr());
    a.grad_z_pitch = grad_z->stride(0);
  }
  a.sums = column_sums_of(sums, ceil_div(a.rows, kSelectRows), a.columns, grad_out);
  const int64_t grid = ceil_div(a.rows, kSelectRows) * ceil_div(a.columns, kSelectColumns);
  STD_TORCH_CHECK(grid > 0 && grid <= kMaxSize, "grad_out is empty or too large");
  launch<select_kernel<G, T>>(static_cast<unsigned>(grid), kSelectThreads, 0, stream, a);
}

template <class T>
void select_as(const Tensor& grad_out, const std::optional<Tensor>& mask, const std::optional<Tensor>& grad_z,
               const std::optional<Tensor>& sums, cudaStream_t stream) {
  if (grad_out.scalar_type() == ScalarType::Float) {
    launch_select<float, T>(grad_out, mask, grad_z, sums, stream);
  } else {
    launch_select<T, T>(grad_out, mask, grad_z, sums, stream);
  }
}

// grad_z, and column sums of every kSelectRows rows; either may be omitted.
void select(Tensor grad_out, std::optional<Tensor> mask, std::optional<Tensor> grad_z, std::optional<Tensor> sums) {
  STD_TORCH_CHECK(grad_out.dim() == 2, "grad_out must be a matrix");
  const ScalarType dtype = grad_z ? grad_z->scalar_type() : grad_out.scalar_type();
  STD_TORCH_CHECK(grad_out.scalar_type() == dtype || grad_out.scalar_type() == ScalarType::Float,
                  "grad_out must have the compute dtype or float32");
  const OnDevice device(grad_out);
  if (dtype == ScalarType::BFloat16) {
    select_as<BFloat16>(grad_out, mask, grad_z, sums, device.stream());
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Half || !grad_z, "grad_z must be float16 or bfloat16");
    select_as<Half>(grad_out, mask, grad_z, sums, device.stream());
  }
}

template <class Out>
void launch_sum(const Tensor& parts, const Tensor& out, const SumEpilogue& epilogue, cudaStream_t stream) {
  const bool one_row = out.dim() == 1;  // many parts of one row, or a few of many rows
  SumArguments<Out> a{};
  a.parts = parts.const_data_ptr<float>();
  a.count = parts.size(0);
  a.part_stride = parts.stride(0);
  a.pitch = one_row ? 0 : parts.stride(1);
  a.rows = one_row ? 1 : out.size(0);
  a.columns = out.size(out.dim() - 1);
  a.out = static_cast<Out*>(out.mutable_data_ptr());
  a.out_stride_m = one_row ? 0 : out.stride(0);
  a.out_stride_n = out.stride(out.dim() - 1);
  a.epilogue = epilogue;
  constexpr int kSlices = 8;
  const int64_t grid = a.rows * ceil_div(a.columns, one_row ? kSelectThreads / kSlices : kSelectThreads);
  STD_TORCH_CHECK(grid > 0 && grid <= kMaxSize, "out is empty or too large");
  const unsigned blocks = static_cast<unsigned>(grid);
  if (one_row) {
    launch<sum_kernel<Out, kSlices>>(blocks, kSelectThreads, 0, stream, a);
  } else {
    launch<sum_kernel<Out, 1>>(blocks, kSelectThreads, 0, stream, a);
  }
}

// out = round(parts.sum(0)): parts (P, N) of an out (N,), or (P, R, C) of an out (R, C), then with fprop's epilogue.
void sum_parts(Tensor parts, Tensor out, std::optional<Tensor> bias, bool relu, std::optional<Tensor> mask, bool adds) {
  const int64_t dims = out.dim();
  STD_TORCH_CHECK((dims == 1 || dims == 2) && parts.dim() == dims + 1 && parts.scalar_type() == ScalarType::Float &&
                      parts.stride(dims) == 1,
                  "parts must be float32, with one dimension more than out");
  for (int64_t i = 0; i < dims; ++i) STD_TORCH_CHECK(parts.size(i + 1) == out.size(i), "parts do not fit out");
  check_same_device("parts", parts, out);
  STD_TORCH_CHECK(dims == 2 || !(bias || relu || mask || adds), "an epilogue is that of a matrix");
  STD_TORCH_CHECK(!adds || out.scalar_type() == ScalarType::Float, "what is added to must be float32");
  const int64_t columns = out.size(dims - 1);
  const Mask bits = mask_of(mask, out.size(0), columns, out);
  const SumEpilogue epilogue{bias_vector(bias, columns, out), relu, bits, adds};
  const OnDevice device(out);
  with_float("out", out.scalar_type(), [&](auto x) { launch_sum<decltype(x)>(parts, out, epilogue, device.stream()); });
}

const NativeOp registered[] = {
    {"linear_act_fprop", Device::kCuda, fprop},   {"linear_act_dgrad", Device::kCuda, dgrad},
    {"linear_act_wgrad", Device::kCuda, wgrad},   {"linear_act_select", Device::kCuda, select},
    {"linear_act_sum", Device::kCuda, sum_parts},
};

}  // namespace
}  // namespace mpk
