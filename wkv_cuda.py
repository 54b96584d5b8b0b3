"""Between wkv.py and wkv_kernel.cu: compiles the kernels, checks them at first use, and launches them.

The user needs no CUDA toolkit. NVRTC and its Python bindings come with torch's CUDA builds for Linux, and the
driver does the rest. Compiled kernels are kept in $WKV_CACHE, or else in $XDG_CACHE_HOME/wkv7, or else in
~/.cache/wkv7. A file's name is a hash of all that the kernels were compiled from. Whatever goes wrong in here
is an error of one line, which `load` prints before the PyTorch form runs instead.

References: the manuals of the CUDA Driver API and of NVRTC (docs.nvidia.com/cuda). wkv_kernel.cu begins with
a list of its entry points and their arguments.

Shapes: B batch, T tokens, H heads, N head size. A chunk is 16 tokens, a segment several chunks.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from cuda.bindings import nvrtc
except ImportError:
    nvrtc = None

SOURCE = Path(__file__).with_name("wkv_kernel.cu")
ENTRY_POINTS = ("wkv_forward", "wkv_backward_chain", "wkv_backward", "wkv_token_forward")
HEAD_SIZES = (16, 32, 64, 128)
MAX_B = 65535  # what the second dimension of a grid may be
DIGEST_SIZE = hashlib.sha256().digest_size


class Kernels(NamedTuple):
    """wkv_kernel.cu on one GPU, for one head size and input type."""

    dtype: torch.dtype  # of the inputs, bf16 or fp32
    chunked: bool  # whether the tensor-core kernels run, which have a backward; the token kernel always does
    context: ctypes.c_void_p
    functions: dict[str, ctypes.c_void_p]
    shared: dict[str, int]  # bytes of dynamic shared memory that each takes
    processors: int


# ---- which kernels there are -------------------------------------------------------------------------------

loaded: dict[tuple, Kernels | None] = {}


def load(device: torch.device, N: int, bf16: bool, reference) -> Kernels | None:
    """The kernels for such inputs, or None without any that agree with `reference`, the recurrence."""
    key = device, N, bf16
    if key in loaded:
        return loaded[key]
    try:
        if torch.cuda.is_current_stream_capturing():
            raise OSError("the first use comes inside a CUDA graph's capture; call it once before")
        loaded[key] = None
        kernels = _load(device, N, bf16)
        # in a thread of its own gradients are on, and autocast, inference mode and hooks are off
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_check, kernels, device, N, reference).result()
        loaded[key] = kernels
    except (OSError, RuntimeError) as error:  # torch tells a GPU's fault as a RuntimeError of many lines
        reason = str(error).partition("\n")[0]
        print(f"wkv: no CUDA kernel, the slower PyTorch form runs: {reason}", file=sys.stderr)
    return loaded.get(key)


def _check(kernels: Kernels, device: torch.device, N: int, reference) -> None:
    """Raises OSError unless the kernels give the recurrence on two problems, which take every path."""
    rng = torch.Generator("cpu").manual_seed(0)  # its own: nobody else's random numbers move
    # few heads: their rows are split over blocks, their tokens over two segments; many heads: neither is
    for H, T in ((2, 85), (2 * kernels.processors, 19)):
        r, w, k, v, removal, gate, dy = torch.randn(7, 1, T, H, N, generator=rng).to(device, kernels.dtype)
        state, dstate = torch.randn(2, 1, H, N, N, generator=rng).to(device)
        removal = F.normalize(removal, dim=-1)
        log_w = -0.6 * (4 * w.float() - 4).sigmoid()  # slow decays: what comes from afar shows
        problem = (r, log_w, k, v, -removal, removal * gate.sigmoid(), state)
        exact = _outputs(reference, [x.double() for x in problem], (dy.double(), dstate.double()))
        by_token = run(kernels._replace(chunked=False), *problem, differentiate=False)
        found = [(2e-3 if kernels.dtype == torch.float32 else 1e-2, by_token)]
        if kernels.chunked:
            in_chunks = functools.partial(run, kernels, differentiate=True)
            found.append((2e-2, _outputs(in_chunks, problem, (dy, dstate))))
        for tolerance, results in found:
            errors = [(x.double() - truth).norm() / truth.norm() for x, truth in zip(results, exact)]
            worst = torch.stack(errors).max().item()
            if not worst <= tolerance:  # a NaN is wrong too
                raise OSError(f"ITS NUMBERS ARE WRONG, by {worst:.1e} at head size {N}; please report this")


def _outputs(function, inputs, weights) -> tuple[Tensor, ...]:
    """y, the final state, and the gradients of all inputs, given those of y and the state."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    return *outputs, *torch.autograd.grad(outputs, leaves, weights)


def _load(device: torch.device, N: int, bf16: bool) -> Kernels:
    """Compiles the kernels if they are not on the disk, and loads them onto the GPU."""
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        raise OSError(f"{properties.name} is too old: compute capability 8.0 is the least")
    number, context, module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    address, size, shared = ctypes.c_void_p(), ctypes.c_size_t(), (ctypes.c_int * 2)()
    functions = {name: ctypes.c_void_p() for name in ENTRY_POINTS}
    architecture = f"sm_{properties.major}{properties.minor}"
    driver("cuInit", 0)
    driver("cuDeviceGet", ctypes.byref(number), device.index)
    driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)  # the context that torch works in
    with torch.cuda.device(device):
        driver("cuCtxSetCurrent", context)
        driver("cuModuleLoadData", ctypes.byref(module), cubin(architecture, N, bf16))
        driver("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), module, b"wkv_shared_bytes")
        driver("cuMemcpyDtoH_v2", shared, address, size)
        shared = dict(zip(ENTRY_POINTS, (shared[0], shared[0], shared[1], 0)))
        fit = max(shared.values()) <= properties.shared_memory_per_block_optin
        for name, function in functions.items():
            driver("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            if fit:
                driver("cuFuncSetAttribute", function, 8, shared[name])  # MAX_DYNAMIC_SHARED_SIZE_BYTES
    if bf16 and not fit:
        print(f"wkv: head size {N} needs more shared memory than {properties.name} has: a slower kernel runs "
              "token by token, and gradients come from PyTorch", file=sys.stderr)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Kernels(dtype, bf16 and fit, context, functions, shared, properties.multi_processor_count)


# ---- compiling ---------------------------------------------------------------------------------------------

def cubin(architecture: str, N: int, bf16: bool) -> bytes:
    """The kernels for, say, "sm_90": from the disk if the same were compiled before."""
    try:
        version = nvrtc.nvrtcVersion()[1:]
    except (AttributeError, RuntimeError):  # no bindings, or bindings without the library
        raise OSError("NVRTC is missing: pip install cuda-bindings nvidia-cuda-nvrtc") from None
    source, macros = SOURCE.read_bytes(), (f"-DHEAD_SIZE={N}", f"-DINPUT_BF16={int(bf16)}")
    options = (f"--gpu-architecture={architecture}", "--std=c++17", *macros)
    key = hashlib.sha256(repr((source, options, version)).encode()).hexdigest()
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "wkv7")
    path = Path(os.environ.get("WKV_CACHE") or user_cache, f"{key}.cubin").expanduser()
    image = _kept(path)
    if image is None:
        image = compile_source(source, options)
        with contextlib.suppress(OSError):  # what cannot be kept is compiled again at the next start
            _keep(path, image)
    return image


def _kept(path: Path) -> bytes | None:
    """The kernels that an earlier start kept in this file; None without it, or where it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    image, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
    if hashlib.sha256(image).digest() != digest:
        print(f"wkv: the kept kernels in {path} are damaged; they are compiled again", file=sys.stderr)
        return None
    return image


def _keep(path: Path, image: bytes) -> None:
    """Writes the kernels and their digest, whole or not at all: under another name, and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(image + hashlib.sha256(image).digest())
        os.replace(temporary, path)
    except BaseException:  # a Ctrl-C too
        os.unlink(temporary)
        raise


def compile_source(source: bytes, options: tuple[str, ...]) -> bytes:
    _, program = nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)  # fills the bytes in place, as does the call below
        raise OSError(f"NVRTC: {log.decode().splitlines()[0]}")
    image = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, image)
    return image


# ---- launching ---------------------------------------------------------------------------------------------

def run(kernels: Kernels, r, log_w, k, v, a, b, state, differentiate: bool) -> tuple[Tensor, Tensor]:
    """y and the final state, of checked inputs. differentiate: keeps what a backward needs; chunked only."""
    to = kernels.dtype
    inputs = (r.to(to), log_w.float(), k.to(to), v.to(to), a.to(to), b.to(to))
    y, final = _Operator.apply(kernels, differentiate, state, *inputs)
    return y.to(v.dtype), final


class _Operator(torch.autograd.Function):
    """The kernels' forward and backward, for PyTorch's autograd."""

    @staticmethod
    def forward(ctx, kernels, differentiate, state, *inputs):
        r = inputs[0]
        B, T, H, N = r.shape
        y, final = r.new_empty(r.shape), state.new_empty(state.shape)
        checkpoints = r.new_empty(B, H, -(-T // 16), N, N, dtype=torch.bfloat16) if differentiate else None
        if kernels.chunked and (differentiate or T > 1):  # for one token the other is exact
            _launch_rows(kernels, "wkv_forward", r, (*inputs, state, y, final, checkpoints))
        else:
            _launch(kernels, "wkv_token_forward", r, 1, N, (*inputs, state, y, final))
        if differentiate:
            ctx.kernels = kernels
            ctx.save_for_backward(*inputs, checkpoints)
            ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dstate):
        *inputs, checkpoints = ctx.saved_tensors
        r, log_w, _, _, a, b = inputs
        B, T, H, N = r.shape
        dy = torch.zeros_like(r) if dy is None else dy  # while for dstate a null will do
        gradients = [x.new_empty(x.shape) for x in inputs]
        dinitial = log_w.new_empty(B, H, N, N)
        # where heads are few, a cheap chain carries dstate through first, and then all segments run at once
        chunks, wanted = -(-T // 16), max(1, 4 * ctx.kernels.processors // (B * H))
        segment = max(4, -(-chunks // wanted))
        segments = -(-chunks // segment)
        carry = None
        if segments > 1:
            carry = log_w.new_empty(B, H, segments, N, N)
            _launch_rows(ctx.kernels, "wkv_backward_chain", r, (segment, r, log_w, a, b, dy, dstate, carry))
        arguments = (segment, *inputs, checkpoints, dy, dstate, carry, *gradients, dinitial)
        _launch(ctx.kernels, "wkv_backward", r, segments, 2 * N, arguments)
        return None, None, dinitial, *gradients


def _launch_rows(kernels: Kernels, name: str, r: Tensor, arguments) -> None:
    """Launches one of the kernels that carry the state, its rows over several blocks where heads are few."""
    B, _, H, N = r.shape
    split = N // 16 if 2 * B * H < kernels.processors else 1
    _launch(kernels, name, r, split, 32 * (5 + N // 16 // split), arguments)


def _launch(kernels: Kernels, name: str, r: Tensor, blocks: int, threads: int, arguments) -> None:
    """Queues a kernel on torch's current stream. arguments: ints and tensors; None is a null pointer."""
    B, T, H, _ = r.shape
    arguments = [_aligned(x) if isinstance(x, Tensor) else x for x in (T, H, *arguments)]
    values = [ctypes.c_int(x) if isinstance(x, int) else ctypes.c_void_p() if x is None else
              ctypes.c_void_p(x.data_ptr()) for x in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    with torch.cuda.device(r.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(r.device).cuda_stream)
        driver("cuCtxSetCurrent", kernels.context)  # a thread of autograd's may not have one yet
        shape = (H, B, blocks, threads, 1, 1, kernels.shared[name])
        driver("cuLaunchKernel", kernels.functions[name], *shape, stream, addresses, None)


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and from an address that 16-byte loads can start at, which a slice may not be."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def driver(name: str, *arguments) -> None:
    """Calls a function of the CUDA driver."""
    status = getattr(_libcuda(), name)(*arguments)
    if status != 0:
        raise OSError(f"the CUDA driver's {name} failed with error {status}")


_libcuda = functools.cache(lambda: ctypes.CDLL("libcuda.so.1"))  # at first use: there may be none
