# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the step, in the host emulator (tests/emulator): the tests of the CPU kernels, and what is CUDA's own.

What this cannot prove: speed, the memory model, and anything that the emulator understands wrongly.
"""

import inspect
import math
import zlib

import pytest
import torch

from mpkernels.ops import grad_stats
from mpkernels.runtime import native
from mpkernels.runtime.resolve import ENVIRONMENT_VARIABLE
from tests import bounds, steps
from tests.emulator import host_kernels
from tests.emulator.host_kernels import HostOps, take_counts
from tests.ops.grad_stats import test_grad_stats
from tests.ops.optimizer_update import test_inputs, test_rules, test_skips
from tests.ops.optimizer_update.rules import RULES
from tests.ops.update_scale import test_update_scale
from tests.steps import BAD_VALUES, DTYPES, clone, counts, raw, scalar

REASON = host_kernels.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

CHUNK = 16384  # csrc/common/multi_tensor.cuh: kChunkUnit
MOST_CHUNKS = 4096  # csrc/grad_stats/cuda.cu
VECTORS = 256 * 4 * 2  # elements that a block has in flight: threads x vector of fp32 x 2
SIZES = (1, 3, 4, 5, 0, 1023, VECTORS - 1, VECTORS, VECTORS + 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77, 0)
HYPER = dict(
    adamw=dict(beta2=0.99, weight_decay=0.1),
    sgd=dict(momentum=0.9, dampening=0.1, weight_decay=0.1, nesterov=True),
    lion=dict(weight_decay=0.1),
)
COPIES = (torch.float16, torch.bfloat16, torch.float32, None)

# ----- the tests of the CPU kernels -----------------------------------------------------------------

PROBLEM = steps.Problem(steps=100)  # where the CPU kernels take more: below, the bits are theirs
PYTHON_ONLY = ("opcheck", "raises", "bumps_versions", "an_error", "1000_steps")


@pytest.fixture
def host(monkeypatch, request):
    """The native ops run the CUDA kernels, in an order of threads and blocks that is the test's own."""
    host_kernels.library().host_seed(zlib.crc32(request.node.name.encode()))
    monkeypatch.setattr(native, "ops", HostOps())
    monkeypatch.setattr(steps, "problem", lambda: PROBLEM)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, ",".join(f"{op}=native" for op in host_kernels.OPS))


@pytest.fixture
def device(host):
    return torch.device("cpu")


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


for module in (test_grad_stats, test_inputs, test_rules, test_skips, test_update_scale):
    for name, function in vars(module).items():
        if name.startswith("test_") and "device" in inspect.signature(function).parameters and not name.endswith(PYTHON_ONLY):
            globals()[name] = function


# ----- the update, bit for bit as on the CPU --------------------------------------------------------


def native_of(op):
    return op.function("native")


def native_update(kind):
    return native_of(RULES[kind].op)


def arguments(
    kind, sizes, generator, *, masters=(torch.float32,), grads=(torch.float16,), copies=COPIES, narrow=False, offset=None,
    **options,
):  # fmt: skip
    """Of a call over tensors of these sizes, of alternating dtypes; moments in bf16 where `narrow`.

    offset(i, list): elements that lie before tensor i.
    """

    def make(i, k, dtype, numel):
        start = offset(i, k) if offset else 0
        values = torch.randn(start + numel, generator=generator, dtype=torch.float64)
        return values.to(dtype)[start:]

    rule = RULES[kind]
    weights = [make(i, 0, masters[i % len(masters)], n) for i, n in enumerate(sizes)]
    gradients = [make(i, 1, grads[i // len(masters) % len(grads)], n) for i, n in enumerate(sizes)]
    args = rule.arguments(weights, gradients, copies, **HYPER[kind] | options)
    args["copies"] = [make(i, 2, copy.dtype, copy.numel()) for i, copy in enumerate(args["copies"])]
    for k, name in enumerate(rule.states, 3):
        moments = [torch.bfloat16 if narrow else state.dtype for state in args[name]]
        args[name] = [make(i, k, dtype, sizes[i]).square_() for i, dtype in enumerate(moments)]
    args["steps"] = [scalar(i % 3) for i in range(len(sizes))]
    return args | dict(lr=scalar(0.01), grad_scale=scalar(4.0), found_inf=scalar(0.0))


def written(kind, args):
    return raw(RULES[kind].state(args))


def check_as_on_cpu(kind, args, host_ops=None):
    """Two steps by the CUDA kernels have the bits of two steps of the CPU's."""
    expected = clone(args)
    for _ in range(2):
        native_update(kind)(**expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "ops", host_ops or HostOps())
        for _ in range(2):
            native_update(kind)(**args)
    assert written(kind, args) == written(kind, expected)


VARIANTS = {
    "adamw": ("adamw", dict()),
    "adamw amsgrad": ("adamw", dict(amsgrad=True)),
    "adam amsgrad maximize": ("adamw", dict(decoupled=False, amsgrad=True, maximize=True)),
    "adam": ("adamw", dict(decoupled=False)),
    "adamw bf16 moments": ("adamw", dict(narrow=True)),
    "adam amsgrad bf16 moments": ("adamw", dict(narrow=True, decoupled=False, amsgrad=True)),
    "sgd bf16 moments": ("sgd", dict(narrow=True)),
    "sgd": ("sgd", dict(momentum=0.0, dampening=0.0, nesterov=False)),
    "sgd momentum": ("sgd", dict()),
    "sgd maximize": ("sgd", dict(nesterov=False, maximize=True)),
    "lion": ("lion", dict(maximize=True)),
    "lion bf16 moments": ("lion", dict(narrow=True)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("master", [torch.float32, torch.float64])
def test_cuda_update_of_every_dtype(variant, master, generator):
    kind, options = VARIANTS[variant]
    copies = (*COPIES, torch.float64)
    for grad in [d for d in DTYPES if d.itemsize <= master.itemsize]:
        sizes = (5, 4100, VECTORS, 1, CHUNK + 3)
        args = arguments(kind, sizes, generator, masters=(master,), grads=(grad,), copies=copies, **options)
        check_as_on_cpu(kind, args)


@pytest.mark.parametrize("variant", ["adamw", "adamw bf16 moments", "sgd momentum", "lion"])
def test_cuda_update_tails_and_chunk_edges(variant, generator):
    kind, options = VARIANTS[variant]
    check_as_on_cpu(kind, arguments(kind, SIZES, generator, masters=(torch.float32, torch.float64), **options))


@pytest.mark.parametrize("variant", ["adamw amsgrad", "adamw bf16 moments", "sgd momentum"])
@pytest.mark.parametrize("together", [True, False])
def test_cuda_update_misaligned(variant, together, generator):
    """All lists of a tensor off by as many elements: a head, then vectors. By different ones: no vectors at all."""
    kind, options = VARIANTS[variant]
    offset = (lambda i, k: i % 8) if together else (lambda i, k: (i + k) % 8)
    for grad in (torch.float16, torch.float32):
        sizes = (9, 1, 2, VECTORS + 1, 64, 3, CHUNK + 9, 4099, 5, 17, CHUNK)
        args = arguments(
            kind, sizes, generator, masters=(torch.float32, torch.float64), grads=(grad,), offset=offset, **options
        )
        check_as_on_cpu(kind, args)


def test_cuda_update_takes_vectors_where_it_can(generator, host):
    """Aligned, or misaligned together: 16-byte accesses but for the ends. Seen in how a skewed list changes the accesses."""

    def accesses(offset, copy=torch.float16):
        args = arguments("adamw", (CHUNK,), generator, copies=(copy,), offset=offset)
        take_counts()
        native_update("adamw")(**args)
        return take_counts().accesses

    aligned = 7 * CHUNK // 4 + CHUNK // 4  # g, w, m, v and w, m, v, copy in vectors of 4
    assert accesses(None) == aligned
    assert aligned < accesses(lambda i, k: 1) <= aligned + 8 * 4
    assert accesses(lambda i, k: k == 1) == 8 * CHUNK
    assert 7 * CHUNK // 4 < accesses(lambda i, k: 1, None) <= 7 * CHUNK // 4 + 7 * 4, "a copy that is not wanted is no obstacle"


@pytest.mark.parametrize("variant", ["adamw", "adamw amsgrad", "sgd momentum"])
def test_cuda_update_ten_thousand_tensors(variant, generator):
    kind, options = VARIANTS[variant]
    args = arguments(kind, [i % 5 for i in range(10_000)], generator, **options)
    take_counts()
    check_as_on_cpu(kind, args)
    tables = math.ceil(10_000 / 400)  # a table holds at least as many
    assert 2 * 2 < take_counts().launches <= 2 * (tables + 1)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    "skip", [dict(found_inf=scalar(math.nan)), dict(grad_scale=scalar(math.inf))], ids=["found_inf", "scale"]
)
def test_cuda_skip_moves_no_byte(kind, skip, generator, host):
    args = arguments(kind, SIZES, generator) | skip
    before = written(kind, args)
    take_counts()
    native_update(kind)(**args)
    moved = take_counts()
    assert (moved.loaded, moved.stored) == (0, 0)
    assert written(kind, args) == before


@pytest.mark.parametrize("kind", RULES)
def test_cuda_schedule_does_not_matter(kind, generator, host):
    args, results = arguments(kind, SIZES, generator, masters=(torch.float32, torch.float64)), []
    for seed in range(4):
        host_kernels.library().host_seed(seed)
        again = clone(args)
        native_update(kind)(**again)
        results.append(written(kind, again))
    assert all(result == results[0] for result in results)


# ----- lr -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_lr_on_the_cpu(kind, dtype, generator):
    args = arguments(kind, (1000,), generator) | dict(lr=scalar(0.3, dtype=dtype))
    check_as_on_cpu(kind, clone(args) | dict(lr=args["lr"]), HostOps(host_tensors=(args["lr"],)))


@pytest.mark.parametrize("kind", RULES)
def test_cuda_capture_refuses_lr_on_the_cpu(kind, generator, monkeypatch):
    args = arguments(kind, (1000,), generator)
    before, step = written(kind, args), native_update(kind)
    host_kernels.library().host_set_capturing(True)
    try:
        monkeypatch.setattr(native, "ops", HostOps(host_tensors=(args["lr"],)))
        with pytest.raises(RuntimeError, match=f"{kind}_: lr is on the CPU and would be frozen in the CUDA graph"):
            step(**args)
        assert written(kind, args) == before
        monkeypatch.setattr(native, "ops", HostOps())
        step(**args)
        assert written(kind, args) != before
    finally:
        host_kernels.library().host_set_capturing(False)


# ----- grad_stats_ ----------------------------------------------------------------------------------


def stats(grads, norm=True):
    """(found_inf, amax, nonfinite, grad_norm) of one call."""
    n = len(grads)
    result = scalar(7.0), torch.full((n,), -7.0, dtype=torch.float64), counts(n) - 7, scalar(-7.0, dtype=torch.float64)
    native_of(grad_stats.op)(grads, scalar(2.0), *result[:3], result[3] if norm else None)
    return result


def exact_norm(grads) -> float:
    return math.sqrt(math.fsum(float(g.double().square().sum()) for g in grads)) / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3, 7])
def test_cuda_stats_heads_tails_and_chunk_edges(dtype, offset, generator, host):
    grads = [torch.randn(offset + n, generator=generator).to(dtype)[offset:] for n in SIZES]
    found_inf, amax, nonfinite, norm = stats(grads)
    assert found_inf == 0
    assert amax.tolist() == [g.double().abs().max().item() if g.numel() else 0.0 for g in grads]
    assert nonfinite.eq(0).all()
    bounds.check_norm(norm.item(), exact_norm(grads), sum(SIZES))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_stats_find_inf_at_every_edge(dtype, generator, host):
    grads = [torch.randn(n + 1, generator=generator).to(dtype)[1:] for n in (5, 2 * CHUNK + 77, 1)]
    edges = [k * CHUNK + d for k in (0, 1, 2) for d in (-8, -2, -1, 0, 1, 7, 8, 9, 76)]
    places = [(0, 0), (0, 4), (2, 0)] + [(1, i) for i in edges if 0 <= i < grads[1].numel()] + [(1, 2 * CHUNK + 70)]
    for k, (i, position) in enumerate(places):
        good = grads[i][position].clone()
        grads[i][position] = BAD_VALUES[k % 3]
        found_inf, _, nonfinite, _ = stats(grads)
        assert (found_inf.item(), nonfinite.tolist()) == (1, [int(j == i) for j in range(3)])
        grads[i][position] = good
    assert stats(grads)[0] == 0


def test_cuda_stats_have_the_same_bits_in_every_schedule(generator, host):
    """Of fp64 chunks of many sizes too: a norm is a root, which hides the last bit of sums that nearly round alike."""
    grads = [torch.randn(n, generator=generator).to(DTYPES[i % 4]) for i, n in enumerate(SIZES)]
    sizes = torch.logspace(0, 12, 64, base=2, dtype=torch.float64).repeat_interleave(CHUNK)
    grads.append(torch.randn(64 * CHUNK, generator=generator, dtype=torch.float64) * sizes)
    results = []
    for seed in range(12):
        host_kernels.library().host_seed(seed)
        results.append(raw(stats(grads)))
    assert all(result == results[0] for result in results)


def test_cuda_stats_ten_thousand_tensors(generator, host):
    grads = [torch.randn(i % 5, generator=generator).to(DTYPES[i % 4]) for i in range(10_000)]
    grads[9_998][1] = math.nan
    stats(grads[:1])  # the stream's tickets
    take_counts()
    found_inf, amax, nonfinite, _ = stats(grads)
    assert take_counts().launches == math.ceil(10_000 / 640)
    assert found_inf == 1
    assert nonfinite.nonzero().flatten().tolist() == [9_998]
    assert amax[:100].tolist() == [g.double().abs().max().item() if g.numel() else 0.0 for g in grads[:100]]


def test_cuda_stats_in_a_capture_have_tickets_of_their_own(generator, host):
    """A graph zeroes them itself, at every replay; outside of a capture they are zeroed once."""
    grads = [torch.randn(n, generator=generator) for n in (5, 2 * CHUNK, 0)]
    expected = raw(stats(grads))
    for capturing, launches in ((True, 2), (False, 1), (True, 2)):
        host_kernels.library().host_set_capturing(capturing)
        try:
            take_counts()
            assert raw(stats(grads)) == expected
            assert take_counts().launches == launches
        finally:
            host_kernels.library().host_set_capturing(False)


def test_cuda_stats_chunks_grow_with_the_model(generator, host):
    n = CHUNK * MOST_CHUNKS + 5
    grads = [torch.randn(1000, generator=generator).half().repeat(n // 1000 + 1)[:n], torch.ones(9)]
    grads[0][-1] = 2.0
    bounds.check_norm(stats(grads)[3].item(), exact_norm(grads), n)
    grads[0][-1] = math.inf
    assert stats(grads)[2].tolist() == [1, 0]


# ----- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, grad, narrow, expected", [
    ("adamw", torch.float16, False, 30), ("adamw", torch.bfloat16, False, 30), ("adamw", torch.float32, False, 34),
    ("sgd", torch.float16, False, 22), ("sgd", torch.float32, False, 26),
    ("adamw", torch.float16, True, 22), ("sgd", torch.float16, True, 18), ("lion", torch.float16, False, 22),
    ("lion", torch.float16, True, 18),
])  # fmt: skip
def test_cuda_bytes_per_parameter(kind, grad, narrow, expected, generator, host):
    """Verdict, norm and update with a 16-bit copy; and a skipped step, which reads the gradients once."""
    n = 2 * CHUNK
    args = arguments(kind, (n,), generator, grads=(grad,), copies=(torch.float16,), narrow=narrow)
    take_counts()
    stats(args["grads"])
    check = take_counts()
    native_update(kind)(**args)
    update = take_counts()
    assert (check.loaded, check.stored) == (grad.itemsize * n, 0)
    assert check.loaded + update.loaded + update.stored == expected * n


# ----- the emulator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which, message", [
    (3, "deadlock in block 0: thread 0 at __syncthreads; threads 1-31 at a shuffle;"),
    (4, "a load outside of every tensor"),
    (5, "a store outside of every tensor"),
    (6, "an access of 16 bytes at an address that is no multiple of it"),
    (7, "an atomic after stores for other blocks with no __threadfence since"),
    (8, "a load of what other blocks stored after an atomic with no __threadfence since"),
    (9, "__syncthreads after an atomic with no __threadfence since"),
])  # fmt: skip
def test_emulator_refuses_wrong_kernels(which, message):
    assert message in run_kernel(which)[0]
    assert run_kernel(0)[0] == "", "a refused launch leaves nothing behind"


def test_emulator_refuses_a_store_to_what_is_read_only():
    assert "a store to a tensor that is only read" in run_kernel(0, read_only=True)[0]


def test_emulator_barriers_and_shuffles():
    error, out = run_kernel(0)
    assert error == ""
    assert out.eq(7).all()
    error, out = run_kernel(1)
    assert error == ""
    assert out[::32].tolist() == [sum(range(32))] * 2


def test_emulator_shows_a_missing_barrier():
    """The thread that writes is almost never the first in order; shared memory is poisoned before it."""
    host_kernels.library().host_seed(1)
    assert not run_kernel(2)[1].eq(7).all()


def run_kernel(which, read_only=False):
    """(error, what it wrote) of one of tests/emulator/wrong_kernels.cu."""
    out = torch.zeros(64, dtype=torch.int32)
    host_kernels.set_memory([] if read_only else [out], [out] if read_only else [])
    return host_kernels.run("host_run_kernel", which, out), out


# ----- where the kernels do not run -----------------------------------------------------------------


@pytest.mark.parametrize("runtime, driver, capability, reason", [
    (13000, 12080, (9, 0), "needs a driver for CUDA 13.0, got one for CUDA 12.8"),
    (13000, 0, (9, 0), "needs a driver for CUDA 13.0, got none"),
    (13000, 13010, (7, 0), "needs sm75, got sm70"),
    (13020, 13000, (7, 5), None),
    (12080, 13000, (9, 0), None),
])  # fmt: skip
def test_native_says_what_is_too_old(runtime, driver, capability, reason):
    assert (native._old_driver(runtime, driver) or native._old_gpu(capability)) == reason


def test_native_says_that_torch_has_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native.cuda_why_not.__wrapped__(torch.device("cuda")) == "this torch is built without CUDA"
