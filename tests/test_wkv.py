"""wkv.py, beside the laws of test_operator_laws.py: how the chunked form cuts tokens and what it keeps in
memory, autograd and its contexts, dtypes and strides, which form runs, and errors.

Shapes: B batch, T tokens, H heads, N head size.
"""

import math
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import test_operator_laws as laws
import wkv as operator
from wkv import wkv, wkv_chunked, wkv_cuda, wkv_reference

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
CHUNKED = {form.dtype: form for form in laws.FORMS if form.operator is wkv_chunked}


def make(dtype, T, **changes):
    """A case of the laws, with N = 8, and where it is `wide` 64: r, log_w, k, v, a, b and a state."""
    case = {"seed": 0, "B": 2, "T": T, "wide": False, "decay": "usual", "keys": "random", "memory": 1.0}
    return laws.make(CHUNKED[dtype], **{**case, **changes})


def run(function, tensors):
    """y, the final state and the gradients of all inputs."""
    return laws.run(function, tensors, gradients=True)


# ---- the chunked form --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", (False, True))
def test_spans_change_nothing(monkeypatch, wide):
    """Spans of one chunk each keep the promise of the chunked form, as the usual ones of many chunks do.

    Catches: a state or a gradient that is not handed from span to span, and a span's y in the wrong place.
    """
    tensors = make(FP64, 75, wide=wide)
    monkeypatch.setattr(operator, "CPU_SPAN", 1)
    laws.check(CHUNKED[FP64], "random", run(wkv_chunked, tensors), laws.truth_of(tensors, gradients=True))


@pytest.mark.parametrize("decay, keys", [
    ("usual", "random"), ("fastest", "random"), ("none", "random"), ("slow", "two"), ("none", "two"),
    ("usual", "one, overwritten"), ("none", "one, overwritten"),
])
def test_long_sequences_stay_accurate_in_fp32(decay, keys):
    """600 tokens keep the promise that the chunked form makes in fp32.

    Catches: errors that add up from chunk to chunk, and an inverse that loses its digits where keys repeat.
    """
    tensors = make(FP32, 600, B=1, wide=True, decay=decay, keys=keys)
    truth = run(wkv_reference, [x.double() for x in tensors])
    laws.check(CHUNKED[FP32], keys, run(wkv_chunked, tensors), truth)


def test_what_is_kept():
    """The backward needs at most 13 N numbers a token and head, and a state keeps no memory but its own.

    Catches: an array kept that could be made again, and a state that is a view of something larger, which
    would stay in memory, and be written to the disk, with it.
    """
    tensors = [x.requires_grad_() for x in make(FP32, 320, wide=True)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        wkv_chunked(*tensors)
    numbers = sum(x.numel() for x in kept)
    assert 12 * tensors[0].numel() <= numbers <= 13 * tensors[0].numel()
    for T in (1, 40):
        for function in (wkv, wkv_reference):
            _, final = function(*make(FP32, T))
            assert final.untyped_storage().nbytes() == final.numel() * final.element_size()


def test_under_activation_checkpointing_and_autocast():
    """The same bits come out under activation checkpointing and under autocast.

    Catches: a backward that relies on more than what it saved, and products that autocast rounds to bf16.
    """
    tensors = make(FP32, 50)
    plain = run(wkv_chunked, tensors)
    assert laws.same_bits(run(lambda *x: checkpoint(wkv_chunked, *x, use_reentrant=False), tensors), plain)
    with torch.autocast("cpu", BF16):
        assert laws.same_bits(run(wkv_chunked, tensors), plain)


def test_it_cannot_be_differentiated_twice():
    """A second derivative is an error.

    Catches: second derivatives of zero, without a word.
    """
    tensors = [x.requires_grad_() for x in make(FP32, 20)]
    y, _ = wkv_chunked(*tensors)
    (gradient,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_half_precision_inputs_are_computed_in_fp32():
    """bf16 inputs give y and gradients in bf16, rounded from fp32, and a state in fp32.

    Catches: a bf16 tensor that slips into a matrix product, and results of the wrong dtype.
    """
    r, log_w, k, v, a, b, state = make(FP32, 40)
    r, k, v, a, b = (x.to(BF16) for x in (r, k, v, a, b))
    tensors = [r, log_w, k, v, a, b, state]  # log_w stays in fp32 under autocast
    y, final, *gradients = run(wkv_chunked, tensors)
    y_32, final_32, *gradients_32 = run(wkv_chunked, [x.float() for x in tensors])
    assert laws.same_bits((y, final), (y_32.to(BF16), final_32))
    for x, gradient, gradient_32 in zip(tensors, gradients, gradients_32):
        assert gradient.dtype == x.dtype
        assert torch.equal(gradient, gradient_32.to(x.dtype))
    assert wkv_reference(*tensors)[0].dtype == BF16


def test_strided_inputs():
    """Inputs in another order of memory give the same results.

    Catches: an order of memory that is taken for granted.
    """
    tensors = make(FP64, 40)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    laws.check(CHUNKED[FP64], "random", run(wkv_chunked, strided), run(wkv_chunked, tensors))


@pytest.mark.parametrize("function", (wkv_chunked, wkv_reference))
def test_gradients_of_one_input_from_one_output(function):
    """The gradient of k alone, from y alone and from the state alone, add up to that from both.

    Catches: a gradient that is missing, or wrong, where not all are asked for.
    """
    r, log_w, k, v, a, b, state = make(FP64, 40)
    k.requires_grad_()
    y, final = function(r, log_w, k, v, a, b, state)
    (from_y,) = torch.autograd.grad(y.sum(), k, retain_graph=True)
    (from_state,) = torch.autograd.grad(final.sum(), k, retain_graph=True)
    (both,) = torch.autograd.grad(y.sum() + final.sum(), k)
    assert laws.error_of(from_y + from_state, both) <= 1e-13


# ---- which form runs, and errors ---------------------------------------------------------------------------


def test_without_a_gpu_wkv_is_the_chunked_form():
    """On a CPU, wkv gives the bits of wkv_chunked, and no state is a state of zeros.

    Catches: a slower form chosen, and an initial state that is not zero.
    """
    *inputs, state = make(FP32, 40, memory=0.0)
    assert laws.same_bits(wkv(*inputs), wkv_chunked(*inputs, state))


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
    """A wrong shape, dtype or device is a line that names the tensor.

    Catches: broadcasting that hides a wrong shape, and a message from the depths of torch.
    """
    *inputs, state = make(FP32, 5)
    for function in (wkv, wkv_reference, wkv_chunked, wkv_cuda):
        with pytest.raises(ValueError, match=r"^wkv: (v|k|r|b|state) must be [^\n]*$"):
            function(*broken(inputs, state))


@pytest.mark.parametrize("T", (operator.SHORT + 1, 40))
@pytest.mark.parametrize("wrong", (-0.61, -12.0, 1e-3, math.inf))
def test_a_decay_out_of_range_is_refused_on_a_cpu(T, wrong):
    """One log_w out of RWKV-7's range is an error that names the value and wkv_reference, which takes it.

    Fewer tokens than four are right with any decay, and are not looked at.

    Catches: wrong numbers or NaN without a word, since the chunked form divides by products of decays.
    """
    r, log_w, k, v, a, b, state = make(FP32, T)
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
    """Tensors that are not on a GPU are refused; a batch that is too large for a grid takes another form.

    Catches: a pointer into the CPU's memory handed to a GPU, and a launch that fails.
    """
    with pytest.raises(ValueError, match=r"^wkv_cuda: v must be on a GPU[^\n]*$"):
        wkv_cuda(*make(FP32, 5))
    v = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(65536, 1, 1, 16))
    assert operator._kernels_for(v) is None
