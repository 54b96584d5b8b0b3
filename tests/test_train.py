"""The command line and the training loop: what a user types, what is left on the disk, what survives a kill.

Runs start from a base of 3 layers and 16 channels, on a dozen questions in the publisher's format whose words
are the stand-in's: its vocabulary of 162 tokens keeps checkpoints small, and a run takes half a second.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import data
import files
import standin
import train
from conftest import ROOT, refusal
from fs import answer_logits, answer_loss
from model import RWKV7, Config
from rounds import load_rounds, with_settings
from tokenizer import Tokenizer

SMALL = ["steps=6", "n_train=11", "n_val=6", "batch_size=4", "eval_every=3", "lr=0.01", "fs_layer_start=1",
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


def in_child(argv, output=os.devnull, largest_file=None):
    """train.main in a forked process, perhaps on a disk that is full once a file holds largest_file bytes.
    Returns its exit code."""
    child = os.fork()
    if child == 0:
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)    # pytest had put its own in their place
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        os._exit(train.main(argv))
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


def read_run(folder):
    return json.loads((folder / "run.json").read_text())


def edit_run(folder, **changes):
    (folder / "run.json").write_text(json.dumps({**read_run(folder), **changes}))


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """A run that was never disturbed. Not to be changed."""
    runs = tmp_path_factory.mktemp("finished")
    assert train.main(command(runs)) == 0
    return runs


@pytest.fixture
def copy(finished, tmp_path):
    """The same, to be changed."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


# ---- what a run does ---------------------------------------------------------------------------------------

def test_a_run_leaves_what_it_promises(finished):
    """Catches a file of the documented layout that is missing, a checkpoint left behind, a run that does not
    say on what it ran, code that may change unseen, and a --set that is taken for the round's own recipe."""
    for arm in train.ARMS:
        folder = finished / "R2" / "seed5" / arm
        own = {"controls.jsonl", "fs.pth"} if arm == "prompt_fs" else set()
        assert {path.name for path in folder.iterdir()} == own | {
            "metrics.jsonl", "model.pth", "records.jsonl", "run.json"}
        run = read_run(folder)
        assert (run["status"], run["steps"], run["arm"], run["standin"]) == ("done", 6, arm, False)
        history, = run["history"]
        assert history["from_step"] == 0 and history["code"] == train.CODE[:16]
        assert history["machine"]["threads"] == 1 and history["machine"]["torch"] == torch.__version__
        metrics = read_lines(folder / "metrics.jsonl")
        assert [line["step"] for line in metrics if "acc" in line] == [0, 3, 6]
        assert [line["step"] for line in metrics if "train_loss" in line] == [1, 2, 3, 4, 5, 6]
        assert [line["step"] for line in read_lines(folder / "records.jsonl")] == [0] * 6 + [3] * 6 + [6] * 6
    controls = [line["control"] for line in read_lines(folder / "controls.jsonl")]
    assert controls == ["off"] * 6 + ["other"] * 6 + ["shuffled"] * 6
    summary = (finished / "_summary_arc_optionsfirst_stabilized_r2.txt").read_text()
    assert "settings changed from the round's: " in summary and "steps=6" in summary
    code = [path.read_bytes() for path in sorted(ROOT.iterdir()) if path.suffix in (".py", ".cu")]
    assert len(code) == 13 and train.CODE == hashlib.sha256(b"".join(code)).hexdigest()


def test_same_command_same_bits(finished, command, base, tmp_path, monkeypatch):
    """Catches an unseeded draw, anything that depends on time, reading memory that was never written (new
    tensors are filled with NaN first), and a base that is read again for prompt_fs: another has its place."""
    mine = shutil.copy(base, tmp_path / "tiny.pth")
    reproducible, train_step = train.reproducible, train.Arm.train_step

    def fill_too(device):
        reproducible(device)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def replace_base(self, batch):
        RWKV7.init(self.model.config, seed=9).save(mine)
        return train_step(self, batch)

    monkeypatch.setattr(train, "reproducible", fill_too)
    monkeypatch.setattr(train.Arm, "train_step", replace_base)
    assert in_child(command(tmp_path, "--base", mine)) == 0
    assert outcome(tmp_path) == outcome(finished)


def test_arms_differ_in_nothing_but_future_seed(finished, command, tmp_path):
    """With seed states scaled to nothing the arms agree to the last bit: same weights, batches, order, steps.
    Else they differ, at the end and under each control."""
    assert train.main(command(tmp_path, settings=["fs_scale=0.0"])) == 0
    arms = [tmp_path / "R2" / "seed5" / arm for arm in train.ARMS]
    for name in ("model.pth", "metrics.jsonl", "records.jsonl"):
        assert (arms[0] / name).read_bytes() == (arms[1] / name).read_bytes()

    folder = finished / "R2" / "seed5"
    without, with_fs = (read_lines(folder / arm / "records.jsonl")[-6:] for arm in train.ARMS)
    controls = read_lines(folder / "prompt_fs" / "controls.jsonl")
    ends = without, with_fs, controls[:6], controls[6:12], controls[12:]
    assert len({tuple(line["loss"] for line in lines) for lines in ends}) == 5


def test_processes_share_rounds_and_seeds(command, tmp_path, monkeypatch):
    """torchrun's variables, set by hand. Catches seeds that two processes train, or none, files that are not,
    bit for bit, those of one process, and fresh weights drawn from the run's seed. The official tokenizer,
    for once."""
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


# ---- what survives -----------------------------------------------------------------------------------------

def test_killed_at_any_moment_it_ends_with_the_same_bits(finished, command, tmp_path, monkeypatch):
    """Every life of the run dies while it writes a file, or right after: nothing else of it lasts, so these
    are all moments there are. Catches state that a checkpoint forgets, half-written files, and files of one
    moment beside those of another."""
    deaths = tmp_path / "deaths"
    deaths.touch()
    write = files.atomic_write

    @contextlib.contextmanager
    def deadly(path, *mode):
        most = 6 if "checkpoint" in str(path) else 2    # a checkpoint comes before each of the evaluations
        past = deaths.read_text().count(f"{path}\n")
        dies = str(tmp_path) in str(path) and past < most
        if dies:
            with open(deaths, "a") as file:
                file.write(f"{path}\n")
        with write(path, *mode) as file:
            if dies and past % 2 == 0:
                os._exit(9)
            yield file
        if dies:
            os._exit(9)

    monkeypatch.setattr(files, "atomic_write", deadly)
    runs = tmp_path / "runs"
    while (code := in_child(command(runs))) == 9:
        pass
    assert code == 0 and outcome(runs) == outcome(finished)
    # of three checkpoints and four other files in each arm, and of fs.pth and controls.jsonl
    assert len(deaths.read_text().splitlines()) == 2 * (2 * (3 + 4) + 2)


def interrupt_at(patch, name, call, number=signal.SIGINT):
    """Have this process interrupted at a call of a function of train.py, before it does its work."""
    place, _, name = name.rpartition(".")
    owner = {"Arm": train.Arm, "torch": torch}.get(place, train)
    function, calls = getattr(owner, name), []

    def interrupted(*values, **named):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return function(*values, **named)

    patch.setattr(owner, name, interrupted)
    return calls


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize("place, call, more, number, scored", [
    ("Arm.train_step", 2, [], INT, 1), ("Arm.train_step", 6 + 2, ["--fresh"], TERM, 4),
    ("Arm.train_step", 3, [], INT, 1), ("Arm.save", 2, [], INT, 1), ("Arm.save", 9, [], INT, 6),
    ("score", 2, [], INT, 2), ("score", 8, [], TERM, 8), ("Arm.finish", 1, [], INT, 3),
    ("real_material", 1, [], INT, 0), ("report", 1, [], INT, 9),
])
def test_a_polite_stop_saves_and_goes_on(place, call, more, number, scored, finished, command, tmp_path,
                                         monkeypatch, capsys):
    """Catches a stop that loses a step, that hides which signal it was, that advises a --fresh run to start
    over, and one that waits for an evaluation, in R8 for 20 minutes, also where it came just before it."""
    with monkeypatch.context() as patch:
        evaluations = interrupt_at(patch, "score", 0)
        interrupt_at(patch, place, call, number)
        assert train.main(command(tmp_path, *more)) == 128 + number
    assert len(evaluations) == (scored - 1 if place == "score" else scored)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped") and ("the same command without --fresh" in last) == bool(more)
    if place == "Arm.train_step":
        checkpoint = tmp_path / f"R2/seed5/{'prompt_fs' if call > 6 else 'no_fs'}/checkpoint.pt"
        step = call - 6 * (call > 6)
        assert torch.load(checkpoint)["ledger"]["step"] == step
        with monkeypatch.context() as patch:
            interrupt_at(patch, place, 1, number)
            assert train.main(command(tmp_path)) == 128 + number
        assert torch.load(checkpoint)["ledger"]["step"] == step + 1
    assert train.main(command(tmp_path)) == 0
    assert outcome(tmp_path) == outcome(finished)


def test_a_stop_while_files_are_read_is_no_damage(command, tmp_path, monkeypatch):
    """Catches Ctrl-C that is told as a damaged base or checkpoint, with the advice to start over."""
    for place, call in (("Arm.train_step", 2), ("torch.load", 1), ("torch.load", 2)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, place, call)
            assert train.main(command(tmp_path)) == 130


def test_a_full_disk_keeps_the_previous_checkpoint(finished, command, tmp_path, monkeypatch):
    """Catches a checkpoint that is lost or cut when the next does not fit."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, "Arm.train_step", 2)
        assert train.main(command(tmp_path)) == 130
    folder = tmp_path / "R2" / "seed5" / "no_fs"
    before = (folder / "checkpoint.pt").read_bytes()
    assert in_child(command(tmp_path), output=tmp_path / "output", largest_file=len(before) // 2) == 2
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert last.startswith("error: ") and "checkpoint.pt: cannot be written (File too large); what" in last
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert train.main(command(tmp_path)) == 0
    assert outcome(tmp_path) == outcome(finished)


def test_done_is_done_and_fresh_spares_what_is_not_its_own(copy, command, monkeypatch, capsys):
    """Catches a finished run that is trained again, --fresh that is not, that deletes an arm it was not asked
    to run, or that follows a link out of the runs."""
    arms = [copy / "R2" / "seed5" / arm for arm in train.ARMS]
    elsewhere = arms[0].rename(copy / "elsewhere")
    arms[0].symlink_to(elsewhere)
    (arms[1] / "mark").touch()
    trained = []
    monkeypatch.setattr(train, "run_arm", lambda job, arm, *_: trained.append(arm))
    assert train.main(command(copy)) == 0
    assert capsys.readouterr().err.count("done before") == 2 and trained == []
    fresh = command(copy, "--fresh", "--arm", "no_fs")
    assert "no_fs is a link" in refusal(capsys, train.main, fresh) and (elsewhere / "model.pth").exists()
    arms[0].unlink()
    elsewhere.rename(arms[0])
    assert train.main(fresh) == 0
    assert trained == ["no_fs"] and not arms[0].exists() and (arms[1] / "mark").exists()


# ---- whose folder it is ------------------------------------------------------------------------------------

def test_a_seed_has_one_owner(finished, command, tmp_path, monkeypatch):
    """While either arm is trained or scored, the same command in a second process, --fresh included, is
    refused and touches nothing. Catches an arm deleted under a process that works on it, a lock taken too
    late or given back between the arms."""
    for name in ("train_step", "scored"):
        def disturbed(self, *values, own=getattr(train.Arm, name)):
            if self.ledger.step == 3:
                before = outcome(tmp_path)
                for more in ([], ["--fresh", "--arm", "no_fs"]):
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
    (["lr=0.02", "alpha_init=-4.0"], [], "(settings.alpha_init: -2.0 there, -4.0 here"),
    (["max_prompt=30", "order=twice", "n_val=5", "n_train=3", "lr=1.0"], ["--minutes", "1"], "and 5 more)"),
])
def test_another_run_is_refused(settings, more, says, copy, command, capsys):
    """Catches a run continued under other settings, also where only its checkpoint is left."""
    arm = copy / "R2" / "seed5" / "no_fs"
    other = command(copy, "--arm", "no_fs", *more, settings=settings)
    errors = [refusal(capsys, train.main, other)]
    shutil.rmtree(arm)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, "Arm.train_step", 1)
        assert train.main(command(copy, "--arm", "no_fs")) == 130
    (arm / "run.json").unlink()
    before = outcome(copy)
    errors.append(refusal(capsys, train.main, other))
    assert outcome(copy) == before
    for error, place in zip(errors, ("no_fs", "checkpoint.pt")):
        assert f"{place} holds another run (" in error and says.strip("(") in error
        assert len(error.replace(str(copy), "")) < 300


def takes_over(command, runs, *more, arm="no_fs", settings=()):
    """Whether R9a, which differs from R2 in its Future-Seed only, takes an arm of R2's over or would train
    it."""
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run_arm", lambda *_: trained.append(1))
        assert train.main(command(runs, "--round", "R9a", "--arm", arm, *more, settings=settings)) == 0
    return not trained


@pytest.mark.parametrize("key, change", [
    ("code", lambda patch: patch.setattr(train, "CODE", "0123")),
    ("python", lambda patch: patch.setattr(train.platform, "python_version", lambda: "2.7")),
])
def test_other_surroundings_are_told_and_kept(key, change, command, tmp_path, monkeypatch, capsys):
    """A run that goes on under other code, or on another machine. Catches one that says afterwards it was all
    done there, and that another round then takes for its own."""
    argv = command(tmp_path, "--arm", "no_fs")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "Arm.train_step", 2)
        assert train.main(argv) == 130
    change(monkeypatch)
    capsys.readouterr()
    assert train.main(argv) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if f"{key}: " in line and " here" in line]
    assert len(notes) == 1 and "last bits may differ" in notes[0]
    before, after = read_run(tmp_path / "R2/seed5/no_fs")["history"]
    assert (before["from_step"], after["from_step"]) == (0, 2)
    assert (before["code"] != after["code"]) == (key == "code") != (before["machine"] != after["machine"])
    assert not takes_over(command, tmp_path)
    monkeypatch.undo()
    assert not takes_over(command, tmp_path)


def test_an_arm_that_two_rounds_share_is_trained_once(copy, command):
    """Catches the same arm trained twice, a copy of what is damaged, or of other code, machine, data or
    settings, and a prompt_fs taken over from other Future-Seed settings."""
    cpu = torch.backends.cpu
    for place, name, value in ((train, "CODE", "0123"), (train, "fingerprint", lambda examples: "other"),
                               (cpu, "get_cpu_capability", lambda: "DEFAULT"), (torch, "__version__", "1")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, value)
            assert not takes_over(command, copy)
    assert not takes_over(command, copy, settings=["lr=0.02"])
    assert not takes_over(command, copy, arm="prompt_fs")
    model = (copy / "R2/seed5/no_fs/model.pth").rename(copy / "model.pth")
    assert not takes_over(command, copy)
    model.rename(copy / "R2/seed5/no_fs/model.pth")
    assert takes_over(command, copy) and not takes_over(command, copy, "--fresh")
    assert takes_over(command, copy)
    one, other = (outcome(copy, name) for name in ("R2", "R9a"))
    for name in ("metrics.jsonl", "model.pth", "records.jsonl"):
        assert one[f"R2/seed5/no_fs/{name}"] == other[f"R9a/seed5/no_fs/{name}"]
    run = read_run(copy / "R9a/seed5/no_fs")
    assert (run["round"], run["copied_from"], run["settings"]["fs_alpha_schedule"]) == ("R9a", "R2", "linear")


# ---- what goes wrong ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, says", [
    (["--set", "step=3"], ["no setting is called 'step'"]),
    (["--set", "steps=many"], ["steps must be int"]),
    (["--set", "n_val=1"], ["n_val", "2 or more"]),
    (["--set", "n_train=100"], ["only 16 of 16 records qualify", "lower n_train"]),
    (["--round", "R99"], ["no round is called 'R99'", "R2, R3"]),
    (["--seeds", "-1"], ["--seeds -1"]),
    (["--base", "nowhere.pth"], ["nowhere.pth: no such checkpoint"]),
    (["--base", "init:L2-D24"], ["init:L2-D24: the width must be a multiple of 16"]),
    (["--set", "base"], ["base must be str, not None"]),
    (["--base", "smaller.pth"], ["smaller.pth has a vocabulary of 20 tokens"]),
    (["--assets", "twice", "--set", "n_val=8"], ["ARC-Challenge-Dev.jsonl", "same id"]),
    (["--runs", "file/runs"], ["file/runs", "--runs"]),
])
def test_what_cannot_be_run_is_told_at_once(argv, says, command, tmp_path, monkeypatch, capsys):
    """Catches a traceback, an error without its cause or its remedy, and one that comes after the
    training."""
    monkeypatch.chdir(tmp_path)
    usual = command("runs")
    (tmp_path / "file").touch()
    RWKV7.init(Config(2, 16, 16, 20, 16, 8, 8, 8, 8)).save("smaller.pth")
    shutil.copytree(usual[usual.index("--assets") + 1] + "/arc", "twice/arc")
    dev = tmp_path / "twice/arc/ARC-Challenge-Dev.jsonl"
    dev.write_text(dev.read_text().replace("standin-validation-1-1", "standin-validation-1-0"))
    error = refusal(capsys, train.main, [*usual, *argv])
    assert all(words in error for words in says) and "\n" not in error
    assert not list(tmp_path.glob("runs/*/*/*"))


@pytest.mark.parametrize("name, content, seeds", [
    ("checkpoint.pt", b"PK\x03\x04 not much of a checkpoint", "5-6"), ("run.json", b"{", "5-6"),
    ("records.jsonl", b"", "6,5"),
])
def test_a_damaged_seed_is_told_and_the_others_go_on(name, content, seeds, copy, command, capsys):
    """Catches seeds that a damaged one before them keeps from running, and damage that goes unsaid."""
    arm = copy / "R2" / "seed5" / "no_fs"
    edit_run(arm, status="running" if name == "checkpoint.pt" else "done")
    (arm / name).write_bytes(content)
    error = refusal(capsys, train.main, command(copy, "--seeds", seeds))
    assert f"seed5/no_fs/{name}: damaged" in error and "--fresh" in error
    assert (arm / name).read_bytes() == content
    assert (copy / "R2/seed6/prompt_fs/model.pth").exists()


def test_the_time_left_of_a_resumed_run_leaves_out_its_steps(command, tmp_path, monkeypatch):
    """Catches hours that are still to come, 100 steps before the end of a run that was stopped."""
    kept = []
    monkeypatch.setattr(train, "Progress", lambda total: kept.append(files.Progress(total)) or kept[-1])
    with monkeypatch.context() as patch:
        interrupt_at(patch, "Arm.train_step", 4)
        assert train.main(command(tmp_path, "--arm", "no_fs")) == 130
    assert train.main(command(tmp_path, "--arm", "no_fs")) == 0
    tokens = load_rounds()[0]["R2"].max_prompt
    evaluations = 2 * 6 * tokens    # made before the stop: these alone may be counted again
    assert 0 <= kept[1].total - kept[1].done <= evaluations + 3 * 4 * tokens    # and a short batch


def test_a_round_without_its_data_is_told_and_the_others_go_on(command, tmp_path, capsys):
    """Catches a round whose files are missing that keeps those after it from running."""
    error = refusal(capsys, train.main, command(tmp_path, "--round", "R6", "R2"))
    assert "hotpot_train_v1.1.json is missing" in error
    assert (tmp_path / "R2/seed5/prompt_fs/model.pth").exists() and not (tmp_path / "R6").exists()


def test_out_of_memory_says_what_to_lower(command, tmp_path, capsys, monkeypatch):
    """Catches a traceback: on a CPU it is a RuntimeError like any other."""
    def on_a_gpu(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for fail in (on_a_gpu, lambda *_: torch.empty(1 << 60, dtype=torch.uint8)):
        monkeypatch.setattr(train, "answer_logits", fail)
        assert "micro_batch_size" in refusal(capsys, train.main, command(tmp_path))


@pytest.mark.parametrize("steps, says", [
    (6, "step 2 (examples standin-train"), (1, "validation loss after step 1")])
def test_a_loss_that_is_not_a_number_stops_the_arm(steps, says, command, tmp_path, capsys):
    """Catches an arm that trains on after a NaN, or that keeps ruined weights as done or as its
    checkpoint."""
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
    material = train.Material(batch, batch, RWKV7.load(base), "tiny.pth", standin.small_tokenizer())
    job = train.Job(recipe, 5, False, None, torch.device("cpu"), folder, material)
    return train.Arm(job, "prompt_fs"), batch


@pytest.mark.parametrize("settings", [
    ["micro_batch_size=2", "grad_clip=0.5", "fs_gate=input", "warm_up=0"],
    ["checkpoint_activations=true", "grad_clip=0", "fs_gate=heads", "warm_up=2"],
])
def test_a_step_follows_the_recipe(settings, base, tmp_path):
    """What AdamW is given at its first three steps. Catches the gradient of a sum, or of a mean of the
    pieces' means, old gradients added on, a clip without Future-Seed's parameters, decay of what is no
    matrix, rates swapped or in their place too early, a wrong beta2, activations kept although the round says
    not to."""
    arm, batch = make_arm(base, tmp_path, "lr=0.1", "weight_decay=0.5", "beta2=0.8", "alpha_lr=0.03",
                          "fs_gate_lr=0.007", "fs_detach=false", *settings)
    recipe = arm.job.recipe
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
    seen = []

    def look():
        risen = min(1.0, (len(seen) + 1) / 2) if recipe.warm_up else 1.0
        groups = {parameter: group for group in arm.optimizer.param_groups for parameter in group["params"]}
        for (name, parameter), gradient in zip(parameters.items(), gradients):
            torch.testing.assert_close(parameter.grad, gradient * clipped, rtol=1e-3, atol=1e-6)
            rate = 0.03 if name.startswith("alpha") else 0.007 if name.startswith("input") else 0.1
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
    assert arm.ledger.metrics == [{"step": step, "train_loss": expected} for step in (1, 2, 3)]


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
        run = read_run(tmp_path / name / "seed5" / "no_fs")
        assert run["steps"] == 3 and run["minutes"] == 0.5 and "copied_from" not in run


def test_list_and_help(copy, capsys):
    """Catches a list on which stand-in, unfinished and finished runs look alike."""
    shutil.copytree(copy / "R2", copy / "standin" / "R2")
    edit_run(copy / "R2/seed5/prompt_fs", status="running", steps=4)
    (copy / "standin/R2/seed5/no_fs/run.json").write_text("{")
    assert train.main(["--list", "--runs", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "R10: " in out and "d_acc +0.0141 +0.0021 -0.0837, mean -0.0225, " in out
    for line in ("R2/seed5/no_fs, done at step 6", "R2/seed5/prompt_fs, running at step 4",
                 "standin/R2/seed5/prompt_fs, done at step 6"):
        assert f"    on disk: {copy}/{line}\n" in out
    assert "standin/R2/seed5/no_fs/run.json: damaged" in out
    for argv, code in ((["--help"], 0), ([], 2), (["--round", "R2", "--minutes", "0"], 2),
                       (["--round", "R2", "--standin", "--base", "init"], 2)):
        with pytest.raises(SystemExit) as stop:
            train.main(argv)
        assert stop.value.code == code
    assert "python train.py --round R8 --seed 1" in capsys.readouterr().out
