"""Future-Seed against its definition, and the promise that keeps it honest: only the prompt is seen early.

`definition` is the transform as the experiment log defines it, for one row and a head at a time, in NumPy
and fp64; with test_model's oracle it makes a second implementation of the whole idea.

Shapes: B batch rows, T tokens, C channels, H heads, N head size, L layers.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import assert_close, assert_same_state, of_row, oracle, random_model, random_tokens
from test_model import same_bits, sigmoid

from eval import borrowed
from fs import GATES, FutureSeed, prefill
from model import Config

FEW = settings(deadline=None, max_examples=20)


def config(n_layer=4, n_embd=16, head_size=8) -> Config:
    return Config(n_layer, n_embd, head_size, 50, 24, 3, 4, 5, 6)


def schedule_factor(layer, first, n_layer, schedule, low, high):
    if schedule == "none":
        return 1.0
    p = 1.0 if first >= n_layer - 1 else (layer - first) / (n_layer - 1 - first)
    p = min(max(p, 0.0), 1.0)
    return low + (high - low) * (p if schedule == "linear" else (1 - math.cos(math.pi * p)) / 2)


def definition(layer, below, x_last, n_layer, *, layer_start=6, norm=True, clip=1.0, scale=1.0,
               schedule="none", schedule_min=1.0, schedule_max=1.0, alpha=None, alpha_head=None,
               input_weight=None, input_bias=None):
    """The seed state of one row, below (H, N, N) and x_last (C,), or None. The last four are this layer's
    parameters, as far as its gate has them; alpha_head (H,).
    """
    first = max(1, layer_start)
    if layer < first:
        return None
    seeds = []
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
        seed = gate * base
        seeds.append(np.clip(seed, -clip, clip) if clip > 0 else seed)
    return np.stack(seeds)


def randomised(fs: FutureSeed, seed=0) -> FutureSeed:
    """Its gates' parameters moved off their initial values, so that each layer and head has its own."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng))
    return fs


def of_layer(fs: FutureSeed, layer: int) -> dict:
    """The parameters of one layer's gate, as `definition` takes them."""
    return {name: parameter.detach().double().numpy()[layer] for name, parameter in fs.named_parameters()}


options = st.fixed_dictionaries({
    "layer_start": st.integers(0, 5),
    "norm": st.booleans(),
    "clip": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    "scale": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    "schedule": st.sampled_from(["none", "linear", "cosine"]),
    "schedule_min": st.sampled_from([0.0, 0.25, 1.0]),
    "schedule_max": st.sampled_from([0.5, 1.0, 2.0]),
    "gate": st.sampled_from(GATES),
    "detach": st.booleans(),
})


@settings(deadline=None, max_examples=150)
@given(setting=options, alpha=st.sampled_from([-4.0, -2.0, 0.0, 3.0]), L=st.integers(1, 6),
       magnitude=st.sampled_from([0.0, 1e-12, 1e-7, 1e-6, 1e-2, 1.0, 100.0]), seed=st.integers(0, 99))
def test_transform_is_the_definition(setting, alpha, L, magnitude, seed):
    """Catches a clip before the gate, a mean over the wrong axes, a schedule off by a layer."""
    rng = torch.Generator().manual_seed(seed)
    fs = randomised(FutureSeed(config(L), alpha=alpha, **setting), seed)
    below = magnitude * torch.randn(3, 2, 8, 8, generator=rng)
    below[1] *= 10
    below[:, 1] *= 0.1    # rows and heads of different size, so that sharing a norm shows
    x_last = torch.randn(3, 16, generator=rng)
    transform = {name: value for name, value in setting.items() if name not in ("gate", "detach")}
    for layer in range(1, L):
        seeds = fs(layer, below, x_last)
        for row in range(3):
            expected = definition(layer, below[row].numpy(), x_last[row].double().numpy(), L, **transform,
                                  **of_layer(fs, layer))
            if expected is None:
                assert seeds is None
            else:
                assert seeds.dtype == torch.float32 and seeds.shape == below.shape
                assert_close(seeds[row], expected, 2e-6)


HALF = 0.5 * (1 - math.sqrt(0.5))    # (1 - cos(pi / 4)) / 2


@pytest.mark.parametrize("L, start, schedule, factors", [
    (8, 3, "none", [1, 1, 1, 1, 1]),
    (8, 3, "linear", [0.25, 0.4375, 0.625, 0.8125, 1.0]),
    (8, 3, "cosine", [0.25, 0.25 + 0.75 * HALF, 0.625, 1.0 - 0.75 * HALF, 1.0]),
    # a single seeded layer counts as the last
    (5, 4, "linear", [1.0]), (2, 1, "cosine", [1.0]), (2, 0, "linear", [1.0]), (12, 11, "cosine", [1.0]),
])
def test_schedule_runs_from_the_first_seeded_layer_to_the_last(L, start, schedule, factors):
    """Catches endpoints swapped or off by one, and 0 / 0, against numbers worked out by hand."""
    fs = FutureSeed(config(L), alpha=0.0, layer_start=start, norm=False, clip=0, schedule=schedule,
                    schedule_min=0.25, schedule_max=1.0)
    below = torch.ones(1, 2, 8, 8)
    first = max(1, start)
    assert all(fs(layer, below, torch.zeros(1, 16)) is None for layer in range(first))
    found = [fs(layer, below, torch.zeros(1, 16))[0, 0, 0, 0].item() / 0.5 for layer in range(first, L)]
    assert found == pytest.approx(factors, abs=1e-6)


def test_defaults_are_the_logs_recipe():
    """Catches a default that drifts away from the log's recipe, or from its numbers for alpha."""
    fs = FutureSeed(config(12))
    ones, x_last = torch.ones(1, 2, 8, 8), torch.zeros(1, 16)
    assert [layer for layer in range(1, 12) if fs(layer, ones, x_last) is not None] == list(range(6, 12))
    below = torch.zeros(1, 2, 8, 8, requires_grad=True)
    with torch.no_grad():
        below[..., 0, 0] = 100.0    # normalised to 8
    seed = fs(6, below, torch.zeros(1, 16))
    assert not seed.requires_grad
    assert seed[0, 0, 0, 0].item() == pytest.approx(8 * 0.1192029, abs=1e-5)
    with torch.no_grad():
        fs.alpha.fill_(2.0)
    assert fs(6, below, torch.zeros(1, 16))[0, 0, 0, 0].item() == 1.0    # clipped
    weaker = FutureSeed(config(12), alpha=-4.0)(6, below, torch.zeros(1, 16))
    assert weaker[0, 0, 0, 0].item() == pytest.approx(8 * 0.0179862, abs=1e-5)


@pytest.mark.parametrize("gate, expected", [
    ("scalar", {"alpha"}), ("head", {"alpha", "alpha_head"}), ("heads", {"alpha_head"}),
    ("input", {"alpha", "input_weight", "input_bias"}),
])
@pytest.mark.parametrize("train_alpha", [False, True])
def test_what_is_trained_and_how_gates_start(gate, expected, train_alpha):
    """Catches a frozen alpha that trains, or the reverse, an input gate that cannot learn, a gate's parameter
    that plays no part, and an input gate or heads' gates that do not start as the scalar one.
    """
    fs = FutureSeed(config(), alpha=-1.5, layer_start=1, gate=gate, train_alpha=train_alpha, clip=0)
    below, x_last = torch.randn(2, 2, 8, 8), torch.randn(2, 16)
    assert set(fs.state_dict()) == expected
    trainable = {name for name, parameter in fs.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in expected if train_alpha or name.startswith("input")}
    seed_state = fs(2, below, x_last)
    scalar = FutureSeed(config(), alpha=-1.5, layer_start=1, clip=0)(2, below, x_last)
    assert_close(seed_state, scalar * (torch.sigmoid(torch.tensor(-1.5)) if gate == "head" else 1), 1e-6)
    if trainable:
        seed_state.square().sum().backward()
        for name in trainable:
            gradient = dict(fs.named_parameters())[name].grad
            assert (gradient[2] != 0).all() and (gradient[[0, 1, 3]] == 0).all()    # its own layer's alone


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-7])
def test_an_empty_state_has_a_finite_gradient(norm, value):
    """Catches the NaN of d sqrt(x) at x = 0: one silent head would poison every parameter below it."""
    fs = FutureSeed(config(), layer_start=1, norm=norm, detach=False, train_alpha=True, gate="input")
    below = torch.full((2, 2, 8, 8), value, requires_grad=True)
    seed = fs(1, below, torch.zeros(2, 16))
    seed.sum().backward()
    assert seed.isfinite().all() and below.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in fs.parameters())


@pytest.mark.parametrize("gate", GATES)
def test_seeds_are_fp32_under_autocast(gate):
    """Catches a gate rounded to bf16: autocast takes every matrix product it meets."""
    fs = randomised(FutureSeed(config(), layer_start=1, gate=gate))
    rng = torch.Generator().manual_seed(3)
    below, x_last = torch.randn(2, 2, 8, 8, generator=rng), torch.randn(2, 16, generator=rng)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seed = fs(2, below, x_last)
    assert torch.equal(seed, fs(2, below, x_last))


@pytest.mark.parametrize("arguments, word", [
    ({"schedule": "square"}, "schedule"), ({"gate": "vector"}, "gate"), ({"schedule": None}, "schedule"),
])
def test_bad_settings(arguments, word):
    """Catches a misspelled setting that silently means something else."""
    with pytest.raises(ValueError, match=word) as caught:
        FutureSeed(config(), **arguments)
    assert "\n" not in str(caught.value)


# ---- with the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("arguments", [
    {"layer_start": 2, "schedule": "linear", "schedule_min": 0.25},
    {"layer_start": 0, "schedule": "cosine", "schedule_min": 0.5, "schedule_max": 2.0, "clip": 0.2},
    {"layer_start": 1, "norm": False, "scale": 0.5},
], ids=str)
def test_prefill_is_the_whole_definition_for_every_row(gate, arguments):
    """Catches a seed from the wrong layer or row, from padding, or transposed."""
    model = random_model(1, n_layer=4)
    fs = randomised(FutureSeed(model.config, alpha=0.5, gate=gate, **arguments))
    tokens = random_tokens(2, 3, 19)
    lengths = torch.tensor([19, 1, 8])
    with torch.no_grad():
        hidden, state = prefill(model, tokens, lengths, fs)
        plain, _ = prefill(model, tokens, lengths)
    for row, length in enumerate(lengths):
        def seed(layer, below, x_last):
            return definition(layer, below, x_last, 4, **arguments, **of_layer(fs, layer))

        expected, _, states = oracle(model, tokens[row, :length].tolist(), seed)
        assert_close(hidden[row, :length], expected, 1e-6)    # gates are computed in fp32
        assert_same_state([[part[row] for part in layer] for layer in state], states, 1e-6)
        without, _, _ = oracle(model, tokens[row, :length].tolist())
        assert_close(plain[row, :length], without, 1e-10)
        assert np.abs(expected - without).max() > 1e-3    # it does something


@FEW
@given(seed=st.integers(0, 999), T=st.integers(2, 40), data=st.data())
def test_every_layer_is_causal_given_its_seed(seed, T, data):
    """Catches a look ahead by any way but the seed: with the seeds replayed, no bit may change."""
    t = data.draw(st.integers(1, T - 1))
    model = random_model(seed % 3, n_layer=4).float()
    fs = FutureSeed(model.config, alpha=0.0, layer_start=1, gate="input")
    tokens = random_tokens(seed, 2, T)
    changed = tokens.clone()
    changed[:, t] = (changed[:, t] + 1) % 50
    seeds = {}

    def captured(layer, below, x_last):
        seeds[layer] = fs(layer, below, x_last)
        return seeds[layer]

    with torch.no_grad():
        hidden, _ = model(tokens, seed_state=captured)
        replayed, _ = model(tokens, seed_state=lambda layer, below, x_last: seeds[layer])
        other, _ = model(changed, seed_state=lambda layer, below, x_last: seeds[layer])
        seen, _ = prefill(model, changed, fs=fs)
    assert torch.equal(hidden, replayed)
    assert torch.equal(hidden[:, :t], other[:, :t])
    assert not torch.equal(hidden[:, 0], seen[:, 0])    # through its seeds, token 0 knows how the prompt ends


@pytest.mark.parametrize("layer_start", [1, 2, 3])
def test_layers_below_the_start_do_not_see_the_prompts_future(layer_start):
    """Catches a seed one layer too early, to the last bit, or one too late."""
    model = random_model(2, n_layer=4).float()
    fs = FutureSeed(model.config, layer_start=layer_start)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    tokens = random_tokens(3, 1, 21)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    with torch.no_grad():
        prefill(model, tokens, fs=fs)
        prefill(model, changed, fs=fs)
    for layer in range(4):
        alike = torch.equal(outputs[layer][:, :-1], outputs[4 + layer][:, :-1])
        assert alike == (layer < layer_start), f"layer {layer}"


@pytest.mark.parametrize("arguments", [
    {"layer_start": 1, "alpha": -1e4, "gate": gate} for gate in GATES] + [
    {"layer_start": 1, "alpha": -math.inf}, {"layer_start": 4}, {"layer_start": 9, "schedule": "cosine"},
], ids=str)
def test_a_closed_gate_or_a_start_beyond_the_last_layer_is_no_future_seed(arguments):
    """Catches a path around the gate, of which not one bit may be left, and a start that wraps around."""
    model = random_model(5, n_layer=4).float()
    tokens, lengths = random_tokens(7, 2, 20), torch.tensor([20, 9])
    hidden, state = prefill(model, tokens, lengths, FutureSeed(model.config, **arguments))
    plain, plain_state = prefill(model, tokens, lengths)
    assert torch.equal(hidden, plain) and same_bits(state, plain_state)


@torch.no_grad()
def test_seed_states_can_be_those_of_other_prompts():
    """Catches a control that is none: the prompts' own seed states, or others than the other prompts got."""
    model = random_model(8, n_layer=4).float()
    fs = randomised(FutureSeed(model.config, alpha=1.0, layer_start=1, gate="input"))
    prompts = random_tokens(20, 2, 15), torch.tensor([15, 9])
    others = random_tokens(21, 2, 11), torch.tensor([4, 11])
    hidden, state = prefill(model, *prompts, fs)
    same, same_state = prefill(model, *prompts, borrowed(model, fs, *prompts))
    assert torch.equal(hidden, same) and same_bits(state, same_state)
    controlled, controlled_state = prefill(model, *prompts, borrowed(model, fs, *others))
    assert not torch.equal(hidden[:, 0], controlled[:, 0])
    seed_states = {}
    model(others[0], lengths=others[1],
          seed_state=lambda layer, *inputs: seed_states.setdefault(layer, fs(layer, *inputs)))
    expected, expected_state = model(*prompts[:1], None, *prompts[1:], lambda layer, *_: seed_states[layer])
    assert torch.equal(controlled, expected) and same_bits(controlled_state, expected_state)


def test_gradients_under_future_seed():
    """Catches detach that is ignored (later tokens get gradients), or always on."""
    T = 20
    model = random_model(6, n_layer=4, vocab_size=T)
    tokens = torch.arange(T).unsqueeze(0)    # each token once, so its embedding's gradient is its own

    def gradient(t, **arguments):
        model.zero_grad()
        hidden, _ = prefill(model, tokens, fs=FutureSeed(model.config, alpha=0.0, layer_start=2, **arguments))
        hidden[0, t].sin().sum().backward()
        return model.emb.weight.grad.abs().sum(dim=1)

    assert (gradient(4, detach=True)[5:] == 0).all() and (gradient(4, detach=True)[:5] > 0).all()
    assert (gradient(4, detach=False) > 0).all()


def test_gradient_through_the_seeds_is_the_slope():
    """Catches a seed whose gradient is wrong or cut, under padding and checkpointing."""
    model = random_model(7, n_layer=4)
    fs = randomised(FutureSeed(model.config, layer_start=1, detach=False, clip=0, train_alpha=True)).double()
    tokens = random_tokens(8, 2, 18)
    lengths = torch.tensor([18, 7])

    def loss():
        hidden, state = prefill(model, tokens, lengths, fs)
        return hidden[0].sin().sum() + hidden[1, :7].sin().sum() + state[3].wkv.sin().sum()

    parameters = [model.blocks[0].att.key.weight, model.blocks[2].att.w0, model.emb.weight, fs.alpha]
    gradients = torch.autograd.grad(loss(), parameters)
    model.checkpoint_activations = True
    again = torch.autograd.grad(loss(), parameters)
    for parameter, gradient, checkpointed in zip(parameters, gradients, again):
        assert torch.equal(gradient, checkpointed)
        rng = torch.Generator().manual_seed(1)
        step = 1e-6 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            parameter += step
            above = loss()
            parameter -= 2 * step
            below = loss()
            parameter += step
        slope = (above - below) / 2
        assert abs(slope - (gradient * step).sum()) <= 1e-5 * abs(slope)


@FEW
@given(seed=st.integers(0, 999), T=st.integers(1, 25), data=st.data())
def test_seeded_row_is_the_row_alone(seed, T, data):
    """Catches a batch mate or padding that reaches a row through its seed, forward and backward."""
    lengths = data.draw(st.lists(st.integers(1, T), min_size=2, max_size=3))
    model = random_model(seed % 3)
    gate = data.draw(st.sampled_from(GATES[1:]))
    fs = randomised(FutureSeed(model.config, alpha=0.0, layer_start=1, detach=False, gate=gate))
    tokens = random_tokens(seed, len(lengths), T)
    hidden, state = prefill(model, tokens, torch.tensor(lengths), fs)
    loss, alone_loss = 0, 0
    for row, length in enumerate(lengths):
        alone, alone_state = prefill(model, tokens[row : row + 1, :length], fs=fs)
        assert_close(hidden[row, :length], alone[0], 1e-6)
        assert_same_state(of_row(state, row), alone_state, 1e-6)
        loss = loss + hidden[row, :length].sin().sum() + state[2].wkv[row].sin().sum()
        alone_loss = alone_loss + alone.sin().sum() + alone_state[2].wkv.sin().sum()
    parameters = [model.emb.weight, model.blocks[0].att.value.weight]
    gradients = torch.autograd.grad(loss, parameters)
    for gradient, expected in zip(gradients, torch.autograd.grad(alone_loss, parameters)):
        assert_close(gradient, expected, 1e-4)
