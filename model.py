"""RWKV-7 "Goose" (x070), exactly as published, small enough to read from top to bottom.

References:
  the paper, "RWKV-7 Goose with Expressive Dynamic State Evolution", https://arxiv.org/abs/2503.14456
  the official code, https://github.com/BlinkDL/RWKV-LM (RWKV-v7/rwkv_v7_numpy.py is the model in 100 lines)

A block is a time mix (tokens talk to each other, through a matrix state) and a channel mix (channels of one
token talk to each other). Both first blend each token with the one before it, the token shift. Everything
reads left to right. Parameters carry the official names, so a state_dict is an official checkpoint.
Of Future-Seed this file knows a hook, `seed`, which may choose where a layer's state starts.

The paper's letters (section 4), where the code uses them:
  r  receptance, with which a token reads the state    x_r ... x_g  how much of the token before each sees
  w  decay of the state, channel by channel            w0, w1, w2   its low-rank adapter; a, v and g have one
  k  key and v value, which a token writes             k_k          makes the removal key (kappa) from the key
  a  in-context learning rate; the operator's a is     k_a          how far the learning rate scales the key
     minus the removal key, its b that key times this  r_k          weighs the bonus for the current token
  g  gate on what was read                             ln_x         normalises what each head has read

Shapes: B batch rows, T tokens (A more where answers follow), C channels (n_embd), H heads, N head size
(C = H N), L layers, V vocabulary.
"""

import functools
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files import save_tensors
from wkv import wkv


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
        ranks = (max(32, 32 * round(factor * math.sqrt(n_embd) / 32)) for factor in (2.5, 2.5, 1.7, 5.0))
        return cls(n_layer, n_embd, head_size, vocab_size, 4 * n_embd, *ranks)

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> "Config":
        """Read the sizes off an official state dict. KeyError or ValueError where they cannot be had."""
        n_layer = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        vocab_size, n_embd = weights["emb.weight"].shape
        n_head, head_size = weights["blocks.0.att.r_k"].shape
        if n_head * head_size != n_embd:
            raise ValueError(f"{n_head} heads of {head_size} for {n_embd} channels")
        n_ffn = weights["blocks.0.ffn.key.weight"].shape[0]
        rank_w, rank_a, rank_g = (weights[f"blocks.0.att.{adapter}1"].shape[1] for adapter in "wag")
        # idle in block 0, where a file may leave it out
        rank_v = weights.get(f"blocks.{min(1, n_layer - 1)}.att.v1", torch.empty(0, 32)).shape[1]
        return cls(n_layer, n_embd, head_size, vocab_size, n_ffn, rank_w, rank_a, rank_v, rank_g)


class LayerState(NamedTuple):
    """All that one layer remembers of the tokens before."""

    time_shift: Tensor       # (B, C), the time mix's input at the last token
    wkv: Tensor              # (B, H, N, N) fp32, [value, key]
    channel_shift: Tensor    # (B, C), the channel mix's input at the last token


# The columns of a batch: prompts, and behind them answers where these are read in the same pass.
#
#            T columns          A columns
#     row 0  p p p p p p p p    a a a        p  a token of the prompt
#     row 1  p p p . . . . .    a a x        a  a token of the answer
#     row 2  p p p p p . . .    a x x        .  padding; x  padding too, but nothing comes after it
#
# The token shift looks one column to the left, but from the first a to the row's last p. The wkv state runs
# through the T columns, past padding, and is returned from there; answers start from it and leave no trace.

class Columns(NamedTuple):
    T: int
    A: int
    rows: Tensor | slice        # (B,), all of them; `x[rows, ends - 1]` is at each row's last p
    ends: Tensor | int          # (B,), behind each row's last p; T in every row where nothing is padded
    padding: Tensor | None      # (B, T + A, 1), True at the dots; None where there are none


def token_shift(x: Tensor, before: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """x (B, T + A, C); before (B, C), the predecessor of each row's first token
    -> each token's predecessor minus the token (B, T + A, C), each row's last p (B, C), or `before`."""
    extended = torch.cat([before.unsqueeze(1), x], dim=1)    # a column's predecessor is in the same column
    last = extended[columns.rows, columns.ends]
    if columns.A and columns.padding is not None:
        extended[:, columns.T] = last
    return extended[:, :-1] - x, last


class TimeMix(nn.Module):
    """Attention's place in RWKV-7: projections, low-rank adapters, and the WKV-7 state (paper, section 4)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, H, N = config.n_embd, config.n_head, config.head_size
        self.layer = layer

        def zeros(*shape):
            return nn.Parameter(torch.zeros(shape))

        def adapter(rank):    # of low rank: x -> bias + f(x @ first) @ second
            return zeros(1, 1, C), zeros(C, rank), zeros(rank, C)

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
        self.receptance, self.key, self.value, self.output = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(H, C, eps=64e-5)    # the official value at every head size

    def forward(self, x, v_first, before: LayerState, columns: Columns):
        """x, v_first (B, T, C); T counts the answers too, columns.T does not
        -> output, v_first (B, T, C); last input (B, C) and wkv state (B, H, N, N) before any answer."""
        B, T, C = x.shape
        H, N = self.r_k.shape
        difference, last = token_shift(x, before.time_shift, columns)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        mixes = torch.stack([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g])    # (6, 1, 1, C)
        xr, xw, xk, xv, xa, xg = torch.addcmul(x, difference, mixes).to(dtype)    # (B, T, C) each

        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # w = exp(-exp(-0.5) sigmoid(.)), in [0.545, 1): the operator takes its logarithm
        log_w = -math.exp(-0.5) * torch.sigmoid(self.w0 + torch.tanh(xw @ self.w1) @ self.w2)
        learning_rate = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        if self.layer == 0:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)

        removal_key = F.normalize((k * self.k_k).view(B, T, H, N), dim=-1, eps=1e-12)
        k = k * (1 + (learning_rate - 1) * self.k_a)
        if columns.padding is not None:
            # decay 1, nothing removed, nothing written: the state passes a padding position untouched
            log_w = log_w.masked_fill(columns.padding, 0)
            k = k.masked_fill(columns.padding, 0)
            removal_key = removal_key.masked_fill(columns.padding.unsqueeze(-1), 0)

        def heads(z):
            return z.to(r.dtype).view(B, T, H, N)

        r, k, v_heads = heads(r), heads(k), heads(v)
        a = heads(-removal_key)
        b = heads(removal_key * learning_rate.view(B, T, H, N))
        inputs = r, log_w.view(B, T, H, N), k, v_heads, a, b
        if columns.A:
            prompts, answers = zip(*(z.split([columns.T, columns.A], dim=1) for z in inputs))
            y, state = wkv(*prompts, before.wkv)
            y = torch.cat([y, wkv(*answers, state)[0]], dim=1)
        else:
            y, state = wkv(*inputs, before.wkv)
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

    def forward(self, x, before, columns: Columns):
        """x (B, T, C), before (B, C) -> output (B, T, C), last input (B, C) before any answer."""
        difference, last = token_shift(x, before, columns)
        k = torch.relu(self.key(torch.addcmul(x, difference, self.x_k)))
        return self.value(k * k), last


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)    # of the embedding
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(self, x, v_first, state: LayerState, columns: Columns):
        mixed, v_first, time_shift, wkv_state = self.att(self.ln1(x), v_first, state, columns)
        x = x + mixed
        mixed, channel_shift = self.ffn(self.ln2(x), state.channel_shift, columns)
        return x + mixed, v_first, LayerState(time_shift, wkv_state, channel_shift)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """A file's state dict of dense float tensors, on the CPU, and the sha256 of the bytes it was made from.

    Nothing in the file is executed. Raises FileNotFoundError, or ValueError that names file and fault.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give the path of an official RWKV-7 .pth")
    content = path.read_bytes()
    try:
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:    # torch raises half a dozen types here
        raise ValueError(f"{path}: not a PyTorch file of tensors alone, or damaged "
                         f"({type(error).__name__})") from error
    if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and type(x) in (Tensor, nn.Parameter) and x.is_floating_point()
            and x.layout == torch.strided and x.device.type == "cpu" for name, x in tensors.items()):
        raise ValueError(f"{path}: not a state dict of dense float tensors")
    # with a stride of 0, a few bytes are gigabytes; a head tied to the embedding is in the sum twice
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > 2 * len(content):
        raise ValueError(f"{path}: its tensors are larger than the file")
    return tensors, hashlib.sha256(content).hexdigest()


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

    def forward(self, tokens, state=None, lengths=None, seed=None, answer=None):
        """Read T more tokens of each row.

        Args:
            tokens: (B, T) int64, right-padded with any valid id where `lengths` is given.
            state: what the layers remember, as returned by an earlier call; None before the first token.
            lengths: (B,) int64, each row's own tokens, 0 to T (at least 1 with `seed`), or None for T
                everywhere, which is faster. Results and states are as if the row stood alone.
            seed: called for every layer from 1 on as seed(layer, below, x_last), with the terminal wkv of the
                layer below (B, H, N, N) and this layer's input at each row's last token (B, C). Returns the
                wkv that the layer starts from, or None for that of `state`.
            answer: (B, A) int64, right-padded tokens that follow each row's own, to be read in the same pass,
                as a second call would from the returned state; or None.

        Returns: hidden (B, T, C) after `ln_out`, or (B, T + A, C); state, a list of LayerState, after each
            row's last token and before its answer, of which neither it nor a seed knows anything.
        Raises: ValueError if tokens is not (B, T) with T > 0.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (B, T) with at least one token, not {tuple(tokens.shape)}")
        B, T = tokens.shape
        state = state or self.empty_state(B)
        if answer is not None:
            tokens = torch.cat([tokens, answer], dim=1)
        rows, ends, padding = slice(None), T, None
        if lengths is not None:
            rows, ends = torch.arange(B, device=tokens.device), lengths
            column = torch.arange(tokens.shape[1], device=tokens.device).view(-1, 1)
            padding = (column < T) & (column >= lengths.view(B, 1, 1))
        columns = Columns(T, tokens.shape[1] - T, rows, ends, padding)

        x = self.blocks[0].ln0(self.emb(tokens))
        v_first, new_state = None, []
        for layer, block in enumerate(self.blocks):
            before = state[layer]
            if seed is not None and layer > 0:
                seeded = seed(layer, new_state[-1].wkv, x[rows, ends - 1])
                if seeded is not None:
                    before = before._replace(wkv=seeded)
            inputs = x, v_first, before, columns
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, v_first, after = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, v_first, after = block(*inputs)
            new_state.append(after)
        return self.ln_out(x), new_state

    def generate(self, logits, state, max_new, stop=()) -> Tensor:
        """Continue every row, greedily, from the state in which its prompt ended.

        Args: logits (B, V) of the first new token; state, of `forward` or fs.prefill; stop, token ids:
            decoding ends once every row has written one. Returns: (B, at most max_new) int64."""
        own = {linear: linear.weight.data for linear in self.modules() if isinstance(linear, nn.Linear)}
        if max_new >= 64 and len(logits) == 1 and logits.device.type == "cpu":
            # a CPU multiplies one row by a matrix that is not wide 1.2 to 1.6 times as fast where it lies
            # transposed in memory: worth 0.2 s, and a copy for as long as this call takes
            for linear, weight in own.items():
                if linear.out_features >= linear.in_features:
                    linear.weight.data = weight.t().contiguous().t()
        try:
            with torch.inference_mode():
                new = [logits.argmax(dim=-1)]
                ends = torch.tensor(stop, dtype=torch.long, device=logits.device)
                stopped = torch.isin(new[0], ends)
                while len(new) < max_new and not (stop and stopped.all()):
                    hidden, state = self(new[-1].unsqueeze(1), state)
                    new.append(self.head(hidden[:, -1]).argmax(dim=-1))
                    stopped |= torch.isin(new[-1], ends)
                return torch.stack(new, dim=1)
        finally:
            for linear, weight in own.items():
                linear.weight.data = weight

    @classmethod
    def load(cls, path: str | Path) -> "RWKV7":
        """Read an official .pth of any float type into fp32 parameters on the CPU. Raises as read_tensors."""
        tensors, sha256 = read_tensors(path)
        names = " ".join(tensors)
        if "model.layers.0.attn." in names:
            raise ValueError(f"{path}: an RWKV-7 in Hugging Face's layout; give BlinkDL's .pth of it")
        if "blocks.0.att.time_" in names:
            raise ValueError(f"{path}: an RWKV-{6 if 'time_maa' in names else '4 or 5'}, not an RWKV-7")
        # copies: tensors that share memory in the file, as a tied head may, become parameters of their own
        weights = {name: x.detach().to(torch.float32, copy=True).contiguous() for name, x in tensors.items()}
        try:
            with torch.device("meta"):    # shapes only: the file's tensors become the parameters
                model = cls(Config.from_weights(weights))
            for idle in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"):    # a file may be without
                weights.setdefault(idle, torch.zeros(model.get_parameter(idle).shape))
            model.load_state_dict(weights, assign=True)
        except (KeyError, IndexError, ValueError, RuntimeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: not an RWKV-7 (x070) checkpoint: {reason}") from error
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not parameter.sum().isfinite():
                raise ValueError(f"{path}: {name} holds NaN or infinity")
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
