"""RWKV-7 against its equations, its published initialisation, real checkpoints, and what users will do to it.

The oracle is the model as the paper and the official format describe it, one token at a time in fp64 NumPy,
and shares nothing with model.py. Most comparisons run in fp64, where rounding cannot hide a mistake.

Shapes: B batch rows, T tokens, C channels, H heads, N head size, L layers, V vocabulary entries.
"""

import io
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import Config, LayerState, RWKV7

FEW = settings(deadline=None, max_examples=20)
REVERSE = "rwkv7-reverse-L4-D32-blinkdl.pth"
TINY = "tiny-rwkv-7v0-834K-blinkdl.pth"


def random_model(seed=0, n_layer=3, n_embd=16, head_size=8, vocab_size=50, n_ffn=24, ranks=(3, 4, 5, 6)):
    """A model in fp64 with nothing left at an initial value: every parameter matters and no two sizes
    agree.
    """
    model = RWKV7(Config(n_layer, n_embd, head_size, vocab_size, n_ffn, *ranks)).double()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            if ".x_" in name:
                parameter.copy_(noise.sigmoid())
            elif ".ln" in name or name.startswith("ln_out"):
                parameter.copy_(0.3 * noise + (1 if name.endswith("weight") else 0))
            elif parameter.ndim == 2 and not name.startswith("emb"):
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            else:
                parameter.copy_(noise)
    return model


def random_tokens(seed: int, *shape: int, vocab_size=50) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- the oracle --------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, weight, bias, eps):
    """Normalise the last axis to mean 0 and variance 1."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def oracle(model: RWKV7, tokens: list[int], seed=None):
    """RWKV-7 on one row: hidden (T, C), logits (T, V), states [(time shift, S [head, value, key], channel
    shift)].
    """
    w = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    L = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    H, N = w["blocks.0.att.r_k"].shape
    x = norm(w["emb.weight"][tokens], w["blocks.0.ln0.weight"], w["blocks.0.ln0.bias"], 1e-5)
    T, C = x.shape
    values_of_block_0 = np.zeros((T, C))
    states = []
    for layer in range(L):
        p = {name.split(".", 2)[2]: value.squeeze() if "r_k" not in name and "1" not in name[-1] else value
             for name, value in w.items() if name.startswith(f"blocks.{layer}.")}
        S = np.zeros((H, N, N))
        if seed is not None and layer > 0:
            seeded = seed(layer, states[-1][1], x[-1])
            S = S if seeded is None else seeded
        before_time, before_channel = np.zeros(C), np.zeros(C)
        after = []
        for t in range(T):
            now = norm(x[t], p["ln1.weight"], p["ln1.bias"], 1e-5)
            mixed = {name: now + (before_time - now) * p[f"att.x_{name}"] for name in "rwkvag"}
            before_time = now
            r = p["att.receptance.weight"] @ mixed["r"]
            k = p["att.key.weight"] @ mixed["k"]
            v = p["att.value.weight"] @ mixed["v"]
            decay = p["att.w0"] + np.tanh(mixed["w"] @ p["att.w1"]) @ p["att.w2"]
            decay = np.exp(-np.exp(-0.5) * sigmoid(decay))
            rate = sigmoid(p["att.a0"] + mixed["a"] @ p["att.a1"] @ p["att.a2"])
            gate = sigmoid(mixed["g"] @ p["att.g1"]) @ p["att.g2"]
            if layer == 0:
                values_of_block_0[t] = v
            else:
                share = sigmoid(p["att.v0"] + mixed["v"] @ p["att.v1"] @ p["att.v2"])
                v = v + (values_of_block_0[t] - v) * share
            removal = k * p["att.k_k"]
            k = k * (1 + (rate - 1) * p["att.k_a"])
            read = np.zeros(C)
            for h in range(H):
                c = slice(h * N, (h + 1) * N)
                kk = removal[c] / max(np.sqrt((removal[c] ** 2).sum()), 1e-12)
                transition = np.diag(decay[c]) - np.outer(kk, kk * rate[c])
                S[h] = S[h] @ transition + np.outer(v[c], k[c])
                y = norm(S[h] @ r[c], p["att.ln_x.weight"][c], p["att.ln_x.bias"][c], 64e-5)
                read[c] = y + (r[c] * k[c] * p["att.r_k"][h]).sum() * v[c]
            residual = x[t] + p["att.output.weight"] @ (read * gate)
            now = norm(residual, p["ln2.weight"], p["ln2.bias"], 1e-5)
            key = p["ffn.key.weight"] @ (now + (before_channel - now) * p["ffn.x_k"])
            before_channel = now
            after.append(residual + p["ffn.value.weight"] @ np.maximum(key, 0) ** 2)
        x = np.stack(after)
        states.append((before_time, S, before_channel))
    hidden = norm(x, w["ln_out.weight"], w["ln_out.bias"], 1e-5)
    return hidden, hidden @ w["head.weight"].T, states


def assert_close(value, reference, tolerance, what=""):
    """Relative L2; a NaN fails too."""
    error = relative_error(torch.as_tensor(value), torch.as_tensor(reference))
    assert error <= tolerance, f"{what}: relative error {error:.2e}"    # false for NaN


def assert_same_state(states, references, tolerance=1e-10):
    assert len(states) == len(references)
    for layer, (state, reference) in enumerate(zip(states, references)):
        for name, value, expected in zip(LayerState._fields, state, reference):
            assert_close(value, expected, tolerance, f"layer {layer}, {name}")


@pytest.mark.parametrize("L, C, N, T", [
    (1, 8, 8, 5), (2, 32, 16, 37), (4, 24, 8, 20), (3, 16, 8, 1), (2, 16, 8, 4), (2, 64, 64, 35),
])
def test_model_is_the_published_equations(L, C, N, T):
    """Catches any wrong sign, swapped adapter, wrong eps, forgotten v_first, misplaced gate."""
    model = random_model(L, n_layer=L, n_embd=C, head_size=N)
    tokens = random_tokens(C, 2, T)
    hidden, state = model(tokens)
    exact = [oracle(model, row.tolist()) for row in tokens]
    for row, (expected, logits, states) in enumerate(exact):
        assert_close(hidden[row], expected, 1e-10, "hidden")
        assert_close(model.head(hidden[row]), logits, 1e-10, "logits")
        assert_same_state([[part[row] for part in layer] for layer in state], states)
    single, state = model.float()(tokens)
    assert single.dtype == torch.float32 and state[0].wkv.dtype == torch.float32
    assert_close(single, np.stack([expected for expected, _, _ in exact]), 1e-5, "fp32 hidden")


def test_tiny_removal_keys_are_normalised_all_the_same():
    """Catches a larger eps in the normalisation of removal keys: 1e-5 looks harmless until keys are small."""
    model = random_model(1)
    with torch.no_grad():
        for block in model.blocks:
            block.att.k_k *= 1e-9
    tokens = random_tokens(1, 1, 12)
    assert_close(model(tokens)[0][0], oracle(model, tokens[0].tolist())[0], 1e-10)


def test_zero_keys_and_values_are_finite_with_finite_gradients():
    """Catches 0/0 in the normalisation of a key that is exactly zero, forward and backward."""
    model = random_model(2)
    with torch.no_grad():
        model.blocks[1].att.key.weight.zero_()
        model.blocks[1].att.value.weight.zero_()
    hidden, _ = model(random_tokens(2, 1, 9))
    hidden.square().sum().backward()
    assert hidden.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_gradient_is_the_slope_of_the_loss():
    """Catches a detach or a wrong backward anywhere between a parameter and the logits."""
    model = random_model(3, n_layer=2)
    tokens = random_tokens(3, 2, 18)
    lengths = torch.tensor([18, 13])
    own = torch.arange(18) < lengths.unsqueeze(1)

    def loss():
        hidden, state = model(tokens, lengths=lengths)
        states = sum(part.sin().sum() for layer in state for part in layer)
        return torch.tanh(model.head(hidden))[own].sum() + states

    loss().backward()
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        direction = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        with torch.no_grad():
            step = 1e-6 * direction
            parameter += step
            above = loss()
            parameter -= 2 * step
            below = loss()
            parameter += step
        slope = (above - below) / 2e-6
        assert abs(slope - (parameter.grad * direction).sum()) <= 1e-5 * max(1, abs(slope)), name


# ---- causality ---------------------------------------------------------------------------------------------


@FEW
@given(seed=st.integers(0, 999), T=st.integers(2, 70), data=st.data())
def test_later_token_leaves_earlier_outputs_alone(seed, T, data):
    """Catches any look ahead to the last bit, in fp32: a gather off by one, an unmasked score."""
    t = data.draw(st.integers(1, T - 1))
    model = random_model(seed % 7).float()
    tokens = random_tokens(seed, 2, T)
    changed = tokens.clone()
    changed[:, t] = (changed[:, t] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("T, t", [(3, 1), (40, 0), (40, 17), (40, 31), (70, 33)])
def test_no_gradient_from_an_output_to_a_later_token(T, t):
    """Catches a backward that leaks what the forward hides: d out_t / d embedding_s is 0 for s > t."""
    model = random_model(4, vocab_size=T)
    hidden, _ = model(torch.arange(T).unsqueeze(0))    # each token once: its embedding's gradient is its own
    hidden[0, t].sin().sum().backward()
    gradient = model.emb.weight.grad.abs().sum(dim=1)
    assert (gradient[t + 1 :] == 0).all()
    assert (gradient[: t + 1] > 0).all()


# ---- padding, splitting, state -----------------------------------------------------------------------------


@FEW
@given(seed=st.integers(0, 999), T=st.integers(1, 40), data=st.data())
def test_padded_row_is_the_row_alone(seed, T, data):
    """Catches padding in a state, an output or a gradient: an unmasked tensor, a misplaced shift."""
    lengths = data.draw(st.lists(st.integers(1, T), min_size=1, max_size=3))
    model = random_model(seed % 5)
    tokens = random_tokens(seed, len(lengths), T)
    _, start = model(random_tokens(seed + 1, len(lengths), 3))    # any earlier state
    start = [LayerState(*(part.detach() for part in layer)) for layer in start]
    hidden, state = model(tokens, start, torch.tensor(lengths))
    loss = 0
    alone_loss = 0
    for row, length in enumerate(lengths):
        row_start = [LayerState(*(part[row : row + 1] for part in layer)) for layer in start]
        alone, alone_state = model(tokens[row : row + 1, :length], row_start)
        assert_close(hidden[row, :length], alone[0], 1e-10, f"row {row}")
        assert_same_state([[part[row] for part in layer] for layer in state],
                          [[part[0] for part in layer] for layer in alone_state])
        alone_loss = alone_loss + alone.sin().sum()
        alone_loss = alone_loss + sum(part.sin().sum() for layer in alone_state for part in layer)
        loss = loss + hidden[row, :length].sin().sum()
        loss = loss + sum(part[row].sin().sum() for layer in state for part in layer)
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, used, materialize_grads=True)
    expected = torch.autograd.grad(alone_loss, used, materialize_grads=True)
    for gradient, reference in zip(gradients, expected):
        assert (gradient - reference).abs().max() <= 1e-9 * max(1, reference.abs().max())


def test_padding_content_is_never_seen():
    """Catches a bit that depends on what the padding is: same shapes, so bitwise."""
    model = random_model(5).float()
    tokens = random_tokens(5, 3, 33)
    lengths = torch.tensor([33, 7, 20])
    other = tokens.clone()
    for row, length in enumerate(lengths):
        other[row, length:] = (other[row, length:] + 1) % 50
    (one, one_state), (two, two_state) = model(tokens, lengths=lengths), model(other, lengths=lengths)
    for row, length in enumerate(lengths):
        assert torch.equal(one[row, :length], two[row, :length])
    for layer_one, layer_two in zip(one_state, two_state):
        assert all(torch.equal(part_one, part_two) for part_one, part_two in zip(layer_one, layer_two))


def test_empty_row_passes_its_state_through():
    """Catches a row of length 0 (an ended answer) that disturbs its state, or its neighbour."""
    model = random_model(6)
    _, start = model(random_tokens(6, 2, 5))
    tokens = random_tokens(7, 2, 19)
    _, state = model(tokens, start, torch.tensor([0, 19]))
    _, alone = model(tokens[1:], [LayerState(*(part[1:] for part in layer)) for layer in start])
    for layer in range(3):
        for passed, given_state in zip(state[layer], start[layer]):
            assert torch.equal(passed[0], given_state[0])
    assert_same_state([[part[1:] for part in layer] for layer in state], alone)


@FEW
@given(seed=st.integers(0, 999), T=st.integers(2, 50), data=st.data())
def test_splitting_anywhere_changes_nothing(seed, T, data):
    """Catches a part of the state that is not carried over, or carried without its gradient."""
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1), min_size=1, max_size=3)))
    model = random_model(seed % 5)
    tokens = random_tokens(seed, 2, T)
    whole, whole_state = model(tokens)
    pieces = []
    state = None
    for first, last in zip([0, *cuts], [*cuts, T]):
        hidden, state = model(tokens[:, first:last], state)
        pieces.append(hidden)
    parts = torch.cat(pieces, dim=1)
    assert_close(parts, whole, 1e-10)
    assert_same_state(state, whole_state)
    gradient, = torch.autograd.grad(parts.sin().sum(), model.emb.weight)
    expected, = torch.autograd.grad(whole.sin().sum(), model.emb.weight)
    assert_close(gradient, expected, 1e-9, "gradient")


def test_prompt_then_answer_is_one_pass_in_a_padded_batch():
    """Catches an answer that does not start where its own prompt ended."""
    model = random_model(8)
    prompts = random_tokens(8, 3, 23)
    answers = random_tokens(9, 3, 6)
    prompt_lengths, answer_lengths = torch.tensor([23, 1, 12]), torch.tensor([2, 6, 4])
    _, state = model(prompts, lengths=prompt_lengths)
    hidden, _ = model(answers, state, answer_lengths)
    for row in range(3):
        prompt, answer = prompts[row, : prompt_lengths[row]], answers[row, : answer_lengths[row]]
        whole, _ = model(torch.cat([prompt, answer]).unsqueeze(0))
        assert_close(hidden[row, : len(answer)], whole[0, len(prompt) :], 1e-10)


@FEW
@given(seed=st.integers(0, 999), T=st.integers(1, 40), A=st.integers(1, 20), data=st.data())
def test_answers_in_the_same_pass_are_a_second_call(seed, T, A, data):
    """Catches an answer that is read from anything but its own prompt's end, or without its gradient."""
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, T), min_size=1, max_size=3)))
    B = len(lengths)
    answer_lengths = torch.tensor(data.draw(st.lists(st.integers(0, A), min_size=B, max_size=B)))
    model, tokens, answers = random_model(seed % 5), random_tokens(seed, B, T), random_tokens(seed + 1, B, A)
    start = model(random_tokens(seed + 2, B, 3))[1] if data.draw(st.booleans()) else None

    def hook(layer, below, x_last):
        return 0.5 * below * x_last.sum().tanh()

    hook = hook if data.draw(st.booleans()) else None
    prompt, state = model(tokens, start, lengths, seed=hook)
    after, _ = model(answers, state, answer_lengths)
    expected = torch.cat([prompt, after], dim=1)
    hidden, same_state = model(tokens, start, lengths, seed=hook, answer=(answers, answer_lengths))
    own = torch.cat([torch.arange(T) < lengths.view(B, 1), torch.arange(A) < answer_lengths.view(B, 1)], 1)
    assert_close(hidden[own], expected[own], 1e-10)
    assert_same_state(same_state, state)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(hidden[own].sin().sum(), parameters, retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(expected[own].sin().sum(), parameters, allow_unused=True)
    for gradient, truth in zip(gradients, expected):
        assert (gradient is None) == (truth is None)
        if truth is not None and truth.abs().max() > 1e-9:
            assert_close(gradient, truth, 1e-7, "gradient")


def test_a_prompt_knows_nothing_of_the_answer_read_with_it():
    """Catches a leak from an answer, or from its later tokens, bit for bit."""
    model = random_model(10).float()
    tokens, lengths = random_tokens(10, 3, 21), torch.tensor([21, 1, 9])
    answers, answer_lengths = random_tokens(11, 3, 7), torch.tensor([7, 7, 7])
    other = torch.where(torch.arange(7) < 4, answers, random_tokens(12, 3, 7))
    hook = lambda layer, below, x_last: below / 2    # noqa: E731
    (hidden, state), (changed, changed_state) = (
        model(tokens, lengths=lengths, seed=hook, answer=(given, answer_lengths))
        for given in (answers, other))
    assert torch.equal(hidden[:, : 21 + 4], changed[:, : 21 + 4])
    assert not torch.equal(hidden[:, 21 + 4 :], changed[:, 21 + 4 :])
    for layer, same in zip(state, changed_state):
        assert all(torch.equal(part, other_part) for part, other_part in zip(layer, same))


def test_states_given_and_returned_are_not_written_to():
    """Catches an in-place update: two answers decoded from one prompt state must not see one another."""
    model = random_model(9).float()
    with torch.no_grad():
        _, state = model(random_tokens(9, 2, 8))
        copy = [LayerState(*(part.clone() for part in layer)) for layer in state]
        first, _ = model(random_tokens(10, 2, 20), state, torch.tensor([20, 3]))
        model(random_tokens(11, 2, 1), state)
        again, _ = model(random_tokens(10, 2, 20), state, torch.tensor([20, 3]))
    assert all(torch.equal(a, b) for one, two in zip(state, copy) for a, b in zip(one, two))
    assert torch.equal(first, again)


@pytest.mark.parametrize("shape", [(5,), (2, 0), (1, 2, 3)])
def test_tokens_of_a_wrong_shape(shape):
    """Catches a traceback from deep inside for an empty prompt or a forgotten batch axis."""
    with pytest.raises(ValueError, match="tokens must be"):
        random_model()(torch.zeros(shape, dtype=torch.int64))


# ---- the seed hook -----------------------------------------------------------------------------------------


def test_seed_hook_is_asked_with_what_it_was_promised():
    """Catches a hook that gets another layer's state or input, or the input at a padding position."""
    model = random_model(10)
    tokens = random_tokens(12, 2, 15)
    lengths = torch.tensor([15, 6])
    inputs, asked = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    def seed(layer, below, x_last):
        asked.append((layer, below, x_last))

    hidden, state = model(tokens, lengths=lengths, seed=seed)
    assert [layer for layer, _, _ in asked] == [1, 2]
    for layer, below, x_last in asked:
        assert torch.equal(below, state[layer - 1].wkv)
        assert torch.equal(x_last, inputs[layer][[0, 1], lengths - 1])
    assert torch.equal(hidden, model(tokens, lengths=lengths)[0])    # None: as without a hook


def test_seed_takes_the_place_of_the_layers_state():
    """Catches a seed that is added to the state, ignored, or that also resets the token shifts."""
    model = random_model(11)
    tokens = random_tokens(13, 2, 9)
    _, start = model(random_tokens(14, 2, 4))
    chosen = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seeded, _ = model(tokens, start, seed=lambda layer, below, x_last: chosen if layer == 2 else None)
    start[2] = start[2]._replace(wkv=chosen)
    expected, _ = model(tokens, start)
    assert torch.equal(seeded, expected)


# ---- activation checkpointing ------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["none", "detached", "attached"])
def test_activation_checkpointing_changes_nothing_but_memory(hook):
    """Catches a recomputation from other inputs (seed, padding), and a switch that does nothing."""
    def seed(layer, below, x_last):
        below = below.detach() if hook == "detached" else below
        return None if hook == "none" else 0.1 * below * x_last.sum(dim=1).tanh().view(-1, 1, 1, 1)

    tokens = random_tokens(15, 2, 24)
    lengths = torch.tensor([24, 11])
    results = []
    for checkpointed in (False, True):
        model = random_model(12).float()
        model.checkpoint_activations = checkpointed
        calls = []
        model.blocks[1].att.register_forward_hook(lambda module, args, output: calls.append(1))
        hidden, state = model(tokens, lengths=lengths, seed=seed)
        (hidden.sin().sum() + sum(layer.wkv.sin().sum() for layer in state)).backward()
        results.append((hidden, state, {name: p.grad for name, p in model.named_parameters()}))
        assert len(calls) == (2 if checkpointed else 1)
        with torch.no_grad():
            assert torch.equal(model(tokens, lengths=lengths, seed=seed)[0], hidden)
    (one, one_state, one_grads), (two, two_state, two_grads) = results
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for x, y in zip(one_state, two_state) for a, b in zip(x, y))
    assert all(torch.equal(g, two_grads[name]) for name, g in one_grads.items() if g is not None)
    assert one_grads["blocks.1.att.w1"].abs().max() > 0


def test_bf16_autocast_keeps_states_in_fp32():
    """Catches states rounded to bf16 between segments, and a model that fails under autocast."""
    model = random_model(13, n_embd=32, head_size=16).float()
    tokens = random_tokens(16, 2, 40)
    lengths = torch.tensor([40, 17])
    exact, exact_state = model(tokens, lengths=lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, state = model(tokens, lengths=lengths)
        more, _ = model(tokens[:, :3], state)
    assert all(layer.wkv.dtype == torch.float32 for layer in state)
    assert_close(hidden[0], exact[0], 0.1)
    assert_close(state[0].wkv, exact_state[0].wkv, 0.02)
    assert more.isfinite().all()
    more.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad and p.grad is not None)


# ---- the published initialisation and sizes ----------------------------------------------------------------


def test_the_01b_model_has_the_published_size():
    """Catches a missing or superfluous tensor, or a rank rule that is off."""
    with torch.device("meta"):
        model = RWKV7(Config.published())
    assert len(model.state_dict()) == 402
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 191_084_544
    assert Config.published() == Config(12, 768, 64, 65536, 3072, 64, 64, 32, 128)
    assert Config.published(24, 2048).n_ffn == 8192


@pytest.mark.parametrize("C, ranks", [
    (64, (32, 32, 32, 32)), (768, (64, 64, 32, 128)), (1024, (64, 64, 64, 160)), (2048, (128, 128, 64, 224)),
    (2560, (128, 128, 96, 256)),
])
def test_ranks_follow_the_official_rule(C, ranks):
    """Catches a rounding other than the official code's; the table is its formula, evaluated."""
    config = Config.published(2, C)
    assert (config.rank_w, config.rank_a, config.rank_v, config.rank_g) == ranks


def test_initialisation_is_the_published_one():
    """Catches a wrong constant, exponent, gain or zero in the initialisation, each against its formula."""
    L, C, N, V = 3, 32, 16, 100
    model = RWKV7.init(Config.published(L, C, N, V), seed=1)
    w = {name: tensor.squeeze().double().numpy() for name, tensor in model.state_dict().items()}
    n = np.arange(C)
    linear = n / (C - 1) - 0.5
    wave = (n % N - (N - 1) / 2) / ((N - 1) / 2)
    wave = wave * np.abs(wave)
    seen = set()

    def is_close(name, expected):
        seen.add(name)
        expected = np.broadcast_to(expected, w[name].shape)
        np.testing.assert_allclose(w[name], expected, rtol=2e-6, atol=2e-6, err_msg=name)

    def is_orthogonal(name, gain):
        seen.add(name)
        matrix = w[name] if w[name].shape[0] <= w[name].shape[1] else w[name].T
        expected = gain**2 * np.eye(len(matrix))
        np.testing.assert_allclose(matrix @ matrix.T, expected, atol=1e-5 * gain**2, err_msg=name)

    for layer in range(L):
        block = f"blocks.{layer}."
        to_one, to_zero = layer / (L - 1), 1 - layer / L
        for mix, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            is_close(f"{block}att.x_{mix}", 1 - (n / C) ** (power * to_zero))
        is_close(block + "ffn.x_k", 1 - (n / C) ** (to_zero**4))
        is_close(block + "att.w0", -6 + 6 * (n / (C - 1)) ** (1 + to_one**0.3) + 0.5 + 2.5 * wave)
        is_close(block + "att.a0", -0.19 + 0.3 * wave + 0.4 * linear)
        is_close(block + "att.v0", 0.73 - 0.4 * linear)
        is_close(block + "att.k_k", 0.71 - 0.1 * linear)
        is_close(block + "att.k_a", 1.02)
        is_close(block + "att.r_k", -0.04)
        for adapter in "wavg":
            is_close(f"{block}att.{adapter}1", 0)
            is_orthogonal(f"{block}att.{adapter}2", 0.1)    # rank 32 = C here; rank > C below
        for name, gain in {"att.receptance": 1, "att.key": 0.1, "att.value": 1, "ffn.key": 1}.items():
            is_orthogonal(f"{block}{name}.weight", gain)
        for name in ("att.output", "ffn.value"):
            is_close(f"{block}{name}.weight", 0)
        for name in ["ln0"] * (layer == 0) + ["ln1", "ln2"]:
            is_close(f"{block}{name}.weight", 1)
            is_close(f"{block}{name}.bias", 0)
        is_close(block + "att.ln_x.weight", ((1 + layer) / L) ** 0.7)
        is_close(block + "att.ln_x.bias", 0)
    is_close("ln_out.weight", 1)
    is_close("ln_out.bias", 0)
    is_orthogonal("head.weight", 0.5 * math.sqrt(V / C))
    embedding = w["emb.weight"]
    assert np.abs(embedding).max() <= 1e-4 and abs(embedding.std() - 1e-4 / math.sqrt(3)) < 2e-6    # uniform
    assert seen | {"emb.weight"} == set(w)


def test_a_wide_adapter_starts_larger():
    """Catches a gain without the official sqrt(rank / C), which shows where the rank exceeds C."""
    model = RWKV7.init(Config.published(2, 16, 8, 10))    # ranks 32 > C; V < C, so the head's gain is 0.5
    for second in (model.blocks[1].att.w2, model.blocks[0].att.g2):
        torch.testing.assert_close(second.mT @ second, 0.1**2 * (32 / 16) * torch.eye(16))
    torch.testing.assert_close(model.head.weight @ model.head.weight.mT, 0.25 * torch.eye(10))


def test_initialisation_draws_from_its_seed_alone():
    """Catches a parameter left to torch's global generator (runs would differ), or an unused seed."""
    config = Config.published(2, 32, 16, 40)
    torch.manual_seed(1)
    one = RWKV7.init(config, 7).state_dict()
    torch.manual_seed(2)
    two = RWKV7.init(config, 7).state_dict()
    other = RWKV7.init(config, 8).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["emb.weight"], other["emb.weight"])
    assert not torch.equal(one["blocks.1.att.w2"], other["blocks.1.att.w2"])


@pytest.mark.parametrize("L", [1, 2])
def test_initialised_model_trains_and_the_unused_adapter_does_not(L):
    """Catches a one-layer model that divides by zero, and training block 0's idle adapter."""
    model = RWKV7.init(Config.published(L, 32, 16, 40))
    loss = torch.nn.functional.cross_entropy(model.head(model(random_tokens(1, 2, 9, vocab_size=40))[0]).mT,
                                             random_tokens(2, 2, 9, vocab_size=40))
    assert abs(loss.item() - math.log(40)) < 1
    loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    assert model.blocks[-1].ffn.value.weight.grad.abs().max() > 0


# ---- checkpoints -------------------------------------------------------------------------------------------


def tiny_weights(n_layer=2) -> dict[str, torch.Tensor]:
    model = random_model(14, n_layer, n_embd=8, head_size=4, vocab_size=11, n_ffn=10, ranks=(1, 2, 3, 4))
    return {name: tensor.clone() for name, tensor in model.float().state_dict().items()}


def saved(path: Path, content, **options) -> Path:
    torch.save(content, path, **options)
    return path


def load_error(path: Path) -> str:
    """The message of the ValueError that loading must raise: one line that names the file."""
    with pytest.raises(ValueError) as caught:
        RWKV7.load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    assert len(message) < 600
    return message


def test_real_checkpoint_gives_the_shipped_logits(shared):
    """Catches anything in the model or the reader: the numbers are another program's (rwkv.cpp)."""
    model = RWKV7.load(shared / "weights" / TINY)
    expected = torch.from_numpy(np.fromfile(shared / "weights" / "expected-logits-7v0-834K.bin", dtype="<f4"))
    hidden, _ = model(torch.tensor([list(b'"in')]))
    assert (model.head(hidden[0, -1]) - expected).abs().max() <= 1e-5
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@torch.no_grad()
def test_real_checkpoint_reverses_digits(shared):
    """Catches a model with plausible numbers that cannot do what it was trained for."""
    vocabulary = "0123456789,#"
    model = RWKV7.load(shared / "weights" / REVERSE)
    assert model.config == Config(4, 32, 16, 12, 128, 8, 8, 8, 8)
    numbers = ["7", "42", "90210", "1234567890123", "31415926535897932384626433832795"]
    numbers.append("27182818284590452353602874713526624977572470936999")
    lengths = torch.tensor([len(number) + 1 for number in numbers])
    tokens = torch.full((len(numbers), int(lengths.max())), 11)
    for row, number in enumerate(numbers):
        tokens[row, : len(number) + 1] = torch.tensor([vocabulary.index(c) for c in number + ","])
    hidden, state = model(tokens, lengths=lengths)
    token = model.head(hidden[torch.arange(len(numbers)), lengths - 1]).argmax(dim=-1, keepdim=True)
    decoded = token
    for _ in range(int(lengths.max()) - 1):
        hidden, state = model(token, state)
        token = model.head(hidden[:, -1]).argmax(dim=-1, keepdim=True)
        decoded = torch.cat([decoded, token], dim=1)
    texts = ["".join(vocabulary[i] for i in row)[: int(length)] for row, length in zip(decoded, lengths)]
    assert texts == [number[::-1] + "#" for number in numbers]


def test_save_and_load_give_the_same_bits(tmp_path):
    """Catches a parameter that is rounded, renamed, lost or not trainable after a round trip."""
    model = random_model(15).float()
    model.save(tmp_path / "new folder" / "model.pth")
    again = RWKV7.load(tmp_path / "new folder" / "model.pth")
    assert again.config == model.config
    one, two = model.state_dict(), again.state_dict()
    assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in again.parameters()]
    raw = torch.load(tmp_path / "new folder" / "model.pth", weights_only=True)
    assert all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in raw.values())
    tokens = random_tokens(1, 1, 9)
    assert torch.equal(model(tokens)[0], again(tokens)[0])


@pytest.mark.parametrize("n_layer", [1, 2])
def test_official_variants_load_alike(tmp_path, n_layer):
    """Catches a reader that needs key order, fp32, torch's zip format, or block 0's idle adapter."""
    weights = tiny_weights(n_layer)
    tokens = random_tokens(1, 1, 9, vocab_size=11)
    expected, _ = RWKV7.load(saved(tmp_path / "a.pth", weights))(tokens)
    reordered = dict(reversed(weights.items()))
    idle = [f"blocks.0.att.v{i}" for i in "012"]
    scrambled = {name: torch.full_like(t, math.nan) if name in idle else t for name, t in weights.items()}
    absent = {name: t for name, t in weights.items() if name not in idle}
    for variant in (reordered, scrambled, absent):
        assert torch.equal(RWKV7.load(saved(tmp_path / "b.pth", variant))(tokens)[0], expected)
    legacy = saved(tmp_path / "c.pth", weights, _use_new_zipfile_serialization=False)
    assert torch.equal(RWKV7.load(legacy)(tokens)[0], expected)
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    loaded = RWKV7.load(saved(tmp_path / "d.pth", half)).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in half.items())
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())


def test_file_saved_from_a_gpu_loads_without_one(tmp_path):
    """Catches a forgotten map_location, by a file in which the name of the device is patched."""
    source = saved(tmp_path / "cpu.pth", tiny_weights())
    target = tmp_path / "cuda.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(name, content)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(target, weights_only=True)
    one, two = RWKV7.load(source).state_dict(), RWKV7.load(target).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_every_missing_misshapen_or_unknown_tensor_is_named(tmp_path):
    """Catches a checkpoint of another model, or half of one, that loads silently or ends in a traceback."""
    weights = tiny_weights()
    in_any_block = [name for name in weights if not name.startswith("blocks.1.") or ".att.v" in name]
    for name in in_any_block:
        if not name.startswith("blocks.0.att.v") or name.endswith("weight"):    # v0, v1, v2 may be absent
            missing = {other: tensor for other, tensor in weights.items() if other != name}
            assert name in load_error(saved(tmp_path / "missing.pth", missing))
        longer = weights | {name: torch.cat([weights[name], weights[name]])}
        load_error(saved(tmp_path / "longer.pth", longer))
    for name in ("emb.weight", "blocks.0.att.r_k", "blocks.0.ffn.key.weight", "blocks.1.att.v1"):
        load_error(saved(tmp_path / "empty.pth", weights | {name: torch.zeros(0)}))
        load_error(saved(tmp_path / "deep.pth", weights | {name: torch.zeros(3, 3, 3, 3)}))
    for name in ("blocks.1.att.time_decay", "blocks.0.ffn.receptance.weight", "epoch"):
        assert name in load_error(saved(tmp_path / "unknown.pth", weights | {name: torch.zeros(2)}))
    hole = weights | {"blocks.3.ln1.weight": torch.ones(8)}
    assert "blocks.2." in load_error(saved(tmp_path / "hole.pth", hole))


@pytest.mark.parametrize("shape", [(1, 24), (2, 12), (3, 16), (1, 0)])
def test_heads_that_do_not_make_up_the_width(tmp_path, shape):
    """Catches sizes that agree by rounding down (32 // 24 = 1 head) and fail at the first token."""
    weights = random_model(1, n_layer=1, n_embd=32, head_size=16).float().state_dict()
    load_error(saved(tmp_path / "heads.pth", weights | {"blocks.0.att.r_k": torch.zeros(shape)}))


@pytest.mark.parametrize("content", [
    {}, [], [torch.zeros(2)], torch.zeros(2), None, {"a": 1}, {"a": torch.zeros(2)}, {1: torch.zeros(2)},
    "text", {"model": {"emb.weight": torch.zeros(2, 2)}}, {"emb.weight": torch.zeros(2)},
], ids=repr)
def test_file_that_is_not_a_state_dict(tmp_path, content):
    """Catches a traceback for a file that torch reads but that is no checkpoint."""
    load_error(saved(tmp_path / "other.pth", content))


@pytest.mark.parametrize("content", [
    b"", b"\0", b"hello, I am a text file\n", b"PK\x03\x04", b"\x80\x02", b"version https://git-lfs",
])
def test_file_that_is_not_from_torch(tmp_path, content):
    """Catches a traceback for an empty file, a text file, a page that says 404, a Git LFS pointer."""
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    load_error(path)


@pytest.mark.parametrize("path", ["none.pth", "."])
def test_no_such_file(tmp_path, path):
    """Catches a message without the file's name, or a folder taken for a file."""
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        RWKV7.load(tmp_path / path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_malicious_checkpoint_executes_nothing(tmp_path, write):
    """Catches torch.load without weights_only=True: a downloaded checkpoint would run any code."""
    trap = tmp_path / "trap"
    write({"emb.weight": Malicious(trap)}, tmp_path / "bad.pth")
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists()    # it does work
    trap.unlink()
    load_error(tmp_path / "bad.pth")
    assert not trap.exists()


def file_bytes() -> bytes:
    file = io.BytesIO()
    torch.save(tiny_weights(1), file)
    return file.getvalue()


WHOLE = file_bytes()
PLACES = st.integers(0, 4000) | st.integers(0, len(WHOLE) - 1)    # the pickle, or anywhere


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, len(WHOLE) - 1))
def test_truncated_checkpoint(tmp_path, length):
    """Catches a download cut short that ends in a traceback, or loads."""
    path = tmp_path / "cut.pth"
    path.write_bytes(WHOLE[:length])
    load_error(path)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=4))
def test_corrupted_checkpoint(tmp_path, changes):
    """Catches any way out but two: a model of the right sizes, or one line that names the file."""
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path / "corrupt.pth"
    path.write_bytes(content)
    try:
        model = RWKV7.load(path)
    except ValueError:
        load_error(path)
    else:
        assert {name: t.shape for name, t in model.state_dict().items()} == {
            name: t.shape for name, t in tiny_weights(1).items()}


def test_saved_file_loads_in_the_rwkv_package(tmp_path, monkeypatch):
    """Catches a file that only this project can read. Needs `pip install rwkv`; skipped without it."""
    monkeypatch.setenv("RWKV_V7_ON", "1")
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    rwkv_model = pytest.importorskip("rwkv.model")
    model = random_model(16, n_embd=128, head_size=64).float()
    model.save(tmp_path / "ours.pth")
    theirs = rwkv_model.RWKV(model=str(tmp_path / "ours"), strategy="cpu fp32")
    tokens = random_tokens(1, 1, 30)
    logits, _ = theirs.forward(tokens[0].tolist(), None, full_output=True)
    assert_close(model.head(model(tokens)[0])[0], logits, 1e-4)
