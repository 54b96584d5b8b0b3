"""runs.py: what a run is, when two runs can be compared, and that nothing damaged is ever averaged.

The runs are fakes (fake_runs.py), and damage of a run's files is tested here and nowhere else: first file by
file, then by mutating files at random places and calling the command eval.py as a user would.
"""

import copy
import functools
import json
import os
import random
import re
import shutil

import pytest

import eval as eval_py
import report
from fake_runs import HERE, REAL, change_lines, change_run, change_text, identity_of, read_lines, write_runs
from rounds import load_rounds
from runs import (ARMS, CONTROLS, METRICS, RUN, check_comparable, check_shape, copy_identical_no_fs,
                  read_round, read_run, seeds_on_disk, status_of)


# ---- types -------------------------------------------------------------------------------------------------

def leaves_of(value, shape, name="it", put=None):
    """Every place in a value for which its shape states a type, as (name, type, function that changes it)."""
    if isinstance(shape, dict):
        for key, inner in shape.items():
            yield from leaves_of(value[key], inner, key, functools.partial(value.__setitem__, key))
    elif isinstance(shape, list):
        for place, entry in enumerate(value):
            yield from leaves_of(entry, shape[0], f"an entry of {name}",
                                 functools.partial(value.__setitem__, place))
    else:
        yield name, shape, put


def test_a_value_has_its_shape_all_the_way_down():
    """A value of the stated types passes, and with any one place of another type, or without it, it does not.

    Catches: True taken for 1, 1.0 for an int, a whole number refused as a float, None where it is no choice,
    only the first entry of a list looked at, a nested dict not looked at, a missing key.
    """
    shape = RUN | {"list": [{"deep": [float]}]}
    whole = identity_of() | {"status": "done", "steps": 1, "seconds": 2,
                             "history": [{"from_step": 0, **HERE}, {"from_step": 1, **HERE}],
                             "list": [{"deep": [1.5, 2]}, {"deep": []}]}
    check_shape(whole, shape)
    check_shape(whole | {"minutes": 8}, shape)
    count = len(list(leaves_of(whole, shape)))
    for place in range(count):
        for wrong in (True, None, 1.0, 1, "1", [], {}):
            value = copy.deepcopy(whole)
            name, kind, put = list(leaves_of(value, shape))[place]
            choices = kind if isinstance(kind, tuple) else (kind,)
            right = any(choice is type(wrong) or choice is wrong for choice in choices)
            if right or (float in choices and type(wrong) is int):
                continue
            put(wrong)
            with pytest.raises(ValueError, match=f"{name} is .* not of type"):
                check_shape(value, shape)
    for key in shape:
        with pytest.raises(ValueError, match=f"has no '{key}'"):
            check_shape({other: part for other, part in whole.items() if other != key}, shape)
    with pytest.raises(ValueError):
        check_shape([whole], shape)


# ---- reading back ------------------------------------------------------------------------------------------

def scores_in(path, **kind):
    """The scores of one evaluation, as they stand in the file: example id -> metric -> value."""
    return {line["id"]: {"acc": line["correct"] / line["tokens"], "loss": line["loss"], "EM": line["exact"],
                         "F1": line["f1"]}
            for line in read_lines(path) if kind.items() <= line.items()}


@pytest.mark.parametrize("source", ["real", "own", "standin"])
def test_a_round_comes_back_as_written(tmp_path, source):
    """Every score is that of its seed, arm, question and last evaluation, whatever the order of the lines.

    Catches: scores that land at another question, arm, seed or step, a control in the place of another, and
    the seeds of a stand-in refused because each has its own base and questions.
    """
    folder = write_runs(tmp_path, seeds=(10, 2), n=5, source=source)
    for path in folder.glob("*/*/records.jsonl"):
        change_text(path, lambda text: "".join(reversed(text.splitlines(keepends=True))))
    found, notes, damaged = read_round(folder)
    assert (list(found), notes, damaged) == ([2, 10], [], [])
    for seed, both in found.items():
        for arm in ARMS:
            place = folder / f"seed{seed}" / arm
            last = json.loads((place / "run.json").read_text())["steps"]
            assert both.runs[arm] == read_run(place)
            assert both.evaluations[arm] == scores_in(place / "records.jsonl", step=last)
            assert all(tuple(scores) == METRICS for scores in both.evaluations[arm].values())
        for control in CONTROLS:
            expected = scores_in(folder / f"seed{seed}/prompt_fs/controls.jsonl", control=control)
            assert both.controls[control] == expected
    assert list(read_round(folder, seeds=[10])[0]) == [10]


def test_the_seeds_of_a_folder(tmp_path):
    """Catches: seed02 read as another seed 2, a copy named seed2.old, a file, a superscript as a digit."""
    for name in ("seed2", "seed10", "seed02", "seed-1", "seed", "seed2.old", "seed²", "seed" + 30 * "9"):
        (tmp_path / name).mkdir()
    (tmp_path / "seed3").write_text("no folder")
    assert seeds_on_disk(tmp_path) == [2, 10] and seeds_on_disk(tmp_path / "none") == []


def test_unfinished_seeds_are_left_out_with_a_note(tmp_path):
    """Catches: a seed averaged at whatever step it has reached, and one that disappears without a word."""
    folder = write_runs(tmp_path, seeds=range(4), n=2)
    change_run(folder / "seed0/no_fs", status="running", steps=5)
    missing = folder / "seed1/prompt_fs/run.json"
    missing.unlink()
    found, notes, damaged = read_round(folder, seeds=[0, 1, 2, 3, 4])
    assert list(found) == [2, 3] and damaged == []
    reasons = {0: "no_fs stands at step 5", 1: str(missing), 4: "seed4/no_fs"}
    for (seed, reason), note in zip(reasons.items(), notes, strict=True):
        assert note.startswith(f"seed {seed} is left out, because it is not finished") and reason in note
    with pytest.raises(FileNotFoundError, match="R6 has no finished seed: no runs"):
        read_round(tmp_path / "R6")


@pytest.mark.parametrize("file", ["no_fs/records.jsonl", "prompt_fs/controls.jsonl"])
def test_a_finished_seed_that_lost_a_file_is_damaged(tmp_path, file):
    """run.json is written last, so a run that is done had all its files. Catches: a finished seed that is
    left out as unfinished, with exit code 0, because its records were deleted."""
    folder = write_runs(tmp_path, seeds=(0, 1), n=2)
    path = folder / "seed0" / file
    path.unlink()
    found, notes, damaged = read_round(folder)
    assert list(found) == [1] and notes == []
    assert damaged == [f"{path} is missing. Run this arm again with --fresh."]


BIG, DEEP = "1" + 400 * "0", "[" * 100_000
# what is replaced in a file (the first place that matches), and by what
ANY_FILE = [("(?s).*", ""), ("(?s).*", "[]"), ("(?s).*", "\x00"), ("^", DEEP), (r"\}\s*$", "")]
IN_RUN = [('"seed": 0', f'"seed": {BIG}'), ('"seed": 0', '"seed": 1'), ('"seed": 0', '"seed": "0"'),
          ('"round": "R8"', '"round": "R6"'), ('"arm": "', '"arm": "x'), ('"status"', '"other"'),
          ('"done"', '"almost"'), ('"source": "real"', '"source": "dream"'),
          (r'"steps": 2000,\n "s', '"steps": -1,\n "s'),
          ('"minutes": null', '"minutes": NaN'), ('"minutes": null', '"minutes": -8'), ('"lr": ', '"rl": '),
          (r'"history": \[[^]]*\]', '"history": []'), (r'"questions_cut": 0', '"questions_cut": -1'),
          ('"lr": [^,]*', '"lr": true'), ('"task": "hotpotqa"', '"task": "chess"')]
IN_LINES = [(f'"loss": [^,]*', f'"loss": {loss}') for loss in (BIG, "NaN", "Infinity", "-1.0", '"1"')]
IN_LINES += [('"tokens": 4, "correct": .', f'"tokens": 4, "correct": {BIG}'),
             ('"tokens": 4, "correct": .', '"tokens": 0, "correct": 0'),
             ('"tokens": 4, "correct": .', '"tokens": 4, "correct": 5'),
             ('"exact": .', '"exact": 0.5'), ('"f1": [^,]*', '"f1": 1.1'), ('"id": "q1"', '"id": null'),
             ("^(.*\n)", r"\1\1"),    # an example twice
             ("^.*\n", "")]           # an evaluation lacks one
IN_RECORDS = [('"step": 0', '"step": []'), ('"step": 0', '"step": 2000'), ('"step": 2000', '"step": 1999')]
IN_CONTROLS = [('"control": "other"', '"control": "odd"'), (r'(?s)^.*?\n(?=[^\n]*"other")', "")]
DAMAGES = ([("run.json", *damage) for damage in ANY_FILE + IN_RUN]
           + [("records.jsonl", *damage) for damage in ANY_FILE + IN_LINES + IN_RECORDS]
           + [("controls.jsonl", *damage) for damage in ANY_FILE + IN_LINES + IN_CONTROLS])


@pytest.mark.parametrize("file", ["run.json", "records.jsonl", "controls.jsonl"])
def test_a_damaged_seed_is_left_out_and_told(tmp_path, file):
    """One line names the file, and the other seeds are read all the same.

    Catches: a damaged file averaged, a traceback, a value that cannot be, one bad seed that hides the others,
    and a byte-order mark or a line separator inside a string taken for damage.
    """
    folder = write_runs(tmp_path, seeds=(0, 1), n=3)
    path = folder / "seed0" / ("prompt_fs" if file == "controls.jsonl" else "no_fs") / file
    whole = path.read_text()
    for name, pattern, new in DAMAGES:
        if name == file:
            path.write_text(re.sub(pattern, new, whole, count=1))
            assert path.read_text() != whole, pattern
            found, notes, damaged = read_round(folder)
            assert (list(found), notes, len(damaged)) == ([1], [], 1), (pattern, new)
            assert str(path) in damaged[0] or f"{folder / 'seed0'}: its arms" in damaged[0]
            assert "\n" not in damaged[0] and "--fresh" in damaged[0] and len(damaged[0]) < 400
    with pytest.raises(FileNotFoundError, match="R8 has no finished seed: .*seed0"):
        read_round(folder, seeds=[0])
    path.write_text("\ufeff" + whole.replace("wrong", "wrong\u2028\x85"), encoding="utf-8")
    assert list(read_round(folder)[0]) == [0, 1]


@pytest.mark.parametrize("file", ["run.json", "records.jsonl", "controls.jsonl"])
def test_a_pipe_is_no_file(tmp_path, file):
    """Catches: a report that waits for ever, because somebody put a pipe where a file should be."""
    folder = write_runs(tmp_path, seeds=(0, 1), n=2)
    path = folder / "seed0/prompt_fs" / file
    path.unlink()
    os.mkfifo(path)
    found, _, damaged = read_round(folder)
    assert list(found) == [1] and f"{path} is damaged" in damaged[0] and "not a regular file" in damaged[0]


# ---- what can be compared ----------------------------------------------------------------------------------

UNLIKE = [({"settings": {"lr": 0.1}}, "settings.lr is 3e-05 .*, 0.1"),
          ({"minutes": 8.0}, "minutes is None .*8.0"),
          ({"base": {"name": "mine.pth", "sha256": "x"}}, "base.name .*mine.pth"),
          ({"data": {"train": "train", "validation": "x", "questions_cut": 0}}, "data.validation .* x"),
          ({"source": "own"}, "source is real .*own")]


@pytest.mark.parametrize("changes, words", [*UNLIKE, ({"n": 4}, "questions")])
def test_unlike_runs_are_refused(tmp_path, changes, words):
    """Catches: seeds or arms averaged that differ in more than their seed."""
    folder = write_runs(tmp_path, seeds=(0,), n=5)
    place = write_runs(tmp_path / "other", seeds=(1,), **{"n": 5} | changes) / "seed1"
    shutil.move(place, folder / "seed1")
    with pytest.raises(ValueError, match=f"seeds 0 and 1 cannot be compared: .*{words}"):
        read_round(folder)
    for name in ("run.json", "records.jsonl"):
        whole = (folder / "seed0/no_fs" / name).read_text()
        (folder / "seed1/no_fs" / name).write_text(whole.replace('"seed": 0', '"seed": 1'))
    damage, = read_round(folder)[2]
    assert re.search(f"seed1: its arms .*{words}", damage) and "--fresh" in damage


def test_what_may_differ_is_told(tmp_path):
    """Catches: runs of other code or another machine averaged in silence, also where only the end of one arm
    ran there, and arms by minutes refused because one took more steps."""
    folder = write_runs(tmp_path, seeds=(0, 1), n=2, minutes=8.0)
    elsewhere = {"from_step": 5, "code": "new", "machine": HERE["machine"] | {"threads": 2}}
    change_run(folder / "seed1/prompt_fs", steps=3000, history=[{"from_step": 0, **HERE}, elsewhere])
    change_lines(folder / "seed1/prompt_fs/records.jsonl", lambda line: {"step": line["step"] * 3 // 2})
    found, (note,), _ = read_round(folder)
    assert list(found) == [0, 1] and note.startswith("seed 1 ran on another machine or code than seed 0: ")
    assert "code is c0de there, new here" in note and "machine.threads is 1 there, 2 here" in note


@pytest.mark.parametrize("source", ["real", "standin"])
def test_a_run_that_could_not_be_compared_is_refused_before_it_starts(tmp_path, source):
    """A run is held against the sibling arm and against the other seeds, but for what this command replaces.

    Catches: tens of hours trained first and then "cannot be compared"; a run held against itself, or against
    runs that --fresh deletes; the base of another seed of a stand-in taken for a difference; and damage of
    another seed that keeps this one from running.
    """
    folder = write_runs(tmp_path, "S20", seeds=(1, 2), n=2, source=source)
    both, changed = list(ARMS), {"lr": 0.5}

    def refused(seed, arms, replaced=(), settings=None, **changes) -> str:
        identity = identity_of("S20", seed, source=source, settings=settings) | changes
        try:
            check_comparable(folder, identity, arms, set(replaced))
        except ValueError as error:
            return str(error)
        return ""

    assert not refused(3, both) and not refused(1, ["prompt_fs"])
    error = refused(3, both, settings=changed)
    assert str(folder / "seed1/no_fs") in error and "settings.lr" in error and "0.5 in this command" in error
    assert refused(3, both, data={"train": "train 3", "validation": "other", "questions_cut": 0})
    assert refused(3, both, {1}, changed) and not refused(3, both, {1, 2}, changed)
    assert "seed1/prompt_fs" in refused(3, ["no_fs"], {1, 2}, changed)    # the other arms stay
    shutil.rmtree(folder / "seed2")
    assert not refused(1, both, settings=changed)    # status_of asks whether this is the same run
    for arm, sibling in (ARMS, ARMS[::-1]):
        assert str(folder / "seed1" / sibling) in refused(1, [arm], {1}, changed)
        assert refused(1, [arm], base={"name": "stand-in", "sha256": "another"})
        assert refused(1, [arm], data={"train": "x", "validation": "validation", "questions_cut": 0})
    change_text(folder / "seed1/no_fs/run.json", lambda text: "{")
    assert not refused(1, ["prompt_fs"], settings=changed)


def test_another_run_is_refused_in_one_short_line(tmp_path):
    """Catches: a finished run overwritten by another, an order of keys taken for a difference, and an error
    of a thousand characters or of several lines."""
    folder, wanted = write_runs(tmp_path, seeds=(0,), n=2) / "seed0/no_fs", identity_of()
    change_run(folder, settings=dict(reversed(wanted["settings"].items())))
    assert status_of(folder, wanted) == "done" and status_of(folder / "seed9", wanted) == "absent"
    for changes, words in UNLIKE:
        other = wanted | {key: wanted[key] | value if key == "settings" else value
                          for key, value in changes.items()}
        with pytest.raises(ValueError, match=f"no_fs already contains a different run: .*{words}"):
            status_of(folder, other)
    one, other = ({"base": {"name": f"{letter}\n" * 400, "sha256": letter * 64},
                   "data": {"train": letter * 64, "validation": letter * 64, "questions_cut": 0}}
                  for letter in "xy")
    change_run(folder, **one)
    advice = "and 1 more. Use --fresh to overwrite it, or another --runs DIR"
    with pytest.raises(ValueError, match=advice) as caught:
        status_of(folder, wanted | other)
    message = str(caught.value).replace(str(folder), "runs/standin/R8/seed0/no_fs")
    assert len(message) < 350 and "\n" not in message


def test_an_identical_arm_of_another_round_is_copied_whole_or_not_at_all(tmp_path):
    """R8's no_fs differs from R6's in Future-Seed's settings alone, so R6's is taken over.

    Catches: a copy of what is cut, unfinished or lacks a file, of a run that other code or another machine
    made or took part in, of other settings, data or minutes, of prompt_fs, or over a run that has begun.
    """
    source = write_runs(tmp_path, "R6", seeds=(0,), n=2) / "seed0/no_fs"
    write_runs(tmp_path, "R4", seeds=(0,), n=2, minutes=1.0)    # these depend on the clock
    folder = tmp_path / "R8/seed0/no_fs"
    folder.parent.mkdir(parents=True)
    settings = REAL["R6"].settings() | {"fs_layer_start": 1, "alpha_init": 0.5}

    def copied(surroundings=HERE, folder=folder, changed=(), **changes) -> bool:
        identity = identity_of("R8", 0, folder.name, settings=settings | dict(changed)) | changes
        done = copy_identical_no_fs(folder, identity, surroundings)
        assert os.listdir(folder.parent) == [folder.name] * done
        return done

    assert not copied(HERE | {"code": "other"}) and not copied(HERE | {"machine": {"cpu": "AVX512"}})
    assert not copied(changed={"lr": 1.0}) and not copied(minutes=1.0)
    assert not copied(data={"train": "x", "validation": "validation", "questions_cut": 0})
    assert not copied(folder=folder.with_name("prompt_fs"))
    for name in ("run.json", "records.jsonl", "model.pth"):
        (source / name).rename(tmp_path / "away")
        assert not copied(), name
        (tmp_path / "away").rename(source / name)
    records, run = (source / "records.jsonl").read_text(), (source / "run.json").read_text()
    for cut in (records[:-9], records[:records.rindex('{"step"')], ""):
        (source / "records.jsonl").write_text(cut)
        assert not copied()
    (source / "records.jsonl").write_text(records)
    there = {"from_step": 0, **HERE}
    for changes in ({"status": "running"}, {"history": [there, there]}, {"steps": 5}):
        change_run(source, **changes)
        assert not copied()
        (source / "run.json").write_text(run)
    assert copied()
    expected = identity_of("R8", settings=settings)
    assert read_run(folder) == {**json.loads(run), **expected, "copied_from": "R6"}
    for name in ("records.jsonl", "metrics.jsonl", "model.pth"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    (folder / "run.json").unlink()
    assert not copy_identical_no_fs(folder, expected, HERE)    # somebody may have begun to train there


# ---- the command, on mutated files -------------------------------------------------------------------------

# JSON texts: every type, numbers out of range, text that a terminal or a path cannot take, nests
VALUES = ["null", "true", "false", "0", "1", "-1", "2", "7", "-0.0", "0.5", "1e308", "-1e999", "NaN", BIG,
          "1" + 5000 * "0", '""', '"x"', '"a\\nb"', '"\\ud800"', '"\\u0000"', '"\\u2028\\u001b[2J"',
          '"../../x"', '"no_fs"', '"prompt_fs"', '"standin"', '"done"', '"running"', '"arc"', "[]", "[null]",
          "[[1]]", "{}", '{"x": 1}', '{"train": "t"}', "[" * 400 + "]" * 400,
          '{"x":' * 400 + "1" + "}" * 400, DEEP,
          '"' + 100_000 * "y" + '"']


def places_in(value, path=()):
    """The paths of everything inside a JSON value: ("settings",), ("settings", "lr"), ("history", 0), ..."""
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    else:
        inner = ()
    for key, part in inner:
        yield (*path, key)
        yield from places_in(part, (*path, key))


def mutated(value, path, text: str | None) -> str:
    """A JSON value as text, with the JSON `text` in the place at `path`, or without that place."""
    value = json.loads(json.dumps(value))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if text is None:
        del parent[path[-1]]
    else:
        parent[path[-1]] = "HERE"
    return json.dumps(value).replace('"HERE"', text or "")


@pytest.fixture
def report_on(monkeypatch, capsys):
    """Run eval.py's `main` on a folder of runs; what it printed, after checking that it ended as it may."""
    rounds = load_rounds()
    for module in (eval_py, report):
        monkeypatch.setattr(module, "load_rounds", lambda: rounds)    # read once, not 2,000 times

    def run(runs, culprit, *more):
        name = culprit.parent.name
        code = eval_py.main([name, "--runs", str(runs), *more])
        out, err = capsys.readouterr()
        assert code in (0, 2)
        if code == 0:
            assert not err and out
        else:
            assert err.startswith("error: ") and err.count("\n") == 1 and str(culprit) in err
            assert len(err) < 600
        if out and "--json" in more:
            json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        return code

    return run


def test_mutated_runs_are_reported_or_refused(tmp_path, report_on):
    """Any field of run.json may hold any JSON value, or be gone, alike in both arms, in 2,000 ways: eval.py
    reports or says in one line which file is wrong.

    Catches: a value of an unforeseen kind that ends in a traceback, hides which file it stands in, makes
    several lines of an error or a NaN of a report, or loses the report because a terminal cannot show it.
    """
    rng = random.Random(1)
    mutations, of_settings = [], []
    run = identity_of("S20", 1) | {"status": "done", "steps": 2, "history": [{"from_step": 0, **HERE}]}
    for path in places_in(run):
        group = of_settings if path[0] == "settings" else mutations
        group += [(path, text) for text in [None, *VALUES]]
    mutations += rng.sample(of_settings, 2000 - len(mutations))    # settings are many, and much alike
    refused = 0
    for source, part in ("real", mutations[::2]), ("standin", mutations[1::2]):
        folder = write_runs(tmp_path, "S20", seeds=(1,), n=2, source=source, settings={"steps": 2}) / "seed1"
        runs = {arm: json.loads((folder / arm / "run.json").read_text()) for arm in ARMS}
        for path, text in part:
            for arm in ARMS:
                (folder / arm / "run.json").write_text(mutated(runs[arm], path, text))
            try:
                refused += report_on(tmp_path, folder, *rng.choice([[], ["--json"]])) == 2
            except Exception as error:
                raise AssertionError(f"{path} {text and text[:80]}") from error
        shutil.rmtree(folder)
    assert len(mutations) == 2000 and refused > 1000


@pytest.mark.parametrize("file", ["records.jsonl", "controls.jsonl"])
def test_mutated_records_are_reported_or_refused(tmp_path, file, report_on):
    """The same for a line of records or controls, whose every field may hold any JSON value or be gone, and
    for a file that is cut anywhere or whose lines are lost or come twice.

    Catches: a score that cannot be, averaged; an error that does not say where the damage is.
    """
    folder = write_runs(tmp_path, seeds=(1,), n=3, settings={"steps": 2}) / "seed1"
    path = folder / "prompt_fs" / file
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    rng = random.Random(2)
    files = [whole[:rng.randrange(len(whole))] for _ in range(40)]
    files += ["".join(rng.choices(lines, k=len(lines))) for _ in range(20)]
    for place in places_in(json.loads(lines[0])):
        for text in [None, *rng.sample(VALUES, 15)]:
            line = rng.randrange(len(lines))
            files.append("".join([*lines[:line], mutated(json.loads(lines[line]), place, text) + "\n",
                                  *lines[line + 1:]]))
    assert len(files) > 200
    for content in files:
        path.write_text(content)
        try:
            report_on(tmp_path, folder, *rng.choice([[], ["--json"]]))
        except Exception as error:
            raise AssertionError(content[:2000]) from error
