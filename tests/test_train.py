"""The command line and the training loop: what a user types, what is left on the disk, what survives a kill.

Runs start from a base of 3 layers and 16 channels, on a dozen questions in the publisher's format whose words
are the stand-in's: its vocabulary of 162 tokens keeps checkpoints small, and a run takes half a second.
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import data
import files
import standin
import train
from conftest import ROOT, refusal
from data import collate
from fs import GATES, answer_logits, answer_loss
from model import RWKV7, Config
from rounds import load_rounds, with_settings
from tokenizer import Tokenizer

SMALL = ["steps=6", "n_train=11", "n_val=6", "batch_size=4", "eval_every=3", "lr=0.01", "fs_layer_start=1"]


@pytest.fixture(scope="module", autouse=True)
def small_vocabulary():
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, train):
            patch.setattr(module, "Tokenizer", standin.small_tokenizer)
        yield


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """An assets folder with small ARC files."""
    folder = tmp_path_factory.mktemp("assets")
    (folder / "arc").mkdir()
    for part, split, count in (("Train", "train", 16), ("Dev", "validation", 8)):
        lines = [json.dumps(record) + "\n" for record in standin.standin_records("arc", split, count, 1, 4)]
        (folder / "arc" / f"ARC-Challenge-{part}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny checkpoint in the official format whose layers all do something."""
    vocab_size = len(standin.small_tokenizer().tokens)
    model = RWKV7.init(Config(3, 16, 16, vocab_size, 32, 8, 8, 8, 8), seed=1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "emb" in name or "output" in name or "ffn.value" in name:
                parameter.normal_(0, 0.3, generator=rng)
    path = tmp_path_factory.mktemp("base") / "tiny.pth"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def command(assets, base):
    """The arguments of a small run into a folder; later ones win."""
    def arguments(runs, *more, settings=()):
        return ["--round", "R2", "--seed", "5", "--assets", str(assets), "--base", str(base), "--runs", str(runs),
                "--offline", "--device", "cpu", "--set", *SMALL, *settings, *more]
    return arguments


def in_child(argv, kill_after=None, output=os.devnull, largest_file=None):
    """train.main in a forked process: perhaps killed after some seconds, perhaps on a disk that is full once a
    file holds largest_file bytes. Returns its exit code, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)    # pytest had put its own in their place
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        os._exit(train.main(argv))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(runs, name="R2"):
    """Everything that must be the same bits: a hash of every file of a round, the seconds left out."""
    found = {}
    for path in sorted((runs / name).rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "run.json":
                content = json.dumps({**json.loads(content), "seconds": None}).encode()
            found[str(path.relative_to(runs))] = hashlib.sha256(content).hexdigest()
    return found


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def edit_run(folder, **changes):
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, **changes}))


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """A run that was never disturbed. Not to be changed."""
    runs = tmp_path_factory.mktemp("finished")
    assert in_child(command(runs)) == 0
    return runs


# ---- what a run does ---------------------------------------------------------------------------------------

def test_a_run_leaves_what_it_promises(finished):
    """Catches a file of the documented layout that is missing, a checkpoint left behind, a run that does not
    say on what it ran, and a --set that is taken for the round's own recipe."""
    for arm in train.ARMS:
        folder = finished / "R2" / "seed5" / arm
        own = ["controls.jsonl", "fs.pth"] * (arm == "prompt_fs")
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            ["metrics.jsonl", "model.pth", "records.jsonl", "run.json", *own])
        run = json.loads((folder / "run.json").read_text())
        assert (run["status"], run["steps"], run["arm"], run["standin"]) == ("done", 6, arm, False)
        assert run["base"]["name"] == "tiny.pth" and len(run["base"]["sha256"]) == 64
        history, = run["history"]
        assert history["from_step"] == 0 and history["code"] == train.CODE
        assert history["machine"]["threads"] == 1 and history["machine"]["torch"] == torch.__version__
        RWKV7.load(folder / "model.pth")
        metrics = read_lines(folder / "metrics.jsonl")
        assert [line["step"] for line in metrics if "acc" in line] == [0, 3, 6]
        assert [line["step"] for line in metrics if "train_loss" in line] == [1, 2, 3, 4, 5, 6]
        assert len(read_lines(folder / "records.jsonl")) == 3 * 6
    controls = [line["control"] for line in read_lines(folder / "controls.jsonl")]
    assert controls == ["off"] * 6 + ["other"] * 6 + ["shuffled"] * 6
    summary = (finished / "_summary_arc_optionsfirst_stabilized_r2.txt").read_text()
    assert "settings changed from the round's: " in summary and "steps=6" in summary


def test_every_file_that_decides_numbers_is_in_the_codes_hash():
    """Catches a file of code that may change unseen."""
    code = {path.name for path in ROOT.iterdir() if path.suffix in (".py", ".cu")}
    assert set(train.DECISIVE) == code - {"files.py", "stats.py"}


def test_same_command_same_bits(finished, command, tmp_path, monkeypatch):
    """Catches an unseeded draw, anything that depends on time or on the process, and reading memory that was
    never written: here every new tensor is filled with NaN first."""
    reproducible = train.reproducible

    def fill_too(device):
        reproducible(device)
        torch.utils.deterministic.fill_uninitialized_memory = True

    monkeypatch.setattr(train, "reproducible", fill_too)
    assert in_child(command(tmp_path)) == 0
    assert outcome(tmp_path) == outcome(finished)


def test_arms_differ_in_nothing_but_future_seed(finished, command, tmp_path):
    """With seed states scaled to nothing the arms agree to the last bit: same weights, batches, order, steps.
    Else they differ, at the end and under each control."""
    assert train.main(command(tmp_path, settings=["fs_scale=0.0"])) == 0
    arms = [tmp_path / "R2" / "seed5" / arm for arm in train.ARMS]
    for name in ("model.pth", "metrics.jsonl", "records.jsonl"):
        assert (arms[0] / name).read_bytes() == (arms[1] / name).read_bytes()

    without, with_fs = (read_lines(finished / "R2" / "seed5" / arm / "records.jsonl") for arm in train.ARMS)
    controls = read_lines(finished / "R2" / "seed5" / "prompt_fs" / "controls.jsonl")
    losses = [[line["loss"] for line in lines] for lines in
              (without[-6:], with_fs[-6:], controls[:6], controls[6:12], controls[12:])]
    assert len({tuple(part) for part in losses}) == 5


def test_fresh_weights_are_the_same_in_every_arm_and_seed(command, tmp_path, monkeypatch):
    """Catches --base init drawn from the run's seed. The official tokenizer, for once."""
    monkeypatch.setattr(train, "Tokenizer", Tokenizer)
    argv = command(tmp_path, "--base", "init:L2-D16", "--seeds", "1-2", settings=["steps=0", "n_val=2"])
    assert train.main(argv) == 0
    fresh = RWKV7.init(Config.published(2, 16, 16), seed=0).state_dict()
    for path in (found := list(tmp_path.glob("R2/seed*/*/model.pth"))):
        weights = torch.load(path)
        assert all(torch.equal(weights[key], fresh[key]) for key in fresh)
    assert len(found) == 4


def test_processes_share_the_rounds_and_seeds(command, tmp_path, monkeypatch):
    """torchrun's variables, set by hand. Catches seeds that two processes train, or none, and files that are
    not, bit for bit, those of one process."""
    argv = ["--round", "R3", "R2", "--seeds", "5-6", "--arm", "no_fs"]
    assert train.main(command(tmp_path / "one", *argv, settings=["steps=2"])) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, seed in (("1", 6), ("0", 5)):
        monkeypatch.setenv("RANK", rank)
        before = set((tmp_path / "two").glob("*/*"))
        assert train.main(command(tmp_path / "two", *argv, settings=["steps=2"])) == 0
        new = {str(path.relative_to(tmp_path / "two")) for path in set((tmp_path / "two").glob("*/*")) - before}
        assert new == {f"R3/seed{seed}", f"R2/seed{seed}"}
    for name in ("R2", "R3"):
        assert outcome(tmp_path / "two", name) == outcome(tmp_path / "one", name)


# ---- what survives -----------------------------------------------------------------------------------------

def test_killed_at_any_moment_it_ends_with_the_same_bits(finished, command, tmp_path, monkeypatch):
    """SIGKILL at 10 random moments, saving included. Catches state that a checkpoint forgets, and half-written
    files."""
    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", 0)    # so that kills hit saving
    started = time.monotonic()
    assert in_child(command(tmp_path / "timed")) == 0
    whole, rng = time.monotonic() - started, random.Random(7)
    runs, kills = tmp_path / "0", 0
    while kills < 10:
        code = in_child(command(runs), kill_after=rng.uniform(0, whole), output=tmp_path / "output")
        assert code in (0, -signal.SIGKILL), (tmp_path / "output").read_text()
        kills += code != 0
        if code == 0:    # it got to the end: check it, and begin another
            assert outcome(runs) == outcome(finished)
            runs = tmp_path / str(kills)
    assert in_child(command(runs)) == 0
    assert outcome(runs) == outcome(finished)


def test_killed_between_two_files_it_ends_with_the_same_bits(finished, command, tmp_path, monkeypatch):
    """Every life of the run dies right after it wrote some file for the first time: a moment that random kills
    seldom hit, as between the last checkpoint and the metrics that belong to it."""
    deaths = tmp_path / "deaths"
    deaths.touch()
    write = files.atomic_write

    @contextlib.contextmanager
    def deadly(path, *mode):
        with write(path, *mode) as file:
            yield file
        times = 3 if "checkpoint" in str(path) else 1    # a checkpoint before each evaluation
        if str(tmp_path) in str(path) and deaths.read_text().count(f"{path}\n") < times:
            with open(deaths, "a") as file:
                file.write(f"{path}\n")
            os._exit(9)

    monkeypatch.setattr(files, "atomic_write", deadly)
    runs = tmp_path / "runs"
    while (code := in_child(command(runs))) == 9:
        pass
    assert code == 0 and outcome(runs) == outcome(finished)
    assert len(deaths.read_text().splitlines()) == 2 * (3 + 4) + 2    # and fs.pth, controls.jsonl


def interrupt_at(monkeypatch, name, call, number=signal.SIGINT):
    """Send this process a signal at a call of a function of train.py, before it does its work."""
    owner, name = (train.Arm, name[4:]) if name.startswith("Arm.") else (train, name)
    function, calls = getattr(owner, name), []

    def interrupted(*values, **named):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return function(*values, **named)

    monkeypatch.setattr(owner, name, interrupted)
    return calls


@pytest.mark.parametrize("number, fresh", [(signal.SIGINT, ()), (signal.SIGTERM, ["--fresh"])])
def test_a_polite_stop_saves_and_goes_on(number, fresh, finished, command, tmp_path, monkeypatch, capsys):
    """Ctrl-C and SIGTERM in the middle of a step. Catches a stop that loses the step, that hides which signal
    it was, or that advises a --fresh run to start over."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, "Arm.train_step", 6 + 2, number)
        assert train.main(command(tmp_path, *fresh)) == 128 + number
    again = "the same command without --fresh" if fresh else "the same command"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stopped; what was saved is kept, and {again} goes on from there"
    saved = torch.load(tmp_path / "R2/seed5/prompt_fs/checkpoint.pt")
    assert saved["ledger"]["step"] == 2
    assert train.main(command(tmp_path)) == 0
    assert outcome(tmp_path) == outcome(finished)


@pytest.mark.parametrize("place, call", [
    ("real_material", 1), ("score", 1), ("score", 2), ("score", 3 + 5), ("report", 1), ("Arm.train_step", 3)])
def test_an_evaluation_is_left_at_once(place, call, finished, command, tmp_path, monkeypatch):
    """Catches Ctrl-C that waits for an evaluation, in R8 for 20 minutes, also where it came in the step or the
    save before it; and one that loses what came before."""
    with monkeypatch.context() as patch:
        scored = interrupt_at(patch, "score", 0)
        interrupt_at(patch, place, call)
        began = call - 1 if place == "score" else {"real_material": 0, "report": 9, "Arm.train_step": 1}[place]
        assert train.main(command(tmp_path)) == 130
        assert len(scored) == began
    assert train.main(command(tmp_path)) == 0
    assert outcome(tmp_path) == outcome(finished)


def test_done_is_done_and_fresh_spares_the_other_arm(finished, command, tmp_path, monkeypatch, capsys):
    """Catches a finished run that is trained again, --fresh that is not, that deletes an arm it was not asked
    to run, or that follows a link out of the runs."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    arms = [tmp_path / "R2" / "seed5" / arm for arm in train.ARMS]
    elsewhere = arms[0].rename(tmp_path / "elsewhere")
    arms[0].symlink_to(elsewhere)
    (arms[1] / "mark").touch()
    trained = []
    monkeypatch.setattr(train, "run_arm", lambda job, arm, *_: trained.append(arm))
    assert train.main(command(tmp_path)) == 0
    assert capsys.readouterr().err.count("done before") == 2 and trained == []
    assert train.main(command(tmp_path, "--fresh", "--arm", "no_fs")) == 0
    assert trained == ["no_fs"] and not arms[0].exists() and not arms[0].is_symlink()
    assert (elsewhere / "model.pth").exists() and (arms[1] / "mark").exists()


def test_a_full_disk_keeps_the_previous_checkpoint(finished, command, tmp_path, monkeypatch):
    """Catches a checkpoint that is lost or cut when the next does not fit."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, "Arm.train_step", 3)
        assert train.main(command(tmp_path)) == 130
    folder = tmp_path / "R2" / "seed5" / "no_fs"
    before = (folder / "checkpoint.pt").read_bytes()
    assert in_child(command(tmp_path), output=tmp_path / "output", largest_file=len(before) // 2) == 2
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert last.startswith("error: ") and "cannot save at step" in last and "previous checkpoint is kept" in last
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert train.main(command(tmp_path)) == 0
    assert outcome(tmp_path) == outcome(finished)


def test_a_base_is_read_once(finished, command, base, tmp_path, monkeypatch):
    """Catches a file replaced while no_fs trains that gives prompt_fs other weights."""
    mine = shutil.copy(base, tmp_path / "tiny.pth")
    train_step = train.Arm.train_step

    def replace(self, batch):
        RWKV7.init(RWKV7.load(mine).config, seed=9).save(mine)
        train_step(self, batch)

    monkeypatch.setattr(train.Arm, "train_step", replace)
    assert train.main(command(tmp_path, "--base", str(mine))) == 0
    assert outcome(tmp_path) == outcome(finished)


# ---- whose folder it is ------------------------------------------------------------------------------------

def test_a_seed_has_one_owner(finished, command, tmp_path, monkeypatch):
    """While either arm trains or is scored, the same command in a second process, --fresh included, is refused
    and touches nothing. Catches an arm deleted under a process that works on it, a lock taken too late or given
    back between the arms."""
    for name in ("train_step", "scored"):
        def disturbed(self, *values, own=getattr(train.Arm, name)):
            if self.ledger.step == 3:
                before = outcome(tmp_path)
                for more in ([], ["--fresh"], ["--arm", "no_fs", "--fresh"]):
                    with monkeypatch.context() as patch:
                        patch.setattr(train, "run_arm", lambda *_: os._exit(5))
                        assert in_child(command(tmp_path, *more), output=tmp_path / "output") == 2
                last = (tmp_path / "output").read_text().splitlines()[-1]
                assert last.startswith("error: ") and "another process is at work" in last
                assert outcome(tmp_path) == before
            return own(self, *values)

        monkeypatch.setattr(train.Arm, name, disturbed)
    assert train.main(command(tmp_path)) == 0
    assert outcome(tmp_path) == outcome(finished)


def test_what_is_there_is_looked_up_under_the_lock(finished, command, tmp_path, monkeypatch, capsys):
    """Catches an arm trained again over the one that another process finished just before."""
    @contextlib.contextmanager
    def late(folder):
        shutil.copytree(finished / "R2" / "seed5", folder)
        with files.locked(folder):
            yield

    monkeypatch.setattr(train, "locked", late)
    assert train.main(command(tmp_path)) == 0
    assert capsys.readouterr().err.count("done before") == 2


@pytest.mark.parametrize("settings, more, says", [
    (["lr=0.02", "alpha_init=-4.0"], [], ["settings.lr: 0.01 there, 0.02 here", "settings.alpha_init: -2.0 there"]),
    (["n_train=12"], [], ["settings.n_train", "data.train"]),
    (["max_prompt=30", "order=twice", "n_val=5", "n_train=3", "lr=1.0"], ["--minutes", "1"], ["and 5 more"]),
])
def test_another_run_is_refused(settings, more, says, finished, command, tmp_path, capsys):
    """Catches a run continued under other settings, also where only its checkpoint is left, and an error that
    lists everything."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    arm = tmp_path / "R2" / "seed5" / "no_fs"
    argv = command(tmp_path, *more, settings=settings)
    errors = [refusal(capsys, train.main, argv)]
    shutil.rmtree(arm)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, "Arm.train_step", 1)
        assert train.main(command(tmp_path, "--arm", "no_fs")) == 130
    (arm / "run.json").unlink()
    before = outcome(tmp_path)
    errors.append(refusal(capsys, train.main, [*argv, "--arm", "no_fs"]))
    assert outcome(tmp_path) == before
    for error, place in zip(errors, ("no_fs holds another run", "checkpoint.pt holds another run")):
        short = error.replace(str(tmp_path), "")
        assert place in error and "--fresh" in error and "--runs DIR" in error and len(short) < 300
        assert all(words in error for words in says)


@pytest.mark.parametrize("key, change", [
    ("CODE", lambda patch: patch.setattr(train, "CODE", "0123")),
    ("python", lambda patch: patch.setattr(train.platform, "python_version", lambda: "2.7")),
])
def test_other_surroundings_are_told_and_kept(key, change, command, tmp_path, monkeypatch, capsys):
    """A run that goes on under other code, or on another machine. Catches one that says afterwards it was all
    done there, and that another round then takes for its own."""
    argv = command(tmp_path, "--arm", "no_fs")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "Arm.train_step", 3)
        assert train.main(argv) == 130
    change(monkeypatch)
    capsys.readouterr()
    assert train.main(argv) == 0
    note = next(line for line in capsys.readouterr().err.splitlines() if "other surroundings" in line)
    assert key.lower() in note and "last bits may differ" in note
    before, after = json.loads((tmp_path / "R2/seed5/no_fs/run.json").read_text())["history"]
    assert (before["from_step"], after["from_step"]) == (0, 3)
    assert (before["code"] != after["code"]) != (before["machine"]["python"] != after["machine"]["python"])
    assert train.main(command(tmp_path, "--round", "R9a", "--arm", "no_fs")) == 0
    assert "copied_from" not in json.loads((tmp_path / "R9a/seed5/no_fs/run.json").read_text())


# ---- arms that rounds share --------------------------------------------------------------------------------

def copied(command, runs, *more, arm="no_fs", settings=()):
    """Which arms R9a, which differs from R2 in its Future-Seed, takes over from R2, or else would train."""
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run_arm", lambda job, arm, *_: trained.append(arm))
        assert train.main(command(runs, "--round", "R9a", "--arm", arm, *more, settings=settings)) == 0
    return not trained


def test_an_arm_that_two_rounds_share_is_trained_once(finished, command, tmp_path, monkeypatch):
    """Catches the same arm trained twice, a copy under the old name or with its settings, and a prompt_fs taken
    over from other Future-Seed settings."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert copied(command, tmp_path)
    one, other = (outcome(tmp_path, name) for name in ("R2", "R9a"))
    for name in ("metrics.jsonl", "model.pth", "records.jsonl"):
        assert one[f"R2/seed5/no_fs/{name}"] == other[f"R9a/seed5/no_fs/{name}"]
    run = json.loads((tmp_path / "R9a/seed5/no_fs/run.json").read_text())
    assert (run["round"], run["copied_from"], run["settings"]["fs_alpha_schedule"]) == ("R9a", "R2", "linear")
    assert not copied(command, tmp_path, "--fresh")
    assert not copied(command, tmp_path, arm="prompt_fs")
    same = ["fs_alpha_schedule=none", "fs_alpha_min=1.0"]
    shutil.rmtree(tmp_path / "R9a")
    assert copied(command, tmp_path, arm="prompt_fs", settings=same)


@pytest.mark.parametrize("spoil", [
    lambda arm, patch: (arm / "records.jsonl").write_text("\n".join(
        (arm / "records.jsonl").read_text().splitlines()[:-1]) + "\n"),
    lambda arm, patch: (arm / "records.jsonl").unlink(),
    lambda arm, patch: (arm / "model.pth").unlink(),
    lambda arm, patch: (arm / "run.json").write_text("{"),
    lambda arm, patch: edit_run(arm, status="running"),
    lambda arm, patch: patch.setattr(train, "CODE", "0123"),
    lambda arm, patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
    lambda arm, patch: patch.setattr(train, "fingerprint", lambda examples: "other"),
    ["lr=0.02"], ["steps=5"],
])
def test_twins_are_whole_and_alike_or_none(spoil, finished, command, tmp_path, monkeypatch):
    """Catches a copy of what is damaged, unfinished, or made by other code or on another machine; and another
    round's damage that keeps this one from running."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    if callable(spoil):
        spoil(tmp_path / "R2" / "seed5" / "no_fs", monkeypatch)
    assert not copied(command, tmp_path, settings=[] if callable(spoil) else spoil)
    assert not (tmp_path / "R9a/seed5/no_fs").exists() and not list(tmp_path.glob("R9a/seed5/.*"))


# ---- what goes wrong ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, says", [
    (["--set", "step=3"], ["no setting is called 'step'"]),
    (["--set", "steps=many"], ["steps must be int, not 'many'"]),
    (["--set", "steps=-1"], ["steps = -1: must be 0 or more"]),
    (["--set", "n_val=1"], ["n_val = 1: must be 2 or more"]),
    (["--set", "order=backwards"], ["context_first, question_first"]),
    (["--set", "lr"], ["--set lr: write key=value"]),
    (["--set", "n_train=100"], ["only 16 of 16 records qualify", "lower n_train"]),
    (["--round", "R99"], ["no round is called 'R99'", "R2, R3"]),
    (["--seeds", "-1"], ["--seeds -1"]),
    (["--base", "nowhere.pth"], ["nowhere.pth: no such checkpoint"]),
    (["--base", "init:L2-D17"], ["init:L2-D17: the width must be a multiple of 16"]),
    (["--base", "SMALLER"], ["smaller.pth has a vocabulary of 20 tokens"]),
    (["--assets", "TWICE", "--set", "n_val=8"], ["ARC-Challenge-Dev.jsonl", "same id"]),
    (["--round", "R8", "--assets", "none", "--real"], [
        "\n  none/hotpotqa/hotpot_dev_distractor_v1.json is missing", "\n  none/weights/rwkv7-g1d-0.1b", "fetch http"]),
    (["--runs", "FILE/runs"], ["FILE/runs", "--runs"]),
])
def test_what_cannot_be_run_is_told_at_once(argv, says, command, assets, tmp_path, monkeypatch, capsys):
    """Catches a traceback, an error without its cause or its remedy, and one that comes after the training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    RWKV7.init(Config(2, 16, 16, 20, 16, 8, 8, 8, 8)).save("smaller.pth")
    shutil.copytree(assets / "arc", "twice/arc")
    dev = tmp_path / "twice/arc/ARC-Challenge-Dev.jsonl"
    dev.write_text(dev.read_text().replace("standin-validation-1-1", "standin-validation-1-0"))
    argv = [{"SMALLER": "smaller.pth", "TWICE": "twice"}.get(word, word) for word in argv]
    if "--real" in argv:
        argv = [*command("runs")[2:], *argv]
        del argv[argv.index("--base"):argv.index("--base") + 2]
    else:
        argv = command("runs", *argv)
    error = refusal(capsys, train.main, argv)
    assert all(words in error for words in says), error
    assert not list(tmp_path.glob("runs/*/*/*"))


@pytest.mark.parametrize("name, content, seeds", [
    ("checkpoint.pt", b"PK\x03\x04 not much of a checkpoint", "5-6"), ("run.json", b"{", "5-6"),
    ("records.jsonl", b"", "6,5"),
])
def test_a_damaged_seed_is_told_and_the_others_go_on(name, content, seeds, finished, command, tmp_path, capsys):
    """Catches seeds that a damaged one before them keeps from running, and damage that goes unsaid."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    arm = tmp_path / "R2" / "seed5" / "no_fs"
    edit_run(arm, status="running" if name == "checkpoint.pt" else "done")
    (arm / name).write_bytes(content)
    error = refusal(capsys, train.main, command(tmp_path, "--seeds", seeds))
    assert f"seed5/no_fs/{name}: damaged" in error and "--fresh" in error
    assert (arm / name).read_bytes() == content
    assert (tmp_path / "R2/seed6/prompt_fs/model.pth").exists()


@pytest.mark.parametrize("fail", [
    lambda *_: torch.empty(1 << 60, dtype=torch.uint8),    # in torch a RuntimeError like any other
    lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
])
def test_out_of_memory_says_what_to_lower(fail, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "answer_logits", fail)
    assert "lower micro_batch_size" in refusal(capsys, train.main, command(tmp_path))


@pytest.mark.parametrize("steps, says", [(6, "the loss at step 2 (examples standin-train"),
                                         (1, "the validation loss after step 1")])
def test_a_loss_that_is_not_a_number_stops_the_arm(steps, says, command, tmp_path, capsys):
    """Catches an arm that trains on after a NaN, or that keeps ruined weights as done or as its checkpoint."""
    error = refusal(capsys, train.main, command(tmp_path, settings=["lr=1e30", f"steps={steps}"]))
    assert says in error and "a lower lr may help" in error and "the last checkpoint is kept" in error
    folder = tmp_path / "R2/seed5/no_fs"
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    saved = torch.load(folder / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_base_that_is_not_numbers_is_named(base, command, tmp_path, capsys):
    """Catches the advice to lower lr where nothing has been trained."""
    model = RWKV7.load(base)
    nn.init.constant_(model.head.weight, float("nan"))
    model.save(tmp_path / "ruined.pth")
    error = refusal(capsys, train.main, command(tmp_path / "runs", "--base", str(tmp_path / "ruined.pth")))
    assert "ruined.pth" in error and "lr" not in error


# ---- a step ------------------------------------------------------------------------------------------------

def make_arm(base, folder, *settings):
    """An arm with Future-Seed, and a batch of five questions."""
    recipe = with_settings(load_rounds()[0]["R2"], ["fs_layer_start=1", *settings])
    rules = dict(max_prompt=256, max_answer=4, order="context_first")
    batch = [data.make_example("arc", record, standin.small_tokenizer(), **rules)
             for n in (2, 4, 7, 3, 3) for record in standin.standin_records("arc", "train", 1, n, n)]
    job = train.Job(recipe, 5, False, None, torch.device("cpu"), folder, RWKV7.load(base), "tiny.pth", batch, batch,
                    standin.small_tokenizer())
    return train.Arm(job, "prompt_fs"), batch


@pytest.mark.parametrize("gate, grad_clip", [("input", 2.0), (GATES[1], 0.0)])
def test_the_optimiser_follows_the_recipe(gate, grad_clip, base, tmp_path, monkeypatch):
    """Four steps against one AdamW a parameter. Catches decay of what is no matrix, rates swapped or in their
    place too early, a beta2 or a clip that is not the round's, Future-Seed left out of the clip."""
    arm, batch = make_arm(base, tmp_path, "lr=0.1", "weight_decay=0.5", "beta2=0.8", "warm_up=3", "alpha_lr=0.03",
                          "fs_gate_lr=0.007", f"fs_gate={gate}", f"grad_clip={grad_clip}")
    matrices = [part.weight for part in arm.model.modules() if isinstance(part, (nn.Linear, nn.Embedding))]
    by_hand = []
    for name, parameter in [*arm.model.named_parameters(), *arm.fs.named_parameters()]:
        if parameter.requires_grad:    # layer 0's value residual does not
            decay = 0.5 if any(parameter is matrix for matrix in matrices) else 0.0
            rate = 0.03 if name.startswith("alpha") else 0.007 if name.startswith("input") else 0.1
            copy = nn.Parameter(parameter.detach().clone())
            adam = torch.optim.AdamW([copy], betas=(0.9, 0.8), weight_decay=decay)
            by_hand.append((name, parameter, copy, adam, rate))
    assert {rate for *_, rate in by_hand} == ({0.1, 0.03, 0.007} if gate == "input" else {0.1, 0.03})

    gradients = {}    # of the loss below, by name, as if the model had made it
    monkeypatch.setattr(train, "answer_logits", lambda *_: (None, None))
    monkeypatch.setattr(train, "answer_loss", lambda *_: torch.ones(5) * sum(
        (parameter * gradients[name]).sum() for name, parameter, *_ in by_hand))
    rng = torch.Generator().manual_seed(0)
    for step, (size, risen) in enumerate([(3.0, 1 / 3), (0.001, 2 / 3), (1.0, 1), (0.1, 1)]):
        for name, parameter, *_ in by_hand:
            gradients[name] = size * torch.randn(parameter.shape, generator=rng)
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert (norm > 2) == (size != 0.001)
        for name, _, copy, adam, rate in by_hand:
            copy.grad = gradients[name] * (2 / norm if grad_clip and norm > 2 else 1)
            adam.param_groups[0]["lr"] = rate * risen
            adam.step()
        arm.train_step(batch)
        for name, parameter, copy, *_ in by_hand:
            torch.testing.assert_close(parameter, copy, rtol=1e-4, atol=1e-6, msg=f"{name}, step {step}")


@pytest.mark.parametrize("setting", ["micro_batch_size=2", "checkpoint_activations=true"])
def test_a_step_takes_the_gradient_of_the_batchs_mean_loss(setting, base, tmp_path):
    """Catches a sum, a mean of the pieces' means, old gradients added on, and activations kept although the
    round says not to, or the other way round."""
    arm, batch = make_arm(base, tmp_path, setting)
    assert arm.model.checkpoint_activations == (setting == "checkpoint_activations=true")
    arm.optimizer.step = lambda: None
    for _ in range(2):
        arm.train_step(batch)
    prompt, lengths, answer, answer_lengths = collate(batch)
    logits, _ = answer_logits(arm.model, arm.fs, prompt, lengths, answer, answer_lengths)
    loss = answer_loss(logits, answer, answer_lengths).mean()
    parameters = [parameter for parameter in arm.model.parameters() if parameter.grad is not None]
    assert len(parameters) > 50
    torch.testing.assert_close([parameter.grad for parameter in parameters],
                               list(torch.autograd.grad(loss, parameters)), rtol=1e-3, atol=1e-6)
    arm.read_losses()
    assert abs(arm.ledger.metrics[-1]["train_loss"] - loss.item()) < 1e-5


def test_minutes_are_minutes_of_training_and_their_arms_are_not_copied(command, tmp_path, monkeypatch):
    """On a clock by which a step takes 10 s. Catches a budget in seconds, evaluations that count, and R9a's
    no_fs copied from R2's, though it depends on the clock."""
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
        run = json.loads((tmp_path / name / "seed5" / "no_fs" / "run.json").read_text())
        assert run["steps"] == 3 and run["minutes"] == 0.5 and "copied_from" not in run


# ---- lists -------------------------------------------------------------------------------------------------

def test_list_and_help(finished, tmp_path, capsys):
    """Catches a list on which stand-in, unfinished and finished runs look alike."""
    for folder in (tmp_path, tmp_path / "standin"):
        shutil.copytree(finished, folder, dirs_exist_ok=True)
    edit_run(tmp_path / "R2/seed5/prompt_fs", status="running", steps=4)
    (tmp_path / "standin/R2/seed5/no_fs/run.json").write_text("{")
    assert train.main(["--list", "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "R10: " in out and "d_acc +0.0141 +0.0021 -0.0837; pending in the log" in out
    for line in ("R2/seed5/no_fs, done at step 6", "R2/seed5/prompt_fs, running at step 4",
                 "standin/R2/seed5/prompt_fs, done at step 6"):
        assert f"    on disk: {tmp_path}/{line}\n" in out
    assert "standin/R2/seed5/no_fs/run.json: damaged" in out
    for argv, code in ((["--help"], 0), ([], 2), (["--round", "R2", "--minutes", "0"], 2),
                       (["--round", "R2", "--standin", "--base", "init"], 2)):
        with pytest.raises(SystemExit) as stop:
            train.main(argv)
        assert stop.value.code == code
    assert "python train.py --round R8 --seed 1" in capsys.readouterr().out
