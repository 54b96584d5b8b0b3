"""RWKV-7 against its equations, its published initialisation, real checkpoints, and what users will do to it.

The oracle is the model as the paper and the official format describe it, one token at a time in fp64 NumPy,
and shares nothing with model.py. Most comparisons run in fp64, where rounding cannot hide a mistake.

Shapes: B batch rows, T tokens, C channels, H heads, N head size, L layers, V vocabulary entries.
"""

import hashlib
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
from torch.utils._python_dispatch import TorchDispatchMode

from model import Config, LayerState, RWKV7, read_tensors

FEW = settings(deadline=None, max_examples=20)
REVERSE = "rwkv7-reverse-L4-D32-blinkdl.pth"
TINY = "tiny-rwkv-7v0-834K-blinkdl.pth"


def random_model(seed=0, n_layer=3, n_embd=16, head_size=8, vocab_size=50, n_ffn=24, ranks=(3, 4, 5, 6)):
    """A model in fp64 with nothing left at an initial value: every parameter matters, no two sizes agree."""
    model = RWKV7(Config(n_layer, n_embd, head_size, vocab_size, n_ffn, *ranks)).double()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
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
    """RWKV-7 on one row: hidden (T, C), logits (T, V), a (time shift, S [head, value, key], channel shift) a
    layer.
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


def same_bits(states, others) -> bool:
    return all(torch.equal(one, other) for pair in zip(states, others) for one, other in zip(*pair))


def of_row(states, row: int):
    """The states of one row, as a batch of one."""
    return [LayerState(*(part[row : row + 1] for part in layer)) for layer in states]


@pytest.mark.parametrize("L, C, N, T, k_k", [
    (1, 8, 8, 5, 1), (2, 32, 16, 37, 1), (4, 24, 8, 20, 1), (3, 16, 8, 1, 1), (2, 16, 8, 4, 1),
    (2, 64, 64, 35, 1), (3, 16, 8, 12, 1e-9),
])
def test_model_is_the_published_equations(L, C, N, T, k_k):
    """Catches any wrong sign, swapped adapter, forgotten v_first, misplaced gate, or wrong eps; also that of
    the removal keys, where 1e-5 looks harmless until keys are small.
    """
    model = random_model(L, n_layer=L, n_embd=C, head_size=N)
    for block in model.blocks:
        block.att.k_k.data *= k_k
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


def test_zero_keys_and_values_are_finite_with_finite_gradients():
    """Catches 0/0 in the normalisation of a key that is exactly zero, forward and backward."""
    model = random_model(2)
    model.blocks[1].att.key.weight.data.zero_()
    model.blocks[1].att.value.weight.data.zero_()
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
    rng = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        direction = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
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


# ---- padding, answers, splitting, state --------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), T=st.integers(1, 40), A=st.integers(0, 20), data=st.data())
def test_row_of_a_batch_is_the_row_alone_read_in_pieces(seed, T, A, data):
    """Catches padding in a state, an output or a gradient, an answer that is read from anything but its own
    prompt's end, and a part of the state that is not carried over, or without its gradient.
    """
    B = data.draw(st.integers(1, 3))
    model, tokens, answers = random_model(seed % 5), random_tokens(seed, B, T), random_tokens(seed + 1, B, A)
    _, start = model(random_tokens(seed + 2, B, 3))    # any earlier state
    hook = data.draw(st.sampled_from([None, lambda layer, below, x_last: below * x_last[:, :1, None, None]]))
    lengths = None
    if data.draw(st.booleans()):
        shortest = 0 if hook is None else 1
        lengths = torch.tensor(data.draw(st.lists(st.integers(shortest, T), min_size=B, max_size=B)))
    hidden, state = model(tokens, start, lengths, hook, answers if A else None)

    loss, alone_loss = [], []
    for row in range(B):
        length = T if lengths is None else int(lengths[row])
        answer_length = data.draw(st.integers(0, A))
        cut = data.draw(st.integers(0, length)) if hook is None else length
        alone, alone_state = [torch.zeros(0, 16)], of_row(start, row)
        for piece in tokens[row, :cut], tokens[row, cut:length], answers[row, :answer_length]:
            if len(alone) == 3:
                assert_same_state(of_row(state, row), alone_state)    # the prompt has been read
                loss += [part[row] for layer in state for part in layer]
                alone_loss += [part for layer in alone_state for part in layer]
            if len(piece):
                seed_hook = hook if len(alone) == 1 else None
                out, alone_state = model(piece.unsqueeze(0), alone_state, seed_state=seed_hook)
            alone.append(out[0] if len(piece) else torch.zeros(0, 16))
        own = torch.cat([hidden[row, :length], hidden[row, T : T + answer_length]])
        assert_close(own, torch.cat(alone), 1e-10, f"row {row}")
        loss.append(own)
        alone_loss.append(torch.cat(alone))
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, expected = (
        torch.autograd.grad(sum(part.sin().sum() for part in parts), used, None, True, materialize_grads=True)
        for parts in (loss, alone_loss))
    for gradient, reference in zip(gradients, expected):
        assert (gradient - reference).abs().max() <= 1e-9 * max(1, reference.abs().max())


def test_padding_and_what_comes_later_are_never_seen():
    """Catches a bit that depends on what the padding is, in a prompt on the answer, in it on later tokens."""
    model = random_model(10).float()
    lengths = torch.tensor([21, 1, 9])
    tokens, answers = random_tokens(10, 3, 21), random_tokens(11, 3, 7)
    other_tokens = torch.where(torch.arange(21) < lengths.view(3, 1), tokens, random_tokens(13, 3, 21))
    other_answers = torch.where(torch.arange(7) < 4, answers, random_tokens(12, 3, 7))
    hook = lambda layer, below, x_last: below / 2    # noqa: E731
    hidden, state = model(tokens, lengths=lengths, seed_state=hook, answer=answers)
    changed, changed_state = model(other_tokens, lengths=lengths, seed_state=hook, answer=other_answers)
    for row, length in enumerate(lengths):
        assert torch.equal(hidden[row, :length], changed[row, :length])
    assert torch.equal(hidden[:, 21 : 21 + 4], changed[:, 21 : 21 + 4])
    assert not torch.equal(hidden[:, 21 + 4 :], changed[:, 21 + 4 :])
    assert same_bits(state, changed_state)


def test_states_given_and_returned_are_not_written_to():
    """Catches an in-place update: two answers decoded from one prompt state must not see one another."""
    model = random_model(9).float()
    with torch.no_grad():
        _, state = model(random_tokens(9, 2, 8))
        copy = [LayerState(*(part.clone() for part in layer)) for layer in state]
        first, _ = model(random_tokens(10, 2, 20), state, torch.tensor([20, 3]))
        model(random_tokens(11, 2, 1), state)
        again, _ = model(random_tokens(10, 2, 20), state, torch.tensor([20, 3]))
    assert same_bits(state, copy)
    assert torch.equal(first, again)


def test_nothing_is_masked_or_gathered_where_nothing_is_padded():
    """Catches operations without an effect: a small model's step on a GPU is bound by how many there are."""
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.add(function.overloadpacket.__name__)
            return function(*arguments, **(options or {}))

    model, seen = random_model(1), set()
    with Names():
        model(random_tokens(1, 2, 2), seed_state=lambda layer, below, x_last: below, answer=random_tokens(2, 2, 2))
    assert "addcmul" in seen and not seen & {"masked_fill", "index", "arange", "copy_", "_local_scalar_dense"}


@pytest.mark.parametrize("shape", [(5,), (2, 0), (1, 2, 3)])
def test_tokens_of_a_wrong_shape(shape):
    """Catches a traceback from deep inside for an empty prompt or a forgotten batch axis."""
    with pytest.raises(ValueError, match="tokens must be"):
        random_model()(torch.zeros(shape, dtype=torch.int64))


# ---- the seed hook, activation checkpointing, autocast -----------------------------------------------------


def test_seed_hook_gets_what_it_was_promised_and_replaces_the_state():
    """Catches a hook that gets another layer's state or input, or that at a padding position, and what it
    returns added to the state, ignored, or taken as a reason to reset the token shifts.
    """
    model = random_model(10)
    tokens = random_tokens(12, 2, 15)
    lengths = torch.tensor([15, 6])
    inputs, asked = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    def seed(layer, below, x_last):
        asked.append((layer, below, x_last))

    hidden, state = model(tokens, lengths=lengths, seed_state=seed)
    assert [layer for layer, _, _ in asked] == [1, 2]
    for layer, below, x_last in asked:
        assert torch.equal(below, state[layer - 1].wkv)
        assert torch.equal(x_last, inputs[layer][[0, 1], lengths - 1])
    assert torch.equal(hidden, model(tokens, lengths=lengths)[0])    # None: as without a hook
    chosen = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seeded, _ = model(tokens, state, seed_state=lambda layer, below, x_last: chosen if layer == 2 else None)
    state[2] = state[2]._replace(wkv=chosen)
    assert torch.equal(seeded, model(tokens, state)[0])


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
        hidden, state = model(tokens, lengths=lengths, seed_state=seed)
        (hidden.sin().sum() + sum(layer.wkv.sin().sum() for layer in state)).backward()
        results.append((hidden, state, {name: p.grad for name, p in model.named_parameters()}))
        assert len(calls) == (2 if checkpointed else 1)
        with torch.no_grad():
            assert torch.equal(model(tokens, lengths=lengths, seed_state=seed)[0], hidden)
    (one, one_state, one_grads), (two, two_state, two_grads) = results
    assert torch.equal(one, two) and same_bits(one_state, two_state)
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


# ---- decoding ----------------------------------------------------------------------------------------------


@torch.no_grad()
def prompt_end(model: RWKV7, rows=3):
    hidden, state = model(random_tokens(30, rows, 5))
    return model.head(hidden[:, -1]), state


@torch.no_grad()
@pytest.mark.parametrize("rows, max_new", [(3, 6), (1, 70), (1, 1)])
def test_greedy_decoding_reads_on_token_by_token(rows, max_new):
    """Catches a lost or repeated token, and weights that a long answer leaves other than it found them."""
    model = random_model(20).float()
    logits, state = prompt_end(model, rows)
    before = [(p.data_ptr(), p.stride(), p.clone()) for p in model.parameters()]
    written = model.generate(logits, state, max_new)
    assert written.shape == (rows, max_new)
    for t in range(max_new):
        assert (written[:, t] == logits.argmax(dim=-1)).all()
        hidden, state = model(written[:, t : t + 1], state)
        logits = model.head(hidden[:, -1])
    for parameter, (place, stride, value) in zip(model.parameters(), before):
        assert (parameter.data_ptr(), parameter.stride()) == (place, stride) and torch.equal(parameter, value)


def test_decoding_stops_when_every_row_has():
    """Catches rows that end the others' text, and a stop that is never seen."""
    model = random_model(20).float()
    logits, state = prompt_end(model)
    greedy = model.generate(logits, state, 8)
    stopped = model.generate(logits, state, 8, stop=tuple(set(greedy[:, 2].tolist())))
    assert stopped.shape[1] <= 3 and (stopped == greedy[:, : stopped.shape[1]]).all()
    only_first = next(token for token in greedy[0].tolist() if token not in greedy[1:])
    assert model.generate(logits, state, 8, stop=(only_first, 51)).shape == (3, 8)


# ---- the published initialisation and sizes ----------------------------------------------------------------


def test_sizes_are_the_published_ones():
    """Catches a missing or superfluous tensor, or a rounding of ranks other than the official code's."""
    with torch.device("meta"):
        weights = RWKV7(Config.published()).state_dict()
    assert len(weights) == 402 and sum(tensor.numel() for tensor in weights.values()) == 191_084_544
    assert Config.published() == Config(12, 768, 64, 65536, 3072, 64, 64, 32, 128)
    for C, ranks in {64: (32, 32, 32, 32), 1024: (64, 64, 64, 160), 2048: (128, 128, 64, 224),
                     2560: (128, 128, 96, 256)}.items():
        assert Config.published(2, C) == Config(2, C, 64, 65536, 4 * C, *ranks)


def test_initialisation_is_the_published_one():
    """Catches a wrong constant, exponent, gain or zero in the initialisation, each against its formula."""
    L, C, N, V = 3, 32, 16, 100
    model = RWKV7.init(Config.published(L, C, N, V), seed=1)
    w = {name: tensor.squeeze().double().numpy() for name, tensor in model.state_dict().items()}
    n = np.arange(C)
    linear = n / (C - 1) - 0.5
    wave = (n % N - (N - 1) / 2) / ((N - 1) / 2)
    wave = wave * np.abs(wave)
    exact = {"ln_out.weight": 1, "ln_out.bias": 0, "blocks.0.ln0.weight": 1, "blocks.0.ln0.bias": 0}
    gains = {"head.weight": 0.5 * math.sqrt(V / C)}
    for layer in range(L):
        to_one, to_zero = layer / (L - 1), 1 - layer / L
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        values = {f"att.x_{mix}": 1 - (n / C) ** (power * to_zero) for mix, power in powers.items()}
        values |= {"ffn.x_k": 1 - (n / C) ** (to_zero**4), "att.k_k": 0.71 - 0.1 * linear,
                   "att.w0": -6 + 6 * (n / (C - 1)) ** (1 + to_one**0.3) + 0.5 + 2.5 * wave,
                   "att.a0": -0.19 + 0.3 * wave + 0.4 * linear, "att.v0": 0.73 - 0.4 * linear}
        values |= {"att.k_a": 1.02, "att.r_k": -0.04, "att.output.weight": 0, "ffn.value.weight": 0,
                   "att.w1": 0, "att.a1": 0, "att.v1": 0, "att.g1": 0, "ln1.weight": 1, "ln1.bias": 0,
                   "ln2.weight": 1, "ln2.bias": 0, "att.ln_x.bias": 0,
                   "att.ln_x.weight": ((1 + layer) / L) ** 0.7}
        factors = {f"att.{adapter}2": 0.1 for adapter in "wavg"}    # rank 32 = C here; rank > C below
        factors |= {"att.receptance.weight": 1, "att.key.weight": 0.1, "att.value.weight": 1,
                    "ffn.key.weight": 1}
        exact |= {f"blocks.{layer}.{name}": value for name, value in values.items()}
        gains |= {f"blocks.{layer}.{name}": gain for name, gain in factors.items()}
    assert set(exact) | set(gains) | {"emb.weight"} == set(w)
    for name, expected in exact.items():
        np.testing.assert_allclose(w[name], expected + 0 * w[name], 2e-6, 2e-6, err_msg=name)
    for name, gain in gains.items():    # orthogonal
        matrix = w[name] if w[name].shape[0] <= w[name].shape[1] else w[name].T
        product = matrix @ matrix.T / gain**2
        np.testing.assert_allclose(product, np.eye(len(matrix)), atol=1e-5, err_msg=name)
    embedding = w["emb.weight"]
    assert np.abs(embedding).max() <= 1e-4 and abs(embedding.std() - 1e-4 / math.sqrt(3)) < 2e-6    # uniform


def test_a_wide_adapter_starts_larger():
    """Catches a gain without the official sqrt(rank / C), which shows where the rank exceeds C."""
    model = RWKV7.init(Config.published(2, 16, 8, 10))    # ranks 32 > C; V < C, so the head's gain is 0.5
    for second in (model.blocks[1].att.w2, model.blocks[0].att.g2):
        torch.testing.assert_close(second.mT @ second, 0.1**2 * (32 / 16) * torch.eye(16))
    torch.testing.assert_close(model.head.weight @ model.head.weight.mT, 0.25 * torch.eye(10))


@pytest.mark.parametrize("L", [1, 2])
def test_initialised_model_trains_from_its_seed_alone(L):
    """Catches a one-layer model that divides by zero, a parameter left to torch's global generator (runs
    would differ), an unused seed, and training block 0's idle adapter.
    """
    config = Config.published(L, 32, 16, 40)
    torch.manual_seed(1)
    model = RWKV7.init(config, 7)
    torch.manual_seed(2)
    again, other = RWKV7.init(config, 7).state_dict(), RWKV7.init(config, 8).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(again["emb.weight"], other["emb.weight"])
    assert not torch.equal(again["blocks.0.att.w2"], other["blocks.0.att.w2"])
    logits = model.head(model(random_tokens(1, 2, 9, vocab_size=40))[0])
    loss = torch.nn.functional.cross_entropy(logits.mT, random_tokens(2, 2, 9, vocab_size=40))
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
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400, message
    return message.removeprefix(f"{path}: ")


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
    numbers = ["7", "42", "90210", "1234567890123", "27182818284590452353602874713526624977572470936999"]
    lengths = torch.tensor([len(number) + 1 for number in numbers])
    tokens = torch.full((len(numbers), int(lengths.max())), 11)
    for row, number in enumerate(numbers):
        tokens[row, : len(number) + 1] = torch.tensor([vocabulary.index(c) for c in number + ","])
    hidden, state = model(tokens, lengths=lengths)
    logits = model.head(hidden[torch.arange(len(numbers)), lengths - 1])
    written = model.generate(logits, state, int(lengths.max())).tolist()
    texts = ["".join(vocabulary[i] for i in row)[: len(number) + 1] for row, number in zip(written, numbers)]
    assert texts == [number[::-1] + "#" for number in numbers]


def test_save_and_load_give_the_same_bits(tmp_path, monkeypatch):
    """Catches a parameter that is rounded, renamed, lost or not trainable after a round trip, and a second
    look at the file, to hash it: it may have been replaced between the two.
    """
    model = random_model(15).float()
    path = tmp_path / "new folder" / "model.pth"
    model.save(path)
    raw, sha256 = read_tensors(path)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in raw.values())
    content = path.read_bytes()
    reads = iter([content, b"replaced"])
    monkeypatch.setattr(Path, "read_bytes", lambda self: next(reads))
    again = RWKV7.load(path)
    assert model.sha256 is None and again.sha256 == sha256 == hashlib.sha256(content).hexdigest()
    assert again.config == model.config
    one, two = model.state_dict(), again.state_dict()
    assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in again.parameters()]


@pytest.mark.parametrize("n_layer", [1, 2])
def test_official_variants_load_alike(tmp_path, n_layer):
    """Catches a reader that needs key order, fp32, torch's zip format, block 0's idle adapter, or a head of
    its own, and one that leaves a tied head tied.
    """
    weights = tiny_weights(n_layer)
    tokens = random_tokens(1, 1, 9, vocab_size=11)
    expected, _ = RWKV7.load(saved(tmp_path / "a.pth", weights))(tokens)
    idle = [f"blocks.0.att.v{i}" for i in "012"]
    scrambled = {name: torch.full_like(t, math.nan) if name in idle else t for name, t in weights.items()}
    absent = {name: t for name, t in weights.items() if name not in idle}
    for variant in (dict(reversed(weights.items())), scrambled, absent):
        assert torch.equal(RWKV7.load(saved(tmp_path / "b.pth", variant))(tokens)[0], expected)
    legacy = saved(tmp_path / "c.pth", weights, _use_new_zipfile_serialization=False)
    assert torch.equal(RWKV7.load(legacy)(tokens)[0], expected)
    half = {name: torch.nn.Parameter(tensor.bfloat16()) for name, tensor in weights.items()}
    loaded = RWKV7.load(saved(tmp_path / "d.pth", half)).state_dict()
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in loaded.items())
    tied = RWKV7.load(saved(tmp_path / "e.pth", weights | {"head.weight": weights["emb.weight"]}))
    assert tied.head.weight.data_ptr() != tied.emb.weight.data_ptr()


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


def test_every_missing_misshapen_infinite_or_unknown_tensor_is_named(tmp_path):
    """Catches a checkpoint of another model, or half of one, that loads silently or ends in a traceback."""
    weights = tiny_weights()

    def error(**changes) -> str:
        changed = weights | changes
        changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
        return load_error(saved(tmp_path / "changed.pth", changed))

    for name in [name for name in weights if not name.startswith("blocks.1.") or ".att.v" in name]:
        error(**{name: torch.cat([weights[name], weights[name]])})
        if not name.startswith("blocks.0.att.v") or name.endswith("weight"):    # v0, v1, v2: idle in block 0
            assert name in error(**{name: None})
            broken = weights[name].clone()
            broken.view(-1)[-1] = math.nan if "k" in name else -math.inf
            assert error(**{name: broken}) == f"{name} holds NaN or infinity"
    for name in ("emb.weight", "blocks.0.att.r_k", "blocks.0.ffn.key.weight", "blocks.1.att.v1"):
        for shape in ((0,), (3, 3, 3, 3), (0, 8), (2**40, 0)):
            error(**{name: torch.zeros(shape)})
    for name in ("blocks.1.att.time_decay", "blocks.0.ffn.receptance.weight", "epoch"):
        assert name in error(**{name: torch.zeros(2)})
    assert "blocks.2." in error(**{"blocks.3.ln1.weight": torch.ones(8)})
    for shape in ((1, 7), (3, 2), (4, 4), (1, 0)):    # heads that do not make up the width
        error(**{"blocks.0.att.r_k": torch.zeros(shape)})


@pytest.mark.parametrize("content, words", [
    (b"", "not a PyTorch file"), (b"hello, I am a text file\n", "not a PyTorch file"),
    (b"version https://git-lfs", "not a PyTorch file"), (b"PK\x03\x04", "damaged"), (b"\x80\x02", "damaged"),
    ([], "state dict"), (torch.zeros(2), "state dict"), (None, "state dict"), ({"a": 1}, "state dict"),
    ({1: torch.zeros(2)}, "state dict"), ({"model": {"emb.weight": torch.zeros(2, 2)}}, "state dict"),
    ({}, "emb.weight"), ({"a": torch.zeros(2)}, "emb.weight"), ({"emb.weight": torch.zeros(2)}, "values"),
    ({"x": torch.zeros(2), "model.layers.0.attn.x_r": torch.zeros(2)}, "Hugging Face"),
    ({"blocks.0.att.time_decay": torch.zeros(2), "blocks.0.att.time_maa_x": torch.zeros(2)}, "RWKV-6"),
    ({"blocks.0.att.time_decay": torch.zeros(2), "blocks.0.att.time_mix_k": torch.zeros(2)}, "RWKV-4 or 5"),
], ids=lambda value: repr(value)[:40])
def test_file_of_another_kind_is_named_as_what_it_is(tmp_path, content, words):
    """Catches a traceback, or torch's advice, for what people give for a checkpoint by mistake."""
    path = tmp_path / "file.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert words in load_error(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tensor", [
    lambda: torch.zeros(1).expand(2**31, 8), lambda: torch.zeros(1).expand(2**50, 8),
    lambda: torch.zeros(2**33, 0), lambda: torch.zeros(11, 8, device="meta"),
    lambda: torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)]),
    lambda: torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=torch.jagged),
    lambda: torch.zeros(11, 8).to_sparse(), lambda: torch.zeros(11, 8).to(torch.int8),
    lambda: torch.zeros(11, 8).to(torch.complex64),
    lambda: torch.quantize_per_tensor(torch.zeros(11, 8), 0.1, 0, torch.qint8),
])
@pytest.mark.parametrize("name", ["emb.weight", "blocks.0.ffn.key.weight"])
def test_hostile_tensor_ends_in_one_line(tmp_path, tensor, name):
    """Catches a traceback, or gigabytes for a file of a few bytes."""
    load_error(saved(tmp_path / "hostile.pth", tiny_weights() | {name: tensor()}))


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


@pytest.mark.filterwarnings("ignore")
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


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, len(WHOLE)),
       changes=st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_checkpoint(tmp_path, length, changes):
    """Catches any way out but two: a model of the right sizes, or one line that names the file."""
    path = tmp_path / "damaged.pth"
    path.write_bytes(WHOLE[:length])
    if length < len(WHOLE):
        load_error(path)    # a download cut short
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place % len(content)] = value
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
