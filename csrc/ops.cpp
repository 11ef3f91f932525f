// SPDX-License-Identifier: Apache-2.0
// The native ops' schemas: mpkernels/ops/<op>/__init__.py defines and checks the public op of the same name. A list of tensors
// (masters, grads, ..., steps) is a table: common/tensor_list.h; `on` is any tensor that lies where they do. The bool of an
// update says whether the step was taken. amax_ and end_step_ are a watch's: mpkernels/precision/taps.py. A default is what
// common/native_op.h takes for a missing argument: none, 0 or false.

namespace mpk {

extern const char* const kSchemas[];

// clang-format off
const char* const kSchemas[] = {
    "cuda_versions() -> (int, int)",
    "load_kernels(int device) -> int",
    "grad_stats_(Tensor grads, Tensor? grad_scale, Tensor(a!) found_inf, Tensor(b!) amax, Tensor(c!) nonfinite, Tensor(d!)? grad_norm) -> ()",
    "amax_(Tensor x, Tensor(a!) table, int index, bool ignores_minus_inf=False) -> ()",
    "end_step_(Tensor(a!) table, Tensor(b!) last, Tensor? scale, int index, float nothing) -> ()",
    "adamw_(Tensor masters, Tensor grads, Tensor exp_avgs, Tensor exp_avg_sqs, Tensor max_exp_avg_sqs, Tensor copies, Tensor steps, Tensor on, Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? grad_norm, float? max_norm) -> bool",
    "sgd_(Tensor masters, Tensor grads, Tensor momentum_buffers, Tensor copies, Tensor steps, Tensor on, Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? grad_norm, float? max_norm) -> bool",
    "lion_(Tensor masters, Tensor grads, Tensor exp_avgs, Tensor copies, Tensor steps, Tensor on, Tensor lr, float beta1, float beta2, float weight_decay, bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? grad_norm, float? max_norm) -> bool",
    "update_scale_(Tensor(a!) grad_scale, Tensor(b!) growth_tracker, Tensor(c!) hysteresis_tracker, Tensor(d!) skipped, Tensor found_inf, float growth_factor, float backoff_factor, int growth_interval, int hysteresis, float min_scale, float max_scale) -> ()",
    "quantize(Tensor x, int outer, int n, int inner, int mantissa, Tensor(a!) q, Tensor(b!) scale) -> ()",
    "linear_act_multiply(Tensor a, Tensor b, Tensor? bias, ScalarType compute_dtype, int activation, bool batch_invariant, Tensor(a!) out, Tensor(b!)? saved=None, Tensor? a_scale=None, Tensor? b_scale=None, int isa=0) -> ()",
    "linear_act_products_stay_normal(Tensor a, Tensor b, Tensor? bias) -> bool",
    "linear_act_gradients(Tensor grad_out, Tensor? saved, int activation, Tensor? x, Tensor weight, ScalarType compute_dtype, Tensor(a!)? grad_z, Tensor(b!)? grad_x, Tensor(c!)? grad_weight, Tensor(d!)? grad_bias, bool adds_grad_weight) -> ()",
    "linear_act_fprop(Tensor x, Tensor weight, Tensor? bias, bool relu, Tensor(a!) out, Tensor(b!)? mask, int block_n, int cluster, int blocks, bool ping_pong, int splits) -> ()",
    "linear_act_dgrad(Tensor grad_z, Tensor weight, Tensor? mask, Tensor(a!) grad_x, Tensor(b!)? column_sums, int block_n, int cluster, int blocks, bool ping_pong, int splits) -> ()",
    "linear_act_wgrad(Tensor grad_z, Tensor x, Tensor(a!) out, int splits, int block_n, int cluster, int blocks, bool ping_pong, bool adds=False) -> ()",
    "linear_act_select(Tensor grad_out, Tensor? mask, Tensor(a!)? grad_z, Tensor(b!)? sums) -> ()",
    "linear_act_sum(Tensor parts, Tensor(a!) out, Tensor? bias=None, bool relu=False, Tensor(b!)? mask=None, bool adds=False) -> ()",
    nullptr,
};
// clang-format on

}  // namespace mpk
