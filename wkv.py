"""The WKV-7 operator: RWKV-7's matrix memory, with an initial state, a final state and all gradients.

A head's state S maps keys to values. Each token reads with a what S holds, lets the columns of S decay, and
adds what it has read under b. As b points against a, this takes the old value away (the delta rule). Then the
token adds its own value v under its key k, and reads the new state with r:

    u_t = S_{t-1} a_t
    S_t = S_{t-1} diag(w_t) + u_t b_t^T + v_t k_t^T          w_t = exp(log_w_t)
    y_t = S_t r_t

Four functions compute this. All of them take (r, log_w, k, v, a, b, state=None) and return (y, final state):

    wkv_reference   these lines, one token at a time: the others are tested against it
    wkv_chunked     the recurrence in matrix products over chunks of tokens, in PyTorch, with its own backward
    wkv_cuda        wkv_kernel.cu on an Nvidia GPU, compiled and checked at first use
    wkv             the fastest of them for the inputs at hand

r, log_w, k, v, a, b are (B, T, H, N). The state is (B, H, N, N), [value, key], in fp32 (fp64 where v is);
None means zeros. y has the dtype of v. A position with log_w = k = v = a = b = 0 leaves the state as it is.
log_w must be in (-0.6066, 0], as RWKV-7 makes it (-exp(-0.5) sigmoid): the chunked forms divide by products
of decays, and this range keeps that safe. Only wkv_reference takes any log_w.

References: Peng et al. 2025, "RWKV-7 Goose" (arXiv:2503.14456). The chunked form is that of Yang et al. 2024,
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv:2406.06484), with decay.

Shapes: B batch rows, T tokens, H heads, N head size, L tokens a chunk, G chunks a span, which is as many as
the chunked form takes at once; BH = B * H, GBH = G * BH.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wkv_cuda import HEAD_SIZES, MAX_B, Kernels, load, run

LOWEST_LOG_W = -0.6066  # RWKV-7's own least is -exp(-0.5) = -0.60653; the rest is room for rounding
SHORT = 3  # tokens, up to which single steps are faster than a chunk
CPU_SPAN, GPU_SPAN = 2**17, 2**23  # numbers in an array of a span; on a CPU they should stay in the cache


def wkv(r, log_w, k, v, a, b, state=None) -> tuple[Tensor, Tensor]:
    """The operator in its fastest form for these inputs. Shapes and dtypes are those of wkv_reference.

    log_w must be in (-0.6066, 0]; for any other decay use wkv_reference. Raises ValueError as wkv_reference
    does, and on a CPU also where log_w is out of this range; a NaN passes, and gives NaN. The range is not
    checked in two cases. On a CPU, up to 3 tokens are right with any decay. On a GPU the check would have to
    wait until the GPU has caught up, so there a log_w out of range gives wrong numbers.
    """
    if _kernels_for(v) is None:
        return wkv_chunked(r, log_w, k, v, a, b, state)
    return wkv_cuda(r, log_w, k, v, a, b, state)


def wkv_reference(r, log_w, k, v, a, b, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence as written, one token at a time, for any log_w.

    r, log_w, k, v, a, b: (B, T, H, N), of any float dtype; computed in fp32, or in fp64 if v is fp64.
    state: (B, H, N, N), or None for zeros.
    Returns y (B, T, H, N) in the dtype of v, and the final state (B, H, N, N) in fp32 (fp64).
    Raises ValueError where shapes, dtypes or devices do not fit together.
    """
    inputs, S = _checked(r, log_w, k, v, a, b, state)
    y = []
    # S x is written as x @ S.mT, with x a row (B, H, 1, N), and sums as addcmul. This makes no temporaries
    # and is 1.5 to 2 times as fast. The tokens come from unbind and not from x[:, t], because the
    # gradient of an index is a tensor of zeros as large as x, and there would be one for every token
    rows = (x.to(S.dtype).unsqueeze(-2).unbind(1) for x in inputs)
    for r_t, log_w_t, k_t, v_t, a_t, b_t in zip(*rows):
        u_t = a_t @ S.mT
        S = (S * log_w_t.exp()).addcmul(u_t.mT, b_t).addcmul(v_t.mT, k_t)
        y.append((r_t @ S.mT).squeeze(-2))
    return torch.stack(y, dim=1).to(v.dtype), S


def _checked(r, log_w, k, v, a, b, state) -> tuple[tuple[Tensor, ...], Tensor]:
    """The six inputs and the state to start from, or a ValueError that says which of them does not fit."""
    shape, device = v.shape, v.device
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"wkv: v must be (B, T, H, N), none of them 0, but is {tuple(shape)}")
    B, _, H, N = shape
    for name, x in (("r", r), ("log_w", log_w), ("k", k), ("v", v), ("a", a), ("b", b)):
        if x.shape != shape or x.device != device or not x.is_floating_point():
            raise _misfit(name, x, shape, device)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is None:
        state = v.new_zeros(B, H, N, N, dtype=dtype)
    elif state.shape != (B, H, N, N) or state.device != device or not state.is_floating_point():
        raise _misfit("state", state, (B, H, N, N), device)
    return (r, log_w, k, v, a, b), state.to(dtype)


def _misfit(name: str, x: Tensor, shape, device: torch.device) -> ValueError:
    return ValueError(f"wkv: {name} must be {tuple(shape)}, float, on {device}, but is {tuple(x.shape)}, "
                      f"{x.dtype}, on {x.device}")


# ---- the chunked form --------------------------------------------------------------------------------------
#
# In a chunk that starts from S_0, let c_t = log_w_1 + ... + log_w_t and P_t = exp(c_t), the decay of S_0 up
# to token t. Unrolled, the recurrence is causal attention with two queries and two key-value pairs a token.
# The query a reads before its token is written and gives u; the query r reads after it and gives y. The key b
# writes u, and the key k writes v. The decay from s to t is P_t / P_s, so it splits between query and key:
#
#     queries = [a_t P_{t-1}; r_t P_t]    keys = [b_s / P_s; k_s / P_s]    values = [u_s; v_s]    (2L, N) each
#     scores  = queries keys^T, kept for s < t in the rows of a and for s <= t in those of r    (2L, 2L)
#     [u; y]  = scores values + queries S_0^T
#     S_L^T   = diag(P_L) (S_0^T + keys^T values)
#
# u is on both sides. In scores, let scores_ab and scores_ak be the rows of a in the columns of b and of k. In
# queries, let queries_a be the rows of a. With M = (I - scores_ab)^-1,
#
#     u = M scores_ak v + (M queries_a) S_0^T
#
# where only the last factor needs the state. So everything else is done for a span of chunks at once, in
# batched products, and a short loop carries the state through the span. The code holds states transposed, as
# [key, value].
#
# M comes from a triangular solve. Doubling, (I + X)(I + X^2)(I + X^4)... with X = scores_ab, is no option:
# where keys repeat, the powers of X grow to 1e9 and cancel. Dividing by P is safe: P_L > 3e-9 for L = 32. No
# later token changes an earlier y, not even its rounding: c is summed from the left, and what is masked is
# exactly zero.


def wkv_chunked(r, log_w, k, v, a, b, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence in matrix products, for any T and N. Shapes, dtypes, range and errors are those of wkv.

    For its backward it keeps about 13 N numbers a token and head. It cannot be differentiated twice.
    """
    inputs, state = _checked(r, log_w, k, v, a, b, state)
    if v.shape[1] <= SHORT:
        return wkv_reference(*inputs, state)
    if log_w.device.type == "cpu":
        _check_decay(log_w)
    return _Chunked.apply(state, *inputs)


def _check_decay(log_w: Tensor) -> None:
    """Raises ValueError where log_w is out of (-0.6066, 0]: quotients of decays may overflow. NaN passes."""
    low, high = log_w.detach().aminmax()
    low, high = low.item(), high.item()
    if low < LOWEST_LOG_W or high > 0:
        raise ValueError(f"wkv: log_w must be in ({LOWEST_LOG_W}, 0], as RWKV-7 makes it, but reaches from "
                         f"{low:.6g} to {high:.6g}; wkv_reference takes any log_w")


class Chunks(NamedTuple):
    """What the forward makes of a span and the backward needs again."""

    P: Tensor  # (GBH, L, N)
    queries: Tensor  # (GBH, 2L, N), as are keys and values
    keys: Tensor
    values: Tensor
    scores: Tensor  # (GBH, 2L, 2L)
    M: Tensor  # (GBH, L, L)
    M_a: Tensor  # M queries_a, (GBH, L, N)
    states: Tensor  # before each chunk and after the last one, transposed: (GBH + BH, N, N)


class _Chunked(torch.autograd.Function):
    """The forward goes from span to span and hands on the state. The backward goes from the last span to the
    first and hands back the gradient of the state."""

    @staticmethod
    def forward(ctx, state, *inputs):
        v = inputs[3]
        S = state.mT.flatten(0, 1)
        y = v.new_empty(v.shape)
        kept = []
        with torch.autocast(v.device.type, enabled=False):
            for span in _spans(v):
                y_span, chunks = _forward(inputs, span, S)
                _merge(y_span, y, span)
                S = chunks.states[-len(S):]
                if any(ctx.needs_input_grad):
                    kept += chunks
        ctx.save_for_backward(*kept)
        ctx.dtypes = [x.dtype for x in inputs]
        return y, S.mT.reshape(state.shape).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dstate):
        kept = ctx.saved_tensors  # read once, because activation checkpointing allows no second time
        dS = dstate.mT.flatten(0, 1)
        gradients = [dy.new_empty(dy.shape, dtype=dtype) for dtype in ctx.dtypes]
        spans = _spans(dy)
        fields = len(Chunks._fields)
        with torch.autocast(dy.device.type, enabled=False):
            for i in reversed(range(len(spans))):
                chunks = Chunks(*kept[i * fields:(i + 1) * fields])
                *parts, dS = _backward(chunks, spans[i], dy, dS)
                for part, gradient in zip(parts, gradients):
                    _merge(part, gradient, spans[i])
        return dS.mT.reshape(dstate.shape), *gradients


def _spans(x: Tensor) -> list[tuple[int, int, int]]:
    """Cuts (B, T, H, N) into spans (first token, G, L); what is left at the end is one shorter chunk."""
    B, T, H, N = x.shape
    L = 32 if N > 32 else 10  # the fastest on a CPU
    numbers = GPU_SPAN if x.is_cuda else CPU_SPAN
    G = max(1, numbers // (B * H * L * N))
    spans = [(first * L, min(G, T // L - first), L) for first in range(0, T // L, G)]
    if T % L > 0:
        spans.append((T - T % L, 1, T % L))
    return spans


def _split(span, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    """Lays out the chunks of a span one after the other: one tensor (B, T, H, N) becomes (GBH, L, N), and two
    become (GBH, 2L, N), the rows of the second below those of the first."""
    start, G, L = span
    chunks = [x[:, start:start + G * L].unflatten(1, (G, L)).permute(1, 0, 3, 2, 4) for x in tensors]
    return torch.cat([x.to(dtype) for x in chunks], dim=3).flatten(0, 2)


def _merge(part: Tensor, whole: Tensor, span) -> None:
    """Writes the chunks (GBH, L, N) of a span to their place in the whole, (B, T, H, N)."""
    start, G, L = span
    B, _, H, _ = whole.shape
    place = whole[:, start:start + G * L].unflatten(1, (G, L))  # (B, G, L, H, N)
    place.copy_(part.unflatten(0, (G, B, H)).permute(1, 0, 3, 2, 4))


def _causal_(scores: Tensor) -> Tensor:
    """Zeroes, in place, the scores of what is not yet written when a token reads. The upper rows are those of
    a, which reads before its own token is written; the lower rows are those of r, which reads after."""
    L = scores.shape[1] // 2
    for columns in scores.split(L, 2):
        columns[:, :L].tril_(-1)
        columns[:, L:].tril_()
    return scores


def _decay_(queries: Tensor, P: Tensor) -> Tensor:
    """Multiplies, in place, the rows of a by P_{t-1} (the first by P_0 = 1) and the rows of r by P_t."""
    L = P.shape[1]
    queries[:, 1:L] *= P[:, :-1]
    queries[:, L:] *= P
    return queries


def _forward(inputs, span, S: Tensor) -> tuple[Tensor, Chunks]:
    """A span's y (GBH, L, N), and what its backward needs. S (BH, N, N) is the state before, transposed."""
    r, log_w, k, v, a, b = inputs
    _, G, L = span
    BH, dtype = len(S), S.dtype
    P = _split(span, dtype, log_w).cumsum(1).exp_()
    queries = _decay_(_split(span, dtype, a, r), P)
    keys = _split(span, dtype, b, k)
    keys.unflatten(1, (2, L)).div_(P[:, None])
    v = _split(span, dtype, v)
    scores = _causal_(queries @ keys.mT)
    identity = torch.eye(L, dtype=dtype, device=P.device)
    M = torch.linalg.solve_triangular(identity - scores[:, :L, :L], identity, upper=False, unitriangular=True)
    M_a = M @ queries[:, :L]
    u = M @ (scores[:, :L, L:] @ v)  # so far without what it reads from the state
    states = S.new_empty(len(P) + BH, *S.shape[1:])
    states[:BH] = S
    torch.bmm(keys[:, L:].mT, v, out=states[BH:])  # so far only what k writes
    keys_b, P_L = keys[:, :L].mT, P[:, -1, :, None]
    for g in range(G):
        now = slice(g * BH, (g + 1) * BH)
        after = slice((g + 1) * BH, (g + 2) * BH)
        u[now].baddbmm_(M_a[now], states[now])
        states[after].add_(states[now]).baddbmm_(keys_b[now], u[now]).mul_(P_L[now])
    values = torch.cat((u, v), 1)
    y = (queries[:, L:] @ states[:-BH]).baddbmm_(scores[:, L:], values)
    return y, Chunks(P, queries, keys, values, scores, M, M_a, states)


def _backward(chunks: Chunks, span, dy: Tensor, dS: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a span's r, log_w, k, v, a, b, (GBH, L, N) each, and of the state before the span.

    dy (B, T, H, N) is the gradient of the whole y, and dS (BH, N, N) that of the state after the span. All
    gradients of states are transposed, as the states are.
    """
    P, queries, keys, values, scores, M, M_a, states = chunks
    _, G, L = span
    BH = len(dS)
    dy = _split(span, dS.dtype, dy)
    du = scores[:, L:, :L].mT @ dy  # so far without what reaches u through later states
    dstates = torch.empty_like(states)
    torch.bmm(queries[:, L:].mT, dy, out=dstates[:-BH])  # so far only what r reads
    dstates[-BH:] = dS
    dsums = torch.empty_like(states[BH:])  # the gradient of S_0^T + keys^T values
    keys_b, P_L = keys[:, :L], P[:, -1, :, None]
    for g in reversed(range(G)):
        now = slice(g * BH, (g + 1) * BH)
        after = slice((g + 1) * BH, (g + 2) * BH)
        torch.mul(P_L[now], dstates[after], out=dsums[now])
        du[now].baddbmm_(keys_b[now], dsums[now])
        dstates[now].add_(dsums[now]).baddbmm_(M_a[now].mT, du[now])
    dreads = torch.cat((M.mT @ du, dy), 1)  # the gradient of scores values + queries S_0^T
    dscores = _causal_(dreads @ values.mT)
    dqueries = (dreads @ states[:-BH].mT).baddbmm_(dscores, keys)
    dkeys = (values @ dsums.mT).baddbmm_(dscores.mT, queries)
    dv = (scores[..., L:].mT @ dreads).baddbmm_(keys[:, L:], dsums)
    # c_t is in P_t, which scales r_t, b_t, k_t, a_{t+1} and, for t = L, the next state. Much of the sum
    # cancels. fp32 has the digits for that; the bf16 kernel has not, and sums in another order
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
    """The recurrence on a GPU, for N = 16, 32, 64 or 128. Shapes and range are those of wkv; fp64 is refused.

    With v in bf16, all inputs but log_w and the state are rounded to bf16 for the tensor cores: y is then off
    by up to 5e-3 and gradients by up to 1e-2 (relative L2), and by more where keys repeat. With v in
    any other dtype all is computed in fp32, by wkv_chunked where gradients are needed.
    Raises ValueError as wkv_reference does, and where no kernel can run.
    """
    inputs, state = _checked(r, log_w, k, v, a, b, state)
    kernels = _kernels_for(v)
    if kernels is None:
        raise ValueError(f"wkv_cuda: v must be on a GPU, not fp64, N in {HEAD_SIZES}, B to {MAX_B}, but is "
                         f"{tuple(v.shape)}, {v.dtype}, on {v.device}; or see the notice on stderr")
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    if differentiate and not kernels.chunked:
        return wkv_chunked(*inputs, state)
    return run(kernels, *inputs, state, differentiate)


def _kernels_for(v: Tensor) -> Kernels | None:
    """The kernels for inputs like v, compiled and checked at first use, or None where there are none."""
    if not v.is_cuda or v.dtype == torch.float64 or v.shape[-1] not in HEAD_SIZES or v.shape[0] > MAX_B:
        return None
    return load(v.device, v.shape[-1], v.dtype == torch.bfloat16, wkv_reference)
