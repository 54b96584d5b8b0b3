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
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
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
OUTPUTS = ("y", "state", "dr", "dlog_w", "dk", "dv", "da", "db", "dstate")
MAX_B = 65535  # what the second dimension of a grid may be
MOST_ARGUMENTS = 20  # of a kernel: those of wkv_backward
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DIGEST_SIZE = hashlib.sha256().digest_size


class Kernels(NamedTuple):
    """wkv_kernel.cu on one GPU, for one head size and input type."""

    dtype: torch.dtype  # of the inputs, bf16 or fp32
    chunked: bool  # whether the tensor-core kernels run, which have a backward; the token kernel always runs
    context: ctypes.c_void_p
    functions: dict[str, ctypes.c_void_p]
    shared: dict[str, int]  # bytes of dynamic shared memory that each kernel takes
    processors: int


# ---- which kernels there are -------------------------------------------------------------------------------

loaded: dict[tuple, Kernels | None] = {}


def load(device: torch.device, N: int, bf16: bool, reference) -> Kernels | None:
    """The kernels for such inputs, or None where there are none that agree with `reference`, the recurrence.

    The first call for a device, head size and input type compiles and checks the kernels; later calls return
    what the first one found. Where that is None, the reason stands in one line on stderr.
    """
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


class Comparison(NamedTuple):
    """What kernels gave on one problem, beside the recurrence in fp64."""

    kernels: str
    shape: tuple[int, int, int, int]  # of the problem, (B, T, H, N)
    errors: dict[str, float]  # of each output, relative L2
    allowed: float


def _check(kernels: Kernels, device: torch.device, N: int, reference) -> None:
    """Raises OSError, which says all that is known, if one of the kernels does not give the recurrence."""
    for found in _compare(kernels, device, N, reference):
        if not all(error <= found.allowed for error in found.errors.values()):  # a NaN is wrong too
            errors = ", ".join(f"{name} {error:.1e}" for name, error in found.errors.items())
            raise OSError(f"ITS NUMBERS ARE WRONG, please report this line: {found.kernels}, (B, T, H, N) = "
                          f"{found.shape}, {kernels.dtype}, relative errors {errors}, "
                          f"allowed {found.allowed:.1e}")


def _compare(kernels: Kernels, device: torch.device, N: int, reference) -> Iterator[Comparison]:
    """Holds every kernel against the recurrence, on two problems that together take every path.

    Each tolerance is at least twice the error of right kernels. The problems are such that a fault shows at
    five times the tolerance and more: dstate is large and the second problem's decays are slow, so that the
    gradient which crosses segments is a good part of all gradients; and gates are open or shut, so that a
    and b cannot pass for each other.
    """
    # with many heads, neither are rows split over blocks nor tokens over segments. With few heads both are,
    # and three segments have a first, a middle and a last. Both have five tokens in their last chunk
    many, few = (kernels.processors + 1) // 2, 2
    problems = ((many, 53, 4, "wkv_backward"), (few, 149, 6, "wkv_backward_chain and wkv_backward"))
    rng = torch.Generator("cpu").manual_seed(0)  # its own: nobody else's random numbers move
    for H, T, slowness, backward in problems:
        r, w, k, v, removal, gate, dy = torch.randn(7, 1, T, H, N, generator=rng).to(device, kernels.dtype)
        state, dstate = torch.randn(2, 1, H, N, N, generator=rng).to(device)
        removal = F.normalize(removal, dim=-1)
        log_w = -0.6 * (3 * w.float() - slowness).sigmoid()
        problem = r, log_w, k, v, -removal, removal * (8 * gate).sigmoid(), state
        weights = dy, 8 * dstate
        exact = _outputs(reference, [x.double() for x in problem], [x.double() for x in weights])

        def errors(results) -> dict[str, float]:
            return {name: ((x.double() - truth).norm() / truth.norm()).item()
                    for name, x, truth in zip(OUTPUTS, results, exact)}

        shape = 1, T, H, N
        found = errors(run(kernels._replace(chunked=False), *problem, differentiate=False))
        yield Comparison("wkv_token_forward", shape, found, 1e-4 if kernels.dtype == torch.float32 else 5e-3)
        if kernels.chunked:
            in_chunks = functools.partial(run, kernels, differentiate=True)
            found = errors(_outputs(in_chunks, problem, weights))
            of_forward = {name: found.pop(name) for name in ("y", "state")}
            yield Comparison("wkv_forward", shape, of_forward, 1.2e-2)
            yield Comparison(backward, shape, found, 1.2e-2)


def _outputs(function, inputs, weights) -> tuple[Tensor, ...]:
    """y, the final state, and the gradients of all inputs, given those of y and of the state."""
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
        rows, gradients = shared
        shared = dict(zip(ENTRY_POINTS, (rows, rows, gradients, 0)))
        fit = max(shared.values()) <= properties.shared_memory_per_block_optin
        for name, function in functions.items():
            driver("cuModuleGetFunction", ctypes.byref(function), module, name.encode(), kernel=name)
            if fit:
                driver("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared[name], kernel=name)
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
#
# For a small model the GPU may finish a call in less time than Python takes to make it. So there is no step
# here that a call can do without: no conversion that changes nothing, no autograd where no gradient is asked
# for, and no array of ctypes made anew.

def run(kernels: Kernels, r, log_w, k, v, a, b, state, differentiate: bool) -> tuple[Tensor, Tensor]:
    """y and the final state, of checked inputs. differentiate: keeps what a backward needs; chunked only."""
    inputs = [x if x.dtype == kernels.dtype else x.to(kernels.dtype) for x in (r, k, v, a, b)]
    inputs.insert(1, log_w.float())
    if differentiate:
        y, final = _Operator.apply(kernels, state, *inputs)
    else:
        y, final = _forward(kernels, _aligned(state), [_aligned(x) for x in inputs], None)
    return y.to(v.dtype), final


class _Operator(torch.autograd.Function):
    """The kernels' forward and backward, for PyTorch's autograd."""

    @staticmethod
    def forward(ctx, kernels, state, *inputs):
        inputs = [_aligned(x) for x in inputs]
        B, T, H, N = inputs[0].shape
        checkpoints = inputs[0].new_empty(B, H, _chunks(T), N, N, dtype=torch.bfloat16)
        ctx.kernels = kernels
        ctx.save_for_backward(*inputs, checkpoints)
        ctx.set_materialize_grads(False)
        return _forward(kernels, _aligned(state), inputs, checkpoints)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dstate):
        *inputs, checkpoints = ctx.saved_tensors
        return None, *_backward(ctx.kernels, inputs, checkpoints, dy, dstate)


def _forward(kernels: Kernels, state: Tensor, inputs, checkpoints: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the final state; fills checkpoints, (B, H, chunks, N, N) bf16, if a backward is to follow."""
    _, T, _, N = inputs[0].shape
    y, final = torch.empty_like(inputs[0]), torch.empty_like(state)
    # the token kernel is exact, so a single token goes there, unless its backward needs the checkpoints
    if kernels.chunked and (T > 1 or checkpoints is not None):
        _launch_rows(kernels, "wkv_forward", y, (*inputs, state, y, final, checkpoints))
    else:
        _launch(kernels, "wkv_token_forward", y, 1, N, (*inputs, state, y, final))
    return y, final


def _backward(kernels: Kernels, inputs, checkpoints: Tensor, dy, dstate) -> tuple[Tensor, ...]:
    """The gradients of the initial state and of the inputs. dy or dstate may be None, for zeros."""
    r, log_w, _, _, a, b = inputs
    B, T, H, N = r.shape
    dy = torch.zeros_like(r) if dy is None else _aligned(dy)
    if dstate is not None:  # for None the kernels take a null pointer
        dstate = _aligned(dstate)
    gradients = [torch.empty_like(x) for x in inputs]
    dinitial = log_w.new_empty(B, H, N, N)
    # where heads are few, a cheap chain carries dstate through first, and then all segments run at once
    wanted = max(1, 4 * kernels.processors // (B * H))
    segment = max(4, -(-_chunks(T) // wanted))
    segments = -(-_chunks(T) // segment)
    carry = None
    if segments > 1:
        carry = log_w.new_empty(B, H, segments, N, N)
        _launch_rows(kernels, "wkv_backward_chain", r, (segment, r, log_w, a, b, dy, dstate, carry))
    arguments = (segment, *inputs, checkpoints, dy, dstate, carry, *gradients, dinitial)
    _launch(kernels, "wkv_backward", r, segments, 2 * N, arguments)
    return dinitial, *gradients


def _chunks(T: int) -> int:
    return -(-T // 16)


def _launch_rows(kernels: Kernels, name: str, like: Tensor, arguments) -> None:
    """Launches one of the kernels that carry the state, its rows over several blocks where heads are few."""
    B, _, H, N = like.shape
    split = N // 16 if 2 * B * H < kernels.processors else 1
    _launch(kernels, name, like, split, 32 * (5 + N // 16 // split), arguments)


def _launch(kernels: Kernels, name: str, like: Tensor, blocks: int, threads: int, arguments) -> None:
    """Queues a kernel on torch's current stream. `like` is any (B, T, H, N) tensor of the call; arguments are
    aligned tensors, ints, and None for a null pointer."""
    B, T, H, _ = like.shape
    values = [T, H]
    for x in arguments:
        if isinstance(x, Tensor):
            x = x.data_ptr()
        values.append(x or 0)
    struct.pack_into(f"={len(values)}Q", _room.values, 0, *values)
    device = like.device
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        driver("cuCtxSetCurrent", kernels.context)  # a thread of autograd's may not have one yet
        driver("cuLaunchKernel", kernels.functions[name], H, B, blocks, threads, 1, 1, kernels.shared[name],
               stream, _room.addresses, None, kernel=name)


class _Room(threading.local):
    """Where a thread puts the arguments of a launch, which the driver copies before it returns. To make these
    arrays anew would take as long as the launch.

    cuLaunchKernel wants an array of addresses, one for each value. Every value has eight bytes of its own;
    of an int the kernel reads the first four, which are the low ones on every machine that CUDA runs on.
    """

    def __init__(self):
        self.values = (ctypes.c_uint64 * MOST_ARGUMENTS)()
        start = ctypes.addressof(self.values)
        self.addresses = (ctypes.c_uint64 * MOST_ARGUMENTS)(*range(start, start + 8 * MOST_ARGUMENTS, 8))


_room = _Room()


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and from an address that 16-byte loads can start at, which a slice may not be."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def driver(function: str, *arguments, kernel: str = "") -> None:
    """Calls a function of the CUDA driver. OSError, which names function, kernel and error, if it fails."""
    library = _libcuda()
    status = getattr(library, function)(*arguments)
    if status != 0:
        error = ctypes.c_char_p(b"unknown")
        library.cuGetErrorName(status, ctypes.byref(error))
        where = f"{function} for {kernel}" if kernel else function
        raise OSError(f"the CUDA driver's {where} failed with error {status}, {error.value.decode()}")


_libcuda = functools.cache(lambda: ctypes.CDLL("libcuda.so.1"))  # at first use: there may be none
