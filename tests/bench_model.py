"""The whole 0.1b model: a training step, a prefill, and decoding, beside the peers that are installed.

    python tests/bench_model.py [--device cuda] [--threads 1] [--tokens 512 4096] [--layers 12]

Weights are random (speed does not depend on them), prompts are random tokens, an answer has 4 tokens. On the
CPU a time is CPU seconds of this process, the best of three, so that a busy machine does not count; on a GPU
it is seconds between synchronisations, the median of ten. Each length runs in a process of its own, so that
its peak memory is its own. Peers, if they can be imported: `rwkv` (PyPI), the official package, at inference.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from arm import Arm, make_optimizer
from fs import FutureSeed
from model import RWKV7, Config
from rounds import load_rounds


def measure(function, device: str) -> float:
    """Seconds that one call takes, after a call to warm up."""
    function()
    times = []
    for _ in range(3 if device == "cpu" else 10):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.process_time() if device == "cpu" else time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.process_time() if device == "cpu" else time.perf_counter()) - started)
    return min(times) if device == "cpu" else statistics.median(times)


def peak(device: str) -> float:
    """Largest memory so far, in GB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def ours(tokens: int, layers: int, device: str) -> None:
    config = Config.published(n_layer=layers)
    model = RWKV7(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    model.to(device).checkpoint_activations = tokens >= 4096
    arm = Arm(model, FutureSeed(config).to(device))
    optimizer = make_optimizer(arm, load_rounds()["R8"])
    prompt = torch.randint(65536, (1, tokens), generator=generator).to(device)
    answer = torch.randint(65536, (1, 4), generator=generator).to(device)
    lengths = torch.tensor([tokens], device=device), torch.tensor([4], device=device)
    spent = {"forward": 0.0, "backward": 0.0, "optimiser": 0.0}

    def autocast():
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def lap(name, since):
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.process_time() if device == "cpu" else time.perf_counter()
        spent[name] = now - since
        return now

    def step():
        now = time.process_time() if device == "cpu" else time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = arm(prompt, lengths[0], answer, lengths[1]).sum()
        now = lap("forward", now)
        loss.backward()
        now = lap("backward", now)
        optimizer.step()
        lap("optimiser", now)

    seconds = measure(step, device)
    parts = ", ".join(f"{name} {part:.3f}" for name, part in spent.items())
    print(f"train  (1, {tokens}): {seconds:.3f} s a step, {tokens / seconds:,.0f} tokens/s, "
          f"peak {peak(device):.2f} GB (last step: {parts})")

    @torch.no_grad()
    def prefill():
        with autocast():
            hidden, state = model(prompt)
            model.head(hidden[:, -1])
        return state

    state = prefill()
    seconds = measure(prefill, device)
    print(f"prefill (1, {tokens}): {seconds:.3f} s, {tokens / seconds:,.0f} tokens/s")

    @torch.no_grad()
    def decode():
        token, layers_state = answer[:, :1], state
        for _ in range(16):
            with autocast():
                hidden, layers_state = model(token, layers_state)
                token = model.head(hidden[:, -1]).argmax(-1, keepdim=True)

    print(f"decode at batch 1: {measure(decode, device) / 16 * 1e3:.1f} ms a token")
    if device == "cpu" and layers == 12:
        official(model, prompt[0].tolist(), tokens)


def official(model: RWKV7, prompt: list[int], tokens: int) -> None:
    """The `rwkv` package on the same weights."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    try:
        from rwkv.model import RWKV
    except ImportError:
        print("peer `rwkv`: not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.pth")
        peer = RWKV(model=f"{folder}/model", strategy="cpu fp32")
        state = peer.forward(prompt, None)[1]
        seconds = measure(lambda: peer.forward(prompt, None), "cpu")
        print(f"peer `rwkv` prefill (1, {tokens}): {seconds:.3f} s")

        def decode():
            layers_state = [part.clone() for part in state]
            for token in prompt[:16]:
                layers_state = peer.forward([token], layers_state)[1]

        print(f"peer `rwkv` decode at batch 1: {measure(decode, 'cpu') / 16 * 1e3:.1f} ms a token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    if len(args.tokens) > 1:
        for tokens in args.tokens:
            subprocess.run([sys.executable, __file__, "--device", args.device, "--threads", str(args.threads),
                            "--layers", str(args.layers), "--tokens", str(tokens)], check=True)
        return
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"RWKV-7, {args.layers} layers of 768, {where}, torch {torch.__version__}")
    ours(args.tokens[0], args.layers, args.device)


if __name__ == "__main__":
    main()
