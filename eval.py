"""The ruler: score a model, record it, compare the two arms of a round, say what came out.

    python eval.py R8        both arms of every finished seed in runs/ and runs/standin/, the verdict, the log
    python eval.py --json    every round found, for programs
    python eval.py --ask "Who wrote Faust?" --checkpoint runs/R8/seed1/prompt_fs/model.pth

Every evaluation leaves a record an example (records.jsonl), and every report is computed from these. A
difference d is prompt_fs minus no_fs on the same example, at the last evaluation.

    acc     token accuracy: the share of an answer's tokens right under teacher forcing, as in the log
    loss    the log's loss: the first answer token's plus the mean of the others', in nats
    EM      HotpotQA: exact match of the greedy text; ARC: is the likeliest of the question's labels right
    F1      HotpotQA: of the greedy text

References: the experiment log for acc and loss; HotpotQA's hotpot_evaluate_v1.py (arXiv:1809.09600) for EM
and F1; stats.py for the verdict. Shapes: S seeds, n examples, M metrics; B examples in a batch, A tokens in
its longest answer, V vocabulary entries.
"""

import argparse
import json
import math
import random
import re
import string
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch

from data import Example, collate, pad
from files import ARMS, METRICS, atomic_write, complain, damage_told, read_round, seeds_on_disk
from fs import FutureSeed, answer_logits, answer_loss, prefill
from model import RWKV7, read_tensors
from rounds import Round, expand, load_rounds, seeds_of
from standin import chance, small_tokenizer
from stats import (EFFECT, JUMP, MIN_SEEDS, RULE, chance_to_gain, holm, judge, mcnemar, sign_test, signs)
from tokenizer import END_OF_DOCUMENT, Tokenizer

SHOWN = "S20"    # the round in which Future-Seed is seen at work
# prompt_fs, once trained, is scored again with its seed states taken away, or made from a wrong prompt
CONTROLS = {"off": "switched off", "other": "of another prompt", "shuffled": "of its prompt, end shuffled"}


# ---- score -------------------------------------------------------------------------------------------------

def score_batch(model: RWKV7, batch: list[Example], fs, device, tokenizer) -> list[dict]:
    prompt, lengths, answer, answer_lengths = collate(batch, device)
    logits, state = answer_logits(model, fs, prompt, lengths, answer)    # (B, A, V)
    losses = answer_loss(logits, answer, answer_lengths).tolist()
    hits = (logits.argmax(dim=-1) == answer).tolist()
    # answers carry no end mark, so greedy decoding writes as many tokens as the gold answer has, in both arms
    written = model.generate(logits[:, 0], state, answer.shape[1]).tolist()
    records = []
    for row, example in enumerate(batch):
        count = len(example.answer)
        text = words_in(written[row][:count], tokenizer)
        exact, f1, option = normalise(text) == normalise(example.text), f1_score(text, example.text), None
        if example.choices:
            option = max(example.choices, key=lambda label: logits[row, 0, example.choices[label]].item())
            exact = f1 = float(option == example.text)
        records.append({
            "id": example.id, "loss": losses[row], "tokens": count, "correct": sum(hits[row][:count]),
            "exact": int(exact), "f1": f1, "option": option, "gold": example.text, "text": text,
        })
    return records


def seed_prompts_of(control: str | None, examples: Sequence[Example]) -> list[list[int]] | None:
    """The prompts that seed states are made from under a control of CONTROLS; None for the examples' own."""
    if control not in ("other", "shuffled"):
        return None
    prompts = [list(example.prompt) for example in examples]
    if control == "other":
        return prompts[1:] + prompts[:1]
    for prompt, example in zip(prompts, examples):
        prompt[-example.tail:] = random.Random(example.id).sample(prompt[-example.tail:], example.tail)
    return prompts


def borrowed(model: RWKV7, fs: FutureSeed, tokens: torch.Tensor, lengths: torch.Tensor):
    """A hook in the place of `fs` that gives every layer the seed state that other prompts gave it."""
    kept = {}

    def keep(layer, below, x_last):
        kept[layer] = fs(layer, below, x_last)
        return kept[layer]

    model(tokens, lengths=lengths, seed_state=keep)
    return lambda layer, below, x_last: kept[layer]


@torch.no_grad()
def score(model: RWKV7, examples: Sequence[Example], fs: FutureSeed | None = None, *, batch_size: int, device,
          step: int, tokenizer, control: str | None = None,
          tick: Callable[[int, int], None] = lambda done, more: None) -> list[dict]:
    """One evaluation: a record for every example, in the order of the examples, whatever the batches.

    Args: model, on `device`; fs, or None; batch_size, examples at once; step and control, one of CONTROLS,
        written into the records; tick, called after every batch with the examples done in all and in it.
    Returns: dicts with step, id, tokens of the answer, correct (of these), loss (nats), exact and f1 (EM and
        F1), all as above; option (ARC: the likeliest label, else None); gold; text (decoded greedily).
    """
    device = torch.device(device)
    kind = {"step": step} if control is None else {"step": step, "control": control}
    seed_prompts = seed_prompts_of(control, examples)
    # neighbours of equal length waste no time on padding; the longest go first: memory fails early or never
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].prompt))
    records: list[dict] = [{}] * len(examples)
    for done in range(0, len(order), batch_size):
        places = order[done:done + batch_size]
        batch = [examples[place] for place in places]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hook = None if control == "off" else fs
            if seed_prompts:
                hook = borrowed(model, fs, *pad([seed_prompts[place] for place in places], device))
            scored = score_batch(model, batch, hook, device, tokenizer)
        for place, record in zip(places, scored):
            records[place] = {**kind, **record}
        tick(done + len(batch), len(batch))
    return records


def means_of(records: list[dict]) -> dict[str, float]:
    """Means over the records of one evaluation, by metric."""
    rows = [(r["correct"] / r["tokens"], r["loss"], r["exact"], r["f1"]) for r in records]
    return dict(zip(METRICS, np.mean(rows, axis=0).tolist()))


def words_in(tokens: list[int], tokenizer) -> str:
    """What a model wrote. The last ids have no token, but a model that knows little may choose one."""
    return tokenizer.decode([token for token in tokens if token in tokenizer.tokens])


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: what two answers are compared by."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def f1_score(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words; yes, no and noanswer count only as a whole."""
    answer, gold = normalise(answer), normalise(gold)
    if answer != gold and {answer, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    common = sum((Counter(answer.split()) & Counter(gold.split())).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer.split()), common / len(gold.split())
    return 2 * precision * recall / (precision + recall)


# ---- compare -----------------------------------------------------------------------------------------------

def labels_of(run: dict, recipe: Round) -> list[str]:
    """What a reader must know before comparing a round's numbers with the log's."""
    labels, settings = [], run["settings"]
    if run["standin"]:
        labels.append("ON THE STAND-IN, made-up questions and a tiny base: not comparable with the log")
    elif run["base"].get("name") != recipe.base:
        labels.append(f"ANOTHER BASE, {run['base'].get('name')}: not comparable with the log")
    if run["minutes"] is not None:
        labels.append(f"{run['minutes']:g} minutes of training an arm, in place of the round's steps")
    published = recipe.settings()
    changed = [f"{key}={settings.get(key)}" for key in published if settings.get(key) != published[key]]
    return labels + [f"settings changed from the round's: {', '.join(changed)}"] * bool(changed)


def analyse(folder: Path, seeds: list[int] | None = None) -> dict:
    """All numbers of the report on a round's folder, as plain JSON values. Raises as files.read_round."""
    found, notes, damaged = read_round(folder, seeds)
    runs, evaluations, controls = zip(*found.values())
    run, ids = runs[0][0], sorted(evaluations[0][0])
    real, miniatures = load_rounds()
    recipe = (miniatures if run["standin"] else real)[folder.name]    # as published
    scores = np.array([[[arm[id] for id in ids] for arm in seed] for seed in evaluations])    # (S, 2, n, M)
    means = scores.mean(axis=2)                       # (S, 2, M)
    x = scores[:, 1] - scores[:, 0]                   # (S, n, M)
    deltas = x.mean(axis=1)                           # (S, M)
    half = 1.96 * x.std(axis=1, ddof=1) / math.sqrt(x.shape[1])    # of the interval over questions
    columns = {"no_fs": means[:, 0], "prompt_fs": means[:, 1], "d": deltas, "low": deltas - half,
               "high": deltas + half}
    per_seed = [{"seed": seed, "steps": [arm["steps"] for arm in pair]} for seed, pair in zip(found, runs)]
    for s, line in enumerate(per_seed):
        for m, metric in enumerate(METRICS):
            line[metric] = {name: float(column[s, m]) for name, column in columns.items()}
    # what was registered is the miniature, as published
    primary = recipe.primary and run["standin"] and run["settings"] == recipe.settings()
    verdict, *typical = judge(x[..., 0])
    learned = means[..., 0] > JUMP                    # (S, 2)
    return {
        "round": recipe.name, "title": recipe.title, "task": recipe.task, "primary": primary,
        "standin": run["standin"], "seeds": list(found), "examples": len(ids), "notes": notes,
        "labels": labels_of(run, recipe), "damaged": damaged, "settings": run["settings"],
        "per_seed": per_seed,
        "over_seeds": {metric: {"mean": float(d.mean()), "std": float(d.std()), "signs": signs(d)}
                       for metric, d in zip(METRICS, deltas.T)},
        "verdict": verdict, "median": float(np.median(deltas[:, 0])),
        "interval": typical if len(x) >= MIN_SEEDS else None, "p": float(sign_test(deltas[:, 0])),
        "gain": [float(number) for number in chance_to_gain(deltas[:, 0])],
        "jumped": learned.sum(axis=0).tolist(), "p_jumped": float(mcnemar(learned[:, 0], learned[:, 1])),
        "controls": {control: [float(np.mean([values[0] for values in seed[control].values()]))
                               for seed in controls]
                     for control in CONTROLS if all(control in seed for seed in controls)},
        "log": log_numbers(recipe) if recipe.log else None,
    }


def log_numbers(recipe: Round) -> dict:
    """The log's line of a round, with what can be computed from its per-seed numbers."""
    deltas = np.array(recipe.log["d_acc"])
    mean, std = float(deltas.mean()), float(deltas.std())
    off = max(abs(mean - recipe.log["mean"]), abs(std - recipe.log["std"]))    # each was rounded to 4 digits
    return {**recipe.log, "recomputed": [mean, std], "as_logged": off < 1.5e-4, "signs": signs(deltas),
            "verdict": judge(deltas[:, None])[0]}


# ---- say ---------------------------------------------------------------------------------------------------

def text_of_round(result: dict, p_in_words: str) -> str:
    """One round's report for a terminal."""
    S = len(result["seeds"])
    length = "" if result["standin"] else f", L={result['settings']['max_prompt']}"
    lines = [f"{result['round']}: {result['title']}{length}; {S} seed{'s' * (S > 1)} on {result['examples']} "
             "questions", *result["labels"], *result["notes"], *result["damaged"],
             "metric seed     step    no_fs  prompt_fs        d  95% interval, over questions"]
    # the stand-in's answers, a token each, have nothing but accuracy and loss; ARC's F1 is its EM
    shown = METRICS[:2] if result["standin"] else METRICS[:3] if result["task"] == "arc" else METRICS
    for metric in shown:
        for line in result["per_seed"]:
            steps = "/".join(map(str, dict.fromkeys(line["steps"])))
            without, with_fs, d, low, high = line[metric].values()
            lines.append(f"{metric:<6} {line['seed']:<5} {steps:>7} {without:>8.4f} {with_fs:>10.4f}  "
                         f"{d:+.4f}  [{low:+.4f}, {high:+.4f}]")
        if S > 1:
            mean, std, counts = result["over_seeds"][metric].values()
            lines.append(f"{metric:<6} mean {mean:+.4f}, std {std:.4f}, sign(+/0/-) {counts}")
    if S >= MIN_SEEDS:
        low, high = result["interval"]
        share, least, most = result["gain"]
        lines += [f"d_acc of the typical seed: median {result['median']:+.4f} [{low:+.4f}, {high:+.4f}]; "
                  f"sign test over seeds {p_in_words}",
                  f"a seed gains with probability {share:.2f} [{least:.2f}, {most:.2f}]"]
    few = "" if S >= MIN_SEEDS else f", with {S} of the {MIN_SEEDS} seeds it takes"
    lines.append(f"verdict on d_acc: {result['verdict']}{few}")
    if result["standin"]:
        without, with_fs = result["jumped"]
        lines.append(f"seeds that learned it (more than {JUMP:.0%} right): no_fs {without} of {S}, prompt_fs "
                     f"{with_fs} of {S}; exact paired p {result['p_jumped']:.3f}")
    for control, values in result["controls"].items():
        numbers = " ".join(f"{value:.4f}" for value in values)
        lines.append(f"accuracy of prompt_fs, its seed states {CONTROLS.get(control, control)}: {numbers}")
    if result["log"]:
        real = " (on real records)" if result["standin"] else ""
        lines.append(f"the log{real}: {text_of_log(result['log'])}")
    return "\n  ".join(lines) + "\n"


def text_of(results: list[dict]) -> str:
    """The reports of several rounds. One was registered as the study's question; the others are a family."""
    family = [result for result in results if not result["primary"] and len(result["seeds"]) >= MIN_SEEDS]
    kind = f"(Holm, {len(family)} rounds)" if len(family) > 1 else "(exploratory)"
    corrected = iter(holm([result["p"] for result in family]))
    texts = []
    for result in results:
        words = f"p {next(corrected):.2g} {kind}" if result in family else f"p {result['p']:.2g} (registered)"
        texts.append(text_of_round(result, words))
    return "\n".join(texts)


def text_of_log(log: dict) -> str:
    """The log's line of a round; its mean and deviation are recomputed from its per-seed numbers."""
    deltas, (mean, std) = " ".join(f"{delta:+.4f}" for delta in log["d_acc"]), log["recomputed"]
    doubt = "" if log["as_logged"] else f" (NOT as logged, {log['mean']:+.4f} and {log['std']:.4f})"
    return (f"d_acc {deltas}, mean {mean:+.4f}, std {std:.4f}{doubt}, sign(+/0/-) {log['signs']}, "
            f"\"{log['status']}\"; by our rule {log['verdict']}")


def report(folder: Path) -> tuple[dict, str]:
    """The report on the finished seeds in a round's folder, also written beside it under the log's name."""
    result = analyse(folder)
    text = text_of([result])
    name = result["log"]["summary"] if result["log"] else f"_summary_{folder.name}.txt"
    with atomic_write(folder.with_name(name), "w") as file:
        file.write(text)
    return result, text


def explain(result: dict, seed: int, validation: list[Example], tokenizer, folder: Path) -> str:
    """A seed on the stand-in in plain words: what was asked, what came out, what that does not say."""
    s, settings = result["seeds"].index(seed), result["settings"]
    acc, off = result["per_seed"][s]["acc"], result["controls"]["off"][s]
    written = []
    for arm in ARMS:
        lines = (folder / arm / "records.jsonl").read_text(encoding="utf-8").splitlines()[-len(validation):]
        written.append([json.loads(line)["text"].strip() for line in lines])
    answers = [answer for answer in zip(validation, *written) if answer[1] != answer[2]]
    lines = [f"Seed {seed} in words: {len(validation)} questions on {settings['facts']} facts each. A fact "
             f"picked at random is right {chance(result['task'], settings['facts']):.0%} of the time.",
             f"Without Future-Seed {acc['no_fs']:.0%} of the answers are right, with it "
             f"{acc['prompt_fs']:.0%}.",
             f"The arms answer {len(answers)} questions differently{', such as' * bool(answers)}"]
    for example, without, with_fs in answers[:4]:
        question = " ".join(tokenizer.decode(example.prompt).replace("\n\n", ", ").split())
        lines += [f"  {question}",
                  f"    right is {example.text}; no_fs says {without}, prompt_fs says {with_fs}"]
    lines.append(f"With its seed states switched off after training, prompt_fs answers {off:.0%} right.")
    if abs(acc["prompt_fs"] - off) < EFFECT:
        gate = 1 / (1 + math.exp(-settings["alpha_init"]))
        lines += [f"So it does not use them. Their gate began at {gate:.3f}, from layer "
                  f"{settings['fs_layer_start']} on.",
                  f"Future-Seed at work: python train.py --round {SHOWN} --seed {seed} --standin"]
    else:
        lines.append("So it answers by way of them.")
    lines.append("One seed decides nothing, for another may learn what this one missed. A verdict needs "
                 f"{MIN_SEEDS}: --seeds 0-{MIN_SEEDS - 1}")
    return "\n  ".join(lines)


# ---- ask ---------------------------------------------------------------------------------------------------

def ask(checkpoint: Path, text: str) -> str:
    """A trained model's answer: its likeliest tokens after the prompt, up to the end of the line.

    Args: checkpoint, an official-format file; the run.json and fs.pth that a run leaves beside it decide on
        Future-Seed; text, a whole prompt if it ends in "Answer:", else a question, put as the rounds put
        theirs. Raises: ValueError or OSError naming the file.
    """
    prompt = text if text.rstrip().endswith("Answer:") else f"Question:\n{text.strip()}\n\nAnswer:"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = RWKV7.load(checkpoint).to(device)
    tokenizer, longest = Tokenizer(), 24
    if model.config.vocab_size == len(small_tokenizer().tokens):
        tokenizer, longest = small_tokenizer(), 1    # its answers are one token, and nothing marks their end
    fs, own = None, checkpoint.with_name("fs.pth")
    if own.exists():
        with damage_told(checkpoint.absolute().parent):
            settings = json.loads(checkpoint.with_name("run.json").read_text(encoding="utf-8"))["settings"]
            fs = FutureSeed(model.config, **Round("", "", **settings).fs_settings()).to(device)
            fs.load_state_dict(read_tensors(own)[0])
    tokens, lengths = pad([tokenizer.encode(prompt)], device)
    if tokens.max() >= model.config.vocab_size:
        raise ValueError(f"{checkpoint}: its vocabulary has {model.config.vocab_size} entries, not 65536")
    with torch.no_grad():
        hidden, state = prefill(model, tokens, lengths, fs)
        stop = (END_OF_DOCUMENT, *tokenizer.encode("\n"))
        new = model.generate(model.head(hidden[:, -1]), state, longest, stop=stop)
    return words_in(new[0].tolist(), tokenizer).strip().split("\n")[0]


# ---- the command line --------------------------------------------------------------------------------------

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=RULE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("rounds", nargs="*", metavar="R", help="rounds (default: all that have runs)")
    option("--runs", type=Path, default="runs", metavar="DIR", help="train.py's --runs (default: runs)")
    option("--seeds", metavar="LIST", help="only these seeds, as 0-9 or 0,3,5 (default: all found)")
    option("--json", action="store_true", help="print all numbers as JSON")
    option("--ask", metavar="TEXT", help="a question for a trained model, or a prompt that ends in Answer:")
    option("--checkpoint", type=Path, metavar="PATH", help="of the model to ask, as a run's model.pth")
    args = parser.parse_args(argv)
    if (args.ask is None) != (args.checkpoint is None):
        parser.error("--ask TEXT and --checkpoint PATH go together")
    return args


def print_reports(args: argparse.Namespace) -> int:
    """Report every round that can be read, and say of each other one why not. Returns the exit code."""
    real = load_rounds()[0]
    folders = [args.runs, args.runs / "standin"]
    names = expand(args.rounds, real) if args.rounds else real
    found = [folder / name for name in names for folder in folders if seeds_on_disk(folder / name)]
    if not found:
        raise FileNotFoundError(f"{' and '.join(map(str, folders))}: no such runs; see train.py, or --runs")
    results, troubles = [], []
    for folder in found:
        try:
            results.append(analyse(folder, args.seeds and seeds_of(args.seeds)))
            troubles += results[-1]["damaged"]
        except (ValueError, OSError) as error:
            troubles.append(error)
    print(json.dumps({"rounds": results}, indent=1) if args.json else text_of(results))
    for trouble in troubles:
        complain(trouble)
    return 2 if troubles else 0


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for an error told in one line."""
    args = parse_arguments(argv)
    try:
        if args.ask is None:
            return print_reports(args)
        print(ask(args.checkpoint, args.ask))
        return 0
    except (ValueError, OSError) as error:
        complain(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
