"""train.py: the laws of a run. What a user types, what is left on the disk, what survives a stop.

Runs start from a base of 3 layers and 16 channels, on a dozen questions in the publisher's format whose words
are the stand-in's: its vocabulary of 162 tokens keeps checkpoints small, and a run takes a third of a second.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

import data
import files
import standin
import train
from conftest import ROOT, refusal
from fake_runs import change_run, read_lines, write_runs
from fs import answer_logits, answer_loss
from model import RWKV7, Config, read_pt, write_pt
from rounds import load_rounds, with_settings
from runs import ARMS
from tokenizer import Tokenizer

SMALL = ["steps=4", "n_train=11", "n_val=4", "batch_size=4", "eval_every=2", "lr=0.01", "fs_layer_start=1",
         "alpha_lr=0.05"]


@pytest.fixture(scope="module", autouse=True)
def small_vocabulary():
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, train):
            patch.setattr(module, "Tokenizer", standin.small_tokenizer)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny checkpoint in the official format whose layers all do something."""
    model = RWKV7.init(Config(3, 16, 16, len(standin.small_tokenizer().tokens), 32, 8, 8, 8, 8), seed=1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "emb" in name or "output" in name or "ffn.value" in name:
                parameter.normal_(0, 0.3, generator=rng)
    path = tmp_path_factory.mktemp("base") / "tiny.pth"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def command(base, tmp_path_factory):
    """The arguments of a small run into a folder; of two that say the same, the later one counts."""
    assets = tmp_path_factory.mktemp("assets")
    (assets / "arc").mkdir()
    for part, split, count in (("Train", "train", 16), ("Dev", "validation", 8)):
        lines = [json.dumps(record) + "\n" for record in standin.standin_records("arc", split, count, 1, 4)]
        (assets / "arc" / f"ARC-Challenge-{part}.jsonl").write_text("".join(lines))

    def arguments(runs, *more, settings=()):
        return ["--round", "R2", "--seed", "5", "--assets", str(assets), "--base", str(base), "--offline",
                "--runs", str(runs), "--device", "cpu", "--set", *SMALL, *settings, *map(str, more)]
    return arguments


def in_child(argv, output=os.devnull, largest_file=None, profile=None):
    """train.main in a forked process, perhaps on a disk that is full once a file holds largest_file bytes.

    Args: output, where both of its streams go, as a path or as an open file's number. Returns its exit code.
    """
    child = os.fork()
    if child == 0:
        out = output
        if not isinstance(output, int):
            out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)    # pytest had put its own in their place
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        sys.setprofile(profile)
        os._exit(train.main(argv))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(runs, name="R2"):
    """Everything that must be the same bits: a hash of every file of a round, the seconds left out."""
    found = {}
    for path in sorted((Path(runs) / name).rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "run.json":
                content = json.dumps({**json.loads(content), "seconds": None}).encode()
            found[str(path.relative_to(runs))] = hashlib.sha256(content).hexdigest()
    return found


def read_run(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """A run that was never disturbed. Not to be changed."""
    runs = tmp_path_factory.mktemp("finished")
    assert train.main(command(runs)) == 0
    return runs


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    """The same, to be changed."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


# ---- what a run does ---------------------------------------------------------------------------------------

def test_a_run_leaves_what_it_promises(finished):
    """Every file that train.py's first lines name is there, and says what it should.

    Catches: a file that is missing, a checkpoint left behind, a run that does not say on what it ran, code that
    may change unseen, and a --set that is taken for the round's own recipe.
    """
    for arm in ARMS:
        folder = finished / "R2" / "seed5" / arm
        own = {"controls.jsonl", "fs.pth"} if arm == "prompt_fs" else set()
        assert {path.name for path in folder.iterdir()} == own | {
            "metrics.jsonl", "model.pth", "records.jsonl", "run.json"}
        run = read_run(folder)
        assert (run["status"], run["steps"], run["arm"], run["source"]) == ("done", 4, arm, "real")
        history, = run["history"]
        assert history["from_step"] == 0 and history["code"] == train.CODE
        assert history["machine"]["threads"] == 1 and history["machine"]["torch"] == torch.__version__
        metrics = read_lines(folder / "metrics.jsonl")
        assert [line["step"] for line in metrics if "acc" in line] == [0, 2, 4]
        assert [line["step"] for line in metrics if "train_loss" in line] == [1, 2, 3, 4]
        assert [line["step"] for line in read_lines(folder / "records.jsonl")] == [0] * 4 + [2] * 4 + [4] * 4
    controls = [line["control"] for line in read_lines(folder / "controls.jsonl")]
    assert controls == ["off"] * 4 + ["other"] * 4 + ["shuffled"] * 4
    summary = (finished / "_summary_arc_optionsfirst_stabilized_r2.txt").read_text()
    assert "settings changed from the round's: " in summary and "steps=4" in summary
    code = [path.read_bytes() for path in sorted(ROOT.iterdir()) if path.suffix in (".py", ".cu")]
    assert len(code) > 12 and train.CODE == hashlib.sha256(b"".join(code)).hexdigest()[:16]


def test_same_command_same_bits(finished, command, base, tmp_path, monkeypatch):
    """The same command in another process, at another time and place, leaves the same bytes.

    Catches: an unseeded draw, anything that depends on time, reading memory that was never written (new
    tensors are filled with NaN first), and a base that is read again for prompt_fs: another has its place.
    """
    mine = shutil.copy(base, tmp_path / "tiny.pth")
    make_reproducible, train_step = train.make_reproducible, train.Arm.train_step

    def fill_too(device):
        make_reproducible(device)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def replace_base(self, batch):
        RWKV7.init(self.model.config, seed=9).save(mine)
        return train_step(self, batch)

    monkeypatch.setattr(train, "make_reproducible", fill_too)
    monkeypatch.setattr(train.Arm, "train_step", replace_base)
    assert in_child(command(tmp_path, "--base", mine)) == 0
    assert outcome(tmp_path) == outcome(finished)


def test_arms_differ_in_nothing_but_future_seed(finished, command, tmp_path):
    """With seed states scaled to nothing the arms agree to the last bit: same weights, batches, order, steps.
    Else they differ, at the end and under each control.

    Catches: a batch, an optimizer or a random draw that knows which arm it serves.
    """
    assert train.main(command(tmp_path, settings=["fs_scale=0.0"])) == 0
    arms = [tmp_path / "R2" / "seed5" / arm for arm in ARMS]
    for name in ("model.pth", "metrics.jsonl", "records.jsonl"):
        assert (arms[0] / name).read_bytes() == (arms[1] / name).read_bytes()

    folder = finished / "R2" / "seed5"
    without, with_fs = (read_lines(folder / arm / "records.jsonl")[-4:] for arm in ARMS)
    controls = read_lines(folder / "prompt_fs" / "controls.jsonl")
    ends = without, with_fs, controls[:4], controls[4:8], controls[8:]
    assert len({tuple(line["loss"] for line in lines) for lines in ends}) == 5


def test_processes_share_rounds_and_seeds(command, tmp_path, monkeypatch):
    """With torchrun's variables, the files of two processes are, bit for bit, those of one. The official
    tokenizer, for once.

    Catches: seeds that two processes train, or none, and fresh weights drawn from the run's seed.
    """
    words = Tokenizer()
    monkeypatch.setattr(train, "Tokenizer", lambda: words)
    argv = ["--base", "init:L2-D16", "--round", "R3", "R2", "--seeds", "5-6", "--arm", "no_fs"]
    settings = ["steps=1", "n_val=2"]
    assert train.main(command(tmp_path / "one", *argv, settings=settings)) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, wanted in (("1", {"R3/seed6", "R2/seed6"}), ("0", {"R3/seed5", "R2/seed5"})):
        monkeypatch.setenv("RANK", rank)
        before = set((tmp_path / "two").glob("R*/*"))
        assert train.main(command(tmp_path / "two", *argv, settings=settings)) == 0
        new = set((tmp_path / "two").glob("R*/*")) - before
        assert {str(path.relative_to(tmp_path / "two")) for path in new} == wanted
    for name in ("R2", "R3"):
        assert outcome(tmp_path / "two", name) == outcome(tmp_path / "one", name)
    fresh = [read_lines(tmp_path / f"one/R2/seed{seed}/no_fs/records.jsonl")[:2] for seed in (5, 6)]
    assert fresh[0] == fresh[1]


@pytest.mark.parametrize("rank, size, says", [
    ("0", "0", "WORLD_SIZE=0"), ("2", "2", "RANK=2 WORLD_SIZE=2"), ("abc", "2", "RANK=abc"),
    ("0", "-1", "WORLD_SIZE=-1"), ("²", "3", "RANK=²"), ("0", "", "WORLD_SIZE="), ("1.0", "2", "RANK=1.0")])
def test_a_wrong_share_of_processes_is_told(rank, size, says, command, tmp_path, monkeypatch, capsys):
    """Catches: "slice step cannot be zero", and a process that silently has nothing to do."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    error = refusal(capsys, train.main, command(tmp_path))
    assert says in error and "\n" not in error and ("whole number" in error or "less than" in error)


# ---- stops -------------------------------------------------------------------------------------------------

class Moments:
    """A profile function that counts calls, by name, and does something at a chosen call of one function.

    What is counted: every function of this project, and torch's own in a save or a load. The moment's action
    may raise; then Python takes this function out, as a debugger's would be.
    """

    def __init__(self, name="", number=0, act=lambda: None):
        self.name, self.number, self.act = name, number, act
        self.calls, self.later = Counter(), Counter()
        self.came = False
        self.begun = {}       # arm's folder -> the last step that was begun there

    def __call__(self, frame, event, _):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(COUNTED) or "<" in code.co_qualname:
            return
        name = code.co_qualname
        self.calls[name] += 1
        if name == "Arm.train_step":
            arm = frame.f_locals["self"]
            self.begun[arm.folder] = arm.step + 1
        if self.came:
            self.later[name] += 1
        elif name == self.name and self.calls[name] == self.number:
            self.came = True
            self.act()


COUNTED = (*(str(path) for path in ROOT.glob("*.py")), torch.serialization.__file__)
# before the handlers of signals stand, and after the last of them has spoken
NOT_YET = {"main", "parse_arguments", "Interrupt.__init__"}


@pytest.fixture(scope="module")
def moments(command, tmp_path_factory):
    """How often each function is called in an undisturbed run: all the moments at which a stop can come."""
    counter = Moments()
    sys.setprofile(counter)
    try:
        assert train.main(command(tmp_path_factory.mktemp("moments"))) == 0
    finally:
        sys.setprofile(None)
    calls = {name: count for name, count in counter.calls.items() if name not in NOT_YET}
    assert len(calls) > 100 and {"Arm.train_step", "Arm.save", "Arm.finish", "score", "_save"} <= calls.keys()
    return calls


STOPS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM, "KILL": signal.SIGKILL}
# where stops have done harm before, or would: half of all draws are of these
SENSITIVE = ["Arm.train_step", "Arm.evaluate", "Arm.save", "Arm.write_lines", "Arm.score_controls", "Arm.finish",
             "Arm.resume", "write_pt", "_save", "atomic_write", "owned", "write_report", "Interrupt.waiting",
             "copy_identical_no_fs", "real_material", "RWKV7.load", "read_pt"]


@st.composite
def stops_at(draw, moments):
    """A stop: its kind, the function in which it comes, and at which of its calls."""
    name = draw(st.sampled_from(SENSITIVE) | st.sampled_from(sorted(moments)))
    return draw(st.sampled_from(list(STOPS))), name, draw(st.integers(1, moments.get(name, 1)))


@settings(deadline=None, max_examples=14, phases=[Phase.generate], database=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
@given(st.data())
def test_however_often_it_is_stopped_it_ends_with_the_same_bits(finished, command, moments, data):
    """Stopped in one to three lives, by Ctrl-C, SIGTERM or SIGKILL, in any function of the project, a run ends
    with the bytes of one that never was, once it is started for the last time.

    A polite stop (the first two) also says so in its last line, names its signal in the exit code, begins no
    further step or evaluation, and has saved every step that was begun. Where it came with --fresh, it does not
    advise to start over.

    Catches: state that a checkpoint forgets, half-written files, files of one moment beside those of another,
    a step lost, an evaluation waited for (in R8, for 20 minutes), a stop told as damage, files that a killed
    run leaves for good.
    """
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(data.draw(st.integers(1, 3), label="lives")):
            kind, name, number = data.draw(stops_at(moments), label="stop")
            fresh = data.draw(st.integers(0, 4), label="--fresh") == 4
            argv = command(folder, *["--fresh"] * fresh)
            if kind == "KILL":
                assert in_child(argv, profile=Moments(name, number, lambda: os._exit(9))) in (0, 9)
                continue
            stop = Moments(name, number, lambda: signal.raise_signal(STOPS[kind]))
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                sys.setprofile(stop)
                try:
                    code = train.main(argv)
                finally:
                    sys.setprofile(None)
            if not stop.came:
                assert code == 0
                continue
            last = said.getvalue().splitlines()[-1]
            assert code == 128 + STOPS[kind] and last.startswith("stopped; "), said.getvalue()
            assert ("the same command without --fresh" in last) == fresh
            assert not stop.later["Arm.train_step"] and not stop.later["score"]
            for place, step in stop.begun.items():
                if (place / "checkpoint.pt").exists():
                    assert read_pt(place / "checkpoint.pt")[0]["step"] == step
                else:
                    assert read_run(place)["status"] == "done"
        assert train.main(command(folder)) == 0
        assert outcome(folder) == outcome(finished)
        assert len(os.listdir(folder)) == 2    # the round and its summary
