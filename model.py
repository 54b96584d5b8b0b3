"""RWKV-7 "Goose" (x070), exactly as published, small enough to read from top to bottom.

References:
  the paper, "RWKV-7 Goose with Expressive Dynamic State Evolution", https://arxiv.org/abs/2503.14456
  the official code, https://github.com/BlinkDL/RWKV-LM (RWKV-v7/rwkv_v7_numpy.py is the model in 100 lines)

A block is a time mix (tokens talk to each other, through a matrix state) and a channel mix (channels of one
token talk to each other). Both first blend each token with the one before it, the token shift. Everything
reads left to right. Parameters carry the official names, so a state_dict is an official checkpoint.

This file knows nothing of Future-Seed but a hook: `seed(layer, below, x_last)` may choose where a layer's
state starts.

Shapes: B batch rows, T tokens (A more where answers follow), C channels (n_embd), H heads, N head size
(C = H N), L layers, V vocabulary.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from files import save_tensors
import hashlib, io
from wkv import wkv

LAYER_NORM_EPS = 1e-5
HEAD_NORM_EPS = 64e-5     # of ln_x, the norm over each head's readout; the official value at every head size

# (layer, terminal wkv state of the layer below (B, H, N, N), this layer's input at each row's last token
# (B, C)) -> the wkv state that this layer starts from (B, H, N, N), or None for the usual one
SeedHook = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Config:
    """The sizes of a model: `published` computes them by the official rules, `from_weights` reads them."""

    n_layer: int       # L, blocks
    n_embd: int        # C, channels of the residual stream
    head_size: int     # N, side of each head's state matrix
    vocab_size: int    # V
    n_ffn: int         # width inside the channel mix
    rank_w: int        # low-rank adapter of the decay
    rank_a: int        # of the in-context learning rate
    rank_v: int        # of the value residual
    rank_g: int        # of the output gate

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size

    @classmethod
    def published(cls, n_layer=12, n_embd=768, head_size=64, vocab_size=65536) -> "Config":
        """The official sizes for a depth and a width; the defaults are the 0.1b model (191 M parameters)."""
        def rank(multiplier):
            return max(32, 32 * round(multiplier * math.sqrt(n_embd) / 32))
        ranks = (rank(multiplier) for multiplier in (2.5, 2.5, 1.7, 5.0))
        return cls(n_layer, n_embd, head_size, vocab_size, 4 * n_embd, *ranks)

    @classmethod
    def from_weights(cls, weights: dict[str, torch.Tensor]) -> "Config":
        """Read the sizes off an official state dict. KeyError or ValueError where they cannot be had."""
        blocks = {int(name.split(".")[1]) for name in weights if re.match(r"blocks\.\d+\.", name)}
        n_layer = len(blocks)
        for layer in range(max(1, n_layer)):
            if layer not in blocks:
                raise KeyError(f"blocks.{layer}.*")
        vocab_size, n_embd = weights["emb.weight"].shape
        n_head, head_size = weights["blocks.0.att.r_k"].shape
        if n_head * head_size != n_embd:
            raise ValueError(f"{n_head} heads of {head_size} for {n_embd} channels")
        n_ffn = weights["blocks.0.ffn.key.weight"].shape[0]
        # block 0 has no value residual; files carry its adapter all the same, or leave it out
        v1 = weights.get(f"blocks.{min(1, n_layer - 1)}.att.v1")
        rank_v = 32 if v1 is None else v1.shape[1]
        rank_w, rank_a, rank_g = (weights[f"blocks.0.att.{adapter}1"].shape[1] for adapter in "wag")
        return cls(n_layer, n_embd, head_size, vocab_size, n_ffn, rank_w, rank_a, rank_v, rank_g)


class LayerState(NamedTuple):
    """All that one layer remembers of the tokens before."""

    time_shift: torch.Tensor       # (B, C), the time mix's input at the last token
    wkv: torch.Tensor              # (B, H, N, N) fp32, [value, key]
    channel_shift: torch.Tensor    # (B, C), the channel mix's input at the last token


class Layout(NamedTuple):
    """What the columns of a batch are: in each row tokens, then padding, perhaps an answer, and padding."""

    lengths: torch.Tensor | None    # (B,), of the tokens before the answer; None: all columns
    padding: torch.Tensor | None    # (B, columns, 1), True where there is no token; None: nowhere
    answer: int                     # A, the columns at the right that belong to answers


def beyond(columns: int, lengths: torch.Tensor) -> torch.Tensor:
    """True behind each row's own tokens, (B, columns, 1)."""
    return torch.arange(columns, device=lengths.device).view(columns, 1) >= lengths.view(-1, 1, 1)


def token_shift(x: torch.Tensor, before: torch.Tensor, layout: Layout):
    """Each token's predecessor minus the token, and what the next segment's first token will look back on.

    Args: x (B, T, C); before (B, C), the token before the first.
    Returns: difference (B, T, C); last (B, C), before any answer, `before` itself where a row is empty.
    """
    extended = torch.cat([before.unsqueeze(1), x], dim=1)     # (B, T + 1, C)
    answer = x.shape[1] - layout.answer                       # its first column
    if layout.lengths is None:
        last = extended[:, answer]
    else:
        last = extended[torch.arange(len(x), device=x.device), layout.lengths]
        if layout.answer:
            extended[:, answer] = last    # in the place of padding
    return extended[:, :-1] - x, last


class TimeMix(nn.Module):
    """Attention's place in RWKV-7: projections, low-rank adapters, and the WKV-7 state (paper, section 4)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, H, N = config.n_embd, config.n_head, config.head_size
        self.layer = layer

        def zeros(*shape):
            return nn.Parameter(torch.zeros(shape))

        def adapter(rank):
            """Of low rank: x -> bias + f(x @ first) @ second."""
            return zeros(1, 1, C), zeros(C, rank), zeros(rank, C)

        # how much of the previous token each projection sees
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (zeros(1, 1, C) for _ in range(6))
        self.w0, self.w1, self.w2 = adapter(config.rank_w)    # decay
        self.a0, self.a1, self.a2 = adapter(config.rank_a)    # in-context learning rate
        self.v0, self.v1, self.v2 = adapter(config.rank_v)    # value residual
        _, self.g1, self.g2 = adapter(config.rank_g)          # gate
        # block 0 has nothing below to mix values with: its copy is in official files but plays no part
        for unused in (self.v0, self.v1, self.v2) if layer == 0 else ():
            unused.requires_grad_(False)

        self.k_k = zeros(1, 1, C)    # key -> removal key
        self.k_a = zeros(1, 1, C)    # how far the learning rate scales the key
        self.r_k = zeros(H, N)       # weight of the bonus for the current token

        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(H, C, eps=HEAD_NORM_EPS)

    def forward(self, x, v_first, before, state, layout: Layout):
        """x, v_first (B, T, C), before (B, C), state (B, H, N, N)
        -> output, v_first (B, T, C), last input (B, C) and state (B, H, N, N) before any answer."""
        B, T, C = x.shape
        H, N = self.r_k.shape

        difference, last = token_shift(x, before, layout)
        xr = torch.addcmul(x, difference, self.x_r)
        xw = torch.addcmul(x, difference, self.x_w)
        xk = torch.addcmul(x, difference, self.x_k)
        xv = torch.addcmul(x, difference, self.x_v)
        xa = torch.addcmul(x, difference, self.x_a)
        xg = torch.addcmul(x, difference, self.x_g)

        r = self.receptance(xr)
        k = self.key(xk)
        v = self.value(xv)
        # decay w = exp(-exp(-0.5) sigmoid(.)), in [0.545, 1): its logarithm is what the operator takes
        log_w = -math.exp(-0.5) * torch.sigmoid(self.w0 + torch.tanh(xw @ self.w1) @ self.w2)
        learning_rate = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        if self.layer == 0:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)

        removal_key = F.normalize((k * self.k_k).view(B, T, H, N), dim=-1, eps=1e-12)
        k = k * (1 + (learning_rate - 1) * self.k_a)
        if layout.padding is not None:
            # decay 1, nothing removed, nothing written: the state passes a padding position untouched
            log_w = log_w.masked_fill(layout.padding, 0)
            k = k.masked_fill(layout.padding, 0)
            removal_key = removal_key.masked_fill(layout.padding.unsqueeze(-1), 0)

        def heads(z):
            return z.to(r.dtype).view(B, T, H, N)

        r, k, v_heads = heads(r), heads(k), heads(v)
        a = heads(-removal_key)
        b = heads(removal_key * learning_rate.view(B, T, H, N))
        inputs = r, log_w.view(B, T, H, N), k, v_heads, a, b
        if layout.answer:
            # the answers read on from the state, and leave it as it is
            columns = [T - layout.answer, layout.answer]
            inputs, answers = zip(*(z.split(columns, dim=1) for z in inputs))
            y, state = wkv(*inputs, state)
            y = torch.cat([y, wkv(*answers, state)[0]], dim=1)
        else:
            y, state = wkv(*inputs, state)

        y = self.ln_x(y.reshape(B * T, C)).view(B, T, C)
        bonus = (r * k * self.r_k).sum(dim=-1, keepdim=True) * v_heads    # (B, T, H, N)
        return self.output((y + bonus.view(B, T, C)) * gate), v_first, last, state


class ChannelMix(nn.Module):
    """Two layers on each token, with a squared ReLU (paper, section 4)."""

    def __init__(self, config: Config):
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(1, 1, config.n_embd))
        self.key = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.value = nn.Linear(config.n_ffn, config.n_embd, bias=False)

    def forward(self, x, before, layout: Layout):
        """x (B, T, C), before (B, C) -> output (B, T, C), last input (B, C) before any answer."""
        difference, last = token_shift(x, before, layout)
        k = self.key(torch.addcmul(x, difference, self.x_k))
        return self.value(torch.relu(k).square()), last


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)    # of the embedding
        self.ln1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.ln2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(self, x, v_first, state: LayerState, layout: Layout):
        mixed, v_first, time_shift, wkv_state = self.att(self.ln1(x), v_first, state.time_shift, state.wkv,
                                                         layout)
        x = x + mixed
        mixed, channel_shift = self.ffn(self.ln2(x), state.channel_shift, layout)
        return x + mixed, v_first, LayerState(time_shift, wkv_state, channel_shift)


def read_tensors(path):
    """A file's state dict of dense float tensors, on the CPU. Nothing in the file is executed.

    Raises FileNotFoundError, or ValueError that names file and fault.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give the path of an official RWKV-7 .pth")
    try:
        data = path.read_bytes()
        weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:    # torch raises half a dozen types here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint, is it whole? ({reason[:160]})") from error

    def is_plain(name, value) -> bool:
        is_tensor = isinstance(name, str) and isinstance(value, torch.Tensor)
        return (is_tensor and value.is_floating_point() and value.layout == torch.strided
                and not value.is_meta)

    if not isinstance(weights, dict) or not all(is_plain(*item) for item in weights.items()):
        raise ValueError(f"{path}: not a state dict of dense float tensors, so not an RWKV-7 checkpoint")
    return weights, hashlib.sha256(data).hexdigest()


def pick(logits, temperature: float, top_p: float, random: torch.Generator | None) -> torch.Tensor:
    """Each row's next token, (B, V) -> (B,): the likeliest at temperature 0, else drawn from the nucleus."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, tokens = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    # the nucleus: the likeliest tokens up to and including the one at which their sum reaches top_p
    outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
    drawn = torch.multinomial(probabilities.masked_fill(outside, 0), 1, generator=random)    # (B, 1)
    return tokens.gather(1, drawn).squeeze(1)


class RWKV7(nn.Module):
    """The language model: `hidden, state = model(tokens)`, `model.head(hidden)` where logits are needed."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.sha256 = None
        # True: recompute each block in the backward, for a fraction of the memory
        self.checkpoint_activations = False
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def empty_state(self, batch: int) -> list[LayerState]:
        """What every layer remembers before the first token: nothing."""
        config, like = self.config, self.ln_out.weight
        shift = like.new_zeros(batch, config.n_embd)
        matrix = like.new_zeros(batch, config.n_head, config.head_size, config.head_size, dtype=torch.float32)
        return [LayerState(shift, matrix, shift)] * config.n_layer

    def forward(self, tokens, state=None, lengths=None, seed: SeedHook | None = None, answer=None):
        """Read T more tokens of each row.

        Args:
            tokens: (B, T) int64, right-padded with any valid id where `lengths` is given.
            state: what the layers remember, as returned by an earlier call; None before the first token.
            lengths: (B,) int64, each row's own tokens, 0 to T (at least 1 with `seed`), or None for T
                everywhere. Results and states are as if the row stood alone; padding has no meaning.
            seed: see SeedHook; asked for every layer from 1 on. Its answer replaces the layer's wkv.
            answer: (tokens (B, A) int64, lengths (B,)) that follow each row's own tokens, to be read in the
                same pass, as a second call would from the returned state; or None. With `lengths` only.

        Returns: hidden (B, T, C) after `ln_out`, or (B, T + A, C); state, a list of LayerState, after each
            row's last token and before its answer, of which neither it nor a seed knows anything.
        Raises: ValueError if tokens is not (B, T) with T > 0.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (B, T) with at least one token, not {tuple(tokens.shape)}")
        B, T = tokens.shape
        rows = torch.arange(B, device=tokens.device)
        if state is None:
            state = self.empty_state(B)
        last = torch.full_like(rows, T - 1) if lengths is None else lengths - 1
        padding = None if lengths is None else beyond(T, lengths)
        if answer is not None:
            answer_tokens, answer_lengths = answer
            padding = torch.cat([padding, beyond(answer_tokens.shape[1], answer_lengths)], dim=1)
            tokens = torch.cat([tokens, answer_tokens], dim=1)
        layout = Layout(lengths, padding, answer=tokens.shape[1] - T)

        x = self.blocks[0].ln0(self.emb(tokens))
        v_first = None
        new_state = []
        for layer, block in enumerate(self.blocks):
            before = state[layer]
            if seed is not None and layer > 0:
                seeded = seed(layer, new_state[-1].wkv, x[rows, last])
                if seeded is not None:
                    before = before._replace(wkv=seeded)
            inputs = x, v_first, before, layout
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, v_first, after = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, v_first, after = block(*inputs)
            new_state.append(after)
        return self.ln_out(x), new_state

    @classmethod
    def load(cls, path: str | Path) -> "RWKV7":
        """Read an official .pth (any release, bf16 or fp32, from any device) into fp32 parameters on the CPU.

        Nothing in the file is executed. Raises FileNotFoundError, or ValueError that names file and fault.
        """
        weights, sha256 = read_tensors(path)
        try:
            config = Config.from_weights(weights)
            with torch.device("meta"):    # shapes only: the file's tensors become the parameters
                model = cls(config)
        except (KeyError, IndexError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"{path}: not an RWKV-7 (x070) checkpoint: no sizes from {error}") from error

        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for name in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"):
            weights.setdefault(name, torch.zeros(expected[name]))
        wrong = [f"{name} is missing" for name in expected if name not in weights]
        wrong += [f"{name} is unknown" for name in weights if name not in expected]
        wrong += [f"{name} is {tuple(weights[name].shape)}, not {tuple(shape)}"
                  for name, shape in expected.items() if name in weights and weights[name].shape != shape]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"{path}: not an RWKV-7 (x070) checkpoint: {'; '.join(wrong[:3])}{more}")
        # copies: tensors that share memory in the file, as a tied head may, become parameters of their own
        weights = {name: weights.pop(name).to(torch.float32, copy=True).contiguous() for name in expected}
        model.load_state_dict(weights, assign=True)
        model.sha256 = sha256
        return model

    def save(self, path: str | Path) -> None:
        """Write an official-format .pth of fp32 CPU tensors, whole or not at all: `load` gives its bits."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_tensors(weights, path)

    @classmethod
    @torch.no_grad()
    def init(cls, config: Config, seed: int = 0) -> "RWKV7":
        """A fresh model with the published initialisation (RWKV-LM, RWKV-v7/train_temp/src/model.py)."""
        random = torch.Generator().manual_seed(seed)
        model = cls(config)
        C, N, L, V = config.n_embd, config.head_size, config.n_layer, config.vocab_size
        channel = torch.arange(C) / C                            # 0 .. 1
        linear = torch.arange(C) / max(C - 1, 1) - 0.5           # -0.5 .. 0.5
        zigzag = (torch.arange(C) % N - (N - 1) / 2) / max((N - 1) / 2, 0.5)
        zigzag = zigzag * zigzag.abs()                           # -1 .. 1 within each head

        def orthogonal(tensor, gain=1.0):
            nn.init.orthogonal_(tensor, gain=gain, generator=random)

        nn.init.uniform_(model.emb.weight, -1e-4, 1e-4, generator=random)
        orthogonal(model.head.weight, 0.5 * math.sqrt(V / C) if V > C else 0.5)
        for layer, block in enumerate(model.blocks):
            depth = layer / max(L - 1, 1)        # 0 in the first block, 1 in the last
            shallow = 1 - layer / L              # 1 in the first block, almost 0 in the last
            att, ffn = block.att, block.ffn
            mixes = (att.x_r, att.x_w, att.x_k, att.x_v, att.x_a, att.x_g)
            for mix, power in zip(mixes, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
                mix.copy_((1 - channel ** (power * shallow)).view(1, 1, C))
            ffn.x_k.copy_((1 - channel ** (shallow ** 4)).view(1, 1, C))
            att.w0.copy_((-6 + 6 * (linear + 0.5) ** (1 + depth ** 0.3) + 0.5 + 2.5 * zigzag).view(1, 1, C))
            att.a0.copy_((-0.19 + 0.3 * zigzag + 0.4 * linear).view(1, 1, C))
            att.v0.copy_((0.73 - 0.4 * linear).view(1, 1, C))
            # the adapters' first matrices stay zero, so that they start silent
            for second in (att.w2, att.a2, att.v2, att.g2):
                orthogonal(second, 0.1 * max(1.0, math.sqrt(second.shape[0] / second.shape[1])))
            att.k_k.copy_((0.71 - 0.1 * linear).view(1, 1, C))
            att.k_a.fill_(1.02)
            att.r_k.fill_(-0.04)
            orthogonal(att.receptance.weight)
            orthogonal(att.key.weight, 0.1)
            orthogonal(att.value.weight)
            orthogonal(ffn.key.weight)
            nn.init.zeros_(att.output.weight)
            nn.init.zeros_(ffn.value.weight)
            att.ln_x.weight.fill_(((1 + layer) / L) ** 0.7)
        return model

    generate = lambda self, *a, **k: _generate(self, *a, **k)


@torch.no_grad()
def _generate(model, logits, state, max_new: int, *, temperature=0.0, top_p=1.0, stop=(), random=None):
    """Continue every row of a batch from the state in which its prompt ended.

    Args: logits (B, V) of the first new token; state, from fs.prefill; max_new, tokens to write; temperature,
        0 for greedy; top_p, in (0, 1], the share of the probability to draw from; stop, token ids: once every
        row has written one, decoding ends; random, a torch.Generator on the model's device.
    Returns: (B, at most max_new) int64.
    """
    new = [pick(logits, temperature, top_p, random)]
    stopped = torch.zeros_like(new[0], dtype=torch.bool)
    while len(new) < max_new:
        for token in stop:
            stopped |= new[-1] == token
        if stop and stopped.all():
            break
        hidden, state = model(new[-1].unsqueeze(1), state=state)
        new.append(pick(model.head(hidden[:, -1]), temperature, top_p, random))
    return torch.stack(new, dim=1)
