"""Score a model: what does it answer, and is that right? And the command that reports on runs.

    python eval.py R8                  both arms of every finished seed in runs/, the verdict, the log
    python eval.py S20 --plot s20.png  the same as a picture: every seed's accuracy, and the training losses
    python eval.py --json              every round found, for programs
    python eval.py --ask "Who wrote Faust?" --checkpoint runs/S20/seed1/prompt_fs/model.pth

Every evaluation leaves a record an example (records.jsonl), and report.py computes everything from these:

    acc     token accuracy: the share of an answer's tokens right under teacher forcing, as in the log
    loss    the log's loss: the first answer token's plus the mean of the others', in nats
    EM      HotpotQA: exact match of the line that the model writes; ARC: is the likeliest label the right one
    F1      HotpotQA: of the line that the model writes

To write an answer, a model decodes greedily within a fixed budget of tokens, the round's max_answer and
SPARE_TOKENS more, which does not depend on the gold answer. White space before the answer is skipped. The
answer is what follows up to the first line break or the end of the document, and it is held against the whole
gold answer by the official rules.

References: the experiment log for acc and loss; HotpotQA's hotpot_evaluate_v1.py (arXiv:1809.09600) for EM
and F1. Shapes: B examples in a batch, A tokens in its longest answer, V vocabulary entries.
"""

import files

if __name__ == "__main__":
    files.stop_from_the_first_line()    # the imports below take seconds

import argparse
import json
import random
import re
import signal
import string
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch

from data import Example, answer_cue, arrange, collate, pad, prompt_blocks
from files import complain, read_text, say, tell
from fs import FutureSeed, answer_logits, answer_loss, prefill
from model import RWKV7, read_tensors
from report import analyse, plot, text_of
from rounds import Round, expand, load_rounds, seeds_of
from runs import FOLDERS, METRICS, RUN, check_shape, naming_damage, recipe_of, seeds_on_disk
from standin import small_tokenizer
from stats import RULE
from tokenizer import END_OF_DOCUMENT, Tokenizer

# tokens beyond max_answer, because a model may begin with an article, and 6 of 1,952 gold answers of HotpotQA
# have more than 24 tokens. One has 45 and stays out of reach: room for it would cost every question half as
# much time again.
SPARE_TOKENS = 8


# ---- what a model writes -----------------------------------------------------------------------------------

def answer_budget(recipe: Round, source: str) -> int:
    """How many tokens a model may write. ARC's and the stand-in's answers are one, and nothing ends them."""
    if recipe.task == "arc" or source == "standin":
        return 1
    return recipe.max_answer + SPARE_TOKENS


def line_of(tokens: list[int], tokenizer) -> tuple[str, bool]:
    """The line that these tokens write, without white space around it, and whether the line has ended.

    A model that knows little may choose one of the last ids, which have no token; such an id writes nothing.
    """
    ended = END_OF_DOCUMENT in tokens
    if ended:
        tokens = tokens[:tokens.index(END_OF_DOCUMENT)]
    text = tokenizer.decode([token for token in tokens if token in tokenizer.tokens]).lstrip()
    line, line_break, _ = text.partition("\n")
    return line.strip(), ended or bool(line_break)


def write_answers(model: RWKV7, logits, state, max_new: int, tokenizer) -> list[str]:
    """The line that a model writes in each row, greedily.

    Args: logits (B, V) of the first new token; state, in which the prompts ended; max_new, tokens at most.
    """
    def all_ended(written: torch.Tensor) -> bool:
        return all(line_of(row, tokenizer)[1] for row in written.tolist())

    written = model.generate(logits, state, max_new, done=all_ended)    # (B, at most max_new)
    return [line_of(row, tokenizer)[0] for row in written.tolist()]


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


# ---- score -------------------------------------------------------------------------------------------------

def score_batch(model: RWKV7, batch: list[Example], fs, device, tokenizer, max_new: int) -> list[dict]:
    """The records of one batch, in its order, without step and control."""
    prompt, lengths, answer, answer_lengths = collate(batch, device)
    logits, state = answer_logits(model, fs, prompt, lengths, answer)    # (B, A, V)
    losses = answer_loss(logits, answer, answer_lengths).tolist()
    hits = (logits.argmax(dim=-1) == answer).tolist()
    texts = write_answers(model, logits[:, 0], state, max_new, tokenizer)
    records = []
    for row, (example, text) in enumerate(zip(batch, texts)):
        exact = float(normalise(text) == normalise(example.text))
        f1 = f1_score(text, example.text)
        option = None
        if example.choices:
            # ARC: the likeliest of the question's labels, by the token that each would begin with
            option = max(example.choices, key=lambda label: logits[row, 0, example.choices[label]].item())
            exact = f1 = float(option == example.text)
        count = len(example.answer)
        records.append({
            "id": example.id, "loss": losses[row], "tokens": count, "correct": sum(hits[row][:count]),
            "exact": int(exact), "f1": f1, "option": option, "gold": example.text, "text": text,
        })
    return records


def seed_prompts_of(control: str | None, examples: Sequence[Example]) -> list[list[int]] | None:
    """The wrong prompts that a control, one of runs.CONTROLS, makes the examples' seed states from.

    None where it makes them from each example's own prompt, or makes none.
    """
    if control not in ("other", "shuffled"):
        return None
    prompts = [list(example.prompt) for example in examples]
    if control == "other":
        return prompts[1:] + prompts[:1]    # every example gets the prompt of the next one
    # "shuffled": what comes after the prompt's first block, as the question does, loses its order
    for prompt, example in zip(prompts, examples):
        # Random does the same with a str, but refuses half a surrogate pair, which JSON may hold
        rng = random.Random(example.id.encode("utf-8", "surrogatepass"))
        prompt[-example.tail:] = rng.sample(prompt[-example.tail:], example.tail)
    return prompts


def seed_states_of(model: RWKV7, fs: FutureSeed, tokens: torch.Tensor, lengths: torch.Tensor):
    """A hook in the place of `fs` that gives every layer the seed state that other prompts gave it."""
    kept = {}

    def keep(layer, below, x_last):
        kept[layer] = fs(layer, below, x_last)
        return kept[layer]

    model(tokens, lengths=lengths, seed_state=keep)
    return lambda layer, below, x_last: kept[layer]


@torch.no_grad()
def score(model: RWKV7, examples: Sequence[Example], fs: FutureSeed | None = None, *, batch_size: int, device,
          step: int, tokenizer, max_new: int, control: str | None = None,
          tick: Callable[[int], None] = lambda done: None) -> list[dict]:
    """One evaluation: a record for every example, in the order of the examples, whatever the batches.

    Args: model, on `device`; fs, or None; batch_size, examples at once; step and control, one of
        runs.CONTROLS, written into the records; max_new, tokens that an answer may have, see answer_budget;
        tick, called after every batch with the number of examples done.
    Returns: dicts with step, id, tokens of the answer, correct (of these), loss (nats), exact and f1 (EM and
        F1), all as above; option (ARC: the likeliest label, else None); gold; text (the line written).
    """
    device = torch.device(device)
    evaluation = {"step": step}
    if control is not None:
        evaluation["control"] = control
    seed_prompts = seed_prompts_of(control, examples)
    # neighbours of equal length waste no time on padding; the longest go first: memory fails early or never
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].prompt))
    records: list[dict] = [{}] * len(examples)
    for first in range(0, len(order), batch_size):
        places = order[first:first + batch_size]
        batch = [examples[place] for place in places]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hook = fs
            if control == "off":
                hook = None
            elif seed_prompts:
                tokens, lengths = pad([seed_prompts[place] for place in places], device)
                hook = seed_states_of(model, fs, tokens, lengths)
            scored = score_batch(model, batch, hook, device, tokenizer, max_new)
        for place, record in zip(places, scored):
            records[place] = {**evaluation, **record}
        tick(first + len(batch))
    return records


def means_of(records: list[dict]) -> dict[str, float]:
    """Means over the records of one evaluation, by metric."""
    # a row an example, its columns in the order of METRICS
    rows = [(record["correct"] / record["tokens"], record["loss"], record["exact"], record["f1"])
            for record in records]
    return dict(zip(METRICS, np.mean(rows, axis=0).tolist()))


# ---- ask ---------------------------------------------------------------------------------------------------

def ask(checkpoint: Path, question: str, context: list[str]) -> str:
    """The line that a model answers a question with.

    Args: checkpoint, an official-format file. If a run left it, the run.json and fs.pth beside it decide on
        the form of the prompt, the length of the answer and Future-Seed. question, which is put into that
        form, or a whole prompt if it ends in "Answer:". context, paragraphs, or ARC's options.
    Raises: ValueError or OSError naming the file.
    """
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    model = RWKV7.load(checkpoint).to(device)
    folder = checkpoint.absolute().parent
    # a file that no run left is asked in HotpotQA's form, without Future-Seed
    recipe = Round(name="", title="", task="hotpotqa", order="context_first", max_answer=24)
    source, fs = "real", None
    if (folder / "run.json").exists():
        with naming_damage(folder / "run.json", "Run it again, or ask a file that stands alone."):
            run = json.loads(read_text(folder / "run.json"))
            check_shape(run, RUN)
            recipe, source = recipe_of(run), run["source"]
    if (folder / "fs.pth").exists():
        with naming_damage(folder / "fs.pth", "Run it again, or ask a file that stands alone."):
            fs = FutureSeed(model.config, **recipe.fs_settings()).to(device)
            fs.load_state_dict(read_tensors(folder / "fs.pth")[0])
    tokenizer = Tokenizer()
    if source == "standin":
        tokenizer = small_tokenizer()
    needed = max(tokenizer.tokens) + 1
    if model.config.vocab_size < needed:
        raise ValueError(f"{checkpoint} has a vocabulary of {model.config.vocab_size} tokens, and the "
                         f"tokenizer has {needed}. Ask a model that was trained with RWKV World's tokenizer. "
                         "A model from the stand-in needs its run.json beside it.")
    with torch.no_grad():
        prompt = tokenizer.encode(prompt_of(recipe, question, context))
        hidden, state = prefill(model, torch.tensor([prompt], device=device), fs=fs)
        logits = model.head(hidden[:, -1])    # (1, V)
    return write_answers(model, logits, state, answer_budget(recipe, source), tokenizer)[0]


def prompt_of(recipe: Round, question: str, context: list[str]) -> str:
    """The prompt that a round's recipe makes of a question; `question` may be a prompt already, see ask."""
    cue = answer_cue(recipe.task, recipe.arc_border)    # "\n\nAnswer:", and a space where the run had one
    if question.rstrip().endswith("Answer:"):
        return question.rstrip().removesuffix("Answer:") + cue.lstrip()
    context_block, question_block = prompt_blocks(recipe.task, context, question.strip())
    blocks = [question_block]
    if context:
        blocks = arrange(recipe.order, context_block, question_block)
    return "\n\n".join(blocks) + cue


# ---- the command line --------------------------------------------------------------------------------------

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=RULE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("rounds", nargs="*", metavar="R", help="rounds (default: all that have runs)")
    option("--runs", type=Path, default="runs", metavar="DIR", help="train.py's --runs (default: runs)")
    option("--seeds", metavar="LIST", help="only these seeds, as 0-9 or 0,3,5 (default: all found)")
    option("--json", action="store_true", help="print all numbers as JSON")
    option("--plot", type=Path, metavar="FILE.png", help="draw them, too; needs matplotlib")
    option("--ask", metavar="TEXT", help="a question for a trained model, or a prompt that ends in Answer:")
    option("--context", nargs="+", default=[], metavar="TEXT", help="what --ask is about, by paragraphs")
    option("--checkpoint", type=Path, metavar="PATH", help="of the model to ask, as a run's model.pth")
    args = parser.parse_args(argv)
    if (args.ask is None) != (args.checkpoint is None):
        parser.error("--ask TEXT and --checkpoint PATH go together")
    if args.context and args.ask is None:
        parser.error("--context TEXT is what --ask TEXT asks about; give both")
    if args.plot and args.plot.suffix.lower() != ".png":
        parser.error(f"--plot {args.plot}: a picture is a PNG, so give it a name that ends in .png")
    return args


def report_on_runs(args: argparse.Namespace) -> int:
    """Report every round that can be read, and say of each other one why not. Returns the exit code."""
    published, _ = load_rounds()
    names, seeds = list(published), None
    if args.rounds:
        names = expand(args.rounds, published)
    if args.seeds is not None:
        seeds = seeds_of(args.seeds)
    folders = [args.runs / folder / name for name in names for folder in FOLDERS.values()]
    folders = [folder for folder in folders if seeds_on_disk(folder)]
    if not folders:
        wanted = ", ".join(args.rounds) or "any round"
        raise FileNotFoundError(f"{args.runs} holds no runs of {wanted}. Train some with train.py, or name "
                                "another folder with --runs DIR.")
    results, troubles = [], []
    for folder in folders:
        try:
            results.append(analyse(folder, seeds))
            troubles += results[-1]["damaged"]
        except (ValueError, OSError) as error:
            troubles.append(error)
    if args.json:
        tell(json.dumps({"rounds": results}, indent=1))
    else:
        tell(text_of(results))
    for trouble in troubles:
        complain(trouble)
    if args.plot and results:    # last, so that the report is printed even where the picture fails
        plot([Path(result["folder"]) for result in results], args.plot, seeds)
        say(f"{args.plot} is drawn")
    if troubles:
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, 2 for an error told in one line, or 130 when it was stopped."""
    try:
        # until here a stop has ended the process; from here on it is an exception, which is caught below
        signal.signal(signal.SIGINT, signal.default_int_handler)
        args = parse_arguments(argv)
        if args.ask is None:
            return report_on_runs(args)
        tell(ask(args.checkpoint, args.ask, args.context))
        return 0
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except (ValueError, OSError) as error:
        complain(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
