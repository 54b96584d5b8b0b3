"""Tasks that others made: runs of from_scratch.py into a table and two figures.

    python study/from_scratch.py needle --seed 20 --out runs.jsonl    a line a run, both arms in it
    python study/outside.py collect runs.jsonl COMMIT                 -> outside.json, with code and machine
    python study/outside.py                                           outside.json -> table and figures

outside.json holds each run's accuracy over its steps and what both arms said to the test at the end. The test
is not in it: from_scratch.py draws it again. Figures need matplotlib.
Shapes: S seeds, B sequences in the test, T tokens in a sequence.
"""

import json
import math
import platform
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

from from_scratch import TEST, TEST_SEED    # noqa: E402
from stats import holm, judge, sign_test    # noqa: E402
from tasks import ASK, SILENT, TASKS, comes_later    # noqa: E402

PLAIN, FS = "plain", "Future-Seed"
PRIMARY = "needle"
TITLES = {
    "needle": "needle, question last",
    "recall": "recall, queries after their pairs (control)",
    "directional before": "directional, pair before its query",
    "directional later": "directional, pair after its query",
    "needle-first": "needle, question first",
    "intersection": "intersection, long list first",
    "intersection-short": "intersection, short list first",
    "needle-both": "needle, question at both ends",
    "needle-twice": "needle, read twice",
    "sudoku": "sudoku, whole boards",
}


def collect(path: Path, commit: str) -> None:
    """Every run in a file of JSON lines -> outside.json, with the commit that ran it and this machine."""
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seen = [(run["task"], run["seed"]) for run in runs]
    if len(set(seen)) < len(seen):
        raise SystemExit(f"{path}: holds a task and seed twice; remove one of the two lines")
    order = list(TASKS)
    runs.sort(key=lambda run: (order.index(run["task"]), run["seed"]))
    origin = {"code": commit, "machine": f"{platform.machine()}, one thread, torch {torch.__version__}"}
    lines = ",\n".join(json.dumps(run | origin, separators=(",", ":")) for run in runs)
    (HERE / "outside.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(runs)} runs in {HERE / 'outside.json'}")


def read_runs() -> list[dict]:
    return json.loads((HERE / "outside.json").read_text(encoding="utf-8"))


# ---- answers into scores -----------------------------------------------------------------------------------

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
    if score == "sudoku":
        return (right | ~counted).all(axis=1).astype(float)
    has_any = counted.any(axis=1)
    return ((right & counted).sum(axis=1) / counted.sum(axis=1).clip(min=1))[has_any]


def differences(score: str, runs: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Both arms' share right, (S, B) each, of the runs with this score, in the order of their seeds."""
    own = [run for run in runs if run["task"] == score.split()[0]]
    return tuple(np.array([share_right(score, run, arm) for run in own]) for arm in (PLAIN, FS))


# ---- the table ---------------------------------------------------------------------------------------------

def in_short(values) -> str:
    reached = sum(value >= 0.95 for value in values)
    return f"{np.median(values):.3f}, {min(values):.3f}, {reached} of {len(values)}"


def table(runs: list[dict]) -> str:
    """A row a score: both arms, the verdict on the typical seed, the sign test."""
    rows, p_values = [], []
    for score, title in TITLES.items():
        plain, with_fs = differences(score, runs)
        if len(plain) == 0:
            continue
        x = with_fs - plain
        deltas = x.mean(axis=1)
        verdict, low, high = judge(x)
        rows.append([title, in_short(plain.mean(axis=1)), in_short(with_fs.mean(axis=1)),
                     f"{np.median(deltas):+.3f} [{low:+.3f}, {high:+.3f}]: **{verdict}**",
                     f"{(deltas > 0).sum()} and {(deltas < 0).sum()}"])
        p_values.append(sign_test(deltas))
    # the primary comparison was registered as one test; the others are corrected for their number
    others = iter(holm(p_values[1:]))
    for place, row in enumerate(rows):
        if place == 0:
            row.append(f"{p_values[0]:.2g} (registered)")
        else:
            row.append(f"{next(others):.2g}")
    head = ["task", "plain: median, lowest, at 0.95 or more", "Future-Seed", "difference of the typical seed",
            "seeds that gain and lose", "sign test, p (Holm)"]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


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
    scored = {"needle": "right", "recall": "right", "directional": "later", "needle-first": "right",
              "intersection": "right", "intersection-short": "right", "needle-both": "right",
              "needle-twice": "right", "sudoku": "boards"}
    ran = [task for task in scored if any(run["task"] == task for run in runs)]
    rows = math.ceil(len(ran) / 3)
    figure = Figure(figsize=(10, 0.5 + 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, sharey=True, squeeze=False).flat
    for task, panel in zip(ran, panels):    # in this order, or zip would take a panel too many
        draw_curves(panel, runs, task, scored[task])
        count = sum(run["task"] == task for run in runs)
        title = TITLES.get(task, TITLES["directional later"]).removesuffix(" (control)")
        panel.set_title(f"{title}\n{count} seeds", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.set_xlabel("steps", fontsize=7)
    for panel in panels:    # places that no task takes
        panel.set_axis_off()
    figure.supylabel("share right", fontsize=8)
    labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(*labels, fontsize=8, loc="outside upper center", ncols=2)
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
        if any(run["task"] == "directional" for run in results):
            for arm in (PLAIN, FS):
                print(f"wrong answers, {arm}:", wrong_answers(results, arm))
            draw_directional(results)
        draw_all(results)
