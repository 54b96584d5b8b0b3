"""The laws of Future-Seed: what it computes, and why it does not cheat: an answer sees no future.

With S_T^(i) the state of layer i at the end of the prompt, layer i starts the prompt from
S_0^(i) = clip(gate_i * norm(S_T^(i-1))) (`definition`, in NumPy), and the answer from S_T^(i). Hence:

    shut gate   gate = 0: every logit, hidden and state is the plain model's, bit for bit
    reach       layers below layer_start do not change; a row's seed states change no other row
    causal      given S_0^(i), layer i's output t depends on tokens 0 to t of the prompt, and on no other
    answers     logits of answer token j depend on the prompt and on answer tokens before j; seed states and
                prompt states on no answer token at all
    rows        a padded row, in any batch or alone, comes out like the row cut to its own tokens

Shapes: B batch rows, T tokens, A tokens of an answer, C channels, H heads, N head size, L layers.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close, assert_same_state, assert_slope, of_row, oracle, random_model, random_tokens
from oracle import same_bits, sigmoid

from fs import GATES, SCHEDULES, FutureSeed, answer_logits, prefill
from model import Config

FEW = settings(deadline=None, max_examples=25)
L = 4
MODELS = [random_model(seed, n_layer=L) for seed in range(3)]    # fp64, never written to


def config(n_layer=L) -> Config:
    return Config(n_layer, 16, 8, 50, 24, 3, 4, 5, 6)


def randomised(fs: FutureSeed, seed=0) -> FutureSeed:
    """fs with its parameters moved off their initial values, so that no two layers or heads share a gate."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng))
    return fs


# ---- the definition ----------------------------------------------------------------------------------------

def schedule_factor(layer, first, n_layer, schedule, low, high):
    if schedule == "none":
        return 1.0
    p = 1.0
    if first < n_layer - 1:
        p = min(max((layer - first) / (n_layer - 1 - first), 0.0), 1.0)
    if schedule == "cosine":
        p = (1 - math.cos(math.pi * p)) / 2
    return low + (high - low) * p


def definition(layer, below, x_last, n_layer, *, layer_start=6, norm=True, clip=1.0, scale=1.0,
               schedule="none", schedule_min=1.0, schedule_max=1.0, alpha=None, alpha_head=None,
               input_weight=None, input_bias=None):
    """The seed state of one row, below (H, N, N) and x_last (C,), or None. The last four are this layer's
    parameters, as far as its gate has them; alpha_head (H,).
    """
    first = max(1, layer_start)
    if layer < first:
        return None
    heads = []
    factor = scale * schedule_factor(layer, first, n_layer, schedule, schedule_min, schedule_max)
    for h, base in enumerate(np.asarray(below, dtype=np.float64)):
        if norm:
            base = base / max(1e-6, math.sqrt((base**2).mean()))
        gate = factor
        if input_weight is not None:
            drive = (x_last * input_weight).sum() / math.sqrt(len(x_last))
            gate = gate * sigmoid(alpha + drive + input_bias)
        elif alpha is not None:
            gate = gate * sigmoid(alpha)
        if alpha_head is not None:
            gate = gate * sigmoid(alpha_head[h])
        head = gate * base
        if clip > 0:
            head = np.clip(head, -clip, clip)
        heads.append(head)
    return np.stack(heads)


def of_layer(fs: FutureSeed, layer: int) -> dict:
    """The parameters of one layer's gate, as `definition` takes them."""
    return {name: parameter.detach().double().numpy()[layer] for name, parameter in fs.named_parameters()}


transforms = {
    "norm": st.booleans(),
    "clip": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    "schedule": st.sampled_from(SCHEDULES),
    "schedule_min": st.sampled_from([0.0, 0.25, 1.0]),
    "schedule_max": st.sampled_from([0.5, 1.0, 2.0]),
    "gate": st.sampled_from(GATES),
    "detach": st.booleans(),
}


@pytest.mark.filterwarnings("ignore:this FutureSeed seeds no layer")
@settings(deadline=None, max_examples=150)
@given(setting=st.fixed_dictionaries(transforms | {"layer_start": st.integers(0, 5),
                                                   "scale": st.sampled_from([0.0, 0.5, 1.0, 3.0])}),
       alpha=st.sampled_from([-4.0, -2.0, 0.0, 3.0]), n_layer=st.integers(1, 6),
       magnitude=st.sampled_from([0.0, 1e-12, 1e-7, 1e-6, 1e-2, 1.0, 100.0]), seed=st.integers(0, 99))
def test_transform_is_the_definition(setting, alpha, n_layer, magnitude, seed):
    """Catches: a clip before the gate, a mean over the wrong axes, a schedule off by a layer."""
    rng = torch.Generator().manual_seed(seed)
    fs = randomised(FutureSeed(config(n_layer), alpha=alpha, **setting), seed)
    below = magnitude * torch.randn(3, 2, 8, 8, generator=rng)
    below[1] *= 10
    below[:, 1] *= 0.1    # rows and heads of different size, so that sharing a norm shows
    x_last = torch.randn(3, 16, generator=rng)
    setting = {name: value for name, value in setting.items() if name not in ("gate", "detach")}
    for layer in range(1, n_layer):
        seed_state = fs(layer, below, x_last)
        for row in range(3):
            expected = definition(layer, below[row].numpy(), x_last[row].double().numpy(), n_layer, **setting,
                                  **of_layer(fs, layer))
            if expected is None:
                assert seed_state is None
            else:
                assert seed_state.dtype == torch.float32 and seed_state.shape == below.shape
                assert_close(seed_state[row], expected, 2e-6)


HALF = 0.5 * (1 - math.sqrt(0.5))    # (1 - cos(pi / 4)) / 2


@pytest.mark.parametrize("n_layer, start, schedule, factors", [
    (8, 3, "none", [1, 1, 1, 1, 1]),
    (8, 3, "linear", [0.25, 0.4375, 0.625, 0.8125, 1.0]),
    (8, 3, "cosine", [0.25, 0.25 + 0.75 * HALF, 0.625, 1.0 - 0.75 * HALF, 1.0]),
    # a single seeded layer counts as the last
    (5, 4, "linear", [1.0]), (2, 1, "cosine", [1.0]), (2, 0, "linear", [1.0]), (12, 11, "cosine", [1.0]),
])
def test_schedule_runs_from_the_first_seeded_layer_to_the_last(n_layer, start, schedule, factors):
    """Catches: endpoints swapped or off by one, and 0 / 0, against numbers worked out by hand."""
    fs = FutureSeed(config(n_layer), alpha=0.0, layer_start=start, norm=False, clip=0, schedule=schedule,
                    schedule_min=0.25, schedule_max=1.0)
    below, x_last, first = torch.ones(1, 2, 8, 8), torch.zeros(1, 16), max(1, start)
    assert all(fs(layer, below, x_last) is None for layer in range(first))
    found = [fs(layer, below, x_last)[0, 0, 0, 0].item() / 0.5 for layer in range(first, n_layer)]
    assert found == pytest.approx(factors, abs=1e-6)


def test_defaults_are_the_logs_recipe():
    """Catches: a default that drifts away from the log's recipe, or from its numbers for alpha."""
    fs, x_last = FutureSeed(config(12)), torch.zeros(1, 16)
    below = torch.zeros(1, 2, 8, 8, requires_grad=True)
    with torch.no_grad():
        below[..., 0, 0] = 100.0    # normalised to 8
    assert [layer for layer in range(1, 12) if fs(layer, below, x_last) is not None] == list(range(6, 12))
    seed_state = fs(6, below, x_last)
    assert not seed_state.requires_grad
    assert seed_state[0, 0, 0, 0].item() == pytest.approx(8 * 0.1192029, abs=1e-5)
    with torch.no_grad():
        fs.alpha.fill_(2.0)
    assert fs(6, below, x_last)[0, 0, 0, 0].item() == 1.0    # clipped
    weaker = FutureSeed(config(12), alpha=-4.0)(6, below, x_last)
    assert weaker[0, 0, 0, 0].item() == pytest.approx(8 * 0.0179862, abs=1e-5)


@pytest.mark.parametrize("gate, expected", [
    ("scalar", {"alpha"}), ("head", {"alpha", "alpha_head"}), ("heads", {"alpha_head"}),
    ("input", {"alpha", "input_weight", "input_bias"}),
])
@pytest.mark.parametrize("train_alpha", [False, True])
def test_what_is_trained_and_how_gates_start(gate, expected, train_alpha):
    """Catches: a frozen alpha that trains, or the reverse, an input gate that cannot learn, a parameter of a
    gate that plays no part, and an input gate or heads' gates that do not start as the scalar gate does.
    """
    fs = FutureSeed(config(), alpha=-1.5, layer_start=1, gate=gate, train_alpha=train_alpha, clip=0)
    below, x_last = torch.randn(2, 2, 8, 8), torch.randn(2, 16)
    assert set(fs.state_dict()) == expected
    trainable = {name for name, parameter in fs.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in expected if train_alpha or name.startswith("input")}
    seed_state = fs(2, below, x_last)
    at_the_start = FutureSeed(config(), alpha=-1.5, layer_start=1, clip=0)(2, below, x_last)
    if gate == "head":    # a product of two such gates
        at_the_start = at_the_start * torch.sigmoid(torch.tensor(-1.5))
    assert_close(seed_state, at_the_start, 1e-6)
    if trainable:
        seed_state.square().sum().backward()
        for name in trainable:
            gradient = dict(fs.named_parameters())[name].grad
            assert (gradient[2] != 0).all() and (gradient[[0, 1, 3]] == 0).all()    # layer 2's alone


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-7])
def test_an_empty_state_has_a_finite_gradient(norm, value):
    """Catches: the NaN of d sqrt(x) at x = 0, by which one silent head would poison every parameter below."""
    fs = FutureSeed(config(), layer_start=1, norm=norm, detach=False, train_alpha=True, gate="input")
    below = torch.full((2, 2, 8, 8), value, requires_grad=True)
    seed_state = fs(1, below, torch.zeros(2, 16))
    seed_state.sum().backward()
    assert seed_state.isfinite().all() and below.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in fs.parameters())


@pytest.mark.parametrize("gate", GATES)
def test_seed_states_and_logits_are_fp32_under_autocast(gate):
    """Catches: a gate rounded to bf16 (autocast takes every matrix product it meets), and scored logits in
    bf16, by which a question's two likeliest options tie.
    """
    model = random_model(1, n_layer=L).float()
    fs = randomised(FutureSeed(config(), layer_start=1, gate=gate))
    rng = torch.Generator().manual_seed(3)
    below, x_last = torch.randn(2, 2, 8, 8, generator=rng), torch.randn(2, 16, generator=rng)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seed_state = fs(2, below, x_last)
        logits, _ = answer_logits(model, fs, random_tokens(1, 2, 9), None, random_tokens(2, 2, 3))
    assert torch.equal(seed_state, fs(2, below, x_last))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("arguments, word", [
    ({"schedule": "square"}, "schedule"), ({"gate": "vector"}, "gate"), ({"schedule": None}, "schedule"),
    ({"alpha": math.nan}, "alpha = nan"), ({"clip": math.nan}, "clip = nan"),
    ({"schedule_min": math.nan}, "schedule_min = nan"),
])
def test_bad_settings(arguments, word):
    """Catches: a misspelled setting that silently means something else; NaN, which as a clip is no clip."""
    with pytest.raises(ValueError, match=word) as caught:
        FutureSeed(config(), **arguments)
    assert "\n" not in str(caught.value)


def test_a_prompt_without_a_token_is_refused():
    """Catches: an answer's first token predicted from padding."""
    with pytest.raises(ValueError, match="a prompt has no token"):
        answer_logits(MODELS[0], None, random_tokens(1, 2, 5), torch.tensor([5, 0]), random_tokens(2, 2, 3))


@pytest.mark.parametrize("n_layer, layer_start, told", [
    (6, 6, True), (7, 6, False), (4, 9, True), (4, 4, True), (4, 3, False), (2, 0, False), (1, 0, True),
])
def test_a_future_seed_that_seeds_no_layer_says_so(n_layer, layer_start, told):
    """Catches: the default layer_start of 6 on a small model, which seeds nothing, silently."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FutureSeed(config(n_layer), layer_start=layer_start)
    assert len(caught) == told
    if told:
        message = str(caught[0].message)
        assert f"layer_start is {layer_start}" in message and "\n" not in message
        assert caught[0].filename == __file__    # the caller's line


# ---- the laws, with the model, under drawn prompts and settings --------------------------------------------


@st.composite
def problems(draw, **fixed):
    """A model, a FutureSeed, prompts (B, T) with their lengths (B,) or None, and answers (B, A)."""
    setting = {name: draw(value) for name, value in transforms.items()}
    setting |= {"layer_start": draw(st.integers(0, L - 1)), "alpha": draw(st.sampled_from([-2.0, 0.0, 1.0]))}
    if setting["schedule_min"] == 0:    # or the first seeded layer would have a shut gate
        setting["schedule_min"] = 0.5
    model = draw(st.sampled_from(MODELS))
    fs = randomised(FutureSeed(model.config, **setting | fixed), draw(st.integers(0, 9))).double()
    B, T, A = draw(st.integers(1, 3)), draw(st.integers(1, 24)), draw(st.integers(1, 6))
    lengths = draw(st.none() | st.lists(st.integers(1, T), min_size=B, max_size=B).map(torch.tensor))
    number = draw(st.integers(0, 999))
    return model, fs, random_tokens(number, B, T), lengths, random_tokens(number + 1000, B, A)


def recorded(fs, kept: dict):
    """A hook that does what fs does and keeps the seed states by layer."""
    def hook(layer, below, x_last):
        kept[layer] = fs(layer, below, x_last)
        return kept[layer]
    return hook


def replayed(kept: dict):
    """A hook that gives seed states kept before."""
    return lambda layer, below, x_last: kept[layer]


def outputs_of(model, *arguments, **more):
    """Every block's output (B, P, C), and the state."""
    outputs = []
    handles = [block.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
               for block in model.blocks]
    _, state = model(*arguments, **more)
    for handle in handles:
        handle.remove()
    return outputs, state


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("arguments", [
    {"layer_start": 2, "schedule": "linear", "schedule_min": 0.25},
    {"layer_start": 0, "schedule": "cosine", "schedule_min": 0.5, "schedule_max": 2.0, "clip": 0.2},
    {"layer_start": 1, "norm": False, "scale": 0.5},
], ids=str)
def test_prefill_is_the_whole_definition_for_every_row(gate, arguments):
    """Catches: a seed state from the wrong layer or row, from padding, or transposed."""
    model = MODELS[1]
    fs = randomised(FutureSeed(model.config, alpha=0.5, gate=gate, **arguments))
    tokens, lengths = random_tokens(2, 3, 19), torch.tensor([19, 1, 8])
    with torch.no_grad():
        hidden, state = prefill(model, tokens, lengths, fs)
        plain, _ = prefill(model, tokens, lengths)
    for row, length in enumerate(lengths):
        def seed_state(layer, below, x_last):
            return definition(layer, below, x_last, L, **arguments, **of_layer(fs, layer))

        expected, _, states = oracle(model, tokens[row, :length].tolist(), seed_state)
        assert_close(hidden[row, :length], expected, 1e-6)    # gates are computed in fp32
        assert_same_state([[part[row] for part in layer] for layer in state], states, 1e-6)
        without, _, _ = oracle(model, tokens[row, :length].tolist())
        assert_close(plain[row, :length], without, 1e-10)
        assert np.abs(expected - without).max() > 1e-3    # it does something


@pytest.mark.filterwarnings("ignore:this FutureSeed seeds no layer")
@torch.no_grad()
@FEW
@given(problem=problems(), shut=st.sampled_from([{"alpha": -math.inf}, {"scale": 0.0}, {"layer_start": L}]))
def test_a_shut_gate_is_the_plain_model(problem, shut):
    """gate_i = 0, or no seeded layer: every logit and state is the plain model's, bit for bit.

    Catches: a path around the gate, also one that changes a single bit, and a layer_start that wraps around.
    """
    model, fs, prompt, lengths, answer = problem
    closed = FutureSeed(model.config, **{"layer_start": 1, "gate": fs.gate, "norm": fs.norm} | shut)
    logits, state = answer_logits(model, closed, prompt, lengths, answer)
    plain, plain_state = answer_logits(model, None, prompt, lengths, answer)
    assert torch.equal(logits, plain) and same_bits(state, plain_state)


@torch.no_grad()
@FEW
@given(problem=problems(), number=st.integers(0, 999), data=st.data())
def test_seed_states_reach_the_seeded_layers_of_their_own_row_alone(problem, number, data):
    """One row gets the seed states of another prompt. Layers below layer_start keep every bit, and so does
    every other row in every layer. From layer_start on the row changes.

    Catches: a seed state one layer too early or too late, or one that reaches another row.
    """
    model, fs, prompt, lengths, answer = problem
    chosen = data.draw(st.integers(0, len(prompt) - 1))
    kept, of_another = {}, {}
    outputs, state = outputs_of(model, prompt, lengths=lengths, seed_state=recorded(fs, kept), answer=answer)
    model(random_tokens(number, *prompt.shape), lengths=lengths, seed_state=recorded(fs, of_another))
    mixed = dict(kept)
    for layer in range(fs.layer_start, L):
        mixed[layer] = kept[layer].clone()
        # plus 0.1, because the other prompt may happen to be the same
        mixed[layer][chosen] = of_another[layer][chosen] + 0.1
    changed, changed_state = outputs_of(model, prompt, lengths=lengths, seed_state=replayed(mixed),
                                        answer=answer)
    others = [row for row in range(len(prompt)) if row != chosen]
    for layer in range(L):
        assert torch.equal(outputs[layer][others], changed[layer][others])
        same = torch.equal(outputs[layer][chosen], changed[layer][chosen])
        assert same == (layer < fs.layer_start), f"layer {layer}"
        for part, changed_part in zip(state[layer], changed_state[layer]):
            assert torch.equal(part[others], changed_part[others])
            assert layer >= fs.layer_start or torch.equal(part, changed_part)


@torch.no_grad()
@FEW
@given(problem=problems(), data=st.data())
def test_every_layer_is_causal_given_its_seed_state(problem, data):
    """With the seed states replayed, a changed prompt token t leaves every bit before t as it was. With seed
    states made anew, token 0 sees the change: that is the point of Future-Seed.

    Catches: a look ahead by any other way than the seed states.
    """
    model, fs, prompt, _, _ = problem
    t = data.draw(st.integers(0, prompt.shape[1] - 1))
    changed = prompt.clone()
    changed[:, t] = (changed[:, t] + 1) % 50
    kept = {}
    hidden, _ = model(prompt, seed_state=recorded(fs, kept))
    again, _ = model(prompt, seed_state=replayed(kept))
    other, _ = model(changed, seed_state=replayed(kept))
    seeing, _ = prefill(model, changed, fs=fs)
    assert torch.equal(hidden, again)
    assert torch.equal(hidden[:, :t], other[:, :t])
    assert not torch.equal(hidden[:, 0], seeing[:, 0])


@torch.no_grad()
@FEW
@given(problem=problems(), data=st.data())
def test_a_changed_answer_token_changes_nothing_before_it(problem, data):
    """A changed answer token j leaves the logits of tokens 0 to j, every seed state and the state at the
    prompt's end as they were, bit for bit; and the logits of token j + 1 change.

    Catches: an answer that reaches a seed state or the prompt's state, an answer read with a look ahead, and
    logits that are shifted by one.
    """
    model, fs, prompt, lengths, answer = problem
    j = data.draw(st.integers(0, answer.shape[1] - 1))
    changed = answer.clone()
    changed[:, j] = (changed[:, j] + 1) % 50
    kept, kept_again = {}, {}
    logits, state = answer_logits(model, recorded(fs, kept), prompt, lengths, answer)
    other, other_state = answer_logits(model, recorded(fs, kept_again), prompt, lengths, changed)
    assert torch.equal(logits[:, : j + 1], other[:, : j + 1])
    if j + 1 < answer.shape[1]:
        assert not torch.equal(logits[:, j + 1], other[:, j + 1])
    assert same_bits(state, other_state)
    assert kept.keys() == kept_again.keys() == {1, 2, 3}
    for layer, seed_state in kept.items():
        assert (seed_state is None) == (layer < fs.layer_start)
        assert seed_state is None or torch.equal(seed_state, kept_again[layer])


@FEW
@given(problem=problems())
def test_a_padded_row_is_the_row_cut_and_decoded_token_by_token(problem):
    """Logits, states and gradients of a padded row, in a batch or alone, are those of the row cut to its own
    tokens, whose answer is then read one token at a time without Future-Seed.

    Catches: another row or padding that reaches a row through its seed state, forward and backward; a padded
    row that is read wrongly when it is alone; an answer that is seeded.
    """
    model, fs, prompt, lengths, answer = problem
    B, T = prompt.shape
    fs.requires_grad_(True)
    logits, state = answer_logits(model, fs, prompt, lengths, answer)
    expected, alone = [], []
    for row in range(B):
        length = T if lengths is None else int(lengths[row])
        hidden, row_state = prefill(model, prompt[row : row + 1, :length], fs=fs)
        assert_same_state(of_row(state, row), row_state)
        rows = [model.logits(hidden[:, -1])]
        for t in range(answer.shape[1] - 1):
            hidden, row_state = model(answer[row : row + 1, t : t + 1], row_state)
            rows.append(model.logits(hidden[:, 0]))
        expected.append(torch.cat(rows))
        padded = None if lengths is None else lengths[row : row + 1]
        alone.append(answer_logits(model, fs, prompt[row : row + 1], padded, answer[row : row + 1])[0][0])
    parameters = [model.emb.weight, model.blocks[0].att.value.weight, *fs.parameters()]

    def gradients(result):
        return torch.autograd.grad(result.sin().sum(), parameters, retain_graph=True, materialize_grads=True,
                                   allow_unused=True)

    for result in (logits, torch.stack(alone)):
        assert_close(result, torch.stack(expected), 1e-10)
        for gradient, reference in zip(gradients(result), gradients(torch.stack(expected))):
            assert (gradient - reference).abs().max() <= 1e-9 * max(1, reference.abs().max())


# ---- gradients ---------------------------------------------------------------------------------------------


def test_detach_cuts_the_gradient_through_the_seed_states_and_nothing_else():
    """Catches: detach that is ignored (later tokens get gradients), or always on."""
    T = 20
    model = random_model(6, n_layer=L, vocab_size=T)
    tokens = torch.arange(T).unsqueeze(0)    # each id once, so that an embedding belongs to one token

    def gradient(t, **arguments):
        model.zero_grad()
        hidden, _ = prefill(model, tokens, fs=FutureSeed(model.config, alpha=0.0, layer_start=2, **arguments))
        hidden[0, t].sin().sum().backward()
        return model.emb.weight.grad.abs().sum(dim=1)

    assert (gradient(4, detach=True)[5:] == 0).all() and (gradient(4, detach=True)[:5] > 0).all()
    assert (gradient(4, detach=False) > 0).all()


def test_gradient_through_the_seed_states_is_the_slope():
    """Catches: a seed state whose gradient is wrong or cut, under padding and activation checkpointing."""
    model = random_model(7, n_layer=L)
    fs = randomised(FutureSeed(model.config, layer_start=1, detach=False, clip=0, train_alpha=True)).double()
    tokens, lengths = random_tokens(8, 2, 18), torch.tensor([18, 7])

    def loss():
        hidden, state = prefill(model, tokens, lengths, fs)
        return hidden[0].sin().sum() + hidden[1, :7].sin().sum() + state[3].wkv.sin().sum()

    parameters = [model.blocks[0].att.key.weight, model.blocks[2].att.w0, model.emb.weight, fs.alpha]
    assert_slope(loss, parameters)
    gradients = torch.autograd.grad(loss(), parameters)
    model.checkpoint_activations = True
    for gradient, checkpointed in zip(gradients, torch.autograd.grad(loss(), parameters)):
        assert torch.equal(gradient, checkpointed)
