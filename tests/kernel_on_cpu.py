"""
Builds wkv_kernel.cu with g++ and calls its entry points on CPU tensors, as a loader would on a GPU.

    kernels = KernelOnCPU(directory, head_size=64, bf16=True)
    y, sT, kept = kernels.forward(r, log_w, k, v, a, b, s0)
    dr, dlog_w, dk, dv, da, db, ds0 = kernels.backward(r, log_w, k, v, a, b, kept, dy, dsT)

Shapes: B batch, T tokens, H heads, N head size, C = ceil(T / 16) chunks. r, k, v, a, b, y and their gradients
are (B, T, H, N) in bf16 or fp32; log_w and dlog_w (B, T, H, N) fp32; states (B, H, N, N) fp32 [value, key].
"""

import ctypes
import math
import subprocess
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "wkv_kernel.cu"
KERNELS = ("wkv_token_forward", "wkv_forward", "wkv_backward_chain", "wkv_backward")
CHUNK = 16


def compile_command(output, head_size, bf16, source=SOURCE, flags=("-O1", "-fPIC", "-shared"), extra=()):
    """The g++ command, and beside `output` the C++ file it compiles: the header, the kernel, an export for
    each entry point."""
    wrapper = Path(output).with_suffix(".cpp")
    exports = "\n".join(f"CUDA_ON_CPU_EXPORT({name})" for name in KERNELS)
    wrapper.write_text(f'#include "{source}"\n{exports}\n')
    return [
        "g++",
        "-std=c++17",
        "-fno-strict-aliasing",
        "-Wno-unknown-pragmas",
        f"-DHEAD_SIZE={head_size}",
        f"-DINPUT_BF16={int(bf16)}",
        "-include",
        str(TESTS / "cuda_on_cpu.h"),
        *flags,
        str(wrapper),
        *extra,
        "-o",
        str(output),
    ]


class KernelOnCPU:
    """The entry points of one build. `seed` draws the schedule; `drop` names a source line whose barrier is
    left out."""

    def __init__(self, directory, head_size=64, bf16=True, source=SOURCE, name="kernel"):
        output = Path(directory) / f"{name}_{head_size}_{int(bf16)}.so"
        if not output.exists():
            subprocess.run(compile_command(output, head_size, bf16, source), check=True)
        self.library = ctypes.CDLL(str(output))
        self.N = head_size
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.shared = list((ctypes.c_int * 2).in_dll(self.library, "wkv_shared_bytes"))
        self.seed = 0
        self.drop = 0

    def launch(self, kernel, grid, block, shared, *arguments):
        values = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                values.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                values.append(ctypes.c_void_p(None) if argument is None else ctypes.c_int(argument))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        run = getattr(self.library, "run_" + kernel)
        failed = run(
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_uint(block),
            ctypes.c_size_t(shared),
            pointers,
            ctypes.c_uint64(self.seed),
            ctypes.c_int(self.drop),
        )
        if failed:
            raise RuntimeError(f"{kernel} did not finish")

    def launch_rows(self, kernel, r, split, *arguments):
        """One of the kernels that carry the state, its rows over `split` blocks."""
        B, T, H, N = r.shape
        self.launch(kernel, (H, B, split), 32 * (5 + N // 16 // split), self.shared[0], T, H, *arguments)

    def inputs(self, r, log_w, k, v, a, b):
        return [
            x.to(torch.float32 if x is log_w else self.dtype).contiguous() for x in (r, log_w, k, v, a, b)
        ]

    def empty(self, *shape, dtype=torch.float32):
        return torch.full(shape, math.nan, dtype=dtype)  # nobody may count on zeros

    def token_forward(self, r, log_w, k, v, a, b, s0=None):
        x = self.inputs(r, log_w, k, v, a, b)
        B, T, H, N = r.shape
        y = self.empty(B, T, H, N, dtype=self.dtype)
        sT = self.empty(B, H, N, N)
        self.launch("wkv_token_forward", (H, B, 1), N, 0, T, H, *x, s0, y, sT)
        return y, sT

    def forward(self, r, log_w, k, v, a, b, s0=None, keep=True, split=1):
        x = self.inputs(r, log_w, k, v, a, b)
        B, T, H, N = r.shape
        y = self.empty(B, T, H, N, dtype=self.dtype)
        sT = self.empty(B, H, N, N)
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
        gradients = [self.empty(B, T, H, N, dtype=i.dtype) for i in x]
        ds0 = self.empty(B, H, N, N)
        carry = self.empty(B, H, segments, N, N) if segments > 1 else None
        if carry is not None:
            r_, log_w_, _, _, a_, b_ = x
            self.launch_rows("wkv_backward_chain", r, split, segment, r_, log_w_, a_, b_, dy, dsT, carry)
        outputs = (*gradients, ds0)
        self.launch("wkv_backward", (H, B, segments), 2 * N, self.shared[1],
                    T, H, segment, *x, kept, dy, dsT, carry, *outputs)
        return outputs
