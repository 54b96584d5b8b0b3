"""The built-in stand-in: a task and a base so small that every round runs anywhere, in minutes.

Where a round's own base or data cannot be had, it runs on questions that this file makes up, from a base
that it trains on first use, in a minute or two: `python train.py --round standin --seed 1`.
That base is what the published one is to the log, a model that answers well while the question comes first:
it was pretrained so, without Future-Seed. Post-training then puts the question last. [standin] in rounds.toml
has the lengths and steps; a round keeps its task, its order and its Future-Seed.

The base is an official checkpoint but for its vocabulary: only the tokens that the stand-in's questions need,
162 of 65536, in their order, from 1 on.

Shapes: B batch rows, T prompt tokens, A answer tokens.
"""

import functools
import hashlib
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn

from arm import Arm, Stopped, catch_signals, duration, make_optimizer, say, stop_requested, update
from data import Example, collate, make_example, read_arc, read_hotpotqa
from files import save_tensors
from model import RWKV7, Config
from rounds import Round, load_rounds, miniature
from score import score, summarise
from tokenizer import END_OF_DOCUMENT, Tokenizer

LAYERS, CHANNELS, HEAD_SIZE, FFN, RANK = 12, 48, 16, 96, 8
QUESTION_FIRST = {"arc": "R3", "hotpotqa": "R7"}    # rounds whose order is that of pretraining
EASY = 0.35          # nats: once the running loss is below it, the questions get one fact more
KNOWN = 0.06         # nats: and with all facts in them, the base is put to the test
PASSED = 0.99        # the accuracy that the test asks for
QUESTIONS = 1024     # in the test, from the validation split
USUAL_STEPS = {"arc": 450, "hotpotqa": 270}    # twice as many, and the attempt has failed
ATTEMPTS = 5


# ---- questions ---------------------------------------------------------------------------------------------

# every word is one token, at the start of a line or after a space; few words, for a small model to learn
NAMES = ("Ann Bob Tom Sam Max Ben Dan Kim Amy Lee Joe Jim Jack John Mary Paul Mark Anna Alex Adam Eric Ryan "
         "Luke Jane Kate Rose Ruby Nick Mike Dave Peter David").split()
VERBS = ("runs sings eats jumps reads walks plays works writes speaks moves lives falls rises waits "
         "drives").split()
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def standin_records(task: str, split: str, n: int, seed: int | str, n_facts: int) -> list[dict]:
    """n generated records in the official format of a task: looking up one of n_facts, all equally likely.

    hotpotqa: a paragraph a fact, "Ann runs", "Bob sings", …; "Bob"; "sings" (2 to 32 facts).
    arc: the options "A. Ann", "B. Bob", …; "Who is Bob?"; "B" (2 to 26 facts).

    Paragraphs have no titles, and a fact is three tokens there and four here, since the stand-in trains on a
    CPU. No question can be answered without the facts. A hash of the facts, in whatever order, and the
    question decides which split they are in: training and validation share none, and from three facts on
    neither runs out. Raises ValueError for an unknown split or n_facts out of range.
    """
    most = len(NAMES) if task == "hotpotqa" else len(LABELS)
    if split not in ("train", "validation") or not 2 <= n_facts <= most:
        raise ValueError(f"the stand-in has train and validation, 2 to {most} facts: not {split}, {n_facts}")
    generator = random.Random(f"{task} {split} {seed}")
    records: list[dict] = []
    while len(records) < n:
        names = generator.sample(NAMES, n_facts)
        asked = generator.randrange(n_facts)
        values = generator.choices(VERBS, k=n_facts) if task == "hotpotqa" else LABELS[:n_facts]
        facts = [f"{name} {value}" for name, value in zip(names, values)]
        identity = " ".join(sorted(facts) + [names[asked]]).encode()
        if (hashlib.sha256(identity).digest()[0] < 64) != (split == "validation"):
            continue
        id = f"standin-{split}-{seed}-{len(records)}"
        if task == "arc":
            choices = [{"text": name, "label": label} for name, label in zip(names, values)]
            records.append({"id": id, "question": {"stem": f"Who is {names[asked]}?", "choices": choices},
                            "answerKey": values[asked]})
        else:
            records.append({"_id": id, "question": names[asked], "answer": values[asked], "type": "bridge",
                            "level": "easy", "supporting_facts": [["", 0]],
                            "context": [["", [fact]] for fact in facts]})
    return records


class SmallTokenizer(Tokenizer):
    """The official tokenizer with no other tokens than those of the stand-in's questions, renumbered."""

    def __init__(self):
        super().__init__()
        texts = [read(standin_records(task, "train", 1, 0, 2)[0], order)[0] for task, read, order in (
            ("arc", read_arc, "context_first"), ("arc", read_arc, "question_first"),
            ("hotpotqa", read_hotpotqa, "context_first"), ("hotpotqa", read_hotpotqa, "question_first"))]
        texts += [space + word for word in (*NAMES, *VERBS, *LABELS) for space in ("", " ")]
        used = set()
        for text in texts:
            used.update(super().encode(text))
        self.number = {token: number for number, token in enumerate(sorted(used), start=1)}
        self.tokens = {number: self.tokens[token] for token, number in self.number.items()}
        self.tokens[END_OF_DOCUMENT] = b""

    def encode(self, text):
        """Ids in the small vocabulary. ValueError for a word that no question of the stand-in holds."""
        try:
            return [self.number[token] for token in super().encode(text)]
        except KeyError:
            raise ValueError(f"{text!r}: the stand-in knows only names ({NAMES[0]}, {NAMES[1]}, …), verbs "
                             f"({VERBS[0]}, {VERBS[1]}, …) and the words around them") from None


small_tokenizer = functools.cache(SmallTokenizer)    # reading the vocabulary takes a third of a second


def make_examples(round: Round, split: str, n: int, seed, n_facts: int, order: str,
                  tokenizer: SmallTokenizer) -> list[Example]:
    records = standin_records(round.task, split, n, seed, n_facts)
    rules = dict(order=order, max_prompt=round.max_prompt, max_answer=round.max_answer)
    return [make_example(round.task, record, tokenizer, **rules) for record in records]


def facts_at(round: Round, step: int) -> int:
    """How many facts a question of this step has: few at first, or nothing is learned at all."""
    ramp = min(1.0, max(0, step - round.facts_hold) / max(1, round.facts_ramp))
    return round.facts_first + int((round.facts - round.facts_first) * ramp)


def training_examples(round: Round, seed: int, tokenizer: SmallTokenizer) -> list[Example]:
    """A run's batches one after the other: fresh questions at every step, the same in both arms."""
    examples = []
    for step in range(round.steps):
        rehearse = random.Random(f"{seed} {step}").random() < round.rehearsal
        order = "question_first" if rehearse else round.order
        examples += make_examples(round, "train", round.batch_size, f"{seed} {step}", facts_at(round, step),
                                  order, tokenizer)
    return examples


def validation_examples(round: Round, tokenizer: SmallTokenizer) -> list[Example]:
    """The same for every seed, all with the most facts."""
    return make_examples(round, "validation", round.n_val, round.validation_seed, round.facts, round.order,
                         tokenizer)


# ---- the base ----------------------------------------------------------------------------------------------

@dataclass
class Pace:
    """Where pretraining is. The base sets its own pace: see EASY."""

    attempt: int = 0
    step: int = 0
    facts: int = 2
    loss: float = 2.0    # running mean of the steps' losses, nats


def fresh_arm(seed: int, attempt: int, tokenizer: SmallTokenizer) -> Arm:
    vocab_size = 1 + len(tokenizer.number)
    config = Config(LAYERS, CHANNELS, HEAD_SIZE, vocab_size, FFN, RANK, RANK, RANK, RANK)
    seed = ATTEMPTS * seed + attempt
    model = RWKV7.init(config, seed)
    # the published 1e-4 suits long runs: here most of the steps would go into growing the embedding
    nn.init.uniform_(model.emb.weight, -0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    return Arm(model, None)


def passes(model: RWKV7, validation: list[Example], round: Round, name: str, step: int,
           tokenizer: SmallTokenizer) -> bool:
    records = score(model, validation, batch_size=256, device=model.head.weight.device, task=round.task,
                    step=step, tokenizer=tokenizer)
    accuracy = summarise(records)["accuracy"]
    say(f"{name}: step {step}, accuracy {accuracy:.4f} on {len(records)} validation questions")
    return accuracy >= PASSED


def pretrain(task: str, seed: int, path: Path, tokenizer: SmallTokenizer, device: torch.device) -> None:
    """Train the base of a task and seed and write it to `path`, going on where an earlier call was stopped.

    The loss stays at that of guessing among the facts for a while, then falls within a few steps; an attempt
    in which it does not is given up for another one. Raises Stopped, or ValueError if all attempts fail.
    """
    name = f"stand-in base for {task}, seed {seed}"
    round = miniature(load_rounds()[QUESTION_FIRST[task]])
    unfinished = path.with_suffix(".unfinished")
    validation = validation_examples(replace(round, n_val=QUESTIONS), tokenizer)
    pace = Pace()
    arm = fresh_arm(seed, 0, tokenizer).to(device)
    optimizer = make_optimizer(arm, round)
    if unfinished.exists():
        try:
            saved = torch.load(unfinished, map_location="cpu", weights_only=True)
            pace = Pace(**saved["pace"])
            arm.load_state_dict(saved["arm"])
            optimizer.load_state_dict(saved["optimizer"])
        except Exception as error:    # a damaged file raises half a dozen types
            reason = str(error).splitlines()[0][:120]
            raise ValueError(f"{unfinished}: damaged ({reason}); delete it") from error
    say(f"{name}: going on from step {pace.step}" if pace.step else f"{name}: made once, in a minute or two")
    catch_signals()
    started = shown = time.monotonic()
    first = pace.step
    while True:
        if stop_requested:
            save_tensors({"pace": asdict(pace), "arm": arm.state_dict(), "optimizer": optimizer.state_dict()},
                         unfinished)
            raise Stopped(f"{name}: stopped after step {pace.step}; run the same command to go on",
                          max(stop_requested))
        draw = f"base {seed} {pace.attempt} {pace.step}"
        batch = make_examples(round, "train", round.batch_size, draw, pace.facts, round.order, tokenizer)
        loss = arm(*collate(batch, device)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        update(arm, optimizer, round, pace.step)
        pace.step += 1
        pace.loss = 0.8 * pace.loss + 0.2 * loss.item()
        if time.monotonic() - shown > 2:
            left = max(1, USUAL_STEPS[task] - pace.step) * (time.monotonic() - started) / (pace.step - first)
            say(f"{name}: step {pace.step}, {pace.facts} facts of {round.facts}, loss {pace.loss:.3f}, "
                f"about {duration(left)} left")
            shown = time.monotonic()
        low_enough = EASY if pace.facts < round.facts else KNOWN
        if pace.loss < low_enough:
            if pace.facts < round.facts:
                pace.facts += 1
            elif passes(arm.model, validation, round, name, pace.step, tokenizer):
                break
            pace.loss = 2 * low_enough    # some more steps before the next change
        if pace.step == 2 * USUAL_STEPS[task]:
            pace = Pace(attempt=pace.attempt + 1)
            if pace.attempt == ATTEMPTS:
                unfinished.unlink(missing_ok=True)
                raise ValueError(f"{name}: {ATTEMPTS} attempts did not learn it; try another --seed")
            say(f"{name}: has not learned it in {2 * USUAL_STEPS[task]} steps; starting over, otherwise")
            started, first = time.monotonic(), 0
            arm = fresh_arm(seed, pace.attempt, tokenizer).to(device)
            optimizer = make_optimizer(arm, round)
    arm.model.save(path)
    unfinished.unlink(missing_ok=True)
