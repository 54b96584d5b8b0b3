"""One evaluation of a model: answers decoded from the prompt's state, and a record for every example.

Reference: the experiment log for accuracy and loss; HotpotQA's official hotpot_evaluate_v1.py (Yang et al.
2018, arXiv:1809.09600) for exact match and F1.
Shapes: B examples in a batch, T tokens in its longest prompt, A tokens in its longest answer, R answers that
continue the batch's prompts, C channels, V vocabulary entries.
"""

import re
import string
import sys
import time
from collections import Counter
from typing import Sequence

import torch

from data import pad
from fs import FutureSeed, prefill
from model import LayerState, RWKV7


# ---- decoding ----------------------------------------------------------------------------------------------

generate = RWKV7.generate    # moved into model.py


def text_of(tokens: list[int], tokenizer) -> str:
    """What a model wrote. The last ids have no token, but a model that knows little may choose one."""
    return tokenizer.decode([token for token in tokens if token in tokenizer.tokens])


# ---- scoring -----------------------------------------------------------------------------------------------

def answer_log_probs(model: RWKV7, logits, state, rows: torch.Tensor, answers: Sequence[list[int]]):
    """Log probabilities of given answers' tokens, each after the prompt and the answer's own earlier tokens.

    Args: logits (B, V) of the first answer token; state, after the prompts; rows (R,), the batch row that
        each of the R answers continues. Only answer positions get logits: 65536 of them for every prompt
        token would not fit.
    Returns: log_probs (R, A) fp32 and hits (R, A) bool (the token is the likeliest of all), both 0 behind an
        answer's end.
    """
    targets, lengths = pad(answers, logits.device)    # (R, A), (R,)
    log_probs = torch.zeros(targets.shape, device=targets.device)
    hits = torch.zeros(targets.shape, dtype=torch.bool, device=targets.device)
    first = targets[:, 0]
    log_probs[:, 0] = logits.float().log_softmax(dim=-1)[rows, first]
    hits[:, 0] = logits.argmax(dim=-1)[rows] == first
    if targets.shape[1] > 1:
        state = [LayerState(*(part[rows] for part in layer)) for layer in state]
        hidden, _ = model(targets[:, :-1], state=state, lengths=lengths - 1)
        position = torch.arange(1, targets.shape[1], device=targets.device)
        inside = position < lengths.unsqueeze(1)    # (R, A - 1)
        rest = model.head(hidden[inside])           # (answer positions, V)
        later = targets[:, 1:][inside]
        log_probs[:, 1:][inside] = rest.float().log_softmax(dim=-1).gather(1, later.unsqueeze(1)).squeeze(1)
        hits[:, 1:][inside] = rest.argmax(dim=-1) == later
    return log_probs, hits


def score_batch(model: RWKV7, batch, fs: FutureSeed | None, device, tokenizer) -> list[dict]:
    tokens, lengths = pad([example.prompt for example in batch], device)
    hidden, state = prefill(model, tokens, lengths, fs)
    rows = torch.arange(len(batch), device=device)
    logits = model.head(hidden[rows, lengths - 1])    # (B, V)
    answers = [example.answer for example in batch]
    log_probs, hits = (part.cpu() for part in answer_log_probs(model, logits, state, rows, answers))
    # answers carry no end mark, so greedy decoding writes as many tokens as the gold answer has, in both arms
    written = generate(model, logits, state, max(map(len, answers))).tolist()

    labels = [(row, label) for row, example in enumerate(batch) for label in example.choices or ()]
    chosen: dict[int, tuple[float, str]] = {}
    if labels:
        choice_rows = torch.tensor([row for row, _ in labels], device=device)
        choices = [batch[row].choices[label] for row, label in labels]
        totals = answer_log_probs(model, logits, state, choice_rows, choices)[0].sum(dim=1).tolist()
        for (row, label), total in zip(labels, totals):
            if row not in chosen or total > chosen[row][0]:
                chosen[row] = (total, label)

    records = []
    for row, example in enumerate(batch):
        count = len(example.answer)
        losses = (-log_probs[row, :count]).tolist()
        # the log's loss: the first token's, plus the mean of the others
        loss = losses[0] + (sum(losses[1:]) / (count - 1) if count > 1 else 0.0)
        text = text_of(written[row][:count], tokenizer)
        if example.choices:
            option = chosen[row][1]
            exact = f1 = float(option == example.text)
        else:
            option = None
            exact, f1 = exact_match(text, example.text), f1_score(text, example.text)
        records.append({
            "id": example.id, "loss": loss, "tokens": count, "correct": int(hits[row].sum()),
            "exact": int(exact), "f1": f1, "option": option, "gold": example.text, "text": text,
        })
    return records


@torch.no_grad()
def score(model: RWKV7, examples, fs: FutureSeed | None = None, *, batch_size: int, device, task: str,
          step: int, tokenizer, autocast: torch.dtype | None = None) -> list[dict]:
    """One evaluation: a record for every example, in the order of the examples, whatever the batches.

    Args: model, on `device`; examples, a list of data.Example; fs, Future-Seed while reading the prompts, or
        None; batch_size, examples at once; task, "arc" or "hotpotqa"; step, written into the records;
        autocast, the dtype of the matrix products (torch.bfloat16 on a GPU), None for the parameters' own.
    Returns: dicts with step, id, loss (first answer token's negative log likelihood plus the mean of the
        others', nats), tokens, correct (argmax right under teacher forcing), exact and f1 (ARC: the likeliest
        of the question's own labels is the gold one; HotpotQA: of the greedy text), option (ARC, else None),
        gold, text (decoded greedily).
    Raises: ValueError naming an example without a prompt or an answer, or an ARC example without choices.
    """
    for example in examples:
        if not example.prompt or not example.answer:
            raise ValueError(f"example {example.id}: cannot be scored without a prompt and an answer")
        if (task == "arc") != bool(example.choices):
            raise ValueError(f"example {example.id}: ARC has choices, HotpotQA has none; the task is {task}")
    # neighbours of equal length waste no time on padding; the longest go first: memory fails early or never
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].prompt))
    records: list[dict] = [{}] * len(examples)
    start = shown = time.monotonic()
    for done in range(0, len(order), batch_size):
        places = order[done : done + batch_size]
        batch = [examples[place] for place in places]
        with torch.autocast(torch.device(device).type, dtype=autocast, enabled=autocast is not None):
            scored = score_batch(model, batch, fs, device, tokenizer)
        for place, record in zip(places, scored):
            records[place] = {"step": step, **record}
        now = time.monotonic()
        if now - start > 3 and now - shown > 1:
            finished = done + len(places)
            left = (now - start) / finished * (len(order) - finished)
            progress = f"\r  scored {finished} of {len(order)} examples, {left:.0f} s left"
            print(f"{progress:<60}", end="", file=sys.stderr, flush=True)
            shown = now
    if shown > start:
        print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)
    return records


def summarise(records: list[dict]) -> dict:
    """Means over the records of one evaluation: loss, token accuracy as `accuracy`, exact and f1."""
    sums = {
        "loss": sum(record["loss"] for record in records),
        "accuracy": sum(record["correct"] / record["tokens"] for record in records),
        "exact": sum(record["exact"] for record in records),
        "f1": sum(record["f1"] for record in records),
    }
    return {name: total / len(records) for name, total in sums.items()}


# ---- exact match and F1, as HotpotQA's official script defines them ----------------------------------------

def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: what two answers are compared by."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def exact_match(answer: str, gold: str) -> float:
    return float(normalise(answer) == normalise(gold))


def f1_score(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words; yes, no and noanswer count only as a whole."""
    answer, gold = normalise(answer), normalise(gold)
    if answer != gold and {answer, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    common = sum((Counter(answer.split()) & Counter(gold.split())).values())
    if common == 0:
        return 0.0
    precision = common / len(answer.split())
    recall = common / len(gold.split())
    return 2 * precision * recall / (precision + recall)
