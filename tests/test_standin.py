"""The built-in stand-in: its vocabulary, its questions, its base, and rounds that run on it.

Bases here have three layers and are not trained, so that a round takes a second.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import material
import standin
import train
from conftest import ROOT, refusal
from fake_runs import HERE, read_lines, write_lines
from data import make_example
from eval import main as eval_main

from model import RWKV7
from rounds import load_rounds
from standin import standin_records
from tokenizer import Tokenizer

REAL, SMALL = load_rounds()
TOKENS, WORDS = standin.small_tokenizer(), Tokenizer()
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
QUICK = ["steps=4", "n_val=8", "batch_size=4", "eval_every=2", "channels=16"]


@pytest.fixture
def instant(monkeypatch):
    """Bases that are made at once and know nothing; a real round that would take 42 hours; no network."""
    def pretrain(recipe, seed, device):
        return standin.fresh_model(recipe.channels, seed)

    def no_network(url, *_):
        raise AssertionError(f"asked for {url}")

    monkeypatch.setattr(standin, "LAYERS", 3)
    monkeypatch.setattr(standin, "pretrain", pretrain)
    monkeypatch.setattr(material, "duration", lambda seconds: "42 hours")
    monkeypatch.setattr(data.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(data.torch.hub, "download_url_to_file", no_network)


def arguments(folder, *more, name="S1", seeds="3", settings=()):
    return ["--round", name, "--seeds", seeds, "--assets", str(folder / "assets"), "--device", "cpu",
            "--runs", str(folder / "runs"), "--set", *QUICK, *settings, *more]


def run_of(folder, name="S1", seed=3, arm="no_fs"):
    return json.loads((folder / f"runs/standin/{name}/seed{seed}/{arm}/run.json").read_text())


# ---- vocabulary and questions ------------------------------------------------------------------------------

@settings(deadline=None, max_examples=25)
@given(task=st.sampled_from(["arc", "hotpotqa"]), order=st.sampled_from(["context_first", "question_first"]),
       n_facts=st.integers(2, 26), seed=st.integers(0, 10**6))
def test_every_question_can_be_read_and_answered(task, order, n_facts, seed):
    """Catches a word without an id, ids that collide, text that decodes to something else, records that the
    official parsers refuse, an answer of several tokens or that is not the one fact on who is asked for."""
    record = standin_records(task, "train", 1, seed, n_facts)[0]
    example = make_example(task, record, TOKENS, order=order, max_prompt=512, max_answer=4)
    text = TOKENS.decode(example.prompt)
    assert [TOKENS.tokens[token] for token in example.prompt] == [WORDS.tokens[n] for n in WORDS.encode(text)]
    assert text.endswith("Answer: " if task == "arc" else "Answer:") and TOKENS.encode(text) == example.prompt
    assert 0 < min(example.prompt) and max(example.prompt) < len(TOKENS.tokens)
    assert len(example.answer) == 1 and TOKENS.decode(example.answer).strip() == example.text
    asked = text.partition("Question:\n")[2].split("\n")[0].removeprefix("Who is ").removesuffix("?")
    fact = f"\n{example.text}. {asked}\n" if task == "arc" else f"\n{asked} {example.text}\n"
    assert text.count(fact) == 1 and (task == "hotpotqa" or len(example.choices) == n_facts)
    assert record == standin_records(task, "train", 1, seed, n_facts)[0]


def test_the_small_vocabulary_is_the_official_one_renumbered():
    """Catches an order that depends on the run, a gap in the ids, an id for the end of document."""
    assert sorted(TOKENS.tokens) == list(range(163)) and TOKENS.tokens[0] == b""
    official = [WORDS.encode(TOKENS.tokens[token]) for token in range(1, 163)]
    assert official == sorted(official) and {len(token) for token in official} == {1}
    with pytest.raises(ValueError, match="knows only names"):
        TOKENS.encode("Who wrote Faust?")


@pytest.mark.parametrize("task", ["arc", "hotpotqa"])
def test_validation_is_new_and_guesses_do_not_pay(task, monkeypatch):
    """Catches validation questions that were trained on, in whatever order their facts stood, a place that is
    asked for more often than others, labels that tell the place, and a wrong share of lucky guesses."""
    def facts_of(record):
        if task == "arc":
            return [(choice["text"], choice["label"]) for choice in record["question"]["choices"]]
        return [tuple(text.split()) for _, (text,) in record["context"]]

    records = standin_records(task, "train", 2000, 0, 4)
    facts = [facts_of(record) for record in records]
    asked = [re.sub("Who is |[?]", "", record["question"]["stem"] if task == "arc" else record["question"])
             for record in records]
    places = [[name for name, _ in part].index(name) for part, name in zip(facts, asked)]
    assert all(400 < places.count(place) < 600 for place in range(4))
    lucky = np.mean([[value == part[place][1] for _, value in part] for part, place in zip(facts, places)])
    assert abs(lucky - standin.chance(task, 4)) < 0.01
    assert task == "hotpotqa" or len({label for part in facts for _, label in part}) == 26

    # with all words, chance alone would keep the splits apart
    for words, few in (("NAMES", 5), ("VERBS", 2), ("LABELS", 3)):
        monkeypatch.setattr(standin, words, getattr(standin, words)[:few])
    seen = {split: {(frozenset(facts_of(record)), str(record["question"]).partition("choices")[0])
                    for seed in (0, 1) for record in standin_records(task, split, 300, seed, 2)}
            for split in ("train", "validation")}
    assert len(seen["train"]) > 20 and not seen["train"] & seen["validation"]
    with pytest.raises(ValueError, match="2 to"):
        standin_records(task, "train", 1, 0, 33)


@pytest.mark.parametrize("order, share", [("context_first", 0.25), ("question_first", 1.0)])
def test_questions_get_harder_and_some_are_rehearsed(order, share):
    """Catches a curriculum that jumps, never ends or depends on the number of steps, rehearsal in validation
    or of another share than the round's, and seeds that train on the same questions."""
    recipe = dataclasses.replace(SMALL["S1"], order=order, batch_size=1)
    facts = [standin.facts_at(recipe, step) for step in range(recipe.steps)]
    assert facts[0] == recipe.facts_first == 2
    assert facts.index(3) == recipe.facts_hold + math.ceil(recipe.facts_ramp / 8)
    assert facts[recipe.facts_hold + recipe.facts_ramp] == facts[-1] == recipe.facts == 10
    assert all(0 <= later - earlier <= 1 for earlier, later in zip(facts, facts[1:]))
    examples = standin.training_examples(recipe, 0)
    texts = [TOKENS.decode(example.prompt) for example in examples]
    assert [text.count("\n\n") - 1 for text in texts] == facts
    assert abs(sum(text.startswith("Question") for text in texts) / len(texts) - share) < 0.1
    assert standin.training_examples(dataclasses.replace(recipe, steps=5), 0) == examples[:5]
    others = {TOKENS.decode(example.prompt) for example in standin.training_examples(recipe, 1)}
    assert not others & set(texts)
    validation = standin.validation_examples(recipe)
    assert len({example.id for example in validation}) == recipe.n_val
    first = "Context" if order == "context_first" else "Question"
    for text in (TOKENS.decode(example.prompt) for example in validation):
        assert text.startswith(first) and text.count("\n\n") == 11


# ---- the base ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["arc", "hotpotqa"])
def test_a_base_learns_with_the_question_first_until_it_passes(task, tmp_path, monkeypatch):
    """Catches another order, two new facts at a time, the same questions again and again, an exam of easier
    or of known questions, one whose result does not count, and a base that is not the official file."""
    batches, exams, grades = [], [], iter([0.98, 0.99])
    collate = standin.collate
    for name, value in dict(LAYERS=1, EASY=1e9, KNOWN=1e9, BATCH=4).items():
        monkeypatch.setattr(standin, name, value)
    monkeypatch.setattr(standin, "collate", lambda batch, device:
                        batches.append(batch) or collate(batch, device))
    monkeypatch.setattr(standin, "share_right", lambda model, exam, device:
                        exams.append((len(batches), exam)) or next(grades))
    recipe = dataclasses.replace(SMALL["S1" if task == "hotpotqa" else "S7"], channels=16)
    model = standin.pretrain(recipe, 1, torch.device("cpu"))

    (failed, exam), (passed, _) = exams
    assert failed < passed == len(batches) and len(exam) == standin.QUESTIONS
    texts = [[TOKENS.decode(example.prompt) for example in examples] for examples in (*batches, exam)]
    assert all(text.startswith("Question") for part in texts for text in part)
    counts = [{sum(map(bool, text.split("\n"))) - 4 for text in part} for part in texts]    # a line a fact
    *facts, most = [count for part in counts for count in part]
    assert len(facts) == len(batches) and most == recipe.facts
    assert sorted(set(facts)) == list(range(2, most + 1)) and facts == sorted(facts)
    assert len({example.id for batch in batches for example in batch}) == sum(map(len, batches))
    assert all("validation" in example.id for example in exam)
    model.save(tmp_path / "base.pth")
    assert RWKV7.load(tmp_path / "base.pth").config.vocab_size == len(TOKENS.tokens)


def test_the_test_of_a_base_counts_right_answers():
    """Catches a share of something else: half of these answers are what the model says."""
    model = standin.fresh_model(16, 1)
    examples = standin.validation_examples(dataclasses.replace(SMALL["S1"], n_val=10))
    prompt, lengths, answer, _ = data.collate(examples)
    said = standin.answer_logits(model, None, prompt, lengths, answer)[0].argmax(dim=-1)[:, 0].tolist()
    known = [dataclasses.replace(example, answer=[said[i] + i % 2]) for i, example in enumerate(examples)]
    assert standin.share_right(model, known, torch.device("cpu"), rows=4) == 0.5


def test_a_base_that_does_not_learn_is_given_up(tmp_path, monkeypatch):
    """Catches: training without end, a base kept that knows nothing, seeds that start alike, and the
    published embedding, in whose growth all steps would go."""
    for name, value in dict(LAYERS=1, EASY=0.0, MOST_STEPS={"arc": 2}).items():
        monkeypatch.setattr(standin, name, value)
    recipe = dataclasses.replace(SMALL["S7"], channels=16)
    with pytest.raises(ValueError, match="has not learned it in 2 steps; try another --seed"):
        standin.find_or_make_base(recipe, 2, tmp_path, torch.device("cpu"), HERE)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    one, other = (standin.fresh_model(16, seed).emb.weight for seed in (10, 15))
    assert 0.49 < one.max() < 0.5 and not torch.equal(one, other)


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_base_says_what_made_it(instant, tmp_path, monkeypatch, capsys):
    """A base is used again by every run that would make the same one, and says by what it was made.

    Catches: a base of another task, width, seed or number of facts; one that other code or another machine
    made, used without a word; weights that are not those which its label is about; a base without a label.
    """
    recipe = dataclasses.replace(SMALL["S1"], channels=16)
    made = []
    pretrain = standin.pretrain
    monkeypatch.setattr(standin, "pretrain", lambda *values: made.append(values) or pretrain(*values))

    def base(recipe=recipe, seed=3, surroundings=HERE):
        """The base, how many were made for it, and what was said."""
        made.clear()
        model = standin.find_or_make_base(recipe, seed, tmp_path, torch.device("cpu"), surroundings)
        return model, len(made), capsys.readouterr().err

    first, count, said = base()
    assert (count, said) == (1, "")
    path, = tmp_path.glob("standin/*.pth")
    label = path.with_suffix(".json")
    bits = path.read_bytes(), label.read_bytes()
    same_base = dataclasses.replace(recipe, name="S2", order="question_first", steps=3, alpha_init=9.0)
    for other in (recipe, same_base):
        again, count, said = base(other)
        assert (count, said) == (0, "") and torch.equal(weights_of(again), weights_of(first))
        assert again.sha256 == first.sha256
    others = [(dataclasses.replace(recipe, channels=32), 3), (dataclasses.replace(recipe, facts=9), 3),
              (dataclasses.replace(SMALL["S7"], channels=16), 3), (recipe, 4)]
    for other, seed in others:
        assert base(other, seed)[1:] == (1, "") and base(other, seed)[1:] == (0, "")
    assert len(list(tmp_path.glob("standin/*.pth"))) == 5

    for key, value in (("code", "f00d"), ("machine", HERE["machine"] | {"cpu": "AVX512"})):
        _, count, said = base(surroundings=HERE | {key: value})
        assert count == 0 and said.startswith("note: ") and said.count("\n") == 1
        assert str(path) in said and f"{key}" in said and "other code or on another machine" in said
    assert (path.read_bytes(), label.read_bytes()) == bits

    standin.fresh_model(16, 99).save(path)    # other weights under this name
    model, count, said = base()
    assert count == 1 and "is not what" in said and torch.equal(weights_of(model), weights_of(first))
    assert (path.read_bytes(), label.read_bytes()) == bits
    for key, value in (("seed", 4), ("facts", 9), ("channels", 32), ("task", "arc")):
        label.write_text(json.dumps(json.loads(bits[1]) | {key: value}))
        assert base()[1] == 1 and label.read_bytes() == bits[1]
    label.unlink()
    assert base()[1] == 1 and label.read_bytes() == bits[1]


@pytest.mark.parametrize("file, content", [
    (".pth", b"PK\x03\x04 no checkpoint"), (".pth", b""), (".json", b"{"), (".json", b"[]"),
    (".json", b"\xff"), (".json", b'{"code": 1}')])
def test_a_damaged_base_is_one_line(file, content, instant, tmp_path, capsys):
    """Catches: a traceback, an error that names neither the file nor what to do, a damaged file replaced."""
    assert train.main(arguments(tmp_path, "--arm", "no_fs")) == 0
    path, = tmp_path.glob(f"assets/standin/*{file}")
    path.write_bytes(content)
    error = refusal(capsys, train.main, arguments(tmp_path, "--arm", "prompt_fs"))
    assert f"{path} is damaged" in error and error.count(str(path)) == 1
    assert "Delete it" in error and "\n" not in error
    assert path.read_bytes() == content


# ---- rounds that run on it ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["R8", "R2"])
def test_without_a_gpu_a_round_runs_in_miniature(name, instant, tmp_path, monkeypatch, capsys):
    """Catches 42 hours of work begun without a word, a download of what will not be used, a result that does
    not say on what it was had, prompt lengths that no prompt had, work done twice, and a base read as if
    real."""
    monkeypatch.setattr(train, "real_material", lambda *_: pytest.fail("looked for the real thing"))
    assert train.main(arguments(tmp_path, name=name)) == 0
    out, err = capsys.readouterr()
    notice = err.partition("no_fs:")[0]
    assert "STAND-IN" in notice and "no GPU" in notice and "42 hours" in notice and "--real" in notice
    summary = (tmp_path / "runs/standin" / REAL[name].log["summary"]).read_text()
    for text in (out, summary):
        assert "ON THE STAND-IN" in text and "L=" not in text and "steps=4" in text and "  F1" not in text
        assert ("alpha_init" in text) is False    # R8's own is not taken for a change
    for arm in train.ARMS:
        run = run_of(tmp_path, name, arm=arm)
        assert (run["source"], run["status"], run["base"]["name"]) == ("standin", "done", "stand-in")
    for folder in "runs", "runs/standin":    # as train.py's --runs, and the folder itself
        assert eval_main([name, "--runs", str(tmp_path / folder)]) == 0
        assert capsys.readouterr().out.strip() == summary.strip()
    monkeypatch.setattr(standin, "pretrain", lambda *_: pytest.fail("made the base again"))
    assert train.main(arguments(tmp_path, "--standin", name=name)) == 0
    out, err = capsys.readouterr()
    assert err.count("this run is done") == 2 and "asked for with --standin" in err


def test_real_and_stand_in_runs_stand_beside_each_other(instant, tmp_path, monkeypatch, capsys):
    """Catches the first command, offline, whose folder the real round then cannot use; --real or a base of
    the user's that is replaced; a fallback that does not say what is missing. Each file is on a line of its
    own."""
    recipe = dataclasses.replace(SMALL["S1"], steps=4, batch_size=4, n_val=8)
    base = tmp_path / "mine.pth"
    standin.fresh_model(16, 9).save(base)
    made_from = material.Material("real", standin.training_examples(recipe, 1),
                              standin.validation_examples(recipe), RWKV7.load(base), "mine.pth", TOKENS)
    assert train.main(arguments(tmp_path)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "real_material", lambda *_: made_from)
        assert train.main(arguments(tmp_path, "--real")) == 0
    for folder, source in (("runs", "real"), ("runs/standin", "standin")):
        run = json.loads((tmp_path / folder / "S1/seed3/no_fs/run.json").read_text())
        assert (run["source"], run["status"]) == (source, "done")
    for more in (["--real"], ["--base", "nowhere.pth"]):
        lines = refusal(capsys, train.main, arguments(tmp_path, "--offline", *more, name="R8")).splitlines()
        assert len(lines) == 3 and (more == ["--real"] or "nowhere.pth" in lines[2])
        assert all(name in line for name, line in zip(("hotpot_train", "hotpot_dev", ".pth"), lines))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "run_seed", lambda *_: None)
    assert train.main(arguments(tmp_path, "--offline", "--device", "cuda", name="R8")) == 0
    err = capsys.readouterr().err
    missing = "hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json", REAL["R8"].base
    assert "STAND-IN" in err
    for name in missing:    # each on a line of its own
        assert sum("could not download" in line and f"/{name}: " in line for line in err.splitlines()) == 1


@pytest.mark.parametrize("off, facts", [(25, 10), (75, 4)])
def test_a_seed_is_explained_in_words(off, facts, instant, tmp_path, capsys):
    """On the stand-in the report is followed by what was asked, what came out, and what that does not say.

    Catches: a first command that shows nothing, a question on which the arms agree, a gate that is shut and
    nothing said of it, one seed that seems to decide; answers of another question, arm or evaluation.
    """
    command = arguments(tmp_path, settings=[f"facts={facts}"])
    assert train.main(command) == 0
    folder = tmp_path / "runs/standin/S1/seed3"
    recipe = dataclasses.replace(SMALL["S1"], n_val=8, facts=facts)
    questions = standin.validation_examples(recipe)
    for arm in train.ARMS:    # which agree on every second question; prompt_fs is right in 6 of 8
        lines = read_lines(folder / arm / "records.jsonl")
        for i, line in enumerate(lines):
            line["text"] = f"early{i}"
            if line["step"] == 4:
                line["text"] = f"{arm}{i % 8}" if i % 2 else f"same{i % 8}"
            line["correct"] = int(arm == "prompt_fs" and i % 8 < 6)
        write_lines(folder / arm / "records.jsonl", lines)
    lines = read_lines(folder / "prompt_fs/controls.jsonl")
    for i, line in enumerate(lines):
        line["correct"] = int(line["control"] == "off" and i % 8 < 8 * off / 100)
    write_lines(folder / "prompt_fs/controls.jsonl", lines)
    capsys.readouterr()
    assert train.main(command) == 0
    words = capsys.readouterr().out.partition("Seed 3 in words")[2]
    guess = standin.chance(recipe.task, facts)
    example = questions[1]
    for said in (f"8 questions on {facts} facts", f"right {guess:.0%} of the time",
                 "Without Future-Seed 0% ", "with it 75%", "The arms answer 4 questions differently",
                 f"switched off after training, prompt_fs answers {off}% right", "One seed decides nothing",
                 f'"{example.text}" is right. no_fs says "no_fs1", prompt_fs says "prompt_fs1".',
                 "--seeds 0-5"):
        assert said in words, said
    asked = TOKENS.decode(example.prompt).split()[-2]
    for arm in train.ARMS:
        assert words.count(f"{folder / arm / 'model.pth'} --ask {asked} --context ") == 1
    assert ("So its answers depend on the seed states." in words) == (off == 25)
    assert ("0.119, from layer 1" in words and "--round S20 --seed 3" in words) == (off == 75)


def test_settings_of_the_stand_in(instant, tmp_path, monkeypatch, capsys):
    """Catches a budget in minutes, after which questions would come again, threads that wait for each other,
    ten times slower on a busy machine, a real round that is left with one, settings that are out of range,
    and runs that are deleted before these are refused."""
    with pytest.raises(SystemExit):
        train.main(arguments(tmp_path, "--standin", "--minutes", "1"))
    assert train.main([*arguments(tmp_path), "--minutes", "1e-9"]) == 0
    assert run_of(tmp_path, "S1")["steps"] == 4 and "minutes, " not in capsys.readouterr().err
    for wrong in ("facts=40", "channels=40", "channels=0"):
        words = arguments(tmp_path, "--standin", "--fresh", settings=[wrong])
        assert wrong.split("=")[0] in refusal(capsys, train.main, words)
    assert run_of(tmp_path, "S1")["status"] == "done"
    taken = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(train, "run_seed", lambda *_: None)
    monkeypatch.setattr(train, "real_material", lambda *_: object())
    assert train.main(arguments(tmp_path)) == train.main(arguments(tmp_path, "--real")) == 0
    assert taken == [1, 2]


# ---- the processor -----------------------------------------------------------------------------------------

CHILD = """
import sys
import standin, train
standin.LAYERS = 3
if "as it is" in sys.argv:    # the variables from outside, not train.py's
    train.platform.machine = lambda: "another"
sys.exit(train.main([word for word in sys.argv[1:] if word != "as it is"]))
"""


@pytest.mark.skipif("avx512" not in torch.backends.cpu.get_cpu_capability().lower(),
                    reason="needs a processor with AVX-512: it has other bits to be kept from")
def test_a_processor_with_avx512_gives_the_bits_of_one_without(instant, tmp_path, monkeypatch):
    """The command as usual, and as a processor with AVX2 has it, which the libraries' own variables make of
    this one; both unlike a run in this process, which has long chosen AVX-512. Catches a study of the
    processor."""
    plain = {key: value for key, value in os.environ.items() if key not in AVX2} | {"PYTHONPATH": str(ROOT)}
    assert train.main(arguments(tmp_path, "--arm", "prompt_fs", "--runs", str(tmp_path / "native"))) == 0
    children, found = [], {}
    for name, more, variables in (("usual", [], {}), ("avx2", ["as it is"], AVX2)):
        argv = [sys.executable, "-c", CHILD, *more]
        argv += arguments(tmp_path, "--arm", "prompt_fs", "--runs", name)
        children.append(subprocess.Popen(argv, cwd=tmp_path, env=plain | variables, stderr=subprocess.PIPE,
                                         text=True))
    for child in children:
        assert child.wait(timeout=300) == 0, child.stderr.read()
    for name in ("native", "usual", "avx2"):
        folder = tmp_path / name / "standin/S1/seed3/prompt_fs"
        machine = json.loads((folder / "run.json").read_text())["history"][0]["machine"]
        assert machine["cpu"] == ("AVX512" if name == "native" else "AVX2")
        parts = "model.pth", "records.jsonl", "controls.jsonl"
        found[name] = [(folder / part).read_bytes() for part in parts]
    assert found["usual"] == found["avx2"] and found["usual"][0] != found["native"][0]
