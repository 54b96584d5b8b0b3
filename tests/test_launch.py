"""wkv_cuda.py, from the file on the disk to the launch: what it needs, what it keeps, and what it tells.

Shapes: B batch, T tokens, H heads, N head size.
"""

import shutil
import subprocess
import sys
import types

import torch

import wkv_cuda as loader
from conftest import ROOT
from wkv import wkv_reference


def test_the_operator_stands_alone(tmp_path):
    """wkv.py, wkv_cuda.py and wkv_kernel.cu work in an empty folder, with torch and without this project.

    Catches: an import of the files that run rounds, which whoever copies the operator would have to copy too.
    """
    for name in ("wkv.py", "wkv_cuda.py", "wkv_kernel.cu"):
        shutil.copy(ROOT / name, tmp_path)
    code = "import torch, wkv; print(wkv.wkv(*[torch.zeros(1, 5, 1, 16)] * 6)[0].shape)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.strip() == "torch.Size([1, 5, 1, 16])", ran.stderr


def test_damaged_kernels_are_compiled_again(monkeypatch, tmp_path, capsys):
    """A kept file that lost its end, changed one bit or became empty is named on stderr and made anew.

    Catches: a broken file that keeps a machine on the slow PyTorch form until someone deletes it.
    """
    compiled = []

    def compile_it(source, options):
        compiled.append(options)
        return b"a cubin"

    monkeypatch.setenv("WKV_CACHE", str(tmp_path))
    monkeypatch.setattr(loader, "compile_source", compile_it)
    monkeypatch.setattr(loader, "nvrtc", types.SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)))
    assert loader.cubin("sm_90", 64, True) == b"a cubin"
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    for damaged in (whole[:-1], flipped, b""):
        kept.write_bytes(damaged)
        capsys.readouterr()
        assert loader.cubin("sm_90", 64, True) == b"a cubin"
        notice = capsys.readouterr().err
        assert notice.count("\n") == 1 and str(kept) in notice
        assert kept.read_bytes() == whole
    assert len(compiled) == 4


def test_a_fault_of_the_gpu_at_first_use_is_one_line(monkeypatch, capsys):
    """An error that torch raises while the kernels are checked is told in one line, and PyTorch's form runs.

    Catches: a traceback from a GPU's fault, which is a RuntimeError of many lines, not an OSError.
    """
    fault = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`"

    def fail(*arguments):
        raise torch.AcceleratorError(fault)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(loader, "_load", fail)
    monkeypatch.setattr(loader, "loaded", {})
    assert [loader.load(torch.device("cpu"), 64, True, wkv_reference) for _ in range(2)] == [None, None]
    notice = capsys.readouterr().err
    told = "CUDA error: an illegal memory access was encountered"
    assert notice == f"wkv: no CUDA kernel, the slower PyTorch form runs: {told}\n"
