"""The ruler: what the runs on disk say about a round, and how sure that is.

    python eval.py R8                           both arms of every seed, their difference, beside the log
    python eval.py --all --plot report.png

Everything is computed from the records that evaluations left (records.py), so a report needs no model. A
difference d is prompt_fs minus no_fs on the same example; the last evaluation counts, on the whole validation
set.

    d_acc    token accuracy: the share of an answer's tokens right under teacher forcing, as in the log
    d_loss   the log's loss: the first answer token's plus the mean of the others', in nats
    d_EM     exact match of the greedy text (HotpotQA), or the likeliest of the question's own labels (ARC)
    d_F1     F1 of the greedy text (HotpotQA)

Within a seed: paired bootstrap over examples, and sign flips of examples. Over seeds: `stats.over_seeds`,
which allows for other seeds and other questions; p of exact sign flips of seeds (never below 2^(1 - seeds)),
and of sign flips of questions (is it more than chance, for these seeds?). Standard deviations are the
population's, as in the log. The verdict follows stats.RULE. How scores come about is in score.py, the
statistics are in stats.py.

Shapes: S seeds, n examples, M metrics.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from figures import Figure, draw
from files import atomic_write
from records import ARMS, METRICS, Runs, check_comparable, read_round, seeds_on_disk
from rounds import Round, expand, load_rounds, miniature, seeds_of
from stats import (EFFECT, JUMP, RULE, bootstrap_interval, needed, noise_floor, over_seeds, sign_flip_p,
                   t_test, verdict)

# same data and order, another Future-Seed
COMPARED = (("R2", "R9a"), ("R2", "S7"), ("R6", "R8"), ("R6", "R9b"), ("R6", "R10"), ("R6", "S1"),
            ("R6", "S2"), ("S1", "S3"), ("R8", "S4"), ("R9b", "S5"), ("R7", "S6"), ("S7", "S8"), ("S6", "S9"),
            ("S1", "S10"), ("S1", "S11"), ("S10", "S3"), ("S11", "S3"))
LOG_BATCHES = 16    # of validation answers in one evaluation of the log
EXAMPLES = f"""examples:
  python eval.py R8                         one round, every seed found in runs/
  python eval.py R6 R8 R9                   several, and the comparisons that they allow
  python eval.py --all --plot report.png    every round found, and a figure (needs matplotlib)
  python eval.py --all --markdown           a table for pasting; --json for programs
  python eval.py --log                      the log's own table, recomputed, with t-tests
  python eval.py --ask "Who wrote Faust?" --checkpoint runs/R8/seed1/prompt_fs/model.pth

the verdict on a round, by a rule fixed before any run: {RULE}"""


# ---- what the runs say -------------------------------------------------------------------------------------

def signs(deltas) -> str:
    """The log's sign pattern: how many seeds are +/0/-."""
    rounded = np.sign(np.round(deltas, 12))    # a difference of equal sums may be 1e-17
    return "/".join(str(int((rounded == sign).sum())) for sign in (1, 0, -1))


def effect(x: np.ndarray) -> dict:
    """Means over seeds, intervals and p-values of differences x (S, n, M), by metric."""
    deltas = x.mean(axis=1)    # (S, M)
    p_questions = sign_flip_p(x.mean(axis=0))
    p_seeds = sign_flip_p(deltas)
    if len(x) > 1:
        mean, half = over_seeds(np.moveaxis(x, -1, 0))
        low, high = mean - half, mean + half
    else:
        mean, (low, high) = deltas[0], bootstrap_interval(x[0])
    return {
        metric: {
            "mean": float(mean[m]), "low": float(low[m]), "high": float(high[m]),
            "std": float(deltas[:, m].std()), "signs": signs(deltas[:, m]),
            "p_seeds": float(p_seeds[m]), "p_questions": float(p_questions[m]),
        }
        for m, metric in enumerate(METRICS)
    }


def log_numbers(round: Round) -> dict:
    """The log's line of a round, recomputed from its per-seed numbers, with the t-test that it lacked."""
    log = round.log
    deltas = np.array(log.d_acc)
    if round.task == "arc":
        # ARC answers are one token, so accuracies are multiples of 1/128: undo the log's rounding to 4 digits
        answers = LOG_BATCHES * round.batch_size
        deltas = np.round(deltas * answers) / answers
    mean, std = float(deltas.mean()), float(deltas.std())
    if f"{mean:.4f} {std:.4f}" == f"{log.mean:.4f} {log.std:.4f}":
        as_logged = "yes"
    else:    # each of its numbers was rounded by up to half a digit, and so was its result
        as_logged = "to rounding" if max(abs(mean - log.mean), abs(std - log.std)) < 1e-4 else "no"
    low = high = p = None
    ruling = "inconclusive"
    if len(deltas) > 1:
        _, half, p = t_test(deltas)
        low, high = mean - half, mean + half
        ruling = verdict(low, high, len(deltas))
    return {
        "d_acc": list(log.d_acc), "mean": log.mean, "std": log.std, "d_loss": log.d_loss,
        "status": log.status, "recomputed_mean": mean, "recomputed_std": std, "as_logged": as_logged,
        "signs": signs(deltas),
        "low": low, "high": high, "p": p, "verdict": ruling,
    }


def analyse(runs: Runs, round: Round) -> dict:
    """All numbers of the report on one round, as plain JSON values; `round` gives the recipe and the log."""
    last = runs.last()               # (S, 2, n, M)
    means = last.mean(axis=2)        # (S, 2, M)
    x = last[:, 1] - last[:, 0]      # (S, n, M)
    by_example = x.swapaxes(0, 1)    # (n, S, M)
    low, high = bootstrap_interval(by_example)
    p = sign_flip_p(by_example)
    per_seed = []
    for s, seed in enumerate(runs.seeds):
        line = {"seed": seed, "steps": {arm: int(runs.tables[seed, arm][0][-1]) for arm in ARMS}}
        for m, metric in enumerate(METRICS):
            without, with_fs = means[s, :, m].tolist()
            line[metric] = {"no_fs": without, "prompt_fs": with_fs, "d": with_fs - without,
                            "low": float(low[s, m]), "high": float(high[s, m]), "p": float(p[s, m])}
        per_seed.append(line)
    over = effect(x)
    seeds_needed, questions_needed = needed(x[..., 0]) if len(x) > 1 else (None, None)
    curves = [
        {"seed": seed, "arm": arm, "steps": steps.tolist(), "acc": scores[..., 0].mean(axis=1).tolist(),
         "loss": scores[..., 1].mean(axis=1).tolist()}
        for (seed, arm), (steps, scores) in runs.tables.items()
    ]
    settings = runs.run["settings"]
    made_up = bool(runs.run.get("standin"))
    recipe = (miniature(round) if made_up else round).settings().items()
    changed = [f"{key}={settings.get(key)}" for key, value in recipe if settings.get(key) != value]
    log_seeds = len(round.log.d_acc) if round.log else len(x)
    result = {
        "round": runs.name, "title": round.title, "task": round.task, "order": round.order,
        "seeds": runs.seeds, "examples": len(runs.ids),
        "standin": made_up, "base": runs.run["base"].get("name"), "round_base": settings.get("base"),
        "minutes": runs.run.get("minutes"), "changed": changed, "unfinished": runs.unfinished,
        "per_seed": per_seed, "over_seeds": over,
        "jumped": dict(zip(ARMS, (means[..., 0] > JUMP).sum(axis=0).tolist())) if made_up else None,
        "seed_off": {seed: float(scores[:, 0].mean()) for seed, scores in runs.seed_off.items()},
        "verdict": verdict(over["acc"]["low"], over["acc"]["high"], len(x)),
        "log": log_numbers(round) if round.log else None,
        "noise": noise_floor(runs.accuracies(), LOG_BATCHES * round.batch_size, log_seeds),
        "needed": {"effect": EFFECT, "seeds": seeds_needed, "questions": questions_needed},
        "curves": curves,
    }
    return result | {"labels": labels(result)}


def compare(a: Runs, b: Runs) -> dict:
    """What another Future-Seed changes: prompt_fs of round b minus prompt_fs of round a, by seed and example.

    The no_fs arms of the two rounds are the same recipe and would add nothing but noise. Raises ValueError
    where more than Future-Seed sets the rounds apart.
    """
    check_comparable(a, b)
    seeds = sorted({*a.seeds} & {*b.seeds})
    with_fs = [[runs.tables[seed, "prompt_fs"][1][-1] for seed in seeds] for runs in (a, b)]
    x = np.array(with_fs[1]) - np.array(with_fs[0])    # (S, n, M)
    return {"rounds": [a.name, b.name], "seeds": seeds, "over_seeds": effect(x)}


# ---- how they say it ---------------------------------------------------------------------------------------

def interval(numbers: dict) -> str:
    return f"[{numbers['low']:+.4f}, {numbers['high']:+.4f}]"


def overall(numbers: dict) -> str:
    p_values = f"{numbers['p_seeds']:.3f} seeds, {numbers['p_questions']:.3f} questions"
    spread = f"std {numbers['std']:.4f}, sign(+/0/-) {numbers['signs']}"
    return f"{numbers['mean']:+.4f}  {interval(numbers)}  {p_values}; {spread}"


def labels(result: dict) -> list[str]:
    """What a reader must know before comparing a round's numbers with the log's."""
    found = []
    if result["standin"]:
        found.append("STAND-IN RECORDS, made up to try things: not comparable with the log")
    if (result["base"] or "").startswith("init"):
        found.append(f"UNTRAINED BASE {result['base']}: not comparable with the log")
    elif not result["standin"] and result["base"] != result["round_base"]:
        found.append(f"ANOTHER BASE, {result['base']}: not comparable with the log")
    if result["minutes"] is not None:
        found.append(f"{result['minutes']:g} minutes of training an arm, in place of the round's steps")
    if result["changed"]:
        found.append(f"settings changed from the round's: {', '.join(result['changed'])}")
    if result["unfinished"]:
        found.append(f"unfinished: {', '.join(result['unfinished'])}")
    return found


def text_of(result: dict) -> str:
    """One round's report for a terminal."""
    S, n = len(result["seeds"]), result["examples"]
    lines = [f"{result['round']}: {result['title']}; {S} seed{'s' if S > 1 else ''} on {n} examples"]
    lines += [f"  {label}" for label in result["labels"]]
    lines.append("  metric seed     step    no_fs  prompt_fs        d  95% interval         p")
    # ARC's F1 is its EM, and the stand-in's answers, a token each, have nothing but accuracy and loss
    shown = METRICS[:2] if result["standin"] else METRICS[:3] if result["task"] == "arc" else METRICS
    for metric in shown:
        for line in result["per_seed"]:
            value = line[metric]
            arms = f"{value['no_fs']:>8.4f} {value['prompt_fs']:>10.4f}"
            steps = "/".join(map(str, dict.fromkeys(line["steps"].values())))    # one number if they agree
            lines.append(f"  {metric:<6} {line['seed']:<5} {steps:>7} {arms}  {value['d']:+.4f}  "
                         f"{interval(value)}  {value['p']:.3f}")
        if S > 1:
            lines.append(f"  {metric:<6} mean {'':<29}{overall(result['over_seeds'][metric])}")
    if S == 1:
        lines.append("  a single seed: its intervals allow for other questions, not for other seeds")
    lines.append(f"  verdict: {result['verdict']}")
    if result["jumped"]:
        counts = ", ".join(f"{arm} in {count} of {S}" for arm, count in result["jumped"].items())
        lines.append(f"  jumped (more than {JUMP:.0%} right at the end): {counts} seeds")
    if result["seed_off"]:
        off = " ".join(f"{value:.4f}" for value in result["seed_off"].values())
        lines.append(f"  accuracy of prompt_fs with its seed switched off at the end, by seed: {off}")
    log, noise, enough = result["log"], result["noise"], result["needed"]
    if log:
        deltas = " ".join(f"{delta:+.4f}" for delta in log["d_acc"])
        real = " (on real records)" if result["standin"] else ""
        lines.append(f"  the log{real}: d_acc {deltas}, mean {log['mean']:+.4f}, std {log['std']:.4f}, "
                     f"d_loss {log['d_loss']:+.4f}, \"{log['status']}\"; by our rule {log['verdict']}")
    if result["standin"]:
        return "\n".join(lines) + "\n"    # its noise says nothing about the log's
    lines.append(f"  noise of one seed's d_acc from the choice of answers: {noise['log']:.4f} by the log's "
                 f"protocol ({noise['log_same']:.4f} if both arms draw alike), {noise['ours']:.4f} here")
    if log and S > 1 and len(log["d_acc"]) > 1:
        alike = f"{noise['spread_same']:.4f} if all its runs drew alike"
        lines.append(f"  of the seed spread {log['std']:.4f} reported in the log, {noise['spread']:.4f} is "
                     f"expected from its protocol alone ({alike})")
    if S > 1 and result["over_seeds"]["acc"]["low"] < result["over_seeds"]["acc"]["high"]:
        seeds = f"{enough['seeds']} seeds" if enough["seeds"] else "more than 200 seeds"
        more = f"{enough['questions']} questions" if enough["questions"] else "no number of questions"
        lines.append(f"  to see a d_acc of {enough['effect']} 4 times out of 5: {seeds} on these {n} "
                     f"questions, or {more} with {S} seeds")
    return "\n".join(lines) + "\n"


def text_of_comparison(comparison: dict) -> str:
    first, second = comparison["rounds"]
    seeds = " ".join(map(str, comparison["seeds"]))
    lines = [f"{second} minus {first}: their prompt_fs arms, paired by seed ({seeds}) and by example"]
    lines += [f"  {metric:<6} {overall(comparison['over_seeds'][metric])}" for metric in METRICS]
    return "\n".join(lines) + "\n"


def markdown_of(results: list[dict]) -> str:
    """Tables for pasting: of the real rounds, and of those on the stand-in."""
    tables = [table([result for result in results if result["standin"] == made_up])
              for made_up, table in ((False, markdown_of_rounds), (True, markdown_of_standins))
              if any(result["standin"] == made_up for result in results)]
    return "\n".join(tables)


def markdown_of_standins(results: list[dict]) -> str:
    """Every seed's accuracy; what rounds share, as most do their no_fs, once."""
    seeds = sorted({line["seed"] for result in results for line in result["per_seed"]})
    rows = [["on the STAND-IN: accuracy by seed", *map(str, seeds), "mean", "jumped",
             "d_acc [95%], p over seeds"]]
    rows.append(["---"] * len(rows[0]))

    def add(title, values, jumped="", difference=""):
        shown = [f"{values[seed]:.2f}" if seed in values else "" for seed in seeds]
        mean = f"{np.mean([*values.values()]):.3f}" if values else ""
        row = [title, *shown, mean, jumped and f"{jumped} of {len(values)}", difference]
        if row not in rows:
            rows.append(row)

    blocks = list(dict.fromkeys((result["task"], result["order"]) for result in results))
    for result in sorted(results, key=lambda result: blocks.index((result["task"], result["order"]))):
        over, jumped = result["over_seeds"]["acc"], result["jumped"]
        without, with_fs = ({line["seed"]: line["acc"][arm] for line in result["per_seed"]} for arm in ARMS)
        add(f"no_fs, {result['task']}, {result['order']}", without, str(jumped["no_fs"]))
        p = f", {over['p_seeds']:.3f}" if len(result["seeds"]) > 1 else ""
        difference = f"{over['mean']:+.3f} {interval(over)}{p}: {result['verdict']}"
        title = "<br>".join([f"{result['round']}: {result['title']}", *result["labels"][1:]])
        add(title, with_fs, str(jumped["prompt_fs"]), difference)
        add(f"{result['round']}, its seed switched off", result["seed_off"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def markdown_of_rounds(results: list[dict]) -> str:
    heads = ("round", "seeds × examples", "d_acc [95%]", "std", "+/0/−", "d_loss [95%]", "d_EM [95%]",
             "verdict", "log: d_acc ± std", "log, by our rule")
    rows = [heads, ["---"] * len(heads)]
    for result in results:
        over, log = result["over_seeds"], result["log"]
        acc, loss, exact = (f"{over[metric]['mean']:+.4f} {interval(over[metric])}" for metric in METRICS[:3])
        rows.append((
            "<br>".join([f"{result['round']}: {result['title']}", *result["labels"]]),
            f"{len(result['seeds'])} × {result['examples']}",
            acc, f"{over['acc']['std']:.4f}", over["acc"]["signs"], loss, exact, result["verdict"],
            f"{log['mean']:+.4f} ± {log['std']:.4f}" if log else "", log["verdict"] if log else "",
        ))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def text_of_log(rounds: list[Round]) -> str:
    """The log's table, recomputed from its per-seed numbers."""
    lines = ["round  d_acc by seed            mean     std     +/0/-  95% interval (t)    p      "
             "as logged    by our rule; the log's words"]
    for round in rounds:
        log = log_numbers(round)
        deltas = " ".join(f"{delta:+.4f}" for delta in log["d_acc"])
        test = "one seed" if log["p"] is None else f"{interval(log)}  {log['p']:.3f}"
        recomputed = f"{log['recomputed_mean']:+.4f}  {log['recomputed_std']:.4f}  {log['signs']}"
        lines.append(f"{round.name:<5}  {deltas:<23} {recomputed}  {test:<25}  {log['as_logged']:<11}  "
                     f"{log['verdict']}; \"{log['status']}\"")
    return "\n".join(lines) + "\n"


def write_summary(round: Round, runs_dir: str | Path = "runs") -> tuple[Path, str]:
    """Write the summary of a round's finished seeds into runs_dir, under the log's file name and in its form.

    Returns its path, and the report on the same seeds, as `python eval.py NAME` prints it. Raises ValueError
    or OSError as `read_round`.
    """
    done = seeds_on_disk(round.name, runs_dir, finished=True)
    left_out = [str(seed) for seed in seeds_on_disk(round.name, runs_dir) if seed not in done]
    note = [f"left out, not finished: seed {', '.join(left_out)}"] if left_out else []
    runs = read_round(round.name, runs_dir, done)
    result = analyse(runs, round)
    acc, loss = result["over_seeds"]["acc"], result["over_seeds"]["loss"]
    settings = runs.run["settings"] | {"base": result["base"]}    # the one that was used
    lines = [
        f"settings: {json.dumps(settings)}", *result["labels"], "=" * 90,
        f"L={settings['max_prompt']} pairs={len(runs.seeds)} mean d_acc={acc['mean']:+.4f} "
        f"std={acc['std']:.4f} | mean d_loss={loss['mean']:+.4f} std={loss['std']:.4f} | "
        f"sign(+/0/-)={acc['signs']}",
    ]
    for line in result["per_seed"]:
        value = line["acc"]
        lines.append(f"  seed={line['seed']} d_acc={value['d']:+.4f} (no={value['no_fs']:.4f} "
                     f"fs={value['prompt_fs']:.4f}) d_loss={line['loss']['d']:+.4f}")
    lines += [f"95% interval of the mean d_acc {interval(acc)}: {result['verdict']}", *note]
    path = Path(runs_dir) / (round.log.summary if round.log else f"_summary_{round.name}.txt")
    with atomic_write(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    return path, text_of(result) + "".join(f"  {line}\n" for line in note)


# ---- the command line --------------------------------------------------------------------------------------

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Report on rounds that were run: both arms, paired differences with intervals, the log.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("rounds", nargs="*", metavar="R", help="R2 to R10 (R9 is R9a and R9b), S1 to S11")
    option("--all", action="store_true", help="every round that has runs")
    option("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where they are (default: runs)")
    option("--seeds", metavar="LIST", help="only these seeds, as 0-9 or 0,3,5 (default: all found)")
    option("--log", action="store_true", help="the log's own table, recomputed from its per-seed numbers")
    option("--plot", type=Path, metavar="FILE", help="draw a figure too: .png, .svg or .pdf")
    option("--markdown", action="store_true", help="print a Markdown table")
    option("--json", action="store_true", help="print all numbers as JSON")
    option("--ask", metavar="TEXT", help="a question for a trained model, or a prompt that ends in Answer:")
    option("--checkpoint", metavar="PATH", help="the model to ask, as in runs/R8/seed1/prompt_fs/model.pth")
    option("--max-new", type=int, default=24, metavar="N", help="at most so many tokens (default: 24)")
    option("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token (default)")
    option("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens only")
    args = parser.parse_args(argv)
    if (args.ask is None) != (args.checkpoint is None):
        parser.error("--ask TEXT and --checkpoint PATH go together")
    if not (args.rounds or args.all or args.log or args.ask is not None):
        parser.error("name a round, or give --all, --log or --ask (see --help)")
    if args.log and (args.json or args.markdown or args.plot):
        parser.error("--log is a plain table: leave --json, --markdown and --plot out")
    if args.plot and Figure is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {args.plot}: must end in .png, .svg or .pdf")
    return args


def complain(kind: str, error: Exception) -> None:
    print(f"{kind}: {' '.join(str(error).split())}", file=sys.stderr)


def print_reports(args: argparse.Namespace) -> int:
    """Report every round that can be read, and say of each other one why not. Returns the exit code."""
    rounds = load_rounds()
    names = [name for name in rounds if seeds_on_disk(name, args.runs)] if args.all else expand(args.rounds)
    if not names:
        raise FileNotFoundError(f"{args.runs}: no runs of any round; run train.py first, or name --runs DIR")
    seeds = None if args.seeds is None else seeds_of(args.seeds)
    found: dict[str, Runs] = {}
    for name in names:
        try:
            found[name] = read_round(name, args.runs, seeds)
        except (ValueError, OSError) as error:
            complain("error", error)
    results = [analyse(runs, rounds[name]) for name, runs in found.items()]
    comparisons = []
    for first, second in COMPARED:
        if first in found and second in found:
            try:
                comparisons.append(compare(found[first], found[second]))
            except ValueError as error:
                complain("note", error)
    if args.json:
        print(json.dumps({"rounds": results, "comparisons": comparisons}, indent=1))
    elif args.markdown and results:
        print(markdown_of(results), end="")
    else:
        print("\n".join([*map(text_of, results), *map(text_of_comparison, comparisons)]), end="")
    if args.plot and results:
        draw(results, args.plot)
    return 0 if len(found) == len(names) else 2


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for an error told in one line."""
    args = parse_arguments(argv)
    try:
        if args.ask is not None:
            from ask import ask    # here, since nothing else needs torch, which takes seconds to import
            print(ask(args.checkpoint, args.ask, max_new=args.max_new, temperature=args.temperature,
                      top_p=args.top_p))
            return 0
        if args.log:
            rounds = load_rounds()
            names = expand(args.rounds) if args.rounds else rounds
            print(text_of_log([rounds[name] for name in names if rounds[name].log]), end="")
            return 0
        return print_reports(args)
    except (ValueError, OSError) as error:
        complain("error", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
