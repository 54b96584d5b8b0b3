"""rounds.toml against the experiment log, number by number, and rounds.py against wrong files and settings.

The table repeats the log on purpose: it is the second pair of eyes, and nothing computes it.
"""

import dataclasses
import json
import math
import re
import statistics
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import fs
import rounds
from model import Config
from rounds import (SETTINGS, Round, check_together, expand, load_rounds, seeds_of, setting_lines,
                    with_settings)

ROUNDS, MINIATURES = load_rounds()
LOG = """
     task     first       L  min   n_train, n_val, batch, alpha, start, mean, std, d_loss, d_acc by seed
R2   arc      context   512    0 1000 200  8 -2  6   .0339 .0205 -.0182   .0156  .0234  .0625
R3   arc      question  512    0 1000 200  8 -2  6  -.0052 .0097  .0003  -.0156  .0078 -.0078
R4   hotpotqa context  2048 1024 2048 512  2 -2  6  -.0027 .0171 -.1287   .0084  .0104 -.0269
R5   hotpotqa question 2048 1024 2048 512  2 -2  6  -.0090 .0085 -.0844  -.0104  .0021 -.0186
R6   hotpotqa context  4096 1536 1000 200  1 -2  6   .0012 .0388 -.0192   .0382  .0179 -.0525
R7   hotpotqa question 4096 1536 1000 200  1 -2  6   .0025    .0  .0873   .0025
R8   hotpotqa context  4096 1536 1000 200  1 -4  6  -.0056 .0519 -.2070   .0141  .0458 -.0766
R9a  arc      context   512    0 1000 200  8 -2  6   .0156 .0292  .0295   .0078  .0547 -.0156
R9b  hotpotqa context  4096 1536 1000 200  1 -2  6  -.0220 .0378 -.0188   .0250 -.0234 -.0676
R10  hotpotqa context  4096 1536 1000 200  1 -2 10  -.0225 .0435 -.1906   .0141  .0021 -.0837
R11  hotpotqa context  4096 1536 1000 200  1 -3 10   .0058 .0328  .1495   .0438  .0099 -.0364
R12a arc      context   512    0 1000 200 48 -2  6  -.0203 .0367  .0134  -.0026  .0052 -.0573  .0234 -.0703
R12b arc      question  512    0 1000 200 48 -2  6   .0005 .0094 -.0202  -.0104 -.0052  .0130  .0104 -.0052
R12c hotpotqa context  4096 1536 1000 200  2 -3 10   .0054 .0179 -.1489   .0000 -.0211  .0324  .0000  .0156
R12d hotpotqa question 4096 1536 1000 200  2 -3 10   .0052 .0214  .0206   .0414 -.0250  .0000  .0000  .0096
R14a arc      context   512    0 1000 200 64 -2  6  -.0074 .0252  .0121   .0098 -.0547 -.0078 -.0020  .0176
R14b arc      question  512    0 1000 200 64 -2  6  -.0309 .0357 -.0112   .0020  .0020 -.0098 -.0742 -.0742
"""
ROWS = {line.split()[0]: line.split()[1:] for line in LOG.strip().splitlines()[1:]}
SUMMARIES = """
arc_optionsfirst_stabilized_r2                          arc_qfirst_stabilized_r3
hotpot_qafter_stabilized_r4_s012                        hotpot_qfirst_stabilized_r5_s012
hotpot_qafter_stabilized_len4096_r6_s012                hotpot_qfirst_stabilized_len4096_r7_s0
hotpot_qafter_stabilized_len4096_r8_alpha_m4_s012       arc_optionsfirst_stabilized_r4_sched_linear
hotpot_qafter_stabilized_len4096_r9_sched_linear_s012   hotpot_qafter_stabilized_len4096_r10_lstart10_s012
hotpot_qafter_stabilized_len4096_r11_lstart10_alpha-3_s012
arc_optionsfirst_stabilized_r5_s01234                   arc_qfirst_stabilized_r5_s01234
hotpot_qafter_stabilized_len4096_r12_lstart10_alpha-3_s01234
hotpot_qfirst_stabilized_len4096_r12_lstart10_alpha-3_s01234
arc_optionsfirst_r14_utilmax_s01234                     arc_qfirst_r14_utilmax_s01234
""".split()


def differences(one: Round, two: Round) -> set[str]:
    return {key for key in SETTINGS if getattr(one, key) != getattr(two, key)}


# ---- the rounds of rounds.toml -----------------------------------------------------------------------------

def test_every_round_of_the_log_is_there():
    """The rounds whose names begin with R are the log's, in its order, with its results.
    Catches: a round forgotten, renamed or out of order, and results that the log does not have."""
    assert [name for name in ROUNDS if name.startswith("R")] == list(ROWS)
    for name, recipe in ROUNDS.items():
        assert recipe.name == name
        assert (recipe.log is not None) == (name in ROWS)
    assert [ROUNDS[name].log["summary"] for name in ROWS] == [f"_summary_{name}.txt" for name in SUMMARIES]


@pytest.mark.parametrize("name", ROWS)
def test_recipe_and_results(name):
    """A round of the log has the recipe and the digits that the table above gives it.
    Catches: any digit that was mistyped or that inheritance brings from the wrong round."""
    task, first, *numbers = ROWS[name]
    longest, shortest, n_train, n_val, batch, alpha, start, mean, std, d_loss, *d_acc = map(float, numbers)
    r, log = ROUNDS[name], ROUNDS[name].log
    assert (r.task, r.order, r.max_prompt, r.min_prompt) == (task, f"{first}_first", longest, shortest)
    assert (r.n_train, r.n_val, r.batch_size) == (n_train, n_val, batch)
    assert (r.alpha_init, r.fs_layer_start) == (alpha, start)
    assert (r.max_answer, r.seeds) == ({"arc": 8, "hotpotqa": 24}[task], tuple(range(len(d_acc))))
    assert (r.end_mark, r.arc_border) == (False, "log")
    assert (r.base, r.lr, r.weight_decay) == ("rwkv7-g1d-0.1b-20260129-ctx8192.pth", 3e-5, 0.01)
    assert (r.data_seed, r.validation_seed, r.facts) == (0, 1234, 0)
    assert (r.beta2, r.grad_clip, r.warm_up) == (0.999, 0, 0)
    assert (r.fs_norm, r.fs_detach, r.fs_clip, r.fs_scale) == (True, True, 1, 1)
    assert (r.fs_gate, r.alpha_lr) == ("scalar", 0)
    schedule = ("linear", 0.25, 1.0) if name in ("R9a", "R9b") else ("none", 1.0, 1.0)
    assert (r.fs_alpha_schedule, r.fs_alpha_min, r.fs_alpha_max) == schedule
    assert r.steps > 0 and r.steps % r.eval_every == 0    # the last evaluation is of the last step
    assert (log["mean"], log["std"], log["d_loss"], log["d_acc"]) == (mean, std, d_loss, d_acc)
    assert statistics.mean(d_acc) == pytest.approx(mean, abs=1.1e-4)
    assert statistics.pstdev(d_acc) == pytest.approx(std, abs=1.1e-4)
    assert log["script"].startswith("run_arc_" if task == "arc" else "run_hotpot_") and ".sh" in log["script"]
    assert ("_qfirst_" in log["script"]) == ("_qfirst_" in log["summary"]) == (first == "question")


@pytest.mark.parametrize("names, parents, changed", [
    ("R3 R5 R7 R12d R12b R14b S6 S9", "R2 R4 R6 R12c R12a R14a S1 S3", "order"),
    ("S22 S23 S24 S26", "S20 S21 S20 S21", "order"),
    ("S25 S27", "S20 S21", "order max_prompt"),
    ("S20", "S12", "end_mark"),
    ("S21", "S15", ""),
    ("R8 R11", "R6 R10", "alpha_init"),
    ("R9a R9b", "R2 R6", "fs_alpha_schedule fs_alpha_min"),
    ("R14a", "R12a", "batch_size"),
    ("R10 S1 S2 S4 S5 S7", "R6 R6 R6 R8 R9b R2", "fs_layer_start"),
    ("S3 S8 S10 S13", "S11 S14 S1 S7", "fs_detach"),
    ("S12 S15", "S3 S8", "fs_gate fs_clip"),
    ("S3 S8 S11 S14", "S10 S13 S1 S7", "alpha_init alpha_lr"),
])
def test_what_a_round_changes(names, parents, changed):
    """A round differs from the one it is compared with in the thing under study alone.
    Catches: a second difference, which would be taken for an effect of the first."""
    for name, parent in zip(names.split(), parents.split(), strict=True):
        assert differences(ROUNDS[name], ROUNDS[parent]) == set(changed.split()), name


def test_who_trains_an_end_mark_and_what_is_registered():
    """HotpotQA's rounds of the second edition train an end mark; the log's rounds and the stand-in do not.
    One comparison was registered: S20 on seeds 20 to 39.
    Catches: numbers of the log or of the stand-in that move, and a registration that a round inherits."""
    assert [name for name in ROUNDS if ROUNDS[name].end_mark] == ["S20", "S22", "S24", "S25"]
    assert not any(small.end_mark for small in MINIATURES.values())
    assert [name for name in ROUNDS if ROUNDS[name].primary or ROUNDS[name].registered] == ["S20"]
    assert MINIATURES["S20"].primary and MINIATURES["S20"].registered == tuple(range(20, 40))
    assert all(ROUNDS[f"S{number}"].seeds == tuple(range(20, 40)) for number in range(20, 28))


def test_what_the_stand_in_changes():
    """On the stand-in a round keeps its task, its order and its Future-Seed, and has the stand-in's lengths.
    Catches: a round on the stand-in that keeps a real length or rate, or that has another Future-Seed."""
    laid_over = set("base max_prompt min_prompt max_answer end_mark n_val batch_size micro_batch_size beta2 "
                    "lr facts checkpoint_activations steps eval_every grad_clip warm_up".split())
    assert list(MINIATURES) == list(ROUNDS)
    for name, small in MINIATURES.items():
        assert differences(ROUNDS[name], small) <= laid_over and small.log == ROUNDS[name].log
        assert (small.base, small.max_prompt, small.min_prompt, small.n_val) == ("stand-in", 256, 0, 512)
        assert (small.facts, small.lr, small.steps) == ({"arc": 5, "hotpotqa": 10}[small.task], 4e-3, 250)
        assert small.facts_hold + small.facts_ramp < small.steps    # the last steps are as hard as validation
    assert differences(MINIATURES["R4"], MINIATURES["R6"]) <= {"n_train"}


# ---- settings ----------------------------------------------------------------------------------------------

def test_settings_reach_future_seed():
    """A line of the log after --set gives the FutureSeed that it describes.
    Catches: a setting lost or renamed on its way, and one of the log's names that cannot be pasted."""
    config = Config(12, 16, 8, 50, 24, 3, 4, 5, 6)
    line = ("alpha_init=-4 fs_layer_start=6 fs_alpha_schedule=linear fs_alpha_min=0.25 fs_alpha_max=1.0 "
            "fs_norm=false fs_detach=false fs_clip=0.5 fs_scale=2 alpha_lr=0.1 fs_gate=head")
    built = fs.FutureSeed(config, **with_settings(ROUNDS["R2"], line.split()).fs_settings())
    assert [built.depth_factor[layer] for layer in (6, 8, 11)] == pytest.approx([0.25, 0.55, 1.0])
    assert (built.layer_start, built.norm, built.detach, built.gate) == (6, False, False, "head")
    assert (built.clip, built.scale, built.alpha.requires_grad) == (0.5, 2.0, True)
    assert (built.alpha == -4).all()
    assert not fs.FutureSeed(config, **ROUNDS["R2"].fs_settings()).alpha.requires_grad
    for key, known in (("fs_alpha_schedule", fs.SCHEDULES), ("fs_gate", fs.GATES)):
        assert set(SETTINGS[key].metadata["choices"]) == set(known)


def test_settings_are_plain_and_complete():
    """`settings()` holds, as JSON, every field of a round but those that do not decide a run.
    Catches: a setting that decides a run but is not recorded, so that a resumed run could be another."""
    values = ROUNDS["R8"].settings()
    assert json.loads(json.dumps(values)) == values
    fields = {field.name for field in dataclasses.fields(Round)}
    assert fields - set(values) == {"name", "title", "seeds", "primary", "registered", "inherits", "log"}
    assert set(values) < fields


def test_every_setting_has_a_line():
    """`--list` gives each setting a line with its default, its meaning and its bounds.
    Catches: a setting without a meaning, and a default or a bound that is told otherwise than it is."""
    lines = setting_lines()
    assert [line.partition("=")[0] for line in lines] == list(SETTINGS)
    assert "beta2=0.999                    of AdamW (0 or more, and below 1)" in lines
    assert "rehearsal=0.25" in "\n".join(lines) and "(0 to 1)" in "\n".join(lines)
    assert all(len(line.split()) >= 3 and "\n" not in line for line in lines)


# what is one step beyond each bound, and what stands on it
BEYOND = ["grad_clip=-1", "lr=-0.1", "rehearsal=7", "rehearsal=-0.1", "alpha_lr=-3", "weight_decay=-5",
          "beta2=1", "beta2=-0.1", "fs_clip=-1", "fs_scale=-1", "fs_gate_lr=-1", "fs_alpha_min=-1",
          "fs_alpha_max=-1", "warm_up=-1", "facts=33", "facts=-1", "facts_first=1", "facts_first=33",
          "facts_hold=-1", "facts_ramp=-1", "channels=0", "channels=24", "channels=-16",
          "micro_batch_size=-1", "fs_layer_start=-1", "data_seed=-1", "validation_seed=-1", "steps=-1",
          "min_prompt=-1", "n_val=1", "max_prompt=0", "max_answer=0", "n_train=0", "batch_size=0",
          "eval_every=0"]
ON_THE_BOUND = ["grad_clip=0.0", "lr=0.0", "rehearsal=1.0", "rehearsal=0.0", "alpha_lr=0.0", "beta2=0.0",
                "weight_decay=0.0", "fs_clip=0.0", "fs_scale=0.0", "facts=32", "facts=0", "facts_first=2",
                "channels=16", "n_val=2", "steps=0", "max_prompt=1", "alpha_init=-40.0", "warm_up=0"]
NO_NUMBERS = ["steps=2.0", "steps=true", "steps=[1]", "steps=two", "steps=", "lr=x", "lr=nan", "lr=inf",
              "lr=1e39", "alpha_init=nan", "alpha_init=-inf", "lr=true", "lr={}", "lr=1979-05-27",
              "lr=1" + 400 * "0", "steps=1" + 18 * "0", "steps=0x" + 5000 * "f",
              "lr=0x" + 5000 * "f", "steps=" + 5000 * "9"]
NO_SETTINGS = ["step=3", "=3", "name=R1", "log=1", "title=x", "primary=true", "registered=[1]", "inherits=R2",
               "seeds=[3, 4]"]
NO_CHOICES = ["order=up", "order=3", "task=squad", "task=own", "fs_gate=none", "fs_alpha_schedule=",
              "arc_border=none", "fs_norm=1", "fs_norm=True", "end_mark=yes", "base=../evil.pth", "base=..",
              "base=a b", "base="]


@pytest.mark.parametrize("pair", BEYOND + NO_NUMBERS + NO_SETTINGS + NO_CHOICES, ids=lambda pair: pair[:24])
def test_wrong_settings_get_one_line(pair):
    """A value that cannot be meant is refused in one line that names the setting and what it may be.
    Catches: a bound forgotten, as grad_clip=-1, which trains uphill; a message that does not say which."""
    with pytest.raises(ValueError) as caught:
        with_settings(ROUNDS["R8"], [pair])
    message, key = str(caught.value), pair.partition("=")[0]
    assert message.startswith(f"--set {key}=") and "\n" not in message
    if key in SETTINGS:
        assert f"{key} must be " in message


@pytest.mark.parametrize("pair", ON_THE_BOUND)
def test_a_value_on_its_bound_is_taken(pair):
    """Catches: a bound off by one, which would refuse what the documentation allows."""
    key, _, value = pair.partition("=")
    assert str(getattr(with_settings(ROUNDS["R8"], [pair]), key)) == value


@pytest.mark.parametrize("pairs, words", [
    (["steps", "20"], "--set steps: write key=value, as in --set steps=20 lr=1e-5"),
    (["steps=20", "lr", "1e-5"], "--set lr: write key=value"),
    (["seeds=[3, 4]"], "seeds are not a setting; write --seeds 0-9"),
    (["fs_norm=True"], "fs_norm must be true or false, not 'True'"),
    (["steps=20\nlr=1e-5"], "--set steps=20 lr=1e-5: write key=value"),
    (["lr=1e-5,steps=3"], "lr must be a number, not '1e-5,steps=3'"),
    (["n_val=1"], "n_val must be 2 or more, not 1"),
    (["beta2=1"], "beta2 must be 0 or more, and below 1, not 1.0"),
    (["channels=17"], "channels must be a multiple of 16 from 16 to 4096, not 17"),
    (["base=weights/own.pth"], "--base takes a path"),
])
def test_what_to_write_instead(pairs, words):
    """A message says what to type. Catches: Python's words, as "steps must be int, not None"."""
    with pytest.raises(ValueError, match=re.escape(words)):
        with_settings(ROUNDS["R8"], pairs)


@pytest.mark.parametrize("pair, value", [
    ("steps= 1_000", 1000), ("lr=1", 1.0), ("lr=1e-3", 1e-3), ("fs_norm=false", False),
    ("base=a.pth", "a.pth"), ("order=twice", "twice"), ('order="twice"', "twice"),
    ("arc_border=token", "token"),
])
def test_set(pair, value):
    """A pair changes its setting, to a value of the setting's type, and nothing else.
    Catches: a string that needs quotes, a whole number left in a float, a change beside it."""
    key, before = pair.partition("=")[0], ROUNDS["R8"]
    changed = with_settings(before, ["steps=3", pair])
    assert getattr(changed, key) == value and type(getattr(changed, key)) is type(value)
    assert dataclasses.replace(changed, **{key: getattr(before, key), "steps": before.steps}) == before


@settings(deadline=None, max_examples=200)
@given(key=st.sampled_from([*SETTINGS, "nope"]),
       text=st.text(max_size=12) | st.sampled_from(["1e999", "[[1]]", "''", '"""', "[" * 5000, "9" * 5000]))
def test_set_with_any_text(key, text):
    """There are two ways out: a round of sound types, or a ValueError. Catches: a traceback."""
    try:
        value = getattr(with_settings(ROUNDS["R8"], [f"{key}={text}"]), key)
    except ValueError:
        return
    assert type(value) is SETTINGS[key].type


@pytest.mark.parametrize("changes, words", [
    (dict(min_prompt=513), "min_prompt = 513 is more than max_prompt = 512"),
    (dict(facts=3, facts_first=4), "facts = 3 is less than facts_first = 4"),
    (dict(min_prompt=512), None), (dict(facts=4, facts_first=4), None), (dict(facts=0, facts_first=4), None),
])
def test_settings_that_contradict_each_other(changes, words):
    """Catches: a round that would leave no prompt, told only after minutes of reading records."""
    recipe = dataclasses.replace(ROUNDS["R2"], **changes)
    if words is None:
        check_together(recipe, "here")
    else:
        with pytest.raises(ValueError, match=f"^here: {words}"):
            check_together(recipe, "here")


# ---- names and seeds as people write them ------------------------------------------------------------------

def test_expand():
    """Catches: R9 that runs one part, a round run twice, R1 that runs R10, an unknown name passed on."""
    assert expand(["r8"], ROUNDS) == ["R8"] and expand(["R9", "r9A", "R9"], ROUNDS) == ["R9a", "R9b"]
    assert expand(["R12", "s1"], ROUNDS) == ["R12a", "R12b", "R12c", "R12d", "S1"]
    for name in ("R1", "standin", "", "R", "R.", "R9c"):
        with pytest.raises(ValueError, match=f"no round is called '{name}'; the rounds are R2, R3"):
            expand([name], ROUNDS)


@given(parts=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=5))
def test_seeds_are_read_as_written(parts):
    """Every range has both its ends, and every seed comes once. Catches: a seed left out or run twice."""
    text = ",".join(f"{first}-{first + more}" if more else f"{first}" for first, more in parts)
    wanted = [seed for first, more in parts for seed in range(first, first + more + 1)]
    assert seeds_of(text) == list(dict.fromkeys(wanted))


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "3-1", "1-2-3", "0:9", "1.5", "0-99999", "9" * 5000,
                                  "\u0663"])
def test_wrong_seeds_get_one_line(text):
    """Catches: a traceback, and a typing error that would start a hundred thousand runs."""
    with pytest.raises(ValueError, match=f"--seeds {text}"):
        seeds_of(text)


# ---- rounds files ------------------------------------------------------------------------------------------

GOOD = "[Q]\ntitle = 't'\ntask = 'arc'\norder = 'twice'\nsteps = 10\nlr = 5\n"
LOG_OF_Q = ("[Q.log]\nscript = ''\nsummary = 's'\nd_acc = [0.5]\nmean = 0.5\nstd = 0\nd_loss = 0\n"
            "status = ''\n")


def test_inheritance(tmp_path):
    """A round has what it says, else what its parent has, else the default; log, primary and registered are
    its own. Catches: a grandparent that wins, an inherited log, whole numbers that stay integers."""
    path = tmp_path / "rounds.toml"
    path.write_text(f"\ufeff{GOOD}primary = true\nregistered = [1, 2]\nseeds = [7]\n{LOG_OF_Q}"
                    "[A]\ninherits = 'Q'\nsteps = 20\n[B]\ninherits = 'A'\nn_val = 9\n"
                    "[standin]\nn_val = 7\nlr = 1\n[standin.arc]\nlr = 2\n[standin.hotpotqa]\nlr = 3\n",
                    encoding="utf-8")
    found, small = load_rounds(path)
    q, a, b = found.values()
    assert (q.steps, q.n_val, q.lr) == (10, 200, 5.0)
    assert (a.steps, a.n_val, a.lr) == (20, 200, 5.0)
    assert (b.steps, b.n_val, b.lr) == (20, 9, 5.0) and type(b.lr) is float
    assert (q.inherits, a.inherits, b.inherits) == (None, "Q", "A")
    assert (q.primary, q.registered, q.log["d_acc"]) == (True, (1, 2), [0.5])
    assert (b.primary, b.registered, b.log, b.seeds, b.title) == (False, (), None, (7,), "t")
    assert [(r.steps, r.n_val, r.lr) for r in small.values()] == [(10, 7, 2.0), (20, 7, 2.0), (20, 7, 2.0)]


def test_the_head_of_rounds_toml_has_an_example_that_runs(tmp_path):
    """The example of an own round, taken out of the comment and added to the file, is a round as it says.
    Catches: an example that a reader copies and that does not load."""
    text = rounds.ROUNDS_FILE.read_text(encoding="utf-8")
    head = text.partition("\n\n# These settings")[0]
    example = "\n".join(line[1:] for line in head.splitlines() if line.startswith("#     "))
    path = tmp_path / "rounds.toml"
    path.write_text(text + "\n" + textwrap.dedent(example), encoding="utf-8")
    found, small = load_rounds(path)
    assert list(found) == [*ROUNDS, "MINE"] and expand(["mine"], found) == ["MINE"]
    assert differences(found["MINE"], ROUNDS["S20"]) == {"alpha_init"} and found["MINE"].alpha_init == -4.0
    assert not found["MINE"].primary and found["MINE"].inherits == "S20"
    assert "--round MINE" in head


@pytest.mark.parametrize("text, words", [
    # settings
    ("n_val = -3", r"\[Q\]: n_val must be 2 or more, not -3"),
    ("fs_gate = 'x'", r"\[Q\]: fs_gate must be one of scalar, head, heads, input, not 'x'"),
    ("fs_norm = 1", r"\[Q\]: fs_norm must be true or false, not 1"),
    ("beta2 = nan", r"\[Q\]: beta2 must be a number, not nan"),
    ("min_prompt = 600", r"\[Q\]: min_prompt = 600 is more than max_prompt = 512"),
    ("base = '/etc/x.pth'", r"\[Q\]: base must be the name of a published file"),
    ("stepz = 3", r"\[Q\]: no setting is called 'stepz'; the settings are task, order"),
    ("name = 'P'", r"\[Q\]: no setting is called 'name'"),
    ("x.y = 1", r"\[Q\]: no setting is called 'x'"),
    # what a round says about itself
    ("seeds = [1, 'two']", r"\[Q\]: seeds must be a list of whole numbers from 0 on, not \[1, 'two'\]"),
    ("seeds = 3", r"\[Q\]: seeds must be a list, not 3"),
    ("seeds = []", r"\[Q\]: seeds must name a seed"),
    ("seeds = [-1]", r"\[Q\]: seeds must be a list of whole numbers from 0 on"),
    ("seeds = [1000000000000000000]", r"\[Q\]: seeds must be a list of whole numbers from 0 on"),
    ("registered = [2, 2]", r"\[Q\]: registered names a seed twice: \[2, 2\]"),
    ("primary = 1", r"\[Q\]: primary must be true or false, not 1"),
    ("[R]\ninherits = 'Q'\ntitle = 5", r"\[R\]: title must be a text, not 5"),
    # inheritance and names
    ("[R]\ninherits = 'P'", r"\[R\]: inherits = 'P': no round above has this name"),
    ("[R]\ninherits = 'R'", r"\[R\]: inherits = 'R': no round above"),
    ("[R]\ninherits = ['Q']", r"\[R\]: inherits = \['Q'\]: no round above"),
    ("[R]\nsteps = 3", r"\[R\]: title is missing, and so is inherits"),
    ("[R]\ntitle = 't'\norder = 'twice'", r"\[R\]: task is missing, and so is inherits"),
    ("[[R]]\nsteps = 3", r"\[R\]: must be a table"),
    ("['../../evil/x']\ninherits = 'Q'", r"a round's name may hold letters.* not '../../evil/x'"),
    ('["a\\nb"]\ninherits = "Q"', r"a round's name may hold letters.* not 'a\\nb'"),
    ("['']\ninherits = 'Q'", "a round's name may hold letters.* not ''"),
    ("['Ω']\ninherits = 'Q'", "a round's name may hold letters.* not 'Ω'"),
    # the log
    ("log = 5", r"\[Q\], log: must be a table, not 5"),
    (LOG_OF_Q.replace("std = 0\n", ""), r"\[Q\], log: std is missing"),
    (LOG_OF_Q.replace("std = 0", "std = '0'"), r"\[Q\], log: std must be a number, not '0'"),
    (LOG_OF_Q.replace("mean = 0.5", "mean = inf"), r"\[Q\], log: mean must be a number, not inf"),
    (LOG_OF_Q.replace("[0.5]", "[]"), r"\[Q\], log: d_acc must be numbers, one a seed, not \[\]"),
    (LOG_OF_Q.replace("[0.5]", "[true]"), r"\[Q\], log: d_acc must be numbers, one a seed"),
    (LOG_OF_Q.replace("'s'", "'../s'"), r"\[Q\], log: summary must be a file's name, not '../s'"),
    (LOG_OF_Q.replace("'s'", "'..'"), r"\[Q\], log: summary must be a file's name, not '..'"),
    (LOG_OF_Q + "stds = 1", r"\[Q\], log: 'stds' is not among script"),
    # the stand-in
    ("[standin]\nspeed = 1", r"\[standin\]: no setting is called 'speed'"),
    ("[standin]\nn_val = 0", r"\[standin\]: n_val must be 2 or more"),
    ("[standin.arc]\nlr = 'x'", r"\[standin.arc\]: lr must be a number"),
    ("[standin]\narc = 5", r"\[standin.arc\]: must be a table, not 5"),
    ('[standin]\ntask = "arc"', "a round keeps its task on the stand-in"),
    ('[standin.hotpotqa]\norder = "twice"', "a round keeps its order on the stand-in"),
    ("[own]\ntitle = 5", "no round may be called own"),
    ("[standin.arc]\nfacts = 3\nfacts_first = 4", r"\[Q\] on the stand-in: facts = 3 is less"),
    ("[[standin]]\nn_val = 9", r"\[standin\]: must be a table"),
    # no TOML
    ("n_val = ", "not a TOML file"), ("steps = 1", "not a TOML file"), ("base = '\ud800'", "not a TOML file"),
    ("n_val = 0x" + 5000 * "f", r"\[Q\]: n_val must be less than 1.*, not a number of thousands of digits"),
    ("n_val = " + 5000 * "9", "not a TOML file"), ("n_val = " + 5000 * "[", "not a TOML file"),
], ids=lambda text: repr(text)[:40])
def test_a_wrong_file_gets_one_line(tmp_path, text, words):
    """A wrong file is refused when it is read, in one line that names file, round and key.
    Catches: a fault that is found only after both arms are trained; a round whose name is a path."""
    path = tmp_path / "rounds.toml"
    path.write_bytes((GOOD + text).encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=words) as caught:
        load_rounds(path)
    assert str(caught.value).startswith(f"{path}") and "\n" not in str(caught.value)


def as_toml(value) -> str:
    """A JSON-like value as TOML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(part) for part in value) + "]"
    if type(value) is float and not math.isfinite(value):
        return str(value)
    return json.dumps(value)


SMALL_FILE = {
    "standin": {"base": "stand-in", "steps": 5, "arc": {"facts": 5}, "hotpotqa": {"lr": 0.1}},
    "Q": {"title": "t", "task": "arc", "order": "twice", "seeds": [0, 1], "primary": True, "registered": [3],
          "lr": 0.5, "end_mark": True,
          "log": {"script": "a.sh", "summary": "s.txt", "d_acc": [0.5, -1], "mean": 0.1, "std": 0.0,
                  "d_loss": 0.0, "status": "good"}},
    "R": {"inherits": "Q", "steps": 20, "arc_border": "token"},
}
LEAVES = (st.booleans() | st.integers() | st.integers(10**18, 10**200) | st.floats() | st.text(max_size=6)
          | st.sampled_from(["Q", "arc", "twice", "log", "../x"]))
KEYS = st.sampled_from(["log", "seeds", "title", "steps", "inherits", "arc", "d_acc"]) | st.text(max_size=4)
VALUES = st.recursive(LEAVES, max_leaves=8, extend=lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)))


def variants(table, junk):
    """The table with junk in place of one of its parts, for every part, however deep; with a key more; and
    with a key less."""
    yield junk
    if isinstance(table, dict):
        yield table | {"nope": junk}
        for key in table:
            yield {name: part for name, part in table.items() if name != key}
            for part in variants(table[key], junk):
                yield table | {key: part}
    elif isinstance(table, list):
        for i in range(len(table)):
            yield table[:i] + [junk] + table[i + 1:]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=VALUES)
def test_any_value_in_any_place_is_read_or_refused(tmp_path, junk):
    """Whatever stands in whatever place: the rounds that are read are sound, or one line names the file.
    Catches: KeyError, TypeError, AttributeError or Python's own words for a shape that nobody foresaw."""
    path = tmp_path / "rounds.toml"
    for table in variants(SMALL_FILE, junk):
        if not isinstance(table, dict):
            continue
        text = "\n".join(f"{json.dumps(name)} = {as_toml(part)}" for name, part in table.items())
        path.write_text(text, encoding="utf-8")
        try:
            found, small = load_rounds(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}") and "\n" not in str(error)
            continue
        for recipe in [*found.values(), *small.values()]:
            assert all(type(getattr(recipe, key)) is field.type for key, field in SETTINGS.items())
            assert re.fullmatch(r"[\w-]+", recipe.name, re.ASCII) and type(recipe.title) is str
            assert all(type(seed) is int and seed >= 0 for seed in recipe.seeds + recipe.registered)
            assert recipe.log is None or math.isfinite(sum(recipe.log["d_acc"]))


def test_a_missing_file(tmp_path):
    """Catches: an empty list of rounds where the file is not there."""
    with pytest.raises(OSError):
        load_rounds(tmp_path / "none.toml")
