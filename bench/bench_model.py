"""Times the whole 0.1b model: a training step, its parts and its operations, a prefill, and decoding.

    python bench/bench_model.py [--device cuda] [--threads 1 2] [--tokens 512 4096] [--layers 12] [--peers no]
    python bench/bench_model.py --save FILE.pth     writes the random model, which `train.py --base` takes

Weights are random numbers, made in about two seconds, since speed does not depend on them. Prompts are random
tokens, and an answer has 4 tokens. On one thread of a CPU a time is CPU seconds of the process, so that a
busy machine does not count; on more threads it is wall seconds. Either is the least of three calls after a
first one, or of one call where it takes long. On a GPU a time is seconds between synchronisations, the median
of ten. Every line comes from a process of its own, so that its peak memory is its own.

Two peers run beside ours where they can be imported (both are on PyPI): `rwkv`, the official package, which
reads but does not train, and `rwkv7-hf`, whose training step scores every token, as the demo of RWKV-LM does.

Shapes: T tokens, C channels, H heads, N head size.
"""

import argparse
import contextlib
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from fs import FutureSeed, answer_logits, answer_loss
from model import RWKV7, Config
from wkv import wkv

ANSWER = 4      # tokens of an answer
LONG = 10       # seconds that a call may take before one call is enough
DECODED = 64    # tokens that a timed decoding writes


class Clock:
    def __init__(self, device: str, threads: int):
        self.device = device
        self.now = time.perf_counter
        if device == "cpu" and threads == 1:
            self.now = time.process_time

    def once(self, function) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        started = self.now()
        function()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.now() - started

    def __call__(self, function) -> float:
        """Seconds that a call takes."""
        first = self.once(function)
        if self.device == "cuda":
            return statistics.median(self.once(function) for _ in range(10))
        if first > LONG:
            return self.once(function)
        return min(self.once(function) for _ in range(3))

    def peak(self) -> float:
        """Largest memory of the process so far, in GB."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def random_model(layers: int, device: str) -> RWKV7:
    """A model as wide as 0.1b, of plain random numbers: RWKV7.init's orthogonal matrices take a minute."""
    model = RWKV7(Config.published(n_layer=layers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    return model.to(device)


def random_tokens(count: int, device: str, vocab_size=65536) -> torch.Tensor:
    return torch.randint(vocab_size, (1, count), device=device)


def autocast(device: str):
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def loss_of(model: RWKV7, fs: FutureSeed, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The loss of the answer to the prompt, as in the rounds. One row has no padding and needs no lengths."""
    logits, _ = answer_logits(model, fs, prompt, None, answer)
    lengths = torch.full((len(answer),), answer.shape[1], device=answer.device)
    return answer_loss(logits, answer, lengths).mean()


def row(who: str, what: str, seconds: float, tokens: int, note="") -> None:
    speed = f"{seconds * 1e3:10,.1f} ms {tokens / seconds:10,.0f} tokens/s"
    print(f"{who:<9} {what:<24} {speed}  {note}", flush=True)


def rows_of_reading(who: str, clock: Clock, T: int, prefill, decode) -> None:
    """Two lines, of `prefill`, which reads T tokens, and of `decode`, which writes DECODED tokens."""
    row(who, f"prefill (1, {T})", clock(prefill), T)
    row(who, "decode, a token", clock(decode) / DECODED, 1)


def rates(clock: Clock, T: int, layers: int) -> None:
    """What the machine gives: operations a second of a product as in the channel mix, and bytes a second of a
    sum over a large array."""
    dtype = torch.float32
    if clock.device == "cuda":
        dtype = torch.bfloat16
    x = torch.randn(T, 768, device=clock.device, dtype=dtype)
    weight = torch.randn(768, 3072, device=clock.device, dtype=dtype)
    large = torch.ones(100_000_000, device=clock.device)

    def ten_products():
        for _ in range(10):
            x @ weight

    speed = 10 * 2 * T * weight.numel() / clock(ten_products)
    rate = large.nbytes / clock(large.sum)
    print(f"products of ({T}, 768) and (768, 3072) at {speed / 1e9:,.0f} GFLOP/s, memory read at "
          f"{rate / 1e9:,.1f} GB/s", flush=True)


# ---- ours --------------------------------------------------------------------------------------------------

class OperatorInOne(torch.autograd.Function):
    """Takes the place of the wkv operator when operations are counted: one each way, as a kernel is one."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        v, state = inputs[3], inputs[6]
        return v.clone(), state.view_as(state)

    @staticmethod
    def backward(ctx, dy, dstate):
        dy.clone()
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


class Operations(TorchDispatchMode):
    """Counts what torch dispatches, but for views and allocations: about what a GPU would have to launch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        self.count += not view and not re.search("empty|_unsafe_view|_record_function", name)
        return function(*arguments, **(options or {}))


def count_ours(clock: Clock, T: int, layers: int) -> None:
    """Counts on the CPU and with few channels, because the number of operations depends on neither."""
    model = RWKV7.init(Config.published(layers, 64, 64, 100))
    model.checkpoint_activations = True
    fs = FutureSeed(model.config, layer_start=layers // 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    prompt, answer = random_tokens(64, "cpu", 100), random_tokens(ANSWER, "cpu", 100)
    print("operations of a step of batch 1, blocks recomputed, the wkv operator one each way", flush=True)
    model_file.wkv = OperatorInOne.apply
    for name, bf16 in (("fp32", False), ("bf16 autocast", True)):
        for _ in range(2):    # the first step also makes the optimiser's state
            optimizer.zero_grad(set_to_none=True)
            with Operations() as forward, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(model, fs, prompt, answer)
            with Operations() as backward:
                loss.backward()
            with Operations() as update:
                optimizer.step()
        total = forward.count + backward.count + update.count
        print(f"  {name}: forward {forward.count:,}, backward {backward.count:,}, optimiser {update.count}, "
              f"in all {total:,}", flush=True)


def train_ours(clock: Clock, T: int, layers: int) -> None:
    device = clock.device
    model = random_model(layers, device)
    model.checkpoint_activations = T >= 4096
    fs = FutureSeed(model.config, layer_start=layers // 2).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    prompt, answer = random_tokens(T, device), random_tokens(ANSWER, device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            loss = loss_of(model, fs, prompt, answer)
        loss.backward()
        optimizer.step()

    seconds = clock(step)
    note = f"peak {clock.peak():.1f} GB"
    if model.checkpoint_activations:
        note += ", blocks recomputed"
    row("ours", f"training step (1, {T})", seconds, T, note)
    parts = {"optimiser": clock(optimizer.step)}
    for name, part in parts_of_a_step(model, T, device).items():
        parts[name] = clock(part)
    if not model.checkpoint_activations:
        parts["all else"] = seconds - sum(parts.values())
    print("  of it", ", ".join(f"{name} {part * 1e3:,.1f}" for name, part in parts.items()), flush=True)


def parts_of_a_step(model: RWKV7, T: int, device: str) -> dict:
    """{kind of work: a function that does all of that kind in a step, forward and backward, in all layers}"""
    C, H, N = model.config.n_embd, model.config.n_head, model.config.head_size
    blocks = model.blocks

    def alone(function, *shapes):
        inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]

        def run():
            with autocast(device):
                outputs = function(*inputs)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        return run

    def projections(x):
        outputs = []
        for block in blocks:
            att = block.att
            outputs += [att.receptance(x), att.key(x), att.value(x), att.output(x)]
        return outputs

    def adapters(x):
        outputs = []
        for block in blocks:
            att = block.att
            outputs += [torch.tanh(x @ att.w1) @ att.w2, x @ att.a1 @ att.a2]
            outputs.append(torch.sigmoid(x @ att.g1) @ att.g2)
            if att.layer > 0:
                outputs.append(x @ att.v1 @ att.v2)
        return outputs

    def operator(r, log_w, k, v, a, b):
        dtype = torch.float32    # of all but the decay
        if device == "cuda":
            dtype = torch.bfloat16
        r, k, v, a, b = (x.to(dtype) for x in (r, k, v, F.normalize(a, dim=-1), 0.01 * b))
        outputs = []
        for _ in blocks:
            outputs += wkv(r, -0.6 * torch.sigmoid(log_w), k, v, a, b)
        return outputs

    def channel_mix(x):
        return [block.ffn.value(torch.relu(block.ffn.key(x)) ** 2) for block in blocks]

    def head(x):
        target = torch.zeros(ANSWER, dtype=torch.long, device=device)
        return [F.cross_entropy(model.head(x).float(), target)]

    x = (1, T, C)
    return {"projections": alone(projections, x), "low-rank adapters": alone(adapters, x),
            "wkv": alone(operator, *[(1, T, H, N)] * 6), "channel mix": alone(channel_mix, x),
            "head and loss": alone(head, (ANSWER, C))}


@torch.no_grad()
def read_ours(clock: Clock, T: int, layers: int) -> None:
    device = clock.device
    model = random_model(layers, device)
    prompt = random_tokens(T, device)

    def prefill():
        with autocast(device):
            hidden, state = model(prompt)
            return model.head(hidden[:, -1]), state

    def decode():
        with autocast(device):
            model.generate(*after, DECODED)

    after = prefill()
    rows_of_reading("ours", clock, T, prefill, decode)


# ---- peers -------------------------------------------------------------------------------------------------

@torch.no_grad()
def read_rwkv(clock: Clock, T: int, layers: int) -> None:
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):    # it greets
        random_model(layers, "cpu").save(f"{folder}/model.pth")
        strategy = {"cpu": "cpu fp32", "cuda": "cuda bf16"}[clock.device]
        peer = RWKV(model=f"{folder}/model", strategy=strategy)
    prompt = random_tokens(T, "cpu")[0].tolist()
    after = peer.forward(prompt, None)[1]

    def decode():
        state = [part.clone() for part in after]
        token = prompt[0]
        for _ in range(DECODED):
            logits, state = peer.forward([token], state)
            token = int(logits.argmax())

    rows_of_reading("rwkv", clock, T, lambda: peer.forward(prompt, None), decode)


def rwkv7_hf(layers: int, device: str):
    from rwkv7_hf.configuration_rwkv7 import RWKV7Config
    from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM
    return RWKV7ForCausalLM(RWKV7Config(num_hidden_layers=layers)).to(device)


def train_rwkv7_hf(clock: Clock, T: int, layers: int) -> None:
    peer, tokens = rwkv7_hf(layers, clock.device), random_tokens(T, clock.device)
    optimizer = torch.optim.AdamW(peer.parameters(), fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(clock.device):
            loss = peer(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()

    seconds = clock(step)
    row("rwkv7-hf", f"training step (1, {T})", seconds, T, f"peak {clock.peak():.1f} GB")


@torch.no_grad()
def read_rwkv7_hf(clock: Clock, T: int, layers: int) -> None:
    peer, prompt = rwkv7_hf(layers, clock.device).eval(), random_tokens(T, clock.device)

    def prefill():
        with autocast(clock.device):
            return peer(prompt, use_cache=True, logits_to_keep=1).past_key_values

    def decode():
        token, state = prompt[:, :1], after
        for _ in range(DECODED):
            with autocast(clock.device):
                output = peer(token, past_key_values=state, use_cache=True)
                token, state = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values

    after = prefill()
    rows_of_reading("rwkv7-hf", clock, T, prefill, decode)


OURS = [rates, count_ours, train_ours, read_ours]
PEERS = [read_rwkv, train_rwkv7_hf, read_rwkv7_hf]


def time_all(args) -> None:
    """Runs every measurement in a process of its own."""
    functions = list(OURS)
    if args.peers == "yes":
        functions += PEERS
    for threads in args.threads:
        where = f"CPU, {threads} thread(s)"
        if args.device == "cuda":
            where = torch.cuda.get_device_name()
        print(f"RWKV-7, {args.layers} layers of 768, {where}, torch {torch.__version__}", flush=True)
        for tokens in args.tokens:
            for function in functions:
                subprocess.run([sys.executable, __file__, "--only", function.__name__,
                                "--device", args.device, "--threads", str(threads),
                                "--tokens", str(tokens), "--layers", str(args.layers)], check=True)


def main() -> None:
    by_name = {function.__name__: function for function in OURS + PEERS}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--peers", choices=("yes", "no"), default="yes")
    parser.add_argument("--only", choices=by_name, help="what one of the processes runs")
    parser.add_argument("--save", metavar="FILE", help="write the random model and time nothing")
    args = parser.parse_args()
    if args.save:
        random_model(args.layers, "cpu").save(args.save)
        return
    if args.only is None:
        time_all(args)
        return
    torch.manual_seed(0)
    torch.set_num_threads(args.threads[0])
    try:
        by_name[args.only](Clock(args.device, args.threads[0]), args.tokens[0], args.layers)
    except ImportError as error:
        print(f"{args.only}: left out, {error}")


if __name__ == "__main__":
    main()
