"""The built-in stand-in: its vocabulary, its questions, its base, and rounds that fall back on it.

Bases here have two layers and pass whatever they know, so that a test takes a second.
"""

import dataclasses
import json
import signal
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import arm
import standin
import train
from data import make_example
from eval import main as report_main
from model import RWKV7
from rounds import load_rounds, miniature
from standin import standin_records

ROUNDS = load_rounds()
SMALL = standin.small_tokenizer()
QUICK = ["steps=4", "n_val=8", "batch_size=4", "eval_every=2"]


@pytest.fixture
def quick(monkeypatch):
    """Bases that are made in a dozen steps and pass every test."""
    for name, value in dict(LAYERS=2, CHANNELS=16, FFN=16, EASY=1e9, KNOWN=1e9, PASSED=0.0,
                            QUESTIONS=16).items():
        monkeypatch.setattr(standin, name, value)
    monkeypatch.setattr(arm, "stop_requested", [])
    monkeypatch.setattr(standin, "stop_requested", arm.stop_requested)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.announce_standin.cache_clear()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def arguments(tmp_path, *more, name="R6", seed=3, quick_settings=QUICK):
    return ["--round", name, "--seed", str(seed), "--assets", str(tmp_path / "assets"),
            "--runs", str(tmp_path / "runs"), "--offline", "--device", "cpu", "--set", *quick_settings, *more]


def run_of(tmp_path, name="R6", arm_name="no_fs", seed=3):
    return json.loads((tmp_path / "runs" / name / f"seed{seed}" / arm_name / "run.json").read_text())


# ---- vocabulary and questions ------------------------------------------------------------------------------

@settings(deadline=None, max_examples=25)
@given(task=st.sampled_from(["arc", "hotpotqa"]), order=st.sampled_from(["context_first", "question_first"]),
       n_facts=st.integers(2, 24), seed=st.integers(0, 10**6))
def test_the_small_vocabulary_holds_every_question(task, order, n_facts, seed):
    """Catches a word without an id, ids that collide, and text that decodes to something else."""
    record = standin_records(task, "train", 1, seed, n_facts)[0]
    rules = dict(order=order, max_prompt=512, max_answer=4)
    small = make_example(task, record, SMALL, **rules)
    assert 0 < min(small.prompt) and max(small.prompt) <= len(SMALL.number)
    text = SMALL.decode(small.prompt)
    assert text.endswith("Answer: " if task == "arc" else "Answer:")
    assert SMALL.encode(text) == small.prompt and len(small.answer) == 1
    assert SMALL.decode(small.answer).strip() == small.text


def test_the_small_vocabulary_is_the_official_one_renumbered():
    """Catches an order that depends on the run, a gap in the ids, an id for the end of document."""
    assert sorted(SMALL.number.values()) == list(range(1, len(SMALL.number) + 1))
    assert list(SMALL.number) == sorted(SMALL.number)
    assert SMALL.tokens[0] == b"" and len(SMALL.tokens) == len(SMALL.number) + 1
    with pytest.raises(ValueError, match="knows only names"):
        SMALL.encode("Who wrote Faust?")


def test_questions_get_harder_on_time():
    """Catches a curriculum that jumps, never ends, or depends on how many steps there are."""
    round = miniature(ROUNDS["S1"])
    facts = [standin.facts_at(round, step) for step in range(round.steps)]
    assert facts[0] == facts[round.facts_hold] == round.facts_first and facts[-1] == round.facts
    assert all(0 <= later - earlier <= 1 for earlier, later in zip(facts, facts[1:]))
    assert facts[round.facts_hold + round.facts_ramp] == round.facts
    short, long = (standin.training_examples(dataclasses.replace(round, steps=steps, batch_size=2), 1, SMALL)
                   for steps in (5, 9))
    assert long[:10] == short and len(long) == 18


@pytest.mark.parametrize("order, share", [("context_first", 0.25), ("question_first", 1.0)])
def test_rehearsal(order, share):
    """Catches rehearsal in validation, or a share of it other than the round's."""
    round = dataclasses.replace(miniature(ROUNDS["S1"]), order=order, batch_size=1)
    texts = [SMALL.decode(example.prompt) for example in standin.training_examples(round, 0, SMALL)]
    first = sum(text.startswith("Question") for text in texts) / len(texts)
    assert abs(first - share) < 0.1
    validation = standin.validation_examples(round, SMALL)
    assert len(validation) == round.n_val and len({example.id for example in validation}) == round.n_val
    for example in validation:
        text = SMALL.decode(example.prompt)
        assert text.startswith("Context" if order == "context_first" else "Question")
        assert text.count("\n\n") == round.facts + 1


def test_seeds_have_their_own_questions():
    """Catches a study whose seeds all train on the same data."""
    round = dataclasses.replace(miniature(ROUNDS["S1"]), steps=3)
    one, other = (standin.training_examples(round, seed, SMALL) for seed in (1, 2))
    assert not {tuple(example.prompt) for example in one} & {tuple(example.prompt) for example in other}


# ---- the base ----------------------------------------------------------------------------------------------

def test_the_base_is_an_official_checkpoint(quick, tmp_path):
    """Catches a file that no RWKV-7 program loads, and leftovers beside it."""
    path = tmp_path / "weights" / "base.pth"
    standin.pretrain("hotpotqa", 1, path, SMALL, torch.device("cpu"))
    assert RWKV7.load(path).config.vocab_size == 1 + len(SMALL.number)
    assert [file.name for file in path.parent.iterdir()] == ["base.pth"]


def test_a_fresh_base_has_an_embedding_of_its_own():
    """Catches the published embedding, in whose growth all steps would go, and attempts that start alike."""
    embeddings = []
    for attempt in (0, 1):
        model = standin.fresh_arm(2, attempt, SMALL).model
        weights, published = model.state_dict(), RWKV7.init(model.config, 10 + attempt).state_dict()
        assert [key for key in weights if not torch.equal(weights[key], published[key])] == ["emb.weight"]
        embeddings.append(weights["emb.weight"])
        assert 0.49 < embeddings[-1].max() < 0.5 and -0.5 < embeddings[-1].min() < -0.49
    assert not torch.equal(*embeddings)


@pytest.mark.parametrize("task", ["arc", "hotpotqa"])
def test_a_base_learns_with_the_question_first_until_it_passes(task, quick, tmp_path, monkeypatch):
    """Catches another order, two new facts at a time, the same questions again and again, an exam of easier
    or of known questions, and one whose result does not count."""
    batches, exams, grades = [], [], iter([0.98, 0.99])
    collate, score = standin.collate, standin.score
    monkeypatch.setattr(standin, "PASSED", 0.99)
    monkeypatch.setattr(standin, "collate",
                        lambda batch, device: batches.append(batch) or collate(batch, device))
    monkeypatch.setattr(standin, "score", lambda model, exam, **named:
                        exams.append((len(batches), exam)) or score(model, exam, **named))
    monkeypatch.setattr(standin, "summarise", lambda records: {"accuracy": next(grades)})
    standin.pretrain(task, 1, tmp_path / "base.pth", SMALL, torch.device("cpu"))

    (failed, exam), (passed, _) = exams
    assert failed < passed == len(batches)
    texts = [[SMALL.decode(example.prompt) for example in examples] for examples in (*batches, exam)]
    assert all(text.startswith("Question") for part in texts for text in part)
    # a line a fact, and four others
    counts = [{sum(map(bool, text.split("\n"))) - 4 for text in part} for part in texts]
    *facts, most = [count for part in counts for count in part]
    assert len(facts) == len(batches) and most == {"arc": 5, "hotpotqa": 10}[task]
    assert sorted(set(facts)) == list(range(2, most + 1)) and facts == sorted(facts)
    assert len({example.id for batch in batches for example in batch}) == sum(map(len, batches))
    assert len(exam) == standin.QUESTIONS and all("validation" in example.id for example in exam)


def test_a_stopped_base_goes_on_with_the_same_bits(quick, tmp_path, monkeypatch):
    """Catches work that a stop loses, and state that it forgets."""
    whole, stopped = tmp_path / "whole.pth", tmp_path / "stopped.pth"
    standin.pretrain("arc", 1, whole, SMALL, torch.device("cpu"))
    update, calls = standin.update, []

    def stop_after_two(*arguments):
        calls.append(1)
        if len(calls) == 2:
            arm.stop_requested.append(signal.SIGTERM)
        update(*arguments)

    monkeypatch.setattr(standin, "update", stop_after_two)
    with pytest.raises(arm.Stopped, match="stopped after step 2"):
        standin.pretrain("arc", 1, stopped, SMALL, torch.device("cpu"))
    assert not stopped.exists()
    arm.stop_requested.clear()
    standin.pretrain("arc", 1, stopped, SMALL, torch.device("cpu"))
    one, other = RWKV7.load(whole).state_dict(), RWKV7.load(stopped).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not stopped.with_suffix(".unfinished").exists()


def test_failed_attempts_start_over_and_end(quick, tmp_path, monkeypatch, capsys):
    """Catches an attempt repeated from the same weights, and attempts without end."""
    monkeypatch.setattr(standin, "EASY", 0.0)
    monkeypatch.setattr(standin, "USUAL_STEPS", {"arc": 1})
    starts = []
    init = RWKV7.init
    monkeypatch.setattr(RWKV7, "init", lambda config, seed: starts.append(seed) or init(config, seed))
    with pytest.raises(ValueError, match="5 attempts did not learn it"):
        standin.pretrain("arc", 2, tmp_path / "base.pth", SMALL, torch.device("cpu"))
    assert starts == [10, 11, 12, 13, 14] and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.count("starting over") == 4


def test_a_damaged_unfinished_base_is_named(quick, tmp_path):
    (tmp_path / "base.unfinished").write_bytes(b"?")
    with pytest.raises(ValueError, match="base.unfinished: damaged"):
        standin.pretrain("arc", 2, tmp_path / "base.pth", SMALL, torch.device("cpu"))


def test_round_standin_makes_the_bases(quick, tmp_path, capsys):
    """Catches a base made twice, or for one task only."""
    for _ in range(2):
        assert train.main(["--round", "standin", "--seeds", "1-2", "--assets", str(tmp_path)]) == 0
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert names == {f"standin-{task}-seed{seed}.pth" for task in ("arc", "hotpotqa") for seed in (1, 2)}
    assert capsys.readouterr().err.count("made once") == 4


# ---- rounds that fall back ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["R6", "R2"])
def test_a_round_without_files_runs_on_the_stand_in(name, quick, tmp_path, capsys):
    """Catches a silent fallback, an unmarked result, answers that nobody sees, work done twice."""
    assert train.main(arguments(tmp_path, name=name)) == 0
    out, err = capsys.readouterr()
    assert "STAND-IN: the real data or base cannot be had" in err and "STAND-IN" in out
    assert out.count("right is") == 4 and "no_fs says" in out and "prompt_fs says" in out
    for arm_name in train.ARMS:
        run = run_of(tmp_path, name, arm_name)
        assert run["standin"] is True and run["base"]["name"] == "stand-in" and run["status"] == "done"
        assert run["settings"]["order"] == "context_first" and run["settings"]["fs_layer_start"] == 6
    assert "STAND-IN" in next((tmp_path / "runs").glob("_summary*")).read_text()
    assert train.main(arguments(tmp_path, name=name)) == 0
    err = capsys.readouterr().err
    assert err.count("done before") == 2 and "made once" not in err
    assert report_main([name, "--runs", str(tmp_path / "runs")]) == 0
    assert "switched off" in capsys.readouterr().out


def test_answers_are_shown_under_their_questions(tmp_path, capsys):
    """Catches answers of another question, of another arm, or of an earlier evaluation."""
    questions = standin.validation_examples(dataclasses.replace(miniature(ROUNDS["R6"]), n_val=6), SMALL)
    for name in train.ARMS:
        (tmp_path / name).mkdir()
        texts = ["early"] * 6 + [f" {name}{i}" for i in range(6)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / name / "records.jsonl").write_text("".join(lines))
    train.show_answers(SimpleNamespace(validation=questions, tokenizer=SMALL), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("    right is") for line in lines) == 4
    for i, example in enumerate(questions[:4]):
        asked = SMALL.decode(example.prompt).split()[-2]
        assert f"{asked} {example.text}," in lines[2 * i] and lines[2 * i].endswith(f"{asked}, Answer:")
        assert lines[2 * i + 1] == (f"    right is {example.text}; no_fs says no_fs{i}, "
                                    f"prompt_fs says prompt_fs{i}")


def test_real_insists_and_says_what_to_put_where(tmp_path, capsys):
    """Catches a stand-in in place of the real thing, and an error that names one missing file of three."""
    assert train.main(arguments(tmp_path, "--real", name="R8")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ")
    for words in ("hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json", "rwkv7-g1d-0.1b", "http"):
        assert words in err
    assert not (tmp_path / "runs").exists()


def test_a_base_of_the_users_is_never_replaced(tmp_path, capsys):
    """Catches a fallback that ignores --base."""
    assert train.main(arguments(tmp_path, "--base", "init:L2-D16")) == 2
    assert "STAND-IN" not in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(tmp_path, "--base", "init", "--standin"))
    assert stop.value.code == 2


@pytest.mark.parametrize("flags, setting, words", [
    (["--standin"], "facts=0", "2 facts or more"), (["--real"], "facts=4", "add --standin"),
    (["--standin"], "facts=25", "24 or less"), (["--standin"], "rehearsal=1.5", "1 or less"),
    (["--standin"], "facts_first=1", "2 or more"),
])
def test_settings_of_the_stand_in(flags, setting, words, quick, tmp_path, capsys):
    """Catches facts that a real round ignores, and a stand-in without any."""
    assert train.main(arguments(tmp_path, *flags, quick_settings=[*QUICK, setting])) == 2
    err = capsys.readouterr().err
    assert words in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")


def test_real_and_stand_in_do_not_share_a_folder(quick, tmp_path, capsys):
    """Catches a real run continued on made-up questions."""
    folder = tmp_path / "runs" / "R6" / "seed3" / "no_fs"
    assert train.main(arguments(tmp_path, "--arm", "no_fs")) == 0
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "standin": False}))
    capsys.readouterr()
    assert train.main(arguments(tmp_path, "--arm", "no_fs")) == 2
    err = capsys.readouterr().err
    assert "standin was False, now True" in err and "--runs DIR" in err


def test_a_base_of_another_vocabulary_is_named(quick, tmp_path, capsys):
    """Catches a base of an older stand-in, whose ids mean other words."""
    config = standin.fresh_arm(0, 0, SMALL).model.config
    model = RWKV7.init(dataclasses.replace(config, vocab_size=20))
    path = tmp_path / "assets" / "weights" / "standin-hotpotqa-seed3.pth"
    path.parent.mkdir(parents=True)
    model.save(path)
    assert train.main(arguments(tmp_path)) == 2
    assert "to have it made again" in capsys.readouterr().err.splitlines()[-1]


# ---- arms that rounds share --------------------------------------------------------------------------------

def test_no_fs_is_shared_between_rounds(quick, tmp_path, capsys):
    """Catches the same arm trained twice, and a copy that is not what training gives."""
    assert train.main(arguments(tmp_path)) == 0
    assert train.main(arguments(tmp_path, name="S1")) == 0
    assert "the same run as R6's" in capsys.readouterr().err
    ours, theirs = (tmp_path / "runs" / name / "seed3" / "no_fs" for name in ("S1", "R6"))
    assert run_of(tmp_path, "S1")["copied_from"] == "R6" and run_of(tmp_path, "S1")["round"] == "S1"
    assert run_of(tmp_path, "S1")["settings"]["fs_layer_start"] == 1
    copied = {path.name: path.read_bytes() for path in ours.iterdir() if path.name != "run.json"}
    assert copied == {path.name: path.read_bytes() for path in theirs.iterdir() if path.name != "run.json"}
    assert not (tmp_path / "runs/S1/seed3/prompt_fs/run.json").read_text().count("copied_from")
    assert train.main(arguments(tmp_path, "--fresh", name="S1")) == 0
    assert "copied_from" not in run_of(tmp_path, "S1")
    for name, content in copied.items():
        assert (ours / name).read_bytes() == content


def test_what_differs_is_not_shared(quick, tmp_path):
    """Catches a copy of an arm with other steps, another seed, another order or another Future-Seed."""
    assert train.main(arguments(tmp_path)) == 0
    others = (dict(name="S1", quick_settings=[*QUICK, "lr=1e-3"]), dict(name="S1", seed=4), dict(name="S6"))
    for other in others:
        assert train.main(arguments(tmp_path, "--arm", "no_fs", **other)) == 0
        assert "copied_from" not in run_of(tmp_path, other["name"], seed=other.get("seed", 3))
    assert train.main(arguments(tmp_path, "--arm", "prompt_fs", name="S2")) == 0
    assert "copied_from" not in run_of(tmp_path, "S2", "prompt_fs")
    assert train.main(arguments(tmp_path, name="R4", quick_settings=QUICK)) == 0
    assert run_of(tmp_path, "R4", "prompt_fs")["copied_from"] == "R6"    # in the miniature they are the same


def test_a_damaged_twin_is_left_alone(quick, tmp_path):
    """Catches another round's damaged folder that keeps this one from running."""
    assert train.main(arguments(tmp_path, "--arm", "no_fs")) == 0
    (tmp_path / "runs/R6/seed3/no_fs/run.json").write_text("{")
    assert train.main(arguments(tmp_path, "--arm", "no_fs", name="S1")) == 0
    assert "copied_from" not in run_of(tmp_path, "S1")


def test_what_ran_on_another_device_is_not_shared(quick, tmp_path):
    """Catches an arm of a GPU, in bf16, beside one of a CPU."""
    assert train.main(arguments(tmp_path, "--arm", "no_fs")) == 0
    path = tmp_path / "runs/R6/seed3/no_fs/run.json"
    path.write_text(path.read_text().replace('"device": "', '"device": "NVIDIA '))
    assert train.main(arguments(tmp_path, "--arm", "no_fs", name="S1")) == 0
    assert "copied_from" not in run_of(tmp_path, "S1")


def test_a_budget_in_minutes_is_refused(quick, tmp_path, capsys):
    """Catches questions that come again, and fewer facts, once a budget outlasts the questions."""
    assert train.main(arguments(tmp_path, "--minutes", "0.01")) == 2
    assert "--set steps=N" in capsys.readouterr().err.splitlines()[-1]


# ---- which seeds run ---------------------------------------------------------------------------------------

def test_seeds_come_from_the_command_or_the_round(monkeypatch, capsys):
    """Catches settings that do not count, a negative seed, which no report would find, and a stand-in whose
    two tasks have bases of different seeds."""
    ran = []
    monkeypatch.setattr(train, "find_real", lambda round, args: "material")
    monkeypatch.setattr(train, "run_seed", lambda material, seed, args: ran.append(seed))
    monkeypatch.setattr(train, "standin_base", lambda task, seed, args, tokenizer: ran.append((task, seed)))
    assert train.main(["--round", "R3"]) == 0
    assert train.main(["--round", "R3", "--set", "seeds=[7, 8]"]) == 0
    assert train.main(["--round", "R3", "--seeds", "4-5"]) == 0
    assert train.main(["--round", "standin"]) == 0
    assert ran == [0, 1, 2, 7, 8, 4, 5, *((task, seed) for task in ("arc", "hotpotqa") for seed in range(3))]
    assert train.main(["--round", "R3", "--seed", "-1"]) == 2
    assert "--seed -1" in capsys.readouterr().err.splitlines()[-1]


# ---- what a run must not leave behind ----------------------------------------------------------------------

def test_weights_that_diverged_are_neither_kept_nor_done(quick, tmp_path, capsys):
    """Catches a last step that ruins the weights: its training loss was still fine."""
    diverges = arguments(tmp_path, "--arm", "no_fs", quick_settings=[*QUICK, "steps=1", "lr=1e30"])
    assert train.main(diverges) == 2
    assert "validation loss after step" in capsys.readouterr().err.splitlines()[-1]
    assert run_of(tmp_path, "R6")["status"] == "running"
    saved = torch.load(tmp_path / "runs/R6/seed3/no_fs/checkpoint.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["arm"].values())


def test_damaged_records_of_a_finished_run_are_named(quick, tmp_path, capsys):
    """Catches a traceback, or an error without a file, from showing answers that are not there."""
    assert train.main(arguments(tmp_path)) == 0
    assert "python eval.py --checkpoint" in capsys.readouterr().out
    (tmp_path / "runs/R6/seed3/no_fs/records.jsonl").write_text("")
    assert train.main(arguments(tmp_path)) == 0
    assert "no_fs/records.jsonl" in capsys.readouterr().err.splitlines()[-1]


def test_the_stand_in_takes_one_thread(quick, tmp_path, monkeypatch):
    """Catches threads that wait for each other, ten times slower on a busy machine, and a real round that is
    left with one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(train, "run_seed", lambda *_: None)
    monkeypatch.setattr(train, "real_material", lambda round, args: "material")
    assert train.main(arguments(tmp_path, "--standin")) == train.main(arguments(tmp_path)) == 0
    assert taken == [1, 2]


def test_the_report_says_what_was_set(quick, tmp_path, capsys):
    """Catches settings of the real round in the summary of a stand-in."""
    assert train.main(arguments(tmp_path)) == 0
    printed, summary = capsys.readouterr().out, next((tmp_path / "runs").glob("_summary*.txt")).read_text()
    for text in (printed, summary):
        assert "settings changed from the round's: " in text and "steps=4" in text
    assert f"L={miniature(ROUNDS['R6']).max_prompt} " in summary
