"""The kernels on a GPU, and the model and a training step on top of them.

Without a GPU these tests rehearse: a driver in Python takes the GPU's place, the kernels run on the CPU
(kernel_on_cpu.py), and fewer and smaller cases are tried. What a CPU cannot show is skipped.

Shapes: B batch, T tokens, H heads, N head size.
"""

import copy
import functools
import math

import pytest
import torch

import test_operator_laws as laws
import wkv_cuda as loader
from conftest import relative_error
from fs import FutureSeed, answer_logits, answer_loss, prefill
from kernel_on_cpu import build, memory_holds_nan, stub_gpu
from model import RWKV7, Config
from wkv import wkv_cuda, wkv_reference

ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
BF16, FP32 = torch.bfloat16, torch.float32
if ON_GPU:
    HEAD_SIZES = loader.HEAD_SIZES
else:
    HEAD_SIZES = (32,)


@pytest.fixture
def device(monkeypatch):
    """Where the kernels run: on "cuda", or in the rehearsal on "cpu". Fails a test for which some kernel was
    refused, since the PyTorch form then ran in its place."""
    if ON_GPU:
        yield "cuda"
    else:
        stub_gpu(monkeypatch)
        for N in HEAD_SIZES:
            for bf16 in (True, False):
                kernel = build(N, bf16)
                kernel.seed = kernel.drop = 0
        with memory_holds_nan():
            yield "cpu"
    assert loader.loaded and all(loader.loaded.values())


# ---- the operator ------------------------------------------------------------------------------------------


def form_on(device, N, dtype):
    """wkv_cuda on this device as a form of the operator (see test_operator_laws.py), and what it promises."""

    def operator(*tensors):
        # as in training: where no gradient is asked for, wkv_cuda gives a single token to the token kernel
        y, final = wkv_cuda(*(x.to(device, copy=True).requires_grad_() for x in tensors))
        return y.cpu(), final.cpu()

    twin = "chunked, fp32"  # where gradients are asked for in fp32, that is what runs, on the GPU
    if dtype == BF16:
        twin = "chunked kernel, bf16"
    (promises,) = [form for form in laws.FORMS if form.name == twin]
    return promises._replace(name=f"wkv_cuda, N = {N}, {dtype}", operator=operator, head_sizes=(N, N))


# a law, and what it draws beside the case
LAWS = {
    laws.test_recurrence: {},
    laws.test_causality: {"where": 20},
    laws.test_padding: {"padding": 7, "at_the_end": True},
    laws.test_padding_alone: {},
    laws.test_splitting: {"where": 36, "between_chunks": True},
    laws.test_linearity: {"c": 4.0},
    laws.test_gradients: {},
    laws.test_gradients_do_not_look_ahead: {"where": 20},
}
CASES = [
    {"seed": 1, "B": 2, "T": 50, "wide": False, "decay": "usual", "keys": "random", "memory": 1.0},
    {"seed": 2, "B": 1, "T": 33, "wide": False, "decay": "some channels", "keys": "two", "memory": 1e4},
]


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=("bf16", "fp32"))
@pytest.mark.parametrize("N", HEAD_SIZES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_laws_hold_on_the_gpu(device, law, N, dtype):
    """Every law of test_operator_laws.py holds for every head size and both input types.

    Catches: whatever the hardware does otherwise than the CPU, such as the tensor cores' layout, a copy in
    the background that nobody waits for, or memory that a launch may not use.
    """
    for case in CASES:
        law.hypothesis.inner_test(form=form_on(device, N, dtype), case=case, **LAWS[law])


@pytest.mark.parametrize("N", HEAD_SIZES)
def test_the_token_kernel_decodes_exactly(device, N):
    """One token at a time, as in decoding, bf16 inputs give the recurrence's state to fp32's rounding.

    Catches: a state that is rounded to bf16 at every token, and a state handed over wrongly.
    """
    *inputs, state = laws.make(form_on(device, N, BF16), **CASES[0])
    _, exact = wkv_reference(*(x.double() for x in (*inputs, state)))
    with torch.no_grad():
        state = state.to(device)
        for t in range(inputs[0].shape[1]):
            _, state = wkv_cuda(*(x[:, t:t + 1].to(device) for x in inputs), state)
    assert relative_error(state.cpu(), exact) <= 1e-5


def larger_problem(device, N=HEAD_SIZES[0]):
    """A function that runs forward and backward of one problem with several segments, and its inputs."""
    T = 140
    if ON_GPU:
        T = 500
    case = {**CASES[0], "B": 1, "T": T}
    tensors = [x.to(device).requires_grad_() for x in laws.make(form_on(device, N, BF16), **case)]
    weights = [torch.randn_like(tensors[3]), torch.randn_like(tensors[6])]

    def both():
        outputs = wkv_cuda(*tensors)
        return *outputs, *torch.autograd.grad(outputs, tensors, weights)

    return both, tensors


@pytest.mark.parametrize("N", HEAD_SIZES)
def test_the_same_bits_twice(device, N):
    """Two runs on the same inputs agree in every bit of every output. Catches: a race, and a sum without an
    order of its own."""
    both, _ = larger_problem(device, N)
    assert laws.same_bits(both(), both())


@needs_gpu
@pytest.mark.parametrize("N", HEAD_SIZES)
def test_a_cuda_graph_replays_forward_and_backward(device, N):
    """A graph captured after the first use replays to the bits of the call itself, on new inputs too.

    Catches: a launch on another stream than the one that is captured, and a call that waits for the GPU.
    """
    both, tensors = larger_problem(device, N)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        tensors[3].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert laws.same_bits(captured, both())


@needs_gpu
def test_a_call_on_another_stream(device):
    """A call inside torch.cuda.stream(...) runs on that stream, in order with what it waits for.

    Catches: kernels on the default stream, which read inputs that are not there yet.
    """
    both, tensors = larger_problem(device)
    expected = both()
    value = tensors[3].detach().clone()
    side = torch.cuda.Stream()
    with torch.no_grad():
        tensors[3].zero_()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # so that the copy below is late
        with torch.no_grad():
            tensors[3].copy_(value)
        found = both()
    torch.cuda.synchronize()
    assert laws.same_bits(found, expected)


# ---- the model ---------------------------------------------------------------------------------------------


def small_model(N):
    """A model of two heads whose every part does something: fp32, on the CPU."""
    model = RWKV7(Config.published(n_layer=3, n_embd=2 * N, head_size=N, vocab_size=50))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1 / math.sqrt(2 * N), generator=rng)
        for name, parameter in model.named_parameters():
            if name.endswith(("ln0.weight", "ln1.weight", "ln2.weight", "ln_x.weight", "ln_out.weight")):
                parameter.add_(1)
    return model


def prompts():
    """tokens (2, 40) and lengths (2,): one full row and one that is padded."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(50, (2, 40), generator=rng), torch.tensor([40, 23])


def test_the_model_reads_as_on_the_cpu(device):
    """hidden and every layer's wkv state under bf16 autocast are those that each row alone has in fp64 on the
    CPU, but for bf16's rounding.

    Catches: padding that leaks on this path, a dtype or a layout in which autocast hands over tensors, and a
    state that comes back in bf16.
    """
    model, (tokens, lengths) = small_model(64 if ON_GPU else 32), prompts()
    exact_model = copy.deepcopy(model).double()
    model = model.to(device)
    with torch.no_grad():
        with torch.autocast(device, BF16):
            hidden, states = prefill(model, tokens.to(device), lengths.to(device))
        for row, length in enumerate(lengths.tolist()):
            exact, exact_states = prefill(exact_model, tokens[row:row + 1, :length])
            assert relative_error(hidden[row, :length].cpu(), exact[0]) <= 3e-2
            for state, exact_state in zip(states, exact_states):
                assert state.wkv.dtype == FP32
                assert relative_error(state.wkv[row].cpu(), exact_state.wkv[0]) <= 3e-2


@pytest.mark.parametrize("arm", ("no_fs", "prompt_fs"))
def test_one_training_step(device, arm):
    """The loss and all gradients of a step under bf16 autocast are those of fp64 on the CPU, but for bf16's
    rounding, with Future-Seed and without, and the optimiser's step leaves every parameter finite.

    Catches: a gradient that is lost between the kernels of the answer, those of the prompt and the seed state
    of the layer above, and one that autocast leaves in the wrong dtype.
    """
    model, (tokens, lengths) = small_model(64 if ON_GPU else 32), prompts()
    answer, answer_lengths = tokens[:, :3], torch.tensor([3, 2])
    seeded = None
    if arm == "prompt_fs":
        seeded = FutureSeed(model.config, alpha=0.0, layer_start=1)

    def loss_of(model, seeded, device):
        at = functools.partial(torch.Tensor.to, device=device)
        logits, _ = answer_logits(model, seeded, at(tokens), at(lengths), at(answer))
        return answer_loss(logits, at(answer), at(answer_lengths)).mean()

    exact_model, exact_seeded = copy.deepcopy(model).double(), copy.deepcopy(seeded)
    exact_loss = loss_of(exact_model, exact_seeded, "cpu")
    exact_loss.backward()
    model = model.to(device)
    if seeded is not None:
        seeded = seeded.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.autocast(device, BF16):
        loss = loss_of(model, seeded, device)
    loss.backward()
    assert abs(loss.item() - exact_loss.item()) <= 2e-2 * exact_loss.item()
    pairs = [(ours.grad, exact.grad) for ours, exact in zip(model.parameters(), exact_model.parameters())
             if exact.grad is not None]
    ours = torch.cat([gradient.flatten().cpu() for gradient, _ in pairs])
    exact = torch.cat([gradient.flatten() for _, gradient in pairs])
    assert relative_error(ours, exact) <= 3e-2
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
