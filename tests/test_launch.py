"""wkv_cuda.py on its way from the file on the disk to the launch, without a GPU.

The first part is about compiled kernels on the disk. The second is about the check at first use, which has to
find every fault with room to spare. The third is about what is launched and with which arguments. These two
have a driver in Python (kernel_on_cpu.py), whose kernels run on the CPU. The fourth has a driver in C
(fake_libcuda.c), with the prototypes of cuda.h, and the compiled kernels' own lists of parameters; it needs
NVRTC.

Shapes: B batch, T tokens, H heads, N head size.
"""

import ctypes
import math
import shutil
import struct
import subprocess
import sys
import types
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import wkv_cuda as loader
from conftest import ROOT, relative_error
from kernel_on_cpu import TESTS, barrier_lines, build, memory_holds_nan, needs_compiler, stub_gpu
from wkv import wkv, wkv_cuda, wkv_reference

NAMES = ("y", "state", "dr", "dlog_w", "dk", "dv", "da", "db", "dstate")


def make(B, T, H, N, bf16=True):
    """Inputs as RWKV-7 makes them, (B, T, H, N) each, and a state (B, H, N, N), in fp32. Where the kernels
    take bf16, bf16 holds these numbers as they are."""
    rng = torch.Generator().manual_seed(0)
    r, k, v, removal, gate, decay = torch.randn(6, B, T, H, N, generator=rng)
    removal = F.normalize(removal, dim=-1)
    inputs = [r, k, v, -removal, removal * gate.sigmoid()]
    if bf16:
        inputs = [x.bfloat16().float() for x in inputs]
    inputs.insert(1, -math.exp(-0.5) * (3 * decay).sigmoid())
    return [*inputs, torch.randn(B, H, N, N, generator=rng)]


def run(function, tensors, dtype=None):
    """y, the final state, and the gradients of a fixed weighting of both, in the order of NAMES."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    outputs = function(*leaves)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng).bfloat16().to(x.dtype) for x in outputs]
    return *(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, weights)


def on_gpu(r, log_w, k, v, a, b, state):
    """wkv_cuda with v in bf16, and so all but log_w and the state."""
    return wkv_cuda(r, log_w, k, v.bfloat16(), a, b, state)


def assert_close(values, references, tolerance):
    for name, value, reference in zip(NAMES, values, references):
        error = relative_error(value, reference)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"  # false for NaN too


# ---- 1. on the disk ----------------------------------------------------------------------------------------


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


def test_compiled_kernels_are_kept_by_all_that_decides_them(monkeypatch, tmp_path):
    """A kept kernel is used if source, options, GPU and compiler are the same, and is whole or not there.

    Catches: an old kernel used after one of these changed, a kernel compiled at every start, a half kernel
    that the next start takes for a whole one, and an error where no file can be written.
    """
    asked, folder = [], tmp_path / "cache"

    def compile_it(source, options):
        asked.append(options)
        return b"cubin of " + source + repr(options).encode()

    monkeypatch.setenv("WKV_CACHE", str(folder))
    monkeypatch.setattr(loader, "SOURCE", tmp_path / "kernel.cu")
    monkeypatch.setattr(loader, "compile_source", compile_it)
    monkeypatch.setattr(loader, "nvrtc", types.SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)))
    loader.SOURCE.write_text("one")

    def disk_full(*names):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", disk_full)
        first = loader.cubin("sm_90", 64, True)
    assert not list(folder.iterdir())
    assert [loader.cubin("sm_90", 64, True) for _ in range(2)] == [first] * 2
    assert len(asked) == 2
    others = [("sm_80", 64, True), ("sm_90", 32, True), ("sm_90", 64, False)]
    assert len({first, *(loader.cubin(*other) for other in others)}) == 4
    loader.SOURCE.write_text("two")
    assert loader.cubin("sm_90", 64, True) != first
    loader.nvrtc.nvrtcVersion = lambda: (0, 13, 1)
    loader.cubin("sm_90", 64, True)
    assert len(asked) == 7 and len(list(folder.glob("*.cubin"))) == len(list(folder.iterdir())) == 6
    monkeypatch.setenv("WKV_CACHE", "/dev/null/nowhere")
    assert loader.cubin("sm_80", 64, True)


def test_without_a_compiler_wkv_says_so_once_and_goes_on(monkeypatch, capsys):
    """A machine without NVRTC, or with a GPU that is too old, gets one line that says what to install.

    Catches: a machine that cannot run at all, or that says so again at every layer and step.
    """
    real_cubin = loader.cubin
    gpu = stub_gpu(monkeypatch)
    monkeypatch.setattr(loader, "cubin", real_cubin)
    monkeypatch.setattr(loader, "nvrtc", None)
    assert [load() for _ in range(3)] == [None] * 3
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "pip install cuda-bindings" in notice
    gpu.properties.major = 7
    assert load(bf16=False) is None
    assert "too old" in capsys.readouterr().err


# ---- 2. the check at first use -----------------------------------------------------------------------------
#
# N = 32, so that rows split over two blocks


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose kernels run on the CPU, with nothing loaded yet and no schedule drawn."""
    stub = stub_gpu(monkeypatch)
    stub.kernel = build(32, True)
    stub.kernel.seed = stub.kernel.drop = 0
    with memory_holds_nan():
        yield stub


def load(bf16=True):
    return loader.load(torch.device("cpu", 0), 32 if bf16 else 16, bf16, wkv_reference)


def worst_of_check():
    """The largest error that the check finds, as a multiple of what it allows; infinite for NaN."""
    kernels = loader._load(torch.device("cpu", 0), 32, True)
    multiples = []
    for found in loader._compare(kernels, torch.device("cpu", 0), 32, wkv_reference):
        multiples += [error / found.allowed for error in found.errors.values()]
    return max(math.inf if math.isnan(multiple) else multiple for multiple in multiples)


def swapped(kernel, i, j):
    """A driver that hands this kernel its arguments i and j in the other's place."""

    def spoil(name, addresses):
        if name == kernel:
            addresses[i], addresses[j] = addresses[j], addresses[i]
        return addresses

    return spoil


def replaced(kernel, i, value):
    """A driver that hands this kernel an int, or a null pointer for 0, as its argument i."""
    value = ctypes.c_uint64(value)

    def spoil(name, addresses):
        if name == kernel:
            addresses[i] = ctypes.addressof(value)
        return addresses

    return spoil


FAULTS = {
    "the forward takes k for b": swapped("wkv_forward", 4, 7),
    "the forward takes a for b": swapped("wkv_forward", 6, 7),
    "the forward has no state": replaced("wkv_forward", 8, 0),
    "the chain has no dstate": replaced("wkv_backward_chain", 8, 0),
    "the chain takes a for b": swapped("wkv_backward_chain", 5, 6),
    "the chain takes r for dy": swapped("wkv_backward_chain", 3, 7),
    "the chain has segments of 5 chunks, not 4": replaced("wkv_backward_chain", 2, 5),
    "the backward takes a for b": swapped("wkv_backward", 7, 8),
    "the backward takes r for k": swapped("wkv_backward", 3, 5),
    "the backward has no dstate": replaced("wkv_backward", 11, 0),
    "the backward writes da for db": swapped("wkv_backward", 17, 18),
    "the token kernel takes r for v": swapped("wkv_token_forward", 2, 5),
    "the token kernel takes a for b": swapped("wkv_token_forward", 6, 7),
}


def test_right_kernels_are_at_half_of_what_the_check_allows(gpu):
    """Right kernels give the recurrence to half the tolerance or better, so that they pass on other hardware.

    Catches: a tolerance so tight that the tensor cores' own rounding would fail the check.
    """
    assert worst_of_check() <= 0.5


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_sees_a_wrong_argument(gpu, fault):
    """With any of these faults some output is off by five times the tolerance and more.

    Catches: a check whose problems hide a fault, as one did that passed a chain without dstate.
    """
    gpu.driver.spoil = FAULTS[fault]
    assert worst_of_check() >= 5


@pytest.mark.parametrize("line", barrier_lines())
def test_the_check_sees_a_missing_wait(gpu, line):
    """Without any one wait, some order of warps puts an output off by five times the tolerance.

    Catches: a check too short for its chunks to overlap.
    """
    gpu.kernel.drop = line
    for gpu.kernel.seed in range(12):
        try:
            if worst_of_check() >= 5:
                return
        except OSError:  # the kernel did not finish
            return
    pytest.fail(f"no order of warps showed that line {line} of wkv_kernel.cu was left out")


def test_a_wrong_kernel_is_told_once_and_never_runs(gpu, capsys):
    """The line names the kernel, the shape, the dtype, every error and what is allowed; PyTorch's form runs.

    Catches: a check that lets a wrong kernel pass, that speaks up at every call, or that tells too little for
    a report from a machine that nobody here can try.
    """
    gpu.driver.spoil = FAULTS["the chain has no dstate"]
    assert load() is None
    gpu.driver.launched.clear()
    assert load() is None and not gpu.driver.launched
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1
    assert notice.startswith("wkv: no CUDA kernel, the slower PyTorch form runs: ITS NUMBERS ARE WRONG")
    for part in ("wkv_backward_chain", "(1, 149, 2, 32)", "torch.bfloat16", "allowed 1.2e-02"):
        assert part in notice
    for name in NAMES[2:]:
        assert f" {name} " in notice
    tensors = make(1, 20, 2, 32)
    assert_close(run(wkv, tensors), run(wkv_reference, tensors), 1e-5)


def test_a_nan_is_wrong(gpu, monkeypatch, capsys):
    """One NaN in y fails the check. Catches: a comparison that is false for NaN and so lets it pass."""

    def one_nan(*arguments, right=loader.run, **options):
        y, final = right(*arguments, **options)
        return y + torch.zeros_like(y).index_fill(1, torch.tensor([3]), math.nan), final

    monkeypatch.setattr(loader, "run", one_nan)
    assert load() is None
    assert "y nan" in capsys.readouterr().err


def test_a_driver_that_fails_is_told_with_the_kernel(gpu, monkeypatch, capsys):
    """A launch that the driver refuses is one line with the kernel, the error's number and its name.

    Catches: an error that could have come from any of four kernels.
    """
    monkeypatch.setattr(gpu.driver, "cuLaunchKernel", lambda *arguments: 701)
    assert load() is None
    told = "the CUDA driver's cuLaunchKernel for wkv_token_forward failed with error 701, AN_ERROR"
    assert capsys.readouterr().err == f"wkv: no CUDA kernel, the slower PyTorch form runs: {told}\n"


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


def test_a_right_kernel_passes_wherever_its_first_use_falls(gpu, capsys):
    """The check gives the same answer inside inference, autocast, activation checkpointing or another device.
    It takes every path of every kernel, runs once, and moves nobody's random numbers.

    Catches: a check that fails or disturbs in such a place, or that misses a kernel.
    """
    tensors = make(1, 20, 2, 32)
    assert load()
    assert {*gpu.driver.launched} == {*loader.ENTRY_POINTS}
    rows = {("wkv_forward", 1), ("wkv_forward", 2), ("wkv_backward_chain", 2)}
    assert gpu.driver.grids == rows | {("wkv_token_forward", 1), ("wkv_backward", 1), ("wkv_backward", 3)}
    expected = run(on_gpu, tensors)
    seen = torch.get_rng_state()
    device, autocast = torch.device("meta"), torch.autocast("cpu", torch.bfloat16)
    for around in (torch.inference_mode(), torch.no_grad(), autocast, device):
        loader.loaded.clear()
        with around:
            assert load()
    loader.loaded.clear()
    checkpointed = run(lambda *x: checkpoint(on_gpu, *x, use_reentrant=False), tensors)
    for value, reference in zip(checkpointed, expected):
        assert torch.equal(value, reference)
    assert load(bf16=False)
    assert torch.equal(torch.get_rng_state(), seen)
    gpu.driver.launched.clear()
    assert load() and not gpu.driver.launched
    assert capsys.readouterr().err == ""


def test_a_first_use_while_a_graph_is_captured(gpu, monkeypatch, capsys):
    """A first use during a capture is told and not remembered; a later one during a capture is fine.

    Catches: a kernel given up for good because its first use came at a bad moment.
    """
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert load() is None
    assert "capture" in capsys.readouterr().err and not gpu.driver.launched
    kernels = load()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kernels and load() is kernels


# ---- 3. what is launched -----------------------------------------------------------------------------------


@pytest.mark.parametrize("processors", (16, 1))
def test_kernels_through_the_driver_give_the_recurrence(gpu, processors):
    """Outputs and gradients are those of the recurrence, with and without the chain, and with few processors.

    Catches: arguments in a wrong order, a wrong grid, buffers too small, gradients in wrong places.
    """
    gpu.properties.multi_processor_count = processors
    load()
    for B, T, H in ((1, 1, 1), (2, 37, 2), (1, 150, 1), (1, 150, 3)):
        tensors = make(B, T, H, 32)
        gpu.driver.launched.clear()
        assert_close(run(on_gpu, tensors), run(wkv_reference, tensors, torch.float64), 1e-2)
        # several segments, and so the chain, where tokens are many and heads few
        chain = []
        if T == 150 and H <= 2 * processors:
            chain = ["wkv_backward_chain"]
        assert gpu.driver.launched == ["wkv_forward", *chain, "wkv_backward"]


def test_each_kernel_where_it_is_meant_to_run(gpu, capsys):
    """One token of inference goes to the token kernel, more to the chunked one; a GPU with too little shared
    memory has the token kernel and PyTorch's backward, and is told so.

    Catches: a state rounded to bf16 at each decoded token, and a launch that needs more than the GPU has.
    """
    kernels, launched = load(), gpu.driver.launched
    assert kernels.chunked and not load(bf16=False).chunked
    rows, gradients = gpu.kernel.shared
    assert [kernels.shared[name] for name in loader.ENTRY_POINTS] == [rows, rows, gradients, 0]
    tensors = make(2, 1, 2, 32)
    launched.clear()
    with torch.no_grad():
        _, final = on_gpu(*tensors)
        on_gpu(*make(1, 2, 1, 32))
    assert launched == ["wkv_token_forward", "wkv_forward"]
    assert relative_error(final, wkv_reference(*[x.double() for x in tensors])[1]) <= 1e-6
    assert capsys.readouterr().err == ""
    loader.loaded.clear()
    gpu.properties.shared_memory_per_block_optin = 2**12
    exact = run(wkv_reference, tensors, torch.float64)
    assert_close(run(on_gpu, tensors), exact, 1e-2)
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "head size 32 needs more shared memory than stub has" in notice
    assert "wkv_backward" not in launched[2:]
    with torch.no_grad():
        assert_close(on_gpu(*tensors), exact, 1e-2)
    assert launched[-1] == "wkv_token_forward"


def test_kernels_take_strided_and_misaligned_tensors(gpu):
    """Inputs, dy and dstate in any layout give the bits of contiguous, aligned ones.

    Catches: garbage from a tensor whose memory is not laid out as the kernel reads it.
    """
    tensors = [x.float() for x in make(2, 20, 2, 32)]
    room = torch.zeros(2 * 20 * 2 * 32 + 1, dtype=torch.bfloat16)[1:].view(2, 20, 2, 32)
    room.copy_(tensors[0])
    assert room.data_ptr() % 16 != 0
    plain = [tensors[0].bfloat16(), *tensors[1:]]
    strided = [room, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[1:])]

    for value, reference in zip(run(on_gpu, strided), run(on_gpu, plain)):
        assert torch.equal(value, reference)
    y, final = on_gpu(*(x.requires_grad_() for x in plain))
    dy, dfinal = torch.randn(y.mT.shape).bfloat16(), torch.randn(final.shape)
    contiguous = torch.autograd.grad((y, final), plain, (dy.mT.contiguous(), dfinal.mT.contiguous()), True)
    for value, reference in zip(torch.autograd.grad((y, final), plain, (dy.mT, dfinal.mT)), contiguous):
        assert torch.equal(value, reference)


def test_gradients_of_y_or_the_state_alone(gpu):
    """The gradient of one output is that of both where the other has weight 0; no zeros stand for dstate.

    Catches: a missing gradient taken for a tensor, or for garbage; a tensor of zeros as large as the state.
    """
    tensors = [x.requires_grad_() for x in make(1, 40, 2, 32)]
    y, final = on_gpu(*tensors)
    pointers = []  # to dstate, the backward's argument 11

    def note(name, addresses):
        pointers.append(ctypes.c_void_p.from_address(addresses[11]).value)
        return addresses

    gpu.driver.spoil = note
    for output, zero in ((y, final), (final, y)):
        alone = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
        both = torch.autograd.grad(output.sum() + 0 * zero.sum(), tensors, retain_graph=True)
        assert all(torch.equal(x, z) for x, z in zip(alone, both))
    assert pointers[0] is None and all(pointers[1:])


# ---- 4. the driver's prototypes and the compiled kernels' parameters ---------------------------------------
#
# What Python cannot see: a handle cut to 32 bits, an int where the kernel has a pointer, a grid, an alignment
# or a size that the real driver refuses. The cubin itself, an ELF file, says how its arguments lie.


class Parameters(NamedTuple):
    """What a cubin says of one kernel: the offset and size in bytes of each argument, and its limits."""

    offsets: list[int]
    sizes: list[int]
    most_threads: int
    static_shared: int


def sections(cubin):
    """{name: content} of an ELF file (64 bits, little-endian), and {name: size}, as some have no content."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    entries = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry_size) for i in range(count)]
    names_offset = entries[names_at][4]
    contents, sizes = {}, {}
    for name_at, _, _, _, offset, size in entries:
        start = names_offset + name_at
        name = cubin[start:cubin.index(b"\0", start)].decode()
        contents[name], sizes[name] = cubin[offset:offset + size], size
    return contents, sizes


def parameters_of(cubin):
    """{kernel: Parameters} and the two numbers of wkv_shared_bytes, read from a cubin.

    A section .nv.info.KERNEL is a row of attributes: a byte for the format, a byte for the attribute, and two
    bytes for the size of what follows (format 4) or for a value (all other formats).
    """
    KPARAM_INFO, MAX_THREADS = 0x17, 0x05
    contents, sizes = sections(cubin)
    found = {}
    for name in loader.ENTRY_POINTS:
        info, at, arguments, most_threads = contents[f".nv.info.{name}"], 0, {}, None
        while at < len(info):
            format, attribute, size = struct.unpack_from("<BBH", info, at)
            at += 4
            if format != 4:
                continue
            if attribute == KPARAM_INFO:
                _, ordinal, offset, packed = struct.unpack_from("<IHHI", info, at)
                arguments[ordinal] = offset, packed >> 18
            elif attribute == MAX_THREADS:
                most_threads, _, _ = struct.unpack_from("<III", info, at)
            at += size
        offsets, argument_sizes = zip(*(arguments[i] for i in range(len(arguments))))
        # the first 1024 bytes of shared memory are the system's
        static_shared = max(0, sizes.get(f".nv.shared.{name}", 0) - 1024)
        found[name] = Parameters(list(offsets), list(argument_sizes), most_threads, static_shared)
    return found, struct.unpack_from("<ii", contents[".nv.constant3"])


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory):
    """fake_libcuda.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler to build the fake driver")
    library = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
    flags = ("-shared", "-fPIC", "-Wall", "-Werror")
    subprocess.run([compiler, *flags, str(TESTS / "fake_libcuda.c"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, *[ctypes.c_uint] * 5, ctypes.POINTER(ctypes.c_void_p)
)


@pytest.fixture(scope="session")
def cubins(tmp_path_factory):
    """cubins(N, bf16): the kernels as a user's machine with an H100 compiles them, each compiled once."""
    if loader.nvrtc is None:
        pytest.skip("needs NVRTC: pip install cuda-bindings nvidia-cuda-nvrtc")
    folder, real_cubin = tmp_path_factory.mktemp("kept"), loader.cubin

    def get(N, bf16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WKV_CACHE", str(folder))
            return real_cubin("sm_90", N, bf16)

    return get


@pytest.fixture
def h100(monkeypatch, libcuda, cubins):
    """h100(N, bf16) makes the fake driver ready for these kernels and returns a list of what is launched from
    then on, (kernel, grid, shared) each."""
    stub = stub_gpu(monkeypatch)
    stream = ctypes.c_uint64(torch.cuda.current_stream(None).cuda_stream)
    stub.properties.shared_memory_per_block_optin = 227 * 1024
    monkeypatch.setattr(loader, "_libcuda", lambda: libcuda)
    alive = []  # what only C refers to

    def prepare(N, bf16):
        image, kernel, launched = cubins(N, bf16), build(N, bf16), []
        kernel.seed = kernel.drop = 0
        parameters, shared_bytes = parameters_of(image)

        @LAUNCH
        def launch(name, x, y, z, threads, shared, arguments):
            name = name.decode()
            launched.append((name, (x, y, z), shared))
            return kernel.start(name, (x, y, z), threads, shared, arguments)

        alive.append(launch)
        assert list(shared_bytes) == kernel.shared
        libcuda.fake_start(launch, stream, *shared_bytes)
        for name, given in parameters.items():
            array = ctypes.c_int * len(given.offsets)
            libcuda.fake_kernel(name.encode(), len(given.offsets), array(*given.offsets), array(*given.sizes),
                                given.most_threads, given.static_shared)
        monkeypatch.setattr(loader, "cubin", lambda architecture, N, bf16: image)
        monkeypatch.setattr(loader, "loaded", {})
        return launched

    with memory_holds_nan():
        yield prepare


@needs_compiler
@pytest.mark.parametrize("N, bf16", [(16, True), (32, True), (64, True), (128, True), (64, False)])
def test_the_launch_path_with_the_real_prototypes(h100, N, bf16, capsys):
    """Loading, the check, and forward and backward of short and long rows pass a driver with cuda.h's own
    prototypes, on arguments laid out as the compiled kernels want them, and give the recurrence.

    Catches: arguments in a wrong order or of a wrong size, a handle cut to 32 bits, a grid, a block or shared
    memory beyond what the kernel was compiled for, a stream or a context that is not torch's.
    """
    launched = h100(N, bf16)
    kernels = loader.load(torch.device("cpu", 0), N, bf16, wkv_reference)
    assert kernels is not None, capsys.readouterr().err
    assert kernels.chunked == bf16
    if bf16:
        assert {name for name, _, _ in launched} == {*loader.ENTRY_POINTS}
    for B, T, H in ((1, 150, 2), (2, 33, 3), (1, 1, 2)):
        launched.clear()
        tensors = make(B, T, H, N, bf16)

        def operator(r, log_w, k, v, a, b, state):
            if bf16:
                v = v.bfloat16()
            return wkv_cuda(r, log_w, k, v, a, b, state)

        truth = run(wkv_reference, tensors, torch.float64)
        assert_close(run(operator, tensors), truth, 1e-2)
        with torch.no_grad():
            assert_close(operator(*tensors), truth, 1e-2)
        assert launched


WRONG_ORDERS = {
    "the backward's segment after r": ("wkv_backward", 0, 1),
    "the chain's segment after r": ("wkv_backward_chain", 0, 1),
    "the forward's b before a": ("wkv_forward", 4, 5),
}


@needs_compiler
@pytest.mark.parametrize("fault", WRONG_ORDERS)
def test_a_wrong_order_of_arguments_is_refused(h100, fault, monkeypatch, capsys):
    """Two neighbouring arguments that change places in Python fail the check. Catches: a bench that would not
    notice what it is there for."""
    kernel, i, j = WRONG_ORDERS[fault]
    real_launch = loader._launch

    def launch(kernels, name, like, blocks, threads, arguments):
        arguments = list(arguments)
        if name == kernel:
            arguments[i], arguments[j] = arguments[j], arguments[i]
        real_launch(kernels, name, like, blocks, threads, arguments)

    h100(32, True)
    monkeypatch.setattr(loader, "_launch", launch)
    assert loader.load(torch.device("cpu", 0), 32, True, wkv_reference) is None
    assert "wkv: no CUDA kernel" in capsys.readouterr().err
