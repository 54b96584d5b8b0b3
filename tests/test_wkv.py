"""The WKV-7 operator: the chunked form and the road to the CUDA kernels against the recurrence in fp64.

Shapes: B batch, T tokens, H heads, N head size.
"""

import contextlib
import ctypes
import math
import shutil
import subprocess
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import kernel_loader
import wkv as operator
from conftest import relative_error
from wkv import wkv, wkv_chunked, wkv_cuda, wkv_reference

NAMES = ("y", "state", "dr", "dlog_w", "dk", "dv", "da", "db", "dstate")
LOWEST = -math.exp(-0.5)
KINDS = ("usual", "fastest decay", "no decay", "same key", "same key, no decay")


def make(B, T, H, N, seed=0, kind="usual", dtype=torch.float64):
    """Inputs as RWKV-7 makes them, (B, T, H, N) each, and a state (B, H, N, N)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, k, v, removal, gate = (normal(B, T, H, N) for _ in range(5))
    log_w = LOWEST * torch.sigmoid(3 * normal(B, T, H, N))
    gate = torch.sigmoid(gate)
    if "same key" in kind:
        removal = removal[:, :1].expand_as(removal)
        k = k[:, :1].expand_as(k)
        gate = torch.ones_like(gate)
    if kind == "fastest decay":
        log_w = torch.full_like(log_w, LOWEST)
    if "no decay" in kind:
        log_w = 1e-4 * log_w
    removal = F.normalize(removal, dim=-1)
    return [x.to(dtype) for x in (r, log_w, k, v, -removal, removal * gate, normal(B, H, N, N))]


def run(function, tensors, dtype=None):
    """y, the final state, and the gradients of a fixed weighting of both, in the order of NAMES."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    y, state = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, state)]
    return y.detach(), state.detach(), *torch.autograd.grad((y, state), tensors, weights)


def assert_close(values, references, tolerance):
    """In relative L2, or relative to 0.1 a number where the truth is less (dlog_w of a first token is 0)."""
    for name, value, reference in zip(NAMES, values, references):
        error = (value.double() - reference.double()).norm()
        scale = max(reference.double().norm(), 0.1 * math.sqrt(reference.numel()))
        assert error <= tolerance * scale, f"{name}: relative error {error / scale:.1e}"  # false for NaN too


@settings(deadline=None, max_examples=60)
@given(
    B=st.integers(1, 3), T=st.integers(1, 80), H=st.integers(1, 3), N=st.sampled_from((4, 8, 16, 32, 64)),
    seed=st.integers(0, 999), kind=st.sampled_from(KINDS), with_state=st.booleans(), short_spans=st.booleans()
)  # fmt: skip
def test_chunked_is_the_recurrence(B, T, H, N, seed, kind, with_state, short_spans):
    """A slip in the algebra of chunks, in cutting T into spans, in a gradient; a loss of digits in fp32."""
    tensors = make(B, T, H, N, seed, kind)[: 7 if with_state else 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "CPU_SPAN", 1 if short_spans else operator.CPU_SPAN)
        assert_close(run(wkv_chunked, tensors), run(wkv_reference, tensors), 1e-10)
        rounded = [x.float() for x in tensors]
        assert_close(run(wkv_chunked, rounded), run(wkv_reference, rounded, torch.float64), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_stay_accurate_in_fp32(kind):
    """Errors that add up from chunk to chunk, or an inverse that loses its digits where keys repeat."""
    tensors = [x.float() for x in make(1, 600, 1, 64, kind=kind)]
    assert_close(run(wkv_chunked, tensors), run(wkv_reference, tensors, torch.float64), 1e-5)


@pytest.mark.parametrize("T", (1, 2, 3, 4, 17, 33))
def test_wkv_gives_the_same_by_either_form(T):
    """Single steps, chunks and a last chunk of one token that do not fit together."""
    tensors = make(2, T, 2, 16)
    assert_close(run(wkv, tensors), run(wkv_reference, tensors), 1e-12)


def test_reference_against_numbers_by_hand():
    """A reference that is wrong itself: a transposed state, decay after writing, a reading the new state."""
    one = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    numbers = ([1, 10], [2, 3], [5, 7], [1, -1], [4, 6])
    r, k, v, a, b = (one * torch.tensor(x, dtype=torch.float64) for x in numbers)
    log_w = torch.tensor([0.5, 0.25], dtype=torch.float64).log().expand(1, 1, 1, 2)
    state = torch.tensor([[[[8.0, 4.0], [16.0, 32.0]]]], dtype=torch.float64)
    y, final = wkv_reference(r, log_w, k, v, a, b, state)
    # u = S a = [4, -16]; S = S diag(w) + u b' + v k'
    expected = torch.tensor([[4 + 16 + 10, 1 + 24 + 15], [8 - 64 + 14, 8 - 96 + 21]], dtype=torch.float64)
    assert torch.allclose(final[0, 0], expected, rtol=1e-14)
    assert torch.allclose(y[0, 0, 0], expected @ torch.tensor([1.0, 10.0], dtype=torch.float64), rtol=1e-14)


@settings(deadline=None, max_examples=15)
@given(T=st.integers(2, 90), where=st.floats(0, 1), N=st.sampled_from((8, 64)), seed=st.integers(0, 2**31))
def test_splitting_a_sequence_changes_nothing(T, where, N, seed):
    """A state that is not all there is to know, or whose gradient does not reach the first part."""
    cut = max(1, min(T - 1, round(where * T)))

    def in_two(r, log_w, k, v, a, b, state):
        inputs = (r, log_w, k, v, a, b)
        y_1, state = wkv(*(x[:, :cut] for x in inputs), state)
        y_2, state = wkv(*(x[:, cut:] for x in inputs), state)
        return torch.cat((y_1, y_2), 1), state

    tensors = make(2, T, 1, N, seed)
    assert_close(run(in_two, tensors), run(wkv_chunked, tensors), 1e-10)


@settings(deadline=None, max_examples=15)
@given(T=st.integers(2, 90), where=st.floats(0, 1), N=st.sampled_from((16, 64)), seed=st.integers(0, 2**31))
def test_later_tokens_never_touch_earlier_outputs(T, where, N, seed):
    """A look ahead: in values not by one bit, in gradients not by anything but zero."""
    t = max(1, min(T - 1, round(where * T)))
    first = [x.float() for x in make(1, T, 2, N, seed)]
    other = [x.float() for x in make(1, T, 2, N, seed + 1)]
    changed = [torch.cat((x[:, :t], z[:, t:]), 1) for x, z in zip(first[:6], other)]
    y, _ = wkv_chunked(*first)
    y_changed, _ = wkv_chunked(*changed, first[6])
    assert torch.equal(y[:, :t], y_changed[:, :t])
    assert not torch.equal(y[:, t:], y_changed[:, t:])
    inputs = [x.requires_grad_() for x in first[:6]]
    y, _ = wkv_chunked(*inputs, first[6])
    for gradient in torch.autograd.grad(y[:, :t].square().sum(), inputs):
        assert not gradient[:, t:].any()
        assert gradient[:, :1].isfinite().all()


@pytest.mark.parametrize("T", (1, 5, 32, 75))
def test_padding_leaves_the_state_alone(T):
    """A state that padding changes by one bit; outputs or gradients of a row that depend on its padding."""
    r, log_w, k, v, a, b, state = (x.float() for x in make(2, 40, 2, 64))
    nothing = torch.zeros(2, T, 2, 64)
    _, final = wkv(*[nothing] * 6, state)
    assert torch.equal(final, state)

    def padded(*tensors):
        *inputs, state = tensors
        y, final = wkv(*(torch.cat((x, nothing), 1) for x in inputs), state)
        assert not y[:, 40:].any()
        return y[:, :40], final

    tensors = (r, log_w, k, v, a, b, state)
    assert_close(run(padded, tensors), run(wkv, tensors), 2e-6)


def test_rows_do_not_depend_on_each_other():
    """Rows or heads mixed up in the reshapes. To rounding: a product of another size may round otherwise."""
    tensors = [x.float() for x in make(3, 70, 2, 16)]
    together = run(wkv_chunked, tensors)
    # the weights of the sum differ, so gradients are compared through the outputs' own squares
    y, state = together[:2]
    for row in range(3):
        y_alone, state_alone = wkv_chunked(*(x[row : row + 1] for x in tensors))
        assert_close((y[row], state[row]), (y_alone[0], state_alone[0]), 2e-6)

    def gradients(tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        y, state = wkv_chunked(*tensors)
        return torch.autograd.grad(y.square().sum() + state.square().sum(), tensors)

    whole = gradients(tensors)
    for row in range(3):
        for together, alone in zip(whole, gradients([x[row : row + 1] for x in tensors])):
            assert relative_error(together[row], alone[0]) <= 5e-6


def test_gradcheck():
    """A gradient that agrees with the reference's only because both share a mistake."""
    tensors = [x.requires_grad_() for x in make(1, 18, 1, 4)]
    assert torch.autograd.gradcheck(wkv_chunked, tensors, fast_mode=True)
    assert torch.autograd.gradcheck(wkv_reference, tensors, fast_mode=True)


def test_under_activation_checkpointing_and_autocast():
    """A backward that relies on more than what it saved; matrix products that autocast rounds to bf16."""
    tensors = [x.float() for x in make(2, 50, 2, 32)]
    plain = run(wkv_chunked, tensors)
    again = run(lambda *x: checkpoint(wkv_chunked, *x, use_reentrant=False), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(wkv_chunked, tensors)
    for a, b, c in zip(plain, again, cast):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_half_precision_inputs_are_computed_in_fp32():
    """A bf16 tensor that slips into a matrix product, and results of the wrong dtype."""
    tensors = [x.bfloat16() for x in make(2, 40, 2, 16)]
    tensors[1] = tensors[1].float()  # log_w stays fp32 under autocast
    y, state, *gradients = run(wkv_chunked, tensors)
    y_32, state_32, *gradients_32 = run(wkv_chunked, [x.float() for x in tensors])
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(y, y_32.bfloat16()) and torch.equal(state, state_32)
    assert [g.dtype for g in gradients] == [x.dtype for x in tensors]
    assert_close(gradients, gradients_32, 5e-2)  # the weights of the sum are rounded too
    assert wkv_reference(*tensors)[0].dtype == torch.bfloat16


def test_strided_inputs_and_missing_gradients():
    """Memory order taken for granted; gradients of one input only, or from y or the state alone."""
    tensors = make(2, 40, 3, 16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert_close(run(wkv_chunked, strided), run(wkv_chunked, tensors), 1e-14)
    r, log_w, k, v, a, b, state = tensors
    k = k.requires_grad_()
    for function in (wkv_chunked, wkv_reference):
        y, final = function(r, log_w, k, v, a, b, state)
        from_y = torch.autograd.grad(y.sum(), k, retain_graph=True)[0]
        from_state = torch.autograd.grad(final.sum(), k, retain_graph=True)[0]
        both = torch.autograd.grad(y.sum() + final.sum(), k)[0]
        assert relative_error(from_y + from_state, both) <= 1e-13


@pytest.mark.parametrize(
    "broken",
    [
        lambda x, s: (*x[:2], x[2][:, 1:], *x[3:], s),
        lambda x, s: (*x, s[:, :, 1:]),
        lambda x, s: (*x[:5], x[5].long(), s),
        lambda x, s: (*(z[:, :0] for z in x), s),
        lambda x, s: (*(z[0] for z in x), s),
        lambda x, s: (x[0].to("meta"), *x[1:], s),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(broken):
    """Broadcasting that hides a wrong shape, or a message from the depths."""
    *inputs, state = make(2, 5, 2, 8)
    for function in (wkv, wkv_reference, wkv_chunked, wkv_cuda):
        with pytest.raises(ValueError, match=r"^wkv: (v|k|r|b|state) must be [^\n]*$"):
            function(*broken(inputs, state))


def test_wkv_cuda_refuses_what_it_cannot_do():
    """Tensors that are not on a GPU handed to one."""
    with pytest.raises(ValueError, match=r"^wkv_cuda: v must be on a GPU[^\n]*$"):
        wkv_cuda(*make(1, 5, 1, 16))


# ---- the CUDA kernels, emulated on the CPU, behind a stub of the driver ------------------------------------
#
# all between wkv_cuda and the GPU runs: the custom operators, their autograd, the packing of arguments, the
# calls to the driver through ctypes. The stub loads the emulator's library; its path stands for the compiled
# kernel.

STUB_DRIVER = r"""
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
typedef int (*Run)(unsigned*, unsigned, size_t, void**, uint64_t, int);
static int context, has_context = 0;
extern "C" {
int launches = 0;
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDevicePrimaryCtxRetain(void** to, int device) { *to = &context; return device; }
int cuCtxSetCurrent(void* current) { has_context = current == &context; return !has_context; }
int cuModuleLoadData(void** module, const char* image) {
    *module = dlopen(image, RTLD_NOW);
    return !has_context || !*module;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    char symbol[99] = "run_";
    *function = dlsym(module, strcat(symbol, name));
    return !*function;
}
int cuModuleGetGlobal_v2(void** address, size_t* size, void* module, const char* name) {
    *address = dlsym(module, name);
    *size = 8;
    return !*address;
}
int cuMemcpyDtoH_v2(void* to, void* from, size_t size) { memcpy(to, from, size); return 0; }
int cuFuncSetAttribute(void* function, int attribute, int) { return !function || attribute != 8; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned two,
                   unsigned three, unsigned shared, void* stream, void** arguments, void** extra) {
    if (!has_context || two != 1 || three != 1 || stream != (void*)0x123456789abc || extra) return 1;
    unsigned grid[3] = {x, y, z};
    launches++;
    has_context = 0;  // as in a thread that comes new to the driver
    return ((Run)function)(grid, threads, shared, arguments, launches, 0);
}
}
"""


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Libraries in the place of the driver and of the compiled kernel, for N = 16 and bf16."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    from kernel_on_cpu import compile_command

    folder = tmp_path_factory.mktemp("stub")
    kernel, driver, source = folder / "kernel.so", folder / "driver.so", folder / "driver.cpp"
    source.write_text(STUB_DRIVER)
    subprocess.run(compile_command(kernel, 16, True, flags=("-O1", "-fPIC", "-shared")), check=True)
    subprocess.run(["g++", "-shared", "-fPIC", "-w", source, "-o", driver], check=True)
    return kernel, ctypes.CDLL(str(driver))


@pytest.fixture(params=["many processors", "one processor", "too little shared memory"])
def stub_gpu(request, emulated, monkeypatch):
    """torch.cuda and the driver as on a GPU, but on the CPU."""
    kernel, driver = emulated
    gpu = types.SimpleNamespace(
        name="stub", major=9, minor=0, multi_processor_count=132 if request.param == "many processors" else 1,
        shared_memory_per_block_optin=0 if request.param == "too little shared memory" else 2**18,
    )  # fmt: skip
    stream = types.SimpleNamespace(cuda_stream=0x123456789ABC)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(kernel_loader, "libcuda", lambda: driver)
    monkeypatch.setattr(kernel_loader, "cubin", lambda architecture, N, bf16: str(kernel).encode())
    monkeypatch.setattr(operator, "load", lambda number, N, bf16: kernel_loader.load(0, N, bf16))
    for cached in (kernel_loader.load, operator._choose_kernel):
        cached.cache_clear()
    yield driver
    for cached in (kernel_loader.load, operator._choose_kernel):
        cached.cache_clear()


def on_stub(r, log_w, k, v, a, b, state):
    """What wkv_cuda does once its tensors are known to be on a GPU, with v in bf16."""
    return operator._by_kernel(operator._kernel_for(0, 16, True), r, log_w, k, v.bfloat16(), a, b, state)


@pytest.mark.parametrize("B, T, H", ((1, 1, 1), (2, 37, 2), (1, 150, 1)))
def test_kernels_through_the_driver_give_the_recurrence(stub_gpu, B, T, H):
    """Arguments in a wrong order or width, a wrong grid, buffers too small, gradients in wrong places."""
    tensors = [x.float() for x in make(B, T, H, 16)]
    tensors = [x if i in (1, 6) else x.bfloat16().float() for i, x in enumerate(tensors)]
    exact = run(wkv_reference, tensors, torch.float64)
    launches = ctypes.c_int.in_dll(stub_gpu, "launches")
    before = launches.value
    assert_close(run(on_stub, tensors), exact, 1.5e-2)
    if operator._kernel_for(0, 16, True) == "token":
        assert launches.value == before  # that kernel has no backward
    else:
        assert launches.value == before + (3 if T > 64 else 2)  # of 10 chunks first the chain, then segments
    with torch.no_grad():
        before = launches.value
        assert_close(on_stub(*tensors), exact, 1e-2)
        assert launches.value == before + 1


def test_kernels_get_the_shared_memory_they_ask_for(stub_gpu, emulated):
    """A block that writes past the end of its shared memory, which no emulation would notice."""
    forward, backward = (ctypes.c_int * 2).in_dll(ctypes.CDLL(str(emulated[0])), "wkv_shared_bytes")
    shared = operator.load(0, 16, True).shared
    assert [shared[name] for name in kernel_loader.ENTRY_POINTS] == [forward, forward, backward, 0]


def test_kernels_take_strided_and_misaligned_tensors(stub_gpu):
    """Garbage from a tensor whose memory is not laid out as the kernel reads it."""
    tensors = [x.float() for x in make(2, 20, 2, 16)]
    room = torch.zeros(2 * 20 * 2 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 20, 2, 16)
    room.copy_(tensors[0])
    assert room.data_ptr() % 16 != 0
    rounded = [tensors[0].bfloat16(), *tensors[1:]]
    strided = [room, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[1:])]
    with torch.no_grad():
        values, references = on_stub(*strided), on_stub(*tensors)
    if operator._kernel_for(0, 16, True) == "chunked":
        values, references = values + run(on_stub, strided), references + run(on_stub, rounded)
    for value, reference in zip(values, references):
        assert torch.equal(value, reference)


def test_operators_are_known_to_torch_compile(stub_gpu):
    """Shapes or dtypes that differ from the kernels' under torch.compile, or a gradient lost there."""
    tensors = [x.float() for x in make(1, 20, 2, 16)]
    inputs = [x if i in (1, 6) else x.bfloat16() for i, x in enumerate(tensors)]
    chunked = operator._kernel_for(0, 16, True) == "chunked"
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    inputs = [x.requires_grad_(chunked) for x in inputs]
    torch.library.opcheck(operator.cuda_forward, (*inputs, chunked, chunked), test_utils=checks)
    torch._dynamo.reset()  # the choice of kernel is a constant in what was compiled before
    compiled = torch.compile(on_stub, backend="aot_eager", fullgraph=True)
    with contextlib.nullcontext() if chunked else torch.no_grad():
        differentiated = run if chunked else lambda function, tensors: function(*tensors)
        for value, reference in zip(differentiated(compiled, tensors), differentiated(on_stub, tensors)):
            assert torch.equal(value, reference)


# ---- compiling, keeping, and doing without -----------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that counts what it is asked, and an empty folder to keep its results in."""
    asked = []

    def compile_it(source, options):
        asked.append(options)
        return b"cubin of " + source + repr(options).encode()

    monkeypatch.setenv("WKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_loader, "SOURCE", tmp_path / "kernel.cu")
    monkeypatch.setattr(kernel_loader, "_compiler", lambda: ("NVRTC 1", compile_it))
    kernel_loader.SOURCE.write_text("one")
    return types.SimpleNamespace(asked=asked, compile=compile_it, cache=tmp_path / "cache")


def test_compiled_kernels_are_kept_by_all_that_decides_them(compiler, monkeypatch):
    """An old kernel used after its source, options, GPU or compiler changed; one compiled at every start."""
    first = kernel_loader.cubin("sm_90", 64, True)
    assert kernel_loader.cubin("sm_90", 64, True) == first
    assert len(compiler.asked) == 1
    others = [("sm_80", 64, True), ("sm_90", 32, True), ("sm_90", 64, False)]
    assert len({first, *(kernel_loader.cubin(*other) for other in others)}) == 4
    kernel_loader.SOURCE.write_text("two")
    assert kernel_loader.cubin("sm_90", 64, True) != first
    monkeypatch.setattr(kernel_loader, "_compiler", lambda: ("NVRTC 2", compiler.compile))
    kernel_loader.cubin("sm_90", 64, True)
    assert len(compiler.asked) == 6
    assert len(list(compiler.cache.glob("*.cubin"))) == len(list(compiler.cache.iterdir())) == 6


def test_a_broken_off_write_leaves_no_kernel(compiler, monkeypatch):
    """Half a kernel that the next start takes for a whole one; an error where no file can be written."""
    with monkeypatch.context() as patch:
        patch.setattr(kernel_loader.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        first = kernel_loader.cubin("sm_90", 64, True)
    assert not list(compiler.cache.glob("*.cubin"))
    assert not list(compiler.cache.iterdir())
    assert kernel_loader.cubin("sm_90", 64, True) == first
    monkeypatch.setenv("WKV_CACHE", "/dev/null/nowhere")
    assert kernel_loader.cubin("sm_90", 64, True) == first


def test_without_a_compiler_wkv_says_so_once_and_goes_on(monkeypatch, capsys):
    """A machine without NVRTC that cannot run at all, or one that says so at every layer and step."""
    gpu = types.SimpleNamespace(name="stub", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(kernel_loader, "nvrtc", None)
    monkeypatch.setattr(kernel_loader.shutil, "which", lambda name: None)
    kernel_loader.load.cache_clear()
    operator._choose_kernel.cache_clear()
    for _ in range(3):
        assert operator._kernel_for(0, 64, True) == ""
    assert operator._kernel_for(0, 48, True) == ""  # no such kernel, nothing to say
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "pip install cuda-bindings" in notice
    gpu.major = 7
    assert operator._kernel_for(0, 64, False) == ""
    assert "too old" in capsys.readouterr().err
    operator._choose_kernel.cache_clear()


@pytest.mark.parametrize("name", ("NVRTC", "nvcc"))
def test_real_compilers(name, monkeypatch):
    """Options that a compiler does not take, code that it does not; an error of many lines."""
    if name == "nvcc":
        monkeypatch.setattr(kernel_loader, "nvrtc", None)
    try:
        version, compile_it = kernel_loader._compiler()
    except OSError:
        pytest.skip("needs NVRTC or nvcc")
    if not version.startswith("NVRTC") and name == "NVRTC":
        pytest.skip("needs NVRTC")
    options = ("--gpu-architecture=sm_80", "--std=c++17", "-DHEAD_SIZE=64", "-DINPUT_BF16=1")
    compiled = compile_it(kernel_loader.SOURCE.read_bytes(), options)
    assert compiled.startswith(b"\x7fELF") and all(x.encode() in compiled for x in kernel_loader.ENTRY_POINTS)
    with pytest.raises(OSError, match=rf"^{name}: [^\n]*error[^\n]*$"):
        compile_it(b"__global__ void broken() { nothing }\n", options)
