"""train.py: the laws of a run. What a user types, what is left on the disk, what survives a stop.

Runs start from a base of 2 layers and 16 channels, on a dozen questions in the publisher's format whose words
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
from hypothesis import HealthCheck, Phase, example, given, settings, strategies as st

import data
import eval as eval_py
import files
import material
import runs
import standin
import train
from conftest import ROOT, refusal
from fake_runs import change_run, read_lines, write_runs
from fs import answer_logits, answer_loss

from model import RWKV7, Config, read_pt
from rounds import load_rounds, with_settings
from runs import ARMS
from tokenizer import Tokenizer

SMALL = ["steps=4", "n_train=11", "n_val=4", "batch_size=4", "eval_every=2", "lr=0.01", "fs_layer_start=1",
         "alpha_lr=0.05"]


@pytest.fixture(scope="module", autouse=True)
def small_vocabulary():
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, material):
            patch.setattr(module, "Tokenizer", standin.small_tokenizer)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny checkpoint in the official format whose layers all do something."""
    model = RWKV7.init(Config(2, 16, 16, len(standin.small_tokenizer().tokens), 32, 8, 8, 8, 8), seed=1)
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
    """Everything that must be the same bits: a hash of every file of a round; no locks, and no seconds."""
    found = {}
    for path in sorted((Path(runs) / name).rglob("*")):
        if path.is_file() and path.name != ".lock":
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

    Catches: a file that is missing, a checkpoint left behind, a run that does not say on what it ran, code
    that may change unseen, and a --set that is taken for the round's own recipe.
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
    monkeypatch.setattr(material, "Tokenizer", lambda: words)
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
    assert says in error and "\n" not in error and ("whole number" in error or "from 0 to" in error)


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
SENSITIVE = ["Arm.train_step", "Arm.evaluate", "Arm.save", "Arm.write_lines", "Arm.score_controls",
             "Arm.finish", "Arm.resume", "write_pt", "_save", "atomic_write", "owned", "write_report",
             "Interrupt.waiting", "copy_identical_no_fs", "real_material", "RWKV7.load", "read_pt"]


# a life of a run: how it is stopped, in which function, at which of its calls (0 the first, 1 the last), and
# whether the command has --fresh
LIFE = st.tuples(st.sampled_from(list(STOPS)), st.sampled_from(SENSITIVE) | st.integers(0, 10**6),
                 st.floats(0, 1), st.sampled_from([False, False, False, True]))


@settings(deadline=None, max_examples=4, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=list(HealthCheck))
@given(lives=st.lists(LIFE, min_size=1, max_size=2))
@example(lives=[("INT", "Arm.evaluate", 0.3, False), ("TERM", "score", 0.5, False)])
@example(lives=[("TERM", "Arm.train_step", 0.3, True), ("KILL", "Arm.write_lines", 0.5, False)])
@example(lives=[("KILL", "Arm.train_step", 0.9, False), ("INT", "Arm.save", 1.0, False)])
@example(lives=[("INT", "Arm.finish", 0.0, False), ("KILL", "atomic_write", 0.9, False)])
def test_however_often_it_is_stopped_it_ends_with_the_same_bits(finished, command, moments, lives):
    """Stopped in one or two lives, by Ctrl-C, SIGTERM or SIGKILL, in any function of the project, a run ends
    with the bytes of one that never was, once it is started for the last time.

    A polite stop (the first two) also says so in its last line, names its signal in the exit code, begins no
    further evaluation and no step but the one whose batch is being drawn, and has saved every step that was
    begun. Where it came with --fresh, it does not advise to start over.

    Catches: state that a checkpoint forgets, half-written files, files of one moment beside those of another,
    a step lost, an evaluation waited for (in R8, for 20 minutes), a stop told as damage, files that a killed
    run leaves for good.
    """
    with tempfile.TemporaryDirectory() as folder:
        for kind, name, share, fresh in lives:
            if isinstance(name, int):
                name = sorted(moments)[name % len(moments)]
            number = 1 + round(share * (moments.get(name, 1) - 1))
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
            assert stop.later["Arm.train_step"] <= 1 and not stop.later["score"]
            for place, step in stop.begun.items():
                if (place / "checkpoint.pt").exists():
                    assert read_pt(place / "checkpoint.pt")[0]["step"] == step
                else:
                    assert read_run(place)["status"] == "done"
        assert train.main(command(folder)) == 0
        assert outcome(folder) == outcome(finished)
        assert len(os.listdir(folder)) == 2    # the round and its summary


def stop_at(patch, name, call, number=signal.SIGINT):
    """Have this process stopped at a call of a method of train.Arm, before the method does its work."""
    method, calls = getattr(train.Arm, name), []

    def stopped(self, *values):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return method(self, *values)

    patch.setattr(train.Arm, name, stopped)


def stopped_at_step(argv, step):
    """Run a command up to a stop in this step of its first arm, which is saved."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "train_step", step)
        assert train.main(argv) == 130


def test_a_second_stop_does_not_wait(command, tmp_path, monkeypatch, capsys):
    """Catches: a Ctrl-C that is ignored while a step takes minutes, and the checkpoint before it lost."""
    stopped_at_step(command(tmp_path), 2)

    def stopped_twice(self, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.Arm, "train_step", stopped_twice)
    assert train.main(command(tmp_path)) == 130
    assert "once more to stop at once" in capsys.readouterr().err
    assert read_pt(tmp_path / "R2/seed5/no_fs/checkpoint.pt")[0]["step"] == 2


def test_a_dead_terminal_stops_nobody(finished, command, tmp_path):
    """With a reader that is gone, or a full disk, at the end of both streams a run ends as any other.

    Catches: `train.py … 2>&1 | head -6` that ends the run, and the seeds after it.
    """
    reader, writer = os.pipe()
    os.close(reader)
    for number, output in enumerate((writer, os.open("/dev/full", os.O_WRONLY))):
        assert in_child(command(tmp_path / str(number)), output) == 0
        assert outcome(tmp_path / str(number)) == outcome(finished)


def test_a_full_disk_keeps_the_previous_checkpoint(finished, command, tmp_path):
    """Catches: a checkpoint that is lost or cut when the next does not fit, and an error without a reason."""
    stopped_at_step(command(tmp_path), 2)
    folder = tmp_path / "R2" / "seed5" / "no_fs"
    before = (folder / "checkpoint.pt").read_bytes()
    assert in_child(command(tmp_path), output=tmp_path / "output", largest_file=len(before) // 2) == 2
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert last.startswith("error: ") and "checkpoint.pt" in last and "File too large" in last
    assert (folder / "checkpoint.pt").read_bytes() == before
    (tmp_path / "output").unlink()
    assert train.main(command(tmp_path)) == 0
    assert outcome(tmp_path) == outcome(finished)


# ---- a checkpoint that is not what it should be ------------------------------------------------------------

def wrong_checkpoints(saved: dict):
    """Checkpoints that hold something else than an arm left, each as (what is wrong, its contents)."""
    tensor = torch.zeros(7)
    pool = [None, True, "x", -7, 10**15, 10**400, 1.5, float("nan"), float("inf"), [], [1], [{}],
            [{"step": "x"}], {}, {0: {}}, tensor]
    for key in saved:
        yield f"no {key}", {name: part for name, part in saved.items() if name != key}
        for value in pool:
            fits = (key, type(value)) in (("seconds", float), ("seconds", int)) and 0 <= value < 100
            if not fits:
                yield f"{key} {value!r:.20}", saved | {key: value}
    yield from (("a list", [saved]), ("a number", 7), ("a tensor", tensor), ("a model", saved["model"]))

    def changed(*path, to=None, name=None):
        """A copy in which the place at `path` holds `to`, has another name, or is gone."""
        value = part = copy.copy(saved)
        for key in path[:-1]:
            part[key] = copy.copy(part[key])
            part = part[key]
        old = part.pop(path[-1])
        if name is not None:
            part[name] = old
        elif to is not None and isinstance(part, list):
            part.insert(path[-1], to)
        elif to is not None:
            part[path[-1]] = to
        return f"{path} {name} {to!r:.30}", value

    for group, name in (("model", "head.weight"), ("model", "blocks.1.att.k_k"), ("fs", "alpha")):
        yield changed(group, name)
        yield changed(group, name, name=f"module.{name}")
        for value in (None, "x", 1.0, tensor, [1.0]):
            yield changed(group, name, to=value)
    yield "a tensor more", saved | {"model": saved["model"] | {"extra.weight": tensor}}
    for number in (0, 5, len(saved["optimizer"]) - 1):
        place = next(key for key in list(saved["optimizer"])[number:])
        yield changed("optimizer", place)
        yield changed("optimizer", place, to={})
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            yield changed("optimizer", place, moment)
            for value in ("x", 1, torch.zeros(7, 7), torch.tensor(1.0), torch.tensor(float("nan"))):
                yield changed("optimizer", place, moment, to=value)
    for entry in ("from_step", "code", "machine"):
        yield changed("history", 0, entry)
        yield changed("history", 0, entry, to=[])
    for place in range(len(saved["metrics"])):
        yield changed("metrics", place)
        yield changed("metrics", place, to={"step": 99, "train_loss": 1.0})
        yield changed("metrics", place, to={"step": 1})
    yield changed("metrics", 1, "train_loss", to="x")
    for key in saved["records"][0]:
        if key not in ("option", "gold", "text"):    # these are for people, and no number is made of them
            yield changed("records", 0, key)
            yield changed("records", 0, key, to=[1])
    yield "no first evaluation", saved | {"records": saved["records"][4:]}
    later = [record | {"step": record["step"] + 2} for record in saved["records"]]
    yield "an evaluation to come", saved | {"records": later}
    yield "a step more", saved | {"step": saved["step"] + 1}
    yield "a step less", saved | {"step": saved["step"] - 1}
    yield changed("identity", "seed", to=6)
    yield changed("identity", "settings", "lr", to=1e-9)


def test_a_checkpoint_that_does_not_fit_is_told_in_one_line(command, tmp_path, capsys, monkeypatch):
    """A checkpoint with other contents, in more than 200 ways, or that is cut, is refused and stays as it is.

    Catches: a traceback, a negative step, a run that goes on with an optimizer, parameters or scores that are
    not its own, and a checkpoint that is overwritten though somebody may still want to look at it.
    """
    argv = command(tmp_path, "--arm", "prompt_fs")
    stopped_at_step(argv, 3)
    path = tmp_path / "R2/seed5/prompt_fs/checkpoint.pt"
    whole = path.read_bytes()
    saved = torch.load(path)
    rng = random.Random(0)
    contents = [("cut", whole[:rng.randrange(len(whole))]) for _ in range(20)]
    contents += [(f"byte {place}", whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
                 for place in (0, 1, len(whole) - 20)]
    contents += [("text", b"PK\x03\x04 not much of a checkpoint"), ("nothing", b"")]
    contents += wrong_checkpoints(saved)
    assert len(contents) > 200
    recipe = with_settings(load_rounds()[0]["R2"], SMALL)
    chosen = train.choose_material(recipe, recipe, train.parse_arguments(argv))
    monkeypatch.setattr(train, "choose_material", lambda *_: chosen)    # read once, for 200 lives
    monkeypatch.setattr(train, "train_arm", lambda arm, interrupt: arm.resume())
    others = outcome(tmp_path)
    for what, content in contents:
        with monkeypatch.context() as patch:
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:    # as if it had been read from the disk: to write so many takes long
                patch.setattr(runs, "read_pt", lambda path: (content, "sha256"))
            before = path.read_bytes()
            try:
                error = refusal(capsys, train.main, argv)
            except Exception as problem:
                raise AssertionError(what) from problem
            assert str(path) in error and "\n" not in error and "--fresh" in error and len(error) < 500, what
            assert path.read_bytes() == before, what
    path.write_bytes(whole)
    assert outcome(tmp_path) == others


# ---- whose folder it is ------------------------------------------------------------------------------------

def never_trains(patch):
    """From here on, a run that begins to train fails the test."""
    patch.setattr(train.Arm, "train_step", lambda *_: pytest.fail("it trained"))


def test_done_is_done_and_fresh_spares_what_is_not_its_own(copy_of_finished, command, monkeypatch, capsys):
    """Catches: a finished run that is trained again, a checkpoint that a run killed in its last moment left
    for good, --fresh that is not, that deletes an arm it was not asked to run, or that follows a link out of
    the runs."""
    runs = copy_of_finished
    arms = [runs / "R2" / "seed5" / arm for arm in ARMS]
    before = outcome(runs)
    (arms[0] / "checkpoint.pt").touch()
    elsewhere = arms[0].rename(runs / "elsewhere")
    arms[0].symlink_to(elsewhere)
    with monkeypatch.context() as patch:
        never_trains(patch)
        assert train.main(command(runs)) == 0
        assert capsys.readouterr().err.count("this run is done") == 2
        fresh = command(runs, "--fresh", "--arm", "no_fs")
        assert "no_fs is a link" in refusal(capsys, train.main, fresh) and (elsewhere / "model.pth").exists()
    arms[0].unlink()
    elsewhere.rename(arms[0])
    assert outcome(runs) == before
    for path in arms[0].iterdir():
        path.write_text("mark")
    assert train.main(fresh) == 0
    assert outcome(runs) == before


def test_a_seed_has_one_owner(finished, command, tmp_path, monkeypatch):
    """While either arm is trained or scored, the same command in a second process, --fresh included, is
    refused and touches nothing.

    Catches: an arm deleted under a process that works on it, a lock taken too late or given back too early.
    """
    for name in ("train_step", "evaluate"):
        def disturbed(self, *values, own=getattr(train.Arm, name)):
            if self.step == 2:
                before = outcome(tmp_path)
                for more in ([], ["--fresh", "--arm", "no_fs"]):
                    with monkeypatch.context() as patch:
                        patch.setattr(train, "train_arm", lambda *_: os._exit(5))
                        assert in_child(command(tmp_path, *more), output=tmp_path / "output") == 2
                last = (tmp_path / "output").read_text().splitlines()[-1]
                assert last.startswith("error: another process is already working in ")
                assert outcome(tmp_path) == before
            return own(self, *values)

        monkeypatch.setattr(train.Arm, name, disturbed)
    assert train.main(command(tmp_path)) == 0
    assert outcome(tmp_path) == outcome(finished)


@pytest.mark.parametrize("method, arms", [("train_step", ["no_fs"]), ("score_controls", ["prompt_fs"])])
def test_a_run_whose_folder_was_deleted_leaves_the_next_one_alone(method, arms, finished, command, tmp_path,
                                                                  monkeypatch, capsys):
    """A run's folder is deleted and another process starts there: the first says so and stops, and writes
    nothing more.

    Catches: two runs of which the one overwrites the other's work, at a save or at the end.
    """
    original = getattr(train.Arm, method)

    def deleted(self, *values):
        result = original(self, *values)
        if self.step >= 2 and not (tmp_path / "first").exists():
            (tmp_path / "R2").rename(tmp_path / "first")
            assert in_child(command(tmp_path)) == 0
        return result

    monkeypatch.setattr(train.Arm, method, deleted)
    error = refusal(capsys, train.main, command(tmp_path, "--arm", *arms))
    assert "seed5 was deleted or replaced while this run was working in it" in error and "\n" not in error
    (tmp_path / "first").rename(tmp_path / "R1")
    assert outcome(tmp_path) == outcome(finished)


def test_what_is_there_is_looked_up_under_the_lock(finished, command, tmp_path, monkeypatch, capsys):
    """Catches: an arm trained again over the one that another process finished just before."""
    @contextlib.contextmanager
    def late(folder):
        shutil.copytree(finished / "R2" / "seed5", folder)
        with files.owned(folder) as check_owner:
            yield check_owner

    monkeypatch.setattr(train, "owned", late)
    assert train.main(command(tmp_path)) == 0
    assert capsys.readouterr().err.count("this run is done") == 2


@pytest.mark.parametrize("settings, more, says", [
    (["lr=0.02", "alpha_init=-4.0"], [], "settings.alpha_init is -2.0 on disk, -4.0 in this command"),
    (["max_prompt=30", "order=twice", "n_val=5", "n_train=3", "lr=1.0"], ["--minutes", "1"], "and 5 more"),
])
def test_another_run_is_refused(settings, more, says, copy_of_finished, command, capsys):
    """Catches: a run continued under other settings, also where only its checkpoint is left."""
    runs = copy_of_finished
    shutil.rmtree(runs / "R2/seed5/prompt_fs")    # or it would be that which cannot be compared
    arm = runs / "R2" / "seed5" / "no_fs"
    other = command(runs, "--arm", "no_fs", *more, settings=settings)
    errors = [refusal(capsys, train.main, other)]
    shutil.rmtree(arm)
    stopped_at_step(command(runs, "--arm", "no_fs"), 1)
    (arm / "run.json").unlink()
    before = outcome(runs)
    errors.append(refusal(capsys, train.main, other))
    assert outcome(runs) == before
    for error, place in zip(errors, ("no_fs", "checkpoint.pt")):
        assert f"{place} already contains a different run: " in error and says in error
        assert "--fresh" in error and len(error.replace(str(runs), "")) < 350


@pytest.mark.parametrize("argv", [
    ["--seed", "6", "--set", "lr=0.5"], ["--seeds", "5-6", "--fresh", "--arm", "no_fs", "--set", "lr=0.5"],
    ["--seed", "6", "--minutes", "1"], ["--seed", "6", "--base", "init:L2-D16"]])
def test_what_could_not_be_compared_is_told_before_training(argv, copy_of_finished, command, monkeypatch,
                                                            capsys):
    """Beside a finished seed 5, a run that no report could compare with it does not start.

    Catches: tens of hours of training that end in "cannot be compared"; --fresh that deletes, then refuses.
    """
    never_trains(monkeypatch)
    before = outcome(copy_of_finished)
    if "init:L2-D16" in argv:
        monkeypatch.setattr(material, "Tokenizer", Tokenizer)
    capsys.readouterr()
    assert train.main(command(copy_of_finished, *argv)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors and all("could not be compared with" in error and "--runs DIR" in error for error in errors)
    assert outcome(copy_of_finished) == before


def takes_over(command, runs, *more, arm="no_fs", settings=()):
    """Whether R9a, which differs from R2 in its Future-Seed only, takes an arm of R2's over."""
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_arm", lambda *_: trained.append(1))
        assert train.main(command(runs, "--round", "R9a", "--arm", arm, *more, settings=settings)) == 0
    return not trained


@pytest.mark.parametrize("key, change", [
    ("code", lambda patch: patch.setattr(train, "CODE", "0123")),
    ("python", lambda patch: patch.setattr(train.platform, "python_version", lambda: "2.7")),
])
def test_another_machine_or_code_is_told_and_kept(key, change, command, tmp_path, monkeypatch, capsys):
    """A run that goes on under other code, or on another machine, says so, there and in its run.json.

    Catches: one that says afterwards it was all done there, and that another round then takes for its own.
    """
    argv = command(tmp_path, "--arm", "no_fs")
    stopped_at_step(argv, 2)
    change(monkeypatch)
    capsys.readouterr()
    assert train.main(argv) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "different machine or code" in line]
    assert len(notes) == 1 and f"{key} is " in notes[0] and "last bits" in notes[0]
    before, after = read_run(tmp_path / "R2/seed5/no_fs")["history"]
    assert (before["from_step"], after["from_step"]) == (0, 2)
    assert (before["code"] != after["code"]) == (key == "code") != (before["machine"] != after["machine"])
    assert not takes_over(command, tmp_path)
    monkeypatch.undo()
    assert not takes_over(command, tmp_path)


def test_an_arm_that_two_rounds_share_is_trained_once(copy_of_finished, command):
    """Catches: the same arm trained twice, an arm of other data or another machine copied, --fresh that
    copies instead of training. (test_runs.py has the other cases.)"""
    runs, cpu = copy_of_finished, torch.backends.cpu
    for place, name, value in ((train, "fingerprint", lambda examples: "other"),
                               (cpu, "get_cpu_capability", lambda: "DEFAULT")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, value)
            assert not takes_over(command, runs)
    assert not takes_over(command, runs, settings=["lr=0.02"])
    assert not takes_over(command, runs, "--fresh") and not takes_over(command, runs, arm="prompt_fs")
    assert takes_over(command, runs)
    one, other = (outcome(runs, name) for name in ("R2", "R9a"))
    for name in ("metrics.jsonl", "model.pth", "records.jsonl"):
        assert one[f"R2/seed5/no_fs/{name}"] == other[f"R9a/seed5/no_fs/{name}"]
    run = read_run(runs / "R9a/seed5/no_fs")
    assert (run["round"], run["copied_from"], run["settings"]["fs_alpha_schedule"]) == ("R9a", "R2", "linear")


# ---- what goes wrong ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, says", [
    (["--set", "step=3"], ["no setting is called 'step'"]),
    (["--set", "steps=many"], ["steps must be a whole number"]),
    (["--set", "n_val=1"], ["n_val", "2 or more"]),
    (["--set", "n_train=100"], ["only 16 of 16 records qualify", "lower n_train"]),
    (["--round", "R99"], ["no round is called 'R99'", "R2, R3"]),
    (["--seeds", "-1"], ["--seeds -1"]),
    (["--base", "nowhere.pth"], ["nowhere.pth: no such checkpoint"]),
    (["--base", "init:L2-D24"], ["init:L2-D24: the width must be a multiple of 16"]),
    (["--base", "smaller.pth"], ["smaller.pth has a vocabulary of 20 tokens"]),
    (["--assets", "twice", "--set", "n_val=8"], ["ARC-Challenge-Dev.jsonl", "same id"]),
    (["--runs", "file/runs"], ["file/runs", "--runs"]),
    (["--data", "."], ["R2 is a round of ARC-Challenge", "such as S20"]),
])
def test_what_cannot_be_run_is_told_at_once(argv, says, command, tmp_path, monkeypatch, capsys):
    """Catches: a traceback, an error without its cause or its remedy, one that comes after the training."""
    monkeypatch.chdir(tmp_path)
    usual = command("runs")
    (tmp_path / "file").touch()
    RWKV7.init(Config(2, 16, 16, 20, 16, 8, 8, 8, 8)).save("smaller.pth")
    shutil.copytree(usual[usual.index("--assets") + 1] + "/arc", "twice/arc")
    dev = tmp_path / "twice/arc/ARC-Challenge-Dev.jsonl"
    dev.write_text(dev.read_text().replace("standin-validation-1-1", "standin-validation-1-0"))
    never_trains(monkeypatch)
    error = refusal(capsys, train.main, [*usual, *argv])
    assert all(words in error for words in says) and "\n" not in error
    assert not list(tmp_path.glob("runs/*/*/*"))


def test_a_damaged_seed_is_told_and_the_others_go_on(copy_of_finished, command, capsys):
    """Catches: seeds that a damaged one before them keeps from running, and damage that goes unsaid."""
    arm = copy_of_finished / "R2" / "seed5" / "no_fs"
    (arm / "records.jsonl").write_bytes(b"")
    error = refusal(capsys, train.main, command(copy_of_finished, "--seeds", "5-6"))
    assert "seed5/no_fs/records.jsonl is damaged" in error and "--fresh" in error
    assert (arm / "records.jsonl").read_bytes() == b""
    assert (copy_of_finished / "R2/seed6/prompt_fs/model.pth").exists()


def test_a_round_without_its_data_is_told_and_the_others_go_on(command, tmp_path, capsys):
    """Catches: a round whose files are missing that keeps those after it from running."""
    error = refusal(capsys, train.main, command(tmp_path, "--round", "R6", "R2"))
    assert "hotpot_train_v1.1.json" in error and "hotpot_dev_distractor_v1.json" in error
    assert (tmp_path / "R2/seed5/prompt_fs/model.pth").exists() and not (tmp_path / "R6").exists()


def test_out_of_memory_says_what_to_lower(command, tmp_path, capsys, monkeypatch):
    """Catches: a traceback. On a CPU a lack of memory is a RuntimeError like any other."""
    def on_a_gpu(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for fail in (on_a_gpu, lambda *_: torch.empty(1 << 60, dtype=torch.uint8)):
        monkeypatch.setattr(train, "answer_logits", fail)
        assert "micro_batch_size" in refusal(capsys, train.main, command(tmp_path))


@pytest.mark.parametrize("steps, says", [
    (6, "step 2 (examples standin-train"), (1, "validation loss after step 1")])
def test_a_loss_that_is_not_a_number_stops_the_arm(steps, says, command, tmp_path, capsys):
    """Catches: an arm that trains on after a NaN, or keeps ruined weights as done or as its checkpoint."""
    error = refusal(capsys, train.main, command(tmp_path, settings=["lr=1e30", f"steps={steps}"]))
    assert says in error and "--set lr=" in error and "checkpoint is kept" in error
    folder = tmp_path / "R2/seed5/no_fs"
    assert read_run(folder)["status"] == "running"
    saved = torch.load(folder / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


# ---- a step ------------------------------------------------------------------------------------------------

def make_arm(base, folder, *settings):
    """An arm with Future-Seed, and a batch of five questions."""
    recipe = with_settings(load_rounds()[0]["R2"], ["fs_layer_start=1", *settings])
    rules = dict(max_prompt=256, max_answer=4, order="context_first")
    batch = [data.make_example("arc", record, standin.small_tokenizer(), **rules)
             for n in (2, 4, 7, 3, 3) for record in standin.standin_records("arc", "train", 1, n, n)]
    made_from = material.Material("real", batch, batch, RWKV7.load(base), "tiny.pth",
                                  standin.small_tokenizer())
    experiment = train.Experiment(recipe, 5, made_from, None, torch.device("cpu"), folder)
    return train.Arm(experiment, experiment.identity() | {"arm": "prompt_fs"}), batch


@pytest.mark.parametrize("settings", [
    ["micro_batch_size=2", "grad_clip=0.5", "fs_gate=input", "warm_up=0"],
    ["checkpoint_activations=true", "grad_clip=0.0", "fs_gate=heads", "warm_up=2"],
])
def test_a_step_follows_the_recipe(settings, base, tmp_path):
    """What AdamW is given at its first three steps is what the recipe says, of the mean loss of the batch.

    Catches: the gradient of a sum, or of a mean of the pieces' means, old gradients added on, a clip without
    Future-Seed's parameters, decay of what is no matrix, rates swapped or in their place too early, a wrong
    beta2, activations kept although the round says not to.
    """
    arm, batch = make_arm(base, tmp_path, "lr=0.1", "weight_decay=0.5", "beta2=0.8", "alpha_lr=0.03",
                          "fs_gate_lr=0.007", "fs_detach=false", *settings)
    recipe = arm.recipe
    assert arm.model.checkpoint_activations == recipe.checkpoint_activations
    prompt, lengths, answer, answer_lengths = data.collate(batch)
    logits, _ = answer_logits(arm.model, arm.fs, prompt, lengths, answer)
    loss = answer_loss(logits, answer, answer_lengths).mean()
    named = dict([*arm.model.named_parameters(), *arm.fs.named_parameters()])
    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm > 1
    clipped = 0.5 / norm if recipe.grad_clip else 1.0
    matrices = [part.weight for part in arm.model.modules() if isinstance(part, (nn.Linear, nn.Embedding))]
    rates = {"alpha": 0.03, "input": 0.007}
    seen = []

    def look():
        risen = min(1.0, (len(seen) + 1) / 2) if recipe.warm_up else 1.0
        groups = {parameter: group for group in arm.optimizer.param_groups for parameter in group["params"]}
        for (name, parameter), gradient in zip(parameters.items(), gradients):
            torch.testing.assert_close(parameter.grad, gradient * clipped, rtol=1e-3, atol=1e-6)
            rate = rates.get(name[:5], 0.1)
            is_matrix = any(parameter is matrix for matrix in matrices)
            group = groups[parameter]
            assert (group["lr"], group["betas"]) == (pytest.approx(rate * risen), (0.9, 0.8)), name
            assert group["weight_decay"] == (0.5 if is_matrix else 0.0), name
        seen.append(1)

    arm.optimizer.step = look
    for _ in range(3):
        arm.train_step(batch)
    assert len(seen) == 3 and type(arm.optimizer) is torch.optim.AdamW
    expected = pytest.approx(loss.item())
    assert arm.metrics == [{"step": step, "train_loss": expected} for step in (1, 2, 3)]


def test_minutes_are_minutes_of_training_and_their_arms_are_not_copied(command, tmp_path, monkeypatch):
    """On a clock by which a step takes 10 s, half a minute is three steps.

    Catches: a budget in seconds, evaluations that count, and R9a's no_fs copied from R2's, though it depends
    on the clock.
    """
    now = [0.0]

    def slow(seconds, function):
        def slowed(*values, **named):
            now[0] += seconds
            return function(*values, **named)
        return slowed

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(train, "answer_loss", slow(10, train.answer_loss))
    monkeypatch.setattr(train, "score", slow(1000, train.score))
    assert train.main(command(tmp_path, "--minutes", "0.5", "--arm", "no_fs", "--round", "R2", "R9a")) == 0
    for name in ("R2", "R9a"):
        run = read_run(tmp_path / name / "seed5" / "no_fs")
        assert run["steps"] == 3 and run["minutes"] == 0.5 and "copied_from" not in run


def test_the_time_left_after_a_stop_is_of_the_steps_to_come(command, tmp_path, monkeypatch, capsys):
    """On a clock by which a step takes 10 s, a line after each step says what is left, in seconds of steps.

    Catches: hours that are still to come, at the end of a run that was stopped, or of an arm that was copied.
    """
    now = [0.0]
    answer_loss = train.answer_loss

    def slow(*values):
        now[0] += 10
        return answer_loss(*values)

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(files, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(train, "answer_loss", slow)
    stopped_at_step(command(tmp_path, "--arm", "no_fs"), 2)
    assert train.main(command(tmp_path, "--arm", "no_fs")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 4, loss " in line]
    assert [line.split("about ")[1] for line in lines] == ["30 s left", "20 s left", "10 s left", "0 s left"]
    assert all("10 s a step" in line for line in lines)


def test_own_questions_are_a_round_of_their_own(command, tmp_path, capsys):
    """--data runs a round on a user's questions, in a folder of its own, and says so in every report.

    Catches: own runs that are averaged with real ones or stand beside the log's numbers, a limit on prompts
    that only the round's own records need, more questions asked for than there are.
    """
    for split, count in (("train", 7), ("validation", 5)):
        records = standin.standin_records("hotpotqa", split, count, 1, 3)
        lines = [{"context": "\n\n".join(text for _, (text,) in record["context"]),
                  "question": record["question"], "answer": record["answer"]} for record in records]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ["n_train=100", "n_val=50"]
    argv = command(tmp_path / "runs", "--round", "R8", "--data", tmp_path, settings=more)
    assert train.main(argv) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "runs/own/R8"
    for text in (out, folder.with_name("_summary_R8.txt").read_text()):
        assert "OWN DATA: not comparable with the log" in text and "the log: d_acc" not in text
        assert "1 seed on 5 questions" in text and "min_prompt" not in text
    assert f"OWN DATA, {tmp_path}: 7 questions to train on" in err and not (tmp_path / "runs/R8").exists()
    run = read_run(folder / "seed5/prompt_fs")
    assert (run["source"], run["status"], run["settings"]["min_prompt"]) == ("own", "done", 0)
    assert eval_py.main(["R8", "--runs", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.strip() == out.strip()
    (tmp_path / "validation.jsonl").unlink()
    assert "validation.jsonl" in refusal(capsys, train.main, argv)


# ---- what a user sees --------------------------------------------------------------------------------------

def test_list_and_help(tmp_path, capsys):
    """Catches: a list on which stand-in, unfinished and finished runs look alike, or that waits at a pipe."""
    for source in ("real", "own", "standin"):
        write_runs(tmp_path, "S20", (5,), n=2, source=source)
    change_run(tmp_path / "S20/seed5/prompt_fs", status="running", steps=4)
    (tmp_path / "standin/S20/seed5/no_fs/run.json").write_text("{")
    (tmp_path / "own/S20/seed5/no_fs/run.json").unlink()
    os.mkfifo(tmp_path / "own/S20/seed5/no_fs/run.json")
    assert train.main(["--list", "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "R10: " in out and "d_acc +0.0141 +0.0021 -0.0837, mean -0.0225, " in out
    for line in ("S20/seed5/prompt_fs, running at step 4", "standin/S20/seed5/prompt_fs, done at step 250"):
        assert f"    on disk: {tmp_path}/{line}\n" in out
    assert "standin/S20/seed5/no_fs/run.json is damaged" in out
    assert "own/S20/seed5/no_fs/run.json is damaged (ValueError: " in out and "not a regular file" in out
    for argv, code in ((["--help"], 0), ([], 2), (["--round", "R2", "--minutes", "0"], 2),
                       (["--round", "R2", "--minutes", "nan"], 2),
                       (["--round", "R2", "--standin", "--base", "init"], 2),
                       (["--round", "R2", "--real", "--data", "x"], 2)):
        with pytest.raises(SystemExit) as stop:
            train.main(argv)
        assert stop.value.code == code
    assert "python train.py --round R8 --seed 1" in capsys.readouterr().out
