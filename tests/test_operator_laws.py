"""The laws of WKV-7, the operator of RWKV-7. Read from top to bottom, they say what it is.

A head remembers in one matrix, its state S, which maps keys to values. Each token brings six vectors of N
numbers, called r, w, k, v, a and b, and does three things:

    u_t = S_{t-1} a_t                                  (1)  it reads what the memory holds under a
    S_t = S_{t-1} diag(w_t) + u_t b_t' + v_t k_t'      (2)  the memory fades; u is added under b, v under k
    y_t = S_t r_t                                      (3)  it reads what the memory now holds under r

Letters, with the names of the paper (Peng et al. 2025, "RWKV-7 Goose", arXiv:2503.14456):

    S   state, the memory: (B, H, N, N), [value, key], so that a column belongs to one channel of the keys
    r   receptance: the key that the token reads with, a query in the words of attention
    w   decay: the factor by which each column fades. It is given as log_w, in (-0.6066, 0], for RWKV-7
        computes it as -exp(-0.5) sigmoid(...)
    k   key, under which v is added
    v   value
    a   minus the removal key, which is a unit vector: the address whose content is to be replaced
    b   the removal key times a gate in (0, 1). As b points against a, (2) takes away from the memory what it
        held under that address, all of it where the gate is 1: the delta rule. (The paper gives the letter a
        to the gate, and writes the removal key as kappa.)
    u   what the memory held under a
    y   output
    B   batch rows, T tokens, H heads, N head size: r, log_w, k, v, a, b and y are (B, T, H, N)

The operator is the function f that takes all tokens and an initial state through this,

    (y, S_T) = f(r, log_w, k, v, a, b, S_0)

Six laws follow from (1) to (3): recurrence, causality, padding, splitting, linearity, gradients. A section
below states each of them in a sentence and an equation. Four forms of the operator have to obey them:

    recurrence       wkv_reference: the equations in PyTorch, one token at a time
    chunked          wkv_chunked: matrix products over chunks of tokens, in PyTorch
    token kernel     wkv_kernel.cu: the equations in CUDA, one token at a time; it has no backward
    chunked kernel   wkv_kernel.cu: chunks of 16 tokens on the tensor cores

The kernels run on the CPU here, which takes g++ (kernel_on_cpu.py). On a GPU, test_gpu.py holds them to the
same laws.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_on_cpu import CHUNK, build, needs_compiler
from wkv import wkv_chunked, wkv_reference

NAMES = ("r", "log_w", "k", "v", "a", "b", "state")
RESULTS = ("y", "final state", *(f"gradient of {name}" for name in NAMES))
LOWEST = -math.exp(-0.5)  # no log_w of RWKV-7 is lower
FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16


# ---- the forms, and what each of them promises -------------------------------------------------------------


def kernel_for(x):
    """The kernels under g++ for the head size and the dtype of x, (B, T, H, N)."""
    kernel = build(x.shape[-1], x.dtype == BF16)
    kernel.seed = kernel.drop = 0  # settings of the CPU's shim: warps in one order, no barrier left out
    return kernel


def token_kernel(*tensors):
    return kernel_for(tensors[0]).token_forward(*tensors)


class ChunkedKernel(torch.autograd.Function):
    """The chunked kernels under g++, for PyTorch's autograd."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.kernel = kernel_for(tensors[0])
        y, final, checkpoints = ctx.kernel.forward(*tensors)
        ctx.save_for_backward(*tensors[:6], checkpoints)
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):
        return tuple(ctx.kernel.backward(*ctx.saved_tensors, dy, dfinal))


def chunked_kernel(*tensors):
    return ChunkedKernel.apply(*tensors)


class Form(NamedTuple):
    """A form of the operator, and what it promises."""

    name: str
    operator: Callable  # (r, log_w, k, v, a, b, state) -> (y, final state)
    dtype: torch.dtype  # of r, k, v, a, b and y
    # the largest errors against the equations in fp64, in relative L2
    y: float
    state: float
    gradients: float | None  # None: the form has no backward
    # cutting or padding at multiples of this many tokens changes no bit; None: it may change some anywhere
    exact_at: int | None
    # by what factor errors may be larger, for the kinds of keys that a case has
    where_keys_repeat: dict[str, float] = {}
    head_sizes: tuple[int, int] = (16, 64)  # the laws try a narrow head and a wide one


# "two": a token removes what an earlier one wrote, and the difference of two large terms remains. "one,
# overwritten": every token removes what the token before it wrote, and all terms of a chunk cancel but one
BF16_FACTORS = {"two": 1.2, "one, overwritten": 2.5}

FORMS = [
    # fp64 rounds a number by up to 1e-16. A chunk also adds up terms that the recurrence never forms
    Form("recurrence, fp64", wkv_reference, FP64, 2e-15, 2e-15, 5e-15, exact_at=1, head_sizes=(8, 64)),
    Form("chunked, fp64", wkv_chunked, FP64, 1e-14, 1e-14, 5e-14, exact_at=None, head_sizes=(8, 64)),
    # fp32 rounds a number by up to 6e-8
    Form("recurrence, fp32", wkv_reference, FP32, 1e-6, 1e-6, 2e-6, exact_at=1, head_sizes=(8, 64)),
    Form("chunked, fp32", wkv_chunked, FP32, 5e-6, 5e-6, 1e-5, exact_at=None, head_sizes=(8, 64)),
    Form("token kernel, fp32", token_kernel, FP32, 1e-6, 1e-6, None, exact_at=1),
    # bf16 goes in and comes out, and all between is fp32. So y is rounded once, by up to 2^-9, below 2e-3
    Form("token kernel, bf16", token_kernel, BF16, 2e-3, 1e-6, None, exact_at=1),
    # tensor cores take factors in bf16, each rounded by up to 2^-9. A few such roundings follow each other on
    # the way to y and to the state, and about twice as many on the way to a gradient
    Form("chunked kernel, bf16", chunked_kernel, BF16, 5e-3, 5e-3, 1e-2, CHUNK, BF16_FACTORS),
]


def each_of(forms):
    """Runs a test once for each form. Kernels are skipped where there is no compiler to build them."""
    parameters = []
    for form in forms:
        marks = []
        if "kernel" in form.name:
            marks.append(needs_compiler)
        parameters.append(pytest.param(form, id=form.name, marks=marks))
    return pytest.mark.parametrize("form", parameters)


every_form = each_of(FORMS)
every_form_with_a_backward = each_of([form for form in FORMS if form.gradients])


# ---- the equations, and what the forms are tried on --------------------------------------------------------


def equations(r, log_w, k, v, a, b, state):
    """Equations (1) to (3) as they stand. In fp64 they are the truth that every form is held against.

    In the subscripts, b is the batch row, h the head, and v and k are the axes of values and of keys.
    """
    S = state
    y = []
    for t in range(r.shape[1]):
        u = torch.einsum("bhvk, bhk -> bhv", S, a[:, t])
        S = torch.einsum("bhvk, bhk -> bhvk", S, log_w[:, t].exp())
        S = S + torch.einsum("bhv, bhk -> bhvk", u, b[:, t])
        S = S + torch.einsum("bhv, bhk -> bhvk", v[:, t], k[:, t])
        y.append(torch.einsum("bhvk, bhk -> bhv", S, r[:, t]))
    return torch.stack(y, dim=1), S


def cases(shortest=1):
    """A case is drawn by hypothesis, as a few words and numbers, and `make` turns it into tensors."""
    return st.fixed_dictionaries({
        "seed": st.integers(0, 2**31),
        "B": st.integers(1, 2),
        "T": st.integers(shortest, 52),
        "wide": st.booleans(),
        "decay": st.sampled_from(["usual", "fastest", "none", "slow", "some channels"]),
        "keys": st.sampled_from(["random", "two", "one, overwritten"]),
        "memory": st.sampled_from([0.0, 1.0, 1e4]),
    })


def few(examples):
    """Every run draws the same cases: errors depend on the numbers, and a test that fails once in a thousand
    runs tells nobody what to do.
    """
    return settings(deadline=None, max_examples=examples, derandomize=True)


def make(form, seed, B, T, wide, decay, keys, memory):
    """r, log_w, k, v, a, b and an initial state as RWKV-7 makes them, in the dtypes that the form takes.

    Few tokens come with many heads. An error relative to a single number, which may be near 0, says nothing.
    """
    rng = torch.Generator().manual_seed(seed)
    H, N = max(2, 32 // T), form.head_sizes[wide]

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=FP64)

    r, k, v, removal = (normal(B, T, H, N) for _ in range(4))
    gate = torch.sigmoid(normal(B, T, H, N))
    log_w = {
        "usual": LOWEST * torch.sigmoid(2 * normal(B, T, H, N)),
        "fastest": torch.full((B, T, H, N), LOWEST, dtype=FP64),
        "none": torch.zeros(B, T, H, N, dtype=FP64),
        "slow": 1e-3 * LOWEST * torch.sigmoid(normal(B, T, H, N)),
        "some channels": LOWEST * torch.randint(0, 2, (B, T, H, N), generator=rng),
    }[decay]
    if keys == "two":  # tokens replace a part of what others wrote
        k = removal = removal[:, torch.randint(0, min(2, T), (T,), generator=rng)]
    removal = F.normalize(removal, dim=-1)
    if keys == "one, overwritten":  # each token replaces just what the last one wrote: the most cancels
        k = removal = removal[:, :1].expand_as(removal)
        gate = torch.ones_like(gate)
    return typed(form, (r, log_w, k, v, -removal, removal * gate, memory * normal(B, H, N, N)))


def typed(form, tensors):
    """The seven tensors in the dtypes that the form takes: log_w and the state are never less than fp32."""
    precise = torch.promote_types(form.dtype, FP32)
    r, log_w, k, v, a, b, state = tensors
    r, k, v, a, b = (x.to(form.dtype) for x in (r, k, v, a, b))
    return [r, log_w.to(precise), k, v, a, b, state.to(precise)]


def weights_of(outputs):
    """Fixed weights for every number of y and the final state, whose weighted sum is a loss. They are numbers
    that bf16 holds, so that the loss is the same for every form."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=rng).to(BF16).to(x.dtype) for x in outputs]


def run(operator, tensors, gradients):
    """The RESULTS of an operator: y and the final state and, where asked for, the gradients of a loss."""
    if not gradients:
        return operator(*tensors)
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = operator(*leaves)
    return *(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, weights_of(outputs))


def truth_of(tensors, gradients=False):
    return run(equations, [x.double() for x in tensors], gradients)


def check(form, keys, results, truths):
    """Fails unless the results keep the form's promise."""
    promises = (form.y, form.state, *[form.gradients] * len(NAMES))
    factor = form.where_keys_repeat.get(keys, 1.0)
    for name, result, truth, promise in zip(RESULTS, results, truths, promises):
        error, allowed = error_of(result, truth), factor * promise
        assert error <= allowed, f"{name}: relative error {error:.1e}, promised {allowed:.1e}"  # NaN fails


def error_of(result, truth):
    """The relative error in L2. Where the truth's numbers are below 0.1 (root mean square), the error is
    relative to 0.1 a number: the gradient of log_w, for one, is 0 for a single token on an empty memory.
    """
    truth = truth.double()
    size = max(truth.norm(), 0.1 * math.sqrt(truth.numel()))
    return ((result.double() - truth).norm() / size).item()


def same_bits(results, others):
    return all(torch.equal(result, other) for result, other in zip(results, others))


# ---- 1. Recurrence: every form computes (1) to (3) ---------------------------------------------------------


@every_form
def test_four_tokens_by_hand(form):
    """Four tokens on a memory of two keys, which can be followed on paper, give the numbers on the paper.

    Catches: a state transposed, a read with r before the token has written, a decay that fades rows or comes
    after the writing, an a that reads the new state, and an exchange of a and b. A form and `equations` could
    get these wrong alike.
    """
    none = (0, 0)
    log_w = [none, none, none, (math.log(0.75), math.log(0.875))]
    r = [(1, 0), (2, 1), (1, 0), (4, 8)]
    k = [(1, 0), (0, 1), (1, 0), (0, 2)]
    v = [(1, 2), (3, -1), (5, 4), (1, 3)]
    a = [none, none, (-1, 0), (1, 2)]
    b = [none, none, (1, 0), (4, 0)]
    # 1. (1, 2) is written under the first key, and read with it
    #        S = [1 0]      y = (1, 2)
    #            [2 0]
    # 2. (3, -1) is written under the second key; to read twice the first plus the second gives both
    #        S = [1  3]     y = (2 + 3, 4 - 1)
    #            [2 -1]
    # 3. (5, 4) replaces what the first key held: with b = -a, u = -(1, 2) takes the old value away
    #        S = [1 - 1 + 5   3]  = [5  3]     y = (5, 4)
    #            [2 - 2 + 4  -1]    [4 -1]
    # 4. a reads u = (5 + 2 * 3, 4 - 2), before anything fades; then the columns fade to 3/4 and 7/8, four
    #    times u is added to the first, and twice (1, 3) to the second
    #        S = [3.75 + 44   2.625 + 2]  = [47.75  4.625]     y = (191 + 37, 44 + 41)
    #            [3    +  8  -0.875 + 6]    [11     5.125]
    expected_y = [(1, 2), (5, 3), (5, 4), (228, 85)]
    expected_state = [(47.75, 4.625), (11, 5.125)]

    N = form.head_sizes[0]
    rest = (0, N - 2)  # all but two channels stay empty

    def vectors(rows):
        return F.pad(torch.tensor(rows, dtype=FP64), rest)[None, :, None]  # (B, T, H, N) = (1, 4, 1, N)

    empty = torch.zeros(1, 1, N, N)
    tensors = typed(form, [*map(vectors, (r, log_w, k, v, a, b)), empty])
    truth = vectors(expected_y), F.pad(torch.tensor(expected_state, dtype=FP64), rest + rest)[None, None]
    check(form, "random", form.operator(*tensors), truth)
    check(form, "random", truth_of(tensors), truth)


@every_form
@few(25)
@given(case=cases())
def test_recurrence(form, case):
    """f(r, log_w, k, v, a, b, S_0) = (y, S_T) of the equations, for any length, decay, keys and memory.

    Catches: a wrong term, index or tail, rows or heads mixed up, digits lost where keys come again.
    """
    tensors = make(form, **case)
    check(form, case["keys"], form.operator(*tensors), truth_of(tensors))


# ---- 2. Causality: no token sees a later one ---------------------------------------------------------------


@every_form
@few(15)
@given(case=cases(shortest=2), where=st.integers(0, 50))
def test_causality(form, case, where):
    """y_s depends on S_0 and the tokens 1 .. s alone. Other tokens from t on leave y_1 .. y_{t-1} as they
    are, to the last bit: what is masked is exactly zero, and adding a zero rounds nothing.

    Catches: a mask that is off by one, and a scale or a largest number taken over a whole chunk.
    """
    t = 1 + where % (case["T"] - 1)
    tensors = make(form, **case)
    others = make(form, **{**case, "seed": case["seed"] + 1})
    changed = [torch.cat((x[:, :t], other[:, t:]), dim=1) for x, other in zip(tensors[:6], others)]
    y, _ = form.operator(*tensors)
    y_changed, _ = form.operator(*changed, tensors[6])
    assert torch.equal(y_changed[:, :t], y[:, :t])
    assert not torch.equal(y_changed[:, t], y[:, t])


# ---- 3. Padding: a position of zeros does nothing ----------------------------------------------------------


@every_form
@few(15)
@given(case=cases(), padding=st.integers(1, 40), at_the_end=st.booleans())
def test_padding(form, case, padding, at_the_end):
    """log_w = k = v = a = b = 0 makes (2) say S_t = S_{t-1}. So such positions, wherever they stand and with
    any r, leave the tokens' y, the final state and all gradients as they are.

    Catches: a decay at a padded position, a tail that is not masked, a gradient that a padded position keeps.
    """
    tensors = make(form, **case)
    B, T, H, N = tensors[0].shape
    rng = torch.Generator().manual_seed(case["seed"])
    places = torch.arange(T)  # of the tokens
    if not at_the_end:
        places = torch.randperm(T + padding, generator=rng)[:T].sort().values
    any_r = torch.randn(B, T + padding, H, N, generator=rng).to(form.dtype)

    def padded(r, *others):
        *others, state = others
        r = any_r.index_copy(1, places, r)
        others = [x.new_zeros(any_r.shape).index_copy(1, places, x) for x in others]
        y, final = form.operator(r, *others, state)
        return y[:, places], final

    results = run(padded, tensors, form.gradients)
    check(form, case["keys"], results, truth_of(tensors, form.gradients))
    if form.exact_at == 1 or form.exact_at and at_the_end:
        assert same_bits(results, run(form.operator, tensors, form.gradients))


@every_form
@few(5)
@given(case=cases())
def test_padding_alone(form, case):
    """Where all positions are zeros, the final state is the initial state, to the last bit.

    Catches: a product of decays that is 1 but for its rounding, and a state that goes through bf16.
    """
    *inputs, state = make(form, **case)
    _, final = form.operator(*(torch.zeros_like(x) for x in inputs), state)
    assert torch.equal(final, state)


# ---- 4. Splitting: the state is all there is to know about the past ----------------------------------------


@every_form
@few(15)
@given(case=cases(shortest=2), where=st.integers(0, 50), between_chunks=st.booleans())
def test_splitting(form, case, where, between_chunks):
    """f(tokens 1 .. T, S_0) = f(tokens t+1 .. T, S_t), where S_t is the final state of f(tokens 1 .. t, S_0).
    y and S_T are the same, and so are the gradients, which reach the first part through S_t.

    Catches: a state that is not the last token's, that is transposed or rounded on its way out, or whose
    gradient goes missing.
    """
    cut = 1 + where % (case["T"] - 1)
    if between_chunks:
        cut = max(1, cut - cut % CHUNK)
    tensors = make(form, **case)

    def in_two(*tensors):
        *inputs, state = tensors
        y_1, state = form.operator(*(x[:, :cut] for x in inputs), state)
        y_2, state = form.operator(*(x[:, cut:] for x in inputs), state)
        return torch.cat((y_1, y_2), dim=1), state

    results = run(in_two, tensors, form.gradients)
    check(form, case["keys"], results, truth_of(tensors, form.gradients))
    if form.exact_at and cut % form.exact_at == 0:
        assert same_bits(results, run(form.operator, tensors, form.gradients))


# ---- 5. Linearity: what is written and remembered only adds up ---------------------------------------------


@every_form
@few(15)
@given(case=cases(), c=st.sampled_from([-1.0, 4.0, 0.125]))
def test_linearity(form, case, c):
    """For fixed r, log_w, k, a and b, f is linear in v and the initial state together:

        f(v + v', S_0 + S_0') = f(v, S_0) + f(v', S_0')       f(c v, c S_0) = c f(v, S_0)

    for y and for S_T. The sum is not exact to the bit, since each of the three runs rounds other numbers. So
    the two sides may differ by the sum of the errors that the form promises for each run. The product is
    exact to the bit where c is a power of two or -1, for that changes no digit of a number, in any dtype.

    Catches: a clamp, a normalisation or a constant that has no place in the operator, and v or the state
    counted twice.
    """
    r, log_w, k, v, a, b, state = make(form, **case)
    rng = torch.Generator().manual_seed(case["seed"] + 1)
    other_v = torch.randn(v.shape, generator=rng).to(v.dtype)
    other_state = torch.randn(state.shape, generator=rng).to(state.dtype)
    v, other_v = (torch.round(4 * x.clamp(-4, 4)) / 4 for x in (v, other_v))  # so that bf16 holds their sum

    def f(v, state):
        return form.operator(r, log_w, k, v, a, b, state)

    factor = form.where_keys_repeat.get(case["keys"], 1.0)
    first, second, both = f(v, state), f(other_v, other_state), f(v + other_v, state + other_state)
    for x, x_other, x_both, promise in zip(first, second, both, (form.y, form.state)):
        allowed = factor * promise * sum(z.double().norm() for z in (x, x_other, x_both))
        assert (x_both.double() - x.double() - x_other.double()).norm() <= allowed
    assert same_bits(f(c * v, c * state), [c * x for x in first])


# ---- 6. Gradients: those of the equations ------------------------------------------------------------------


@every_form_with_a_backward
@few(25)
@given(case=cases())
def test_gradients(form, case):
    """The gradients of a loss of y and S_T, in all seven inputs, are those that autograd finds for
    `equations` in fp64.

    Catches: a wrong or missing term of a gradient, one in the wrong place, one of the wrong dtype.
    """
    tensors = make(form, **case)
    results = run(form.operator, tensors, gradients=True)
    check(form, case["keys"], results, truth_of(tensors, gradients=True))
    assert [x.dtype for x in results[2:]] == [x.dtype for x in tensors]


@each_of([form for form in FORMS if form.gradients and form.dtype == FP64])
@few(15)
@given(case=cases())
def test_gradients_are_slopes(form, case):
    """In a direction d, (loss(x + h d) - loss(x - h d)) / 2h = <gradient, d>, up to terms in h^2.

    Catches: gradients of `equations` that are wrong themselves. Only fp64 has the digits for this.
    """
    h = 1e-5
    tensors = make(form, **{**case, "T": 2 + case["T"] % 7, "wide": False, "memory": 1.0})
    gradients = run(form.operator, tensors, gradients=True)[2:]
    rng = torch.Generator().manual_seed(case["seed"])

    def loss(tensors):
        outputs = equations(*tensors)
        return sum((x * weight).sum() for x, weight in zip(outputs, weights_of(outputs)))

    for i, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=rng, dtype=FP64)
        ahead, behind = list(tensors), list(tensors)
        ahead[i] = tensors[i] + h * direction
        behind[i] = tensors[i] - h * direction
        slope = (loss(ahead) - loss(behind)) / (2 * h)
        error = abs(slope - (gradient * direction).sum()) / (gradient.norm() * direction.norm())
        assert error <= 1e-9, f"{RESULTS[2 + i]}: {error:.1e}"


@every_form_with_a_backward
@few(15)
@given(case=cases(shortest=2), where=st.integers(0, 50))
def test_gradients_do_not_look_ahead(form, case, where):
    """For s < t, the gradient of y_s in the inputs of token t is exactly 0.

    Catches: causality that a forward keeps and its backward breaks.
    """
    t = 1 + where % (case["T"] - 1)
    tensors = [x.requires_grad_() for x in make(form, **case)]
    y, _ = form.operator(*tensors)
    loss = (y[:, :t] * weights_of([y])[0][:, :t]).sum()
    gradients = torch.autograd.grad(loss, tensors[:6])
    assert gradients[0][:, :t].any()
    for name, gradient in zip(NAMES, gradients):
        assert not gradient[:, t:].any(), name
