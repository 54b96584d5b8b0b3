"""study/outside.py: runs become one file, and the pages say what that file says."""

import json
import sys

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "study"))
import outside    # noqa: E402
from tasks import ASK, TASKS, comes_later    # noqa: E402

RUNS = outside.read_runs()
PAGE = (ROOT / "study" / "OUTSIDE.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_numbers():
    """Catches: a digit that was mistyped, a table that was not made anew after more seeds."""
    assert outside.table(RUNS) in PAGE


def test_the_studys_page_repeats_the_table():
    """The study's own page has the first columns of the table: both arms, the difference and the verdict.

    Catches: one page brought up to date and the other forgotten.
    """
    assert outside.table(RUNS, columns=4) in (ROOT / "study" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", outside.ROWS, ids=lambda row: row.title)
def test_scores_are_those_that_the_run_printed(row):
    """A score computed from a run's answers is the last point of its curve.

    Catches: answers in another order than the test's, one arm's answers under the other's name.
    """
    for run in outside.of_row(row, RUNS):
        for arm in (outside.PLAIN, outside.FS):
            printed = run["curve"][str(TASKS[run["task"]].steps)][f"{outside.in_curve(row.score)}, {arm}"]
            # of directional the curve has the share of queries, and the table the mean over texts
            tolerance = 0.02 if run["task"] == "directional" else 1e-4
            assert outside.share_right(row.score, run, arm).mean() == pytest.approx(printed, abs=tolerance)


def test_new_runs_are_added_and_none_is_replaced(tmp_path, monkeypatch):
    """Runs join those that are there, each with the commit that ran it; a seed that is there is refused.

    Catches: a published run replaced by another try of its seed, all runs said to be of the newest commit.
    """
    monkeypatch.setattr(outside, "HERE", tmp_path)
    (tmp_path / "outside.json").write_text(json.dumps([{"task": "recall", "seed": 20, "code": "old"}]))
    lines = tmp_path / "runs.jsonl"
    lines.write_text('{"task": "recall", "seed": 19}\n{"task": "needle", "seed": 30}\n')
    outside.collect(lines, "new")
    assert [(run["task"], run["seed"], run["code"]) for run in outside.read_runs()] == [
        ("needle", 30, "new"), ("recall", 19, "new"), ("recall", 20, "old")]
    before = (tmp_path / "outside.json").read_bytes()
    with pytest.raises(SystemExit, match="recall of seed 19"):
        outside.collect(lines, "newer")
    assert (tmp_path / "outside.json").read_bytes() == before


def test_wrong_answers_are_sorted_by_whose_thing_they_are(monkeypatch):
    """One text, three answers: a neighbour's thing, another pair's, and a thing that is nowhere in the text.

    Catches: a query beside the right pair taken for a pair, the right pair counted as its own neighbour.
    """
    n1, n2, n3, n4 = 10, 11, 12, 13
    t1, t2, t3, t4, nowhere = 80, 81, 82, 83, 90
    inputs = np.array([[n1, ASK, n2, ASK, n3, ASK, n4, t4, n1, t1, n2, t2, n4, ASK, n3, t3]])
    targets = np.full_like(inputs, outside.SILENT)
    targets[0, [1, 3, 5, 13]] = [t1, t2, t3, t4]
    assert comes_later(inputs)[0].nonzero()[0].tolist() == [1, 3, 5]
    monkeypatch.setattr(outside, "test_of", lambda task: (inputs, targets))
    # t2 is of a neighbour of n1's pair, t4 of no neighbour of n2's; n4's query is not counted
    run = {"task": "directional", "said": {"plain": [t2, t4, nowhere, nowhere]}}
    shares = outside.wrong_answers([run], "plain")
    assert (shares["beside"], shares["another"], shares["none"], shares["wrong"]) == (
        pytest.approx(1 / 3, abs=1e-3), pytest.approx(1 / 3, abs=1e-3), pytest.approx(1 / 3, abs=1e-3), 3)
