"""Future-Seed: let a deeper layer re-read the prompt knowing how it ends, never scanning right to left.

While a prompt is read, layer i starts its WKV state not from zero but from a gated copy of layer i-1's state
at the prompt's END: its seed state. Layer i-1 has finished by then, so nothing is circular, and every scan
still runs left to right:

    layer i-1   0 ──► t₁ ──► t₂ ──► … ──► t_T = S          S has seen the question at the prompt's end
                 ┌───────── gate · norm(S) ◄────┘
    layer i     S₀ ──► t₁ ──► t₂ ──► … ──► t_T              so S₀ tells t₁ what will be asked

    base = S_T of layer i-1                                        (B, H, N, N), [value, key]
    base = stop_gradient(base)                                     if detach
    base = base / max(1e-6, sqrt(mean(base², over N × N)))         if norm, for each batch row and head
    gate = sigmoid(alpha_i) · scale · schedule(i)                  or another gate, see FutureSeed
    S₀   = clip(gate · base, -clip, +clip)                         if clip > 0

Answer tokens start from each layer's state at the end of the prompt, without Future-Seed, so decoding stays
causal.

Reference: the settings are those of the Future-Seed post-training experiment log (rounds R2 to R10, see
rounds.toml). The gate "heads" is from later work of the log's authors, who train it from alpha = 0.
Shapes: B batch rows, T tokens, A tokens of an answer, C channels, H heads, N head size, L layers,
V vocabulary entries.
"""

import math
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Config, RWKV7

SCHEDULES = ("none", "linear", "cosine")
GATES = ("scalar", "head", "heads", "input")


class FutureSeed(nn.Module):
    """Makes the seed states; an instance is the `seed_state` hook of `model.RWKV7.forward`.

    Args:
        config: sizes of the model whose layers are seeded.
        alpha: initial value of every alpha; 0 opens the gate to 0.5, -2 to 0.119, -4 to 0.018.
        layer_start: the first seeded layer, 0-based; layer 0 has none below it, so 0 means 1.
        norm: scale each head's state to root mean square 1.
        detach: keep the gradient from flowing through the seed state into the layer below.
        clip: bound on the seed state's entries; 0 or less for none.
        scale: constant factor on every gate.
        schedule, schedule_min, schedule_max: factor over depth, from min at the first seeded layer to max at
            the last: "none" (1 everywhere), "linear" or "cosine".
        gate: "scalar", the sigmoid of one alpha a layer; "heads", the sigmoid of one alpha a head; "head",
            the product of those two; "input", sigmoid(alpha_i + <x_last, w_i> / sqrt(C) + b_i), where each
            layer has a vector w_i and a number b_i, which start at zero and are always trained.
        train_alpha: train the alphas; otherwise they stay as they start.

    Raises: ValueError naming the setting that is out of range.
    Warns: where no layer of the model would be seeded.
    """

    def __init__(self, config: Config, alpha=-2.0, layer_start=6, norm=True, detach=True, clip=1.0, scale=1.0,
                 schedule="none", schedule_min=1.0, schedule_max=1.0, gate="scalar", train_alpha=False):
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule = {schedule!r}: must be one of {', '.join(SCHEDULES)}")
        if gate not in GATES:
            raise ValueError(f"gate = {gate!r}: must be one of {', '.join(GATES)}")
        numbers = {"alpha": alpha, "clip": clip, "scale": scale, "schedule_min": schedule_min,
                   "schedule_max": schedule_max}
        for name, value in numbers.items():
            if math.isnan(value):
                raise ValueError(f"{name} = {value}: must be a number")
        self.config = config
        self.layer_start = max(1, layer_start)
        if self.layer_start >= config.n_layer:
            warnings.warn(f"this FutureSeed seeds no layer: layer_start is {layer_start}, and the model's "
                          f"layers are 0 to {config.n_layer - 1}", stacklevel=2)
        self.norm = norm
        self.detach = detach
        self.clip = clip
        self.scale = scale
        self.gate = gate
        L, C, H = config.n_layer, config.n_embd, config.n_head
        self.depth_factor = [depth_factor(layer, self.layer_start, L, schedule, schedule_min, schedule_max)
                             for layer in range(L)]
        if gate != "heads":
            self.alpha = nn.Parameter(torch.full((L,), float(alpha)), requires_grad=train_alpha)
        if gate in ("head", "heads"):
            self.alpha_head = nn.Parameter(torch.full((L, H), float(alpha)), requires_grad=train_alpha)
        if gate == "input":
            self.input_weight = nn.Parameter(torch.zeros(L, C))
            self.input_bias = nn.Parameter(torch.zeros(L))

    def gate_of(self, layer: int, x_last: torch.Tensor) -> torch.Tensor:
        """How much of the state below comes through, broadcastable to (B, H, N, N)."""
        if self.gate == "scalar":
            gate = torch.sigmoid(self.alpha[layer])                                    # ()
        elif self.gate == "heads":
            gate = torch.sigmoid(self.alpha_head[layer]).view(-1, 1, 1)                # (H, 1, 1)
        elif self.gate == "head":
            of_head = torch.sigmoid(self.alpha_head[layer]).view(-1, 1, 1)
            gate = torch.sigmoid(self.alpha[layer]) * of_head                          # (H, 1, 1)
        else:
            # a sum and not a matrix product, which autocast would round to bf16
            drive = (x_last.float() * self.input_weight[layer]).sum(dim=-1) / math.sqrt(x_last.shape[-1])
            gate = torch.sigmoid(self.alpha[layer] + drive + self.input_bias[layer])   # (B,)
            gate = gate.view(-1, 1, 1, 1)
        return gate * (self.scale * self.depth_factor[layer])

    def forward(self, layer: int, below: torch.Tensor, x_last: torch.Tensor) -> torch.Tensor | None:
        """The seed state that `layer` starts the prompt from.

        Args: layer, 0-based; below (B, H, N, N), the terminal state of layer - 1 over this prompt;
            x_last (B, C), the layer's input at the prompt's last token.
        Returns: (B, H, N, N) in below's dtype, or None for a layer that is not seeded.
        """
        if layer < self.layer_start:
            return None
        base = below
        if self.detach:
            base = base.detach()
        if self.norm:
            # the floor is under the root, where the gradient of an all-zero state is 0 and not NaN
            mean_square = base.square().mean(dim=(-2, -1), keepdim=True)
            base = base / mean_square.clamp_min(1e-12).sqrt()
        seed_state = self.gate_of(layer, x_last) * base
        if self.clip > 0:
            seed_state = seed_state.clamp(-self.clip, self.clip)
        return seed_state


def depth_factor(layer: int, start: int, n_layer: int, schedule: str, low: float, high: float) -> float:
    """schedule(i): 1 for "none", else from low at layer `start` to high at the last layer."""
    if schedule == "none":
        return 1.0
    last = n_layer - 1
    progress = 1.0    # of a single seeded layer, which counts as the last
    if last > start:
        progress = min(1.0, max(0.0, (layer - start) / (last - start)))
    if schedule == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return low + (high - low) * progress


def prefill(model: RWKV7, tokens: torch.Tensor, lengths: torch.Tensor | None = None, fs=None):
    """Read prompts, with Future-Seed if `fs` is given, to the states from which answers are decoded.

    Args: tokens (B, T) int64, right-padded; lengths (B,) int64 or None for T; fs, a FutureSeed, another
        `seed_state` hook, or None for plain RWKV-7.
    Returns: hidden (B, T, C), state (list of model.LayerState), as model.RWKV7.forward.
    """
    return model(tokens, lengths=lengths, seed_state=fs)


def answer_logits(model, fs, prompt, prompt_lengths, answer):
    """Read prompts with Future-Seed, then their answers without, as decoding would.

    Args: prompt (B, T), prompt_lengths (B,) or None for T, answer (B, A), int64 and right-padded; fs as in
        prefill.
    Returns: logits (B, A, V), of which [:, j] predicts answer token j, and the state at the prompts' ends.
        Only answers get logits: logits of a prompt would be a gigabyte at T = 4096.
    Raises: ValueError for a prompt without a token, where prompt_lengths are on the CPU.
    """
    B, T = prompt.shape
    if prompt_lengths is not None and prompt_lengths.device.type == "cpu" and prompt_lengths.min() < 1:
        raise ValueError("a prompt has no token: nothing predicts its answer's first token")
    given = None
    if answer.shape[1] > 1:
        given = answer[:, :-1]    # the last token is predicted, and never read
    hidden, state = model(prompt, lengths=prompt_lengths, seed_state=fs, answer=given)
    if prompt_lengths is None:
        before_first = hidden[:, T - 1 : T]    # (B, 1, C), predicts the first token
    else:
        rows = torch.arange(B, device=prompt.device)
        before_first = hidden[rows, prompt_lengths.to(prompt.device) - 1].unsqueeze(1)
    before_answer = torch.cat([before_first, hidden[:, T:]], dim=1)    # (B, A, C)
    return model.logits(before_answer), state


def answer_loss(logits, answer, answer_lengths):
    """Each example's loss as in the log, (B,), in nats: the first token's loss plus the mean of the others'.

    Args: logits (B, A, V); answer (B, A) int64, right-padded; answer_lengths (B,) int64, at least 1.
    """
    loss = F.cross_entropy(logits.flatten(0, 1).float(), answer.flatten(), reduction="none")
    loss = loss.view(answer.shape)
    positions = torch.arange(answer.shape[1], device=answer.device)
    rest = (positions > 0) & (positions < answer_lengths.unsqueeze(1))
    rest_loss = loss.masked_fill(~rest, 0).sum(dim=1) / (answer_lengths - 1).clamp_min(1)
    return loss[:, 0] + rest_loss
