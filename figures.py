"""Figures of eval.py's results: a report on rounds, or the study on the stand-in. They need matplotlib."""

from pathlib import Path

from files import atomic_write
from records import ARMS, METRICS
from stats import EFFECT

try:
    from matplotlib.figure import Figure
except ImportError:    # figures are optional
    Figure = None


def draw(results: list[dict], path: Path) -> None:
    """The study if all results are the stand-in's, else the report; the suffix of path is the format."""
    made_up = all(result["standin"] for result in results)
    figure = (draw_study if made_up else draw_report)(results)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format=path.suffix[1:])


def draw_study(results: list[dict]):
    """A row a round: every seed's accuracy in both arms and with the seed switched off, then d_acc."""
    figure = Figure(figsize=(12, 1.3 + 0.45 * len(results)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    styles = {"no_fs": ("o", "tab:gray", -0.22), "prompt_fs": ("D", "tab:orange", 0.0),
              "prompt_fs, seed switched off at the end": ("x", "tab:blue", 0.22)}
    for place, result in enumerate(results):
        values = [[line["acc"][arm] for line in result["per_seed"]] for arm in ARMS]
        values.append(list(result["seed_off"].values()))
        for (name, (marker, colour, shift)), accuracies in zip(styles.items(), values):
            label = name if place == 0 else None
            left.plot(accuracies, [place + shift] * len(accuracies), marker, color=colour, alpha=0.6,
                      linestyle="none", markersize=5, label=label)
        over = result["over_seeds"]["acc"]
        right.plot([over["low"], over["high"]], [place, place], color="black", linewidth=2)
        right.plot(over["mean"], place, "D", color="black")
    right.axvline(0, color="black", linewidth=0.8)
    titles = ["\n".join([f"{result['round']}: {result['title']}", *result["labels"][1:]])
              for result in results]
    left.set_yticks(range(len(results)), titles, fontsize=8)
    left.invert_yaxis()
    left.set_xlim(0, 1.02)
    left.set_xlabel("accuracy on the built-in STAND-IN, a mark a seed")
    right.set_xlabel("d_acc, mean over seeds, 95% interval")
    left.grid(axis="y", linewidth=0.3)
    right.grid(axis="y", linewidth=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def draw_report(results: list[dict]):
    """A row a round: every seed's d_acc with its interval, the log's, then learning curves."""
    figure = Figure(figsize=(12, 0.5 + 2.5 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 3, squeeze=False, width_ratios=(1.3, 1, 1))
    for (left, *curve_panels), result in zip(panels, results):
        over, log = result["over_seeds"]["acc"], result["log"]
        accs = [(line["seed"], line["acc"]) for line in result["per_seed"]]
        lines = [(f"seed {seed}", [acc["d"]], acc, "tab:blue") for seed, acc in accs]
        lines.append(("mean", [over["mean"]], over, "black"))
        if log:
            lines.append(("the log", [*log["d_acc"], log["mean"]], None, "tab:gray"))
        for place, (_, points, band, colour) in enumerate(lines):
            if band:
                left.plot([band["low"], band["high"]], [place, place], color=colour, linewidth=2)
            left.plot(points[:-1], [place] * (len(points) - 1), "o", color=colour, fillstyle="none")
            left.plot(points[-1], place, "D", color=colour)
        left.axvspan(-EFFECT, EFFECT, color="black", alpha=0.06, linewidth=0)
        left.axvline(0, color="black", linewidth=0.8)
        left.set_yticks(range(len(lines)), [name for name, *_ in lines])
        left.invert_yaxis()
        left.set_xlabel("d_acc, 95% intervals")
        name, verdict = f"{result['round']}: {result['title']}", f"verdict: {result['verdict']}"
        heading = [name, *result["labels"], verdict]
        left.set_title("\n".join(heading), fontsize=9, loc="left")
        names = "token accuracy", "validation loss, nats"
        for panel, metric, name in zip(curve_panels, METRICS, names):
            for curve in result["curves"]:
                label = curve["arm"] if curve["seed"] == result["seeds"][0] else None
                colour = ("tab:gray", "tab:orange")[ARMS.index(curve["arm"])]
                panel.plot(curve["steps"], curve[metric], ".-", linewidth=1, color=colour, label=label)
            panel.set_title(name, fontsize=9, loc="left")
            panel.set_xlabel("step")
        curve_panels[0].legend(fontsize=8)
    return figure
