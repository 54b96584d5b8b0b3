"""Tasks that others made: runs of from_scratch.py into two tables and two figures.

    python study/from_scratch.py needle --seed 20 --out runs.jsonl    a line a run, both arms in it
    python study/outside.py collect runs.jsonl COMMIT                 adds them to outside.json
    python study/outside.py                                           outside.json -> tables and figures

outside.json holds each run's accuracy over its steps and what both arms said to the test at the end. The test
is not in it: from_scratch.py draws it again. Figures need matplotlib.
Shapes: S seeds, B sequences in the test, T tokens in a sequence.
"""

import functools
import json
import math
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

from from_scratch import TEST, TEST_SEED    # noqa: E402
from files import atomic_write    # noqa: E402
from stats import holm, judge, sign_test    # noqa: E402
from tasks import ASK, SILENT, TASKS, comes_later    # noqa: E402

PLAIN, FS = "plain", "Future-Seed"


class Row(NamedTuple):
    """A row of the table."""
    title: str
    score: str    # a task, and of directional and sudoku which of their two scores
    seeds: range = range(20, 40)
    registered: bool = False    # as a comparison of its own, whose p-value stands as it is


ROWS = [
    Row("needle, question last (primary), seeds 20 to 29", "needle", range(20, 30), registered=True),
    Row("needle, question last, seeds 30 to 39", "needle", range(30, 40), registered=True),
    Row("needle, question last, all twenty", "needle"),
    Row("needle, question first", "needle-first"),
    Row("needle, question at both ends", "needle-both"),
    Row("needle, read twice", "needle-twice"),
    Row("intersection, long list first", "intersection"),
    Row("intersection, short list first", "intersection-short"),
    Row("recall, queries after their pairs (control)", "recall"),
    Row("directional, pair before its query", "directional before"),
    Row("directional, pair after its query", "directional later"),
    Row("sudoku, whole boards", "sudoku boards"),
    Row("sudoku, cells", "sudoku cells"),
]


def collect(path: Path, commit: str) -> None:
    """Adds the runs of a file of JSON lines to outside.json, as run by this commit on this machine.

    SystemExit where a seed of a task is there already; then outside.json stays as it is.
    """
    new = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    machine = (f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread, "
               f"torch {torch.__version__}")
    runs = read_runs() + [run | {"code": commit, "machine": machine} for run in new]
    of_run = [(run["task"], run["seed"]) for run in runs]
    twins = {f"{task} of seed {seed}" for task, seed in of_run if of_run.count((task, seed)) > 1}
    if twins:
        raise SystemExit(f"{', '.join(sorted(twins))}: twice in {path} and outside.json; nothing was written")
    order = list(TASKS)
    runs.sort(key=lambda run: (order.index(run["task"]), run["seed"]))
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    with atomic_write(HERE / "outside.json", "w") as file:
        file.write(f"[\n{lines}\n]\n")
    print(f"{len(new)} runs added to {HERE / 'outside.json'}, which now holds {len(runs)}")


def read_runs() -> list[dict]:
    return json.loads((HERE / "outside.json").read_text(encoding="utf-8"))


# ---- answers into scores -----------------------------------------------------------------------------------

@functools.cache
def test_of(task: str) -> tuple[np.ndarray, np.ndarray]:
    """A task's test, as from_scratch.py draws it: inputs and targets (B, T)."""
    return TASKS[task].make(np.random.default_rng(TEST_SEED), TEST, TASKS[task].last)


def said_at(run: dict, arm: str, targets: np.ndarray) -> np.ndarray:
    """What an arm said, (B, T); SILENT where nothing was to be said."""
    said = np.full_like(targets, SILENT)
    said[targets != SILENT] = run["said"][arm]
    return said


def share_right(score: str, run: dict, arm: str) -> np.ndarray:
    """For each sequence of the test that has something of this score in it, the share that is right."""
    inputs, targets = test_of(run["task"])
    counted = targets != SILENT
    right = said_at(run, arm, targets) == targets
    if score == "directional before":
        counted &= ~comes_later(inputs)
    if score == "directional later":
        counted &= comes_later(inputs)
    if score == "sudoku boards":
        return (right | ~counted).all(axis=1).astype(float)
    has_any = counted.any(axis=1)
    return ((right & counted).sum(axis=1) / counted.sum(axis=1).clip(min=1))[has_any]


def of_row(row: Row, runs: list[dict]) -> list[dict]:
    """The runs of this row, in the order of their seeds."""
    return [run for run in runs if run["task"] == row.score.split()[0] and run["seed"] in row.seeds]


def both_arms(row: Row, runs: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Both arms' share right in a row's runs, (S, B) each."""
    own = of_row(row, runs)
    return tuple(np.array([share_right(row.score, run, arm) for run in own]) for arm in (PLAIN, FS))


# ---- the table ---------------------------------------------------------------------------------------------

def in_short(values) -> str:
    reached = sum(value >= 0.95 for value in values)
    return f"{np.median(values):.3f}, {min(values):.3f}, {reached} of {len(values)}"


def in_curve(score: str) -> str:
    """A score's name in the curves of from_scratch.py."""
    return score.partition(" ")[2] or "right"


def halfway(row: Row, runs: list[dict], arm: str) -> str:
    """The median over seeds of the step at which the curve is first at 0.5 or more."""
    title = f"{in_curve(row.score)}, {arm}"
    steps = []
    for run in of_row(row, runs):
        reached = [int(step) for step, shares in run["curve"].items() if shares[title] >= 0.5]
        steps.append(min(reached, default=math.inf))
    median = np.median(steps)
    if math.isinf(median):
        return "never"
    return f"{median:.0f}"


def table(runs: list[dict], columns: int | None = None) -> str:
    """Both arms, the verdict on the typical seed and the sign test, for each row that has runs.

    With `columns`, only so many of the columns, from the left.
    """
    rows = [row for row in ROWS if of_row(row, runs)]
    lines, p_values = [], []
    for row in rows:
        plain, with_fs = both_arms(row, runs)
        x = with_fs - plain
        deltas = x.mean(axis=1)
        verdict, low, high = judge(x)
        lines.append([row.title, in_short(plain.mean(axis=1)), in_short(with_fs.mean(axis=1)),
                      f"{np.median(deltas):+.3f} [{low:+.3f}, {high:+.3f}]: **{verdict}**",
                      f"{(deltas > 0).sum()} and {(deltas < 0).sum()}",
                      f"{halfway(row, runs, PLAIN)}, {halfway(row, runs, FS)}"])
        p_values.append(sign_test(deltas))
    # what was not registered as a comparison of its own is corrected for the number of such rows
    corrected = iter(holm([p for row, p in zip(rows, p_values) if not row.registered]))
    for row, line, p_value in zip(rows, lines, p_values):
        if row.registered:
            line.append(f"{p_value:.2g} (registered)")
        else:
            line.append(f"{next(corrected):.2g}")
    head = ["task", "plain: median, lowest, at 0.95 or more", "Future-Seed", "difference of the typical seed",
            "seeds that gain and lose", "steps to 0.5, median: plain, Future-Seed", "sign test, p (Holm)"]
    return "".join(f"| {' | '.join(line[:columns])} |\n" for line in [head, ["---"] * len(head), *lines])


def wrong_answers(runs: list[dict], arm: str) -> dict[str, float]:
    """Directional lookup: whose thing is said where a query whose pair comes later is answered wrongly.

    Returns shares of these answers: of a pair beside the right one in the text (beside), of any other pair
    (another), of none (none); how often another pair drawn at random would be beside it (chance); and the
    number of wrong answers (wrong).
    """
    inputs, targets = test_of("directional")
    query = inputs[:, 1::2] == ASK
    counts, chances = {"beside": 0, "another": 0, "none": 0}, []
    for run in runs:
        if run["task"] != "directional":
            continue
        said = said_at(run, arm, targets)
        for b, t in zip(*np.nonzero(comes_later(inputs) & (said != targets))):
            pairs = np.flatnonzero(~query[b])    # the items of this sequence that are pairs
            things = inputs[b, 2 * pairs + 1]
            right = np.flatnonzero(inputs[b, 2 * pairs] == inputs[b, t - 1])[0]
            beside = [things[i] for i in (right - 1, right + 1) if 0 <= i < len(things)]
            chances.append(len(beside) / (len(things) - 1))
            if said[b, t] in beside:
                counts["beside"] += 1
            elif said[b, t] in things:
                counts["another"] += 1
            else:
                counts["none"] += 1
    shares = {kind: round(count / max(1, len(chances)), 3) for kind, count in counts.items()}
    return shares | {"chance": round(float(np.mean(chances)), 3), "wrong": len(chances)}


# ---- figures -----------------------------------------------------------------------------------------------

COLOURS = {PLAIN: "tab:gray", FS: "tab:orange"}


def draw_curves(panel, runs: list[dict], task: str, score: str) -> None:
    """Accuracy over the steps: a thin line a seed, the median thick."""
    own = [run for run in runs if run["task"] == task]
    steps = [int(step) for step in own[0]["curve"]]
    for arm, colour in COLOURS.items():
        curves = np.array([[run["curve"][str(step)][f"{score}, {arm}"] for step in steps] for run in own])
        panel.plot(steps, curves.T, color=colour, linewidth=0.6, alpha=0.5)
        panel.plot(steps, np.median(curves, axis=0), color=colour, linewidth=2.2, label=arm)
    panel.set_ylim(0, 1.03)


def draw_all(runs: list[dict]) -> None:
    from matplotlib.figure import Figure
    # a panel a task. Of a task with several rows it shows the last one: all twenty seeds of needle, the half
    # of directional that a causal model cannot do, the cells of sudoku
    shown = {row.score.split()[0]: row for row in ROWS if of_row(row, runs)}
    rows = math.ceil(len(shown) / 3)
    figure = Figure(figsize=(10, 0.5 + 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, sharey=True, squeeze=False).flatten()
    for place, (task, row) in enumerate(shown.items()):
        draw_curves(panels[place], runs, task, in_curve(row.score))
        title = row.title.removesuffix(" (control)").removesuffix(", all twenty")
        panels[place].set_title(f"{title}\n{len(of_row(row, runs))} seeds", fontsize=8)
        panels[place].tick_params(labelsize=7)
        panels[place].set_xlabel("steps", fontsize=7)
    for panel in panels[len(shown):]:
        panel.set_axis_off()
    figure.supylabel("share right", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=2)
    figure.savefig(HERE / "outside.png", dpi=110)


def draw_directional(runs: list[dict]) -> None:
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    before, later, errors = figure.subplots(1, 3)
    for panel, score, title in ((before, "before", "the pair stands before its query"),
                                (later, "later", "the pair comes after its query")):
        draw_curves(panel, runs, "directional", score)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("steps")
    before.set_ylabel("share right")
    before.legend(fontsize=8)
    kinds = {"beside": "a neighbour's", "another": "another pair's", "none": "none of this text"}
    for place, (arm, colour) in enumerate(COLOURS.items()):
        shares = wrong_answers(runs, arm)
        at = np.arange(3) + 0.4 * place
        errors.bar(at, [shares[kind] for kind in kinds], 0.38, color=colour,
                   label=f"{arm}: {shares['wrong']} wrong")
    errors.set_xticks(np.arange(3) + 0.2, kinds.values(), fontsize=8)
    errors.set_title("whose thing a wrong answer is, pair after query", fontsize=9)
    errors.set_ylim(0, 1)
    errors.legend(fontsize=8)
    figure.savefig(HERE / "directional.png", dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        if len(sys.argv) != 4:
            raise SystemExit("give a file and a commit: python study/outside.py collect runs.jsonl COMMIT")
        collect(Path(sys.argv[2]), sys.argv[3])
    else:
        results = read_runs()
        print(table(results))
        print(table(results, columns=4))
        if any(run["task"] == "directional" for run in results):
            for arm in (PLAIN, FS):
                print(f"wrong answers, {arm}:", wrong_answers(results, arm))
            draw_directional(results)
        draw_all(results)
