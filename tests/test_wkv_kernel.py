"""
wkv_kernel.cu, run on the CPU fiber by fiber (cuda_on_cpu.h) and held against the recurrence in fp64.

Shapes: B batch, T tokens, H heads, N head size. The first half asks whether the numbers are right, for any
length, decay, key and state; the second whether they stay right under any order of warps, without any one
barrier, under the sanitizers, and what the compiled code costs (registers, spills, barriers a chunk).
"""

import re
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wkv_cuda
from conftest import relative_error
from kernel_on_cpu import KERNELS, SOURCE, barrier_lines, build, compile_command, needs_compiler
from wkv import wkv_reference as recurrence

DECAY_FLOOR = -0.6065306597  # the lowest log_w that RWKV-7 can produce
NAMES = ("r", "log_w", "k", "v", "a", "b", "s0")


@pytest.fixture(scope="session")
def kernels():
    """kernels(N, bf16): the entry points built for a head size and an input type, each built once."""

    def get(N, bf16=True):
        kernel = build(N, bf16)
        kernel.seed = kernel.drop = 0
        return kernel

    return get


# ---- the reference, and inputs -----------------------------------------------------------------------------


def reference(inputs, s0, dy, dsT):
    """y, sT and the seven gradients, all fp64."""
    leaves = [x.clone().requires_grad_() for x in (*inputs, s0)]
    y, sT = recurrence(*leaves)
    ((y * dy).sum() + (sT * dsT).sum()).backward()
    return y.detach(), sT.detach(), [leaf.grad for leaf in leaves]


def draw_problem(seed, N, T, H=None, decay="usual", keys="random", state=1.0, B=1, bf16=True):
    """
    inputs (fp64 numbers that the input type holds exactly), s0, dy, dsT. Few tokens come with many heads:
    with a zero state y_1 is a multiple of v_1, and the relative error of that one number, a product r_1 k_1
    that may cancel, says nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    H = H or max(2, 32 // T)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def exact(x):
        return x.to(torch.bfloat16 if bf16 else torch.float32).double()

    r, k, v, direction = (normal(B, T, H, N) for _ in range(4))
    log_w = {
        "usual": DECAY_FLOOR * torch.sigmoid(2 * normal(B, T, H, N)),
        "floor": torch.full((B, T, H, N), DECAY_FLOOR, dtype=torch.float64),
        "none": torch.zeros(B, T, H, N, dtype=torch.float64),
        "slow": 1e-3 * DECAY_FLOOR * torch.rand(B, T, H, N, generator=generator, dtype=torch.float64),
        "mixed": DECAY_FLOOR * torch.randint(0, 2, (B, T, H, N), generator=generator).double(),
        "strong": torch.full((B, T, H, N), -4.0, dtype=torch.float64),
    }[decay]
    gate = torch.sigmoid(normal(B, T, H, N))
    if keys != "random":  # all tokens use one of two keys, or all the same with the gate open
        pick = torch.randint(0, 2 if keys == "repeated" else 1, (T,), generator=generator)
        pick[:2] = torch.arange(2)[:T] if keys == "repeated" else 0
        direction = (
            direction[:, :1].expand(B, T, H, N)
            if keys == "overwritten"
            else direction[:, pick.clamp(max=T - 1)]
        )
        k = direction.clone()
    direction = torch.nn.functional.normalize(direction, dim=-1)
    if keys == "overwritten":
        gate = torch.ones_like(gate)
        k = direction
    written = exact(direction * gate)
    inputs = [exact(r), log_w.float().double(), exact(k), exact(v), -exact(direction), written]
    s0 = (state * normal(B, H, N, N)).float().double()
    return inputs, s0, exact(normal(B, T, H, N)), (state * normal(B, H, N, N)).float().double()


def check(results, expected, tolerance, what):
    """Every result within the tolerance, relative L2; an error of NaN fails."""
    for name, result, wanted in zip(what, results, expected):
        error = relative_error(result, wanted)
        assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.1e}"


problems = st.fixed_dictionaries({
    "seed": st.integers(0, 2**31),
    "T": st.integers(1, 52),
    "decay": st.sampled_from(["usual", "floor", "none", "slow", "mixed", "strong"]),
    "keys": st.sampled_from(["random", "repeated"]),
    "state": st.sampled_from([0.0, 1.0, 1e4]),
})
schedules = st.integers(0, 2**31)
segments = st.sampled_from([None, 1, 2])


# ---- right numbers -----------------------------------------------------------------------------------------


def check_chunked(kernel, problem, N, schedule, segment, split, bf16=True):
    """
    5e-3 for y and sT, 1e-2 for gradients. What cancels loses more to bf16 operands, whoever computes it so:
    keys that come again (what one token writes the next erases) get a fifth more, decays below what RWKV-7
    can produce twice as much.
    """
    looser = 1.2 if problem["keys"] != "random" else 1
    looser = 2 if problem["decay"] == "strong" else looser
    kernel.seed = schedule
    inputs, s0, dy, dsT = draw_problem(N=N, bf16=bf16, **problem)
    y, sT, gradients = reference(inputs, s0, dy, dsT)
    x = [i.float() for i in inputs]
    ours_y, ours_sT, kept = kernel.forward(*x, s0.float(), split=split)
    check((ours_y, ours_sT), (y, sT), 5e-3 * looser, ("y", "sT"))
    ours = kernel.backward(*x, kept, dy.float(), dsT.float(), segment=segment, split=split)
    check(ours, gradients, 1e-2 * looser, NAMES)


@needs_compiler
@settings(deadline=None, max_examples=60, derandomize=True)
@given(problem=problems, schedule=schedules, segment=segments, split=st.sampled_from([1, 2, 4]))
def test_chunked_kernels_agree_with_the_recurrence(kernels, problem, schedule, segment, split):
    """Catches a wrong equation, index or tail in the tensor-core kernels at the tuned head size, under any
    schedule."""
    check_chunked(kernels(64), problem, 64, schedule, segment, split)


@needs_compiler
@pytest.mark.parametrize("N, bf16", [(16, True), (32, True), (128, True), (64, False)])
@settings(deadline=None, max_examples=12, derandomize=True)
@given(problem=problems, schedule=schedules, segment=segments, split=st.booleans())
def test_other_head_sizes_and_fp32_inputs(kernels, N, bf16, problem, schedule, segment, split):
    """Catches whatever silently assumes N = 64 or two-byte inputs: strides, warps without work, copies of 16
    bytes."""
    check_chunked(kernels(N, bf16), problem, N, schedule, segment, N // 16 if split else 1, bf16)


@needs_compiler
@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 2**31), T=st.integers(17, 52), decay=st.sampled_from(["usual", "slow", "none"]))
def test_one_key_overwritten_by_every_token(kernels, seed, T, decay):
    """
    The hardest case for bf16: every token erases just what the one before it wrote, so that sums of 16
    terms cancel down to one. Catches an inverse of 8 bits and whatever else is much worse.
    """
    problem = {"seed": seed, "T": T, "decay": decay, "keys": "overwritten", "state": 1.0}
    check_chunked(kernels(64), problem, 64, seed, None, 1)
    inputs, s0, _, _ = draw_problem(N=64, bf16=False, **problem)
    ours = kernels(64, bf16=False).token_forward(*(i.float() for i in inputs), s0.float())
    check(ours, recurrence(*inputs, s0), 1e-5, ("y", "sT"))


@needs_compiler
def test_what_cancels_keeps_sixteen_bits(kernels):
    """
    Catches any rest of an L x L matrix, of Z, U or dU that is left out of one product. Over 12 heads, with
    two keys and no decay, errors differ by 3 % between seeds; each such loss adds 8 % or more to one of them.
    """
    inputs, s0, dy, dsT = draw_problem(seed=0, N=64, T=48, H=12, decay="none", keys="repeated")
    y, sT, gradients = reference(inputs, s0, dy, dsT)
    x = [i.float() for i in inputs]
    kernel = kernels(64)
    ours_y, ours_sT, kept = kernel.forward(*x, s0.float())
    ours = kernel.backward(*x, kept, dy.float(), dsT.float())
    check([ours_y], [y], 2.5e-3, "y")
    check([ours_sT], [sT], 2.3e-3, ["sT"])
    check([ours[3]], [gradients[3]], 3.7e-3, "v")
    check([ours[4]], [gradients[4]], 4.6e-3, "a")


@needs_compiler
def test_null_means_zero_and_inference_keeps_nothing(kernels):
    """Catches a null pointer read, and an inference path that computes something other than training does."""
    kernel = kernels(64)
    inputs, s0, dy, dsT = draw_problem(seed=1, N=64, T=37)
    x = [i.float() for i in inputs]
    zero = torch.zeros_like(s0).float()
    y, sT, kept = kernel.forward(*x, zero)
    for result, wanted in zip(kernel.forward(*x, None, keep=False), (y, sT)):
        assert torch.equal(result, wanted)
    for segment in (None, 1):
        both = (kernel.backward(*x, kept, dy, last, segment) for last in (None, zero))
        assert all(torch.equal(result, wanted) for result, wanted in zip(*both))
    for result, wanted in zip(kernel.token_forward(*x, None), kernel.token_forward(*x, zero)):
        assert torch.equal(result, wanted)


# ---- right under any schedule ------------------------------------------------------------------------------


def everything(kernel, x, s0, dy, dsT):
    """Every kernel once, and all that they write."""
    y, sT, kept = kernel.forward(*x, s0)
    whole = kernel.backward(*x, kept, dy, dsT)
    segments = kernel.backward(*x, kept, dy, dsT, segment=2, split=2)
    return [*kernel.token_forward(*x, s0), y, sT, kept, *whole, *segments]


@needs_compiler
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), drawn=st.lists(schedules, min_size=2, max_size=3, unique=True))
def test_the_same_bits_under_every_schedule(kernels, seed, drawn):
    """Catches a race that moves results by a rounding only, and any sum whose order depends on who comes
    first."""
    kernel = kernels(64)
    inputs, s0, dy, dsT = draw_problem(seed=seed, N=64, T=70, H=1)
    x = [i.float() for i in inputs]
    runs = []
    for kernel.seed in drawn:
        runs.append(everything(kernel, x, s0.float(), dy, dsT.float()))
    for run in runs[1:]:
        for result, wanted in zip(run, runs[0]):
            assert torch.equal(result, wanted)


@needs_compiler
def test_splitting_rows_and_segments_changes_no_bit(kernels):
    """Catches a block that takes the wrong rows or segment: how many blocks there are may change no bit."""
    kernel = kernels(64)
    inputs, s0, dy, dsT = draw_problem(seed=5, N=64, T=90)
    x = [i.float() for i in inputs]
    y, sT, kept = kernel.forward(*x, s0.float())
    gradients = kernel.backward(*x, kept, dy, dsT.float())
    for split, segment in ((2, 3), (4, 1), (1, 5)):
        for result, wanted in zip(kernel.forward(*x, s0.float(), split=split), (y, sT, kept)):
            assert torch.equal(result, wanted)
        for result, wanted in zip(kernel.backward(*x, kept, dy, dsT.float(), segment, split), gradients):
            assert torch.equal(result, wanted)


@needs_compiler
@pytest.mark.parametrize("line", barrier_lines())
def test_every_barrier_is_needed_and_missed(kernels, line):
    """Leaves out one wait: some schedule must show it. Catches a barrier too many, and a test bench that sees
    no races."""
    kernel = kernels(64)
    inputs, s0, dy, dsT = draw_problem(seed=2, N=64, T=70, H=1)
    x = [i.float() for i in inputs]
    arguments = (x, s0.float(), dy, dsT.float())
    right = everything(kernel, *arguments)
    kernel.drop = line
    for kernel.seed in range(1, 13):
        try:
            wrong = everything(kernel, *arguments)
        except RuntimeError:
            return
        if any(not relative_error(result, wanted) <= 1e-6 for result, wanted in zip(wrong, right)):
            return
    pytest.fail(f"no schedule noticed that line {line} of wkv_kernel.cu was left out")


# ---- right use of memory -----------------------------------------------------------------------------------

SANITIZED_MAIN = r"""
// every entry point on arrays of exactly their own size, with a length that is no multiple of 16
#include <memory>
template <class Type> struct Array {
    std::unique_ptr<Type[]> data;
    explicit Array(size_t size) : data(new Type[size]) {
        for (size_t i = 0; i < size; i++)
            store_one(&data[i], 0.01f * (int(i * 7919 % 101) - 50));
    }
    operator Type*() { return data.get(); }
};
template <class... Types, class... Given>
int go(void (*kernel)(Types...), unsigned x, unsigned y, unsigned z, unsigned block, size_t shared,
       Given&&... given) {
    std::tuple<Types...> values{static_cast<Types>(given)...};
    return std::apply([&](auto&... value) {
        void* pointers[] = {(void*)&value...};
        const unsigned grid[3] = {x, y, z};
        return cuda_on_cpu::run(kernel, grid, block, shared, pointers, 3, 0);
    }, values);
}
int main() {
    const int T = 39, H = 2, B_ = 1, C = 3, segment = 2;
    const size_t n = size_t(B_) * T * H * N, state = size_t(B_) * H * N * N;
    Array<input> r(n), k(n), v(n), a(n), b(n), y(n), dy(n), dr(n), dk(n), dv(n), da(n), db(n);
    Array<float> log_w(n), dlog_w(n), s0(state), sT(state), dsT(state), ds0(state), carry(state * 2);
    Array<bf16> kept(state * C);
    for (size_t i = 0; i < n; i++)
        log_w[i] = -0.01f * (i % 60);
    int bad = 0;
    bad |= go(wkv_token_forward, H, B_, 1, N, 0, T, H, r, log_w, k, v, a, b, s0, y, sT);
    uint4* checkpoints = (uint4*)(bf16*)kept;
    const int threads = 32 * (5 + N / 32), *shared = wkv_shared_bytes;
    bad |= go(wkv_forward, H, B_, 2, threads, shared[0], T, H, r, log_w, k, v, a, b, s0, y, sT, checkpoints);
    bad |= go(wkv_backward_chain, H, B_, 2, threads, shared[0], T, H, segment, r, log_w, a, b, dy, dsT,
              carry);
    bad |= go(wkv_backward, H, B_, 2, 2 * N, shared[1], T, H, segment, r, log_w, k, v, a, b, checkpoints,
              dy, dsT, carry, dr, dlog_w, dk, dv, da, db, ds0);
    return bad;
}
"""


@needs_compiler
def test_address_and_undefined_behaviour_sanitizers_are_silent(tmp_path):
    """Catches reads and writes outside an array or the block's shared memory, misaligned vectors, and
    undefined arithmetic."""
    program = tmp_path / "sanitized"
    flags = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    command = compile_command(program, 32, True, flags)
    with open(tmp_path / "sanitized.cpp", "a") as wrapper:
        wrapper.write(SANITIZED_MAIN)
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("this g++ comes without sanitizer libraries")
    assert built.returncode == 0, built.stderr
    quiet = {"ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([str(program)], capture_output=True, text=True, env=quiet)
    assert ran.returncode == 0, ran.stderr[-3000:]


# ---- what the compiled code costs --------------------------------------------------------------------------


def loader_options(architecture, N=64):
    """What wkv_cuda.py tells its compiler, for inputs in bf16."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WKV_CACHE", "/dev/null/nowhere")
        patch.setattr(wkv_cuda, "compile_source", lambda source, options: options)
        return wkv_cuda.cubin(f"sm_{architecture}", N, True)


def compile_with_nvrtc(architecture, N):
    """The assembler's report, and the PTX."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    try:
        _, program = nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"wkv_kernel.cu", 0, [], [])
    except RuntimeError:
        pytest.skip("needs NVRTC (nvidia-cuda-nvrtc)")
    options = [option.encode() for option in (*loader_options(architecture, N), "--ptxas-options=-v")]
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    assert not int(failed), log.decode()
    ptx = bytes(nvrtc.nvrtcGetPTXSize(program)[1])
    nvrtc.nvrtcGetPTX(program, ptx)
    return log.decode(), ptx.decode()


def compile_with_nvcc(architecture):
    """The assembler's report."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    command = ["nvcc", "-cubin", *loader_options(architecture), "-Xptxas=-v", str(SOURCE), "-o", "/dev/null"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr + ran.stdout


def resources(log):
    """{kernel: (registers, bytes spilled)} from the assembler's report."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        found[part.split("'")[0]] = (int(re.search(r"Used (\d+) registers", part)[1]), spilled)
    return found


# bytes that a thread writes to memory and reads back for want of registers. At head size 128 a forward block
# has 13 warps, which leaves 128 registers a thread, and the compilers need up to a dozen more: a few loads a
# chunk, which stay in the L1 cache
SPILLED = {("wkv_forward", 128): 48}


def check_resources(log, architecture, N):
    """No spills but the known ones, and registers that let blocks share an SM."""
    found = resources(log)
    assert sorted(found) == sorted(KERNELS)
    for kernel in ("wkv_forward", "wkv_backward_chain", "wkv_backward"):
        registers, spilled = found[kernel]
        assert spilled <= SPILLED.get((kernel, N), 0), f"{kernel} spills {spilled} bytes"
        # where blocks share an SM, they share 65536 registers, given to warps in lots of 256: 4 blocks of 4
        # warps, or 2 of 9 (5 on one scheduler)
        if N == 64 and architecture in ("90", "100"):
            most = 96
            if kernel == "wkv_backward":
                most = 128
            assert registers <= most


@pytest.mark.parametrize("N", (64, 128))
@pytest.mark.parametrize("architecture", ("80", "90", "120"))
def test_what_the_loader_compiles(architecture, N):
    """Catches code or options that NVRTC rejects, spills, too many registers; a barrier more: at most 3 in
    the forward's loop over chunks (it has 1), 5 in the backward's."""
    log, ptx = compile_with_nvrtc(architecture, N)
    check_resources(log, architecture, N)
    for kernel, limit in {"wkv_forward": 3, "wkv_backward_chain": 3, "wkv_backward": 5}.items():
        body = ptx.split(f".entry {kernel}(")[1].split(".entry ")[0]
        labels = {label[1]: label.start() for label in re.finditer(r"^(\$L\w+):", body, re.M)}
        jumps = [(labels.get(jump[1], len(body)), jump.start())
                 for jump in re.finditer(r"bra(?:\.uni)?\s+(\$L\w+);", body)]
        loops = [body[start:end] for start, end in jumps if start < end]
        assert 1 <= max(len(re.findall(r"bar(?:rier)?\.sync", loop)) for loop in loops) <= limit


@pytest.mark.parametrize("architecture", ("89", "100"))
def test_nvcc_compiles_the_same(architecture):
    """Catches code that is NVRTC's alone."""
    check_resources(compile_with_nvcc(architecture), architecture, 64)


def test_an_error_of_the_compiler_is_one_line():
    """Catches pages of errors, or none."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and nvidia-cuda-nvrtc")
    with pytest.raises(OSError, match=r"^NVRTC: [^\n]*error[^\n]*$"):
        wkv_cuda.compile_source(b"__global__ void broken() { nothing }\n", loader_options("80"))


@needs_compiler
def test_shared_memory_lets_blocks_share_an_sm(kernels):
    """Catches a buffer too many: 4 backward blocks fit an SM of 228 KB, a forward block cards of 99 KB."""
    forward, backward = kernels(64).shared
    assert backward <= 56 * 1024
    assert forward <= 99 * 1024
    assert max(kernels(64, bf16=False).shared) <= 99 * 1024
    assert max(kernels(128).shared) <= 163 * 1024
