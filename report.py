"""The report on a round's runs: numbers, words and a picture, all computed from the records on the disk.

A difference d is prompt_fs minus no_fs on the same example, at the last evaluation. runs.py refuses what
cannot be compared, eval.py says what the metrics are, and stats.py what a verdict means.

Shapes: S seeds, n examples.
"""

import json
import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Example
from files import atomic_write, counted, read_lines
from rounds import Round, load_rounds
from runs import ARMS, CONTROLS, METRICS, Seed, check_shape, naming_damage, read_round, recipe_of
from standin import chance, small_tokenizer
from stats import (EFFECT, JUMP, MIN_SEEDS, chance_to_gain, holm, judge, mcnemar, sign_test, signs)

SHOWN = "S20"    # the round in which Future-Seed is seen at work
COLOURS = {"no_fs": "tab:gray", "prompt_fs": "tab:orange", "off": "tab:blue"}


# ---- the numbers -------------------------------------------------------------------------------------------

def analyse(folder: Path, seeds: list[int] | None = None) -> dict:
    """All numbers of the report on a round's folder, as plain JSON values. Raises as runs.read_round.

    Below six seeds interval, p, gain and p_jumped are None.
    """
    found, notes, damaged = read_round(folder, seeds)
    reference = next(iter(found.values()))    # all seeds agree in what is read from this one
    run = reference.runs["no_fs"]
    source, recipe = run["source"], recipe_of(run)
    real, on_standin = load_rounds()
    published = real.get(folder.name, recipe)
    log = None
    if source == "standin":
        published = on_standin.get(folder.name, recipe)
    if published.log and source != "own":
        log = log_numbers(published)
    ids = sorted(reference.evaluations["no_fs"])
    per_seed = [{"seed": seed, "steps": [both.runs[arm]["steps"] for arm in ARMS]}
                for seed, both in found.items()]
    differences, over_seeds = {}, {}
    for metric in METRICS:
        without = score_table(found, "no_fs", metric, ids)        # (S, n)
        with_fs = score_table(found, "prompt_fs", metric, ids)    # (S, n)
        d = differences[metric] = with_fs - without
        half = 1.96 * d.std(axis=1, ddof=1) / math.sqrt(len(ids))    # half the interval over questions, (S,)
        for s, line in enumerate(per_seed):
            mean = float(d[s].mean())
            line[metric] = {"no_fs": float(without[s].mean()), "prompt_fs": float(with_fs[s].mean()),
                            "d": mean, "low": mean - float(half[s]), "high": mean + float(half[s])}
        means = d.mean(axis=1)    # (S,)
        over_seeds[metric] = {"mean": float(means.mean()), "std": float(means.std()), "signs": signs(means)}
    d_acc = differences["acc"].mean(axis=1)    # (S,)
    verdict, low, high = judge(differences["acc"])
    jumped = {arm: np.array([line["acc"][arm] > JUMP for line in per_seed]) for arm in ARMS}
    # registered was the published recipe on the stand-in, on the seeds that rounds.toml lists, and no more
    registered = (published.primary and source == "standin" and recipe.settings() == published.settings()
                  and run["minutes"] is None and sorted(found) == sorted(published.registered))
    interval = p = gain = p_jumped = None    # below six seeds none of these can tell anything
    if len(found) >= MIN_SEEDS:
        interval = [low, high]
        p = float(sign_test(d_acc))
        gain = [float(share) for share in chance_to_gain(d_acc)]
        p_jumped = float(mcnemar(jumped["no_fs"], jumped["prompt_fs"]))
    return {
        "round": folder.name, "title": published.title, "task": recipe.task, "source": source,
        "standin": source == "standin", "folder": str(folder), "primary": registered, "seeds": list(found),
        "examples": len(ids), "settings": run["settings"], "notes": notes, "damaged": damaged,
        "labels": labels_of(run, published), "per_seed": per_seed, "over_seeds": over_seeds,
        "verdict": verdict, "median": float(np.median(d_acc)),
        "interval": interval, "p": p, "gain": gain, "p_jumped": p_jumped,
        "jumped": {arm: int(jumped[arm].sum()) for arm in ARMS},
        # accuracy of prompt_fs under each control, by seed
        "controls": {control: [mean_of(both.controls[control], "acc") for both in found.values()]
                     for control in CONTROLS},
        "log": log,
    }


def score_table(found: dict[int, Seed], arm: str, metric: str, ids: list[str]) -> np.ndarray:
    """A metric of one arm, (S, n): a row a seed, a column an example, in the order of `ids`."""
    rows = []
    for both in found.values():
        scores = both.evaluations[arm]
        rows.append([scores[id][metric] for id in ids])
    return np.array(rows)


def mean_of(scores: dict[str, dict], metric: str) -> float:
    """The mean of a metric over the examples of one evaluation."""
    return float(np.mean([of_example[metric] for of_example in scores.values()]))


def metrics_shown(source: str, task: str) -> tuple[str, ...]:
    """The metrics that say something: answers of the stand-in are one token, and F1 of ARC is its EM."""
    if source == "standin":
        return "acc", "loss"
    if task == "arc":
        return "acc", "loss", "EM"
    return METRICS


def labels_of(run: dict, published: Round) -> list[str]:
    """What a reader must know before reading a round's numbers, and above all before comparing them."""
    labels, settings = [], run["settings"]
    if run["source"] == "standin":
        labels.append("ON THE STAND-IN, made-up questions and a tiny base: not comparable with the log")
    elif run["source"] == "own":
        labels.append("OWN DATA: not comparable with the log")
    if run["source"] != "standin" and run["base"]["name"] != published.base:
        labels.append(f"ANOTHER BASE, {run['base']['name']}: not comparable with the log")
    if run["minutes"] is not None:
        labels.append(f"each arm was trained for {run['minutes']:g} minutes, in place of the round's steps")
    changed = []
    for key, value in published.settings().items():
        # train.py asks own questions of any length, so there another min_prompt is no change
        ignored = run["source"] == "own" and key == "min_prompt"
        if settings[key] != value and not ignored:
            changed.append(f"{key}={settings[key]}")
    if changed:
        labels.append(f"settings changed from the round's: {', '.join(changed)}")
    if run["data"]["questions_cut"]:
        cut = counted(run["data"]["questions_cut"], "validation prompt")
        labels.append(f"{cut} had more than {settings['max_prompt']} tokens and lost the question, as in the "
                      "log")
    if settings["task"] == "hotpotqa" and run["source"] != "standin" and not settings["end_mark"]:
        labels.append("no end mark is trained, as in the log, so a model that writes on after its answer "
                      "scores low in EM; train.py --set end_mark=true trains one")
    return labels


def log_numbers(recipe: Round) -> dict:
    """What the log reported for a round, with what can be recomputed from its numbers by seed."""
    deltas = np.array(recipe.log["d_acc"])
    mean, std = float(deltas.mean()), float(deltas.std())
    error = max(abs(mean - recipe.log["mean"]), abs(std - recipe.log["std"]))
    return {**recipe.log, "recomputed": {"mean": mean, "std": std},
            "as_logged": error < 1.5e-4,    # the log rounds to 4 digits
            "signs": signs(deltas), "verdict": judge(deltas[:, None])[0]}


# ---- in words ----------------------------------------------------------------------------------------------

def text_of_round(result: dict, p_in_words: str | None) -> str:
    """One round's report for a terminal. Args: p_in_words, of the sign test; None below six seeds."""
    seeds, standin = len(result["seeds"]), result["source"] == "standin"
    length = ""
    if not standin:
        length = f", prompts of up to {result['settings']['max_prompt']} tokens"
    lines = [f"{result['round']}: {result['title']}{length}; {counted(seeds, 'seed')} on "
             f"{counted(result['examples'], 'question')}"]
    lines += [*result["labels"], *result["notes"], *result["damaged"]]
    lines.append("metric seed     step    no_fs  prompt_fs        d  95% interval, over questions")
    for metric in metrics_shown(result["source"], result["task"]):
        for line in result["per_seed"]:
            score = line[metric]
            steps = "/".join(str(step) for step in dict.fromkeys(line["steps"]))    # "10", or "10/13"
            lines.append(f"{metric:<6} {line['seed']:<5} {steps:>7} {score['no_fs']:>8.4f} "
                         f"{score['prompt_fs']:>10.4f}  {score['d']:+.4f}  "
                         f"[{score['low']:+.4f}, {score['high']:+.4f}]")
        if seeds > 1:
            over = result["over_seeds"][metric]
            lines.append(f"{metric:<6} mean {over['mean']:+.4f}, std {over['std']:.4f}, sign(+/0/-) "
                         f"{over['signs']}")
    if seeds >= MIN_SEEDS:
        low, high = result["interval"]
        share, least, most = result["gain"]
        lines += [f"d_acc of the typical seed: median {result['median']:+.4f} [{low:+.4f}, {high:+.4f}]; "
                  f"sign test over seeds {p_in_words}",
                  f"a seed gains with probability {share:.2f} [{least:.2f}, {most:.2f}]",
                  f"verdict on d_acc: {result['verdict']}"]
    else:
        lines.append(f"verdict on d_acc: {result['verdict']}, with {seeds} of the {MIN_SEEDS} seeds it takes")
    if standin:
        jumped = result["jumped"]
        p = ""
        if seeds >= MIN_SEEDS:
            p = f"; exact paired p {result['p_jumped']:.3f}"
        lines.append(f"seeds that learned it (more than {JUMP:.0%} right): no_fs {jumped['no_fs']} of "
                     f"{seeds}, prompt_fs {jumped['prompt_fs']} of {seeds}{p}")
    for control, values in result["controls"].items():
        numbers = " ".join(f"{value:.4f}" for value in values)
        lines.append(f"accuracy of prompt_fs with its seed states {CONTROLS[control]}: {numbers}")
    if result["log"]:
        where = ""
        if standin:
            where = " (on real records)"
        lines.append(f"the log{where}: {text_of_log(result['log'])}")
    return "\n  ".join(lines) + "\n"


def text_of(results: list[dict]) -> str:
    """The reports of several rounds.

    The round that the study registered as its question keeps its p. The others are a family, and their p are
    corrected for their number.
    """
    family = [result for result in results if not result["primary"] and len(result["seeds"]) >= MIN_SEEDS]
    corrected = iter(holm([result["p"] for result in family]))
    texts = []
    for result in results:
        words = None
        if result["primary"]:
            words = f"p {result['p']:.2g} (registered)"
        elif len(family) > 1 and result in family:
            words = f"p {next(corrected):.2g} (Holm, {len(family)} rounds)"
        elif result in family:
            words = f"p {result['p']:.2g} (exploratory)"
        texts.append(text_of_round(result, words))
    return "\n".join(texts)


def text_of_log(log: dict) -> str:
    """The log's line of a round, with mean and standard deviation recomputed from its numbers by seed."""
    deltas = " ".join(f"{delta:+.4f}" for delta in log["d_acc"])
    found = log["recomputed"]
    doubt = ""
    if not log["as_logged"]:
        doubt = f" (NOT as logged, {log['mean']:+.4f} and {log['std']:.4f})"
    return (f"d_acc {deltas}, mean {found['mean']:+.4f}, std {found['std']:.4f}{doubt}, sign(+/0/-) "
            f"{log['signs']}, \"{log['status']}\"; by our rule {log['verdict']}")


def write_report(folder: Path) -> tuple[dict, str]:
    """The report on a round's folder, which is also written beside it, under the log's own file name."""
    result = analyse(folder)
    text = text_of([result])
    name = f"_summary_{folder.name}.txt"
    if result["log"]:
        name = result["log"]["summary"]
    with atomic_write(folder.with_name(name), "w") as file:
        file.write(text)
    return result, text


def question_as_arguments(prompt: str) -> str:
    """A prompt of the stand-in as eval.py's --ask and --context take it, quoted for a shell."""
    question = re.search(r"Question:\n(.*?)\n\n", prompt)[1]
    facts = re.search(r"(?:Context|Options):\n(.*?)\n\n(?:Question|Answer):", prompt, re.S)[1]
    words = ["--ask", question, "--context", *re.split(r"\n+", facts)]
    return " ".join(shlex.quote(word) for word in words)


def explain(result: dict, seed: int, validation: list[Example], folder: Path) -> str:
    """A seed on the stand-in in plain words: what was asked, what came out, what that does not say.

    Args: result, of analyse; validation, the examples that were scored; folder, of the seed.
    """
    place = result["seeds"].index(seed)
    acc, off = result["per_seed"][place]["acc"], result["controls"]["off"][place]
    settings = result["settings"]
    written = {}    # arm -> example id -> the answer at the last evaluation
    for arm in ARMS:
        # the file holds every evaluation, the last one at its end, where it replaces those before it
        records = [json.loads(line) for _, line in read_lines(folder / arm / "records.jsonl")]
        written[arm] = {record["id"]: record["text"] for record in records}
    apart = [example for example in validation
             if written["no_fs"][example.id] != written["prompt_fs"][example.id]]
    guess = chance(result["task"], settings["facts"])
    lines = [f"Seed {seed} in words: {len(validation)} questions on {settings['facts']} facts each. A fact "
             f"picked at random is right {guess:.0%} of the time.",
             f"Without Future-Seed {acc['no_fs']:.0%} of the answers are right, with it "
             f"{acc['prompt_fs']:.0%}.",
             f"With its seed states switched off after training, prompt_fs answers {off:.0%} right."]
    if abs(acc["prompt_fs"] - off) < EFFECT:
        gate = 1 / (1 + math.exp(-settings["alpha_init"]))
        lines += [f"So its answers do not depend on the seed states. Their gate began at {gate:.3f}, from "
                  f"layer {settings['fs_layer_start']} on.",
                  f"Future-Seed at work: python train.py --round {SHOWN} --seed {seed} --standin"]
    else:
        lines.append("So its answers depend on the seed states.")
    lines.append(f"The arms answer {counted(len(apart), 'question')} differently.")
    if apart:
        example = apart[0]
        arguments = question_as_arguments(small_tokenizer().decode(example.prompt))
        lines.append(f"In one of them \"{example.text}\" is right. no_fs says "
                     f"\"{written['no_fs'][example.id]}\", prompt_fs says "
                     f"\"{written['prompt_fs'][example.id]}\". Ask either arm yourself:")
        for arm in ARMS:
            checkpoint = shlex.quote(str(folder / arm / "model.pth"))
            lines.append(f"  python eval.py --checkpoint {checkpoint} {arguments}")
    lines.append("One seed decides nothing, for another may learn what this one missed. A verdict needs "
                 f"{MIN_SEEDS}: --seeds 0-{MIN_SEEDS - 1}")
    return "\n  ".join(lines)


# ---- as a picture ------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """One line of the picture of accuracies: a score of every seed, by seed."""

    title: str
    no_fs: dict[int, float]
    prompt_fs: dict[int, float]
    off: dict[int, float]     # of prompt_fs with its seed states switched off
    guess: float | None       # what a fact picked at random scores


def draw_scores(panel, rows: list[Row]) -> None:
    """Every seed's score without Future-Seed, with it, and with its seed states off; a mark a seed."""
    for place, row in enumerate(rows):
        for seed in sorted(row.no_fs.keys() & row.prompt_fs.keys()):
            pair = [row.no_fs[seed], row.prompt_fs[seed]]
            panel.plot(pair, [place - 0.2, place], color="0.85", linewidth=0.7)

        def draw_marks(scores: dict[int, float], height: float, mark: str, colour: str, label: str) -> None:
            panel.plot(list(scores.values()), [height] * len(scores), mark, color=colour, markersize=4,
                       alpha=0.7, label=label)

        draw_marks(row.no_fs, place - 0.2, "o", COLOURS["no_fs"], "no_fs")
        draw_marks(row.prompt_fs, place, "D", COLOURS["prompt_fs"], "prompt_fs")
        draw_marks(row.off, place + 0.2, "x", COLOURS["off"], "prompt_fs, seed states off")
        if row.guess is not None:
            panel.plot([row.guess] * 2, [place - 0.4, place + 0.4], ":", color="black", linewidth=1,
                       label="a fact picked at random")
    panel.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(-0.02, 1.02)


def draw_legend(panel, **options) -> None:
    """A legend in which every label stands once, although every row and every seed was drawn with its own."""
    handles, labels = panel.get_legend_handles_labels()
    handle_of = dict(zip(labels, handles))
    panel.legend(handle_of.values(), handle_of.keys(), **options)


def draw_losses(panel, curves: dict[str, list[list[dict]]], window: int = 20) -> None:
    """Training loss by step, a thin line a seed, as a mean over `window` steps; dots: validation loss.

    Args: curves, for each arm the lines of metrics.jsonl of every seed.
    """
    drawn = []    # every loss of the picture
    usual = []    # the losses that decide how high the picture is
    for arm, seeds in curves.items():
        for lines in seeds:
            training = [line for line in lines if "train_loss" in line]
            evaluations = [line for line in lines if "loss" in line]
            losses = [line["train_loss"] for line in training]
            smooth = []
            for i in range(len(losses)):
                smooth.append(float(np.mean(losses[max(0, i - window + 1):i + 1])))
            validation = [line["loss"] for line in evaluations]
            panel.plot([line["step"] for line in training], smooth, color=COLOURS[arm], linewidth=0.8,
                       alpha=0.7, label=arm)
            panel.plot([line["step"] for line in evaluations], validation, "o", color=COLOURS[arm],
                       markersize=3, alpha=0.7)
            drawn += smooth + validation
            usual += validation
            if losses:
                usual.append(float(np.percentile(losses, 90)))
    # one step that went wrong must not flatten all the others, and NaN is no height
    most = 1.5 * max([loss for loss in usual if math.isfinite(loss)], default=1.0)
    title = f"training loss, mean of {window} steps; dots: validation"
    top = None
    if not all(loss <= most for loss in drawn):
        top, title = most, f"{title}; cut at {most:.2g}"
    panel.set_ylim(0, top)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("training steps", fontsize=8)
    panel.set_ylabel("loss in nats", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.xaxis.get_major_locator().set_params(integer=True)
    draw_legend(panel, fontsize=8, loc="upper right")


def read_metrics(path: Path) -> list[dict]:
    """metrics.jsonl: a line a training step (step, train_loss) and one an evaluation (step, METRICS)."""
    with naming_damage(path):
        lines = [json.loads(line) for _, line in read_lines(path)]
        for line in lines:
            loss = "loss"
            if "train_loss" in line:
                loss = "train_loss"
            check_shape(line, {"step": int, loss: float})
        if not any("loss" in line for line in lines):
            raise ValueError("it holds no evaluation")
    return lines


def plot(folders: list[Path], path: Path, seeds: list[int] | None = None) -> None:
    """Draw the rounds in `folders`, one below the other: every seed's scores, and both arms' losses by step.

    Raises ValueError without matplotlib, and otherwise as `analyse`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 0.6 + 2.8 * len(folders)), layout="constrained")
    for (scores, losses), folder in zip(figure.subplots(len(folders), 2, squeeze=False), folders):
        found, _, _ = read_round(folder, seeds)
        run = next(iter(found.values())).runs["no_fs"]
        standin, settings = run["source"] == "standin", run["settings"]
        guess = None
        if standin:
            guess = chance(settings["task"], settings["facts"])
        rows = []
        for metric in metrics_shown(run["source"], settings["task"]):
            if metric != "loss":    # it has the panel on the right
                rows.append(Row(
                    title=metric,
                    no_fs={seed: mean_of(both.evaluations["no_fs"], metric) for seed, both in found.items()},
                    prompt_fs={seed: mean_of(both.evaluations["prompt_fs"], metric)
                               for seed, both in found.items()},
                    off={seed: mean_of(both.controls["off"], metric) for seed, both in found.items()},
                    guess=guess,
                ))
        draw_scores(scores, rows)
        where = {"real": "", "own": ", OWN DATA", "standin": ", ON THE STAND-IN"}[run["source"]]
        scores.set_title(f"{folder.name}{where}, {counted(len(found), 'seed')}", fontsize=10)
        scores.set_xlabel("score at the end, a mark a seed", fontsize=8)
        scores.tick_params(labelsize=8)
        draw_legend(scores, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4,
                    frameon=False)
        draw_losses(losses, {arm: [read_metrics(folder / f"seed{seed}" / arm / "metrics.jsonl")
                                   for seed in found] for arm in ARMS})
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
