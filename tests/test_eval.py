"""Scores and reports: does a record say what the model did, does a report refuse what cannot be compared?"""

import json
import math
import re
import shutil
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import eval as ruler
import train
from conftest import ROOT, refusal, relative_error
from data import Example, collate, pad
from eval import (CONTROLS, borrowed, f1_score, log_numbers, main, means_of, normalise, score, seed_prompts_of,
                  text_of_log)
from files import ARMS, write_json
from fs import FutureSeed, answer_logits, answer_loss, prefill
from model import RWKV7, Config
from rounds import load_rounds
from standin import small_tokenizer
from stats import judge
from tokenizer import END_OF_DOCUMENT, Tokenizer

REAL, SMALL = load_rounds()
V = 120


class Words:
    """A tokenizer whose text shows the ids; id 50 has no token."""

    tokens = {token: b"" for token in range(V) if token != 50}

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model():
    model = RWKV7.init(Config.published(n_layer=3, n_embd=32, head_size=16, vocab_size=V), seed=1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():    # a fresh model is nearly a bag of words; this one is not
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return model


@pytest.fixture(scope="module")
def fs(model):
    return FutureSeed(model.config, alpha=1.0, layer_start=1)


def make_examples(count, task="hotpotqa"):
    rng = np.random.default_rng(0)
    examples = []
    for index in range(count):
        prompt = rng.integers(V, size=rng.integers(1, 30)).tolist()
        answer = rng.integers(V, size=rng.integers(1, 6)).tolist()
        text, choices = "7 49", None
        if task == "arc":
            choices = {label: 65 + place for place, label in enumerate("ABCDE"[:rng.integers(3, 6)])}
            answer, text = [choices["B"]], "B"
        examples.append(Example(f"q{index}", prompt, answer, text, choices, tail=len(prompt) // 2))
    return examples


def scored(model, examples, fs=None, batch_size=4, control=None):
    return score(model, examples, fs, batch_size=batch_size, device="cpu", step=5, tokenizer=Words(),
                 control=control)


# ---- scores ------------------------------------------------------------------------------------------------

@torch.no_grad()
def by_the_book(model, example, seed):
    """One example without batches, padding or a carried state: one whole pass a token."""
    hidden, state = prefill(model, torch.tensor([example.prompt]), None, seed)
    logits = model.head(hidden[0, -1])

    def after(tokens):
        if not tokens:
            return logits
        return model.head(model(torch.tensor([tokens]), state=state)[0][0, -1])

    losses, correct, written = [], 0, []
    for place, token in enumerate(example.answer):
        forced = after(example.answer[:place])
        losses.append(-forced.log_softmax(-1)[token].item())
        correct += int(forced.argmax() == token)
        written.append(int(after(written).argmax()))
    option = None
    if example.choices:
        option = max(example.choices, key=lambda label: logits[example.choices[label]].item())
    rest = sum(losses[1:]) / (len(losses) - 1) if len(losses) > 1 else 0
    return losses[0] + rest, correct, " ".join(str(token) for token in written if token != 50), option


@pytest.mark.parametrize("control", ["no_fs", None, *CONTROLS])
@pytest.mark.parametrize("task", ["hotpotqa", "arc"])
def test_records_say_what_the_model_did(model, fs, task, control):
    """Catches a wrong position (off by one), padding that is scored, an answer that sees Future-Seed, greedy
    text that is teacher-forced, a control that is none: every record is compared with a loop that does one
    thing at a time."""
    examples = make_examples(9, task)
    control, with_fs = (None, None) if control == "no_fs" else (control, fs)
    records = scored(model, examples, with_fs, control=control)
    for i, (record, example) in enumerate(zip(records, examples, strict=True)):
        seed = None if control == "off" else with_fs
        if control in ("other", "shuffled"):
            prompt = torch.tensor([examples[(i + 1) % 9].prompt])
            if control == "shuffled":
                prompt = torch.tensor(seed_prompts_of("shuffled", [example]))
            seed = borrowed(model, fs, prompt, torch.tensor([prompt.shape[1]]))
        loss, correct, text, option = by_the_book(model, example, seed)
        assert abs(record["loss"] - loss) <= 1e-5
        assert (record["correct"], record["text"], record["option"]) == (correct, text, option)
        assert (record["step"], record["id"], record["tokens"]) == (5, example.id, len(example.answer))
        assert record.get("control") == control
        exact, f1 = normalise(text) == "7 49", f1_score(text, "7 49")
        if task == "arc":
            exact = f1 = option == "B"
        assert (record["exact"], record["f1"]) == (exact, f1)


@given(batch_size=st.integers(1, 12), order=st.permutations(range(10)), with_fs=st.booleans())
@settings(deadline=None, max_examples=8)
def test_records_depend_on_nothing_but_their_example(model, fs, batch_size, order, with_fs):
    """Catches padding that leaks between rows, and records that come back in the order of their lengths."""
    examples = make_examples(10)
    alone = [scored(model, [example], fs if with_fs else None)[0] for example in examples]
    together = scored(model, [examples[place] for place in order], fs if with_fs else None, batch_size)
    for one, other in zip(together, [alone[place] for place in order], strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-5 and {**one, "loss": 0} == {**other, "loss": 0}


@pytest.mark.parametrize("with_fs", [False, True])
def test_the_training_loss_is_the_one_that_is_scored(model, fs, with_fs):
    """Catches a loss or a gradient at the wrong tokens, or of padding."""
    seed, examples = fs if with_fs else None, make_examples(9)

    def losses_of(examples):
        prompt, lengths, answer, answer_lengths = collate(examples)
        return answer_loss(answer_logits(model, seed, prompt, lengths, answer)[0], answer, answer_lengths)

    losses = losses_of(examples)
    for loss, example in zip(losses, examples, strict=True):
        assert abs(loss.item() - by_the_book(model, example, seed)[0]) <= 1e-5
    gradient, = torch.autograd.grad(losses.sum(), model.emb.weight)
    expected, = torch.autograd.grad(sum(losses_of([example]).sum() for example in examples), model.emb.weight)
    assert relative_error(gradient, expected) <= 1e-5


def test_seed_states_of_other_prompts(model, fs):
    """Catches borrowed states of another layer, row or place: those of the prompts themselves change no bit,
    those of others do; and a shuffled end that is another's, or that shuffles what stands before it."""
    examples = make_examples(5)
    prompt, lengths, answer, _ = collate(examples)
    others = pad([example.prompt for example in examples[::-1]])
    hooks = fs, borrowed(model, fs, prompt, lengths), borrowed(model, fs, *others)
    own, borrowed_own, of_others = (answer_logits(model, hook, prompt, lengths, answer)[0] for hook in hooks)
    assert torch.equal(own, borrowed_own) and not torch.equal(own, of_others)
    shuffled = seed_prompts_of("shuffled", examples)
    for example, changed in zip(examples, shuffled, strict=True):
        start = len(example.prompt) - example.tail
        assert changed[:start] == example.prompt[:start] and sorted(changed) == sorted(example.prompt)
        assert seed_prompts_of("shuffled", [example]) == [changed]
    assert sum(example.prompt != changed for example, changed in zip(examples, shuffled)) >= 3


def test_means_are_over_examples():
    """Catches means weighted by tokens: the log averages examples."""
    records = [{"loss": 1.0, "tokens": 4, "correct": 1, "exact": 0, "f1": 0.5},
               {"loss": 3.0, "tokens": 1, "correct": 1, "exact": 1, "f1": 1.0}]
    assert means_of(records) == {"acc": 0.625, "loss": 2.0, "EM": 0.5, "F1": 0.75}


@pytest.mark.parametrize("answer, gold, exact, f1", [
    ("The Eiffel Tower", "eiffel tower", 1, 1),                # articles and case
    (" Eiffel-Tower!", "EiffelTower.", 1, 1),                  # punctuation vanishes, it does not part words
    ("a an the", "", 1, 0),                                    # nothing left: equal, but no common word
    ("", "Paris", 0, 0),
    ("anthem", "them", 0, 0),                                  # articles are whole words
    ("the the cat", "cat the", 1, 1),
    ("Barack Obama", "Barack Hussein Obama", 0, 0.8),
    ("to be or not to be", "to be", 0, 0.5),                   # common words count as often as both have them
    ("to be", "to to", 0, 0.5),
    ("Yes.", "yes", 1, 1),
    ("yes it is", "yes", 0, 0),                                # yes, no, noanswer count only as a whole
    ("no", "no one", 0, 0),
    ("noanswer given", "noanswer", 0, 0),
    ("yesterday", "yes yesterday", 0, 2 / 3),
    ("two\n words", "two words", 1, 1),
    ("A. B", "b", 1, 1),                                       # an initial "A." counts as an article
    ("Beyoncé", "beyonce", 0, 0),                              # accents stay
    ("“quoted”", "quoted", 0, 0),                              # only ASCII punctuation goes
])
def test_official_edge_cases(answer, gold, exact, f1):
    """Catches a normalisation that differs from the official script's in any of its corners."""
    assert (normalise(answer) == normalise(gold)) == exact and abs(f1_score(answer, gold) - f1) < 1e-12


answers = st.text(alphabet="an the yes no.,!X\t", max_size=25)


@given(answers, answers)
@settings(deadline=None, max_examples=200)
def test_f1_properties(first, second):
    """Catches precision or recall with a wrong divisor: F1 is symmetric, and 1 for the same words only."""
    f1 = f1_score(first, second)
    assert f1 == f1_score(second, first) and 0 <= f1 <= 1
    assert f1 == 1 or normalise(first) != normalise(second) or not normalise(first)
    assert f1 < 1 or sorted(normalise(first).split()) == sorted(normalise(second).split())
    assert not set(normalise(first)) & set(string.punctuation)


# ---- runs on the disk --------------------------------------------------------------------------------------

def write_runs(runs_dir, name="R8", seeds=(0, 1, 2), n=30, shift=0.0, rng_seed=0, **changes):
    """Runs of a round as train.py leaves them; shift moves the accuracy of prompt_fs."""
    made_up = changes.get("standin", False)
    recipe, rng = (SMALL if made_up else REAL)[name], np.random.default_rng(rng_seed)
    difficulty = rng.uniform(0.1, 0.5, n)

    def record(index, shift, **kind):
        tokens = 1 if recipe.task == "arc" or made_up else 4
        correct = int(rng.binomial(tokens, difficulty[index] + shift))
        return {**kind, "id": f"q{index}", "loss": float(rng.gamma(2)), "tokens": tokens, "correct": correct,
                "exact": int(correct == tokens), "f1": correct / tokens}

    for seed in seeds:
        for arm in ARMS:
            folder = Path(runs_dir) / name / f"seed{seed}" / arm
            folder.mkdir(parents=True)
            history = [{"from_step": 0, "code": "c", "machine": {"threads": 1, "torch": "2.13.0"}}]
            run = {"round": name, "seed": seed, "arm": arm, "standin": made_up, "settings": recipe.settings(),
                   "minutes": None, "base": {"name": recipe.base, "sha256": f"{seed * made_up}"},
                   "data": {"train": f"{seed * made_up}", "validation": "v"}, "status": "done", "steps": 10,
                   "history": history}
            (folder / "run.json").write_text(json.dumps({**run, **changes}))
            own = shift if arm == "prompt_fs" else 0
            write_json(folder / "records.jsonl", [
                record(index, own, step=step) for step in (0, 10) for index in range(n)])
            if arm == "prompt_fs":
                write_json(folder / "controls.jsonl", [
                    record(index, 0, control=control) for control in CONTROLS for index in range(n)])
    return Path(runs_dir)


def change_run(folder, **changes):
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_text(path, change):
    path.write_text(change(path.read_text()))


def as_written(runs_dir, arm, seeds=(0, 1, 2), name="R8", part="records", **kind):
    """An arm's acc, loss, EM and F1 of one kind of record, as they stand in the file: (S, n, 4)."""
    found = []
    for seed in seeds:
        lines = (Path(runs_dir) / name / f"seed{seed}" / arm / f"{part}.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if kind.items() <= record.items()]
        found.append([(r["correct"] / r["tokens"], r["loss"], r["exact"], r["f1"]) for r in records])
    return np.array(found)


def report_of(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def strict_json(text):
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.parametrize("seeds", [[4], [0, 1, 2], list(range(7))])
def test_the_numbers_of_a_report(tmp_path, capsys, seeds):
    """Catches the wrong evaluation, swapped arms, a sample deviation, means over tokens, an interval of
    another metric or of a wrong width, numbers that are no JSON, a verdict of fewer than six seeds."""
    runs = write_runs(tmp_path, seeds=seeds, shift=0.2)
    result, = strict_json(report_of(capsys, "R8", "--json", "--runs", runs).out)["rounds"]
    without, with_fs = (as_written(runs, arm, seeds, step=10) for arm in ARMS)
    x = with_fs - without    # (S, n, M)
    for m, metric in enumerate(ruler.METRICS):
        for s, line in enumerate(result["per_seed"]):
            found = line[metric]
            half = 1.96 * x[s, :, m].std(ddof=1) / math.sqrt(30)
            expected = [without[s, :, m].mean(), with_fs[s, :, m].mean(), x[s, :, m].mean()]
            assert np.allclose([found["no_fs"], found["prompt_fs"], found["d"]], expected)
            ends = expected[2] - half, expected[2] + half
            assert np.allclose([found["low"], found["high"]], ends)
        deltas, over = x[..., m].mean(axis=1), result["over_seeds"][metric]
        assert np.allclose([over["mean"], over["std"]], [deltas.mean(), deltas.std()])
        gains, losses = (deltas > 1e-12).sum(), (deltas < -1e-12).sum()
        assert over["signs"] == f"{gains}/{len(seeds) - gains - losses}/{losses}"
    assert result["seeds"] == seeds and result["examples"] == 30
    assert result["per_seed"][0]["steps"] == [10, 10]
    for control in CONTROLS:
        expected = as_written(runs, "prompt_fs", seeds, part="controls", control=control)[..., 0].mean(axis=1)
        assert np.allclose(result["controls"][control], expected)
    verdict, low, high = judge(x[..., 0])
    assert result["verdict"] == verdict and (verdict == "inconclusive" or len(seeds) > 5)
    out = report_of(capsys, "R8", "--runs", runs).out
    assert f"verdict on d_acc: {verdict}" in out and (f"[{low:+.4f}, {high:+.4f}]" in out) == (len(seeds) > 5)
    assert (f"{len(seeds)} of the 6 seeds" in out) == (len(seeds) < 6)
    assert "  F1 " in out and "L=4096" in out and "its seed states of another prompt: 0." in out


def test_p_values_are_corrected_for_their_number(tmp_path, capsys, monkeypatch):
    """Catches the study's own question corrected for the others, others that are not, rounds of few seeds
    that count, and jumps counted in the wrong arm."""
    small = {**SMALL, "S3": replace(SMALL["S3"], primary=True)}
    monkeypatch.setattr(ruler, "load_rounds", lambda: (REAL, small))
    for name, seeds in (("R6", 7), ("S3", 7), ("R2", 7), ("R8", 3)):
        write_runs(tmp_path, name, range(seeds), shift=0.49, standin=True)
    out = report_of(capsys, "R6", "S3", "R2", "R8", "--runs", tmp_path).out
    words = {part.split(":")[0]: part for part in out.split("\n\n")}
    assert "p 0.016 (reg" in words["S3"] and "sign test" not in words["R8"]
    assert all("p 0.031 (Holm, 2 rounds)" in words[name] for name in ("R6", "R2"))
    assert "no_fs 0 of 7, prompt_fs 7 of 7; exact paired p 0.016" in words["R6"]
    assert "p 0.016 (exploratory)" in report_of(capsys, "R2", "--runs", tmp_path).out
    write_runs(tmp_path / "longer", "S3", range(7), shift=0.49, standin=True,
               settings={**small["S3"].settings(), "steps": 500})
    assert "p 0.016 (exploratory)" in report_of(capsys, "S3", "--runs", tmp_path / "longer").out


@pytest.mark.parametrize("damage", [
    lambda arm: change_text(arm / "records.jsonl", lambda text: text[:-9]),
    lambda arm: change_text(arm / "records.jsonl", lambda text: text.replace('"q8"', '"z8"')),
    lambda arm: (arm / "run.json").write_text("{"),
    lambda arm: change_run(arm, minutes=8.0),
    lambda arm: change_run(arm, steps=500),
])
@pytest.mark.parametrize("arm", ARMS)
def test_a_seed_that_cannot_be_used_is_told_and_left_out(tmp_path, capsys, arm, damage):
    """Catches silent averaging of what is damaged or unlike, and one bad seed that hides the others: its
    place in one line, exit code 2, and the report on the rest."""
    runs = write_runs(tmp_path, seeds=(0, 1))
    damage(runs / "R8/seed0" / arm)
    out, err = report_of(capsys, "R8", "--runs", runs, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and "R8/seed0" in err and "--fresh" in err
    assert "1 seed on 30" in out and "  acc    1 " in out
    assert "no finished seed" in refusal(capsys, main, ["R8", "--seeds", "0", "--runs", runs])


def test_what_cannot_be_averaged_is_told(tmp_path, capsys):
    """Catches a finished arm compared with a stopped one, an empty folder seed01 that counts seed 1 twice,
    one mean over two kinds of runs, and one round so refused that hides another."""
    runs = write_runs(tmp_path, seeds=range(4))
    change_run(runs / "R8/seed1/prompt_fs", status="running", steps=0)
    (runs / "R8/seed2/no_fs/run.json").unlink()
    for name in ("R8/seed01", "R8/seed1.old", "R8/seed7", "R3/seed01"):
        (runs / name).mkdir(parents=True)
    out, err = report_of(capsys, "R8", "--runs", runs)
    assert "2 seeds on 30 questions" in out and not err and out.count("left out") == 3
    assert "seed1/prompt_fs stands at step 0" in out and "seed 2 (" in out and "seed 7 (" in out
    assert "no such runs" in refusal(capsys, main, ["R3", "--runs", runs])
    write_runs(tmp_path, "R6")
    for arm in ARMS:
        change_run(runs / "R8/seed3" / arm, minutes=8.0, base={"name": "mine.pth"})
    out, err = report_of(capsys, "--runs", runs, code=2)
    assert "seeds 0 and 3" in err and "minutes: None there, 8.0 here; base.name" in err
    assert err.count("\n") == 1
    assert "R6: " in out and "R8: " not in out


def test_what_a_reader_must_know_stands_before_the_numbers(tmp_path, capsys):
    """Catches stand-in, shortened, other-code or other-machine runs that read like the real thing."""
    write_runs(tmp_path, base={"name": "init:L2-D64", "sha256": None}, minutes=8.0,
               settings={**REAL["R8"].settings(), "steps": 2})
    history = [{"from_step": 0, "code": "c", "machine": {"threads": 1, "torch": "2.13.0"}},
               {"from_step": 4, "code": "d", "machine": {"threads": 2, "torch": "2.13.0"}}]
    change_run(tmp_path / "R8/seed1/prompt_fs", history=history)
    longer = tmp_path / "R8/seed2/prompt_fs"    # minutes give the arms what steps they manage
    change_text(longer / "records.jsonl", lambda text: text.replace('"step": 10', '"step": 13'))
    change_run(longer, steps=13)
    out = report_of(capsys, "R8", "--runs", tmp_path).out
    for label in ("ANOTHER BASE, init:L2-D64", "8 minutes of training", "changed from the round's: steps=2",
                  "seed 1 ran on another machine", "code: c there, d here; machine.threads: 1 there, 2"):
        assert label in out.partition("metric")[0]
    assert "  10/13  " in out
    write_runs(tmp_path / "standin", "R2", standin=True)
    out = report_of(capsys, "R2", "--runs", tmp_path / "standin").out
    assert "ON THE STAND-IN" in out.partition("metric")[0]
    for words in ("changed", "ANOTHER BASE", "another machine", "L=", "  F1 ", "  EM "):
        assert words not in out


def test_reports_of_every_round(tmp_path, capsys, monkeypatch):
    """Catches a crash on any round's shape, a part of R9 that is lost, and runs of the stand-in that are only
    found where they are pointed at."""
    monkeypatch.chdir(tmp_path)
    for name in REAL:
        write_runs("runs", name, seeds=[0] if name == "R7" else [0, 1], n=4)
    write_runs("runs/standin", "R8", standin=True)
    out, err = report_of(capsys)
    assert not err and "nan" not in out and "inf" not in out
    assert all(f"{name}: {recipe.title}" in out for name, recipe in REAL.items())
    out = report_of(capsys, "r9", "r8").out
    assert [part.split(":")[0] for part in out.strip().split("\n\n")] == ["R9a", "R9b", "R8", "R8"]
    assert "  EM " in out.split("\n\n")[0] and "  F1 " not in out.split("\n\n")[0]
    for argv in (["R8"], [], ["R99"]):
        refusal(capsys, main, [*argv, "--runs", "none"])


# ---- the log -----------------------------------------------------------------------------------------------

def test_the_logs_table_reproduces(tmp_path, capsys):
    """The log's means, population deviations and signs, from its per-seed numbers, but for rounding. Catches
    a round that is lost from the table."""
    signs = {"R2": "3/0/0", "R3": "1/0/2", "R4": "2/0/1", "R5": "1/0/2", "R6": "2/0/1", "R7": "1/0/0",
             "R8": "2/0/1", "R9a": "2/0/1", "R9b": "1/0/2", "R10": "2/0/1"}
    train.list_rounds(tmp_path)
    rounds = dict(re.findall(r"^(\w+): .*\n.*\n    the log: (.*)$", capsys.readouterr().out, re.M))
    assert list(rounds) == [name for name, recipe in REAL.items() if recipe.log]
    for name, counts in signs.items():
        log = log_numbers(REAL[name])
        assert log["as_logged"] and log["verdict"] == "inconclusive"    # not one of them can tell
        mean, std = log["recomputed"]
        assert f"mean {mean:+.4f}, std {std:.4f}, sign(+/0/-) {counts}, " in rounds[name]
    wrong = replace(REAL["R8"], log={**REAL["R8"].log, "mean": 0.0056})
    assert "(NOT as logged, +0.0056 and 0.0519)" in text_of_log(log_numbers(wrong))


# ---- a question from a person ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def words():
    return Tokenizer()


def test_ask(tmp_path, capsys, monkeypatch, words):
    """Catches an answer without the Future-Seed that the checkpoint was trained with, and an error without a
    name."""
    monkeypatch.setattr(ruler, "Tokenizer", lambda: words)    # read once, not for every question
    model = RWKV7.init(Config.published(2, 16, 16, 65536), seed=3)
    with torch.no_grad():
        for block in model.blocks:
            block.att.output.weight.normal_(generator=torch.Generator().manual_seed(1))
    own = {**REAL["R8"].settings(), "fs_layer_start": 1, "alpha_init": 3.0}
    folder = write_runs(tmp_path, settings=own) / "R8/seed1"
    path = folder / "prompt_fs/model.pth"
    for arm in ARMS:
        model.save(folder / arm / "model.pth")
    fs = FutureSeed(model.config, alpha=3.0, layer_start=1)

    def expected(fs):
        with torch.no_grad():
            tokens = torch.tensor([words.encode("Question:\nWho wrote Faust?\n\nAnswer:")])
            hidden, state = prefill(model, tokens, None, fs)
            new = model.generate(model.head(hidden[:, -1]), state, 24)[0].tolist()
        return words.decode(new).strip().split("\n")[0] + "\n"

    def asked(path=path):
        return report_of(capsys, "--ask", "Who wrote Faust?", "--checkpoint", path).out

    torch.save(fs.state_dict(), folder / "prompt_fs/fs.pth")
    assert asked() == expected(fs) != expected(None)
    assert asked(folder / "no_fs/model.pth") == expected(None)
    with torch.no_grad():
        fs.alpha.fill_(-30)    # what training left of it is in fs.pth
    torch.save(fs.state_dict(), folder / "prompt_fs/fs.pth")
    assert asked() == expected(None)
    shutil.copytree(folder / "prompt_fs", tmp_path / "best")    # under another name it is as good
    assert asked(tmp_path / "best/model.pth") == expected(None)
    (tmp_path / "best/run.json").write_text("{")
    assert f"{tmp_path / 'best'}: damaged" in refusal(
        capsys, main, ["--ask", "x", "--checkpoint", tmp_path / "best/model.pth"])
    torch.save({"alpha": torch.zeros(7)}, folder / "prompt_fs/fs.pth")
    for checkpoint in (path, "none.pth"):
        refusal(capsys, main, ["--ask", "x", "--checkpoint", checkpoint])


@pytest.mark.parametrize("made_up, written", [(False, "runs eats"), (True, "runs")])
def test_ask_ends_where_the_answer_ends(tmp_path, capsys, monkeypatch, words, made_up, written):
    """Catches an answer that goes on after the end of the document or of the line, a stand-in's after its one
    token, its model asked in the official vocabulary: this model knows which token follows which, and nothing
    else."""
    monkeypatch.setattr(ruler, "Tokenizer", lambda: words)
    tokenizer = small_tokenizer() if made_up else words
    model = RWKV7.init(Config.published(1, 64, 64, len(tokenizer.tokens) if made_up else 65536), seed=3)
    texts = [":", " runs", " eats", "", " sings"], [" ", "\n", " reads", " plays", " walks"]
    chains = torch.tensor([[[*tokenizer.encode(text), END_OF_DOCUMENT][0] for text in row] for row in texts])
    with torch.no_grad():
        model.emb.weight.normal_(generator=torch.Generator().manual_seed(1))
        hidden, _ = model(chains[:, :-1])
        model.head.weight.zero_()
        model.head.weight[chains[:, 1:]] = hidden
    model.save(tmp_path / "model.pth")
    for end, answer in (("Answer:", written), ("Answer: ", "")):
        prompt = f"Context:\nAnn runs. Bob eats.\n\nQuestion:\nBob\n\n{end}"
        out = report_of(capsys, "--ask", prompt, "--checkpoint", tmp_path / "model.pth").out
        assert out == answer + "\n"


def test_command_line(tmp_path, capsys):
    """Catches a program that works from its own folder only, and a help without examples or the rule."""
    run = subprocess.run([sys.executable, ROOT / "eval.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "no such runs; see train.py" in run.stderr
    for argv in (["--help"], ["--ask", "x"], ["R8", "--seeds"]):
        with pytest.raises(SystemExit):
            main(argv)
    out = capsys.readouterr().out
    assert "python eval.py R8" in out and "inconclusive: anything else" in out
