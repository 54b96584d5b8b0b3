"""The built-in stand-in: a task and a base so small that every round runs anywhere, in minutes.

The questions are made up here, in the official records' formats. The base is trained here on first use, in a
minute or so. It stands in for the published model: a model that answers well while the question comes first,
because it was pretrained so, without Future-Seed. Post-training then puts the question last. The base is a
checkpoint in the official format but for its vocabulary, which has only the tokens that the questions need:
162 of 65536, renumbered from 1 on in their order. On the stand-in a round keeps its task, its order and its
Future-Seed, and takes lengths and steps from [standin] in rounds.toml.

Shapes: B questions in a batch, V entries of the vocabulary.
"""

import functools
import hashlib
import json
import random
from pathlib import Path

import torch
import torch.nn as nn

from data import Example, collate, make_example
from files import Progress, read_text, say, write_json
from fs import answer_logits, answer_loss
from model import RWKV7, Config
from rounds import Round
from runs import check_shape, differences, in_words, naming_damage
from tokenizer import END_OF_DOCUMENT, Tokenizer, build_trie

MAX_PROMPT = 256     # tokens, and more than any question has
LENGTHS = {"max_prompt": MAX_PROMPT, "max_answer": 4}
LAYERS, HEAD_SIZE, RANK = 12, 16, 8
BATCH, LR, WARM_UP = 32, 4e-3, 10
EASY = 0.35          # nats: once the running loss is below it, the questions get one fact more
KNOWN = 0.06         # nats: once the loss with all facts is below it, the base is put to the test
PASSED = 0.99        # the accuracy that the test asks for
QUESTIONS = 1024     # in the test, from the validation split
MOST_STEPS = {"arc": 900, "hotpotqa": 540}    # twice what a base usually takes; after these it is given up


# ---- questions ---------------------------------------------------------------------------------------------

# every word is one token, at the start of a line or after a space; few words, for a small model to learn
NAMES = ("Ann Bob Tom Sam Max Ben Dan Kim Amy Lee Joe Jim Jack John Mary Paul Mark Anna Alex Adam Eric Ryan "
         "Luke Jane Kate Rose Ruby Nick Mike Dave Peter David").split()
VERBS = ("runs sings eats jumps reads walks plays works writes speaks moves lives falls rises waits "
         "drives").split()
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def standin_records(task: str, split: str, n: int, seed: int | str, n_facts: int) -> list[dict]:
    """n generated records in the official format of a task: looking up one of n_facts, all equally likely.

    hotpotqa: the facts "Ann runs", "Bob sings", …, a paragraph each; the question "Bob"; the answer "sings".
    arc: the options "D. Ann", "K. Bob", …, their labels drawn and sorted; "Who is Bob?"; the answer "K".

    No question can be answered without the facts. A hash of the question and its facts, whatever their order,
    decides which split they are in, so training and validation share none. ValueError unless n_facts is from
    2 to 32, or for arc to 26.
    """
    most = len(NAMES)
    if task == "arc":
        most = len(LABELS)
    if not 2 <= n_facts <= most:
        raise ValueError(f"facts = {n_facts}: questions of the stand-in have 2 to {most}; --real has records")
    rng = random.Random(f"{task} {split} {seed}")
    records = []
    while len(records) < n:
        names = rng.sample(NAMES, n_facts)
        asked = rng.randrange(n_facts)
        if task == "arc":
            # if labels were always A, B, C, …, an option's place would give its label away
            values = sorted(rng.sample(LABELS, n_facts))
        else:
            values = rng.choices(VERBS, k=n_facts)
        facts = [f"{name} {value}" for name, value in zip(names, values)]
        hashed = " ".join(sorted(facts) + [names[asked]]).encode()
        held_out = hashlib.sha256(hashed).digest()[0] < 64    # a quarter of all questions, for validation
        if held_out != (split == "validation"):
            continue
        id = f"standin-{split}-{seed}-{len(records)}"
        if task == "arc":
            choices = [{"text": name, "label": label} for name, label in zip(names, values)]
            records.append({"id": id, "question": {"stem": f"Who is {names[asked]}?", "choices": choices},
                            "answerKey": values[asked]})
        else:
            records.append({"_id": id, "question": names[asked], "answer": values[asked],
                            "context": [["", [fact]] for fact in facts]})
    return records


def chance(task: str, facts: int) -> float:
    """How often the value of a fact picked at random is right."""
    if task == "arc":
        return 1 / facts
    # another fact may have the same verb, by accident
    return 1 / facts + (1 - 1 / facts) / len(VERBS)


class SmallTokenizer(Tokenizer):
    """The official tokenizer, cut down to the tokens of the stand-in's questions, which are renumbered."""

    def __init__(self):
        super().__init__()
        words = [space + word for word in (*NAMES, *VERBS, *LABELS) for space in ("", " ")]
        used = {token for word in words for token in self.encode(word)}
        for task in "arc", "hotpotqa":
            record = standin_records(task, "train", 1, 0, 2)[0]
            for order in "context_first", "question_first":
                used.update(make_example(task, record, self, order=order, **LENGTHS).prompt)
        self.tokens = {number: self.tokens[token] for number, token in enumerate(sorted(used), start=1)}
        self.trie = build_trie(self.tokens)
        self.tokens[END_OF_DOCUMENT] = b""

    def encode(self, text):
        """Ids in the small vocabulary. ValueError for a word that no question of the stand-in holds."""
        try:
            return super().encode(text)
        except (KeyError, TypeError):    # the trie has no branch, or no token at its end
            raise ValueError(f"{text!r}: the stand-in knows only names (Ann, Bob, …), verbs (runs, sings, …) "
                             "and the words around them") from None


small_tokenizer = functools.cache(SmallTokenizer)    # reading the vocabulary takes a third of a second


def make_examples(task: str, split: str, n: int, seed: int | str, n_facts: int, order: str) -> list[Example]:
    """Generated records as examples, in the small vocabulary; the arguments are those of standin_records."""
    records = standin_records(task, split, n, seed, n_facts)
    return [make_example(task, record, small_tokenizer(), order=order, **LENGTHS) for record in records]


def facts_at(recipe: Round, step: int) -> int:
    """How many facts a question of this step has: few at first, or nothing is learned at all."""
    ramp = min(1.0, max(0, step - recipe.facts_hold) / max(1, recipe.facts_ramp))
    return recipe.facts_first + int((recipe.facts - recipe.facts_first) * ramp)


def training_examples(recipe: Round, seed: int) -> list[Example]:
    """A run's batches one after the other: fresh questions at every step, the same in both arms."""
    examples = []
    for step in range(recipe.steps):
        draw = f"{seed} {step}"
        order = recipe.order
        if random.Random(draw).random() < recipe.rehearsal:
            order = "question_first"    # or the base forgets how to answer what it could
        examples += make_examples(recipe.task, "train", recipe.batch_size, draw, facts_at(recipe, step),
                                  order)
    return examples


def validation_examples(recipe: Round) -> list[Example]:
    """The validation set, which is the same for every seed. All its questions have the most facts."""
    return make_examples(recipe.task, "validation", recipe.n_val, recipe.validation_seed, recipe.facts,
                         recipe.order)


# ---- the base ----------------------------------------------------------------------------------------------

# what stands beside a base, as runs.check_shape reads it
MADE_BY = {"code": str, "machine": dict, "task": str, "facts": int, "channels": int, "seed": int,
           "sha256": str}


def find_or_make_base(recipe: Round, seed: int, assets: Path, device, surroundings: dict) -> RWKV7:
    """The base that a seed of a round starts from, trained here unless it is there already.

    Task, facts, channels and seed alone decide what a base is, so all rounds of a task share it. Beside its
    .pth stands a .json, its label, which says what made it. Where the label is missing or does not fit, the
    base is made anew. A base that other code or another machine made is used, with a note that says so.

    Args: surroundings, the code version and the machine, as train.surroundings gives them.
    """
    name = f"{recipe.task}-{recipe.facts}facts-{recipe.channels}wide-seed{seed}"
    path = assets / "standin" / f"{name}.pth"
    made_for = {"task": recipe.task, "facts": recipe.facts, "channels": recipe.channels, "seed": seed}
    label = path.with_suffix(".json")
    if path.exists() and label.exists():
        with naming_damage(path, "Delete it to make the base anew."):
            model = RWKV7.load(path)
        with naming_damage(label, "Delete it to make the base anew."):
            made_by = json.loads(read_text(label))
            check_shape(made_by, MADE_BY)
        fits = all(made_by[key] == value for key, value in made_for.items())
        if fits and made_by["sha256"] == model.sha256:
            changed = differences({key: made_by[key] for key in surroundings}, surroundings)
            if changed:
                say(f"note: the base {path} was made by other code or on another machine "
                    f"({in_words(changed, 'then', 'now')}). It is used as it is; delete it to make it anew.")
            return model
        say(f"note: the base {path} is not what {label.name} says, so it is made anew")
    path.parent.mkdir(parents=True, exist_ok=True)    # a folder that cannot be made is told before the work
    pretrain(recipe, seed, device).save(path)
    model = RWKV7.load(path)
    write_json(label, [surroundings | made_for | {"sha256": model.sha256}])
    return model


def fresh_model(channels: int, seed: int) -> RWKV7:
    """A model with random weights, as small as the questions allow. ValueError for wrong channels."""
    if channels % HEAD_SIZE or channels == 0:
        raise ValueError(f"channels = {channels}: must be a multiple of {HEAD_SIZE}")
    config = Config(n_layer=LAYERS, n_embd=channels, head_size=HEAD_SIZE, n_ffn=2 * channels,
                    vocab_size=len(small_tokenizer().tokens),
                    rank_w=RANK, rank_a=RANK, rank_v=RANK, rank_g=RANK)
    model = RWKV7.init(config, seed)
    # the published bound is 1e-4, for long runs; here most steps would go into growing the embedding from it
    nn.init.uniform_(model.emb.weight, -0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def share_right(model: RWKV7, examples: list[Example], device, rows: int = 256) -> float:
    """The share of questions answered right. Answers of the stand-in are one token."""
    right = 0
    for i in range(0, len(examples), rows):
        prompt, lengths, answer, _ = collate(examples[i:i + rows], device)
        logits, _ = answer_logits(model, None, prompt, lengths, answer)    # (B, 1, V)
        right += (logits.argmax(dim=-1) == answer).sum().item()
    return right / len(examples)


def pretrain(recipe: Round, seed: int, device) -> RWKV7:
    """Make the base that `recipe` starts from. ValueError if it does not learn.

    The questions get one fact more whenever the running loss says that they have become easy. For a while the
    loss stays where guessing among the facts puts it. Then it falls within a few steps, or never.
    """
    task, most_facts = recipe.task, recipe.facts
    name = f"the base of the stand-in, {task} seed {seed}"
    # 5 * seed and "base … 0 …": so the study drew its bases, and its numbers come from them
    model = fresh_model(recipe.channels, 5 * seed).to(device)
    test = make_examples(task, "validation", QUESTIONS, 1234, most_facts, "question_first")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    progress = Progress()
    facts, running = 2, 2.0    # the running mean of the loss, in nats
    for step in range(MOST_STEPS[task]):
        batch = make_examples(task, "train", BATCH, f"base {seed} 0 {step}", facts, "question_first")
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / WARM_UP)
        optimizer.zero_grad()
        prompt, lengths, answer, answer_lengths = collate(batch, device)
        logits, _ = answer_logits(model, None, prompt, lengths, answer)
        loss = answer_loss(logits, answer, answer_lengths).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = 0.8 * running + 0.2 * loss.item()
        progress.tick(step + 1, f"{name}: step {step + 1} of about {MOST_STEPS[task] // 2}, {facts} facts of "
                                f"{most_facts}, loss {running:.3f}")
        if facts < most_facts and running < EASY:
            facts += 1
            running = 2 * EASY    # so that some steps pass before the next change
        elif facts == most_facts and running < KNOWN:
            right = share_right(model, test, device)
            say(f"{name}: step {step + 1}, {right:.1%} of {QUESTIONS} questions right, the question first")
            if right >= PASSED:
                return model
            running = 2 * KNOWN
    raise ValueError(f"{name}: has not learned it in {MOST_STEPS[task]} steps; try another --seed")
