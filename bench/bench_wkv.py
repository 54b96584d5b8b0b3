"""Times the WKV-7 operator, ours beside others in one run.

    python bench/bench_wkv.py                    on one CPU thread: wkv_chunked beside the recurrence
    python bench/bench_wkv.py --device cuda      on a GPU: wkv_cuda beside fla (flash-linear-attention) and
                                                 wind_rwkv (johanwind/wind_rwkv), where they are installed
    python bench/bench_wkv.py --host             what a call of wkv_cuda costs the CPU, with a driver that
                                                 does nothing; needs no GPU

On the CPU every row comes from a process of its own: CPU milliseconds, the median of several runs, and the
peak of its memory above what it held with the inputs made. "forward" keeps nothing for a backward.

On a GPU all are first held against the recurrence in fp64. Each is then timed twice: as a program calls it,
which for small shapes is the time of the host, and as replays of a CUDA graph, which is the time of the GPU
alone. Times are medians between events. Inputs rotate through more memory than the L2 cache holds. The floor
is what has to be moved, at the rate of a large copy that the same run measures; beside it stands a copy of
just as many bytes.

Shapes: B batch, T tokens, H heads, N head size.
"""

import argparse
import contextlib
import inspect
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wkv as operator  # noqa: E402
import wkv_cuda as loader  # noqa: E402
from wkv import wkv_chunked, wkv_cuda, wkv_reference  # noqa: E402

CPU_SHAPES = ((32, 40, 3, 16), (1, 512, 12, 64), (8, 128, 12, 64), (1, 4096, 12, 64))
GPU_SHAPES = ((8, 4096, 64, 64), (1, 4096, 12, 64), (8, 512, 12, 64), (1, 32768, 12, 64))
DECODING = (1, 8, 64)  # B, with H = 12 and N = 64 as in the 0.1b model
GRADIENTS = ("dr", "dlog_w", "dk", "dv", "da", "db", "dstate")


def make(shape, device="cpu", dtype=torch.float32):
    """Inputs as RWKV-7 makes them, (B, T, H, N) each, log_w in fp32, and a state (B, H, N, N) in fp32."""
    B, _, H, N = shape
    r, k, v, removal, gate, w = (torch.randn(shape, device=device) for _ in range(6))
    removal = F.normalize(removal, dim=-1)
    r, k, v, a, b = (x.to(dtype) for x in (r, k, v, -removal, removal * torch.sigmoid(gate)))
    return [r, -math.exp(-0.5) * torch.sigmoid(w), k, v, a, b, torch.randn(B, H, N, N, device=device)]


def differentiate(function, tensors, weights):
    """y, the final state, and the gradients of all inputs."""
    outputs = function(*tensors)
    weights = [weight.to(x.dtype) for weight, x in zip(weights, outputs)]
    return *outputs, *torch.autograd.grad(outputs, tensors, weights)


# ---- on the CPU --------------------------------------------------------------------------------------------


def measure_on_cpu(name, shape):
    """CPU milliseconds and peak MiB of the form of that name: forward, and then forward + backward."""
    torch.set_num_threads(1)
    function = {"chunked": wkv_chunked, "reference": wkv_reference}[name]
    tensors = make(shape)
    weights = [torch.randn(shape), torch.randn_like(tensors[6])]
    runs, warm_up = 9, 1
    if name == "reference":
        runs, warm_up = 3, 0
        if shape[1] >= 2048:
            runs = 1

    def forward():
        with torch.no_grad():
            function(*tensors)

    def both():
        differentiate(function, tensors, weights)

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    base, result = pages * resource.getpagesize() / 1024, []
    for run in (forward, both):
        for tensor in tensors:
            tensor.requires_grad_(run is both)
        milliseconds = []
        for _ in range(warm_up + runs):
            start = time.process_time()
            run()
            milliseconds.append(1e3 * (time.process_time() - start))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
        result += [statistics.median(milliseconds[warm_up:]), peak / 1024]
    return result


def bench_cpu():
    row = "{:>20} {:>10} | {:>11} {:>10} | {:>11} {:>10} | {:>6}"
    print(f"torch {torch.__version__}, one thread, fp32")
    print(row.format("(B, T, H, N)", "", "forward ms", "peak MiB", "+ backward", "peak MiB", "ratio"))
    for shape in CPU_SHAPES:
        results = {}
        for name in ("chunked", "reference"):
            command = [sys.executable, __file__, "--one", name, *map(str, shape)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name] = json.loads(output)
        for name, values in results.items():
            ratio = f"{values[2] / results['chunked'][2]:.1f}"
            print(row.format(str(shape), name, *(f"{x:.1f}" for x in values), ratio), flush=True)


# ---- on the host -------------------------------------------------------------------------------------------


class NoDriver:
    """A CUDA driver whose functions do nothing and succeed."""

    def __getattr__(self, name):
        return lambda *arguments: 0


class AutogradAlone(torch.autograd.Function):
    """Allocates what the operator returns, forward and backward, and does nothing else."""

    @staticmethod
    def forward(ctx, state, *inputs):
        ctx.save_for_backward(state, *inputs)
        ctx.set_materialize_grads(False)
        return torch.empty_like(inputs[3]), torch.empty_like(state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dstate):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def bench_host():
    """CPU microseconds of a call of wkv_cuda, forward alone and with backward, at their least of many.

    Left out are the driver's own time and what ctypes takes to convert a launch's arguments, below 1 us;
    without a GPU also the time of torch.cuda.device and torch.cuda.current_stream, which are replaced too.
    """
    torch.set_num_threads(1)
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    else:
        torch.cuda.device = lambda device: contextlib.nullcontext()
        torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0)
    nothing = dict.fromkeys(loader.ENTRY_POINTS, 0)
    kernels = loader.Kernels(torch.bfloat16, True, None, nothing, nothing, processors=132)
    loader._libcuda = NoDriver
    operator._kernels_for = lambda v: kernels
    tensors = make((1, 64, 2, 16), device, torch.bfloat16)  # small: the tensors' own memory costs nothing
    weights = [torch.randn_like(tensors[3]), torch.randn_like(tensors[6])]
    leaves = [x.detach().requires_grad_() for x in tensors]

    def forward():
        with torch.no_grad():
            wkv_cuda(*tensors)

    def both():
        torch.autograd.grad(wkv_cuda(*leaves), leaves, weights)

    def autograd_alone():
        *inputs, state = leaves
        torch.autograd.grad(AutogradAlone.apply(state, *inputs), leaves, weights)

    print(f"torch {torch.__version__}, tensors on {device}, a driver that does nothing")
    for name, run in (("forward", forward), ("forward + backward", both), ("autograd alone", autograd_alone)):
        least = math.inf
        for _ in range(20):
            start = time.process_time()
            for _ in range(200):
                run()
            least = min(least, (time.process_time() - start) / 200)
        print(f"{name:>20} {1e6 * least:7.1f} us")


# ---- on a GPU ----------------------------------------------------------------------------------------------
#
# a peer is two functions: the operator, and one that turns our inputs into the peer's, because each peer has
# its own name for the decay and its own layout of the state.


def ours():
    return wkv_cuda, lambda *tensors: tensors


def flash_linear_attention(configurations=None):
    """fla, which times hundreds of configurations of its kernels at first use. That takes minutes; a number
    lets it try at most so many of each kernel, and may give less than its best."""
    if configurations is not None:
        import triton

        tune = triton.autotune
        triton.autotune = lambda configs, key, **others: tune(configs[:configurations], key, **others)
    from fla.ops.rwkv7 import chunk_rwkv7

    options = {"output_final_state": True}
    if "lower_bound" in inspect.signature(chunk_rwkv7).parameters:  # newer ones are faster for it
        options["lower_bound"] = -math.exp(-0.5)

    def run(r, log_w, k, v, a, b, state):
        y, state = chunk_rwkv7(r, log_w, k, v, a, b, initial_state=state, **options)
        return y, state.mT

    return run, lambda *tensors: (*tensors[:6], tensors[6].mT.contiguous())


def wind_rwkv():
    from wind_rwkv.rwkv7 import attn_chunked_cuda, load_chunked_cuda

    load_chunked_cuda(64)

    def prepare(r, log_w, k, v, a, b, state):
        return r, (-log_w).log().bfloat16(), k, v, a, b, state.bfloat16()

    return attn_chunked_cuda, prepare


def first_line(problem):
    return (str(problem) or type(problem).__name__).splitlines()[0]


def error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


def check(name, function, prepare, dtype=torch.bfloat16):
    """Prints a peer's errors (relative L2) against the recurrence, and whether a rerun has the same bits.

    A peer that takes its decay or state in bf16 is charged with that rounding, which ours does not do.
    """
    tensors = make((2, 336, 3, 64), "cuda", dtype)
    weights = [torch.randn_like(tensors[0]), torch.randn_like(tensors[6])]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    reference = differentiate(wkv_reference, exact, weights)
    leaves = [x.detach().requires_grad_() for x in tensors]
    prepared = [x.detach().requires_grad_() for x in prepare(*tensors)]
    outputs = differentiate(function, prepared, weights)
    again = differentiate(function, prepared, weights)
    # gradients in our parameters: through the peer's own naming of the decay and layout of the state
    gradients = torch.autograd.grad(prepare(*leaves), leaves, outputs[2:])
    values = zip(("y", "state", *GRADIENTS), (*outputs[:2], *gradients), reference)
    errors = "  ".join(f"{what} {error(value, exact):.1e}" for what, value, exact in values)
    again_is = "OTHER bits again"
    if all(torch.equal(x, z) for x, z in zip(outputs, again)):
        again_is = "same bits again"
    print(f"{name:>12}: {errors}  {again_is}")


def milliseconds(run, sets, runs=20):
    """The median time of run(inputs) on the GPU, over sets of inputs in turn."""
    for i in range(5):
        run(sets[i % len(sets)])
    times = []
    for i in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run(sets[i % len(sets)])
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)


def milliseconds_in_graphs(run, sets):
    """The same for replays of CUDA graphs, one for each set of inputs: the GPU's time without the host's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch wants a warm-up on another stream before a capture
        for inputs in sets:
            run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graphs = []
    for inputs in sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(inputs)
        graphs.append(graph)
    return milliseconds(lambda graph: graph.replay(), graphs)


def machine():
    """Prints what the GPU is and reaches in this run, and returns the bytes that a copy moves in a ms."""
    rate = 2 * 2**30 / milliseconds_of_copy(2 * 2**30)
    factors = [torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    flops = 2 * 8192**3 / milliseconds(lambda _: factors[0] @ factors[1], [None])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}: copies at "
          f"{rate / 1e9:.2f} TB/s, bf16 products at {flops / 1e9:.0f} TFLOP/s")
    return rate


def sets_to_rotate(bytes_of_one):
    """How many sets of inputs it takes, in turn, so that none is left in the L2 cache from the last time."""
    return 2 + 2 * torch.cuda.get_device_properties(0).L2_cache_size // bytes_of_one


def milliseconds_of_copy(moved):
    """The time of a copy that reads and writes so many bytes in all."""
    pairs = []
    for _ in range(sets_to_rotate(moved)):
        pairs.append([torch.ones(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(2)])
    return milliseconds_in_graphs(lambda pair: pair[1].copy_(pair[0]), pairs)


def peers_that_run(configurations):
    """{name: (operator, prepare)} of ours and of the peers that are installed, each checked first."""
    candidates = {
        "ours": ours,
        "fla": lambda: flash_linear_attention(configurations),
        "wind_rwkv": wind_rwkv,
    }
    peers = {}
    for name, load in candidates.items():
        try:
            start = time.perf_counter()
            peer = load()
            check(name, *peer)
            peers[name] = peer
            print(f"{'':>12}  ready after {time.perf_counter() - start:.1f} s", flush=True)
        except Exception as problem:  # a peer may not build or run here; the others go on
            print(f"{name:>12}: not measured: {first_line(problem)}", flush=True)
    if "ours" in peers:
        check("ours, fp32", *ours(), dtype=torch.float32)
    return peers


def time_of(function, prepare, shape):
    """Milliseconds of forward and of forward + backward as called, and of both in a graph (NaN where a graph
    cannot be captured)."""
    sets = []
    for _ in range(sets_to_rotate(16 * math.prod(shape))):
        tensors = [x.detach().requires_grad_() for x in prepare(*make(shape, "cuda", torch.bfloat16))]
        weights = [torch.randn_like(tensors[0]), torch.randn_like(tensors[-1])]
        sets.append((tensors, weights))

    def forward(inputs):
        with torch.no_grad():
            function(*inputs[0])

    def both(inputs):
        differentiate(function, *inputs)

    called = [milliseconds(run, sets) for run in (forward, both)]
    try:
        alone = [milliseconds_in_graphs(run, sets) for run in (forward, both)]
    except Exception as problem:
        torch.cuda.synchronize()
        print(f"{'':>35} | no graph: {first_line(problem)}")
        alone = [math.nan, math.nan]
    return called, alone


def bench_gpu(configurations):
    rate = machine()
    peers = peers_that_run(configurations)
    row = "{:>22} {:>12} | {:>9} {:>9} | {:>9} {:>9} | {:>7} {:>7}"
    print(row.format("", "", "as called", "", "in a graph", "", "/ floor", ""))
    names = ("forward", "both")
    print(row.format("(B, T, H, N), bf16", "ms", *names, *names, *names))
    for shape in GPU_SHAPES:
        numbers = math.prod(shape)
        states = numbers // 16 * shape[3] * 2  # bytes: one state in bf16 every 16 tokens
        # r, k, v, a, b, y in bf16 and log_w in fp32; then also dy, and the six gradients
        moved = [numbers * 16, numbers * (16 + 16 + 14) + 2 * states]
        floors = [bytes_moved / rate for bytes_moved in moved]
        copies = [milliseconds_of_copy(bytes_moved) for bytes_moved in moved]
        print(row.format(str(shape), "floor", "", "", *(f"{x:.3f}" for x in floors), "", ""))
        print(row.format("", "a copy", "", "", *(f"{x:.3f}" for x in copies), "", ""), flush=True)
        for name, (function, prepare) in peers.items():
            try:
                called, alone = time_of(function, prepare, shape)
            except Exception as problem:
                print(f"{name:>35} | not measured: {first_line(problem)}", flush=True)
                continue
            ratios = [f"{time / floor:.1f}" for time, floor in zip(alone, floors)]
            print(row.format("", name, *(f"{x:.3f}" for x in (*called, *alone)), *ratios), flush=True)
            torch.cuda.empty_cache()
    if "ours" in peers:
        bench_decoding()


def bench_decoding():
    """One token for each of B rows, as decoding calls the operator in every layer."""
    for B in DECODING:
        tensors = make((B, 1, 12, 64), "cuda", torch.bfloat16)

        def step(_):
            with torch.no_grad():
                wkv_cuda(*tensors)

        called, alone = milliseconds(step, [None]), milliseconds_in_graphs(step, [None])
        print(f"decode, ({B}, 1, 12, 64): as called {1e3 * called:.0f} us, in a graph {1e3 * alone:.1f} us")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--host", action="store_true", help="time the host's part of wkv_cuda")
    parser.add_argument("--fla-configurations", type=int, metavar="N",
                        help="let fla try at most N configurations of each kernel")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)  # what the CPU's own processes run
    arguments = parser.parse_args()
    if arguments.one:
        name, *shape = arguments.one
        print(json.dumps(measure_on_cpu(name, tuple(map(int, shape)))))
    elif arguments.host:
        bench_host()
    elif arguments.device == "cpu":
        bench_cpu()
    elif not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch finds no GPU here")
    else:
        bench_gpu(arguments.fla_configurations)


if __name__ == "__main__":
    main()
