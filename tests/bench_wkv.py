"""Times the WKV-7 operator, ours beside others in one run.

    python tests/bench_wkv.py                    on one CPU thread: wkv_chunked beside the recurrence
    python tests/bench_wkv.py --device cuda      on a GPU: wkv_cuda beside fla (flash-linear-attention) and
                                                 wind_rwkv (johanwind/wind_rwkv), where they are installed

On the CPU every row comes from a process of its own: CPU milliseconds, the median of several runs, and the
peak of its memory above what it held with the inputs made. "forward" keeps nothing for a backward.

On a GPU all are first held against the recurrence in fp64. Times are medians between events, on inputs that
rotate through more memory than the L2 cache holds; the floor is what has to be moved, at the rate of a large
copy, measured in the same run.

Shapes: B batch, T tokens, H heads, N head size.
"""

import argparse
import inspect
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from wkv import wkv_chunked, wkv_cuda, wkv_reference  # noqa: E402

CPU_SHAPES = ((32, 40, 3, 16), (1, 512, 12, 64), (8, 128, 12, 64), (1, 4096, 12, 64))
GPU_SHAPES = ((8, 4096, 64, 64), (1, 4096, 12, 64), (8, 512, 12, 64), (1, 32768, 12, 64))
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
    """Of the form of that name, CPU milliseconds and peak MiB, forward and then forward + backward."""
    torch.set_num_threads(1)
    function = {"chunked": wkv_chunked, "reference": wkv_reference}[name]
    tensors = make(shape)
    weights = [torch.randn(shape), torch.randn_like(tensors[6])]
    runs = 9 if name == "chunked" else 3 if shape[1] < 2048 else 1

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
        for _ in range(1 + runs if name == "chunked" else runs):
            start = time.process_time()
            run()
            milliseconds.append(1e3 * (time.process_time() - start))
        milliseconds = milliseconds[1:] or milliseconds  # the first one also warms up
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
        result += [statistics.median(milliseconds), peak / 1024]
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


# ---- on a GPU ----------------------------------------------------------------------------------------------
#
# a peer is a function, and what turns our inputs into its own: each has its own decay and state.


def ours():
    return wkv_cuda, lambda *tensors: tensors


def flash_linear_attention():
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
    same = "same" if all(torch.equal(x, z) for x, z in zip(outputs, again)) else "OTHER"
    print(f"{name:>12}: {errors}  {same} bits again")


def milliseconds(run, sets, runs=30):
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


def machine():
    """Prints what the GPU is and reaches in this run, and returns the bytes that a copy moves in a ms."""
    buffers = [torch.randint(255, (2**30,), dtype=torch.uint8, device="cuda") for _ in range(2)]
    rate = 2 * 2**30 / milliseconds(lambda _: buffers[1].copy_(buffers[0]), [None])
    factors = [torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    flops = 2 * 8192**3 / milliseconds(lambda _: factors[0] @ factors[1], [None])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}: copies at "
          f"{rate / 1e9:.2f} TB/s, bf16 products at {flops / 1e9:.0f} TFLOP/s")
    return rate


def bench_gpu():
    rate, peers = machine(), {}
    candidates = {"ours": ours, "fla": flash_linear_attention, "wind_rwkv": wind_rwkv}
    for name, load in candidates.items():
        try:
            start = time.perf_counter()
            peer = load()
            check(name, *peer)
            peers[name] = peer
            print(f"{'':>12}  ready after {time.perf_counter() - start:.1f} s")
        except Exception as problem:  # a peer may not build or run here; the others go on
            print(f"{name:>12}: not measured: {first_line(problem)}")
    if "ours" in peers:
        check("ours, fp32", *ours(), dtype=torch.float32)
    row = "{:>22} {:>12} | {:>11} {:>8} | {:>11} {:>8}"
    print(row.format("(B, T, H, N), bf16", "", "forward ms", "/ floor", "+ backward", "/ floor"))
    for shape in GPU_SHAPES:
        numbers = math.prod(shape)
        states = numbers // 16 * shape[3] * 2  # one in bf16 every 16 tokens
        # r, k, v, a, b, y in bf16 and log_w in fp32; then also dy, and the six gradients
        floors = [numbers * 16 / rate, (numbers * (16 + 16 + 14) + 2 * states) / rate]
        print(row.format(str(shape), "floor", f"{floors[0]:.3f}", "", f"{floors[1]:.3f}", ""))
        count = 2 + 2 * torch.cuda.get_device_properties(0).L2_cache_size // (16 * numbers)
        for name, (function, prepare) in peers.items():
            sets = []
            for _ in range(count):
                tensors = [x.detach().requires_grad_() for x in prepare(*make(shape, "cuda", torch.bfloat16))]
                weights = [torch.randn_like(tensors[0]), torch.randn_like(tensors[-1])]
                sets.append((tensors, weights))

            def forward(inputs):
                with torch.no_grad():
                    function(*inputs[0])

            def both(inputs):
                differentiate(function, *inputs)

            try:
                times = [milliseconds(run, sets) for run in (forward, both)]
            except Exception as problem:
                print(f"{name:>35} | not measured: {first_line(problem)}")
                continue
            columns = [f"{x:.{digits}f}" for t, f in zip(times, floors) for x, digits in ((t, 3), (t / f, 1))]
            print(row.format("", name, *columns), flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)  # what the CPU's own processes run
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_on_cpu(arguments.one[0], tuple(map(int, arguments.one[1:])))))
    elif arguments.device == "cpu":
        bench_cpu()
    elif not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch finds no GPU here")
    else:
        bench_gpu()


if __name__ == "__main__":
    main()
