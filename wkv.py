"""The WKV-7 operator: RWKV-7's matrix memory, with an initial and a final state and all gradients.

A head's state S maps keys to values. A token lets its columns decay, reads what it holds under a and writes
that to b (the delta rule: the old value goes, the new one comes), adds its key and value, and is read with r:

    u_t = S_{t-1} a_t
    S_t = S_{t-1} diag(w_t) + u_t b_t^T + v_t k_t^T          w_t = exp(log_w_t)
    y_t = S_t r_t

Four functions, all (r, log_w, k, v, a, b, state=None) -> (y, final state):

    wkv_reference   these lines, one token at a time: what the others are tested against
    wkv_chunked     the same in matrix products over chunks of tokens, in plain PyTorch, with its own backward
    wkv_cuda        wkv_kernel.cu on an Nvidia GPU, compiled at first use
    wkv             the fastest of them for the inputs at hand

r, log_w, k, v, a, b are (B, T, H, N). log_w is in (-0.6066, 0], as RWKV-7 makes it (-exp(-0.5) sigmoid): that
makes the chunked forms safe. The state is (B, H, N, N), [value, key], fp32 (fp64 where v is); None means
zeros. y has v's dtype. A position with log_w = k = v = a = b = 0 leaves the state as it is.

Reference: Peng et al. 2025, "RWKV-7 Goose" (arXiv:2503.14456). The chunked form is that of Yang et al. 2024,
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv:2406.06484), with decay.

Shapes: B batch, T tokens, H heads, N head size, L tokens a chunk, G chunks a span; BH = B * H, GBH = G * BH.
"""

import functools
import sys

import torch
from torch import Tensor

from kernel_loader import HEAD_SIZES, Kernels, launch, load

SHORT = 3  # tokens, up to which single steps are faster than a chunk
CPU_SPAN, GPU_SPAN = 2**17, 2**23  # numbers in an array of a span; on a CPU they should stay in the cache


def wkv(r, log_w, k, v, a, b, state=None) -> tuple[Tensor, Tensor]:
    """The operator in its fastest form for these inputs. Shapes, dtypes and errors as in wkv_reference."""
    if v.is_cuda and v.dtype != torch.float64:
        if _kernel_for(v.device.index, v.shape[-1], v.dtype == torch.bfloat16):
            return wkv_cuda(r, log_w, k, v, a, b, state)
    return wkv_chunked(r, log_w, k, v, a, b, state)


def wkv_reference(r, log_w, k, v, a, b, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence as written, one token at a time.

    r, log_w, k, v, a, b: (B, T, H, N), float dtype; computed in fp32, or fp64 if v is. state (B, H, N, N).
    Returns y (B, T, H, N) in v's dtype and the final state (B, H, N, N) in fp32 (fp64).
    Raises ValueError where shapes, dtypes or devices do not fit together.
    """
    inputs, S = _checked(r, log_w, k, v, a, b, state)
    y = []
    # vectors as rows, (B, H, 1, N), and sums without temporaries: 1.5 to 2 times the lines' speed.
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
            found = f"{tuple(x.shape)}, {x.dtype}, on {x.device}"
            raise ValueError(f"wkv: {name} must be {shape}, float, on {v.device}, but is {found}")
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

    For its backward it keeps the inputs and a state a chunk. It cannot be differentiated twice.
    """
    inputs, state = _checked(r, log_w, k, v, a, b, state)
    if v.shape[1] <= SHORT:
        return wkv_reference(*inputs, state)
    return _Chunked.apply(state, *inputs)


class _Chunked(torch.autograd.Function):
    """Span after span, the state handed on; backward from the last span, the state's gradient handed back."""

    @staticmethod
    def forward(ctx, state, *inputs):
        (B, T, H, N), v = inputs[0].shape, inputs[3]
        S = state.mT.reshape(B * H, N, N)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        kept = []
        with torch.autocast(v.device.type, enabled=False):
            for span in _spans(v):
                y_span, states = _forward(inputs, span, S)
                _merge(y_span, y, span)
                S = states[-B * H :]
                if any(ctx.needs_input_grad):
                    kept.append(states)
        ctx.save_for_backward(*inputs, *kept)
        return y, S.mT.reshape(B, H, N, N).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dstate):
        saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
        inputs, kept = saved[:6], saved[6:]
        B, T, H, N = dy.shape
        dS = dstate.mT.reshape(B * H, N, N)
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        with torch.autocast(dy.device.type, enabled=False):
            for span, states in zip(reversed(_spans(dy)), reversed(kept)):
                *parts, dS = _backward(inputs, span, states, dy, dS)
                for part, gradient in zip(parts, gradients):
                    _merge(part, gradient, span)
        return dS.mT.reshape(B, H, N, N), *gradients


def _spans(x: Tensor) -> list[tuple[int, int, int]]:
    """Cuts (B, T, H, N) into spans (first token, G, L), and at the end one shorter chunk of what is left."""
    B, T, H, N = x.shape
    L = 32 if N > 32 else 16
    G = max(1, (GPU_SPAN if x.is_cuda else CPU_SPAN) // (B * H * L * N))
    spans = [(first * L, min(G, T // L - first), L) for first in range(0, T // L, G)]
    if T % L:
        spans.append((T - T % L, 1, T % L))
    return spans


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


def _matrices(inputs, span, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What needs no state: P (GBH, L, N), queries, keys (GBH, 2L, N), v (GBH, L, N), scores (GBH, 2L, 2L),
    M (GBH, L, L), M queries_a (GBH, L, N) and u (GBH, L, N), as yet without what it reads from the state.
    """
    r, log_w, k, v, a, b = inputs
    L = span[2]
    P = _split(span, dtype, log_w).cumsum(1).exp_()
    queries = _decay_(_split(span, dtype, a, r), P)
    keys = _split(span, dtype, b, k)
    keys.unflatten(1, (2, L)).div_(P[:, None])
    v = _split(span, dtype, v)
    scores = _causal_(queries @ keys.mT)
    identity = torch.eye(L, dtype=dtype, device=P.device)
    M = torch.linalg.solve_triangular(identity - scores[:, :L, :L], identity, upper=False, unitriangular=True)
    return P, queries, keys, v, scores, M, M @ queries[:, :L], M @ (scores[:, :L, L:] @ v)


def _forward(inputs, span, S: Tensor) -> tuple[Tensor, Tensor]:
    """A span's y (GBH, L, N), and the states (GBH + BH, N, N) before each chunk and after all, transposed."""
    P, queries, keys, v, scores, _, M_a, u = _matrices(inputs, span, S.dtype)
    BH, L = len(S), span[2]
    states = S.new_empty(len(P) + BH, *S.shape[1:])
    states[:BH] = S
    torch.bmm(keys[:, L:].mT, v, out=states[BH:])  # as yet only what k writes
    chunks = zip(*(x.split(BH) for x in (states[:-BH], states[BH:], P[:, -1, :, None], M_a, u, keys)))
    for S, S_next, P_L, M_a_chunk, u_chunk, key in chunks:
        u_chunk.baddbmm_(M_a_chunk, S)
        S_next.add_(S).baddbmm_(key[:, :L].mT, u_chunk).mul_(P_L)
    y = queries[:, L:] @ states[:-BH]
    return y.baddbmm_(scores[:, L:], torch.cat((u, v), 1)), states


def _backward(inputs, span, states: Tensor, dy: Tensor, dS: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a span's r, log_w, k, v, a, b, (GBH, L, N) each, and of the state before it.

    states are those of _forward, and dS (BH, N, N) is the gradient of the state after the span, transposed.
    """
    P, queries, keys, v, scores, M, M_a, u = _matrices(inputs, span, dS.dtype)
    BH, L = len(dS), span[2]
    values = torch.cat((u.baddbmm_(M_a, states[:-BH]), v), 1)
    dy = _split(span, dS.dtype, dy)
    du = scores[:, L:, :L].mT @ dy  # as yet without what reaches u through later states
    dstates = torch.empty_like(states)
    torch.bmm(queries[:, L:].mT, dy, out=dstates[:-BH])
    dstates[-BH:] = dS
    dsums = torch.empty_like(states[BH:])  # of S_0^T + keys^T values
    P_L = P[:, -1, :, None]
    chunks = zip(*(x.split(BH) for x in (dstates[:-BH], dstates[BH:], dsums, P_L, M_a, du, keys)))
    for dS, dS_next, dsum, P_L, M_a_chunk, du_chunk, key in reversed(list(chunks)):
        torch.mul(P_L, dS_next, out=dsum)
        du_chunk.baddbmm_(key[:, :L], dsum)
        dS.add_(dsum).baddbmm_(M_a_chunk.mT, du_chunk)
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
#
# wkv_kernel.cu begins with the entry points and their arguments; kernel_loader.py launches them. Two custom
# operators show them to autograd and torch.compile, which learns their shapes from `_outputs`.


def wkv_cuda(r, log_w, k, v, a, b, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence on a GPU. Shapes and errors as in wkv_reference; not fp64; N is 16, 32, 64 or 128.

    With v in bf16, all but log_w and the states is rounded to bf16 for the tensor cores (errors to 5e-3 in y,
    1e-2 in gradients, more where keys repeat); else all is fp32, by wkv_chunked if gradients are needed.
    OSError without a kernel.
    """
    inputs, state = _checked(r, log_w, k, v, a, b, state)
    if not v.is_cuda or v.dtype == torch.float64 or v.shape[-1] not in HEAD_SIZES:
        found = f"{tuple(v.shape)}, {v.dtype}, on {v.device}"
        raise ValueError(f"wkv_cuda: v must be on a GPU, not fp64, with N in {HEAD_SIZES}, but is {found}")
    kernel = _kernel_for(v.device.index, v.shape[-1], v.dtype == torch.bfloat16)
    if not kernel:
        raise OSError("wkv_cuda: there is no kernel for this GPU; a notice on stderr said why")
    return _by_kernel(kernel, *inputs, state)


def _by_kernel(kernel: str, r, log_w, k, v, a, b, state) -> tuple[Tensor, Tensor]:
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (r, log_w, k, v, a, b, state))
    if keep and kernel == "token":
        return wkv_chunked(r, log_w, k, v, a, b, state)
    dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    inputs = (r.to(dtype), log_w.float(), k.to(dtype), v.to(dtype), a.to(dtype), b.to(dtype))
    y, final, _ = cuda_forward(*inputs, state, kernel == "chunked", keep)
    return y.to(v.dtype), final


def _forward_outputs(r, log_w, k, v, a, b, state, chunked, keep):
    """Room for y, the final state, and the states every 16 tokens that a backward needs."""
    B, T, H, N = r.shape
    kept = r.new_empty((B, H, -(-T // 16), N, N) if keep else (0,), dtype=torch.bfloat16)
    return r.new_empty(r.shape), state.new_empty(state.shape), kept


@torch.library.custom_op("wkv7::forward", mutates_args=())
def cuda_forward(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
                 chunked: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _forward_outputs(r, log_w, k, v, a, b, state, chunked, keep)
    arguments = (r, log_w, k, v, a, b, state, *outputs)
    if chunked:
        _launch_rows("wkv_forward", r, arguments)
    else:
        _launch("wkv_token_forward", r, 1, r.shape[-1], arguments[:-1])
    return outputs


def _backward_outputs(r, log_w, k, v, a, b, kept, dy, dstate):
    return [x.new_empty(x.shape) for x in (r, log_w, k, v, a, b, dstate)]


@torch.library.custom_op("wkv7::backward", mutates_args=())
def cuda_backward(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
                  kept: Tensor, dy: Tensor, dstate: Tensor) -> list[Tensor]:  # fmt: skip
    (B, T, H, N), inputs = r.shape, (r, log_w, k, v, a, b)
    gradients = _backward_outputs(*inputs, kept, dy, dstate)
    # where heads are few, a cheap chain carries dstate through first, and then all segments run at once
    chunks, processors = -(-T // 16), _kernels_on(r).processors
    segment = chunks if B * H >= 2 * processors else max(4, chunks * B * H // (4 * processors))
    segments = -(-chunks // segment)
    carry = dstate.new_empty((B, H, segments, N, N) if segments > 1 else (0,))
    if segments > 1:
        _launch_rows("wkv_backward_chain", r, (segment, r, log_w, a, b, dy, dstate, carry))
    _launch("wkv_backward", r, segments, 2 * N, (segment, *inputs, kept, dy, dstate, carry, *gradients))
    return gradients


def _keep_for_backward(ctx, inputs, output):
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:6], output[2])


def _gradients(ctx, dy, dstate, _):
    return *cuda_backward(*ctx.saved_tensors, dy, dstate), None, None


cuda_forward.register_fake(_forward_outputs)
cuda_backward.register_fake(_backward_outputs)
cuda_forward.register_autograd(_gradients, setup_context=_keep_for_backward)


def _kernels_on(r: Tensor) -> Kernels:
    return load(r.device.index, r.shape[-1], r.dtype == torch.bfloat16)


def _launch(name: str, r: Tensor, blocks: int, threads: int, arguments) -> None:
    B, T, H, _ = r.shape
    launch(_kernels_on(r), name, r.device, (H, B, blocks), threads, (T, H, *arguments))


def _launch_rows(name: str, r: Tensor, arguments) -> None:
    """Launches one of the kernels that carry the state, its rows over several blocks where heads are few."""
    B, _, H, N = r.shape
    split = N // 16 if 2 * B * H < _kernels_on(r).processors else 1
    _launch(name, r, split, 32 * (5 + N // 16 // split), arguments)


@torch.compiler.assume_constant_result
def _kernel_for(gpu: int, N: int, bf16: bool) -> str:
    return _choose_kernel(gpu, N, bf16)


@functools.cache
def _choose_kernel(gpu: int, N: int, bf16: bool) -> str:
    """The kernel for such inputs, "chunked" or "token", or "" where there is none, with a notice once."""
    if N not in HEAD_SIZES:
        return ""
    try:
        kernels = load(gpu, N, bf16)
    except OSError as error:
        print(f"wkv: no CUDA kernel, the slower PyTorch form runs: {error}", file=sys.stderr)
        return ""
    return "chunked" if bf16 and kernels.chunked_fit else "token"
