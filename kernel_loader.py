"""Compiles wkv_kernel.cu for the GPU at hand, keeps the result on the disk, and launches the kernels.

The user needs no CUDA toolkit: NVRTC and its Python bindings come with torch's CUDA builds for Linux, and the
driver does the rest. Where the bindings are missing, nvcc compiles instead. Compiled kernels are kept in
$WKV_CACHE, or else $XDG_CACHE_HOME/wkv7, or else ~/.cache/wkv7, named by a hash of all that went into them.

Reference: the manuals of the CUDA Driver API and of NVRTC (docs.nvidia.com/cuda). What goes wrong is an
OSError of one line. N is the head size.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from files import atomic_write

try:
    from cuda.bindings import nvrtc
except ImportError:
    nvrtc = None

SOURCE = Path(__file__).with_name("wkv_kernel.cu")
HEAD_SIZES = (16, 32, 64, 128)
ENTRY_POINTS = ("wkv_forward", "wkv_backward_chain", "wkv_backward", "wkv_token_forward")
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Kernels(NamedTuple):
    """wkv_kernel.cu on one GPU, for one head size and input type."""

    context: ctypes.c_void_p
    functions: dict[str, ctypes.c_void_p]
    shared: dict[str, int]  # bytes of dynamic shared memory that each takes
    chunked_fit: bool  # the GPU has that much; if not, only the token kernel runs
    processors: int


@functools.cache
def load(gpu: int, N: int, bf16: bool) -> Kernels:
    """Compiles the kernels if they are not on the disk, and loads them onto GPU number `gpu`."""
    properties = torch.cuda.get_device_properties(gpu)
    if properties.major < 8:
        raise OSError(f"{properties.name} is too old: compute capability 8.0 is the least")
    image = cubin(f"sm_{properties.major}{properties.minor}", N, bf16)
    device, context, module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    address, size, shared = ctypes.c_void_p(), ctypes.c_size_t(), (ctypes.c_int * 2)()
    functions = {name: ctypes.c_void_p() for name in ENTRY_POINTS}
    driver("cuInit", 0)
    driver("cuDeviceGet", ctypes.byref(device), gpu)
    driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)  # the context that torch works in
    with torch.cuda.device(gpu):
        driver("cuCtxSetCurrent", context)
        driver("cuModuleLoadData", ctypes.byref(module), image)
        driver("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), module, b"wkv_shared_bytes")
        driver("cuMemcpyDtoH_v2", shared, address, size)
        shared = dict(zip(ENTRY_POINTS, (shared[0], shared[0], shared[1], 0)))
        chunked_fit = max(shared.values()) <= properties.shared_memory_per_block_optin
        for name, function in functions.items():
            driver("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            if chunked_fit:
                driver("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared[name])
    return Kernels(context, functions, shared, chunked_fit, properties.multi_processor_count)


def launch(kernels: Kernels, name: str, device: torch.device, grid: tuple, threads: int, arguments) -> None:
    """Queues a kernel on torch's current stream. arguments: ints and tensors; an empty tensor is a null."""
    arguments = [x if isinstance(x, int) else _aligned(x) for x in arguments]
    values = [ctypes.c_int(x) if isinstance(x, int) else ctypes.c_void_p(x.data_ptr()) for x in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        driver("cuCtxSetCurrent", kernels.context)  # a thread of autograd's may not have one yet
        shape = (*grid, threads, 1, 1, kernels.shared[name])
        driver("cuLaunchKernel", kernels.functions[name], *shape, stream, addresses, None)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, and from an address that 16-byte loads can start at, which a slice may not be."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@functools.cache
def libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def driver(name: str, *arguments) -> None:
    """Calls a function of the CUDA driver."""
    status = getattr(libcuda(), name)(*arguments)
    if status != 0:
        raise OSError(f"the CUDA driver's {name} failed with error {status}")


def cubin(architecture: str, N: int, bf16: bool) -> bytes:
    """The kernels compiled for, say, "sm_90": from the disk if the same were compiled before."""
    source = SOURCE.read_bytes()
    macros = (f"-DHEAD_SIZE={N}", f"-DINPUT_BF16={int(bf16)}")
    options = (f"--gpu-architecture={architecture}", "--std=c++17", *macros)
    compiler, run = _compiler()
    key = hashlib.sha256(repr((source, options, compiler)).encode()).hexdigest()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = os.environ.get("WKV_CACHE") or os.path.join(user_cache, "wkv7")
    path = Path(cache).expanduser() / f"{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    compiled = run(source, options)
    try:
        with atomic_write(path) as file:
            file.write(compiled)
    except OSError:
        pass  # nowhere to keep it: the next start compiles again
    return compiled


def _compiler():
    """NVRTC if it is installed, else nvcc: its name and version, and the function that compiles with it."""
    try:
        return f"NVRTC {nvrtc.nvrtcVersion()[1:]}", _compile_with_nvrtc
    except (AttributeError, RuntimeError):  # no bindings, or bindings without the library
        pass
    if not shutil.which("nvcc"):
        raise OSError("neither NVRTC (pip install cuda-bindings nvidia-cuda-nvrtc) nor nvcc is installed")
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout, _compile_with_nvcc


def _compile_with_nvrtc(source: bytes, options) -> bytes:
    _, program = nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), 0, [], [])
    options = [option.encode() for option in (*options, "-default-device")]  # lambdas are for the device too
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)  # fills the bytes in place, as does the call below
        raise OSError(f"NVRTC: {log.decode().splitlines()[0]}")
    compiled = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, compiled)
    return compiled


def _compile_with_nvcc(source: bytes, options) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "kernel.cubin")
        command = ["nvcc", "-cubin", *options, "-x", "cu", "-", "-o", output]
        done = subprocess.run(command, input=source, capture_output=True)
        if done.returncode != 0:
            raise OSError(f"nvcc: {done.stderr.decode().splitlines()[0]}")
        return output.read_bytes()
