"""The WKV-7 operator: RWKV-7's matrix memory, with an initial and a final state and all gradients.

A head's state S maps keys to values. A token lets its columns decay, reads what it holds under a and writes
that to b (the delta rule: the old value goes, the new one comes), adds its key and value, and is read with r:

    u_t = S_{t-1} a_t
    S_t = S_{t-1} diag(w_t) + u_t b_t^T + v_t k_t^T          w_t = exp(log_w_t)
    y_t = S_t r_t

Four functions, all (r, log_w, k, v, a, b, state=None) -> (y, final state):

    wkv_reference   these lines, one token at a time: what the others are tested against
    wkv_chunked     the same in matrix products over chunks of tokens, in plain PyTorch, with its own backward
    wkv_cuda        wkv_kernel.cu on an Nvidia GPU, compiled and checked at first use
    wkv             the fastest of them for the inputs at hand

r, log_w, k, v, a, b are (B, T, H, N). log_w is in (-0.6066, 0], as RWKV-7 makes it (-exp(-0.5) sigmoid): that
makes the chunked forms safe. The state is (B, H, N, N), [value, key], fp32 (fp64 where v is); None means
zeros. y has v's dtype. A position with log_w = k = v = a = b = 0 leaves the state as it is.

Reference: Peng et al. 2025, "RWKV-7 Goose" (arXiv:2503.14456). The chunked form is that of Yang et al. 2024,
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv:2406.06484), with decay.

Shapes: B batch, T tokens, H heads, N head size, L tokens a chunk, G chunks a span; BH = B * H, GBH = G * BH.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wkv_cuda import HEAD_SIZES, MAX_B, Kernels, load, run

SHORT = 3  # tokens, up to which single steps are faster than a chunk
CPU_SPAN, GPU_SPAN = 2**17, 2**23  # numbers in an array of a span; on a CPU they should stay in the cache


def wkv(r, log_w, k, v, a, b, state=None) -> tuple[Tensor, Tensor]:
    """The operator in its fastest form for these inputs. Shapes, dtypes and errors as in wkv_reference."""
    form = wkv_cuda if _kernels_for(v) else wkv_chunked
    return form(r, log_w, k, v, a, b, state)


def wkv_reference(r, log_w, k, v, a, b, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence as written, one token at a time.

    r, log_w, k, v, a, b: (B, T, H, N), float dtype; computed in fp32, or fp64 if v is. state (B, H, N, N).
    Returns y (B, T, H, N) in v's dtype and the final state (B, H, N, N) in fp32 (fp64).
    Raises ValueError where shapes, dtypes or devices do not fit together.
    """
    inputs, S = _checked(r, log_w, k, v, a, b, state)
    y = []
    # S x is written x @ S.mT, x a row (B, H, 1, N), and sums have no temporaries: 1.5 to 2 times as fast.
    # unbind, not x[:, t]: the gradient of an index is a tensor of zeros as large as x, for every token
    rows = (x.to(S.dtype).unsqueeze(-2).unbind(1) for x in inputs)
    for r_t, log_w_t, k_t, v_t, a_t, b_t in zip(*rows):
        u_t = a_t @ S.mT
        S = (S * log_w_t.exp()).addcmul(u_t.mT, b_t).addcmul(v_t.mT, k_t)
        y.append((r_t @ S.mT).squeeze(-2))
    return torch.stack(y, dim=1).to(v.dtype), S


def _checked(r, log_w, k, v, a, b, state) -> tuple[tuple[Tensor, ...], Tensor]:
    """The six inputs and the state to start from, or a ValueError that says which of them does not fit."""
    inputs = (r, log_w, k, v, a, b)
    if v.dim() != 4 or 0 in v.shape:
        raise ValueError(f"wkv: v must be (B, T, H, N), none of them 0, but is {tuple(v.shape)}")
    B, _, H, N = v.shape
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is None:
        state = v.new_zeros(B, H, N, N, dtype=dtype)
    for name, x in zip(("r", "log_w", "k", "v", "a", "b", "state"), (*inputs, state)):
        shape = (B, H, N, N) if name == "state" else tuple(v.shape)
        if x.shape != shape or x.device != v.device or not x.is_floating_point():
            raise ValueError(f"wkv: {name} must be {shape}, float, on {v.device}, but is {tuple(x.shape)}, "
                             f"{x.dtype}, on {x.device}")
    return inputs, state.to(dtype)


# ---- the chunked form --------------------------------------------------------------------------------------
#
# In a chunk from S_0 on, let c_t = log_w_1 + ... + log_w_t and P_t = exp(c_t), the decay of S_0 up to t.
# Unrolled, the recurrence is causal attention with two queries and two key-value pairs a token: a reads
# before the token is written, for u, and r after, for y; b writes u, and k writes v. The decay from s to t
# is P_t / P_s, so it splits between query and key:
#
#     queries = [a_t P_{t-1}; r_t P_t]    keys = [b_s / P_s; k_s / P_s]    values = [u_s; v_s]    (2L, N) each
#     scores  = queries keys^T, kept for s < t in the rows of a and for s <= t in those of r    (2L, 2L)
#     [u; y]  = scores values + queries S_0^T
#     S_L^T   = diag(P_L) (S_0^T + keys^T values)
#
# u is on both sides. With scores_ab and scores_ak for a's rows under b and k, and M = (I - scores_ab)^-1,
#
#     u = M scores_ak v + (M queries_a) S_0^T
#
# where only the last factor needs the state. So a span of chunks does everything else at once, in batched
# products, and a short loop carries the state through it. The code holds states transposed, as [key, value].
#
# M is a triangular solve. Doubling, (I + X)(I + X^2)(I + X^4)..., is not an option: where keys repeat,
# powers of X grow to 1e9 and cancel. Dividing by P is safe: P_L > 3e-9 for L = 32. No later token changes
# an earlier y, not even its rounding: c is summed from the left, and what is masked is exactly zero.


def wkv_chunked(r, log_w, k, v, a, b, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence in matrix products, for any T and N. Shapes, dtypes and errors as in wkv_reference.

    For its backward it keeps about 13 N numbers a token and head. It cannot be differentiated twice.
    """
    inputs, state = _checked(r, log_w, k, v, a, b, state)
    if v.shape[1] <= SHORT:
        return wkv_reference(*inputs, state)
    return _Chunked.apply(state, *inputs)


class Chunks(NamedTuple):
    """What the forward makes of a span, and the backward needs."""

    P: Tensor  # (GBH, L, N)
    queries: Tensor  # (GBH, 2L, N), as are keys and values
    keys: Tensor
    values: Tensor
    scores: Tensor  # (GBH, 2L, 2L)
    M: Tensor  # (GBH, L, L)
    M_a: Tensor  # M queries_a, (GBH, L, N)
    states: Tensor  # before each chunk and after the last, transposed: (GBH + BH, N, N)


class _Chunked(torch.autograd.Function):
    """Span after span, the state handed on; backward from the last span, the state's gradient handed back."""

    @staticmethod
    def forward(ctx, state, *inputs):
        v, S, kept = inputs[3], state.mT.flatten(0, 1), []
        y = v.new_empty(v.shape)
        with torch.autocast(v.device.type, enabled=False):
            for span in _spans(v):
                y_span, chunks = _forward(inputs, span, S)
                _merge(y_span, y, span)
                S = chunks.states[-len(S) :]
                kept += chunks if any(ctx.needs_input_grad) else ()
        ctx.save_for_backward(*kept)
        ctx.dtypes = [x.dtype for x in inputs]
        return y, S.mT.reshape(state.shape).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dstate):
        kept = ctx.saved_tensors  # read once: activation checkpointing allows no second time
        dS = dstate.mT.flatten(0, 1)
        gradients = [dy.new_empty(dy.shape, dtype=dtype) for dtype in ctx.dtypes]
        spans, fields = _spans(dy), len(Chunks._fields)
        with torch.autocast(dy.device.type, enabled=False):
            for i in reversed(range(len(spans))):
                chunks = Chunks(*kept[i * fields : (i + 1) * fields])
                *parts, dS = _backward(chunks, spans[i], dy, dS)
                for part, gradient in zip(parts, gradients):
                    _merge(part, gradient, spans[i])
        return dS.mT.reshape(dstate.shape), *gradients


def _spans(x: Tensor) -> list[tuple[int, int, int]]:
    """Cuts (B, T, H, N) into spans (first token, G, L), and at the end one shorter chunk of what is left."""
    B, T, H, N = x.shape
    L = 32 if N > 32 else 10  # the fastest on a CPU
    G = max(1, (GPU_SPAN if x.is_cuda else CPU_SPAN) // (B * H * L * N))
    spans = [(first * L, min(G, T // L - first), L) for first in range(0, T // L, G)]
    rest = [(T - T % L, 1, T % L)] if T % L else []
    return spans + rest


def _split(span, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    """The chunks of a span one after the other: (B, T, H, N) as (GBH, L, N), two of them as (GBH, 2L, N)."""
    start, G, L = span
    chunks = [x[:, start : start + G * L].unflatten(1, (G, L)).permute(1, 0, 3, 2, 4) for x in tensors]
    return torch.cat([x.to(dtype) for x in chunks], dim=3).flatten(0, 2)


def _merge(part: Tensor, whole: Tensor, span) -> None:
    """Writes the chunks (GBH, L, N) of a span to their place in (B, T, H, N)."""
    start, G, L = span
    B, _, H, _ = whole.shape
    place = whole[:, start : start + G * L].unflatten(1, (G, L))  # (B, G, L, H, N)
    place.copy_(part.unflatten(0, (G, B, H)).permute(1, 0, 3, 2, 4))


def _causal_(scores: Tensor) -> Tensor:
    """Keeps, in place, what is written before a reads (the upper rows) and by the time r does (the lower)."""
    L = scores.shape[1] // 2
    for columns in scores.split(L, 2):
        columns[:, :L].tril_(-1)
        columns[:, L:].tril_()
    return scores


def _decay_(queries: Tensor, P: Tensor) -> Tensor:
    """Multiplies, in place, rows of a (GBH, 2L, N) by P_{t-1}, the first by P_0 = 1, and rows of r by P_t."""
    L = P.shape[1]
    queries[:, 1:L] *= P[:, :-1]
    queries[:, L:] *= P
    return queries


def _forward(inputs, span, S: Tensor) -> tuple[Tensor, Chunks]:
    """A span's y (GBH, L, N), and what its backward needs. S (BH, N, N) is the state before, transposed."""
    r, log_w, k, v, a, b = inputs
    (_, G, L), BH, dtype = span, len(S), S.dtype
    P = _split(span, dtype, log_w).cumsum(1).exp_()
    queries = _decay_(_split(span, dtype, a, r), P)
    keys = _split(span, dtype, b, k)
    keys.unflatten(1, (2, L)).div_(P[:, None])
    v = _split(span, dtype, v)
    scores = _causal_(queries @ keys.mT)
    identity = torch.eye(L, dtype=dtype, device=P.device)
    M = torch.linalg.solve_triangular(identity - scores[:, :L, :L], identity, upper=False, unitriangular=True)
    M_a = M @ queries[:, :L]
    u = M @ (scores[:, :L, L:] @ v)  # as yet without what it reads from the state
    states = S.new_empty(len(P) + BH, *S.shape[1:])
    states[:BH] = S
    torch.bmm(keys[:, L:].mT, v, out=states[BH:])  # as yet only what k writes
    keys_b, P_L = keys[:, :L].mT, P[:, -1, :, None]
    for g in range(G):
        now, after = slice(g * BH, (g + 1) * BH), slice((g + 1) * BH, (g + 2) * BH)
        u[now].baddbmm_(M_a[now], states[now])
        states[after].add_(states[now]).baddbmm_(keys_b[now], u[now]).mul_(P_L[now])
    values = torch.cat((u, v), 1)
    y = (queries[:, L:] @ states[:-BH]).baddbmm_(scores[:, L:], values)
    return y, Chunks(P, queries, keys, values, scores, M, M_a, states)


def _backward(chunks: Chunks, span, dy: Tensor, dS: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a span's r, log_w, k, v, a, b, (GBH, L, N) each, and of the state before it: from that
    of the whole y, (B, T, H, N), and that of the state after it, transposed, (BH, N, N).
    """
    P, queries, keys, values, scores, M, M_a, states = chunks
    (_, G, L), BH = span, len(dS)
    dy = _split(span, dS.dtype, dy)
    du = scores[:, L:, :L].mT @ dy  # as yet without what reaches u through later states
    dstates = torch.empty_like(states)
    torch.bmm(queries[:, L:].mT, dy, out=dstates[:-BH])  # as yet only what r reads
    dstates[-BH:] = dS
    dsums = torch.empty_like(states[BH:])  # of S_0^T + keys^T values
    keys_b, P_L = keys[:, :L], P[:, -1, :, None]
    for g in reversed(range(G)):
        now, after = slice(g * BH, (g + 1) * BH), slice((g + 1) * BH, (g + 2) * BH)
        torch.mul(P_L[now], dstates[after], out=dsums[now])
        du[now].baddbmm_(keys_b[now], dsums[now])
        dstates[now].add_(dsums[now]).baddbmm_(M_a[now].mT, du[now])
    dreads = torch.cat((M.mT @ du, dy), 1)  # of scores values + queries S_0^T
    dscores = _causal_(dreads @ values.mT)
    dqueries = (dreads @ states[:-BH].mT).baddbmm_(dscores, keys)
    dkeys = (values @ dsums.mT).baddbmm_(dscores.mT, queries)
    dv = (scores[..., L:].mT @ dreads).baddbmm_(keys[:, L:], dsums)
    # c_t is in P_t, which scales r_t, b_t, k_t, a_{t+1} and, for t = L, the next state. Much of that cancels:
    # fp32 has the digits for it, while the bf16 kernel sums in another order
    from_a, from_r = (queries * dqueries).split(L, 1)
    from_b, from_k = (keys * dkeys).split(L, 1)
    dc = from_r.sub_(from_b).sub_(from_k)
    dc[:, :-1] += from_a[:, 1:]
    dc[:, -1] += (states[BH:] * dstates[BH:]).sum(-1)
    dlog_w = torch.ones(L, L, dtype=P.dtype, device=P.device).triu() @ dc  # log_w_s is in every c_t from s on
    da, dr = _decay_(dqueries, P).split(L, 1)
    db, dk = dkeys.unflatten(1, (2, L)).div_(P[:, None]).unbind(1)
    return dr, dlog_w, dk, dv, da, db, dstates[:BH]


# ---- the CUDA kernels --------------------------------------------------------------------------------------

def wkv_cuda(r, log_w, k, v, a, b, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence on a GPU. Shapes and errors as in wkv_reference; not fp64; N is 16, 32, 64 or 128.

    With v in bf16, all but log_w and the states is rounded to bf16 for the tensor cores (errors to 5e-3 in y,
    1e-2 in gradients, more where keys repeat); else all is fp32, by wkv_chunked if gradients are needed.
    """
    inputs, state = _checked(r, log_w, k, v, a, b, state)
    kernels = _kernels_for(v)
    if not kernels:
        raise ValueError(f"wkv_cuda: v must be on a GPU, not fp64, N in {HEAD_SIZES}, B to {MAX_B}, but is "
                         f"{tuple(v.shape)}, {v.dtype}, on {v.device}; or see the notice on stderr")
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    if differentiate and not kernels.chunked:
        return wkv_chunked(*inputs, state)
    return run(kernels, *inputs, state, differentiate)


def _kernels_for(v: Tensor) -> Kernels | None:
    """The kernels for inputs like v, compiled and checked when first asked for, or None without any."""
    if not v.is_cuda or v.dtype == torch.float64 or v.shape[-1] not in HEAD_SIZES or v.shape[0] > MAX_B:
        return None
    return load(v.device, v.shape[-1], v.dtype == torch.bfloat16, wkv_reference)
