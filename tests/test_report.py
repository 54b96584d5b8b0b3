"""report.py: are the numbers those of the records, and does a reader learn first what must be known?

The runs are fakes with drawn scores (fake_runs.py). What damage does to a report is in test_runs.py.
"""

import json
import math
import re
import shlex
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest

import eval as eval_py
from eval import main, score
from fake_runs import (REAL, STANDIN, change_lines, change_run, change_text, read_lines, save, write_lines,
                       write_runs)
from fs import FutureSeed, prefill
from report import analyse, explain, log_numbers, text_of_log, write_report
from runs import ARMS, CONTROLS, FOLDERS, METRICS
from standin import chance, fresh_model, small_tokenizer, validation_examples
from stats import judge


def report_of(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def strict_json(text):
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def as_written(folder, arm, seeds, part="records", **kind):
    """An arm's acc, loss, EM and F1 of one kind of record, as they stand in the files: (S, n, M)."""
    found = []
    for seed in seeds:
        records = [record for record in read_lines(folder / f"seed{seed}" / arm / f"{part}.jsonl")
                   if kind.items() <= record.items()]
        found.append([(r["correct"] / r["tokens"], r["loss"], r["exact"], r["f1"]) for r in records])
    return np.array(found)


# ---- the numbers -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seeds", [[4], [0, 1, 2], list(range(7))])
def test_the_numbers_are_those_of_the_records(tmp_path, capsys, seeds):
    """Catches: the wrong evaluation, swapped arms, a sample deviation, means over tokens, a median that is a
    mean, an interval of another metric or of a wrong width, numbers that are no JSON, and a verdict or a p of
    fewer than six seeds."""
    folder = write_runs(tmp_path, seeds=seeds, shift=0.2, settings={"steps": 10})
    result, = strict_json(report_of(capsys, "R8", "--json", "--runs", tmp_path).out)["rounds"]
    without, with_fs = (as_written(folder, arm, seeds, step=10) for arm in ARMS)
    x = with_fs - without    # (S, n, M)
    for m, metric in enumerate(METRICS):
        for s, line in enumerate(result["per_seed"]):
            found = line[metric]
            mean, half = x[s, :, m].mean(), 1.96 * x[s, :, m].std(ddof=1) / math.sqrt(30)
            assert np.allclose([found["no_fs"], found["prompt_fs"], found["d"]],
                               [without[s, :, m].mean(), with_fs[s, :, m].mean(), mean])
            assert np.allclose([found["low"], found["high"]], [mean - half, mean + half])
        deltas, over = x[..., m].mean(axis=1), result["over_seeds"][metric]
        assert np.allclose([over["mean"], over["std"]], [deltas.mean(), deltas.std()])
        gains, losses = (deltas > 1e-12).sum(), (deltas < -1e-12).sum()
        assert over["signs"] == f"{gains}/{len(seeds) - gains - losses}/{losses}"
    assert (result["seeds"], result["examples"]) == (seeds, 30)
    assert np.isclose(result["median"], np.median(x[..., 0].mean(axis=1)))
    assert result["per_seed"][0]["steps"] == [10, 10]
    for control in CONTROLS:
        of_control = as_written(folder, "prompt_fs", seeds, part="controls", control=control)
        assert np.allclose(result["controls"][control], of_control[..., 0].mean(axis=1))
    verdict, low, high = judge(x[..., 0])
    out = report_of(capsys, "R8", "--runs", tmp_path).out
    assert result["verdict"] == verdict and f"verdict on d_acc: {verdict}" in out
    known = [result[key] is not None for key in ("interval", "p", "gain", "p_jumped")]
    if len(seeds) < 6:
        assert verdict == "inconclusive" and not any(known)
        assert f"{len(seeds)} of the 6 seeds" in out and not re.search(r"\bp \d", out)
    else:
        assert all(known) and np.allclose(result["interval"], [low, high])
        assert f"[{low:+.4f}, {high:+.4f}]" in out
    assert "  F1 " in out and "with its seed states made from another prompt: 0." in out
    assert "prompts of up to 4096 tokens" in out


def p_in_words(out):
    """What stands behind "sign test over seeds" in a report on several rounds, by round."""
    texts = {part.split(":")[0]: part for part in out.strip().split("\n\n")}
    found = {name: re.search(r"sign test over seeds (.*)", text) for name, text in texts.items()}
    return {name: match and match[1] for name, match in found.items()}


def test_registered_is_what_was_registered(tmp_path, capsys):
    """Registered are S20's settings as published, on the stand-in, on exactly the seeds 20 to 39.

    Catches: the seeds on which the recipe was chosen, some of the registered ones, more than these, other
    settings, another budget or real records under the registration's name.
    """
    assert STANDIN["S20"].primary and STANDIN["S20"].registered == tuple(range(20, 40))
    runs = tmp_path / "standin"
    write_runs(tmp_path, "S20", [*range(6), *range(20, 40)], 4, source="standin", shift=0.45, steps=2)
    for seeds, words in (("20-39", "(registered)"), ("39,20-38", "(registered)"), ("0-5", "(exploratory)"),
                         ("20-38", "(exploratory)"), ("5,20-39", "(exploratory)")):
        out = report_of(capsys, "S20", "--seeds", seeds, "--runs", tmp_path).out
        assert p_in_words(out)["S20"].endswith(words), seeds
    assert "(registered)" not in report_of(capsys, "S20", "--runs", tmp_path).out
    assert analyse(runs / "S20", list(range(20, 40)))["primary"] is True
    for source, changes in (("standin", {"settings": {"lr": 0.003}}), ("real", {}), ("own", {}),
                            ("standin", {"minutes": 8.0})):
        place = tmp_path / f"{source}-{'-'.join(changes)}"
        folder = write_runs(place, "S20", range(20, 40), 4, source=source, steps=2, **changes)
        assert analyse(folder)["primary"] is False, (source, changes)


def test_p_values_are_corrected_for_their_number(tmp_path, capsys):
    """Rounds that were not registered are one family, corrected by Holm.

    Catches: the study's own question corrected for the others or counted with them, rounds of few seeds that
    count, and jumps counted in the wrong arm.
    """
    for name, seeds in (("R6", range(7)), ("S20", range(20, 40)), ("R2", range(7)), ("R8", range(3))):
        write_runs(tmp_path, name, seeds, shift=0.49, source="standin", steps=2)
    out = report_of(capsys, "R6", "S20", "R2", "R8", "--runs", tmp_path).out
    assert p_in_words(out) == {"R6": "p 0.031 (Holm, 2 rounds)", "S20": "p 1.9e-06 (registered)",
                               "R2": "p 0.031 (Holm, 2 rounds)", "R8": None}
    words = {part.split(":")[0]: part for part in out.split("\n\n")}
    assert "no_fs 0 of 7, prompt_fs 7 of 7; exact paired p 0.016" in words["R6"]
    assert "no_fs 0 of 3, prompt_fs 3 of 3\n" in words["R8"] and not re.search(r"\bp \d", words["R8"])
    alone = report_of(capsys, "R2", "R8", "--runs", tmp_path).out
    assert p_in_words(alone)["R2"] == "p 0.016 (exploratory)"


# ---- what a reader must know -------------------------------------------------------------------------------

def before_numbers(capsys, *argv):
    return report_of(capsys, *argv).out.partition("metric")[0]


def test_what_a_reader_must_know_stands_before_the_numbers(tmp_path, capsys):
    """Catches: runs on the stand-in, of other settings, bases, budgets, code or machines that read like the
    real thing; runs like the round's own that read otherwise."""
    mine = {"name": "init:L2-D64", "sha256": None}
    folder = write_runs(tmp_path, base=mine, minutes=8.0, settings={"steps": 10, "lr": 1e-3})
    there = {"code": "c0de", "machine": {"threads": 1}}
    here = {"code": "d1ff", "machine": {"threads": 2}}
    for arm in ARMS:
        for seed in range(3):
            change_run(folder / f"seed{seed}" / arm, history=[{"from_step": 0, **there}])
    change_run(folder / "seed1/prompt_fs", history=[{"from_step": 0, **there}, {"from_step": 4, **here}])
    longer = folder / "seed2/prompt_fs"    # in 8 minutes the arms take what steps they manage
    change_lines(longer / "records.jsonl", lambda record: {"step": record["step"] * 13 // 10})
    change_run(longer, steps=13)
    told = before_numbers(capsys, "R8", "--runs", tmp_path)
    for words in ("ANOTHER BASE, init:L2-D64", "each arm was trained for 8 minutes",
                  "settings changed from the round's: steps=10, lr=0.001", "seed 1 ran on another machine",
                  "code is c0de there, d1ff here; machine.threads is 1 there, 2 here"):
        assert words in told, words
    assert "  10/13  " in report_of(capsys, "R8", "--runs", tmp_path).out
    write_runs(tmp_path / "made up", "R2", source="standin")
    out = report_of(capsys, "R2", "--runs", tmp_path / "made up").out
    assert "ON THE STAND-IN, made-up questions" in out.partition("metric")[0]
    for words in ("changed", "ANOTHER BASE", "another machine", "prompts of up to", "  F1 ", "  EM ",
                  "minutes", "end mark"):
        assert words not in out, words
    write_runs(tmp_path / "real", "R2")
    out = report_of(capsys, "R2", "--runs", tmp_path / "real").out
    assert out.count("\n  metric seed") == out.count("questions\n  metric") == 1    # nothing to be told
    assert "  EM " in out and "  F1 " not in out


def test_own_data_stand_beside_no_log(tmp_path, capsys):
    """Catches: a user's own questions compared with the log, or reported under the log's file name; settings
    that are the round's, told as changed."""
    folder = write_runs(tmp_path, "R8", source="own", settings={"min_prompt": 0})
    out = report_of(capsys, "R8", "--runs", tmp_path).out
    assert "OWN DATA: not comparable with the log" in out and "the log:" not in out and "changed" not in out
    assert analyse(folder)["log"] is None
    write_report(folder)
    assert [path.name for path in folder.parent.glob("*.txt")] == ["_summary_R8.txt"]


def test_prompts_that_lost_their_question_are_counted(tmp_path, capsys):
    """Catches: no word about questions that nobody could see, because the prompt's start was cut off."""
    for number, words in ((0, None), (1, "1 validation prompt had"), (1014, "1,014 validation prompts had")):
        data = {"train": "train", "validation": "validation", "questions_cut": number}
        write_runs(tmp_path / str(number), "R5", data=data)
        told = before_numbers(capsys, "R5", "--runs", tmp_path / str(number))
        assert ("lost the question" in told) == (number > 0)
        assert not number or f"{words} more than 2048 tokens" in told


def test_a_round_without_an_end_mark_is_told(tmp_path, capsys):
    """Catches: a low EM of HotpotQA that reads like a bad model, where none was trained to stop."""
    for name, settings, told in (("R8", {}, True), ("R8", {"end_mark": True}, False), ("S20", {}, False),
                                 ("R2", {}, False)):
        place = tmp_path / f"{name} {len(settings)}"
        write_runs(place, name, [0], settings=settings)
        assert ("train.py --set end_mark=true" in before_numbers(capsys, name, "--runs", place)) == told


def test_what_cannot_be_used_hides_nothing(tmp_path, capsys):
    """A damaged seed and a round whose seeds are unlike are told in one line each, with exit code 2, and the
    rest is reported.

    Catches: one mean over two kinds of runs; one bad seed that hides the others, one bad round that hides the
    others, and one that is told only among the numbers.
    """
    folder = write_runs(tmp_path, "R8", range(2))
    change_text(folder / "seed0/no_fs/records.jsonl", lambda text: text[:-9])
    unlike = write_runs(tmp_path, "R6", range(2))
    for arm in ARMS:
        change_run(unlike / "seed1" / arm, minutes=8.0)
    out, err = report_of(capsys, "--runs", tmp_path, code=2)
    first, second = err.splitlines()
    assert first.startswith(f"error: {unlike}: seeds 0 and 1 cannot be compared: minutes is None in seed 0")
    assert second.startswith(f"error: {folder / 'seed0/no_fs/records.jsonl'} is damaged")
    assert "R8: " in out and "1 seed on 30 questions" in out and "R6: " not in out
    err = report_of(capsys, "R7", "--runs", tmp_path, code=2).err
    assert err == (f"error: {tmp_path} holds no runs of R7. Train some with train.py, or name another folder "
                   "with --runs DIR.\n")


def test_reports_of_every_round(tmp_path, capsys, monkeypatch):
    """Catches: a crash on any round's shape, a part of R9 that is lost, and runs of the stand-in or of own
    data that are only found where they are pointed at."""
    monkeypatch.chdir(tmp_path)
    for name in REAL:
        write_runs("runs", name, [0, 1], 4, settings={"steps": 2})
    for source in ("standin", "own"):
        write_runs("runs", "R8", [0], 4, source=source)
    out, err = report_of(capsys)
    assert not err and "nan" not in out and "inf" not in out
    assert all(f"{name}: {recipe.title}" in out for name, recipe in REAL.items())
    out = report_of(capsys, "r9", "r8").out
    assert [part.split(":")[0] for part in out.strip().split("\n\n")] == ["R9a", "R9b", "R8", "R8", "R8"]


def test_a_report_is_left_under_the_logs_name(tmp_path):
    """Catches: a summary that differs from what is printed, or goes by another name than the log's."""
    folder = write_runs(tmp_path, "R8", source="standin")
    result, text = write_report(folder)
    assert (folder.parent / REAL["R8"].log["summary"]).read_text() == text
    assert "the log (on real records): d_acc " in text and result == analyse(folder)


def test_the_logs_table_reproduces():
    """The log's means, population deviations and signs come from its per-seed numbers, but for rounding.

    Catches: a round that is lost from the table, and a number of the log that was copied wrong.
    """
    signs = {"R2": "3/0/0", "R3": "1/0/2", "R4": "2/0/1", "R5": "1/0/2", "R6": "2/0/1", "R7": "1/0/0",
             "R8": "2/0/1", "R9a": "2/0/1", "R9b": "1/0/2", "R10": "2/0/1", "R11": "2/0/1", "R12a": "2/0/3",
             "R12b": "2/0/3", "R12c": "2/2/1", "R12d": "2/2/1", "R14a": "2/0/3", "R14b": "2/0/3"}
    assert list(signs) == [name for name, recipe in REAL.items() if recipe.log]
    for name, counts in signs.items():
        log = log_numbers(REAL[name])
        assert log["as_logged"] and log["verdict"] == "inconclusive"    # not one of them can tell
        mean, std = log["recomputed"]["mean"], log["recomputed"]["std"]
        assert f"mean {mean:+.4f}, std {std:.4f}, sign(+/0/-) {counts}, " in text_of_log(log)
    wrong = replace(REAL["R8"], log={**REAL["R8"].log, "mean": 0.0056})
    assert "(NOT as logged, +0.0056 and 0.0519)" in text_of_log(log_numbers(wrong))


# ---- in words ----------------------------------------------------------------------------------------------

FORMS = {(recipe.task, recipe.order): name for name, recipe in STANDIN.items()}    # a round of every form


@pytest.mark.parametrize("name", FORMS.values())
def test_the_commands_that_are_printed_answer_as_printed(tmp_path, capsys, monkeypatch, name):
    """The explanation of a stand-in run ends with a command for each arm, which works when it is pasted, and
    gives the answer that the explanation gave for this arm.

    Catches: a prompt that has lost its line breaks, facts or question, the other arm's model, an answer
    without the trained seed states, a path that a shell takes apart, and the chance of a guess by another
    task or number of facts.
    """
    recipe = replace(STANDIN[name], facts=3, n_val=8, channels=16, alpha_init=3.0, fs_layer_start=1)
    validation = validation_examples(recipe)
    changed = recipe.settings()
    folder = write_runs(tmp_path / "my runs", name, [1], 2, source="standin", settings=changed) / "seed1"
    models = {arm: fresh_model(recipe.channels, seed) for seed, arm in enumerate(ARMS, start=3)}
    fs = {"no_fs": None, "prompt_fs": FutureSeed(models["prompt_fs"].config, **recipe.fs_settings())}
    answers = {}
    for arm in ARMS:
        records = score(models[arm], validation, fs[arm], batch_size=4, device="cpu", step=recipe.steps,
                        tokenizer=small_tokenizer(), max_new=1)
        write_lines(folder / arm / "records.jsonl", records)
        answers[arm] = {record["id"]: record["text"] for record in records}
        save(models[arm], folder / arm / "model.pth")
    save(fs["prompt_fs"], folder / "prompt_fs/fs.pth")
    write_lines(folder / "prompt_fs/controls.jsonl",
                [record | {"control": control} for control in CONTROLS for record in records])
    text = explain(analyse(folder.parent), 1, validation, folder)
    assert f"{chance(recipe.task, recipe.facts):.0%} of the time" in text
    commands = re.findall(r"^ *python eval\.py (.*)$", text, re.M)
    said = re.search(r'In one of them "(.*)" is right. no_fs says "(.*)", prompt_fs says "(.*)"\.', text)
    assert len(commands) == 2 and said[2] != said[3]
    prompts = []

    def keep_prompt(model, tokens, **more):
        prompts.append(tokens[0].tolist())
        return prefill(model, tokens, **more)

    # these models answer much alike, whatever they read
    monkeypatch.setattr(eval_py, "prefill", keep_prompt)
    for command, arm, answer in zip(commands, ARMS, said.groups()[1:], strict=True):
        assert f"{arm}/model.pth" in command
        assert report_of(capsys, *shlex.split(command)).out == f"{answer}\n"
    apart = [example.prompt for example in validation
             if answers["no_fs"][example.id] != answers["prompt_fs"][example.id]]
    assert prompts == [apart[0], apart[0]]


def test_the_explanation_says_what_came_out(tmp_path):
    """Every number and every word of it follows from the records.

    Catches: shares of the other arm, a difference that is not one, a model said to depend on seed states that
    it does not use, and a single seed that sounds like a verdict.
    """
    recipe = replace(STANDIN["R8"], n_val=20, facts=4)
    validation = validation_examples(recipe)
    folder = write_runs(tmp_path, "R8", [1, 2], 20, source="standin", settings=recipe.settings())

    def explained(right: dict[str, int], off: int) -> str:
        """An explanation where that many of 20 answers are right: the first ones, of no_fs the last ones."""
        def records(count, from_the_end=False, **kind):
            order = reversed(range(20)) if from_the_end else range(20)
            correct = set(list(order)[:count])
            return [{**kind, "id": example.id, "loss": 1.0, "tokens": 1, "correct": int(i in correct),
                     "exact": int(i in correct), "f1": float(i in correct),
                     "text": example.text if i in correct else "nothing"}
                    for i, example in enumerate(validation)]

        for seed in (1, 2):
            for arm in ARMS:
                write_lines(folder / f"seed{seed}" / arm / "records.jsonl",
                            records(right[arm] * (seed == 1), arm == "no_fs", step=recipe.steps))
            write_lines(folder / f"seed{seed}/prompt_fs/controls.jsonl",
                        [line for control in CONTROLS
                         for line in records(off if control == "off" else 20, control=control)])
        return explain(analyse(folder), 1, validation, folder / "seed1")

    text = explained({"no_fs": 5, "prompt_fs": 12}, off=4)
    for words in ("Seed 1 in words: 20 questions on 4 facts each",
                  "Without Future-Seed 25% of the answers are right, with it 60%",
                  "switched off after training, prompt_fs answers 20% right",
                  "So its answers depend on the seed states.", "The arms answer 17 questions differently.",
                  f'In one of them "{validation[0].text}" is right. no_fs says "nothing", prompt_fs says '
                  f'"{validation[0].text}".', "One seed decides nothing"):
        assert words in text, words
    text = explained({"no_fs": 0, "prompt_fs": 12}, off=12)
    assert "its answers do not depend on the seed states. Their gate began at 0.018, from layer 6 on" in text
    assert "python train.py --round S20 --seed 1 --standin" in text
    text = explained({"no_fs": 0, "prompt_fs": 0}, off=0)
    assert "differently" in text and "In one of them" not in text and "eval.py" not in text


# ---- as a picture ------------------------------------------------------------------------------------------

@pytest.fixture
def drawn(monkeypatch):
    """The figure that was drawn last, as matplotlib has it."""
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib: pip install matplotlib")
    figures, savefig = [], figure.Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    return figures


def extents(figure):
    """Where titles, legends and labels lie, in pixels, by panel: the legend first."""
    figure.draw_without_rendering()
    for panel in figure.axes:
        left, right = panel.get_xlim()
        texts = [panel.get_legend(), panel.title, panel.xaxis.label]
        texts += [label for label in panel.get_xticklabels() if left <= label.get_position()[0] <= right]
        if panel.yaxis.label.get_text():
            texts.append(panel.yaxis.label)
        yield [text.get_window_extent() for text in texts]


CASES = {
    "one seed": [("S20", [3], "standin")],
    "twelve seeds near 1.0": [("S20", range(12), "standin")],
    "a real round's metrics": [("R6", range(3), "real")],
    "ARC on real records": [("R2", range(3), "real")],
    "several rounds": [("R6", range(3), "real"), ("S20", range(6), "own"), ("R8", range(2), "standin")],
}


def draw(tmp_path, capsys, case):
    """Fake runs of a case, in which one step of training went wrong, drawn by the command."""
    for name, seeds, source in CASES[case]:
        shift = 0.5 if len(seeds) == 12 else 0.2
        folder = write_runs(tmp_path, name, seeds, 12, source=source, shift=shift, settings={"steps": 40})
        metrics = folder / f"seed{seeds[0]}" / "no_fs/metrics.jsonl"
        lines = read_lines(metrics)
        lines[7]["train_loss"], lines[9]["train_loss"] = 1e6, math.nan
        write_lines(metrics, lines)
    path = tmp_path / "picture.png"
    names = [name for name, _, _ in CASES[case]]
    captured = report_of(capsys, *names, "--plot", path, "--runs", tmp_path)
    assert captured.err == f"{path} is drawn\n" and "verdict" in captured.out
    return path.read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_a_picture_shows_every_seed(tmp_path, capsys, drawn, case):
    """Every score and every loss of every seed is drawn at its place, and a title says whose questions these
    are.

    Catches: a seed or an arm that is lost, a metric or control of another, the chance of a guess where nobody
    guesses, runs of the stand-in that look like the real thing, a scale that one bad step decides.
    """
    draw(tmp_path, capsys, case)
    panels = drawn[0].axes
    for (name, seeds, source), scores, losses in zip(CASES[case], panels[::2], panels[1::2], strict=True):
        result = analyse(tmp_path / FOLDERS[source] / name)
        title = {"real": name, "own": f"{name}, OWN DATA", "standin": f"{name}, ON THE STAND-IN"}[source]
        assert scores.get_title().startswith(f"{title}, {len(seeds)} seed")
        rows = [label.get_text() for label in scores.get_yticklabels()]
        if source == "standin":
            assert rows == ["acc"]
        elif name == "R2":
            assert rows == ["acc", "EM"]    # its F1 is its EM
        else:
            assert rows == ["acc", "EM", "F1"]
        marks = {}    # mark and row -> scores
        for line in scores.lines:
            marks[line.get_marker(), round(float(line.get_ydata()[0]))] = list(line.get_xdata())
        for place, metric in enumerate(rows):
            for mark, arm in (("o", "no_fs"), ("D", "prompt_fs")):
                assert marks[mark, place] == [line[metric][arm] for line in result["per_seed"]]
        assert marks["x", 0] == result["controls"]["off"]
        guesses = [line.get_xdata()[0] for line in scores.lines if line.get_linestyle() == ":"]
        expected = []
        if source == "standin":
            expected = [chance(result["task"], result["settings"]["facts"])]
        assert guesses == expected
        assert len(losses.lines) == 4 * len(seeds)
        assert "cut at" in losses.get_title() and losses.get_ylim()[0] == 0 and 1 < losses.get_ylim()[1] < 30
        for training, validation in zip(losses.lines[::2], losses.lines[1::2]):
            assert list(training.get_xdata()) == list(range(1, 41))
            assert list(validation.get_xdata()) == [0, 40]


@pytest.mark.parametrize("case", ["twelve seeds near 1.0", "several rounds"])
def test_nothing_in_a_picture_lies_over_anything_else(tmp_path, capsys, drawn, case):
    """Catches: a legend over a label, and letters beyond the edge."""
    png = draw(tmp_path, capsys, case)
    box = drawn[0].bbox
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (round(box.width * 1.1), round(box.height * 1.1))
    for boxes in extents(drawn[0]):
        assert all(0 <= b.x0 and b.x1 <= box.width and 0 <= b.y0 and b.y1 <= box.height for b in boxes)
        for place, one in enumerate(boxes):
            assert not any(one.overlaps(other) for other in boxes[:place])


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    """Catches: a traceback, and a report that is lost because it cannot be drawn."""
    write_runs(tmp_path, "R8")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out, err = report_of(capsys, "R8", "--runs", tmp_path, "--plot", tmp_path / "x.png", code=2)
    assert err == "error: --plot needs matplotlib: pip install matplotlib\n"
    assert "verdict on d_acc" in out and not list(tmp_path.glob("*.png"))


def test_a_picture_is_drawn_whole_or_not_at_all(tmp_path, capsys, drawn):
    """Catches: a picture that replaces the last one with nothing, or that hides what is damaged."""
    folder = write_runs(tmp_path, "R8", settings={"steps": 4})
    path = tmp_path / "pictures/x.png"
    report_of(capsys, "R8", "--runs", tmp_path, "--plot", path)
    before = path.read_bytes()
    metrics = folder / "seed1/no_fs/metrics.jsonl"
    whole = metrics.read_text()
    for damage in (whole[:-9], whole.replace('"train_loss": ', '"train_loss": "x'), "[]", ""):
        metrics.write_text(damage)
        err = report_of(capsys, "R8", "--runs", tmp_path, "--plot", path, code=2).err
        assert err.startswith(f"error: {metrics} is damaged") and err.count("\n") == 1, damage
    metrics.write_text(whole)
    err = report_of(capsys, "R8", "--runs", tmp_path, "--plot", metrics / "x.png", code=2).err
    assert err.startswith(f"error: {metrics / 'x.png'} cannot be written") and err.count("\n") == 1
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["x.png"]
