"""rounds.toml against the experiment log, number by number, and rounds.py against wrong files and settings.

The table repeats the log on purpose: it is the second pair of eyes, and nothing computes it.
"""

import dataclasses
import json
import statistics

import pytest
from hypothesis import given, settings, strategies as st

import fs
from model import Config
from rounds import CHOICES, SETTINGS, Round, expand, load_rounds, seeds_of, with_settings

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
    return {name for name in SETTINGS if name != "title" and getattr(one, name) != getattr(two, name)}


def test_every_round_of_the_log_is_there():
    """Catches a round forgotten, renamed or out of order, and results that the log does not have."""
    assert [name for name in ROUNDS if name.startswith("R")] == list(ROWS)
    for name, recipe in ROUNDS.items():
        assert recipe.name == name and (recipe.log is not None) == (name in ROWS)
    assert [ROUNDS[name].log["summary"] for name in ROWS] == [f"_summary_{name}.txt" for name in SUMMARIES]
    keys = "script summary d_acc mean std d_loss status".split()
    assert all(list(ROUNDS[name].log) == keys for name in ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_recipe_and_results(name):
    """Catches any digit that was mistyped or that inheritance brings from the wrong round."""
    task, first, *numbers = ROWS[name]
    longest, shortest, n_train, n_val, batch, alpha, start, mean, std, d_loss, *d_acc = map(float, numbers)
    r, log = ROUNDS[name], ROUNDS[name].log
    assert (r.task, r.order, r.max_prompt, r.min_prompt) == (task, f"{first}_first", longest, shortest)
    assert (r.n_train, r.n_val, r.batch_size) == (n_train, n_val, batch)
    assert (r.alpha_init, r.fs_layer_start) == (alpha, start)
    assert (r.max_answer, r.seeds) == ({"arc": 8, "hotpotqa": 24}[task], tuple(range(len(d_acc))))
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
    ("R3 R5 R12d R12b R14b S6 S9", "R2 R4 R12c R12a R14a S1 S3", "order"), ("R7", "R6", "order seeds"),
    ("R8 R11", "R6 R10", "alpha_init"), ("R9a R9b", "R2 R6", "fs_alpha_schedule fs_alpha_min"),
    ("R14a", "R12a", "batch_size"), ("R10 S1 S2 S4 S5 S7", "R6 R6 R6 R8 R9b R2", "fs_layer_start"),
    ("S3 S8 S10 S13", "S11 S14 S1 S7", "fs_detach"), ("S12 S15", "S3 S8", "fs_gate fs_clip"),
    ("S3 S8 S11 S14", "S10 S13 S1 S7", "alpha_init alpha_lr"),
])
def test_what_a_round_changes(names, parents, changed):
    """Catches a round that differs from the one it is compared with in more than the thing under study."""
    for name, parent in zip(names.split(), parents.split(), strict=True):
        assert differences(ROUNDS[name], ROUNDS[parent]) == set(changed.split()), name


def test_what_the_stand_in_changes():
    """Catches a miniature that forgets its task, order or Future-Seed, or keeps a real length or rate."""
    laid_over = set("base max_prompt min_prompt max_answer n_val batch_size micro_batch_size beta2 lr facts "
                    "checkpoint_activations steps eval_every grad_clip warm_up".split())
    assert list(MINIATURES) == list(ROUNDS)
    for name, small in MINIATURES.items():
        assert differences(ROUNDS[name], small) <= laid_over and small.log == ROUNDS[name].log
        assert (small.base, small.max_prompt, small.min_prompt, small.n_val) == ("stand-in", 256, 0, 512)
        assert (small.facts, small.lr, small.steps) == ({"arc": 5, "hotpotqa": 10}[small.task], 4e-3, 250)
        assert small.facts_hold + small.facts_ramp < small.steps    # the last steps are as hard as validation
    assert differences(MINIATURES["R4"], MINIATURES["R6"]) <= {"n_train"}


def test_settings_reach_future_seed():
    """Catches a setting lost or renamed on its way, and one of the log's names that cannot be pasted."""
    config = Config(12, 16, 8, 50, 24, 3, 4, 5, 6)
    line = ("alpha_init=-4 fs_layer_start=6 fs_alpha_schedule=linear fs_alpha_min=0.25 fs_alpha_max=1.0 "
            "fs_norm=false fs_detach=false fs_clip=0.5 fs_scale=2 alpha_lr=0.1 fs_gate=head")
    built = fs.FutureSeed(config, **with_settings(ROUNDS["R2"], line.split()).fs_settings())
    assert [built.depth_factor[layer] for layer in (6, 8, 11)] == pytest.approx([0.25, 0.55, 1.0])
    assert (built.layer_start, built.norm, built.detach, built.gate) == (6, False, False, "head")
    assert (built.clip, built.scale, built.alpha.requires_grad) == (0.5, 2.0, True)
    assert (built.alpha == -4).all()
    assert not fs.FutureSeed(config, **ROUNDS["R2"].fs_settings()).alpha.requires_grad
    assert set(CHOICES["fs_alpha_schedule"]) == set(fs.SCHEDULES) and set(CHOICES["fs_gate"]) == set(fs.GATES)


def test_settings_are_plain_and_complete():
    """Catches a setting that decides a run but is not recorded: a resumed run could be another."""
    values = ROUNDS["R8"].settings()
    assert json.loads(json.dumps(values)) == values
    fields = {field.name for field in dataclasses.fields(Round)}
    assert fields - set(values) == {"name", "log", "seeds", "title", "primary"} and set(values) < fields


# ---- names, seeds and settings as people write them --------------------------------------------------------

def test_expand():
    """Catches R9 that runs one part, a round run twice, R1 that runs R10, an unknown name passed on."""
    assert expand(["r8"], ROUNDS) == ["R8"] and expand(["R9", "r9A", "R9"], ROUNDS) == ["R9a", "R9b"]
    assert expand(["R12", "s1"], ROUNDS) == ["R12a", "R12b", "R12c", "R12d", "S1"]
    for name in ("R1", "standin", "", "R", "R.", "R9c"):
        with pytest.raises(ValueError, match=f"no round is called '{name}'; the rounds are R2, R3"):
            expand([name], ROUNDS)


@given(parts=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=5))
def test_seeds_are_read_as_written(parts):
    """Catches a range without its end, and a seed that would run twice."""
    text = ",".join(f"{first}-{first + more}" if more else f"{first}" for first, more in parts)
    wanted = [seed for first, more in parts for seed in range(first, first + more + 1)]
    assert seeds_of(text) == list(dict.fromkeys(wanted))


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "3-1", "1-2-3", "0:9", "1.5", "0-99999"])
def test_wrong_seeds_get_one_line(text):
    """Catches a traceback, and a typing error that would start a hundred thousand runs."""
    with pytest.raises(ValueError, match=f"--seeds {text}"):
        seeds_of(text)


@pytest.mark.parametrize("pair, value", [
    ("steps= 1_000", 1000), ("lr=1", 1.0), ("lr=1e-3", 1e-3), ("fs_norm=false", False), ("base=a b", "a b"),
    ("order=twice", "twice"), ('order="twice"', "twice"), ("seeds=[3, 4]", (3, 4)), ("title=a = b", "a = b"),
])
def test_set(pair, value):
    """Catches a value of another type than the file's, a string that needs quotes, a change beside it."""
    key, before = pair.partition("=")[0], ROUNDS["R8"]
    changed = with_settings(before, ["steps=3", pair])
    assert getattr(changed, key) == value and type(getattr(changed, key)) is type(value)
    assert dataclasses.replace(changed, **{key: getattr(before, key), "steps": before.steps}) == before


@pytest.mark.parametrize("pair", [
    "steps", "step=3", "=3", "steps=", "steps=two", "steps=2.0", "steps=true", "steps=-1", "steps=[1]",
    "lr=x", "lr=nan", "lr=inf", "lr=1e39", "lr=true", "lr=1979-05-27", "lr={}", "lr=1" + 400 * "0",
    "order=up", "order=3", "fs_norm=1", "fs_norm=True", "seeds=3", "seeds=[0.5]", "name=R1", "log=1",
    "fs_layer_start=-1", "task=squad", "fs_gate=none", "fs_alpha_schedule=", "n_val=1", "max_prompt=0",
    "max_answer=0", "n_train=0", "batch_size=0", "eval_every=0",
])
def test_set_errors(pair):
    """Catches a wrong key, type, choice or count that passes, or a message that does not say which."""
    with pytest.raises(ValueError) as caught:
        with_settings(ROUNDS["R8"], [pair])
    assert pair.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(key=st.sampled_from([*SETTINGS, "nope"]),
       text=st.text(max_size=12) | st.sampled_from(["1e999", "[[1]]", "''", '"""', "[" * 5000, "9" * 5000]))
def test_set_with_any_text(key, text):
    """Catches any way out but two: a round of sound types, or a ValueError."""
    try:
        value = getattr(with_settings(ROUNDS["R8"], [f"{key}={text}"]), key)
    except ValueError:
        return
    assert isinstance(value, tuple) if key == "seeds" else type(value) is SETTINGS[key]


# ---- files that are wrong ----------------------------------------------------------------------------------

GOOD = "[Q]\ntitle = 't'\ntask = 'arc'\norder = 'twice'\nsteps = 10\nlr = 5\n"
RESULTS = "[Q.log]\nscript = ''\nsummary = ''\nd_acc = [0.5]\nmean = 0.5\nstd = 0\nd_loss = 0\nstatus = ''\n"


def test_inheritance(tmp_path):
    """Catches a grandparent that wins over a parent, an inherited log, whole numbers that stay integers."""
    path = tmp_path / "rounds.toml"
    path.write_text(f"{GOOD}primary = true\n{RESULTS}"
                    "[A]\ninherits = 'Q'\nsteps = 20\n[B]\ninherits = 'A'\nn_val = 9\n"
                    "[standin]\nn_val = 7\nlr = 1\n[standin.arc]\nlr = 2\n[standin.hotpotqa]\nlr = 3\n")
    rounds, small = load_rounds(path)
    assert [(r.steps, r.n_val, r.lr, r.primary) for r in rounds.values()] == [
        (10, 200, 5.0, True), (20, 200, 5.0, False), (20, 9, 5.0, False)]
    assert type(rounds["B"].lr) is float and rounds["Q"].log["d_acc"] == [0.5] and rounds["B"].log is None
    assert [(r.steps, r.n_val, r.lr) for r in small.values()] == [(10, 7, 2.0), (20, 7, 2.0), (20, 7, 2.0)]


@pytest.mark.parametrize("text, words", [
    ("[R]\ninherits = 'Q'\nstepz = 3", r"\[R\]: no setting is called 'stepz'.* steps"),
    ("name = 'P'", "no setting is called 'name'"), ("seeds = [1, 'two']", r"seeds must be .* \[1, 'two'\]"),
    ("n_val = -3", r"\[Q\]: n_val must be 2 or more"), ("fs_gate = 'x'", "fs_gate must be one of scalar"),
    ("[R]\ninherits = 'P'", r"\[R\]: inherits = 'P': no round"), ("[R]\ninherits = 'R'", "no round above"),
    ("fs_norm = 1", "fs_norm must be bool, not 1"), ("[R]\nsteps = 3", r"\[R\]: .*'title', 'task'"),
    ("[[R]]\nsteps = 3", r"\[R\]: "), ("n_val = ", "not a TOML file"),
    ("steps = 1", "not a TOML file"), ("base = '\ud800'", "not a TOML file"),
    ("[standin]\nspeed = 1", r"\[standin\]: no setting is called 'speed'"),
    ("[standin.arc]\nlr = 'x'", r"\[standin\]: lr must be"), ("[standin]\nn_val = 0", "must be 2 or more"),
])
def test_file_errors(tmp_path, text, words):
    """Catches a wrong file that loads, a traceback, and a message that does not name the fault."""
    path = tmp_path / "rounds.toml"
    path.write_bytes((GOOD + text).encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=words) as caught:
        load_rounds(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(OSError):
        load_rounds(tmp_path / "none.toml")
