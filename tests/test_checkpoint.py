"""Checkpoint files, in and out: official variants, other programs, and everything else that people give.

What must hold: a file is read to the bit or refused in one line that names it and says what it is. Nothing in
it is executed, and memory stays near the size of the file. A file that is written is whole, or not there.
"""

import hashlib
import io
import math
import os
import pickle
import resource
import signal
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close, random_model, random_tokens

import model as model_module
from model import RWKV7, Config, read_pt, read_tensors, rwkv_state, write_pt

REVERSE = "rwkv7-reverse-L4-D32-blinkdl.pth"
TINY = "tiny-rwkv-7v0-834K-blinkdl.pth"


def tiny_weights(n_layer=2) -> dict[str, torch.Tensor]:
    model = random_model(14, n_layer, n_embd=8, head_size=4, vocab_size=11, n_ffn=10, ranks=(1, 2, 3, 4))
    return {name: tensor.clone() for name, tensor in model.float().state_dict().items()}


def saved(path: Path, content, **options) -> Path:
    torch.save(content, path, **options)
    return path


def load_error(path: Path) -> str:
    """The message of the ValueError that loading must raise: one line that names the file."""
    with pytest.raises(ValueError) as caught:
        RWKV7.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400, message
    return message.removeprefix(f"{path}: ")


def same_weights(one: RWKV7, two: RWKV7) -> bool:
    one, two = one.state_dict(), two.state_dict()
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


# ---- real files, and other programs ------------------------------------------------------------------------


def test_real_checkpoint_gives_the_shipped_logits(shared):
    """Catches: anything wrong in the model or the reader. The numbers are another program's (rwkv.cpp)."""
    model = RWKV7.load(shared / "weights" / TINY)
    expected = torch.from_numpy(np.fromfile(shared / "weights" / "expected-logits-7v0-834K.bin", dtype="<f4"))
    hidden, _ = model(torch.tensor([list(b'"in')]))
    assert (model.head(hidden[0, -1]) - expected).abs().max() <= 1e-5
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@torch.no_grad()
def test_real_checkpoint_reverses_digits(shared):
    """Catches: a model with plausible numbers that cannot do what it was trained for."""
    vocabulary = "0123456789,#"
    model = RWKV7.load(shared / "weights" / REVERSE)
    assert model.config == Config(4, 32, 16, 12, 128, 8, 8, 8, 8)
    numbers = ["7", "42", "90210", "1234567890123", "27182818284590452353602874713526624977572470936999"]
    lengths = torch.tensor([len(number) + 1 for number in numbers])
    tokens = torch.full((len(numbers), int(lengths.max())), 11)
    for row, number in enumerate(numbers):
        tokens[row, : len(number) + 1] = torch.tensor([vocabulary.index(c) for c in number + ","])
    hidden, state = model(tokens, lengths=lengths)
    logits = model.logits(hidden[torch.arange(len(numbers)), lengths - 1])
    written = model.generate(logits, state, int(lengths.max())).tolist()
    texts = ["".join(vocabulary[i] for i in row)[: len(number) + 1] for row, number in zip(written, numbers)]
    assert texts == [number[::-1] + "#" for number in numbers]


@torch.no_grad()
@pytest.mark.parametrize("seeded", [False, True])
def test_the_rwkv_package_reads_our_file_and_goes_on_from_our_state(tmp_path, monkeypatch, seeded):
    """The `rwkv` package gives our logits from a file that `save` wrote. After a prompt that was read here,
    with or without seed states, it reads on from rwkv_state(state) as we do.

    Catches: a file or a state that only this project can read, a state transposed, in another order, or
    shared with that package, which writes into what it is given.
    """
    monkeypatch.setenv("RWKV_V7_ON", "1")
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    rwkv_model = pytest.importorskip("rwkv.model", reason="needs the rwkv package: pip install rwkv==0.8.32")
    model = random_model(16, n_embd=128, head_size=64).float()
    model.save(tmp_path / "ours.pth")
    theirs = rwkv_model.RWKV(model=str(tmp_path / "ours"), strategy="cpu fp32")
    prompt, rest = random_tokens(1, 1, 30), random_tokens(2, 1, 11)
    logits, _ = theirs.forward(prompt[0].tolist(), None, full_output=True)
    assert_close(model.head(model(prompt)[0])[0], logits, 1e-5)

    hook = None
    if seeded:
        hook = lambda layer, below, x_last: below.mT / 2    # noqa: E731
    _, state = model(prompt, seed_state=hook)
    given = rwkv_state(state)
    assert [tuple(part.shape) for part in given] == [(128,), (2, 64, 64), (128,)] * 3
    ours = {part.data_ptr() for layer in state for part in layer}
    assert not ours & {part.data_ptr() for part in given}
    expected, after = model(rest, state)
    logits, found = theirs.forward(rest[0].tolist(), given, full_output=True)
    assert_close(model.head(expected)[0], logits, 1e-5)
    for part, theirs_after in zip(rwkv_state(after), found, strict=True):
        assert_close(part, theirs_after, 1e-5)
    with pytest.raises(ValueError, match="one row, and this state holds 2"):
        rwkv_state(model(random_tokens(1, 2, 5))[1])


# ---- official variants -------------------------------------------------------------------------------------


def test_save_and_load_give_the_same_bits(tmp_path, monkeypatch):
    """Catches: a parameter that is rounded, renamed, lost or not trainable after a round trip, and a hash of
    another file than the one that was read, where the path gets a new file in between.
    """
    model = random_model(15).float()
    path = tmp_path / "new folder" / "model.pth"
    model.save(path)
    content, load = path.read_bytes(), torch.load
    raw, _ = read_tensors(path)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in raw.values())

    def replaced(*args, **options):
        write_pt({}, path)
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", replaced)
    again = RWKV7.load(path)
    assert model.sha256 is None and again.sha256 == hashlib.sha256(content).hexdigest()
    assert again.config == model.config and same_weights(model, again)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in again.parameters()]


@pytest.mark.parametrize("n_layer", [1, 2])
def test_official_variants_load_alike(tmp_path, n_layer):
    """Catches: a reader that needs key order, fp32, torch's zip format, block 0's idle adapter, names without
    a prefix, no wrapper, or a head of its own; and one that leaves a tied head tied.
    """
    weights = tiny_weights(n_layer)
    expected = RWKV7.load(saved(tmp_path / "a.pth", weights))
    tokens = random_tokens(1, 1, 9, vocab_size=11)
    idle = [f"blocks.0.att.v{i}" for i in "012"]
    scrambled = {name: torch.full_like(t, math.nan) if name in idle else t for name, t in weights.items()}
    absent = {name: t for name, t in weights.items() if name not in idle}
    for variant in (dict(reversed(weights.items())), scrambled, absent):
        loaded = RWKV7.load(saved(tmp_path / "b.pth", variant))
        assert torch.equal(loaded(tokens)[0], expected(tokens)[0])
    for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod.", "a.b.c."):
        variant = {prefix + name: tensor for name, tensor in weights.items()}
        assert same_weights(RWKV7.load(saved(tmp_path / "c.pth", variant)), expected)
        for wrapped in ({"state_dict": variant, "epoch": 3}, {"model": variant, "optimizer": {"step": [1]}}):
            assert same_weights(RWKV7.load(saved(tmp_path / "d.pth", wrapped)), expected)
    legacy = saved(tmp_path / "e.pth", weights, _use_new_zipfile_serialization=False)
    assert same_weights(RWKV7.load(legacy), expected)
    half = {name: torch.nn.Parameter(tensor.bfloat16()) for name, tensor in weights.items()}
    loaded = RWKV7.load(saved(tmp_path / "f.pth", half)).state_dict()
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in loaded.items())
    tied = RWKV7.load(saved(tmp_path / "g.pth", weights | {"head.weight": weights["emb.weight"]}))
    assert tied.head.weight.data_ptr() != tied.emb.weight.data_ptr()


def rewritten(source: Path, target: Path, change, compression=zipfile.ZIP_STORED) -> Path:
    """A copy of a checkpoint whose pickle is change(pickle)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = change(content)
            new.writestr(name, content)
    return target


def test_file_saved_from_a_gpu_loads_without_one(tmp_path):
    """Catches: a forgotten map_location, by a file in which the name of the device is patched."""
    source = saved(tmp_path / "cpu.pth", tiny_weights())
    target = rewritten(source, tmp_path / "cuda.pth", lambda content: content.replace(
        b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(target, weights_only=True)
    assert same_weights(RWKV7.load(source), RWKV7.load(target))


# ---- what is no RWKV-7 is named as what it is --------------------------------------------------------------


def test_every_missing_misshapen_infinite_or_unknown_tensor_is_named(tmp_path):
    """Catches: a checkpoint of another model, or half of one, that loads silently or ends in a traceback."""
    weights = tiny_weights()

    def error(**changes) -> str:
        changed = weights | changes
        changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
        return load_error(saved(tmp_path / "changed.pth", changed))

    for name in [name for name in weights if not name.startswith("blocks.1.") or ".att.v" in name]:
        error(**{name: torch.cat([weights[name], weights[name]])})
        if not name.startswith("blocks.0.att.v") or name.endswith("weight"):    # v0, v1, v2: idle in block 0
            assert name in error(**{name: None})
            broken = weights[name].clone()
            broken.view(-1)[-1] = math.nan if "k" in name else -math.inf
            assert error(**{name: broken}) == f"{name} holds NaN or infinity"
    for name in ("emb.weight", "blocks.0.att.r_k", "blocks.0.ffn.key.weight", "blocks.1.att.v1"):
        for shape in ((0,), (3, 3, 3, 3), (0, 8), (2**40, 0)):
            error(**{name: torch.zeros(shape)})
    for name in ("blocks.1.att.time_decay", "blocks.0.ffn.receptance.weight", "epoch"):
        assert name in error(**{name: torch.zeros(2)})
    assert "blocks.2." in error(**{"blocks.3.ln1.weight": torch.ones(8)})
    for shape in ((1, 7), (3, 2), (4, 4), (1, 0)):    # heads that do not make up the width
        error(**{"blocks.0.att.r_k": torch.zeros(shape)})


STATES = {f"blocks.{layer}.att.time_state": torch.zeros(2, 4, 4) for layer in range(2)}
SAFETENSORS = struct.pack("<Q", 32) + b'{"emb.weight":{"dtype":"F32","shape":[11,8],"data_offsets":[0,352]}}'


@pytest.mark.parametrize("content, words", [
    (b"", "not a PyTorch file"), (b"hello, I am a text file\n", "not a PyTorch file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a git-lfs pointer"),
    (b"\n <!DOCTYPE html>\n<html><head>", "a web page"), (b"\xef\xbb\xbf<html>", "a web page"),
    (b"GGUF\x03", "a GGUF file"), (SAFETENSORS + bytes(352), "a safetensors file"),
    (b"PK\x03\x04", "damaged"), (b"\x80\x02", "damaged"),
    ([], "state dict"), (torch.zeros(2), "state dict"), (None, "state dict"), ({"a": 1}, "state dict"),
    ({1: torch.zeros(2)}, "state dict"), ({"a\nb": 1}, "'a\\nb' is no dense float tensor"),
    ({"model": {"emb.weight": 5}}, "state dict"),
    ({}, "no emb.weight"), ({"a": torch.zeros(2)}, "no emb.weight"),
    ({"emb.weight": torch.zeros(2)}, "values"),
    ({"x": torch.zeros(2), "model.layers.0.attn.x_r": torch.zeros(2)}, "Hugging Face"),
    ({"base_model.model.blocks.0.att.key.lora_A.weight": torch.zeros(2, 2)}, "a LoRA adapter"),
    ({"blocks.0.att.key.lora_A": torch.zeros(2, 2)}, "a LoRA adapter"),
    ({"blocks.0.att.time_decay": torch.zeros(2), "blocks.0.att.time_maa_x": torch.zeros(2)}, "RWKV-6"),
    ({"blocks.0.att.time_decay": torch.zeros(2), "blocks.0.att.time_mix_k": torch.zeros(2)}, "RWKV-4 or 5"),
    (STATES, "trained initial states (time_state), not a model"),
    (tiny_weights() | STATES, "a model with trained initial states (time_state)"),
    (tiny_weights() | {"blocks.0.ffn.s_emb.weight": torch.zeros(11, 8)}, "DeepEmbed"),
], ids=lambda value: repr(value)[:40])
def test_file_of_another_kind_is_named_as_what_it_is(tmp_path, content, words):
    """Catches: a traceback, torch's advice, or a wrong name, for what people give by mistake."""
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert words in load_error(path)


def test_what_is_no_file_is_told_at_once(tmp_path):
    """Catches: a message without the file's name, a folder read, and a wait for ever at a pipe."""
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'none.pth'}: no such checkpoint"):
        RWKV7.load(tmp_path / "none.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path, tmp_path / "pipe.pth"):
        assert load_error(path) == "not a regular file"


# ---- hostile and damaged files -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tensor", [
    lambda: torch.zeros(1).expand(2**31, 8), lambda: torch.zeros(1).expand(2**50, 8),
    lambda: torch.zeros(2**33, 0), lambda: torch.zeros(11, 8, device="meta"),
    lambda: torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)]),
    lambda: torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=torch.jagged),
    lambda: torch.zeros(11, 8).to_sparse(), lambda: torch.zeros(11, 8).to(torch.int8),
    lambda: torch.zeros(11, 8).to(torch.complex64),
    lambda: torch.quantize_per_tensor(torch.zeros(11, 8), 0.1, 0, torch.qint8),
])
@pytest.mark.parametrize("name", ["emb.weight", "blocks.0.ffn.key.weight"])
def test_hostile_tensor_ends_in_one_line(tmp_path, tensor, name):
    """Catches: a traceback, or gigabytes for a file of a few bytes."""
    load_error(saved(tmp_path / "hostile.pth", tiny_weights() | {name: tensor()}))


class Call:
    """What is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def peak_memory(reset=True) -> int:
    """The most bytes that this process has had resident since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("bomb", ["deflated", "hardly deflated", "overlapping", "bytearray",
                                  "bytearray before 1.6"])
def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path, bomb):
    """Memory stays near the size of the file (told by Linux's /proc).

    Catches: members that are deflated 1000:1 or share their bytes, and the one call that torch.load allows
    and that makes something large of a number.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc to tell the memory that a process has used")
    large = saved(tmp_path / "large.pth", {"a": torch.zeros(25_000_000)})
    path = tmp_path / "bomb.pth"
    if bomb == "deflated":
        rewritten(large, path, lambda content: content, zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 1_000_000
    elif bomb == "hardly deflated":    # its table of contents may lie
        rewritten(saved(tmp_path / "small.pth", tiny_weights()), path, lambda content: content,
                  zipfile.ZIP_DEFLATED)
    elif bomb == "overlapping":    # the table of contents lists the same large member again and again
        with zipfile.ZipFile(large, "a") as archive:
            member = next(member for member in archive.infolist() if member.filename.endswith("data/0"))
            archive.filelist += [member] * 9
            archive._didModify = True
        path = large
    elif bomb == "bytearray":
        call = Call(bytearray, 100_000_000)
        rewritten(saved(tmp_path / "small.pth", {}), path, lambda content: pickle.dumps(call, protocol=2))
    else:
        torch.save({"a": Call(bytearray, 100_000_000)}, path, _use_new_zipfile_serialization=False)
    before = peak_memory()
    assert "made to fill the memory" in load_error(path)
    with pytest.raises(ValueError):
        read_pt(path)
    assert peak_memory(reset=False) - before < 50e6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_malicious_checkpoint_executes_nothing(tmp_path, write):
    """Catches: torch.load without weights_only=True, by which a downloaded checkpoint would run any code."""
    trap = tmp_path / "trap"
    malicious = Call(Path.write_text, trap, "executed")
    write({"emb.weight": malicious}, tmp_path / "bad.pth")
    pickle.loads(pickle.dumps(malicious))
    assert trap.exists()    # it does work
    trap.unlink()
    load_error(tmp_path / "bad.pth")
    assert not trap.exists()


def file_bytes() -> bytes:
    file = io.BytesIO()
    torch.save(tiny_weights(1), file)
    return file.getvalue()


WHOLE = file_bytes()
PLACES = st.integers(0, 4000) | st.integers(0, len(WHOLE) - 1)    # the pickle, or anywhere


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, len(WHOLE)),
       changes=st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_checkpoint(tmp_path, length, changes):
    """Catches: any way out but two, a model of the right sizes, or one line that names the file."""
    path = tmp_path / "damaged.pth"
    path.write_bytes(WHOLE[:length])
    if length < len(WHOLE):
        load_error(path)    # a download cut short
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        model = RWKV7.load(path)
    except ValueError:
        load_error(path)
    else:
        assert {name: t.shape for name, t in model.state_dict().items()} == {
            name: t.shape for name, t in tiny_weights(1).items()}


# ---- writing: whole, or not at all -------------------------------------------------------------------------


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    """Catches: a short file renamed into place, a temporary file left behind, an error that does not name the
    path, and torch's RuntimeError for a full disk, which nobody turns into one line.
    """
    path, model = tmp_path / "model.pth", random_model(0, n_embd=64).float()
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)    # as on a full disk: writing fails
    try:
        for limit in (100, 40_000, 100_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError, match=f"^{path}: cannot be written .*; what was there before"):
                model.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["model.pth"] and path.read_bytes() == b"old"
    for unusable in (path / "inside.pth", tmp_path):    # a file for a folder, a folder for a file
        with pytest.raises(OSError, match=f"^{unusable}: cannot be written"):
            model.save(unusable)
    assert os.listdir(tmp_path) == ["model.pth"] and not list(tmp_path.parent.glob(".*.????????"))


def test_a_stop_while_torch_saves_is_a_stop(tmp_path, monkeypatch):
    """Catches: torch's own error, of an archive that was not finished, in the place of Ctrl-C."""
    class Stopping(torch.Tensor):
        def __reduce_ex__(self, protocol):
            raise KeyboardInterrupt(2)

    def stopped(value, file):
        try:
            raise KeyboardInterrupt(2)
        finally:    # what torch does on its way out
            raise RuntimeError("unexpected pos 7552 vs 7446")

    with pytest.raises(KeyboardInterrupt):
        write_pt({"x": Stopping()}, tmp_path / "model.pth")
    monkeypatch.setattr(torch, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_pt({}, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


def test_the_new_file_appears_under_its_name_when_it_is_whole(tmp_path, monkeypatch):
    """Until os.replace, the file is .NAME and eight letters, which a sweep by ".*" finds after a kill.

    Catches: writing in place, a name that no sweep finds, a file that is renamed before it is on the disk,
    and one that only its owner can read.
    """
    path, calls, replace, fsync = tmp_path / "model.pth", [], os.replace, os.fsync

    def replaced(source, target):
        found = [name for name in os.listdir(tmp_path)]
        assert found == [Path(source).name] and len(found[0]) == len(".model.pth.") + 8
        assert found[0].startswith(".model.pth.") and target == path
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(model_module.os, "replace", replaced)
    monkeypatch.setattr(model_module.os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    write_pt({"x": torch.arange(3)}, path)
    assert calls == ["fsync", "replace"] and os.listdir(tmp_path) == ["model.pth"]
    assert path.stat().st_mode & 0o777 == 0o644
    content, sha256 = read_pt(path)
    assert content["x"].tolist() == [0, 1, 2] and sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
