"""The WKV-7 operator: the chunked form and the road to the CUDA kernels against the recurrence in fp64.

Shapes: B batch, T tokens, H heads, N head size.
"""

import contextlib
import ctypes
import math
import shutil
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import wkv as operator
import wkv_cuda as loader
from conftest import relative_error
from kernel_on_cpu import Driver, barrier_lines, build
from wkv import wkv, wkv_chunked, wkv_cuda, wkv_reference

NAMES = ("y", "state", "dr", "dlog_w", "dk", "dv", "da", "db", "dstate")
LOWEST = -math.exp(-0.5)
KINDS = ("usual", "fastest decay", "no decay", "same key", "same key, no decay")


def make(B, T, H, N, seed=0, kind="usual", dtype=torch.float64):
    """Inputs as RWKV-7 makes them, (B, T, H, N) each, and a state (B, H, N, N)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, k, v, removal, gate = (normal(B, T, H, N) for _ in range(5))
    log_w = LOWEST * torch.sigmoid(3 * normal(B, T, H, N))
    gate = torch.sigmoid(gate)
    if "same key" in kind:
        removal = removal[:, :1].expand_as(removal)
        k = k[:, :1].expand_as(k)
        gate = torch.ones_like(gate)
    if kind == "fastest decay":
        log_w = torch.full_like(log_w, LOWEST)
    if "no decay" in kind:
        log_w = 1e-4 * log_w
    removal = F.normalize(removal, dim=-1)
    return [x.to(dtype) for x in (r, log_w, k, v, -removal, removal * gate, normal(B, H, N, N))]


def run(function, tensors, dtype=None):
    """y, the final state, and the gradients of a fixed weighting of both, in the order of NAMES."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    y, state = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, state)]
    return y.detach(), state.detach(), *torch.autograd.grad((y, state), tensors, weights)


def relative_errors(values, references):
    """In relative L2, or relative to 0.1 a number where the truth is less (dlog_w of a first token is 0)."""
    errors = []
    for value, reference in zip(values, references):
        scale = max(reference.double().norm(), 0.1 * math.sqrt(reference.numel()))
        errors.append(((value.double() - reference.double()).norm() / scale).item())
    return errors


def assert_close(values, references, tolerance, rivals=None):
    """Within the tolerance; where the numbers are ill-conditioned, within twice the rivals' own error."""
    allowed = [tolerance] * len(NAMES)
    if rivals is not None:
        allowed = [max(tolerance, 2 * error) for error in relative_errors(rivals, references)]
    for name, error, most in zip(NAMES, relative_errors(values, references), allowed):
        assert error <= most, f"{name}: relative error {error:.1e}"  # false for NaN too


@settings(deadline=None, max_examples=60)
@example(B=1, T=32, H=1, N=32, seed=117, kind="same key, no decay", with_state=False, short_spans=False)
@given(
    B=st.integers(1, 3), T=st.integers(1, 80), H=st.integers(1, 3), N=st.sampled_from((4, 8, 16, 32, 64)),
    seed=st.integers(0, 999), kind=st.sampled_from(KINDS), with_state=st.booleans(), short_spans=st.booleans()
)  # fmt: skip
def test_chunked_is_the_recurrence(B, T, H, N, seed, kind, with_state, short_spans):
    """A slip in the algebra of chunks, in cutting T into spans, in a gradient; rows or heads mixed up; a loss
    of digits in fp32.
    """
    tensors = make(B, T, H, N, seed, kind)[: 7 if with_state else 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "CPU_SPAN", 1 if short_spans else operator.CPU_SPAN)
        assert_close(run(wkv_chunked, tensors), run(wkv_reference, tensors), 1e-10)
        rounded = [x.float() for x in tensors]
        exact, rivals = run(wkv_reference, rounded, torch.float64), run(wkv_reference, rounded)
        assert_close(run(wkv_chunked, rounded), exact, 1e-5, rivals)


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_stay_accurate_in_fp32(kind):
    """Errors that add up from chunk to chunk, or an inverse that loses its digits where keys repeat."""
    tensors = [x.float() for x in make(1, 600, 1, 64, kind=kind)]
    assert_close(run(wkv_chunked, tensors), run(wkv_reference, tensors, torch.float64), 1e-5)


def test_reference_against_numbers_by_hand():
    """A reference that is wrong itself: a transposed state, decay after writing, a reading the new state."""
    one = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    numbers = ([1, 10], [2, 3], [5, 7], [1, -1], [4, 6])
    r, k, v, a, b = (one * torch.tensor(x, dtype=torch.float64) for x in numbers)
    log_w = torch.tensor([0.5, 0.25], dtype=torch.float64).log().expand(1, 1, 1, 2)
    state = torch.tensor([[[[8.0, 4.0], [16.0, 32.0]]]], dtype=torch.float64)
    y, final = wkv_reference(r, log_w, k, v, a, b, state)
    # u = S a = [4, -16]; S = S diag(w) + u b' + v k'
    expected = torch.tensor([[4 + 16 + 10, 1 + 24 + 15], [8 - 64 + 14, 8 - 96 + 21]], dtype=torch.float64)
    assert torch.allclose(final[0, 0], expected, rtol=1e-14)
    assert torch.allclose(y[0, 0, 0], expected @ torch.tensor([1.0, 10.0], dtype=torch.float64), rtol=1e-14)


@settings(deadline=None, max_examples=15)
@given(T=st.integers(2, 90), where=st.floats(0, 1), N=st.sampled_from((8, 64)), seed=st.integers(0, 2**31))
def test_splitting_a_sequence_changes_nothing(T, where, N, seed):
    """A state that is not all there is to know, or whose gradient does not reach the first part."""
    cut = max(1, min(T - 1, round(where * T)))

    def in_two(r, log_w, k, v, a, b, state):
        inputs = (r, log_w, k, v, a, b)
        y_1, state = wkv(*(x[:, :cut] for x in inputs), state)
        y_2, state = wkv(*(x[:, cut:] for x in inputs), state)
        return torch.cat((y_1, y_2), 1), state

    tensors = make(2, T, 1, N, seed)
    assert_close(run(in_two, tensors), run(wkv_chunked, tensors), 1e-10)


@settings(deadline=None, max_examples=15)
@given(T=st.integers(2, 90), where=st.floats(0, 1), N=st.sampled_from((16, 64)), seed=st.integers(0, 2**31))
def test_later_tokens_never_touch_earlier_outputs(T, where, N, seed):
    """A look ahead: in values not by one bit, in gradients not by anything but zero."""
    t = max(1, min(T - 1, round(where * T)))
    first = [x.float() for x in make(1, T, 2, N, seed)]
    other = [x.float() for x in make(1, T, 2, N, seed + 1)]
    changed = [torch.cat((x[:, :t], z[:, t:]), 1) for x, z in zip(first[:6], other)]
    y, _ = wkv_chunked(*first)
    y_changed, _ = wkv_chunked(*changed, first[6])
    assert torch.equal(y[:, :t], y_changed[:, :t])
    assert not torch.equal(y[:, t:], y_changed[:, t:])
    inputs = [x.requires_grad_() for x in first[:6]]
    y, _ = wkv_chunked(*inputs, first[6])
    for gradient in torch.autograd.grad(y[:, :t].square().sum(), inputs):
        assert not gradient[:, t:].any()
        assert gradient[:, :1].isfinite().all()


@pytest.mark.parametrize("T", (1, 5, 32, 75))
def test_padding_leaves_the_state_alone(T):
    """A state that padding changes by one bit; outputs or gradients of a row that depend on its padding."""
    r, log_w, k, v, a, b, state = (x.float() for x in make(2, 40, 2, 64))
    nothing = torch.zeros(2, T, 2, 64)
    _, final = wkv(*[nothing] * 6, state)
    assert torch.equal(final, state)

    def padded(*tensors):
        *inputs, state = tensors
        y, final = wkv(*(torch.cat((x, nothing), 1) for x in inputs), state)
        assert not y[:, 40:].any()
        return y[:, :40], final

    tensors = (r, log_w, k, v, a, b, state)
    assert_close(run(padded, tensors), run(wkv, tensors), 2e-6)


def test_under_activation_checkpointing_and_autocast():
    """A backward that relies on more than what it saved; matrix products that autocast rounds to bf16."""
    tensors = [x.float() for x in make(2, 50, 2, 32)]
    plain = run(wkv_chunked, tensors)
    again = run(lambda *x: checkpoint(wkv_chunked, *x, use_reentrant=False), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(wkv_chunked, tensors)
    for a, b, c in zip(plain, again, cast):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_half_precision_inputs_are_computed_in_fp32():
    """A bf16 tensor that slips into a matrix product, and results of the wrong dtype."""
    tensors = [x.bfloat16() for x in make(2, 40, 2, 16)]
    tensors[1] = tensors[1].float()  # log_w stays fp32 under autocast
    y, state, *gradients = run(wkv_chunked, tensors)
    y_32, state_32, *gradients_32 = run(wkv_chunked, [x.float() for x in tensors])
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(y, y_32.bfloat16()) and torch.equal(state, state_32)
    assert [g.dtype for g in gradients] == [x.dtype for x in tensors]
    assert_close(gradients, gradients_32, 5e-2)  # the weights of the sum are rounded too
    assert wkv_reference(*tensors)[0].dtype == torch.bfloat16


def test_strided_inputs_and_missing_gradients():
    """Memory order taken for granted; gradients of one input only, or from y or the state alone."""
    tensors = make(2, 40, 3, 16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert_close(run(wkv_chunked, strided), run(wkv_chunked, tensors), 1e-14)
    r, log_w, k, v, a, b, state = tensors
    k = k.requires_grad_()
    for function in (wkv_chunked, wkv_reference):
        y, final = function(r, log_w, k, v, a, b, state)
        from_y = torch.autograd.grad(y.sum(), k, retain_graph=True)[0]
        from_state = torch.autograd.grad(final.sum(), k, retain_graph=True)[0]
        both = torch.autograd.grad(y.sum() + final.sum(), k)[0]
        assert relative_error(from_y + from_state, both) <= 1e-13


@pytest.mark.parametrize(
    "broken",
    [
        lambda x, s: (*x[:2], x[2][:, 1:], *x[3:], s),
        lambda x, s: (*x, s[:, :, 1:]),
        lambda x, s: (*x[:5], x[5].long(), s),
        lambda x, s: (*(z[:, :0] for z in x), s),
        lambda x, s: (*(z[0] for z in x), s),
        lambda x, s: (x[0].to("meta"), *x[1:], s),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(broken):
    """Broadcasting that hides a wrong shape, or a message from the depths."""
    *inputs, state = make(2, 5, 2, 8)
    for function in (wkv, wkv_reference, wkv_chunked, wkv_cuda):
        with pytest.raises(ValueError, match=r"^wkv: (v|k|r|b|state) must be [^\n]*$"):
            function(*broken(inputs, state))


@pytest.mark.parametrize("T", (1, 40))
@pytest.mark.parametrize("wrong", (-0.61, -12.0, 1e-3, math.inf, math.nan))
def test_a_decay_out_of_range_is_refused_on_a_cpu(T, wrong):
    """One log_w out of RWKV-7's range is an error that names the value and wkv_reference, which takes it.

    Catches: NaN or wrong numbers without a word, since the chunked form divides by products of decays.
    """
    r, log_w, k, v, a, b, state = (x.float() for x in make(2, T, 2, 16))
    log_w[1, T - 1, 1, 3] = wrong
    line = r"^wkv: log_w must be in \(-0.6066, 0\][^\n]* wkv_reference [^\n]*$"
    for function in (wkv, wkv_chunked):
        with pytest.raises(ValueError, match=line):
            function(r, log_w, k, v, a, b, state)
    wkv_reference(r, log_w, k, v, a, b, state)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_every_decay_that_the_model_makes_is_accepted(dtype):
    """log_w = -exp(-0.5) sigmoid(x) passes for x from -inf to inf in every dtype, and so does padding's 0.

    Catches: a bound so tight that rounding up to it refuses the model's own decays.
    """
    x = torch.tensor([-math.inf, -20, 0, 20, math.inf], dtype=dtype)
    log_w = torch.cat((-math.exp(-0.5) * torch.sigmoid(x), torch.zeros(3, dtype=dtype))).view(1, 2, 1, 4)
    others = torch.ones(1, 2, 1, 4, dtype=dtype)
    y, _ = wkv(others, log_w, others, others, others, others)
    assert y.isfinite().all()


def test_wkv_cuda_refuses_what_it_cannot_do():
    """Tensors that are not on a GPU handed to one, or a grid that is too large for it."""
    with pytest.raises(ValueError, match=r"^wkv_cuda: v must be on a GPU[^\n]*$"):
        wkv_cuda(*make(1, 5, 1, 16))
    v = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(65536, 1, 1, 16))
    assert operator._kernels_for(v) is None


# ---- wkv_cuda.py, with the kernels on the CPU in the place of the driver -----------------------------------
#
# all between wkv and the GPU runs: the choice of kernels, their check, autograd, the grids, the packing of
# arguments. N = 32, so that rows split; 16 processors, so that both problems of the check stay small.


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as torch and the driver describe it; its kernels run on the CPU. Nothing is loaded yet."""
    properties = types.SimpleNamespace(
        name="stub", major=9, minor=0, multi_processor_count=16, shared_memory_per_block_optin=2**18
    )
    stream = types.SimpleNamespace(cuda_stream=0x123456789ABC)
    if not shutil.which("g++"):
        pytest.skip("needs g++ to build the kernels for the CPU")
    driver, kernel = Driver(), build(32, 1)
    kernel.seed = kernel.drop = 0
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(loader, "_libcuda", lambda: driver)
    monkeypatch.setattr(loader, "cubin", lambda architecture, N, bf16: b"%d %d" % (N, bf16))
    monkeypatch.setattr(loader, "loaded", {})
    return types.SimpleNamespace(properties=properties, driver=driver, kernel=kernel)


def load(bf16=True):
    return loader.load(torch.device("cpu"), 32 if bf16 else 16, bf16, wkv_reference)


def on_gpu(r, log_w, k, v, a, b, state):
    """wkv_cuda, once its tensors are known to be on a GPU, with v in bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "_kernels_for", lambda v: load())
        return wkv_cuda(r, log_w, k, v.bfloat16(), a, b, state)


def rounded(tensors):
    return [x.float() if i in (1, 6) else x.bfloat16().float() for i, x in enumerate(tensors)]


@pytest.mark.parametrize("processors", (16, 1))
def test_kernels_through_the_driver_give_the_recurrence(gpu, processors):
    """Catches arguments in a wrong order, a wrong grid, buffers too small, gradients in wrong places."""
    gpu.properties.multi_processor_count = processors
    load()
    for B, T, H in ((1, 1, 1), (2, 37, 2), (1, 150, 1), (1, 150, 3)):
        tensors = rounded(make(B, T, H, 32))
        gpu.driver.launched.clear()
        assert_close(run(on_gpu, tensors), run(wkv_reference, tensors, torch.float64), 1.5e-2)
        # several segments, and so the chain, where tokens are many and heads few
        chain = ["wkv_backward_chain"] if T == 150 and H <= 2 * processors else []
        assert gpu.driver.launched == ["wkv_forward", *chain, "wkv_backward"]


def test_each_kernel_where_it_is_meant_to_run(gpu, capsys):
    """Catches a state rounded to bf16 at each decoded token, and a GPU that is too small for the chunks."""
    kernels, launched = load(), gpu.driver.launched
    assert kernels.chunked and not load(bf16=False).chunked
    forward, backward = gpu.kernel.shared
    assert [kernels.shared[name] for name in loader.ENTRY_POINTS] == [forward, forward, backward, 0]
    tensors = rounded(make(2, 1, 2, 32))
    launched.clear()
    with torch.no_grad():
        _, final = on_gpu(*tensors)
        on_gpu(*rounded(make(1, 2, 1, 32)))
    assert launched == ["wkv_token_forward", "wkv_forward"]
    assert relative_error(final, wkv_reference(*[x.double() for x in tensors])[1]) <= 1e-6
    assert capsys.readouterr().err == ""
    loader.loaded.clear()
    gpu.properties.shared_memory_per_block_optin = 2**12
    exact = run(wkv_reference, tensors, torch.float64)
    assert_close(run(on_gpu, tensors), exact, 1e-2)
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "head size 32 needs more shared memory than stub has" in notice
    assert "wkv_backward" not in launched[2:]
    with torch.no_grad():
        assert_close(on_gpu(*tensors), exact, 1e-2)
    assert launched[-1] == "wkv_token_forward"


def test_kernels_take_strided_and_misaligned_tensors(gpu):
    """Catches garbage from a tensor whose memory is not laid out as the kernel reads it."""
    tensors = [x.float() for x in make(2, 20, 2, 32)]
    room = torch.zeros(2 * 20 * 2 * 32 + 1, dtype=torch.bfloat16)[1:].view(2, 20, 2, 32)
    room.copy_(tensors[0])
    assert room.data_ptr() % 16 != 0
    plain = [tensors[0].bfloat16(), *tensors[1:]]
    strided = [room, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[1:])]
    for value, reference in zip(run(on_gpu, strided), run(on_gpu, plain)):
        assert torch.equal(value, reference)


def test_gradients_of_y_or_the_state_alone(gpu):
    """Catches a missing gradient taken for a tensor, or for garbage; zeros made in the place of dstate."""
    tensors = [x.requires_grad_() for x in rounded(make(1, 40, 2, 32))]
    y, final = on_gpu(*tensors)
    pointers = []  # to dstate, the backward's argument 11

    def note(name, addresses):
        pointers.append(ctypes.c_void_p.from_address(addresses[11]).value)
        return addresses

    gpu.driver.spoil = note
    for output, zero in ((y, final), (final, y)):
        alone = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
        both = torch.autograd.grad(output.sum() + 0 * zero.sum(), tensors, retain_graph=True)
        assert all(torch.equal(x, z) for x, z in zip(alone, both))
    assert pointers[0] is None and all(pointers[1:])


# ---- the check at first use, and doing without kernels -----------------------------------------------------


def test_a_right_kernel_passes_wherever_its_first_use_falls(gpu, capsys):
    """Catches a check that fails, or disturbs, inside inference, autocast or activation checkpointing, that
    moves the user's random numbers, that runs more than once, or that misses a kernel.
    """
    tensors = rounded(make(1, 20, 2, 32))
    assert load()
    assert {*gpu.driver.launched} == {*loader.ENTRY_POINTS}
    assert gpu.driver.grids >= {(name, z) for name in ("wkv_forward", "wkv_backward") for z in (1, 2)}
    expected = run(on_gpu, tensors)
    seen = torch.get_rng_state()
    device, autocast = torch.device("meta"), torch.autocast("cpu", torch.bfloat16)
    for around in (torch.inference_mode(), torch.no_grad(), autocast, device):
        loader.loaded.clear()
        with around:
            assert load()
    loader.loaded.clear()
    checkpointed = run(lambda *x: checkpoint(on_gpu, *x, use_reentrant=False), tensors)
    for value, reference in zip(checkpointed, expected):
        assert torch.equal(value, reference)
    assert load(bf16=False)
    assert torch.equal(torch.get_rng_state(), seen)
    gpu.driver.launched.clear()
    assert load() and not gpu.driver.launched
    assert capsys.readouterr().err == ""


SWAPS = [  # of two of a kernel's arguments, by position
    ("wkv_forward", 4, 7), ("wkv_backward_chain", 5, 6), ("wkv_backward", 17, 18), ("wkv_token_forward", 2, 5)
]  # fmt: skip


@pytest.mark.parametrize("fault", [*SWAPS, "NaN", *barrier_lines()[::4]])
def test_a_wrong_kernel_never_runs(gpu, fault, monkeypatch, capsys):
    """Catches a check that lets a wrong kernel pass, or that speaks up more than once. A number is the line
    of a wait that is left out, which some order of warps shows.
    """

    def spoil(name, addresses):
        order = list(addresses)
        if name == fault[0]:
            _, i, j = fault
            order[i], order[j] = order[j], order[i]
        return type(addresses)(*order)

    def one_nan(*arguments, right=loader.run, **options):
        y, final = right(*arguments, **options)
        return y + torch.zeros_like(y).index_fill(1, torch.tensor([3]), math.nan), final

    if fault == "NaN":
        monkeypatch.setattr(loader, "run", one_nan)
    elif isinstance(fault, int):
        gpu.kernel.drop = fault
    else:
        gpu.driver.spoil = spoil
    for gpu.kernel.seed in range(12):
        loader.loaded.clear()
        capsys.readouterr()
        if not load():
            break
    gpu.driver.launched.clear()
    assert load() is None and not gpu.driver.launched
    assert capsys.readouterr().err.count("wkv: no CUDA kernel, the slower PyTorch form runs: ") == 1
    monkeypatch.setattr(operator, "_kernels_for", lambda v: load())
    tensors = make(1, 20, 2, 32)
    assert_close(run(wkv, tensors), run(wkv_reference, tensors), 1e-10)


def test_a_first_use_while_a_graph_is_captured(gpu, monkeypatch, capsys):
    """Catches a kernel given up for good because its first use came at a bad moment."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert load() is None
    assert "capture" in capsys.readouterr().err and not gpu.driver.launched
    kernels = load()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kernels and load() is kernels


def test_without_a_compiler_wkv_says_so_once_and_goes_on(monkeypatch, capsys):
    """Catches a machine without NVRTC that cannot run at all, or that says so at every layer and step."""
    properties = types.SimpleNamespace(name="stub", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(loader, "_libcuda", lambda: Driver())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(loader, "nvrtc", None)
    monkeypatch.setattr(loader, "loaded", {})
    assert [load() for _ in range(3)] == [None] * 3
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "pip install cuda-bindings" in notice
    properties.major = 7
    assert load(bf16=False) is None
    assert "too old" in capsys.readouterr().err


def test_compiled_kernels_are_kept_by_all_that_decides_them(monkeypatch, tmp_path):
    """Catches an old kernel used after its source, options, GPU or compiler changed; one compiled at every
    start; half a kernel that the next start takes for a whole one; an error where no file can be written.
    """
    asked, folder = [], tmp_path / "cache"

    def compile_it(source, options):
        asked.append(options)
        return b"cubin of " + source + repr(options).encode()

    monkeypatch.setenv("WKV_CACHE", str(folder))
    monkeypatch.setattr(loader, "SOURCE", tmp_path / "kernel.cu")
    monkeypatch.setattr(loader, "compile_source", compile_it)
    monkeypatch.setattr(loader, "nvrtc", types.SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)))
    loader.SOURCE.write_text("one")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        first = loader.cubin("sm_90", 64, True)
    assert not list(folder.iterdir())
    assert [loader.cubin("sm_90", 64, True) for _ in range(2)] == [first] * 2
    assert len(asked) == 2
    others = [("sm_80", 64, True), ("sm_90", 32, True), ("sm_90", 64, False)]
    assert len({first, *(loader.cubin(*other) for other in others)}) == 4
    loader.SOURCE.write_text("two")
    assert loader.cubin("sm_90", 64, True) != first
    loader.nvrtc.nvrtcVersion = lambda: (0, 13, 1)
    loader.cubin("sm_90", 64, True)
    assert len(asked) == 7 and len(list(folder.glob("*.cubin"))) == len(list(folder.iterdir())) == 6
    monkeypatch.setenv("WKV_CACHE", "/dev/null/nowhere")
    assert loader.cubin("sm_80", 64, True)
