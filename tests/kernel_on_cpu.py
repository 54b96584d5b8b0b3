"""
Builds wkv_kernel.cu with g++ and calls its entry points on CPU tensors, as wkv_cuda.py would on a GPU.

    kernel = build(N=64, bf16=True)
    y, sT, kept = kernel.forward(r, log_w, k, v, a, b, s0)
    dr, dlog_w, dk, dv, da, db, ds0 = kernel.backward(r, log_w, k, v, a, b, kept, dy, dsT)

Shapes: B batch, T tokens, H heads, N head size, C = ceil(T / 16) chunks. r, k, v, a, b, y and their gradients
are (B, T, H, N) in bf16 or fp32; log_w and dlog_w (B, T, H, N) fp32; states (B, H, N, N) fp32 [value, key].
"""

import contextlib
import ctypes
import functools
import math
import re
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import pytest
import torch

import wkv
import wkv_cuda

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "wkv_kernel.cu"
KERNELS = ("wkv_token_forward", "wkv_forward", "wkv_backward_chain", "wkv_backward")
CHUNK = 16

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to build the kernels")


def compile_command(output, N, bf16, flags=("-O1", "-fPIC", "-shared")):
    """The g++ command, and beside `output` the C++ file it compiles: the header, the kernel, an export for
    each entry point."""
    wrapper = Path(output).with_suffix(".cpp")
    exports = "\n".join(f"CUDA_ON_CPU_EXPORT({name})" for name in KERNELS)
    wrapper.write_text(f'#include "{SOURCE}"\n{exports}\n')
    macros = (f"-DHEAD_SIZE={N}", f"-DINPUT_BF16={int(bf16)}", "-include", str(TESTS / "cuda_on_cpu.h"))
    options = ("-std=c++17", "-fno-strict-aliasing", "-Wno-unknown-pragmas")
    return ["g++", *options, *macros, *flags, str(wrapper), "-o", str(output)]


def barrier_lines():
    """Numbers of the lines of wkv_kernel.cu that make threads or copies wait, but for the definitions."""
    waits = re.compile(r"^\s*(__syncthreads\(\)|__syncwarp\(\)|copy_wait<.*>\(\));")
    return [number for number, line in enumerate(SOURCE.read_text().splitlines(), 1) if waits.match(line)]


@functools.cache
def build(N=64, bf16=True):
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "kernel.so")
        subprocess.run(compile_command(output, N, bf16), check=True)
        return KernelOnCPU(ctypes.CDLL(str(output)), torch.bfloat16 if bf16 else torch.float32)


class KernelOnCPU:
    """The entry points of one build. `seed` draws the schedule; `drop` names a source line whose barrier is
    left out."""

    def __init__(self, library, dtype):
        self.library, self.dtype = library, dtype
        self.shared = list((ctypes.c_int * 2).in_dll(library, "wkv_shared_bytes"))
        self.seed = self.drop = 0

    def start(self, kernel, grid, block, shared, addresses):
        """As cuLaunchKernel, it takes the addresses of the arguments; not 0 if the kernel did not finish."""
        run = getattr(self.library, "run_" + kernel)
        return run((ctypes.c_uint * 3)(*grid), ctypes.c_uint(block), ctypes.c_size_t(shared), addresses,
                   ctypes.c_uint64(self.seed), ctypes.c_int(self.drop))

    def launch(self, kernel, grid, block, shared, *arguments):
        values = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                values.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                values.append(ctypes.c_void_p(None) if argument is None else ctypes.c_int(argument))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        if self.start(kernel, grid, block, shared, pointers):
            raise RuntimeError(f"{kernel} did not finish")

    def launch_rows(self, kernel, r, split, *arguments):
        """One of the kernels that carry the state, its rows over `split` blocks."""
        B, T, H, N = r.shape
        self.launch(kernel, (H, B, split), 32 * (5 + N // 16 // split), self.shared[0], T, H, *arguments)

    def inputs(self, r, log_w, k, v, a, b):
        given = (r, log_w, k, v, a, b)
        return [x.to(torch.float32 if x is log_w else self.dtype).contiguous() for x in given]

    def empty(self, *shape, dtype=torch.float32):
        return torch.full(shape, math.nan, dtype=dtype)  # nobody may count on zeros

    def token_forward(self, r, log_w, k, v, a, b, s0=None):
        x = self.inputs(r, log_w, k, v, a, b)
        B, T, H, N = r.shape
        y, sT = self.empty(B, T, H, N, dtype=self.dtype), self.empty(B, H, N, N)
        self.launch("wkv_token_forward", (H, B, 1), N, 0, T, H, *x, s0, y, sT)
        return y, sT

    def forward(self, r, log_w, k, v, a, b, s0=None, keep=True, split=1):
        x = self.inputs(r, log_w, k, v, a, b)
        B, T, H, N = r.shape
        y, sT = self.empty(B, T, H, N, dtype=self.dtype), self.empty(B, H, N, N)
        kept = self.empty(B, H, -(-T // CHUNK), N, N, dtype=torch.bfloat16) if keep else None
        self.launch_rows("wkv_forward", r, split, *x, s0, y, sT, kept)
        return y, sT, kept

    def backward(self, r, log_w, k, v, a, b, kept, dy, dsT=None, segment=None, split=1):
        x = self.inputs(r, log_w, k, v, a, b)
        dy = dy.to(self.dtype).contiguous()
        B, T, H, N = r.shape
        chunks = -(-T // CHUNK)
        segment = segment or chunks
        segments = -(-chunks // segment)
        outputs = [self.empty(B, T, H, N, dtype=i.dtype) for i in x] + [self.empty(B, H, N, N)]
        carry = self.empty(B, H, segments, N, N) if segments > 1 else None
        if carry is not None:
            r_, log_w_, _, _, a_, b_ = x
            self.launch_rows("wkv_backward_chain", r, split, segment, r_, log_w_, a_, b_, dy, dsT, carry)
        self.launch("wkv_backward", (H, B, segments), 2 * N, self.shared[1],
                    T, H, segment, *x, kept, dy, dsT, carry, *outputs)
        return outputs


class Driver:
    """libcuda as wkv_cuda.py calls it, with kernels on the CPU: functions that return 0, or else an error.
    An image is the head size and whether inputs are bf16, as in b"64 1"."""

    def __init__(self):
        self.functions = []  # (kernel, name); a handle is the number in the list, from 1
        self.launched, self.grids = [], set()  # names; names with the blocks that share a head
        self.context = None
        self.spoil = lambda name, addresses: addresses  # what a fault does to a kernel's arguments

    cuInit = cuDeviceGet = cuModuleGetGlobal_v2 = cuFuncSetAttribute = lambda self, *arguments: 0

    def cuGetErrorName(self, status, name):
        name._obj.value = b"AN_ERROR"
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 77
        return 0

    def cuCtxSetCurrent(self, context):
        self.context = context.value
        return 0

    def cuModuleLoadData(self, module, image):
        if not re.fullmatch(rb"\d+ [01]", image):
            return 200  # CUDA_ERROR_INVALID_IMAGE
        self.loaded = build(*map(int, image.split()))
        return 0

    def cuModuleGetFunction(self, function, module, name):
        self.functions.append((self.loaded, name.decode()))
        function._obj.value = len(self.functions)
        return 0

    def cuMemcpyDtoH_v2(self, to, address, size):
        to[:] = self.loaded.shared
        return 0

    def cuLaunchKernel(self, function, x, y, z, threads, _, __, shared, stream, addresses, extra):
        kernel, name = self.functions[function.value - 1]
        self.launched.append(name)
        self.grids.add((name, z))
        if self.context != 77:
            return 201  # CUDA_ERROR_INVALID_CONTEXT
        self.context = None  # the next launch may come from another thread
        addresses = type(addresses)(*addresses)  # a copy, which a fault may change
        return kernel.start(name, (x, y, z), threads, shared, self.spoil(name, addresses))


def stub_gpu(monkeypatch):
    """Gives torch and wkv_cuda.py a GPU whose kernels run on the CPU, on tensors of the CPU. wkv and wkv_cuda
    use it. Nothing is loaded yet. Returns the properties of the GPU and its driver.

    It has 16 processors, so that the problems of the check at first use stay small.
    """
    if not shutil.which("g++"):
        pytest.skip("needs g++ to build the kernels for the CPU")
    properties = types.SimpleNamespace(
        name="stub", major=9, minor=0, multi_processor_count=16, shared_memory_per_block_optin=2**18
    )
    stream = types.SimpleNamespace(cuda_stream=0x123456789ABC)
    driver = Driver()

    def kernels_for(v):
        if v.dtype == torch.float64 or v.shape[-1] not in wkv_cuda.HEAD_SIZES:
            return None
        bf16 = v.dtype == torch.bfloat16
        return wkv_cuda.load(torch.device("cpu", 0), v.shape[-1], bf16, wkv.wkv_reference)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(wkv_cuda, "_libcuda", lambda: driver)
    monkeypatch.setattr(wkv_cuda, "cubin", lambda architecture, N, bf16: b"%d %d" % (N, bf16))
    monkeypatch.setattr(wkv_cuda, "loaded", {})
    monkeypatch.setattr(wkv, "_kernels_for", kernels_for)
    return types.SimpleNamespace(properties=properties, driver=driver)


@contextlib.contextmanager
def memory_holds_nan():
    """In here, torch's fresh memory holds NaN, so that nobody can count on zeros."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
