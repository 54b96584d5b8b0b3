"""What the tests of the model share: RWKV-7 in fp64 NumPy, one token at a time, and random models.

The oracle is written from the paper and the official file format, and shares nothing with model.py.

Shapes: B batch rows, T tokens, C channels, H heads, N head size, L layers, V vocabulary entries.
"""

import math

import numpy as np
import torch
from conftest import relative_error

from model import RWKV7, Config, LayerState


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


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, weight, bias, eps):
    """Normalise the last axis to mean 0 and variance 1."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def oracle(model: RWKV7, tokens: list[int], seed_state=None):
    """RWKV-7 on one row: hidden (T, C), logits (T, V), and for each layer its time shift (C,), S (H, N, N) as
    [value, key], and its channel shift (C,)."""
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
        if seed_state is not None and layer > 0:
            seeded = seed_state(layer, states[-1][1], x[-1])
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


# ---- comparisons -------------------------------------------------------------------------------------------

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
    """Whether two lists of tuples of tensors, as states are, hold the same bits."""
    return all(torch.equal(one, other) for pair in zip(states, others, strict=True)
               for one, other in zip(*pair, strict=True))


def of_row(states, row: int) -> list[LayerState]:
    """The state of one row, as of a batch of one."""
    return [LayerState(*(part[row : row + 1] for part in layer)) for layer in states]


def assert_slope(loss, parameters, tolerance=1e-5):
    """The gradient of loss() in each fp64 parameter is the slope in a random direction."""
    rng = torch.Generator().manual_seed(3)
    gradients = torch.autograd.grad(loss(), parameters)
    for number, (parameter, gradient) in enumerate(zip(parameters, gradients)):
        step = 1e-6 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            parameter += step
            above = loss()
            parameter -= 2 * step
            below = loss()
            parameter += step
        slope, expected = (above - below) / 2e-6, (gradient * step).sum() / 1e-6
        error = abs(slope - expected)
        assert error <= tolerance * max(1, abs(slope)), f"parameter {number}: {slope} and {expected}"
