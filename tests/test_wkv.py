"""The WKV-7 operator: the chunked form and the road to the CUDA kernels against the recurrence in fp64.

Shapes: B batch, T tokens, H heads, N head size.
"""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import wkv as operator
from conftest import relative_error
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


@pytest.mark.parametrize("T", (operator.SHORT + 1, 40))
@pytest.mark.parametrize("wrong", (-0.61, -12.0, 1e-3, math.inf, math.nan))
def test_a_decay_out_of_range_is_refused_on_a_cpu(T, wrong):
    """One log_w out of RWKV-7's range is an error that names the value and wkv_reference, which takes it.

    Fewer tokens than four are right with any decay, and are not looked at.

    Catches: NaN or wrong numbers without a word, since the chunked form divides by products of decays.
    """
    r, log_w, k, v, a, b, state = (x.float() for x in make(2, T, 2, 16))
    log_w[1, T - 1, 1, 3] = wrong
    line = r"^wkv: log_w must be in \(-0.6066, 0\][^\n]* wkv_reference [^\n]*$"
    for function in (wkv, wkv_chunked):
        with pytest.raises(ValueError, match=line):
            function(r, log_w, k, v, a, b, state)
    few = [x[:, -operator.SHORT:] for x in (r, log_w, k, v, a, b)]
    for value, truth in zip(wkv(*few, state), wkv_reference(*few, state)):
        assert torch.equal(value.nan_to_num(), truth.nan_to_num())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_every_decay_that_the_model_makes_is_accepted(dtype):
    """log_w = -exp(-0.5) sigmoid(x) passes for x from -inf to inf in every dtype, and so does padding's 0.

    Catches: a bound so tight that rounding up to it refuses the model's own decays.
    """
    x = torch.tensor([-math.inf, -20, 0, 20, math.inf], dtype=dtype)
    log_w = torch.cat((-math.exp(-0.5) * torch.sigmoid(x), torch.zeros(3, dtype=dtype))).view(1, 4, 1, 2)
    others = torch.ones(1, 4, 1, 2, dtype=dtype)
    y, _ = wkv(others, log_w, others, others, others, others)
    assert y.isfinite().all()


def test_wkv_cuda_refuses_what_it_cannot_do():
    """Tensors that are not on a GPU handed to one, or a grid that is too large for it."""
    with pytest.raises(ValueError, match=r"^wkv_cuda: v must be on a GPU[^\n]*$"):
        wkv_cuda(*make(1, 5, 1, 16))
    v = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(65536, 1, 1, 16))
    assert operator._kernels_for(v) is None
