"""RWKV-7 "Goose" (x070), exactly as published, small enough to read from top to bottom.

References:
  the paper, "RWKV-7 Goose with Expressive Dynamic State Evolution", https://arxiv.org/abs/2503.14456
  the official code, https://github.com/BlinkDL/RWKV-LM (RWKV-v7/rwkv_v7_numpy.py is the model in 100 lines)

A block is a time mix, in which tokens talk to each other through a matrix state, and a channel mix, in which
the channels of one token talk to each other. Both first blend each token with its left neighbour, which is
called the token shift. Everything reads from left to right. Parameters carry the official names, so that a
state_dict is an official checkpoint. Of Future-Seed this file knows one hook, `seed_state`, which may choose
the state that a layer starts from.

The names in the code, beside the letters and the equations of the paper (section 4):

  code           paper         what it is                                                     equation
  x_r ... x_g    mu            how much of its left neighbour each input of a token sees      3
  r              r             receptance, with which a token reads the state                 13
  w0, w1, w2     d, w          decay of the state, channel by channel                         11, 12
  k              k, k tilde    key; once the learning rate has scaled it, the replacement key 5, 7
  v              v             value, which a token writes under its key                      9, 10
  a0, a1, a2     a             in-context learning rate                                       4
  v0, v1, v2     nu            value residual: how much of block 0's value replaces the own   8, 10
  g1, g2         g             gate on what was read                                          14
  k_k            xi            makes the removal key (kappa) from the key                     6, 15
  k_a            alpha         how far the learning rate scales the key                       7
  r_k            rho           weighs the bonus for the current token                         20
  ln_x           LayerNorm     normalises what each head has read                             21
  output         W_o           from the heads back to the residual stream                     22
  ffn            mu', W', ReLU the channel mix                                                23, 24

The recurrence of the state (equations 16, 17) is wkv.py's. Its operands a and b are made here: a is minus the
removal key, and b is the removal key times the learning rate.

Shapes: B batch rows, T tokens, A tokens of an answer read in the same pass, P = T + A columns of that pass,
C channels (n_embd), H heads, N head size (C = H N), L layers, V vocabulary entries.
"""

import functools
import hashlib
import math
import os
import pickle
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wkv import wkv


@dataclass(frozen=True)
class Config:
    """The sizes of a model: `published` computes them by the official rules, `from_weights` reads them."""

    n_layer: int       # L, blocks
    n_embd: int        # C, channels of the residual stream
    head_size: int     # N, side of each head's state matrix
    vocab_size: int    # V
    n_ffn: int         # width inside the channel mix
    rank_w: int        # of the decay's low-rank adapter
    rank_a: int        # of the in-context learning rate's
    rank_v: int        # of the value residual's
    rank_g: int        # of the output gate's

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size

    @classmethod
    def published(cls, n_layer=12, n_embd=768, head_size=64, vocab_size=65536) -> "Config":
        """The official sizes for a depth and a width; the defaults are the 0.1b model (191 M parameters)."""
        def rank(factor: float) -> int:
            return max(32, 32 * round(factor * math.sqrt(n_embd) / 32))

        return cls(n_layer, n_embd, head_size, vocab_size, n_ffn=4 * n_embd,
                   rank_w=rank(2.5), rank_a=rank(2.5), rank_v=rank(1.7), rank_g=rank(5.0))

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> "Config":
        """Read the sizes off an official state dict. KeyError or ValueError where they cannot be had."""
        n_layer = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        vocab_size, n_embd = weights["emb.weight"].shape
        n_head, head_size = weights["blocks.0.att.r_k"].shape
        if n_head * head_size != n_embd:
            raise ValueError(f"{n_head} heads of {head_size} for {n_embd} channels")
        # block 0 has no use for a value residual, and some files leave it out there: so block 1 is asked
        value_residual = f"blocks.{min(1, n_layer - 1)}.att.v1"
        rank_v = 32
        if n_layer > 1 or value_residual in weights:
            rank_v = weights[value_residual].shape[1]
        return cls(n_layer, n_embd, head_size, vocab_size,
                   n_ffn=weights["blocks.0.ffn.key.weight"].shape[0],
                   rank_w=weights["blocks.0.att.w1"].shape[1],
                   rank_a=weights["blocks.0.att.a1"].shape[1],
                   rank_v=rank_v,
                   rank_g=weights["blocks.0.att.g1"].shape[1])


class LayerState(NamedTuple):
    """All that one layer remembers of the tokens before."""

    time_shift: Tensor       # (B, C), the time mix's input at the last token
    wkv: Tensor              # (B, H, N, N) fp32, [value, key]
    channel_shift: Tensor    # (B, C), the channel mix's input at the last token


torch.serialization.add_safe_globals([LayerState])    # torch.load reads back a state that torch.save wrote


# ---- the columns of a batch, and the token shift -----------------------------------------------------------
#
# Rows of different lengths are padded on the right. An answer may be read in the same pass as its prompt, in
# columns of its own behind all prompts, because Future-Seed treats the two differently:
#
#            T columns          A columns
#     row 0  p p p p p p p p    a a a        p  a token of the prompt
#     row 1  p p p . . . . .    a a .        a  a token of the answer
#     row 2  p p p p p . . .    a . .        .  padding
#
# In both kinds of state a row must be as if it stood alone. For the token shift, a token's left neighbour is
# the column to its left, with one exception: the left neighbour of a row's first answer token is the row's
# last prompt token, and not the padding between the two. The wkv state passes the padding unchanged, so that
# after the T columns it is every row's state at the end of its prompt. That is the state that a pass returns,
# and the one that the answers start from. Padding behind an answer needs no care: nothing comes after it.

class Columns(NamedTuple):
    """Which of the P = T + A columns hold what. Where no row is padded, the last three are None: then nothing
    has to be masked or gathered, and a small model's time on a GPU goes by the number of operations."""

    T: int
    A: int
    rows: Tensor | None       # (B,), 0 to B - 1: `x[rows, lengths - 1]` is x at each row's last prompt token
    lengths: Tensor | None    # (B,), how many of the T columns are each row's own
    padding: Tensor | None    # (B, P, 1), True where the T columns hold padding


def columns_of(tokens: Tensor, lengths: Tensor | None, answer: Tensor | None) -> Columns:
    """tokens (B, T), lengths (B,) or None, answer (B, A) or None."""
    B, T = tokens.shape
    A = 0 if answer is None else answer.shape[1]
    # lengths on a GPU are believed: to look at them would be to wait until the GPU has caught up
    if lengths is not None and lengths.device.type == "cpu" and (lengths == T).all():
        lengths = None
    if lengths is None:
        return Columns(T, A, None, None, None)
    lengths = lengths.to(tokens.device, torch.long)
    rows = torch.arange(B, device=tokens.device)
    column = torch.arange(T + A, device=tokens.device).view(-1, 1)
    padding = (column < T) & (column >= lengths.view(B, 1, 1))
    return Columns(T, A, rows, lengths, padding)


def token_shift(x: Tensor, before: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """How each token differs from its left neighbour, and the input to remember for the next call.

    Args: x (B, P, C); before (B, C), the left neighbour of each row's first token.
    Returns: neighbour minus token (B, P, C); x at each row's last prompt token (B, C), or `before` if none.
    """
    extended = torch.cat([before.unsqueeze(1), x], dim=1)    # column i holds the left neighbour of x[:, i]
    if columns.padding is None:
        # a copy: a view would keep all of `extended` alive for as long as somebody keeps the state
        last = extended[:, columns.T].clone()
    else:
        last = extended[columns.rows, columns.lengths]
        if columns.A > 0:
            extended[:, columns.T] = last
    return extended[:, :-1] - x, last


# ---- the model ---------------------------------------------------------------------------------------------

def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class TimeMix(nn.Module):
    """Attention's place in RWKV-7: projections, low-rank adapters, and the WKV-7 state (section 4.1)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, H, N = config.n_embd, config.n_head, config.head_size
        self.layer = layer
        self.x_r = zeros(1, 1, C)
        self.x_w = zeros(1, 1, C)
        self.x_k = zeros(1, 1, C)
        self.x_v = zeros(1, 1, C)
        self.x_a = zeros(1, 1, C)
        self.x_g = zeros(1, 1, C)
        # low-rank adapters (equation 2): bias + f(x @ first) @ second
        self.w0, self.w1, self.w2 = zeros(1, 1, C), zeros(C, config.rank_w), zeros(config.rank_w, C)
        self.a0, self.a1, self.a2 = zeros(1, 1, C), zeros(C, config.rank_a), zeros(config.rank_a, C)
        self.v0, self.v1, self.v2 = zeros(1, 1, C), zeros(C, config.rank_v), zeros(config.rank_v, C)
        self.g1, self.g2 = zeros(C, config.rank_g), zeros(config.rank_g, C)    # the gate has no bias
        if layer == 0:
            # there is no block below whose values could be mixed in: official files hold these three, idle
            for idle in (self.v0, self.v1, self.v2):
                idle.requires_grad_(False)
        self.k_k = zeros(1, 1, C)
        self.k_a = zeros(1, 1, C)
        self.r_k = zeros(H, N)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(H, C, eps=64e-5)    # the official eps, at every head size

    def forward(self, x, v_first, before: LayerState, columns: Columns):
        """The time mix of all P columns. Numbers in brackets are the paper's equations. The official lines
        are `time_mixing` in rwkv_v7_numpy.py, for one token, and RWKV_Tmix_x070 in rwkv_v7_demo.py.

        Args: x (B, P, C), normalised; v_first (B, P, C), block 0's values, None in block 0 itself.
        Returns: output (B, P, C); v_first (B, P, C); at the end of each row's prompt the input (B, C) and the
            wkv state (B, H, N, N).
        """
        B, P, C = x.shape
        H, N = self.r_k.shape
        difference, last = token_shift(x, before.time_shift, columns)
        mixes = torch.stack([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g])  # (6, 1, 1, C)
        mixed = torch.addcmul(x, difference, mixes)                                    # (6, B, P, C), (3)
        if torch.is_autocast_enabled(x.device.type):
            # once for all six, where autocast would convert each input of each product by itself
            mixed = mixed.to(torch.get_autocast_dtype(x.device.type))
        xr, xw, xk, xv, xa, xg = mixed                                                 # (B, P, C) each

        r = self.receptance(xr)                                                        # (13)
        k = self.key(xk)                                                               # (5)
        v = self.value(xv)                                                             # (9)
        # (11, 12): the decay w is exp(-exp(-0.5) sigmoid(.)), in [0.545, 1); the operator takes its logarithm
        log_w = -math.exp(-0.5) * torch.sigmoid(self.w0 + torch.tanh(xw @ self.w1) @ self.w2)
        learning_rate = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)              # (4)
        gate = torch.sigmoid(xg @ self.g1) @ self.g2                                   # (14)
        if self.layer == 0:
            v_first = v
        else:
            # (8, 10) as in the official code; (10) is printed with v and v_first in each other's place
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)

        removal_key = F.normalize((k * self.k_k).view(B, P, H, N), dim=-1, eps=1e-12)  # (6, 15)
        k = k * (1 + (learning_rate - 1) * self.k_a)                                   # (7)
        if columns.padding is not None:
            # decay 1, nothing removed, nothing written: the state passes a padding position untouched
            log_w = log_w.masked_fill(columns.padding, 0)
            k = k.masked_fill(columns.padding, 0)
            removal_key = removal_key.masked_fill(columns.padding.unsqueeze(-1), 0)

        def heads(z):
            # under autocast, sums with fp32 parameters have made some of these fp32: back to the type of r
            return z.to(r.dtype).view(B, P, H, N)

        r, k, v = heads(r), heads(k), heads(v)                                         # (B, P, H, N) each
        a = heads(-removal_key)                                                        # (B, P, H, N)
        b = heads(removal_key * learning_rate.view(B, P, H, N))                        # (B, P, H, N)
        log_w = log_w.view(B, P, H, N)    # stays fp32: the operator sums it over many tokens
        operands = (r, log_w, k, v, a, b)
        # the recurrence (16, 17), and what r reads (21); the state is (B, H, N, N)
        if columns.A == 0:
            y, state = wkv(*operands, before.wkv)                                      # (B, P, H, N)
        else:
            pieces = [z.split([columns.T, columns.A], dim=1) for z in operands]
            prompt = [piece[0] for piece in pieces]
            answer = [piece[1] for piece in pieces]
            y, state = wkv(*prompt, before.wkv)                                        # (B, T, H, N)
            y_answer, _ = wkv(*answer, state)                                          # (B, A, H, N)
            y = torch.cat([y, y_answer], dim=1)                                        # (B, P, H, N)
        y = self.ln_x(y.reshape(B * P, C)).view(B, P, C)                               # (21)
        bonus = (r * k * self.r_k).sum(dim=-1, keepdim=True) * v                       # (B, P, H, N), (20)
        output = self.output((y + bonus.view(B, P, C)) * gate)                         # (22)
        return output, v_first, last, state


class ChannelMix(nn.Module):
    """Two layers on each token, with a squared ReLU (section 4.2; the official `channel_mixing`)."""

    def __init__(self, config: Config):
        super().__init__()
        self.x_k = zeros(1, 1, config.n_embd)
        self.key = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.value = nn.Linear(config.n_ffn, config.n_embd, bias=False)

    def forward(self, x, before, columns: Columns):
        """x (B, P, C), before (B, C) -> output (B, P, C), input at the end of each row's prompt (B, C)."""
        difference, last = token_shift(x, before, columns)
        k = torch.relu(self.key(torch.addcmul(x, difference, self.x_k)))    # (B, P, n_ffn), (23)
        return self.value(k * k), last                                      # (24)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)    # of the embedding; the model applies it
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(self, x, v_first, before: LayerState, columns: Columns):
        """x (B, P, C) -> x (B, P, C), v_first (B, P, C), this layer's state at the end of each prompt."""
        mixed, v_first, time_shift, wkv_state = self.att(self.ln1(x), v_first, before, columns)
        x = x + mixed
        mixed, channel_shift = self.ffn(self.ln2(x), before.channel_shift, columns)
        return x + mixed, v_first, LayerState(time_shift, wkv_state, channel_shift)


class RWKV7(nn.Module):
    """The language model: `hidden, state = model(tokens)`, `model.head(hidden)` where logits are needed."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.sha256: str | None = None    # of the file that it was loaded from
        self.checkpoint_activations = False    # True: recompute each block in the backward, to save memory
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def empty_state(self, batch: int) -> list[LayerState]:
        """What every layer remembers before the first token: nothing."""
        config, like = self.config, self.ln_out.weight
        shift = like.new_zeros(batch, config.n_embd)
        matrix = like.new_zeros(batch, config.n_head, config.head_size, config.head_size, dtype=torch.float32)
        return [LayerState(shift, matrix, shift)] * config.n_layer

    def forward(self, tokens, state=None, lengths=None, seed_state=None, answer=None):
        """Read T more tokens of each row.

        Args:
            tokens: (B, T) int64, right-padded with any valid id where `lengths` is given.
            state: what the layers remember, as returned by an earlier call; None before the first token.
            lengths: (B,) integers, each row's own tokens, 0 to T (at least 1 with `seed_state`), or None for
                T everywhere. Results and states are as if the row stood alone. Lengths on the CPU, where they
                may stay when the tokens are on a GPU, are checked, and cost nothing where no row is padded.
            seed_state: a hook, called for every layer from 1 on as seed_state(layer, below, x_last), with the
                terminal wkv of the layer below (B, H, N, N) and this layer's input at each row's last token
                (B, C). Returns the wkv that the layer starts from, or None for zero. Not beside `state`.
            answer: (B, A) int64, right-padded tokens that follow each row's own, to be read in the same pass,
                as a second call would from the returned state; or None.

        Returns: hidden (B, T, C) after `ln_out`, or (B, T + A, C) with an answer; and the state, a list of
            LayerState, after each row's last token and before its answer. No answer token has a part in it,
            or in a seed state.
        Raises: ValueError, in one line, where the arguments do not fit each other or this model.
        """
        check_fit(self.config, tokens, state, lengths, seed_state, answer)
        columns = columns_of(tokens, lengths, answer)
        if state is None:
            state = self.empty_state(len(tokens))
        if answer is not None:
            tokens = torch.cat([tokens, answer], dim=1)    # (B, P)

        x = self.blocks[0].ln0(self.emb(tokens))    # (B, P, C)
        v_first, new_state = None, []
        for layer, block in enumerate(self.blocks):
            before = state[layer]
            if seed_state is not None and layer > 0:
                if columns.padding is None:
                    x_last = x[:, columns.T - 1]
                else:
                    x_last = x[columns.rows, columns.lengths - 1]
                start = seed_state(layer, new_state[-1].wkv, x_last)    # (B, H, N, N)
                if start is not None:
                    before = before._replace(wkv=start)
            inputs = (x, v_first, before, columns)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, v_first, after = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, v_first, after = block(*inputs)
            new_state.append(after)
        return self.ln_out(x), new_state

    def logits(self, hidden: Tensor) -> Tensor:
        """`model.head` outside autocast: hidden (..., C) -> (..., V) in the type of the weights.

        Rounded to bf16, the two likeliest options of a question tie exactly in one answer of a hundred.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype))

    @torch.inference_mode()
    def generate(self, logits, state, max_new, done=None) -> Tensor:
        """Continue every row, greedily, from the state in which its prompt ended.

        Args: logits (B, V) of the first new token; state, of `forward` or fs.prefill; done, called with what
            is written so far, (B, n), after every token: decoding ends where it returns True.
        Returns: (B, at most max_new) int64.
        """
        new = logits.new_zeros((len(logits), 0), dtype=torch.long)
        while new.shape[1] < max_new:
            if new.shape[1] > 0:
                hidden, state = self(new[:, -1:], state)
                logits = self.logits(hidden[:, -1])
            new = torch.cat([new, logits.argmax(dim=-1, keepdim=True)], dim=1)
            if done is not None and done(new):
                break
        return new

    @classmethod
    def load(cls, path: str | Path) -> "RWKV7":
        """Read an official .pth of any float type into fp32 parameters on the CPU.

        A prefix that all names share (`module.`, `_orig_mod.`) is dropped. Raises as read_tensors, and
        ValueError, with the reason in one line, for a file of tensors that is no RWKV-7.
        """
        tensors, sha256 = read_tensors(path)
        tensors = without_common_prefix(tensors)
        check_kind(path, tensors)
        # copies: tensors that share memory in the file, as a tied head may, become parameters of their own
        weights = {name: x.detach().to(torch.float32, copy=True).contiguous() for name, x in tensors.items()}
        try:
            with torch.device("meta"):    # shapes only: the file's tensors become the parameters
                model = cls(Config.from_weights(weights))
            for idle in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"):    # a file may be without
                weights.setdefault(idle, torch.zeros(model.get_parameter(idle).shape))
            model.load_state_dict(weights, assign=True)
        except KeyError as error:
            raise ValueError(f"{path}: not an RWKV-7 (x070) checkpoint: it has no {error.args[0]}") from error
        except (IndexError, ValueError, RuntimeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: not an RWKV-7 (x070) checkpoint: {reason}") from error
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not parameter.sum().isfinite():
                raise ValueError(f"{path}: {name} holds NaN or infinity")
        model.sha256 = sha256
        return model

    def save(self, path: str | Path) -> None:
        """Write an official-format .pth of CPU tensors, whole or not at all. `load` gives the same bits.

        Raises OSError, which names the path, where it cannot be written.
        """
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_pt(weights, path)

    @classmethod
    @torch.no_grad()
    def init(cls, config: Config, seed: int = 0) -> "RWKV7":
        """A fresh model with the published initialisation (RWKV-LM, RWKV-v7/train_temp/src/model.py)."""
        rng = torch.Generator().manual_seed(seed)
        model = cls(config)
        C, N, L, V = config.n_embd, config.head_size, config.n_layer, config.vocab_size
        channel = torch.arange(C) / C                            # 0 .. 1
        linear = torch.arange(C) / max(C - 1, 1) - 0.5           # -0.5 .. 0.5
        zigzag = (torch.arange(C) % N - (N - 1) / 2) / max((N - 1) / 2, 0.5)
        zigzag = zigzag * zigzag.abs()                           # -1 .. 1 within each head
        orthogonal = functools.partial(nn.init.orthogonal_, generator=rng)

        nn.init.uniform_(model.emb.weight, -1e-4, 1e-4, generator=rng)
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


def rwkv_state(state: list[LayerState]) -> list[Tensor]:
    """A state of one row as the `rwkv` package (RWKV_x070) keeps it, which can read on from there.

    Returns: 3 L tensors, for each layer the time shift (C,), the wkv state (H, N, N) fp32 [value, key], and
        the channel shift (C,). They are copies, for in CUDA that package writes into the wkv state it is
        given. Its strategies in fp16 and bf16 want the shifts in that type.
    Raises: ValueError unless the state is of exactly one row.
    """
    tensors = []
    for layer in state:
        rows = len(layer.wkv)
        if rows != 1:
            raise ValueError(f"the rwkv package keeps one row, and this state holds {rows}")
        tensors.append(layer.time_shift[0].detach().clone())
        tensors.append(layer.wkv[0].detach().to(torch.float32, copy=True))
        tensors.append(layer.channel_shift[0].detach().clone())
    return tensors


def check_fit(config: Config, tokens, state, lengths, seed_state, answer) -> None:
    """Raise ValueError where the arguments of RWKV7.forward do not fit each other or the model.

    Shapes cost nothing to look at. Values are looked at on the CPU only: see columns_of.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError("tokens must be (B, T) integers, with at least one token a row, not "
                         f"{tuple(tokens.shape)} of {tokens.dtype}")
    for name, ids in (("tokens", tokens), ("answer", answer)):
        # torch's own error has no number in it
        if ids is not None and ids.device.type == "cpu" and ids.numel() > 0:
            low, high = (end.item() for end in ids.aminmax())
            if low < 0 or high >= config.vocab_size:
                raise ValueError(f"{name} must be 0 to {config.vocab_size - 1}, as the model's vocabulary "
                                 f"is, not {low} to {high}")
    B, T = tokens.shape
    if answer is not None and (answer.ndim != 2 or len(answer) != B):
        raise ValueError(f"answer must be ({B}, A), a row for each row of tokens, not {tuple(answer.shape)}")
    if lengths is not None:
        if lengths.shape != (B,) or lengths.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"lengths must be ({B},) integers, one for each row of tokens, not "
                             f"{tuple(lengths.shape)} of {lengths.dtype}")
        least = 0 if seed_state is None else 1    # without a token there is no end to be seeded from
        if lengths.device.type == "cpu" and not ((lengths >= least) & (lengths <= T)).all():
            raise ValueError(f"lengths must be {least} to {T}, not {lengths.min()} to {lengths.max()}")
    if state is not None:
        if seed_state is not None:
            raise ValueError("state and seed_state both say what the layers start from: give one of them")
        if len(state) != config.n_layer:
            raise ValueError(f"the state is of {len(state)} layers, but the model has {config.n_layer}")
        shift, matrix = (B, config.n_embd), (B, config.n_head, config.head_size, config.head_size)
        for layer in state:
            shapes = [tuple(part.shape) for part in layer]
            if shapes != [shift, matrix, shift]:
                raise ValueError(f"a layer's state must be {shift}, {matrix}, {shift} for these tokens, not "
                                 f"{', '.join(map(str, shapes))}")
    # a hook that was made for a model, as an fs.FutureSeed is, has that model's sizes
    made_for = getattr(seed_state, "config", config)
    for size in ("n_layer", "n_embd", "head_size"):
        if getattr(made_for, size) != getattr(config, size):
            raise ValueError(f"seed_state was made for a model with {size} = {getattr(made_for, size)}, but "
                             f"this model has {getattr(config, size)}")


# ---- checkpoint files --------------------------------------------------------------------------------------
#
# A checkpoint may come from anywhere. So nothing in it is executed, nothing larger than the file is unpacked,
# and a file that is no checkpoint of an RWKV-7 is refused in one line that says what it is instead.

# how files begin that people give by mistake: where the bytes stand, the bytes, what the file is, what to do
OTHER_FILES = (
    (0, b"version https://git-lfs", "a git-lfs pointer in the place of the file: fetch it with git lfs pull"),
    (0, b"<", "a web page, not the file: use the download link (on Hugging Face /resolve/, not /blob/)"),
    (0, b"GGUF", "a GGUF file, for llama.cpp: give BlinkDL's .pth of the model"),
    (8, b'{"', "a safetensors file: give BlinkDL's .pth of the model"),
)
# parts of names that an RWKV-7 does not have: what the file is and what to do
OTHER_MODELS = (
    ("lora_", "a LoRA adapter, not a whole model: merge it into its base, and give the merged .pth"),
    ("layers.0.attn.", "an RWKV-7 in Hugging Face's layout: give BlinkDL's .pth of it"),
    ("blocks.0.att.time_maa", "an RWKV-6, not an RWKV-7"),
    ("blocks.0.att.time_mix", "an RWKV-4 or 5, not an RWKV-7"),
    ("blocks.0.att.time_decay", "an RWKV-4 or 5, not an RWKV-7"),
    ("blocks.0.ffn.s_emb", "an RWKV-7 with DeepEmbed (v7a, v7b), whose tables this model does not have"),
)


def read_pt(path: str | Path) -> tuple[object, str]:
    """What torch.save has written to a file, on the CPU, and the file's sha256.

    Raises FileNotFoundError, or ValueError that names file and fault in one line.
    """
    content, sha256, _ = read_pt_of_size(path)
    return content, sha256


def read_pt_of_size(path: str | Path) -> tuple[object, str, int]:
    """As read_pt, and the size of the file in bytes."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; give the path of an official RWKV-7 .pth")
    if not path.is_file():    # a pipe, for one, would be waited for
        raise ValueError(f"{path}: not a regular file")
    with open(path, "rb") as file:
        start = file.read(64)
        for place, signature, reason in OTHER_FILES:
            # a page may begin with blanks or a byte-order mark
            if start[place:].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(signature):
                raise ValueError(f"{path}: {reason}")
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        try:
            too_large = fills_memory(file)
            file.seek(0)    # the file that was looked at: at `path` there may be another by now
            content = None
            if not too_large:
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:    # torch raises half a dozen types here
            raise ValueError(f"{path}: not a PyTorch file of tensors and plain values, or damaged "
                             f"({type(error).__name__})") from error
    if too_large:
        raise ValueError(f"{path}: compressed or made to fill the memory; torch.save writes no such file")
    return content, sha256, size


def fills_memory(file: BinaryIO) -> bool:
    """Whether torch.load could make more of a file than the file's own size."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start, pickles = file.read(2), []
    if start == b"PK":
        # torch.save stores members as they are. A small file of compressed ones could unpack to gigabytes
        archive = zipfile.ZipFile(file)
        unpacked = 0
        for member in archive.infolist():
            unpacked += member.file_size
            if member.compress_type != zipfile.ZIP_STORED or unpacked > size:
                return True
            if member.filename.lower().endswith(".pkl"):
                pickles.append(archive.read(member))
    elif start.startswith(pickle.PROTO):    # as torch.save wrote before version 1.6
        file.seek(0)
        pickles.append(file.read())
    # the one call that torch.load allows and that makes something large of a number
    return any(b"bytearray" in content for content in pickles)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """A file's state dict of dense float tensors, on the CPU, and the file's sha256.

    Training programs wrap it, as in {"state_dict": ...}: the wrapper is dropped. Raises as read_pt.
    """
    tensors, sha256, size = read_pt_of_size(path)
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path}: not a state dict, which is a dict of tensors by name")
    claimed = 0    # with a stride of 0, a few bytes are gigabytes
    for name, x in tensors.items():
        dense = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and x.device.type == "cpu"
        if not dense or not x.is_floating_point():
            raise ValueError(f"{path}: not a state dict: {name[:80]!r} is no dense float tensor")
        claimed += x.numel() * x.element_size()
    if claimed > 2 * size:    # twice: a head that is tied to the embedding is in the file once
        raise ValueError(f"{path}: its tensors are larger than the file")
    return tensors, sha256


def without_common_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under official names, where a prefix before all of them is all that differs."""
    prefix = os.path.commonprefix(list(tensors))
    if f"{prefix}emb.weight" not in tensors:
        return tensors
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def check_kind(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError, which says what the file is, where its names are known to be another model's."""
    for part, reason in OTHER_MODELS:
        if any(part in name for name in tensors):
            raise ValueError(f"{path}: {reason}")
    states = [name for name in tensors if name.endswith(".att.time_state")]
    if states and len(states) == len(tensors):
        raise ValueError(f"{path}: trained initial states (time_state), not a model: give the model's .pth")
    if states:
        raise ValueError(f"{path}: a model with trained initial states (time_state), which this model would "
                         "have to leave out: give the .pth without them")


def write_pt(value: object, path: str | Path) -> None:
    """torch.save, whole or not at all: until all is on the disk, under a temporary name, `path` keeps what it
    held. Raises OSError, which names `path`, where it cannot be written."""
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(handle, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o644)    # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error.__context__, KeyboardInterrupt):    # torch.save puts its own error over it
            raise error.__context__
        if isinstance(error, (OSError, RuntimeError)):    # torch makes a RuntimeError of a full disk
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0][:80]
            raise OSError(f"{path}: cannot be written ({reason}); what was there before is kept") from error
        raise
