"""Scores and reports: does a record say what the model did, does a report refuse what cannot be compared?"""

import itertools
import json
import math
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import eval as ruler
from arm import Arm
from conftest import relative_error
from data import collate
from eval import analyse, compare, main, text_of, write_summary
from figures import draw_report, draw_study
from fs import FutureSeed, prefill
from model import RWKV7, Config
from records import ARMS, read_records, read_round, seeds_on_disk
from rounds import load_rounds, miniature
from score import exact_match, f1_score, generate, normalise, score, summarise
from standin import small_tokenizer
from stats import needed, over_seeds
from tokenizer import END_OF_DOCUMENT, Tokenizer

ROOT = Path(ruler.__file__).resolve().parent
ROUNDS = load_rounds()
V = 120


class Words:
    """A tokenizer whose text shows the ids; id 50 has no token."""

    tokens = {token: b"" for token in range(V) if token != 50}

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model():
    config = Config.published(n_layer=3, n_embd=32, head_size=16, vocab_size=V)
    model = RWKV7.init(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():    # a fresh model is nearly a bag of words; this one is not
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def fs(model):
    return FutureSeed(model.config, alpha=1.0, layer_start=1)


def make_examples(count, task="hotpotqa", seed=0):
    random = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        prompt = random.integers(V, size=random.integers(1, 30)).tolist()
        answer = random.integers(V, size=random.integers(1, 6)).tolist()
        if task == "arc":
            labels = "ABCDE"[: random.integers(3, 6)]
            choices = {label: [65 + place] for place, label in enumerate(labels)}
            answer, text = choices["B"], "B"
        else:
            choices, text = None, "7 49"
        example = SimpleNamespace(id=f"q{index}", prompt=prompt, answer=answer, text=text, choices=choices)
        examples.append(example)
    return examples


def scored(model, examples, fs=None, batch_size=4, task="hotpotqa", step=5):
    return score(model, examples, fs, batch_size=batch_size, device="cpu", task=task, step=step,
                 tokenizer=Words())


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-5
        assert {**one, "loss": 0} == {**other, "loss": 0}


# ---- scores ------------------------------------------------------------------------------------------------

@torch.no_grad()
def by_the_book(model, example, fs):
    """One example without batches, padding or a carried state: one whole pass a token."""
    hidden, state = prefill(model, torch.tensor([example.prompt]), None, fs)
    logits = model.head(hidden[0, -1])

    def after(tokens):
        if not tokens:
            return logits
        hidden, _ = model(torch.tensor([tokens]), state=state)
        return model.head(hidden[0, -1])

    losses, correct, written = [], 0, []
    for place, token in enumerate(example.answer):
        forced = after(example.answer[:place])
        losses.append(-forced.log_softmax(-1)[token].item())
        correct += int(forced.argmax() == token)
        written.append(int(after(written).argmax()))
    option = None
    if example.choices:
        option = max(example.choices, key=lambda label: sum(
            after(example.choices[label][:place]).log_softmax(-1)[token].item()
            for place, token in enumerate(example.choices[label])))
    rest = sum(losses[1:]) / (len(losses) - 1) if len(losses) > 1 else 0
    text = " ".join(str(token) for token in written if token != 50)
    return losses[0] + rest, correct, text, option


@pytest.mark.parametrize("with_fs", [False, True])
@pytest.mark.parametrize("task", ["hotpotqa", "arc"])
def test_records_say_what_the_model_did(model, fs, task, with_fs):
    """Catches a wrong position (off by one), padding that is scored, an answer that sees Future-Seed, greedy
    text that is teacher-forced: every record is compared with a loop that does one thing at a time."""
    seed = fs if with_fs else None
    examples = make_examples(9, task)
    if task == "arc":    # a label of two tokens, which real vocabularies do not have, is scored whole
        examples[0].choices["B"] = [66, 3]
        examples[0].answer = [66, 3]
    for record, example in zip(scored(model, examples, seed, task=task), examples, strict=True):
        loss, correct, text, option = by_the_book(model, example, seed)
        assert abs(record["loss"] - loss) <= 1e-5
        assert (record["correct"], record["text"], record["option"]) == (correct, text, option)
        assert (record["step"], record["id"], record["tokens"]) == (5, example.id, len(example.answer))
        if task == "arc":
            assert record["exact"] == record["f1"] == int(option == "B")
        else:
            assert record["exact"] == exact_match(text, "7 49") and record["f1"] == f1_score(text, "7 49")


@given(batch_size=st.integers(1, 12), order=st.permutations(range(10)), with_fs=st.booleans())
@settings(deadline=None, max_examples=8)
def test_records_depend_on_nothing_but_their_example(model, fs, batch_size, order, with_fs):
    """Catches padding that leaks between rows, and records that come back in the order of their lengths."""
    seed = fs if with_fs else None
    examples = make_examples(10)
    alone = [scored(model, [example], seed)[0] for example in examples]
    together = scored(model, [examples[place] for place in order], seed, batch_size)
    assert_same(together, [alone[place] for place in order])


@pytest.mark.parametrize("with_fs", [False, True])
def test_the_training_loss_is_the_one_that_is_scored(model, fs, with_fs):
    """Catches a loss at the wrong tokens, or of padding: prompts and answers are read in one pass there."""
    seed = fs if with_fs else None
    examples = make_examples(9)
    assert len({len(example.answer) for example in examples}) > 2
    losses = Arm(model, seed)(*collate(examples))
    for loss, example in zip(losses, examples, strict=True):
        assert abs(loss.item() - by_the_book(model, example, seed)[0]) <= 1e-5
    gradient, = torch.autograd.grad(losses.sum(), model.emb.weight)
    one_by_one = [Arm(model, seed)(*collate([example])).sum() for example in examples]
    expected, = torch.autograd.grad(sum(one_by_one), model.emb.weight)
    assert relative_error(gradient, expected) <= 1e-5


def test_future_seed_changes_the_scores(model, fs):
    """Catches a score that drops its fs: both arms would be the same arm."""
    examples = make_examples(6)
    without, with_fs = scored(model, examples), scored(model, examples, fs)
    assert all(abs(a["loss"] - b["loss"]) > 1e-4 for a, b in zip(without, with_fs, strict=True))


def test_scores_under_autocast_are_near(model):
    """Catches an autocast that breaks the dtype of a state or a loss."""
    examples = make_examples(6)
    records = score(model, examples, batch_size=3, device="cpu", task="hotpotqa", step=0, tokenizer=Words(),
                    autocast=torch.bfloat16)
    for record, exact in zip(records, scored(model, examples)):
        assert abs(record["loss"] - exact["loss"]) <= 0.15


def test_what_cannot_be_scored_is_named(model):
    """Catches an index error deep inside for an example that data.py should never have made."""
    example = make_examples(1)[0]
    with pytest.raises(ValueError, match="q0"):
        scored(model, [SimpleNamespace(**{**vars(example), "answer": []})])
    with pytest.raises(ValueError, match="q0"):
        scored(model, [example], task="arc")


def test_summary_is_a_plain_mean_over_examples():
    """Catches means weighted by tokens: the log averages examples."""
    records = [{"loss": 1.0, "tokens": 4, "correct": 1, "exact": 0, "f1": 0.5},
               {"loss": 3.0, "tokens": 1, "correct": 1, "exact": 1, "f1": 1.0}]
    assert summarise(records) == {"loss": 2.0, "accuracy": 0.625, "exact": 0.5, "f1": 0.75}


# ---- decoding ----------------------------------------------------------------------------------------------

@torch.no_grad()
def start(model, rows=3):
    tokens = torch.arange(rows * 5).view(rows, 5)
    hidden, state = prefill(model, tokens)
    return model.head(hidden[:, -1]), state


def test_greedy_is_the_limit_of_sampling(model):
    """Catches a nucleus that loses its likeliest token, and a temperature that multiplies."""
    logits, state = start(model)
    greedy = generate(model, logits, state, 6)
    assert greedy.shape == (3, 6)
    assert (generate(model, logits, state, 6, temperature=1.0, top_p=1e-6) == greedy).all()
    assert (generate(model, logits, state, 6, temperature=1e-4) == greedy).all()


def test_samples_have_the_models_probabilities(model):
    """Catches sampling from sorted places instead of tokens, or a top_p that keeps too much or little."""
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.05, 0.35]])).expand(4000, 4)
    _, state = start(model, 1)
    random = torch.Generator().manual_seed(0)
    for top_p, expected in ((1.0, [0.1, 0.5, 0.05, 0.35]), (0.6, [0, 0.5 / 0.85, 0, 0.35 / 0.85])):
        tokens = generate(model, logits, state, 1, temperature=1.0, top_p=top_p, rng=random)
        shares = torch.bincount(tokens[:, 0], minlength=4) / 4000
        assert (shares - torch.tensor(expected)).abs().max() < 0.03


def test_decoding_stops_when_every_row_has(model):
    """Catches rows that end the others' text, and a stop that is never seen."""
    logits, state = start(model)
    greedy = generate(model, logits, state, 8)
    everyone = set(greedy[:, 2].tolist())
    stopped = generate(model, logits, state, 8, stop=tuple(everyone))
    assert stopped.shape[1] <= 3
    assert (stopped == greedy[:, : stopped.shape[1]]).all()
    assert generate(model, logits, state, 8, stop=(V + 1,)).shape == (3, 8)
    only_first = next(token for token in greedy[0].tolist() if token not in greedy[1:])
    assert generate(model, logits, state, 8, stop=(only_first,)).shape == (3, 8)


# ---- exact match and F1 ------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, gold, exact, f1", [
    ("The Eiffel Tower", "eiffel tower", 1, 1),                # articles and case
    (" Eiffel-Tower!", "EiffelTower.", 1, 1),                  # punctuation vanishes, it does not part words
    ("a an the", "", 1, 0),                                    # nothing left: equal, but no common word
    ("", "", 1, 0),
    ("", "Paris", 0, 0),
    ("anthem", "them", 0, 0),                                  # articles are whole words
    ("pizza", "pizz", 0, 0),
    ("the the cat", "cat the", 1, 1),
    ("Barack Obama", "Barack Hussein Obama", 0, 0.8),
    ("to be or not to be", "to be", 0, 0.5),                   # common words count as often as both have them
    ("to be", "to to", 0, 0.5),
    ("yes", "yes", 1, 1),
    ("Yes.", "yes", 1, 1),
    ("yes it is", "yes", 0, 0),                                # yes, no, noanswer count only as a whole
    ("yes", "yes it is", 0, 0),
    ("no", "yes", 0, 0),
    ("no", "no one", 0, 0),
    ("noanswer", "the noanswer", 1, 1),
    ("noanswer given", "noanswer", 0, 0),
    ("yesterday", "yes yesterday", 0, 2 / 3),
    ("two\n words", "two words", 1, 1),
    ("a.b", "ab", 1, 1),
    ("A. B", "b", 1, 1),                                       # an initial "A." counts as an article
    ("Beyoncé", "beyonce", 0, 0),                              # accents stay
    ("“quoted”", "quoted", 0, 0),                              # only ASCII punctuation goes
])
def test_official_edge_cases(answer, gold, exact, f1):
    """Catches a normalisation that differs from the official script's in any of its corners."""
    assert exact_match(answer, gold) == exact
    assert abs(f1_score(answer, gold) - f1) < 1e-12


answers = st.text(alphabet="an the yes no.,!X\t", max_size=25)


@given(answers, answers)
@settings(deadline=None, max_examples=300)
def test_f1_properties(first, second):
    """Catches precision or recall with a wrong divisor: F1 is symmetric, and 1 for the same words only."""
    assert f1_score(first, second) == f1_score(second, first)
    assert 0 <= f1_score(first, second) <= 1
    if exact_match(first, second) and normalise(first):
        assert f1_score(first, second) == 1
    if f1_score(first, second) == 1:
        assert sorted(normalise(first).split()) == sorted(normalise(second).split())
    assert not set(normalise(first)) & set(string.punctuation)


# ---- runs on the disk --------------------------------------------------------------------------------------

def write_runs(runs_dir, name="R8", seeds=(0, 1, 2), n=30, steps=(0, 10), shift=0.0, rng_seed=0, **changes):
    """Runs of a round as train.py leaves them; shift moves the accuracy of prompt_fs."""
    round = ROUNDS[name]
    rng = np.random.default_rng(rng_seed)
    difficulty = rng.uniform(0.1, 0.5, n)
    for seed in seeds:
        for arm in ("no_fs", "prompt_fs"):
            folder = Path(runs_dir) / name / f"seed{seed}" / arm
            folder.mkdir(parents=True)
            run = {
                "round": name, "seed": seed, "arm": arm, "standin": False, "settings": round.settings(),
                "minutes": None, "base": {"name": round.base, "sha256": "c0ffee"}, "versions": {},
                "data": {"train": "t", "validation": round.task}, "device": "cpu", "status": "done",
                "steps": steps[-1],
            }
            (folder / "run.json").write_text(json.dumps({**run, **changes}))
            lines = []
            for step in steps:
                for index in range(n):
                    tokens = 1 if round.task == "arc" else 4
                    correct = int(rng.binomial(tokens, difficulty[index] + shift * (arm == "prompt_fs")))
                    lines.append(json.dumps({
                        "step": step, "id": f"q{index}", "loss": float(rng.gamma(2)), "tokens": tokens,
                        "correct": correct, "exact": int(correct == tokens), "f1": correct / tokens,
                        "option": None, "gold": "x", "text": "y",
                    }))
            (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return Path(runs_dir)


def change_run(folder, **changes):
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_line(folder, number, line):
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = line(lines[number - 1]) if callable(line) else line
    path.write_text("\n".join(lines) + "\n")


def as_written(runs_dir, arm, seeds=(0, 1, 2), name="R8", step=10):
    """An arm's acc, loss, EM and F1 at a step, from the lines of its records: (S, n, 4)."""
    texts = [(Path(runs_dir) / name / f"seed{seed}" / arm / "records.jsonl").read_text() for seed in seeds]
    runs = [[line for line in map(json.loads, text.splitlines()) if line["step"] == step] for text in texts]
    return np.array([[(line["correct"] / line["tokens"], line["loss"], line["exact"], line["f1"])
                      for line in lines] for lines in runs])


def test_records_come_back_as_written(tmp_path):
    """Catches scores that land at another example or step: the file's order must not matter."""
    values = (5, "b", 1.0, 1), (0, "a", 2.0, 2), (5, "a", 3.0, 3), (0, "b", 4.0, 4)
    lines = [{"step": step, "id": name, "loss": loss, "tokens": 4, "correct": correct, "exact": 0, "f1": 0.5}
             for step, name, loss, correct in values]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids, steps, scores = read_records(path)
    assert ids == ["a", "b"] and steps.tolist() == [0, 5]
    assert scores[..., 0].tolist() == [[0.5, 1.0], [0.75, 0.25]]
    assert scores[..., 1].tolist() == [[2.0, 4.0], [3.0, 1.0]]


def test_the_numbers_of_a_report(tmp_path):
    """Catches the wrong evaluation, swapped arms, a sample deviation, means over tokens, and seeds that are
    taken for questions where the report says how many would be enough."""
    runs = read_round("R8", write_runs(tmp_path))
    result = analyse(runs, ROUNDS["R8"])
    d_acc = []
    for seed in range(3):
        accuracy = {}
        for arm in ("no_fs", "prompt_fs"):
            text = (tmp_path / f"R8/seed{seed}/{arm}/records.jsonl").read_text()
            last = [record for record in map(json.loads, text.splitlines()) if record["step"] == 10]
            accuracy[arm] = sum(record["correct"] / record["tokens"] for record in last) / len(last)
        d_acc.append(accuracy["prompt_fs"] - accuracy["no_fs"])
        line = result["per_seed"][seed]["acc"]
        assert abs(line["no_fs"] - accuracy["no_fs"]) < 1e-12 and abs(line["d"] - d_acc[-1]) < 1e-12
        assert line["low"] <= line["d"] <= line["high"] and 0 < line["p"] <= 1
    over = result["over_seeds"]["acc"]
    mean = sum(d_acc) / 3
    assert abs(over["mean"] - mean) < 1e-12
    assert abs(over["std"] - math.sqrt(sum((d - mean) ** 2 for d in d_acc) / 3)) < 1e-12
    assert over["signs"] == f"{sum(d > 0 for d in d_acc)}/0/{sum(d < 0 for d in d_acc)}" and all(d_acc)
    assert over["p_seeds"] in (0.25, 0.5, 0.75, 1.0)
    seeds, questions = needed((as_written(tmp_path, "prompt_fs") - as_written(tmp_path, "no_fs"))[..., 0])
    assert f" {seeds} seeds on these 30 questions, or {questions} questions with 3 seeds" in text_of(result)
    assert (result["needed"]["seeds"], result["needed"]["questions"]) == (seeds, questions)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("seeds", [[4], [0, 1, 2]])
def test_intervals_and_p_values_of_a_report(tmp_path, seeds):
    """Catches intervals of a wrong width, p-values that are 1 whatever the data, or of one seed alone: twelve
    questions have few enough sign patterns to try them all."""
    result = analyse(read_round("R8", write_runs(tmp_path, seeds=seeds, n=12, shift=0.2)), ROUNDS["R8"])
    x = as_written(tmp_path, "prompt_fs", seeds) - as_written(tmp_path, "no_fs", seeds)    # (S, n, M)

    def p_of(values):
        patterns = np.array(list(itertools.product((1, -1), repeat=len(values))))
        return (np.abs(patterns @ values) >= abs(values.sum()) - 1e-9).mean()

    def is_students(found, values):    # which the percentiles of a bootstrap resemble
        half = 2.201 * values.std(ddof=1) / math.sqrt(12)
        expected = values.mean() - half, values.mean() + half
        return np.abs(np.subtract((found["low"], found["high"]), expected)).max() < 0.2 * half

    for m, metric in enumerate(ruler.METRICS):
        lumpy = metric == "EM"    # one right answer more or less is too much for a comparison with Student
        for line, values in zip(result["per_seed"], x[..., m], strict=True):
            assert abs(line[metric]["p"] - p_of(values)) < 1e-12
            assert lumpy or is_students(line[metric], values)
        over = result["over_seeds"][metric]
        assert abs(over["p_questions"] - p_of(x[..., m].mean(axis=0))) < 1e-12
        assert abs(over["p_seeds"] - p_of(x[..., m].mean(axis=1))) < 1e-12
        if len(seeds) == 1:
            assert lumpy or is_students(over, x[0, :, m])
        else:
            mean, half = over_seeds(x[..., m])
            assert np.allclose([over["low"], over["high"]], [mean - half, mean + half])


def test_verdicts_of_clear_and_of_no_effects(tmp_path):
    """Catches a verdict with the wrong sign, or one that is given without data."""
    for shift, expected in ((0.4, "positive"), (-0.09, "negative"), (0.0, "inconclusive")):
        runs = read_round("R8", write_runs(tmp_path / str(shift), shift=shift, n=40))
        assert analyse(runs, ROUNDS["R8"])["verdict"] == expected
    one = read_round("R8", write_runs(tmp_path / "one", seeds=[0], shift=0.4))
    assert analyse(one, ROUNDS["R8"])["verdict"] == "inconclusive"


LAST = range(31, 61)    # lines of the last evaluation


@pytest.mark.parametrize("damage, says", [
    (lambda f: (f / "records.jsonl").unlink(), "missing"),
    (lambda f: (f / "records.jsonl").write_text(""), "line 1"),
    (lambda f: (f / "records.jsonl").write_bytes(b"\xff\xfe{}\n"), "UTF-8"),
    (lambda f: change_line(f, 7, lambda line: line[:40]), "line 7"),
    (lambda f: change_line(f, 60, lambda line: line[:-1]), "line 60"),
    (lambda f: change_line(f, 9, "[]"), "line 9"),
    (lambda f: change_line(f, 9, lambda line: f"{line}, {line}"), "line 9"),
    (lambda f: change_line(f, 9, ""), "line 9"),
    (lambda f: change_line(f, 9, lambda line: line.replace('"loss": ', '"loss": NaN, "x": ')), "line 9"),
    (lambda f: change_line(f, 9, lambda line: line.replace('"loss": ', '"loss": Infinity, "x": ')), "line 9"),
    (lambda f: change_line(f, 9, lambda line: line.replace('"loss": ', '"loss": "1", "x": ')), "line 9"),
    (lambda f: change_line(f, 9, lambda line: line.replace('"tokens": 4', '"tokens": 0')), "line 9"),
    (lambda f: change_line(f, 9, lambda line: line.replace('"correct": ', '"correct": 1')), "line 9"),
    (lambda f: change_line(f, 9, lambda line: line.replace('"step": 0', '"step": null')), "line 9"),
    (lambda f: change_line(f, 9, lambda line: line.replace('"q8"', '"q7"')), "twice"),
    (lambda f: change_line(f, 9, lambda line: line.replace('"step": 0', '"step": 10')), "twice"),
    (lambda f: (f / "run.json").unlink(), "arm is missing"),
    (lambda f: (f / "run.json").write_text("{"), "run.json: damaged"),
    (lambda f: (f / "run.json").write_text("[]"), "run.json: damaged"),
    (lambda f: (f / "run.json").write_text("{}"), "run.json: damaged"),
    (lambda f: change_run(f, seed=7), "in its place"),
    (lambda f: change_run(f, settings={**ROUNDS["R8"].settings(), "lr": 1e-4}), "settings.lr is"),
    (lambda f: change_run(f, minutes=8.0), "minutes"),
    (lambda f: change_run(f, base={"name": "other", "sha256": "c0ffee"}), "base.name"),
    (lambda f: change_run(f, data={"train": "t", "validation": "other"}), "data.validation"),
    (lambda f: change_run(f, standin=True), "standin"),
    (lambda f: change_run(f, device="NVIDIA H200"), "device is"),
    (lambda f: [change_line(f, n, lambda line: line.replace('"q8"', '"z8"')) for n in (9, 39)],
     "different examples"),
    (lambda f: [change_line(f, n, lambda line: line.replace('"step": 10', '"step": 5')) for n in LAST],
     "step 5"),
])
@pytest.mark.parametrize("arm", ["seed0/no_fs", "seed1/prompt_fs"])
def test_what_cannot_be_compared_is_refused(tmp_path, capsys, arm, damage, says):
    """Catches silent averaging: one line that names the place, exit code 2, no numbers."""
    runs_dir = write_runs(tmp_path, seeds=(0, 1))
    damage(runs_dir / "R8" / arm)
    assert main(["R8", "--runs", str(runs_dir)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "R8" in err and says in err
    assert "d_acc" not in out


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")])
def test_one_bad_round_does_not_hide_the_others(tmp_path, capsys, damage):
    """Catches a report that stops at the first refusal, or that hides it behind exit code 0."""
    write_runs(tmp_path, "R8")
    write_runs(tmp_path, "R6")
    (tmp_path / "R8/seed1").rename(tmp_path / "R8/seed1.old")    # not a seed's folder: none of its business
    damage(tmp_path / "R6/seed1/no_fs/run.json")
    assert main(["--all", "--runs", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "R8: " in out and "R6: " not in out and "R6/seed1/no_fs" in err
    assert main(["R6", "--seeds", "0,2", "--runs", str(tmp_path)]) == 0


def test_unequal_steps_are_the_point_of_a_budget_in_minutes(tmp_path):
    """Catches a refusal of the log's own protocol: --minutes gives the arms as many steps as they manage."""
    write_runs(tmp_path, minutes=8.0)
    folder = tmp_path / "R8/seed1/prompt_fs"
    text = (folder / "records.jsonl").read_text()
    (folder / "records.jsonl").write_text(text + text.replace('"step": 10', '"step": 13').split("\n", 30)[30])
    result = analyse(read_round("R8", tmp_path), ROUNDS["R8"])
    steps = [line["steps"] for line in result["per_seed"]]
    assert steps == [{"no_fs": 10, "prompt_fs": step} for step in (10, 13, 10)]
    assert "    10/13  " in text_of(result) and "8 minutes" in text_of(result)


@pytest.mark.parametrize("base, label", [
    ("init:L2-D64", "UNTRAINED BASE init:L2-D64"), ("mine.pth", "ANOTHER BASE, mine.pth"),
])
def test_another_base_is_said(tmp_path, base, label):
    """Catches a toy's numbers beside the log's, and a summary that names the round's base in its place."""
    write_runs(tmp_path, base={"name": base, "sha256": "0"})
    assert label in text_of(analyse(read_round("R8", tmp_path), ROUNDS["R8"]))
    summary = write_summary(ROUNDS["R8"], tmp_path)[0].read_text()
    assert label in summary and f'"base": "{base}"' in summary and ROUNDS["R8"].base not in summary


def test_no_runs_at_all(tmp_path, capsys):
    """Catches a traceback, or an empty report, before the first run."""
    for arguments in (["R8"], ["--all"], ["R99"]):
        assert main([*arguments, "--runs", str(tmp_path)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1


# ---- what is said ------------------------------------------------------------------------------------------

def test_labels_stand_before_the_numbers(tmp_path, capsys):
    """Catches stand-in, untrained or shortened runs that read like the real thing beside the log."""
    changed = {**miniature(ROUNDS["R8"]).settings(), "steps": 2}
    base = {"name": "init:L2-D64", "sha256": None}
    write_runs(tmp_path, standin=True, base=base, settings=changed, status="running")
    for form in ([], ["--markdown"]):
        assert main(["R8", "--runs", str(tmp_path), *form]) == 0
        out = capsys.readouterr().out
        for label in ("STAND-IN", "UNTRAINED BASE init:L2-D64", "changed from the round's: steps=2"):
            assert label in out
        assert "unfinished: seed 0 no_fs (at step 10)" in out
    assert main(["R8", "--runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"][0]["standin"] is True


def test_report_of_every_round(tmp_path, capsys):
    """Catches a crash on any round's shape: one seed in the log (R7), one-token answers (R2), parts (R9)."""
    for name in ROUNDS:
        write_runs(tmp_path, name, seeds=[0] if name == "R7" else [0, 1, 2])
    assert main(["--all", "--runs", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert not err
    for name, round in ROUNDS.items():
        assert f"{name}: {round.title}" in out
    assert "of the seed spread 0.0519 reported in the log, 0.0" in out
    for second, first in (("R9a", "R2"), ("R8", "R6"), ("R9b", "R6"), ("R10", "R6")):
        assert f"{second} minus {first}" in out
    assert "nan" not in out and "inf " not in out
    assert main(["R9", "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "R9a: " in out and "R9b: " in out and "R8: " not in out
    assert main(["--all", "--markdown", "--runs", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(ROUNDS) and len({row.count("|") for row in rows}) == 1


def test_comparison_of_rounds(tmp_path):
    """Catches crossed arms, seeds that are not matched, and rounds that differ in more than Future-Seed."""
    write_runs(tmp_path, "R6", seeds=(0, 1, 2))
    write_runs(tmp_path, "R8", seeds=(1, 2, 3), rng_seed=5)
    write_runs(tmp_path, "R2")
    a, b = read_round("R6", tmp_path), read_round("R8", tmp_path)
    result = compare(a, b)
    assert result["seeds"] == [1, 2]
    means = [[runs.tables[seed, "prompt_fs"][1][-1, :, 0].mean() for seed in (1, 2)] for runs in (a, b)]
    assert abs(result["over_seeds"]["acc"]["mean"] - (sum(means[1]) - sum(means[0])) / 2) < 1e-12
    with pytest.raises(ValueError, match="R6 and R2 cannot be compared: settings"):
        compare(a, read_round("R2", tmp_path))
    with pytest.raises(ValueError, match="no seed in common"):
        compare(a, read_round("R8", tmp_path, [3]))


def test_the_logs_table_reproduces():
    """The log's means, population deviations and signs, from its per-seed numbers, to the last digit; in R6
    and R10 its 4-digit inputs cannot carry the deviation's fourth digit, which is off by one."""
    signs = {"R2": "3/0/0", "R3": "1/0/2", "R4": "2/0/1", "R5": "1/0/2", "R6": "2/0/1", "R7": "1/0/0",
             "R8": "2/0/1", "R9a": "2/0/1", "R9b": "1/0/2", "R10": "2/0/1"}
    for name in signs:
        round = ROUNDS[name]
        log = ruler.log_numbers(round)
        assert log["as_logged"] == ("to rounding" if name in ("R6", "R10") else "yes")
        assert f"{log['recomputed_mean']:.4f}" == f"{round.log.mean:.4f}"
        assert log["signs"] == signs[name]
        assert log["verdict"] == "inconclusive"    # not one of them can tell
    wrong = replace(ROUNDS["R8"], log=replace(ROUNDS["R8"].log, mean=0.0056))
    assert ruler.log_numbers(wrong)["as_logged"] == "no"


def test_log_command(capsys):
    """Catches a round that is lost from the log's table."""
    assert main(["--log"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + sum(round.log is not None for round in ROUNDS.values()) == 11
    assert "R2     +0.0156 +0.0234 +0.0625 +0.0339  0.0205  3/0/0" in out
    assert main(["R9", "--log"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_summary_file_is_the_logs(tmp_path):
    """Catches a summary under another name or in another form than the log's, or of unfinished seeds."""
    write_runs(tmp_path, seeds=(0, 1))
    write_runs(tmp_path, seeds=[2], status="running")
    write_runs(tmp_path / "x", seeds=[3])
    path, text = write_summary(ROUNDS["R8"], tmp_path)
    assert path == tmp_path / "_summary_hotpot_qafter_stabilized_len4096_r8_alpha_m4_s012.txt"
    lines = path.read_text().splitlines()
    assert lines[2].startswith("L=4096 pairs=2 mean d_acc=") and "sign(+/0/-)=" in lines[2]
    assert [line.split(" d_acc")[0] for line in lines[3:5]] == ["  seed=0", "  seed=1"]
    assert lines[-1] == "left out, not finished: seed 2"
    assert "2 seeds on 30 examples" in text and "left out, not finished: seed 2" in text
    assert seeds_on_disk("R8", tmp_path) == [0, 1, 2]
    assert seeds_on_disk("R8", tmp_path, finished=True) == [0, 1]


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib.figure", reason="draws figures: pip install matplotlib")


def test_plot(tmp_path, matplotlib):
    """Catches a figure that cannot be drawn."""
    write_runs(tmp_path, "R8")
    write_runs(tmp_path, "R7", seeds=[0])
    target = tmp_path / "report.png"
    assert main(["--all", "--runs", str(tmp_path), "--plot", str(target)]) == 0
    assert target.read_bytes()[:4] == b"\x89PNG"
    write_runs(tmp_path, "S1", standin=True, settings=miniature(ROUNDS["S1"]).settings())
    target = tmp_path / "study.png"
    assert main(["S1", "--runs", str(tmp_path), "--plot", str(target)]) == 0
    assert target.read_bytes()[:4] == b"\x89PNG"


def test_plot_without_matplotlib(tmp_path, capsys, monkeypatch):
    """Catches a traceback where matplotlib is missing."""
    write_runs(tmp_path, "R8")
    monkeypatch.setattr(ruler, "Figure", None)
    with pytest.raises(SystemExit) as stop:
        main(["--all", "--runs", str(tmp_path), "--plot", str(tmp_path / "report.png")])
    assert stop.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err


def colours_of(panel):
    return {line.get_label(): line.get_color() for line in panel.lines if line.get_label()[0] != "_"}


def lines_of(panel, colour):
    """The x and y of all lines of this colour, in the order of drawing."""
    return [line.get_xydata().T for line in panel.lines if line.get_color() == colour]


def diamonds_of(panel):
    """The x and y of every single diamond, which in both figures is a d_acc."""
    return [line.get_xydata()[0] for line in panel.lines if line.get_marker() == "D"]


def test_figures_show_each_arm_under_its_own_name(tmp_path, matplotlib):
    """Catches arms that change places, in the data, in a legend or from one figure to the other, differences
    with the wrong sign, and numbers of another row."""
    results, names = [], ("R8", "S1", "S3")
    for name in names:
        made_up = {"standin": True, "settings": miniature(ROUNDS[name]).settings()} if name != "R8" else {}
        write_runs(tmp_path, name, shift=0.3, rng_seed=len(results), **made_up)
        folder = tmp_path / name / "seed1/prompt_fs"
        at_step_0 = (folder / "records.jsonl").read_text().splitlines(keepends=True)[:30]
        (folder / "seed_off.jsonl").write_text("".join(at_step_0))    # unlike both arms' ends
        results.append(analyse(read_round(name, tmp_path), ROUNDS[name]))

    def means(name, arm, step=10):
        return as_written(tmp_path, arm, name=name, step=step).mean(axis=1)    # (S, M)

    d_acc = {name: (means(name, "prompt_fs") - means(name, "no_fs"))[:, 0] for name in names}
    left, *curves = draw_report(results[:1]).axes
    colours = colours_of(curves[0])
    for (m, panel), arm in itertools.product(enumerate(curves), ARMS):
        expected = [([0, 10], values) for values in zip(means("R8", arm, 0)[:, m], means("R8", arm)[:, m])]
        assert np.allclose(lines_of(panel, colours[arm]), expected)
    expected = [*d_acc["R8"], d_acc["R8"].mean(), ROUNDS["R8"].log.mean]
    assert np.allclose(diamonds_of(left), [(value, row) for row, value in enumerate(expected)])

    left, right = draw_study(results[1:]).axes
    *arms, off = colours_of(left).items()
    assert dict(arms) == colours and "switched off" in off[0]
    for row, name in enumerate(names[1:]):
        shown = [lines_of(left, colour)[row] for _, colour in (*arms, off)]
        expected = means(name, "no_fs"), means(name, "prompt_fs"), means(name, "prompt_fs", step=0)[1:2]
        for (x, y), values in zip(shown, expected, strict=True):
            assert np.allclose(x, values[:, 0]) and (np.abs(y - row) < 0.5).all()
    assert np.allclose(diamonds_of(right), [(d_acc[name].mean(), row) for row, name in enumerate(names[1:])])


def test_the_stand_in_has_a_base_a_seed(tmp_path, capsys):
    """Catches a study refused because its seeds start from other bases, and one whose two arms do."""
    runs = write_runs(tmp_path, "S1", standin=True, settings=miniature(ROUNDS["S1"]).settings())
    for seed in (0, 1, 2):
        for arm in ("no_fs", "prompt_fs"):
            change_run(runs / "S1" / f"seed{seed}" / arm, base={"name": "stand-in", "sha256": f"{seed}"},
                       data={"train": f"t{seed}", "validation": "v"})
    assert main(["S1", "--runs", str(runs)]) == 0
    assert "STAND-IN" in capsys.readouterr().out
    for change in ({"base": {"name": "stand-in", "sha256": "0"}},
                   {"data": {"train": "t0", "validation": "v"}},
                   {"data": {"train": "t2", "validation": "w"}}):
        before = (runs / "S1/seed2/prompt_fs/run.json").read_text()
        change_run(runs / "S1/seed2/prompt_fs", **change)
        assert main(["S1", "--runs", str(runs)]) == 2
        assert "cannot be compared" in capsys.readouterr().err
        (runs / "S1/seed2/prompt_fs/run.json").write_text(before)


def test_real_and_stand_in_are_never_compared(tmp_path, capsys):
    """Catches R8 minus R6 where one of them ran on made-up questions."""
    write_runs(tmp_path, "R6")
    write_runs(tmp_path, "R8", standin=True, settings=miniature(ROUNDS["R8"]).settings())
    assert main(["R6", "R8", "--runs", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "R8 minus R6" not in out and "standin is False and True" in err
    assert main(["R6", "R8", "--runs", str(tmp_path), "--markdown"]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    assert len(tables) == 2 and "R6:" in tables[0] and "R8:" in tables[1] and "STAND-IN" in tables[1]


def test_jumps_and_seed_off(tmp_path, capsys):
    """Catches a jump counted in the wrong arm, and the ablation read from the wrong file or left out."""
    runs = write_runs(tmp_path, "S1", standin=True, settings=miniature(ROUNDS["S1"]).settings(), shift=0.49)
    for seed in (0, 1):
        off = (runs / "S1" / f"seed{seed}" / "no_fs" / "records.jsonl").read_text().splitlines()[-30:]
        (runs / "S1" / f"seed{seed}" / "prompt_fs" / "seed_off.jsonl").write_text("\n".join(off) + "\n")
    result = analyse(read_round("S1", runs), ROUNDS["S1"])
    assert result["jumped"] == {"no_fs": 0, "prompt_fs": 3}
    assert result["seed_off"] == {line["seed"]: pytest.approx(line["acc"]["no_fs"])
                                  for line in result["per_seed"][:2]}
    assert main(["S1", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "no_fs in 0 of 3, prompt_fs in 3 of 3 seeds" in out and "switched off" in out
    assert main(["S1", "--runs", str(runs), "--markdown"]) == 0
    assert "S1, its seed switched off" in capsys.readouterr().out


def test_rows_on_the_stand_in_stand_under_their_own_no_fs(tmp_path, capsys):
    """Catches a round under the no_fs of another order, and a p over seeds where there is one seed."""
    for rng_seed, name in enumerate(("R6", "R7", "R8")):
        write_runs(tmp_path, name, seeds=[4], standin=True, settings=miniature(ROUNDS[name]).settings(),
                   rng_seed=rng_seed)
    assert main(["R6", "R7", "R8", "--markdown", "--runs", str(tmp_path)]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    rows = [row for row in rows if "switched off" not in row[0]]
    assert [row[0].split(":")[0].split()[0].strip(",") for row in rows] == [
        "no_fs", "R6", "no_fs", "R8", "no_fs", "R7"]
    assert "context_first" in rows[0][0] and "context_first" in rows[2][0] and "question" in rows[4][0]
    assert rows[1][-1].endswith("]: inconclusive")


# ---- a question from a person ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def words():
    return Tokenizer()


def test_ask(tmp_path, capsys, monkeypatch, words):
    """Catches an answer without the Future-Seed that the checkpoint was trained with, or a nameless error."""
    monkeypatch.setattr("ask.Tokenizer", lambda: words)    # read once, not for every question
    model = RWKV7.init(Config.published(2, 16, 16, 65536), seed=3)
    with torch.no_grad():
        for block in model.blocks:
            block.att.output.weight.normal_(generator=torch.Generator().manual_seed(1))
    path = tmp_path / "model.pth"
    model.save(path)
    prompt = "Question:\nWho wrote Faust?\n\nAnswer:"
    settings = {**ROUNDS["R8"].settings(), "fs_layer_start": 1, "fs_alpha": 3.0}

    def expected(fs):
        with torch.no_grad():
            hidden, state = prefill(model, torch.tensor([words.encode(prompt)]), None, fs)
            tokens = generate(model, model.head(hidden[:, -1]), state, 5)[0].tolist()
        return words.decode(tokens).strip().split("\n")[0] + "\n"

    def asked(*more):
        assert main(["--ask", "Who wrote Faust?", "--checkpoint", str(path), "--max-new", "5", *more]) == 0
        return capsys.readouterr().out

    assert asked() == expected(None)
    run = {"arm": "prompt_fs", "seed": 1, "settings": settings}
    (tmp_path / "run.json").write_text(json.dumps(run))
    fs = FutureSeed(model.config, alpha=3.0, layer_start=1)
    assert asked() == expected(fs) != expected(None)
    with torch.no_grad():
        fs.alpha.fill_(-30)    # what training left of it is in fs.pth
    torch.save(fs.state_dict(), tmp_path / "fs.pth")
    assert asked() == expected(None)
    (tmp_path / "run.json").write_text(json.dumps({**run, "arm": "no_fs"}))
    assert asked() == expected(None)
    (tmp_path / "run.json").write_text("{")
    for arguments in ([], ["--top-p", "0"], ["--max-new", "0"], ["--temperature", "-1"]):
        assert main(["--ask", "x", "--checkpoint", str(path), *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
    assert main(["--ask", "x", "--checkpoint", str(tmp_path / "none.pth")]) == 2


@pytest.mark.parametrize("standin, written", [(False, "runs eats"), (True, "runs")])
def test_ask_ends_where_the_answer_ends(tmp_path, capsys, monkeypatch, words, standin, written):
    """Catches an answer that goes on after the end of the document or of the line, a stand-in's after its
    one token, and its model asked in the official vocabulary: this model knows which token follows which,
    and nothing else."""
    monkeypatch.setattr("ask.Tokenizer", lambda: words)
    tokenizer = small_tokenizer() if standin else words
    model = RWKV7.init(Config.published(1, 64, 64, len(tokenizer.tokens) if standin else 65536), seed=3)
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
        assert main(["--ask", prompt, "--checkpoint", str(tmp_path / "model.pth")]) == 0
        assert capsys.readouterr().out == answer + "\n"


def test_command_line(tmp_path, capsys):
    """Catches a program that works from its own folder only, and a help without examples or the rule."""
    run = subprocess.run([sys.executable, ROOT / "eval.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "name a round" in run.stderr
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "python eval.py R8" in out and "inconclusive: anything else" in out
