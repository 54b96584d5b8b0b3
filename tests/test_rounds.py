"""rounds.toml against the experiment log, number by number, and rounds.py against wrong files and settings.

The tables below repeat the log on purpose: they are the second pair of eyes, and nothing computes them.
"""

import dataclasses
import json
import statistics

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fs
from model import Config
from rounds import CHOICES, SETTINGS, Round, expand, load_rounds, miniature, seeds_of, with_settings

ROUNDS = load_rounds()

# round: task, order, max and min prompt, answer, n_train, n_val, batch, alpha, start, schedule, lo, hi, seeds
RECIPES = {
    "R2": ("arc", "context_first", 512, 0, 8, 1000, 200, 8, -2.0, 6, "none", 1.0, 1.0, (0, 1, 2)),
    "R3": ("arc", "question_first", 512, 0, 8, 1000, 200, 8, -2.0, 6, "none", 1.0, 1.0, (0, 1, 2)),
    "R4": ("hotpotqa", "context_first", 2048, 1024, 24, 2048, 512, 2, -2.0, 6, "none", 1.0, 1.0, (0, 1, 2)),
    "R5": ("hotpotqa", "question_first", 2048, 1024, 24, 2048, 512, 2, -2.0, 6, "none", 1.0, 1.0, (0, 1, 2)),
    "R6": ("hotpotqa", "context_first", 4096, 1536, 24, 1000, 200, 1, -2.0, 6, "none", 1.0, 1.0, (0, 1, 2)),
    "R7": ("hotpotqa", "question_first", 4096, 1536, 24, 1000, 200, 1, -2.0, 6, "none", 1.0, 1.0, (0,)),
    "R8": ("hotpotqa", "context_first", 4096, 1536, 24, 1000, 200, 1, -4.0, 6, "none", 1.0, 1.0, (0, 1, 2)),
    "R9a": ("arc", "context_first", 512, 0, 8, 1000, 200, 8, -2.0, 6, "linear", 0.25, 1.0, (0, 1, 2)),
    "R9b": ("hotpotqa", "context_first", 4096, 1536, 24, 1000, 200, 1, -2.0, 6, "linear", 0.25, 1.0,
            (0, 1, 2)),
    "R10": ("hotpotqa", "context_first", 4096, 1536, 24, 1000, 200, 1, -2.0, 10, "none", 1.0, 1.0, (0, 1, 2)),
}

# round: mean d_acc, its population standard deviation, d_acc of each seed, d_loss
LOGGED = {
    "R2": (0.0339, 0.0205, (0.0156, 0.0234, 0.0625), -0.0182),
    "R3": (-0.0052, 0.0097, (-0.0156, 0.0078, -0.0078), 0.0003),
    "R4": (-0.0027, 0.0171, (0.0084, 0.0104, -0.0269), -0.1287),
    "R5": (-0.0090, 0.0085, (-0.0104, 0.0021, -0.0186), -0.0844),
    "R6": (0.0012, 0.0388, (0.0382, 0.0179, -0.0525), -0.0192),
    "R7": (0.0025, 0.0, (0.0025,), 0.0873),
    "R8": (-0.0056, 0.0519, (0.0141, 0.0458, -0.0766), -0.2070),
    "R9a": (0.0156, 0.0292, (0.0078, 0.0547, -0.0156), 0.0295),
    "R9b": (-0.0220, 0.0378, (0.0250, -0.0234, -0.0676), -0.0188),
    "R10": (-0.0225, 0.0435, (0.0141, 0.0021, -0.0837), -0.1906),
}

# round: script, summary, first word of its status
NAMES = {
    "R2": ("run_arc_stabilized_round2.sh", "_summary_arc_optionsfirst_stabilized_r2.txt", "success"),
    "R3": ("run_arc_qfirst_stabilized_round3.sh", "_summary_arc_qfirst_stabilized_r3.txt", "control"),
    "R4": ("run_hotpot_qafter_stabilized_round4_s0.sh + _s12.sh",
           "_summary_hotpot_qafter_stabilized_r4_s012.txt", "mixed"),
    "R5": ("run_hotpot_qfirst_stabilized_round5_s012.sh",
           "_summary_hotpot_qfirst_stabilized_r5_s012.txt", "negative"),
    "R6": ("run_hotpot_qafter_stabilized_len4096_round6_s0.sh + _s12.sh",
           "_summary_hotpot_qafter_stabilized_len4096_r6_s012.txt", "slight"),
    "R7": ("run_hotpot_qfirst_stabilized_len4096_round7_s0.sh",
           "_summary_hotpot_qfirst_stabilized_len4096_r7_s0.txt", "inconclusive"),
    "R8": ("run_hotpot_qafter_stabilized_len4096_round8_alpha_m4_s012.sh",
           "_summary_hotpot_qafter_stabilized_len4096_r8_alpha_m4_s012.txt", "failure"),
    "R9a": ("run_arc_optionsfirst_stabilized_round4_sched_linear.sh",
            "_summary_arc_optionsfirst_stabilized_r4_sched_linear.txt", "mixed"),
    "R9b": ("run_hotpot_qafter_stabilized_len4096_round9_sched_linear_s012.sh",
            "_summary_hotpot_qafter_stabilized_len4096_r9_sched_linear_s012.txt", "failed"),
    "R10": ("run_hotpot_qafter_stabilized_len4096_round10_lstart10_s012.sh",
            "_summary_hotpot_qafter_stabilized_len4096_r10_lstart10_s012.txt", "pending"),
}


def differences(one: str, two: str) -> set[str]:
    names = set(SETTINGS) - {"title"}
    return {name for name in names if getattr(ROUNDS[one], name) != getattr(ROUNDS[two], name)}


def test_every_round_of_the_log_is_there():
    """Catches a round that was forgotten or renamed, and a part of R9 listed as a round of its own."""
    logged = [name for name in ROUNDS if name.startswith("R")]
    assert logged == list(RECIPES) == list(LOGGED) == list(NAMES)
    assert all((round.log is not None) == (name in logged) for name, round in ROUNDS.items())
    assert all(round.name == name for name, round in ROUNDS.items())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    """Catches any digit of a recipe that was mistyped or that inheritance brings from the wrong round."""
    r = ROUNDS[name]
    assert RECIPES[name] == (
        r.task, r.order, r.max_prompt, r.min_prompt, r.max_answer, r.n_train, r.n_val, r.batch_size,
        r.fs_alpha, r.fs_layer_start, r.fs_schedule, r.fs_schedule_min, r.fs_schedule_max, r.seeds,
    )
    assert r.base == "rwkv7-g1d-0.1b-20260129-ctx8192.pth"
    assert (r.lr, r.weight_decay, r.data_seed, r.validation_seed) == (3e-5, 0.01, 0, 1234)
    assert (r.fs_norm, r.fs_detach, r.fs_clip, r.fs_scale, r.fs_alpha_lr) == (True, True, 1.0, 1.0, 0.0)
    assert (r.fs_gate, r.fs_gate_lr) == ("scalar", 1e-3)
    assert r.steps > 0 and r.steps % r.eval_every == 0    # the last evaluation is of the last step


@pytest.mark.parametrize("name", LOGGED)
def test_log(name):
    """Catches a digit of the log's results mistyped; the mean and spread must also follow from the seeds."""
    log = ROUNDS[name].log
    assert (log.mean, log.std, log.d_acc, log.d_loss) == LOGGED[name]
    assert (log.script, log.summary, log.status.split()[0]) == NAMES[name]
    assert statistics.mean(log.d_acc) == pytest.approx(log.mean, abs=1.1e-4)
    assert statistics.pstdev(log.d_acc) == pytest.approx(log.std, abs=1.1e-4)
    assert len(log.d_acc) == len(ROUNDS[name].seeds)


def test_what_a_round_changes():
    """Catches a control that differs from its round in more than the thing it controls for."""
    assert differences("R3", "R2") == {"order"}
    assert differences("R5", "R4") == {"order"}
    assert differences("R7", "R6") == {"order", "seeds"}
    assert differences("R8", "R6") == {"fs_alpha"}
    assert differences("R9a", "R2") == {"fs_schedule", "fs_schedule_min"}
    assert differences("R9b", "R6") == {"fs_schedule", "fs_schedule_min"}
    assert differences("R10", "R6") == {"fs_layer_start"}


def test_settings_build_future_seed():
    """Catches a setting that is lost or renamed between rounds.toml and fs.FutureSeed."""
    config = Config(12, 16, 8, 50, 24, 3, 4, 5, 6)
    built = fs.FutureSeed(config, **ROUNDS["R9b"].fs_settings())
    assert [built.depth_factor[layer] for layer in (6, 8, 11)] == pytest.approx([0.25, 0.55, 1.0])
    assert (built.layer_start, built.norm, built.detach) == (6, True, True)
    assert (built.clip, built.scale, built.gate) == (1.0, 1.0, "scalar")
    assert not built.alpha.requires_grad and (built.alpha == -2).all()
    changed = with_settings(ROUNDS["R8"], [
        "fs_alpha_lr=0.1", "fs_norm=false", "fs_detach=false", "fs_clip=0.5", "fs_scale=2", "fs_gate=head",
        "fs_layer_start=3",
    ])
    built = fs.FutureSeed(config, **changed.fs_settings())
    assert (built.layer_start, built.norm, built.detach) == (3, False, False)
    assert (built.clip, built.scale, built.gate) == (0.5, 2.0, "head")
    assert built.alpha.requires_grad and (built.alpha == -4).all()
    assert set(CHOICES["fs_schedule"]) == set(fs.SCHEDULES) and set(CHOICES["fs_gate"]) == set(fs.GATES)


def test_settings_are_plain_and_complete():
    """Catches a setting that decides a run but is not recorded: a resumed run could be another."""
    values = ROUNDS["R8"].settings()
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {field.name for field in dataclasses.fields(Round)} - {"log", "seeds", "title"}


def test_expand():
    """Catches R9 that runs one of its parts, a round run twice, and an unknown name passed on."""
    assert expand(["R9"]) == ["R9a", "R9b"]
    assert expand(["R2", "R9", "R9a", "R2"]) == ["R2", "R9a", "R9b"]
    for name in ("R1", "r2", "defaults", ""):
        with pytest.raises(ValueError, match="no round is called") as caught:
            expand([name])
        assert "R8" in str(caught.value) and "defaults" not in str(caught.value).split(";")[1]


def test_what_the_stand_in_changes():
    """Catches a miniature that forgets the round's task, order or Future-Seed, or keeps a real length."""
    kept = {"name", "title", "seeds", "task", "order", "data_seed", "validation_seed", "weight_decay",
            "micro_batch_size", "min_prompt", "log", "facts_first"}
    for round in ROUNDS.values():
        small = miniature(round)
        same = {name for name in (*SETTINGS, "name", "log") if getattr(round, name) == getattr(small, name)}
        assert kept - {"min_prompt"} | {name for name in SETTINGS if name.startswith("fs_")} <= same
        assert round.facts == 0 and small.facts == {"arc": 5, "hotpotqa": 10}[round.task]
        assert small.max_prompt == 128 and small.min_prompt == 0 and small.base == "standin"
        assert small.facts_hold + small.facts_ramp < small.steps    # the last steps are as hard as validation


def test_what_the_new_rounds_change():
    """Catches an S round that differs from the log's round in more than it says."""
    assert differences("S1", "R6") == differences("S2", "R6") == {"fs_layer_start"}
    for new, old in (("S4", "R8"), ("S5", "R9b"), ("S7", "R2")):
        assert differences(new, old) == {"fs_layer_start"}
    assert differences("S3", "S1") == differences("S8", "S7") == {"fs_alpha", "fs_alpha_lr", "fs_detach"}
    assert differences("S3", "S10") == differences("S11", "S1") == {"fs_alpha", "fs_alpha_lr"}
    assert differences("S3", "S11") == differences("S10", "S1") == {"fs_detach"}
    assert differences("S6", "S1") == differences("S9", "S3") == {"order"}
    starts = {name: round.fs_layer_start for name, round in ROUNDS.items() if name.startswith("S")}
    assert starts == {f"S{number}": 3 if number == 2 else 1 for number in range(1, 12)}
    trained = {name for name, round in ROUNDS.items() if round.fs_settings()["train_alpha"]}
    assert trained == {"S3", "S8", "S9", "S11"}


@pytest.mark.parametrize("text, words", [
    ("[standin]\nlr = 'x'", "must be of type float"), ("[standin]\nfacts = 1000", "24 or less"),
    ("[standin]\nspeed = 1", "no setting is called 'speed'"), ("[standin.arc]\nn = 1", "no setting"),
    ("standin = 1", "stands outside"),
])
def test_errors_of_the_stand_in(tmp_path, text, words):
    """Catches a miniature with a setting that means nothing, or a value of the wrong type."""
    (tmp_path / "rounds.toml").write_text(text)
    with pytest.raises(ValueError, match=words):
        miniature(ROUNDS["R2"], tmp_path / "rounds.toml")
    with pytest.raises(ValueError, match="no round is called"):
        expand(["standin"])


# ---- --set -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair, key, value", [
    ("steps=2", "steps", 2), ("steps=1_000", "steps", 1000), ("lr=1", "lr", 1.0), ("lr=1e-3", "lr", 1e-3),
    ("fs_norm=false", "fs_norm", False), ("order=question_first", "order", "question_first"),
    ('order="question_first"', "order", "question_first"), ("seeds=[3, 4]", "seeds", (3, 4)),
    ("fs_alpha=-3", "fs_alpha", -3.0), ("title=a = b", "title", "a = b"),
    ("base=my model.pth", "base", "my model.pth"),
    ("min_prompt=0", "min_prompt", 0), ("steps= 5", "steps", 5),
])
def test_set(pair, key, value):
    """Catches a value of another type than the file's, a string that needs quotes, a lost setting."""
    changed = with_settings(ROUNDS["R8"], [pair])
    assert getattr(changed, key) == value and type(getattr(changed, key)) is type(value)
    assert dataclasses.replace(changed, **{key: getattr(ROUNDS["R8"], key)}) == ROUNDS["R8"]    # nothing else


def test_set_several():
    """Catches pairs that overwrite one another's effect, and a change of the round that was passed in."""
    before = dataclasses.replace(ROUNDS["R8"])
    changed = with_settings(ROUNDS["R8"], ["steps=2", "n_train=8", "n_val=4", "steps=3"])
    assert (changed.steps, changed.n_train, changed.n_val) == (3, 8, 4)
    assert ROUNDS["R8"] == before and with_settings(before, []) == before


@pytest.mark.parametrize("pair", [
    "steps", "step=3", "=3", "steps=", "steps=two", "steps=2.0", "steps=true", "steps=-1", "steps=[1]",
    "lr=fast", "lr=nan", "lr=inf", "lr=-1e-5", "lr=true", "order=backwards", "order=3", "fs_norm=1",
    "fs_norm=True", "seeds=3", "seeds=[]", "seeds=[0.5]", "name=R1", "log=1", "n_train=0", "batch_size=0",
    "max_answer=0", "fs_clip=-1", "fs_layer_start=-1", "fs_layer_start=1.5", "task=squad", "fs_gate=none",
    "fs_schedule=", "eval_every=0", "max_prompt=0", "lr=1979-05-27", "lr={}", "lr=1" + 400 * "0",
    "fs_alpha=nan", "weight_decay=-1",
])
def test_set_errors(pair):
    """Catches a wrong key, type or range that passes, or a message that is not one line with the pair."""
    with pytest.raises(ValueError) as caught:
        with_settings(ROUNDS["R8"], [pair])
    message = str(caught.value)
    assert pair in message and "\n" not in message


@settings(deadline=None, max_examples=200)
@given(key=st.sampled_from([*SETTINGS, "nope"]),
       text=st.text(max_size=12) | st.sampled_from(["1e999", "[[1]]", "0x10", "''", '"""']))
def test_set_with_any_text(key, text):
    """Catches any way out but two: a round of sound types, or a ValueError."""
    try:
        changed = with_settings(ROUNDS["R8"], [f"{key}={text}"])
    except ValueError:
        return
    value = getattr(changed, key)
    assert isinstance(value, tuple) if key == "seeds" else type(value) is SETTINGS[key]


# ---- files that are wrong ----------------------------------------------------------------------------------

# every setting there is, as [defaults]: R2's values, written as TOML
GOOD = "[defaults]\n" + "".join(f"{key} = {json.dumps(getattr(ROUNDS['R2'], key))}\n" for key in SETTINGS)
LOG = 'script = "s"\nsummary = "y"\nd_acc = [0.5]\nmean = 0.5\nstd = 0\nd_loss = 0\nstatus = "x"\n'


def written(tmp_path, text: str):
    path = tmp_path / "rounds.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_inheritance(tmp_path):
    """Catches a grandparent that wins over a parent, an inherited log, whole numbers that stay integers."""
    path = written(tmp_path, GOOD + f"""
[A]
steps = 10
lr = 5
[A.log]
{LOG}
[B]
inherits = "A"
steps = 20
[C]
inherits = "B"
n_val = 9
[both]
parts = ["A", "C"]
""")
    rounds = load_rounds(path)
    assert list(rounds) == ["A", "B", "C"] and expand(["both"], path) == ["A", "C"]
    assert [rounds[name].steps for name in "ABC"] == [10, 20, 20]
    assert [rounds[name].lr for name in "ABC"] == [5.0, 5.0, 5.0] and type(rounds["C"].lr) is float
    assert [rounds[name].n_val for name in "ABC"] == [200, 200, 9]
    assert rounds["A"].log.d_acc == (0.5,) and rounds["B"].log is None and rounds["C"].log is None


@pytest.mark.parametrize("text, words", [
    ("[R]\nstepz = 3", ["[R]", "'stepz'", "steps"]),
    ("[R]\nsteps = 3.5", ["[R]", "steps", "int", "3.5"]),
    ("[R]\nsteps = true", ["[R]", "steps", "True"]),
    ("[R]\nfs_norm = 1", ["[R]", "fs_norm", "bool"]),
    ("[R]\ntask = 'squad'", ["[R]", "task", "arc", "squad"]),
    ("[R]\nlr = -1.0", ["[R]", "lr", "-1.0"]),
    ("[R]\nlr = nan", ["[R]", "lr", "nan"]),
    ("[R]\nlr = inf", ["[R]", "lr", "inf"]),
    ("[R]\nbatch_size = 0", ["[R]", "batch_size", "1 or more"]),
    ("[R]\nseeds = []", ["[R]", "seeds"]),
    ("[R]\nseeds = [1, 'two']", ["[R]", "seeds", "two"]),
    ("[R]\nname = 'Q'", ["[R]", "name"]),
    ("[R]\ninherits = 'Q'", ["[R]", "'Q'"]),
    ("[R]\ninherits = 'R'", ["R inherits from R", "circle"]),
    ("[Q]\ninherits = 'R'\n[R]\ninherits = 'Q'", ["inherits from", "circle"]),
    ("[P]\nparts = ['R']\n[R]\ninherits = 'P'", ["[R]", "'P'"]),
    ("[R]\ninherits = 5", ["[R]", "5"]),
    ("[Q]\n[R]\ninherits = ['Q']", ["[R]", "Q"]),
    ("[R]\ninherits = {a = 1}", ["[R]", "inherits"]),
    ("[R]\nlr = 1" + 400 * "0", ["[R]", "lr"]),
    ("[Q]\n[P]\nparts = ['Q', 'nope']", ["[P]", "nope"]),
    ("[Q]\n[P]\nparts = 'Q'", ["[P]", "parts"]),
    ("[Q]\n[P]\nparts = 5", ["[P]", "parts"]),
    ("[Q]\n[P]\nparts = []", ["[P]", "parts"]),
    ("[Q]\n[P]\nparts = ['Q']\nsteps = 3", ["[P]", "steps"]),
    ("[Q]\n[P]\nparts = [['Q']]", ["[P]", "parts"]),
    ("[R]\nlog = 3", ["[R]", "log"]),
    ("[R.log]\nscript = 's'", ["[R]", "log", "summary"]),
    ("[R.log]\n" + LOG + "more = 1", ["[R]", "log"]),
    ("[R.log]\n" + LOG.replace("[0.5]", "0.5"), ["[R]", "d_acc"]),
    ("[R.log]\n" + LOG.replace("std = 0", "std = 'small'"), ["[R]", "std"]),
    ("[[R]]\nsteps = 3", ["R", "[defaults]"]),
    ("[R]\nsteps = ", ["TOML"]),
    ("[R]\nsteps = 1\nsteps = 2", ["TOML"]),
])
def test_file_errors(tmp_path, text, words):
    """Catches a wrong file that loads, or a message that does not name file, round and fault."""
    path = written(tmp_path, GOOD + text)
    with pytest.raises(ValueError) as caught:
        load_rounds(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("key", SETTINGS)
def test_setting_that_nothing_sets(tmp_path, key):
    """Catches a setting that quietly falls back to something when neither a round nor [defaults] has it."""
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(f"{key} ="))
    with pytest.raises(ValueError, match=f": {key} not set"):
        load_rounds(written(tmp_path, text + "\n[R]\n"))
    assert load_rounds(written(tmp_path, GOOD + "\n[R]\n")).keys() == {"R"}


def test_setting_outside_of_a_table(tmp_path):
    """Catches a stray line above the first heading, which TOML makes a key of the whole file."""
    with pytest.raises(ValueError, match="steps = 3 stands outside"):
        load_rounds(written(tmp_path, "steps = 3\n" + GOOD))


def test_unreadable_file(tmp_path):
    """Catches a traceback for a missing file, or one that is not UTF-8."""
    with pytest.raises(OSError):
        load_rounds(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"title = '\xe9'")
    with pytest.raises(ValueError, match="latin.toml"):
        load_rounds(tmp_path / "latin.toml")


VALUES = ["1", "-1", "0.5", "nan", "true", "'R'", "'arc'", "[]", "[1]", "['R']", "{}", "{a = 1}",
          "1979-05-27", "'defaults'", "'S'", "[[]]", "1" + 400 * "0"]
KEYS = st.sampled_from([*SETTINGS]) | st.sampled_from([
    "inherits", "parts", "log", "log.script", "name", "new",
])
LINES = st.tuples(KEYS, st.sampled_from(VALUES))
HEADINGS = st.sampled_from(["[R]", "[S]", "[defaults]", "[R.log]", "[[T]]", ""])
TABLES = st.lists(st.tuples(HEADINGS, st.lists(LINES, max_size=2)), max_size=3)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=TABLES, noise=st.text(max_size=5), start=st.sampled_from(["", GOOD]))
def test_any_file(tmp_path, tables, noise, start):
    """Catches any way out of load_rounds and expand but two: sound rounds, or a ValueError of one line."""
    lines = []
    for heading, pairs in tables:
        lines += [heading, *(f"{key} = {value}" for key, value in pairs)]
    path = written(tmp_path, start + "\n".join(lines) + noise)
    try:
        rounds = load_rounds(path)
        names = expand(["R"], path)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    for round in rounds.values():
        assert all(type(getattr(round, key)) is kind for key, kind in SETTINGS.items() if key != "seeds")
    assert set(names) <= set(rounds)


@given(parts=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=5))
def test_seeds_are_read_as_written(parts):
    """Catches a range without its end, and a seed that would run twice."""
    text = ",".join(f"{first}-{first + more}" if more else f"{first}" for first, more in parts)
    wanted = [seed for first, more in parts for seed in range(first, first + more + 1)]
    assert seeds_of(text) == list(dict.fromkeys(wanted))


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "3-1", "1-2-3", "0:9", "1.5"])
def test_wrong_seeds_get_one_line(text):
    with pytest.raises(ValueError, match=f"--seeds {text}"):
        seeds_of(text)
