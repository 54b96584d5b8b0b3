"""RWKV-7 against its equations and its published initialisation, and the laws of reading in a batch.

The oracle (oracle.py) is the model as the paper describes it, one token at a time in fp64 NumPy. Most
comparisons run in fp64, where rounding cannot hide a mistake. test_checkpoint.py is about files.

Shapes: B batch rows, T tokens, A tokens of an answer, C channels, H heads, N head size, L layers.
"""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close, assert_same_state, assert_slope, of_row, oracle, random_model, random_tokens
from oracle import same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from fs import FutureSeed
from model import RWKV7, Config, LayerState

FEW = settings(deadline=None, max_examples=20)


@pytest.mark.parametrize("L, C, N, T, k_k", [
    (1, 8, 8, 5, 1), (2, 32, 16, 37, 1), (4, 24, 8, 20, 1), (3, 16, 8, 1, 1), (2, 16, 8, 4, 1),
    (2, 64, 64, 35, 1), (3, 16, 8, 12, 1e-9),
])
def test_model_is_the_published_equations(L, C, N, T, k_k):
    """Hidden, logits and states are the oracle's, for each row of a batch, in fp64 and in fp32.

    Catches: any wrong sign, swapped adapter, forgotten v_first, misplaced gate, or wrong eps; also that of
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
        assert_close(model.logits(hidden[row]), logits, 1e-10, "logits")
        assert_same_state([[part[row] for part in layer] for layer in state], states)
    single, state = model.float()(tokens)
    assert single.dtype == torch.float32 and state[0].wkv.dtype == torch.float32
    assert_close(single, np.stack([expected for expected, _, _ in exact]), 1e-5, "fp32 hidden")


def test_zero_keys_and_values_are_finite_with_finite_gradients():
    """Catches: 0/0 in the normalisation of a key that is exactly zero, forward and backward."""
    model = random_model(2)
    model.blocks[1].att.key.weight.data.zero_()
    model.blocks[1].att.value.weight.data.zero_()
    hidden, _ = model(random_tokens(2, 1, 9))
    hidden.square().sum().backward()
    assert hidden.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_gradient_is_the_slope_of_the_loss():
    """Catches: a detach or a wrong backward anywhere between a parameter and the logits or the states."""
    model = random_model(3, n_layer=2)
    tokens, lengths = random_tokens(3, 2, 18), torch.tensor([18, 13])
    own = torch.arange(18) < lengths.unsqueeze(1)

    def loss():
        hidden, state = model(tokens, lengths=lengths)
        states = sum(part.sin().sum() for layer in state for part in layer)
        return torch.tanh(model.logits(hidden))[own].sum() + states

    assert_slope(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])


# ---- causality: y_t depends on tokens 0 to t, and on no other ----------------------------------------------


@FEW
@given(seed=st.integers(0, 999), T=st.integers(2, 70), data=st.data())
def test_later_token_leaves_earlier_outputs_alone(seed, T, data):
    """A changed token t leaves every bit before t as it was, in fp32.

    Catches: any look ahead, such as a gather off by one or an unmasked score.
    """
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
    """d out_t / d embedding_s is exactly 0 for s > t, and for no s up to t.

    Catches: a backward that leaks what the forward hides.
    """
    model = random_model(4, vocab_size=T)
    hidden, _ = model(torch.arange(T).unsqueeze(0))    # each token once: its embedding's gradient is its own
    hidden[0, t].sin().sum().backward()
    gradient = model.emb.weight.grad.abs().sum(dim=1)
    assert (gradient[t + 1 :] == 0).all()
    assert (gradient[: t + 1] > 0).all()


# ---- a row of a batch is the row alone ---------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), T=st.integers(1, 40), A=st.integers(0, 20), seeded=st.booleans(),
       data=st.data())
def test_row_of_a_batch_is_the_row_alone_read_in_pieces(seed, T, A, seeded, data):
    """Hidden, states and gradients of padded rows with answers are those of each row, cut to its own tokens
    and read in pieces from the same start, be that a given state or a seed state.

    Catches: padding in a state, an output or a gradient; an answer that is read from anything but its own
    prompt's end; a part of the state that is not carried over, or without its gradient.
    """
    B = data.draw(st.integers(1, 3))
    model, tokens, answers = random_model(seed % 5), random_tokens(seed, B, T), random_tokens(seed + 1, B, A)
    start, hook = None, None
    if seeded:
        hook = lambda layer, below, x_last: below * x_last[:, :1, None, None]    # noqa: E731
    else:
        _, start = model(random_tokens(seed + 2, B, 3))
    lengths = None
    if data.draw(st.booleans()):
        lengths = torch.tensor(data.draw(st.lists(st.integers(int(seeded), T), min_size=B, max_size=B)))
    answer = None
    if data.draw(st.booleans()) or A > 0:
        answer = answers
    hidden, state = model(tokens, start, lengths, hook, answer)

    loss, alone_loss = [], []
    for row in range(B):
        length = T if lengths is None else int(lengths[row])
        answer_length = data.draw(st.integers(0, A))
        pieces, alone_state = [torch.zeros(0, 16)], None
        if seeded:
            out, alone_state = model(tokens[row : row + 1, :length], seed_state=hook)
            pieces.append(out[0])
        else:
            alone_state, cut = of_row(start, row), data.draw(st.integers(0, length))
            for piece in (tokens[row : row + 1, :cut], tokens[row : row + 1, cut:length]):
                if piece.shape[1] > 0:
                    out, alone_state = model(piece, alone_state)
                    pieces.append(out[0])
        assert_same_state(of_row(state, row), alone_state)    # the prompt has been read
        loss += [part[row] for layer in state for part in layer]
        alone_loss += [part for layer in alone_state for part in layer]
        if answer_length > 0:
            pieces.append(model(answers[row : row + 1, :answer_length], alone_state)[0][0])
        own = torch.cat([hidden[row, :length], hidden[row, T : T + answer_length]])
        assert_close(own, torch.cat(pieces), 1e-10, f"row {row}")
        loss.append(own)
        alone_loss.append(torch.cat(pieces))
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, expected = (
        torch.autograd.grad(sum(part.sin().sum() for part in parts), used, None, True, materialize_grads=True)
        for parts in (loss, alone_loss))
    for gradient, reference in zip(gradients, expected):
        assert (gradient - reference).abs().max() <= 1e-9 * max(1, reference.abs().max())


def test_padding_and_what_comes_later_are_never_seen():
    """What the padding is, and what an answer's later tokens are, changes no bit of what came before.

    Catches: a bit that depends on what the padding is; in a prompt, on the answer; in it, on later tokens.
    """
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


def test_nothing_is_masked_or_gathered_where_nothing_is_padded():
    """Lengths on the CPU that say so cost no operation, like none.

    Catches: operations without an effect (a small model's step on a GPU is bound by how many there are).
    """
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.add(function.overloadpacket.__name__)
            return function(*arguments, **(options or {}))

    model, hook = random_model(1), lambda layer, below, x_last: below
    # so few tokens that the operator takes single steps, without masks of its own
    tokens, answer, full = random_tokens(1, 2, 3), random_tokens(2, 2, 2), torch.tensor([3, 3])
    for lengths in (None, full):
        seen = set()
        with Names():
            model(tokens, lengths=lengths, seed_state=hook, answer=answer)
        assert "addcmul" in seen and not seen & {"masked_fill", "index", "arange", "copy_"}


def test_states_given_and_returned_are_not_written_to():
    """Catches: an in-place update, by which two answers decoded from one prompt's state see one another."""
    model = random_model(9).float()
    with torch.no_grad():
        _, state = model(random_tokens(9, 2, 8))
        copy = [LayerState(*(part.clone() for part in layer)) for layer in state]
        first, _ = model(random_tokens(10, 2, 20), state, torch.tensor([20, 3]))
        model(random_tokens(11, 2, 1), state)
        again, _ = model(random_tokens(10, 2, 20), state, torch.tensor([20, 3]))
    assert same_bits(state, copy)
    assert torch.equal(first, again)


@pytest.mark.parametrize("lengths", [None, [200, 200], [200, 150]])
@pytest.mark.parametrize("answer", [None, 3])
def test_a_state_holds_the_state_and_nothing_else(lengths, answer):
    """A state is L (2 B C + B H N^2) numbers, whatever the prompt's length, in memory and saved; and what was
    saved is read back.

    Catches: a view of the whole prompt, which a state keeps alive and torch.save writes.
    """
    model = random_model(0).float()
    if lengths is not None:
        lengths = torch.tensor(lengths)
    if answer is not None:
        answer = random_tokens(4, 2, answer)
    with torch.no_grad():
        _, state = model(random_tokens(3, 2, 200), lengths=lengths, answer=answer)
    numbers = 3 * (2 * 2 * 16 + 2 * 2 * 8 * 8)
    assert sum(part.untyped_storage().nbytes() for layer in state for part in layer) == 4 * numbers
    file = io.BytesIO()
    torch.save(state, file)
    assert len(file.getvalue()) < 4 * numbers + 8000    # the zip's headers
    file.seek(0)
    assert same_bits(torch.load(file), state)


# ---- what does not fit is refused --------------------------------------------------------------------------


def state_of(n_layer=3, rows=2, n_embd=16):
    return random_model(0, n_layer=n_layer, n_embd=n_embd).empty_state(rows)


@pytest.mark.parametrize("arguments, words", [
    (dict(tokens=torch.zeros(5, dtype=torch.long)), "tokens must be"),
    (dict(tokens=torch.zeros(2, 0, dtype=torch.long)), "tokens must be"),
    (dict(tokens=torch.zeros(1, 2, 3, dtype=torch.long)), "tokens must be"),
    (dict(tokens=torch.zeros(2, 3)), "tokens must be"),
    (dict(tokens=torch.tensor([[1, 50]])), "tokens must be 0 to 49"),
    (dict(tokens=torch.tensor([[-1, 3]])), "not -1 to 3"),
    (dict(answer=torch.tensor([[1], [99]])), "answer must be 0 to 49, the vocabulary, and not 1"),
    (dict(lengths=torch.tensor([8, 9])), "0 to 8, not 8 to 9"),
    (dict(lengths=torch.tensor([9, 9]), answer=torch.zeros(2, 3, dtype=torch.long)), "0 to 8, not 9 to 9"),
    (dict(lengths=torch.tensor([-1, 3])), "0 to 8, not -1 to 3"),
    (dict(lengths=torch.tensor([0, 3]), seed_state=lambda *_: None), "1 to 8, not 0 to 3"),
    (dict(lengths=torch.tensor([3])), "lengths must be (2,) integers"),
    (dict(lengths=torch.tensor([[3, 3]])), "lengths must be (2,) integers"),
    (dict(lengths=torch.tensor([3.0, 3.0])), "lengths must be (2,) integers"),
    (dict(lengths=torch.tensor([True, True])), "lengths must be (2,) integers"),
    (dict(answer=torch.zeros(1, 3, dtype=torch.long)), "answer must be (2, A)"),
    (dict(answer=torch.zeros(2, dtype=torch.long)), "answer must be (2, A)"),
    (dict(state=state_of(), seed_state=lambda *_: None), "state and seed_state both"),
    (dict(state=[]), "of 0 layers, but the model has 3"),
    (dict(state=state_of(n_layer=4)), "of 4 layers, but the model has 3"),
    (dict(state=state_of(rows=1)), "must be (2, 16)"),
    (dict(state=state_of(n_embd=24)), "must be (2, 16)"),
    (dict(seed_state=FutureSeed(Config(4, 16, 8, 50, 24, 3, 4, 5, 6), layer_start=1)), "n_layer = 4"),
    (dict(seed_state=FutureSeed(Config(3, 24, 8, 50, 24, 3, 4, 5, 6), layer_start=1)), "n_embd = 24"),
    (dict(seed_state=FutureSeed(Config(3, 16, 4, 50, 24, 3, 4, 5, 6), layer_start=1)), "head_size = 4"),
    (dict(seed_state=lambda layer, below, x_last: below[:, :1]), "state must be"),
])
def test_what_does_not_fit_is_refused_in_one_line(arguments, words):
    """Catches: wrong numbers, a given state that is ignored, or a traceback from deep inside."""
    with pytest.raises(ValueError) as caught:
        random_model().float()(**{"tokens": random_tokens(1, 2, 8), **arguments})
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ---- the hook, activation checkpointing, autocast ----------------------------------------------------------


def test_the_hook_gets_what_it_was_promised_and_its_answer_replaces_the_wkv_state():
    """seed_state is called for layers 1 to L - 1 with the final wkv of the layer below and this layer's input
    at each row's last token. None means zero; anything else is what the layer starts from.

    Catches: another layer's state or input, an input at a padding position, and a returned state that is
    added, ignored, or taken as a reason to reset the token shifts.
    """
    model = random_model(10)
    tokens, lengths = random_tokens(12, 2, 15), torch.tensor([15, 6])
    inputs, asked = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    def seed_state(layer, below, x_last):
        asked.append((layer, below, x_last))

    hidden, state = model(tokens, lengths=lengths, seed_state=seed_state)
    assert [layer for layer, _, _ in asked] == [1, 2]
    for layer, below, x_last in asked:
        assert torch.equal(below, state[layer - 1].wkv)
        assert torch.equal(x_last, inputs[layer][[0, 1], lengths - 1])
    assert torch.equal(hidden, model(tokens, lengths=lengths)[0])
    chosen = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seeded, _ = model(tokens, seed_state=lambda layer, below, x_last: chosen if layer == 2 else None)
    start = model.empty_state(2)
    start[2] = start[2]._replace(wkv=chosen)
    assert torch.equal(seeded, model(tokens, start)[0])


@pytest.mark.parametrize("hook", ["none", "detached", "attached"])
def test_activation_checkpointing_changes_nothing_but_memory(hook):
    """Catches: a recomputation from other inputs (seed state, padding), and a switch that does nothing."""
    def seed_state(layer, below, x_last):
        if hook == "none":
            return None
        if hook == "detached":
            below = below.detach()
        return 0.1 * below * x_last.sum(dim=1).tanh().view(-1, 1, 1, 1)

    tokens, lengths = random_tokens(15, 2, 24), torch.tensor([24, 11])
    results = []
    for checkpointed in (False, True):
        model = random_model(12).float()
        model.checkpoint_activations = checkpointed
        calls = []
        model.blocks[1].att.register_forward_hook(lambda module, args, output: calls.append(1))
        hidden, state = model(tokens, lengths=lengths, seed_state=seed_state)
        (hidden.sin().sum() + sum(layer.wkv.sin().sum() for layer in state)).backward()
        results.append((hidden, state, {name: p.grad for name, p in model.named_parameters()}))
        assert len(calls) == 1 + checkpointed
        with torch.no_grad():
            assert torch.equal(model(tokens, lengths=lengths, seed_state=seed_state)[0], hidden)
    (one, one_state, one_grads), (two, two_state, two_grads) = results
    assert torch.equal(one, two) and same_bits(one_state, two_state)
    assert all(torch.equal(g, two_grads[name]) for name, g in one_grads.items() if g is not None)
    assert one_grads["blocks.1.att.w1"].abs().max() > 0


def test_bf16_autocast_keeps_states_and_logits_in_fp32():
    """Catches: states rounded to bf16 between segments, logits rounded so that two options tie (two of 200
    answers did), here and in decoding, and a model that fails under autocast.
    """
    model = random_model(13, n_embd=32, head_size=16).float()
    tokens, lengths = random_tokens(16, 2, 40), torch.tensor([40, 17])
    exact, exact_state = model(tokens, lengths=lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, state = model(tokens, lengths=lengths)
        more, _ = model(tokens[:, :3], state)
        logits = model.logits(hidden)
        written = model.generate(logits[:, -1].detach(), state, 4)
    assert all(layer.wkv.dtype == torch.float32 for layer in state)
    assert_close(hidden[0], exact[0], 0.1)
    assert_close(state[0].wkv, exact_state[0].wkv, 0.02)
    assert logits.dtype == torch.float32 and torch.equal(logits, model.head(hidden.float()))
    assert written.shape == (2, 4) and more.isfinite().all()
    more.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad and p.grad is not None)


# ---- decoding ----------------------------------------------------------------------------------------------


@torch.no_grad()
def prompt_end(model: RWKV7, rows=3):
    hidden, state = model(random_tokens(30, rows, 5))
    return model.logits(hidden[:, -1]), state


@torch.no_grad()
@pytest.mark.parametrize("rows, max_new", [(3, 6), (1, 70), (1, 1), (2, 0)])
def test_greedy_decoding_reads_on_token_by_token(rows, max_new):
    """Catches: a lost or repeated token, and a token where none was asked for."""
    model = random_model(20).float()
    logits, state = prompt_end(model, rows)
    written = model.generate(logits, state, max_new)
    assert written.shape == (rows, max_new) and written.dtype == torch.long
    for t in range(max_new):
        assert (written[:, t] == logits.argmax(dim=-1)).all()
        hidden, state = model(written[:, t : t + 1], state)
        logits = model.head(hidden[:, -1])


def test_decoding_ends_when_its_caller_says_so():
    """Catches: an end that is asked for too early or too late, and one that changes what was written."""
    model = random_model(20).float()
    logits, state = prompt_end(model)
    greedy, seen = model.generate(logits, state, 8), []

    def done(written):
        seen.append(written.shape[1])
        return written.shape[1] == 3

    stopped = model.generate(logits, state, 8, done=done)
    assert seen == [1, 2, 3] and torch.equal(stopped, greedy[:, :3])


# ---- the published initialisation and sizes ----------------------------------------------------------------


def test_sizes_are_the_published_ones():
    """Catches: a missing or superfluous tensor, or a rounding of ranks other than the official code's."""
    with torch.device("meta"):
        weights = RWKV7(Config.published()).state_dict()
    assert len(weights) == 402 and sum(tensor.numel() for tensor in weights.values()) == 191_084_544
    assert Config.published() == Config(12, 768, 64, 65536, 3072, 64, 64, 32, 128)
    for C, ranks in {64: (32, 32, 32, 32), 1024: (64, 64, 64, 160), 2048: (128, 128, 64, 224),
                     2560: (128, 128, 96, 256)}.items():
        assert Config.published(2, C) == Config(2, C, 64, 65536, 4 * C, *ranks)


def test_initialisation_is_the_published_one():
    """Catches: a wrong constant, exponent, gain or zero in the initialisation, each against its formula."""
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
    """Catches: a gain without the official sqrt(rank / C), which shows where the rank exceeds C."""
    model = RWKV7.init(Config.published(2, 16, 8, 10))    # ranks 32 > C; V < C, so the head's gain is 0.5
    for second in (model.blocks[1].att.w2, model.blocks[0].att.g2):
        torch.testing.assert_close(second.mT @ second, 0.1**2 * (32 / 16) * torch.eye(16))
    torch.testing.assert_close(model.head.weight @ model.head.weight.mT, 0.25 * torch.eye(10))


@pytest.mark.parametrize("L", [1, 2])
def test_initialised_model_trains_from_its_seed_alone(L):
    """Catches: a one-layer model that divides by zero, a parameter left to torch's global generator (runs
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
