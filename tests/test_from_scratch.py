"""study/tasks.py and study/from_scratch.py: tasks ask what they say; both models start and learn alike."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "study"))
import from_scratch    # noqa: E402
import tasks    # noqa: E402
from fs import prefill    # noqa: E402
from tasks import ASK, BAR, HOLE, SILENT, STOP, TASKS, WHO    # noqa: E402


def drawn(task, B=64, n=None, seed=0):
    n = n or TASKS[task].last
    return TASKS[task].make(np.random.default_rng(seed), B, n)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_says_at_each_token_what_is_to_be_said_there(task):
    """Inputs and targets have one shape, every id is a word, and every sequence asks something.

    Catches: an id past the vocabulary, targets shifted against the inputs, a batch that asks nothing.
    """
    inputs, targets = drawn(task)
    assert inputs.shape == targets.shape
    assert inputs.min() >= 0 and inputs.max() < len(tasks.WORDS)
    asked = targets != SILENT
    assert asked.any(axis=1).all()
    assert targets[asked].min() >= 0 and targets[asked].max() < len(tasks.WORDS)


def test_a_task_of_ones_own_is_as_short_as_its_example():
    """The example in tasks.py's docstring gives a task like the others. Catches: an example out of date."""
    code = tasks.__doc__[tasks.__doc__.index("    def again"):]
    names = dict(vars(tasks), TASKS={})
    exec("\n".join(line[4:] for line in code.splitlines()), names)
    task = names["TASKS"]["again"]
    inputs, targets = task.make(np.random.default_rng(0), 5, task.last)
    assert inputs.shape == targets.shape == (5, 8) and (targets[:, -1] == inputs[:, 0]).all()


@pytest.mark.parametrize("task", ["needle", "needle-first", "needle-both", "needle-twice"])
def test_one_statement_of_a_needle_text_answers_its_question(task):
    """Exactly one statement has the verb and the thing that are asked for, and its name is the answer.

    Catches: a question about another text, two statements that would answer it, the wrong name as its answer.
    """
    for tokens, said in zip(*drawn(task)):
        tokens = tokens.tolist()
        ask_at = tokens.index(WHO)
        verb, thing = tokens[ask_at + 1:ask_at + 3]
        names = {tokens[stop - 3] for stop, token in enumerate(tokens)
                 if token == STOP and tokens[stop - 2:stop] == [verb, thing]}
        assert tokens[-1] == ASK
        assert names == {said[-1]}


@pytest.mark.parametrize("task", ["intersection", "intersection-short"])
def test_two_lists_share_one_word(task):
    """The lists hold no word twice and have one word in common, which is the answer; the order is as named.

    Catches: a second word in common, an answer that is in one list only, the lists the wrong way round.
    """
    for tokens, said in zip(*drawn(task)):
        bar = tokens.tolist().index(BAR)
        first, second = tokens[:bar].tolist(), tokens[bar + 1:-1].tolist()
        assert len(set(first)) == len(first) and len(set(second)) == len(second)
        assert set(first) & set(second) == {said[-1]}
        assert (len(first) > len(second)) == (task == "intersection")


@pytest.mark.parametrize("task", ["recall", "directional"])
def test_a_query_is_answered_by_the_thing_of_its_name(task):
    """Every name is asked once, and its answer is the thing that stands behind it in its pair.

    Catches: things shuffled by another order than their names, a pair's own name asked where it is stated.
    """
    for tokens, said in zip(*drawn(task)):
        asked = np.flatnonzero(said != SILENT)
        n = TASKS[task].last
        assert len(asked) == n
        for t in asked:
            name = tokens[t] if task == "recall" else tokens[t - 1]
            things = {tokens[s + 1] for s in range(0, len(tokens) - 1, 2)
                      if tokens[s] == name and tokens[s + 1] != ASK and (task != "recall" or s < 2 * n)}
            assert things == {said[t]}


def test_comes_later_finds_the_queries_whose_pair_comes_later():
    """Against a search by hand, query by query.

    Catches: the query taken for its pair, the two kinds exchanged, a mark on the name and not on the `?`.
    """
    inputs, targets = drawn("directional")
    later = tasks.comes_later(inputs)
    for tokens, said, marks in zip(inputs, targets, later):
        for t in range(len(tokens)):
            wanted = False
            if said[t] != SILENT:
                pairs = [s for s in range(0, len(tokens), 2) if tokens[s + 1] != ASK]
                own = [s for s in pairs if tokens[s] == tokens[t - 1]]
                wanted = own[0] > t
            assert marks[t] == wanted


def test_a_sudoku_has_one_solution():
    """Of the 288 boards one has the digits that are given, and the targets complete the puzzle to it.

    Catches: boards that break a rule, puzzles with two solutions, a target where a digit is given.
    """
    boards = tasks.sudoku_boards()
    assert len(boards) == len(set(map(tuple, boards.tolist()))) == 288
    for puzzle, said in zip(*drawn("sudoku")):
        holes = puzzle == HOLE
        assert holes.sum() == TASKS["sudoku"].last
        assert ((said == SILENT) == ~holes).all()
        fits = boards[(boards[:, ~holes] == puzzle[~holes]).all(axis=1)]
        assert len(fits) == 1 and (fits[0][holes] == said[holes]).all()


def test_two_arms_start_alike():
    """Both arms have the same weights at the start, bit for bit.

    Catches: random numbers drawn for Future-Seed before the model's own.
    """
    plain, future_seed = (from_scratch.new_arm(3, fs) for fs in (False, True))
    for (name, one), other in zip(plain.model.named_parameters(), future_seed.model.parameters()):
        assert torch.equal(one, other), name
    assert plain.fs is None and future_seed.fs is not None


def test_only_future_seed_lets_a_word_that_comes_later_change_an_answer():
    """A changed last word changes what is said before it with Future-Seed, and in no bit without.

    Catches: an arm that is trained without its seed states, a plain arm that sees ahead.
    """
    inputs, _ = drawn("directional", B=2)
    changed = inputs.copy()
    changed[:, -1] = np.where(inputs[:, -1] == ASK, STOP, ASK)
    for with_fs in (False, True):
        arm = from_scratch.new_arm(0, with_fs)
        # the published initialisation writes nothing into the residual stream: let every block speak
        for block in arm.model.blocks:
            torch.nn.init.normal_(block.att.output.weight, std=0.1)
        before = prefill(arm.model, torch.tensor(inputs), fs=arm.fs)[0][:, :-1]
        after = prefill(arm.model, torch.tensor(changed), fs=arm.fs)[0][:, :-1]
        assert torch.equal(before, after) == (not with_fs)


def test_one_command_trains_both_models_and_writes_a_line(tmp_path, monkeypatch, capsys):
    """A short run prints a table and both models' answers, and writes what they said, in the targets' order.

    Catches: an option that is read and not used, answers of one arm under the other's name, seed states that
    were not switched off, or were in another model than the one that was trained with them.
    """
    asked, answers = [], from_scratch.answers

    def noting(arm, inputs):
        asked.append(arm)
        return answers(arm, inputs)

    monkeypatch.setattr(from_scratch, "answers", noting)
    short = TASKS["recall"]._replace(last=3, steps=10)
    monkeypatch.setitem(TASKS, "recall", short)
    monkeypatch.setattr(from_scratch, "TEST", 64)
    monkeypatch.setattr(from_scratch, "WARM_UP", 1)    # or both models would still say the same
    out = tmp_path / "runs.jsonl"
    monkeypatch.setattr(sys, "argv", ["from_scratch.py", "recall", "--seed", "5", "--out", str(out)])
    from_scratch.main()
    run = json.loads(out.read_text())
    assert (run["task"], run["seed"], len(run["curve"])) == ("recall", 5, 10)
    inputs, targets = short.make(np.random.default_rng(from_scratch.TEST_SEED), 64, 3)
    assert run["said"]["plain"] != run["said"]["Future-Seed"]
    for arm in ("plain", "Future-Seed"):
        right = np.mean(np.array(run["said"][arm]) == targets[targets != SILENT])
        assert run["curve"]["10"][f"right, {arm}"] == pytest.approx(right, abs=1e-4)
    switched_off, trained = asked[-1], next(arm for arm in asked if arm.fs)
    assert switched_off.fs is None and switched_off.model is trained.model
    right = (answers(switched_off, inputs) == targets)[targets != SILENT].mean()
    assert run["off"]["right"] == pytest.approx(right, abs=1e-4)
    out = capsys.readouterr().out
    assert "[" in out and "switched off" in out
