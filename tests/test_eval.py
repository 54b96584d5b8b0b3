"""eval.py: does a record say what the model did, is an answer scored as the official script would, and does a
model that is asked answer as it was trained to?"""

import json
import os
import random
import shutil
import string
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as eval_py
from conftest import ROOT, refusal, relative_error
from data import Example, collate, make_example, pad
from eval import (answer_budget, f1_score, line_of, main, means_of, normalise, score, score_batch,
                  seed_prompts_of, seed_states_of)
from fake_runs import REAL, STANDIN, write_runs
from fs import FutureSeed, answer_logits, answer_loss, prefill
from model import RWKV7, Config
from runs import ARMS, CONTROLS
from standin import small_tokenizer
from tokenizer import END_OF_DOCUMENT, Tokenizer

V = 120
BUDGET = 6    # tokens that an answer may have in the tests of `score`


class Words:
    """A tokenizer whose text shows the ids. Many are white space, some end a line, and id 50 has no token."""

    tokens = {token: b" %d" % token for token in range(V) if token != 50}
    tokens |= {token: b" " for token in range(0, V, 4)} | {token: b"%d\n" % token for token in range(1, V, 5)}
    tokens |= {token: b"\n" for token in range(2, V, 9)} | {END_OF_DOCUMENT: b""}

    def decode(self, ids):
        return b"".join(self.tokens[token] for token in ids).decode()


@pytest.fixture(scope="module")
def model():
    model = RWKV7.init(Config.published(n_layer=3, n_embd=32, head_size=16, vocab_size=V), seed=1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():    # a fresh model is nearly a bag of words; this one is not
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return model


@pytest.fixture(scope="module")
def fs(model):
    return FutureSeed(model.config, alpha=1.0, layer_start=1)


@pytest.fixture(scope="module")
def world():
    return Tokenizer()


def make_examples(count, task="hotpotqa"):
    rng = np.random.default_rng(0)
    examples = []
    for index in range(count):
        prompt = rng.integers(V, size=rng.integers(1, 30)).tolist()
        answer = rng.integers(V, size=rng.integers(1, 6)).tolist()
        text, choices = "7 49", None
        if task == "arc":
            choices = {label: 65 + place for place, label in enumerate("ABCDE"[:rng.integers(3, 6)])}
            answer, text = [choices["B"]], "B"
        examples.append(Example(f"q{index}", prompt, answer, text, choices, tail=len(prompt) // 2))
    return examples


def scored(model, examples, fs=None, batch_size=4, control=None, tokenizer=Words(), max_new=BUDGET):
    return score(model, examples, fs, batch_size=batch_size, device="cpu", step=5, tokenizer=tokenizer,
                 max_new=max_new, control=control)


# ---- records -----------------------------------------------------------------------------------------------

@torch.no_grad()
def by_the_book(model, example, seed_state):
    """One example without batches, padding or a carried state, one whole pass a token: loss, correct tokens,
    all tokens that the model writes within its budget, the likeliest option."""
    hidden, state = prefill(model, torch.tensor([example.prompt]), None, seed_state)
    logits = model.head(hidden[0, -1])

    def after(tokens):
        if not tokens:
            return logits
        return model.head(model(torch.tensor([tokens]), state=state)[0][0, -1])

    losses, correct, written = [], 0, []
    for place, token in enumerate(example.answer):
        forced = after(example.answer[:place])
        losses.append(-forced.log_softmax(-1)[token].item())
        correct += int(forced.argmax() == token)
    while len(written) < BUDGET:
        written.append(int(after(written).argmax()))
    option = None
    if example.choices:
        option = max(example.choices, key=lambda label: logits[example.choices[label]].item())
    rest = 0
    if len(losses) > 1:
        rest = sum(losses[1:]) / (len(losses) - 1)
    return losses[0] + rest, correct, written, option


def first_line(tokens):
    """The first line that is not blank, of what stands before id 0."""
    if END_OF_DOCUMENT in tokens:
        tokens = tokens[:tokens.index(END_OF_DOCUMENT)]
    text = b"".join(Words.tokens.get(token, b"") for token in tokens).decode()
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


@pytest.mark.parametrize("control", ["no_fs", None, *CONTROLS])
@pytest.mark.parametrize("task", ["hotpotqa", "arc"])
def test_records_say_what_the_model_did(model, fs, task, control):
    """Every record is that of a loop that does one thing at a time.

    Catches: a position off by one, padding that is scored, an answer that sees Future-Seed, text that is
    teacher-forced or goes on after its line, ARC's option taken from the text, a control that is none.
    """
    examples = make_examples(9, task)
    with_fs = fs
    if control == "no_fs":
        control, with_fs = None, None
    records = scored(model, examples, with_fs, control=control)
    for i, (record, example) in enumerate(zip(records, examples, strict=True)):
        seed_state = with_fs
        if control == "off":
            seed_state = None
        elif control in ("other", "shuffled"):
            prompt = torch.tensor([examples[(i + 1) % 9].prompt])
            if control == "shuffled":
                prompt = torch.tensor(seed_prompts_of("shuffled", [example]))
            seed_state = seed_states_of(model, fs, prompt, torch.tensor([prompt.shape[1]]))
        loss, correct, written, option = by_the_book(model, example, seed_state)
        text = first_line(written)
        assert abs(record["loss"] - loss) <= 1e-5
        assert (record["correct"], record["text"], record["option"]) == (correct, text, option)
        assert (record["step"], record["id"], record["tokens"]) == (5, example.id, len(example.answer))
        assert (record.get("control"), record["gold"]) == (control, example.text)
        exact, f1 = normalise(text) == "7 49", f1_score(text, "7 49")
        if task == "arc":
            exact = f1 = option == "B"
        assert (record["exact"], record["f1"]) == (exact, f1)


def test_padding_is_no_right_answer(model):
    """A model that always says 0, the token that pads shorter answers, is right where an answer holds a 0.

    Catches: padding that counts as right.
    """
    always_0 = RWKV7(model.config)    # of equal logits argmax takes the first
    always_0.load_state_dict(model.state_dict() | {"head.weight": torch.zeros_like(model.head.weight)})
    examples = make_examples(9)
    correct = [record["correct"] for record in scored(always_0, examples)]
    assert correct == [example.answer.count(0) for example in examples]


@given(batch_size=st.integers(1, 12), order=st.permutations(range(10)), with_fs=st.booleans())
@settings(deadline=None, max_examples=8)
def test_records_depend_on_nothing_but_their_example(model, fs, batch_size, order, with_fs):
    """Catches: padding that leaks between rows, records that come back in the order of their lengths, a row
    that ends the answers of the others."""
    examples = make_examples(10)
    seed_state = fs if with_fs else None
    alone = [scored(model, [example], seed_state)[0] for example in examples]
    together = scored(model, [examples[place] for place in order], seed_state, batch_size)
    for one, other in zip(together, [alone[place] for place in order], strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-5 and {**one, "loss": 0} == {**other, "loss": 0}


@given(answers=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=9), min_size=6, max_size=6),
       task=st.sampled_from(["hotpotqa", "arc"]))
@settings(deadline=None, max_examples=15)
def test_what_a_model_writes_does_not_depend_on_the_gold(model, fs, answers, task):
    """Whatever the gold answers are, and however long, the text and the option of a record are the same.

    Catches: decoding that stops after as many tokens as the gold has, which told the model how long to write.
    """
    examples = make_examples(6, task)
    others = [Example(example.id, example.prompt, answer, str(answer), example.choices, example.tail)
              for example, answer in zip(examples, answers, strict=True)]
    for one, other in zip(scored(model, examples, fs), scored(model, others, fs), strict=True):
        assert (one["text"], one["option"]) == (other["text"], other["option"])


@pytest.mark.parametrize("with_fs", [False, True])
def test_the_training_loss_is_the_one_that_is_scored(model, fs, with_fs):
    """Catches: a loss or a gradient at the wrong tokens, or of padding."""
    seed_state, examples = fs if with_fs else None, make_examples(9)

    def losses_of(examples):
        prompt, lengths, answer, answer_lengths = collate(examples)
        return answer_loss(answer_logits(model, seed_state, prompt, lengths, answer)[0], answer,
                           answer_lengths)

    losses = losses_of(examples)
    for loss, example in zip(losses, examples, strict=True):
        assert abs(loss.item() - by_the_book(model, example, seed_state)[0]) <= 1e-5
    gradient, = torch.autograd.grad(losses.sum(), model.emb.weight)
    expected, = torch.autograd.grad(sum(losses_of([example]).sum() for example in examples), model.emb.weight)
    assert relative_error(gradient, expected) <= 1e-5


def test_seed_states_of_other_prompts(model, fs):
    """Seed states of the prompts themselves change no bit, and those of other prompts do.

    Catches: kept states of another layer, row or place; a shuffled end that is another's, or that shuffles
    what stands before it.
    """
    examples = make_examples(5)
    prompt, lengths, answer, _ = collate(examples)
    others = pad([example.prompt for example in examples[::-1]])
    hooks = fs, seed_states_of(model, fs, prompt, lengths), seed_states_of(model, fs, *others)
    own, kept, of_others = (answer_logits(model, hook, prompt, lengths, answer)[0] for hook in hooks)
    assert torch.equal(own, kept) and not torch.equal(own, of_others)
    shuffled = seed_prompts_of("shuffled", examples)
    for example, changed in zip(examples, shuffled, strict=True):
        start = len(example.prompt) - example.tail
        assert changed[:start] == example.prompt[:start] and sorted(changed) == sorted(example.prompt)
        assert seed_prompts_of("shuffled", [example]) == [changed]
    assert sum(example.prompt != changed for example, changed in zip(examples, shuffled)) >= 3


def test_any_id_shuffles_its_prompt():
    """The id decides the order, as Random(id) would. Catches: an id with half a surrogate pair, which JSON
    may hold, refused by the last control, when both arms are trained."""
    example = make_examples(1)[0]
    seed_prompts_of("shuffled", [replace(example, id="\ud800")])
    named = replace(example, id="Zoë 7")
    end = random.Random(named.id).sample(named.prompt[-named.tail:], named.tail)
    assert seed_prompts_of("shuffled", [named])[0][-named.tail:] == end


def test_options_that_bf16_cannot_tell_apart(model):
    """Two options whose scores differ by a thousandth are told apart under bf16 autocast, as on a GPU.

    Catches: a head computed in bf16, in which they tie and the first option wins.
    """
    examples = make_examples(30, "arc")
    weight = model.head.weight.detach().clone()
    # of every question, B's score is a thousandth more than A's, and the other options are out of the race
    weight[66] = weight[65] * (1 + 1e-3)
    weight[67:70] = 0
    patched = RWKV7(model.config)
    patched.load_state_dict(model.state_dict() | {"head.weight": weight})
    positive = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        records = score_batch(patched, examples, None, torch.device("cpu"), Words(), 1)
        prompt, lengths, answer, _ = collate(examples)
        logits, _ = answer_logits(patched, None, prompt, lengths, answer)
    assert logits.dtype == torch.float32
    for record, row in zip(records, logits[:, 0], strict=True):
        if row[65] > 0:
            positive += 1
            assert record["option"] == "B"
    assert positive >= 3


def test_means_are_over_examples():
    """Catches: means weighted by tokens. The log averages examples."""
    records = [{"loss": 1.0, "tokens": 4, "correct": 1, "exact": 0, "f1": 0.5},
               {"loss": 3.0, "tokens": 1, "correct": 1, "exact": 1, "f1": 1.0}]
    assert means_of(records) == {"acc": 0.625, "loss": 2.0, "EM": 0.5, "F1": 0.75}


# ---- what a written answer is worth ------------------------------------------------------------------------

class Script:
    """Stands for a model. In a row whose prompt begins with n it writes scripts[n], then id 0."""

    def __init__(self, scripts):
        self.scripts = scripts

    def token(self, script, place):
        written = self.scripts[script]
        return written[place] if place < len(written) else END_OF_DOCUMENT

    def __call__(self, tokens, state=None, lengths=None, seed_state=None, answer=None):
        scripts, place = state or (tokens[:, 0].tolist(), 0)
        count = 1 if answer is None else 1 + answer.shape[1]
        new = torch.tensor([[self.token(script, place + i) for i in range(count)] for script in scripts])
        prompt = new[:, :1].expand(-1, tokens.shape[1] - 1)
        return torch.cat([prompt, new], dim=1).unsqueeze(-1), (scripts, place + 1)

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden[..., 0], 65536).float()

    generate = RWKV7.generate


@pytest.mark.parametrize("written, gold, exact, f1", [
    (" The Beatles\n\n", "Beatles", 1, 1),
    (" Beatles split up in 1970\n\n", "Beatles", 0, 1 / 3),
    (" Beatles", "Beatles", 1, 1),                                    # and then the end of the document
    ("\n\n Beatles\nContext: Help!", "Beatles", 1, 1),                # white space before it is skipped
    (" beatles.\r\nThe rest", "Beatles", 1, 1),
    ("", "Beatles", 0, 0),
    (" \n\n\n", "Beatles", 0, 0),
    (" one two three four five six seven eight nine ten eleven twelve", "one two three", 0, 0.4),
    (" Beatles" + 30 * " and more", "Beatles", 0, 2 / 17),            # goes on for its budget of 16 tokens
    (" yes\n", "yes", 1, 1),
    (" yes, both of them\n", "yes", 0, 0),
    (" Sergeant Pepper's Lonely Hearts Club Band of the year sixty-seven\n",
     "Sergeant Pepper's Lonely Hearts Club Band of the year sixty-seven", 1, 1),    # longer than max_answer
])
def test_an_answer_is_the_line_that_the_model_writes(world, written, gold, exact, f1):
    """The official script's values, on the line written, against the whole gold answer.

    Catches: decoding that ends after as many tokens as the gold has or with max_answer, an answer that goes
    on after its line, leading white space taken for an empty line, a gold that was cut.
    """
    record = {"id": "q", "context": "c", "question": "q", "answer": gold}
    example = make_example("own", record, world, order="context_first", max_prompt=64, max_answer=8)
    example.prompt[0] = 0    # the number of the script
    record, = scored(Script([world.encode(written)]), [example], tokenizer=world, max_new=16)
    assert (record["exact"], record["gold"]) == (exact, gold) and abs(record["f1"] - f1) < 1e-12


def test_real_golds_score_as_the_official_script_says(world, shared):
    """Every real gold is right after an article, in lower case, and whatever stands on later lines; with more
    words on its line it is not exactly right. All golds but one fit the budget.

    Catches: a budget under which a long gold can never match, and one that depends on the gold.
    """
    budget = answer_budget(REAL["R6"], "real")
    golds = []
    for path in sorted((shared / "data/hotpotqa").glob("hotpot_*.json")):
        records = json.loads(path.read_text())
        golds += [record["answer"] for record in records]
    assert len(golds) == 1952
    assert sum(len(world.encode(" " + gold)) > REAL["R6"].max_answer for gold in golds) == 6

    def fits(line):
        return len(world.encode(line)) <= budget

    def exact_and_f1(written, gold):
        line, _ = line_of(world.encode(written)[:budget], world)
        return normalise(line) == normalise(gold), f1_score(line, gold)

    assert sum(not fits(f" {gold}") for gold in golds) == 1    # eval.py tells of it
    for gold in golds:
        assert not fits(f" The {gold}") or exact_and_f1(f" The {gold}\n\nQuestion:", gold) == (1, 1)
        assert not fits(f" {gold.lower()}") or exact_and_f1(f" {gold.lower()}\n", gold) == (1, 1)
        assert not fits(f" {gold} and more") or exact_and_f1(f" {gold} and more\n", gold)[0] == 0


@pytest.mark.parametrize("answer, gold, exact, f1", [
    ("The Eiffel Tower", "eiffel tower", 1, 1),                # articles and case
    (" Eiffel-Tower!", "EiffelTower.", 1, 1),                  # punctuation vanishes, it does not part words
    ("a an the", "", 1, 0),                                    # nothing left: equal, but no common word
    ("", "Paris", 0, 0),
    ("anthem", "them", 0, 0),                                  # articles are whole words
    ("the the cat", "cat the", 1, 1),
    ("Barack Obama", "Barack Hussein Obama", 0, 0.8),
    ("to be or not to be", "to be", 0, 0.5),                   # common words count as often as both have them
    ("to be", "to to", 0, 0.5),
    ("Yes.", "yes", 1, 1),
    ("yes it is", "yes", 0, 0),                                # yes, no, noanswer count only as a whole
    ("no", "no one", 0, 0),
    ("noanswer given", "noanswer", 0, 0),
    ("yesterday", "yes yesterday", 0, 2 / 3),
    ("two\n words", "two words", 1, 1),
    ("A. B", "b", 1, 1),                                       # an initial "A." counts as an article
    ("Beyoncé", "beyonce", 0, 0),                              # accents stay
    ("“quoted”", "quoted", 0, 0),                              # only ASCII punctuation goes
])
def test_official_edge_cases(answer, gold, exact, f1):
    """Catches: a normalisation that differs from the official script's in any of its corners."""
    assert (normalise(answer) == normalise(gold)) == exact and abs(f1_score(answer, gold) - f1) < 1e-12


answers = st.text(alphabet="an the yes no.,!X\t", max_size=25)


@given(answers, answers)
@settings(deadline=None, max_examples=200)
def test_f1_properties(first, second):
    """F1 is symmetric, and 1 for the same words only. Catches: precision or recall with a wrong divisor."""
    f1 = f1_score(first, second)
    assert f1 == f1_score(second, first) and 0 <= f1 <= 1
    assert f1 == 1 or normalise(first) != normalise(second) or not normalise(first)
    assert f1 < 1 or sorted(normalise(first).split()) == sorted(normalise(second).split())
    assert not set(normalise(first)) & set(string.punctuation)


@given(tokens=st.lists(st.sampled_from([0, 2, 3, 4, 6, 7, 8, 50, 56, 119]), max_size=8),
       more=st.lists(st.integers(0, V - 1), max_size=5))
@settings(deadline=None)
def test_a_line_that_has_ended_does_not_change(tokens, more):
    """Whatever follows a line's end, its text stays, so that a row may write on while others have not ended.

    Catches: an end told too early, as at a line break before the answer, and one that is missed.
    """
    text, ended = line_of(tokens, Words())
    assert text == first_line(tokens)
    visible = b"".join(Words.tokens.get(token, b"") for token in tokens).decode()
    if not ended:
        assert 0 not in tokens and "\n" not in visible.lstrip()
    else:
        assert line_of(tokens + more, Words()) == (text, True)


# ---- a question from a person ------------------------------------------------------------------------------

def report_of(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


@pytest.fixture
def asked(capsys, monkeypatch, world):
    """What eval.py --ask prints."""
    monkeypatch.setattr(eval_py, "Tokenizer", lambda: world)    # read once, not for every question

    def asked(checkpoint, question, *context):
        more = ["--context", *context] if context else []
        return report_of(capsys, "--checkpoint", checkpoint, "--ask", question, *more).out.removesuffix("\n")

    return asked


def chain_model(tokenizer, vocab_size, *chains):
    """A model that knows which token follows which, and nothing else: a chain is a list of texts of one token
    each, or 0 for the end of the document."""
    model = RWKV7.init(Config.published(1, 32, 32, vocab_size), seed=3)
    with torch.no_grad():
        model.emb.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.head.weight.zero_()
        for chain in chains:
            tokens = [text if text == END_OF_DOCUMENT else tokenizer.encode(text)[0] for text in chain]
            hidden, _ = model(torch.tensor([tokens[:-1]]))
            model.head.weight[torch.tensor(tokens[1:])] = hidden[0]
    return model


def test_ask_answers_with_the_future_seed_of_the_run(tmp_path, asked, capsys, world):
    """The answer is that of the prompt in the round's form, with the seed states that the run trained.

    Catches: an answer without Future-Seed, or with a gate as it was before training; another answer where a
    run's folder was copied elsewhere; an error that does not name its file.
    """
    model = RWKV7.init(Config.published(2, 16, 16, 65536), seed=3)
    with torch.no_grad():
        for block in model.blocks:
            block.att.output.weight.normal_(generator=torch.Generator().manual_seed(1))
    fs = FutureSeed(model.config, alpha=3.0, layer_start=1)
    folder = write_runs(tmp_path, seeds=(1,), n=2, settings={"fs_layer_start": 1, "alpha_init": 3.0},
                        model=model, fs=fs) / "seed1"
    checkpoint = folder / "prompt_fs/model.pth"

    def expected(fs, prompt):
        with torch.no_grad():
            hidden, state = prefill(model, torch.tensor([world.encode(prompt)]), None, fs)
            return line_of(model.generate(model.head(hidden[:, -1]), state, 32)[0].tolist(), world)[0]

    alone = "Question:\nWho wrote Faust?\n\nAnswer:"
    about = "Context:\nFaust is a play.\n\nGoethe wrote it.\n\n" + alone
    context = "Faust is a play.", "Goethe wrote it."
    assert asked(checkpoint, "Who wrote Faust?") == expected(fs, alone) != expected(None, alone)
    assert asked(checkpoint, " Who wrote Faust? ", *context) == expected(fs, about) != expected(fs, alone)
    assert asked(checkpoint, about) == asked(checkpoint, about + " ") == expected(fs, about)
    assert asked(folder / "no_fs/model.pth", "Who wrote Faust?") == expected(None, alone)
    with torch.no_grad():
        fs.alpha.fill_(-30)    # what training left of it is in fs.pth
    torch.save(fs.state_dict(), folder / "prompt_fs/fs.pth")
    assert asked(checkpoint, "Who wrote Faust?") == expected(None, alone)
    best = tmp_path / "best"    # under another name it is as good
    shutil.copytree(folder / "prompt_fs", best)
    assert asked(best / "model.pth", about) == expected(None, about)
    for path, damage in ((best / "fs.pth", {"alpha": torch.zeros(7)}), (best / "run.json", "{")):
        if path.suffix == ".json":
            path.write_text(damage)
        else:
            torch.save(damage, path)
        error = refusal(capsys, main, ["--ask", "x", "--checkpoint", best / "model.pth"])
        assert f"{path} is damaged" in error and "Run it again, or ask a file that stands alone." in error
    for name in ("none.pth", "run.json"):
        assert name in refusal(capsys, main, ["--ask", "x", "--checkpoint", folder / "no_fs" / name])


def test_ask_ends_where_the_answer_ends(tmp_path, asked, world):
    """A line's or document's end ends an answer, whether its model comes from a run with an end mark, from a
    user's own data, or from nowhere; a stand-in's answer is one token, in its own vocabulary.

    Catches: an answer that goes on, one that ends at white space before it, and a wrong tokenizer.
    """
    chain = chain_model(world, 65536, [":", "\n\n", " runs", " eats", "\n", " sings"])
    chain.save(tmp_path / "alone.pth")
    paths = [tmp_path / "alone.pth"]
    for source, changed in (("real", {"end_mark": True}), ("own", {})):
        folder = write_runs(tmp_path, "R8", [1], 2, source=source, settings=changed, model=chain)
        paths.append(folder / "seed1/no_fs/model.pth")
    context = "Ann runs", "Bob eats"
    for path in paths:
        # ":" is followed by line breaks, which are skipped; the next one ends the line
        assert asked(path, "Bob", *context) == "runs eats"
        assert asked(path, "Context:\nAnn runs\n\nQuestion:\nBob\n\nAnswer:") == "runs eats"
    short = chain_model(small_tokenizer(), len(small_tokenizer().tokens), [":", " runs", " eats"])
    folder = write_runs(tmp_path, "R8", [1], 2, source="standin", model=short)
    assert asked(folder / "seed1/no_fs/model.pth", "Bob", *context) == "runs"


@pytest.mark.parametrize("border, answer", [("log", "K"), ("token", "C")])
def test_ask_puts_arcs_question_as_the_run_did(tmp_path, asked, world, border, answer):
    """On a run on ARC the prompt ends as run.json says, and the answer is one label.

    Catches: twenty-four labels one after the other, and another answer for a space after "Answer:".
    """
    chain = chain_model(world, 65536, [" ", "K", "L", "M"], [":", " C", " D", " E"])
    folder = write_runs(tmp_path, "R2", [1], 2, settings={"arc_border": border}, model=chain)
    path = folder / "seed1/no_fs/model.pth"
    prompt = "Options:\nC. Ann\nK. Bob\n\nQuestion:\nWho is Bob?\n\nAnswer:"
    for question, *context in (["Who is Bob?", "C. Ann", "K. Bob"], [prompt], [prompt + " "], ["Who?"]):
        assert asked(path, question, *context) == answer


def test_ask_refuses_a_model_of_another_vocabulary(tmp_path, capsys):
    """Catches: noise from a model that was trained with another tokenizer, as the Pile's with 50,304 tokens,
    or from a stand-in's without its run.json."""
    for size in (50_304, len(small_tokenizer().tokens)):
        RWKV7.init(Config.published(1, 16, 16, size), seed=3).save(tmp_path / "model.pth")
        error = refusal(capsys, main, ["--ask", "x", "--checkpoint", tmp_path / "model.pth"])
        assert f"model.pth has a vocabulary of {size} tokens, and the tokenizer has 65530" in error


def test_how_much_a_model_may_write():
    """Catches: more than one token for ARC's label or a stand-in's word, a budget without room to spare."""
    assert answer_budget(REAL["R2"], "real") == answer_budget(STANDIN["S20"], "standin") == 1
    assert answer_budget(REAL["S20"], "real") == answer_budget(REAL["S20"], "own") == 32


# ---- the command line --------------------------------------------------------------------------------------

def test_arguments_that_do_not_go_together(capsys):
    """Catches: half a question asked, a picture under a name that is no PNG's, a help without examples or the
    rule."""
    for argv, words in ((["--help"], "python eval.py R8"), (["--help"], "inconclusive: anything else"),
                        (["--ask", "x"], "go together"), (["--checkpoint", "x"], "go together"),
                        (["R8", "--context", "x"], "give both"), (["R8", "--plot", "x.pdf"], "ends in .png"),
                        (["R8", "--seeds"], "--seeds")):
        with pytest.raises(SystemExit):
            main(argv)
        captured = capsys.readouterr()
        assert words in captured.out + captured.err


def test_an_empty_list_of_seeds_is_refused(tmp_path, capsys):
    """Catches: --seeds "$S" with S unset, taken as if no seeds were asked for."""
    assert main(["S20", "--seeds", "", "--runs", str(tmp_path)]) == 2
    assert "--seeds : write seeds as 0-9 or 0,3,5" in capsys.readouterr().err


def test_ctrl_c_at_any_time_says_stopped(tmp_path, capsys, monkeypatch):
    """Catches: a traceback, while the command imports its packages as well as later."""
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    run = subprocess.run([sys.executable, ROOT / "eval.py"], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "stopped\n")

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_py, "load_rounds", stopped)
    assert report_of(capsys, "R8", code=130).err == "stopped\n"


def test_a_reader_that_is_gone_is_no_error(tmp_path):
    """From any folder, as in `python eval.py R8 --json | head -1`. Catches: "Broken pipe", and a program that
    works in its own folder alone."""
    write_runs(tmp_path / "runs", n=2, settings={"steps": 2})
    command = [sys.executable, ROOT / "eval.py", "R8", "--json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)
