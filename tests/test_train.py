"""The command line and the training loop: what a user types, what is left on the disk,
and what survives a kill.

Runs use a base of 3 layers and 16 channels and a dozen hand-made ARC questions,
so each takes a second or two.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import arm
import files
import train
from conftest import ROOT
from data import collate
from fs import FutureSeed
from model import RWKV7, Config
from rounds import load_rounds, with_settings

SMALL = ["steps=6", "n_train=12", "n_val=6", "batch_size=4", "eval_every=3", "lr=0.01", "fs_layer_start=1"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """An assets folder with small ARC files in the publisher's format."""
    folder = tmp_path_factory.mktemp("assets")
    (folder / "arc").mkdir()
    words = ["stone", "river", "cloud", "copper", "maple", "salt", "wolf", "lamp"]
    for split, count in (("Train", 16), ("Dev", 8)):
        with open(folder / "arc" / f"ARC-Challenge-{split}.jsonl", "w") as file:
            for i in range(count):
                options = [words[(i + j) % 8] + " " * (j == 3) + str(i * j) for j in range(4)]
                choices = [{"text": text, "label": label} for text, label in zip(options, "ABCD")]
                question = {"stem": f"Which of these is number {i} " + "and so on " * (i % 5),
                            "choices": choices}
                file.write(json.dumps({"id": f"{split}{i}", "question": question,
                                       "answerKey": "ABCD"[i % 4]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny checkpoint in the official format whose layers all do something."""
    model = RWKV7.init(Config.published(3, 16, 16), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "emb" in name or "output" in name or "ffn.value" in name:
                parameter.normal_(0, 0.3, generator=generator)
    path = tmp_path_factory.mktemp("base") / "tiny.pth"
    model.save(path)
    return path


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run in this process catches Ctrl-C and SIGTERM, which pytest needs back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def arguments(assets, base, runs, *more, settings=()):
    return ["--round", "R2", "--seed", "5", "--assets", str(assets), "--base", str(base), "--runs", str(runs),
            "--offline", "--device", "cpu", "--set", *SMALL, *settings, *more]


def in_child(argv, kill_after=None, output=os.devnull, largest_file=None):
    """train.main in a forked process: perhaps killed after some seconds, perhaps on a disk that is
    full once a file holds largest_file bytes. Returns its exit code, negative for
    the signal that ended it."""
    child = os.fork()
    if child == 0:
        out = os.open(output, os.O_WRONLY | os.O_CREAT)
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


def outcome(runs):
    """Everything that must be the same bits: weights, metrics and records of both arms."""
    files = {}
    for name in train.ARMS:
        folder = runs / "R2" / "seed5" / name
        weights = torch.load(folder / "model.pth", weights_only=True)
        texts = [(folder / f"{part}.jsonl").read_text() for part in ("metrics", "records")]
        if name == "prompt_fs":
            texts.append((folder / "seed_off.jsonl").read_text())
        files[name] = (weights, *texts)
    return files


def assert_same(one, other):
    for name in train.ARMS:
        for mine, theirs in zip(one[name][1:], other[name][1:]):
            assert mine == theirs
        for key, tensor in one[name][0].items():
            assert torch.equal(tensor, other[name][0][key]), (name, key)


@pytest.fixture(scope="module")
def finished(assets, base, tmp_path_factory):
    """A run that was never disturbed."""
    runs = tmp_path_factory.mktemp("finished")
    assert in_child(arguments(assets, base, runs)) == 0
    return runs


@pytest.fixture(scope="module")
def moment(assets, base, tmp_path_factory):
    """Seconds into a run, anywhere from its start to its end on this machine, drawn anew at every call."""
    started = time.monotonic()
    assert in_child(arguments(assets, base, tmp_path_factory.mktemp("timed"))) == 0
    whole = time.monotonic() - started
    clock = random.Random(7)
    return lambda: clock.uniform(0, whole)


def test_a_run_leaves_what_it_promises(finished):
    """Catches a file of the documented layout that is missing, and a checkpoint left behind."""
    for name in train.ARMS:
        folder = finished / "R2" / "seed5" / name
        run = json.loads((folder / "run.json").read_text())
        assert (run["status"] == "done" and run["steps"] == 6 and run["arm"] == name
                and run["standin"] is False)
        assert len(run["base"]["sha256"]) == 64
        assert not (folder / "checkpoint.pt").exists()
        assert (folder / "fs.pth").exists() == (name == "prompt_fs")
        RWKV7.load(folder / "model.pth")
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        assert [line["step"] for line in metrics if "loss" in line] == [0, 3, 6]
        assert [line["step"] for line in metrics if "train_loss" in line] == [1, 2, 3, 4, 5, 6]
        assert len((folder / "records.jsonl").read_text().splitlines()) == 3 * 6
        assert (folder / "seed_off.jsonl").exists() == (name == "prompt_fs")


def test_the_summary_has_the_logs_name_and_says_what_was_set(finished):
    """Catches a run whose --set is taken for the round's own recipe."""
    summary = (finished / "_summary_arc_optionsfirst_stabilized_r2.txt").read_text()
    assert "settings changed from the round's: " in summary and "steps=6" in summary


def test_same_command_same_bits(finished, assets, base, tmp_path):
    """Catches an unseeded draw, and anything that depends on time or on the process."""
    assert in_child(arguments(assets, base, tmp_path)) == 0
    assert_same(outcome(finished), outcome(tmp_path))


def test_nothing_reads_memory_that_it_has_not_written(finished, assets, base, tmp_path, monkeypatch):
    """Filling every new tensor with NaN first, as torch does unless make_reproducible forbids it, changes no
    bit."""
    def make_reproducible_and_fill():
        arm.make_reproducible()
        torch.utils.deterministic.fill_uninitialized_memory = True

    monkeypatch.setattr(train, "make_reproducible", make_reproducible_and_fill)
    assert in_child(arguments(assets, base, tmp_path)) == 0
    assert_same(outcome(finished), outcome(tmp_path))


def test_arms_differ_in_nothing_but_future_seed(assets, base, tmp_path):
    """With the seed scaled to nothing the arms must agree to the last bit: same weights,
    batches, order and steps."""
    assert in_child(arguments(assets, base, tmp_path, settings=["fs_scale=0.0"])) == 0
    arms = outcome(tmp_path)
    assert_same({name: arms["no_fs"] for name in train.ARMS}, arms)


def test_future_seed_changes_something(finished):
    """The test above would pass if the seed were never used at all."""
    arms = outcome(finished)
    assert arms["no_fs"][2] != arms["prompt_fs"][2] != arms["prompt_fs"][3]    # nor in the ablation


def test_killed_at_any_moment_it_ends_with_the_same_bits(finished, assets, base, moment, tmp_path,
                                                         monkeypatch):
    """SIGKILL at 20 random moments, saving included. Catches state that a checkpoint forgets, and
    half-written files."""
    # save after every step, so that kills hit saving
    monkeypatch.setattr(arm, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    runs = tmp_path / "0"
    kills = 0
    while kills < 20:
        code = in_child(arguments(assets, base, runs), kill_after=moment())
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:    # it got to the end: check it, and begin another
            assert_same(outcome(finished), outcome(runs))
            runs = tmp_path / str(kills)
    assert in_child(arguments(assets, base, runs)) == 0
    assert_same(outcome(finished), outcome(runs))


def test_killed_between_two_files_it_ends_with_the_same_bits(finished, assets, base, tmp_path, monkeypatch):
    """Every life of the run dies right after it wrote some file: a checkpoint (each of an arm's three), or
    one of the others for the first time. Random moments seldom fall into these gaps, as between the last
    checkpoint and the metrics that belong to it."""
    deaths = tmp_path / "deaths"
    deaths.touch()
    write = files.atomic_write

    @contextlib.contextmanager
    def deadly(path, *mode):
        with write(path, *mode) as file:
            yield file
        if (str(tmp_path) in str(path)
                and deaths.read_text().count(f"{path}\n") < (3 if "checkpoint" in str(path) else 1)):
            with open(deaths, "a") as file:
                file.write(f"{path}\n")
            os._exit(9)

    monkeypatch.setattr(files, "atomic_write", deadly)
    monkeypatch.setattr(arm, "atomic_write", deadly)
    runs = tmp_path / "runs"
    while (code := in_child(arguments(assets, base, runs))) == 9:
        pass
    assert code == 0
    assert len(deaths.read_text().splitlines()) == 2 * (3 + 4) + 2    # and fs.pth, seed_off.jsonl
    assert_same(outcome(finished), outcome(runs))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_saves_and_goes_on(number, finished, assets, base, tmp_path, monkeypatch):
    """Ctrl-C and SIGTERM in the middle of a step. Catches a stop that loses the step, does not save, or hides
    which signal it was."""
    train_step = arm.ArmRun.train_step

    def interrupted(self, trainer, batch):
        if self.progress.step == 1:
            os.kill(os.getpid(), number)
        train_step(self, trainer, batch)

    monkeypatch.setattr(arm.ArmRun, "train_step", interrupted)
    argv, folder = arguments(assets, base, tmp_path), tmp_path / "R2" / "seed5"
    shutil.copytree(finished / "R2" / "seed5" / "no_fs", folder / "no_fs")
    assert in_child(argv, output=tmp_path / "output") == 128 + number
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert last == "R2 seed 5 prompt_fs: stopped after step 2; run the same command to go on"
    assert torch.load(folder / "prompt_fs" / "checkpoint.pt")["progress"]["step"] == 2
    assert in_child(argv) == 0
    assert_same(outcome(finished), outcome(tmp_path))


def test_resuming_elsewhere_is_said(finished, assets, base, tmp_path, capsys):
    """Catches bits that differ after another machine took over, and nobody was told; and a note on a run that
    is done."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "R2" / "seed5" / "no_fs" / "run.json"
    run = json.loads(path.read_text()) | {"threads": 99}
    for status, times in (("done", 0), ("running", 1)):
        path.write_text(json.dumps(run | {"status": status}))
        assert train.main(arguments(assets, base, tmp_path, "--arm", "no_fs")) == 0
        note = "R2 seed 5 no_fs: resuming elsewhere (threads was 99, now 1)"
        assert capsys.readouterr().err.count(note) == times


def test_done_is_done(finished, assets, base, capsys):
    """The same command on a finished run trains nothing and changes nothing."""
    before = outcome(finished)
    assert train.main(arguments(assets, base, finished)) == 0
    assert "done before" in capsys.readouterr().err
    assert_same(before, outcome(finished))


def test_fresh_starts_over_and_spares_the_other_arm(assets, base, tmp_path):
    """Catches --fresh that keeps an old checkpoint, or that deletes an arm it was not asked to run."""
    argv = arguments(assets, base, tmp_path)
    assert in_child(argv) == 0
    before = outcome(tmp_path)
    folder = tmp_path / "R2" / "seed5"
    marks = [folder / name / "mark" for name in train.ARMS]
    for mark in marks:
        mark.touch()
    assert in_child([*argv, "--fresh", "--arm", "no_fs"]) == 0
    assert [mark.exists() for mark in marks] == [False, True]
    assert_same(before, outcome(tmp_path))


def one_line_error(capsys, argv):
    """The error that a command ends with, after the notes and progress of what went well before."""
    assert train.main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert ([line.startswith("error: ") for line in lines].count(True) == 1
            and lines[-1].startswith("error: ")), lines
    return lines[-1]


def test_other_settings_are_refused_with_the_difference(finished, assets, base, capsys):
    before = outcome(finished)
    error = one_line_error(capsys, arguments(assets, base, finished, settings=["lr=0.02", "fs_alpha=-4"]))
    assert "settings.lr was 0.01, now 0.02" in error and "settings.fs_alpha was -2.0, now -4.0" in error
    assert_same(before, outcome(finished))


@pytest.mark.parametrize("settings, words", [
    (["step=3"], ["step"]),
    (["steps=many"], ["steps", "many"]),
    (["steps=-1"], ["steps", "0 or more"]),
    (["n_train=100"], ["n_train", "16"]),
    (["order=backwards"], ["order", "question_first"]),
    (["micro_batch_size"], ["key=value"]),
])
def test_bad_settings_get_one_line(settings, words, assets, base, tmp_path, capsys):
    error = one_line_error(capsys, arguments(assets, base, tmp_path, settings=settings))
    for word in words:
        assert word in error
    assert not (tmp_path / "R2").exists()


def test_unknown_round_and_missing_files_get_one_line(assets, tmp_path, capsys):
    common = ["--assets", str(assets), "--runs", str(tmp_path), "--offline", "--device", "cpu"]
    assert "R2, R3" in one_line_error(capsys, ["--round", "R99", *common])
    assert "weights" in one_line_error(capsys, ["--round", "R2", "--real", *common, "--set", *SMALL])
    assert "nowhere.pth" in one_line_error(capsys, ["--round", "R2", "--base", "nowhere.pth", *common,
                                                    "--set", *SMALL])
    assert "init:L12-D64" in one_line_error(capsys, ["--round", "R2", "--base", "init:12", *common,
                                                     "--set", *SMALL])
    assert "hotpot" in one_line_error(capsys, ["--round", "R8", "--base", "init:L2-D16", *common])


def test_a_base_of_another_vocabulary_is_named(assets, tmp_path, capsys):
    """Without the check the embedding is indexed out of range, deep inside the first step."""
    RWKV7.init(Config.published(2, 16, 16, vocab_size=300)).save(tmp_path / "bytes.pth")
    error = one_line_error(capsys, arguments(assets, tmp_path / "bytes.pth", tmp_path / "runs"))
    assert "bytes.pth" in error and "300" in error


def test_a_damaged_checkpoint_is_named(assets, base, tmp_path, capsys):
    argv = arguments(assets, base, tmp_path)
    assert in_child(argv) == 0
    folder = tmp_path / "R2" / "seed5" / "no_fs"
    run = json.loads((folder / "run.json").read_text()) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "checkpoint.pt").write_bytes(b"PK\x03\x04 not much of a checkpoint")
    assert "checkpoint.pt" in one_line_error(capsys, argv)


def test_a_full_disk_keeps_the_previous_checkpoint(finished, assets, base, tmp_path, monkeypatch):
    """The checkpoint of 6 MB does not fit twice: once the disk has room again, the run ends
    with the same bits."""
    argv = arguments(assets, base, tmp_path)
    with monkeypatch.context() as patch:
        # as if stopped after step 3
        patch.setattr(arm.ArmRun, "finished", lambda self: self.progress.step >= 3)
        patch.setattr(arm.ArmRun, "write_run", lambda self, status: None)
        patch.setattr(RWKV7, "save", lambda self, path: os._exit(7))
        assert in_child(argv) == 7
    folder = tmp_path / "R2" / "seed5" / "no_fs"
    before = (folder / "checkpoint.pt").read_bytes()
    assert in_child(argv, output=tmp_path / "output", largest_file=100_000) == 2
    lines = (tmp_path / "output").read_text().splitlines()
    assert lines[-1].startswith("error: ") and "previous checkpoint is kept" in lines[-1], lines
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert in_child(argv) == 0
    assert_same(outcome(finished), outcome(tmp_path))


def test_a_folder_that_cannot_be_written_is_named(assets, base, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "name another folder with --runs" in one_line_error(
        capsys, arguments(assets, base, tmp_path / "runs", "--base", "nowhere.pth"))    # before all else


def test_two_processes_in_one_folder_are_kept_apart(assets, base, tmp_path, capsys):
    """Catches the same command, started twice, that overwrites its own checkpoints."""
    with files.locked(tmp_path / "R2" / "seed5" / "no_fs"):
        assert "another process" in one_line_error(capsys, arguments(assets, base, tmp_path))


def test_out_of_memory_says_what_to_lower(assets, base, tmp_path, capsys, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(arm.Arm, "forward", forward)
    assert "micro_batch_size" in one_line_error(capsys, arguments(assets, base, tmp_path))


def test_a_loss_that_is_not_a_number_stops_the_arm(assets, base, tmp_path, capsys):
    """Catches an arm that trains on after a NaN, or that saves the ruined weights over the good ones."""
    error = one_line_error(capsys, arguments(assets, base, tmp_path, settings=["lr=1e30"]))
    assert "step 2" in error and "Train" in error
    assert "lr" in error


@pytest.mark.parametrize("gate, grad_clip", [("input", 2.0), ("head", 0.0)])
def test_the_optimiser_follows_the_recipe(gate, grad_clip):
    """Four updates against one AdamW a parameter. Catches decay of what is no matrix, rates swapped or in
    their place too early, a beta2 or a clip that is not the round's, Future-Seed left out of the clip."""
    round = with_settings(load_rounds()["R2"], [
        "lr=0.1", "weight_decay=0.5", "beta2=0.8", "warm_up=3", "fs_alpha_lr=0.03", "fs_gate_lr=0.007",
        f"fs_gate={gate}", f"grad_clip={grad_clip}"])
    model = RWKV7.init(Config(2, 16, 16, 8, 16, 4, 4, 4, 4))
    trained = arm.Arm(model, FutureSeed(model.config, **round.fs_settings()))
    optimizer = arm.make_optimizer(trained, round)
    matrices = [part.weight for part in model.modules() if isinstance(part, (nn.Linear, nn.Embedding))]
    rates = {"fs.alpha": 0.03, "fs.alpha_head": 0.03, "fs.input_weight": 0.007, "fs.input_bias": 0.007}
    by_hand = []
    for name, parameter in trained.named_parameters():
        if not parameter.requires_grad:    # layer 0's value residual
            continue
        decay = 0.5 if any(parameter is matrix for matrix in matrices) else 0.0
        copy = nn.Parameter(parameter.detach().clone())
        adam = torch.optim.AdamW([copy], betas=(0.9, 0.8), weight_decay=decay)
        by_hand.append((name, parameter, copy, adam, rates.get(name, 0.1)))
    generator = torch.Generator().manual_seed(0)
    for step, (size, risen) in enumerate([(3.0, 1 / 3), (0.01, 2 / 3), (1.0, 1), (0.1, 1)]):
        for _, parameter, *_ in by_hand:
            parameter.grad = size * torch.randn(parameter.shape, generator=generator)
        norm = torch.cat([parameter.grad.flatten() for _, parameter, *_ in by_hand]).norm()
        assert (norm > 2) == (size != 0.01)
        for _, parameter, copy, adam, rate in by_hand:
            copy.grad = parameter.grad * (2 / norm if grad_clip and norm > 2 else 1)
            adam.param_groups[0]["lr"] = rate * risen
            adam.step()
        arm.update(trained, optimizer, round, step)
        for name, parameter, copy, *_ in by_hand:
            torch.testing.assert_close(parameter, copy, rtol=1e-4, atol=1e-6, msg=f"{name}, step {step}")


@pytest.mark.parametrize("setting", ["micro_batch_size=3", "checkpoint_activations=true"])
def test_a_step_takes_the_gradient_of_the_batchs_mean_loss(setting, assets, base, tmp_path, monkeypatch):
    """Catches a sum, a mean of the pieces' means, old gradients added on, steps that warm_up counts wrongly,
    and activations kept although the round says not to, or the other way round."""
    train_step, update, batch, steps = arm.ArmRun.train_step, arm.update, [], []

    def remember(self, trainer, rows):
        batch[:] = rows
        train_step(self, trainer, rows)

    def compare(trained, optimizer, round, step):
        assert trained.model.checkpoint_activations == (setting == "checkpoint_activations=true")
        parameters = [parameter for parameter in trained.parameters() if parameter.grad is not None]
        expected = torch.autograd.grad(trained(*collate(batch)).mean(), parameters)
        torch.testing.assert_close([parameter.grad for parameter in parameters], list(expected),
                                   rtol=1e-3, atol=1e-5)
        steps.append(step)
        update(trained, optimizer, round, step)

    monkeypatch.setattr(arm.ArmRun, "train_step", remember)
    monkeypatch.setattr(arm, "update", compare)
    quick = [setting, "steps=2", "eval_every=2", "n_val=1"]
    assert train.main(arguments(assets, base, tmp_path, settings=quick)) == 0
    assert steps == [0, 1, 0, 1] and len(batch) == 4


def test_minutes_are_minutes_of_training_and_their_arms_are_not_copied(assets, base, tmp_path, monkeypatch):
    """On a clock by which an update takes 10 s. Catches a budget in seconds, evaluations that count, and
    R9a's no_fs copied from R2's, though it depends on the clock."""
    now = [0.0]

    def slow(seconds, function):
        def slowed(*values, **named):
            now[0] += seconds
            return function(*values, **named)
        return slowed

    monkeypatch.setattr(arm, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(arm, "update", slow(10, arm.update))
    monkeypatch.setattr(arm, "score", slow(1000, arm.score))
    budget = ["--minutes", "0.5", "--arm", "no_fs", "--round", "R2", "R9a"]
    assert train.main(arguments(assets, base, tmp_path, *budget, settings=["n_val=1"])) == 0
    for name in ("R2", "R9a"):
        run = json.loads((tmp_path / name / "seed5" / "no_fs" / "run.json").read_text())
        assert run["steps"] == 3 and run["minutes"] == 0.5 and "copied_from" not in run


def test_fresh_weights_are_the_same_in_every_arm_and_seed(assets, tmp_path):
    """Catches --base init drawn from the run's seed, or from whatever was drawn before."""
    assert in_child(arguments(assets, "init:L2-D16", tmp_path, settings=["steps=0", "n_val=1"])) == 0
    fresh = RWKV7.init(Config.published(2, 16, 16), seed=0).state_dict()
    for name in train.ARMS:
        weights = torch.load(tmp_path / "R2" / "seed5" / name / "model.pth")
        assert weights.keys() == fresh.keys()
        assert all(torch.equal(weights[key], fresh[key]) for key in fresh)


def test_pieces_of_a_batch_give_the_same_step(assets, base, tmp_path):
    """Gradient accumulation: pieces of 1 row against whole batches of 4, to fp32 summation order."""
    assert in_child(arguments(assets, base, tmp_path / "whole", settings=["steps=2", "lr=1e-3"])) == 0
    assert in_child(arguments(assets, base, tmp_path / "pieces",
                              settings=["steps=2", "lr=1e-3", "micro_batch_size=1"])) == 0
    assert losses_of(tmp_path / "whole") == pytest.approx(losses_of(tmp_path / "pieces"), rel=1e-4)


def test_list_and_help(finished, capsys):
    assert train.main(["--list", "--runs", str(finished)]) == 0
    listing = capsys.readouterr().out
    assert "R10" in listing and "-0.0056" in listing and "seed5/prompt_fs" in listing
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        train.main([])
    assert stop.value.code == 2


def torchrun(processes, argv):
    """train.py under torchrun on the loopback address."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
               "--master_addr=127.0.0.1", f"--master_port={20000 + os.getpid() % 20000}",
               str(ROOT / "train.py"), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def losses_of(runs):
    lines = (runs / "R2/seed5/prompt_fs/metrics.jsonl").open()
    return [value for line in lines for key, value in json.loads(line).items() if "loss" in key]


def test_two_processes_train_as_one(assets, base, tmp_path):
    """Catches a gradient averaged twice, a share counted wrong (the batches of 3 do not divide by 2, and the
    last one has a single row), and an evaluation that loses or doubles an example when it is put together."""
    # a clip that some steps reach and others do not: AdamW alone would not notice a gradient of half the size
    settings = ["lr=1e-3", "batch_size=3", "n_train=10", "steps=4", "n_val=5", "grad_clip=6"]
    assert in_child(arguments(assets, base, tmp_path / "one", settings=settings)) == 0
    result = torchrun(2, arguments(assets, base, tmp_path / "two", settings=settings))
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    ids = [[json.loads(line)["id"] for line in (tmp_path / name / "R2/seed5/no_fs/records.jsonl").open()]
           for name in ("one", "two")]
    assert ids[0] == ids[1] and len(ids[0]) == 3 * 5


def test_processes_take_seeds_where_a_batch_is_too_small_to_share(assets, base, tmp_path, monkeypatch):
    """With torchrun's variables set by hand. Catches processes that train the same seeds, a seed left out,
    and a share decided without --set."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, seeds in (("0", {"seed5", "seed7"}), ("1", {"seed6"})):
        monkeypatch.setenv("RANK", rank)
        argv = arguments(assets, base, tmp_path / rank, "--seeds", "5-7", "--arm", "no_fs",
                         settings=["batch_size=1", "steps=0", "n_val=1"])
        del argv[argv.index("--seed"):argv.index("--seed") + 2]
        assert in_child(argv) == 0
        runs = (tmp_path / rank).glob("R2/seed*/no_fs/model.pth")
        assert {path.parent.parent.name for path in runs} == seeds
