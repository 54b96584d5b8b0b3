"""The study's numbers, table and figures.

    python study/study.py collect runs/standin runs/steps/standin     every finished arm there -> results.json
    python study/study.py                                             results.json -> table (printed), figures
    python study/study.py where runs/standin/S20/seed20               where an answer comes from -> where.png

results.json holds a line an arm: what it is, its accuracy at every evaluation, its controls, and which of the
validation questions it answered right at the end, as bits. Figures need matplotlib.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from files import ARMS, read_records, read_run, say    # noqa: E402
from rounds import load_rounds                         # noqa: E402
from standin import chance                             # noqa: E402
from stats import JUMP, chance_to_gain, holm, judge, mcnemar, sign_test    # noqa: E402

KEYS = ("round", "seed", "arm", "task", "order", "steps", "facts", "channels")
TOKENS = {"context_first": 1.0, "question_first": 1.0, "both_ends": 45 / 40, "twice": 78 / 40}


# ---- runs into results.json --------------------------------------------------------------------------------

def collect(folders: list[Path]) -> None:
    """Every finished arm under the folders, as one line of results.json each."""
    arms = []
    for path in sorted(path for folder in folders for path in folder.glob("*/seed*/*/run.json")):
        run = read_run(path.parent)
        if run["status"] != "done":
            say(f"note: {path.parent} is not finished, and left out")
            continue
        evaluations = read_records(path.parent / "records.jsonl")
        last = evaluations[run["steps"]]
        right = np.packbits([last[id][0] == 1 for id in sorted(last)])
        arm = {key: run.get(key, run["settings"].get(key)) for key in KEYS}
        arm |= {"acc": {step: mean_of(scores) for step, scores in evaluations.items()},
                "questions": len(last), "right": right.tobytes().hex(), "code": run["history"][-1]["code"]}
        if run["arm"] == "prompt_fs":
            controls = read_records(path.parent / "controls.jsonl", by="control")
            arm["controls"] = {control: mean_of(scores) for control, scores in controls.items()}
        arms.append(arm)
    lines = ",\n".join(json.dumps(arm, separators=(",", ":")) for arm in arms)
    (HERE / "results.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    say(f"{len(arms)} arms in {HERE / 'results.json'}")


def mean_of(scores: dict[str, list[float]]) -> float:
    return round(float(np.mean([values[0] for values in scores.values()])), 4)


# ---- results.json into a table -----------------------------------------------------------------------------

def read_results() -> list[dict]:
    return json.loads((HERE / "results.json").read_text(encoding="utf-8"))


def select(arms: list[dict], **wanted) -> dict[int, dict]:
    """The arms that are as wanted, by seed."""
    return {arm["seed"]: arm for arm in arms if all(arm[key] == value for key, value in wanted.items())}


def end_of(arm: dict) -> float:
    return arm["acc"][str(arm["steps"])]


def bits_of(arm: dict) -> np.ndarray:
    right = np.frombuffer(bytes.fromhex(arm["right"]), np.uint8)
    return np.unpackbits(right)[:arm["questions"]].astype(float)


def table(arms: list[dict], steps: int = 250) -> str:
    """A Markdown table: a row a round, every seed, and the verdict."""
    rounds = load_rounds()[0]
    settings = {(arm["round"], arm["facts"], arm["channels"]) for arm in arms if arm["steps"] == steps}
    rows, tests = [], []
    for name, facts, channels in sorted(settings, key=lambda key: (list(rounds).index(key[0]), key[1:])):
        same = dict(round=name, facts=facts, channels=channels, steps=steps)
        both = [select(arms, arm=arm, **same) for arm in ARMS]
        seeds = sorted(set(both[0]) & set(both[1]))
        if not seeds:
            continue
        x = np.array([bits_of(both[1][seed]) - bits_of(both[0][seed]) for seed in seeds])
        deltas = x.mean(axis=1)
        jumped = [[end_of(side[seed]) > JUMP for seed in seeds] for side in both]
        verdict, low, high = judge(x)
        off = np.median([both[1][seed]["controls"]["off"] for seed in seeds])
        tests.append((name, sign_test(deltas)))
        rows.append([
            f"{name}: {rounds[name].title}", f"{seeds[0]} to {seeds[-1]}",
            *(f"{np.median([end_of(side[seed]) for seed in seeds]):.3f} ({sum(jump)} of {len(seeds)})"
              for side, jump in zip(both, jumped)),
            f"{off:.3f}", f"{np.median(deltas):+.3f} [{low:+.3f}, {high:+.3f}]: {verdict}",
            f"{chance_to_gain(deltas)[0]:.2f}", f"{mcnemar(*jumped):.4f}",
        ])
    others = [p for name, p in tests if not rounds[name].primary]
    corrected = iter(holm(others))
    for row, (name, p) in zip(rows, tests):
        row.append(f"{p:.5f} (registered)" if rounds[name].primary else f"{next(corrected):.5f}")
    head = ["round", "seeds", "no_fs, median (jumped)", "prompt_fs", "its seed states off",
            "d_acc, typical seed", "seeds that gain", "p, jumps", "p, sign test (Holm)"]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def every_seed(arms: list[dict]) -> str:
    """A Markdown table of every arm's accuracy at its end, by seed."""
    seeds = sorted({arm["seed"] for arm in arms})
    rows = {}
    for arm in arms:
        size = f"{arm['facts']} facts, {arm['channels']} wide, {arm['steps']} steps"
        title = f"{arm['round']} {arm['arm']}, {arm['order']}, {size}"
        rows.setdefault(title, {})[arm["seed"]] = f"{end_of(arm):.2f}"
        for control, value in arm.get("controls", {}).items():
            rows.setdefault(f"{title}, seed states {control}", {})[arm["seed"]] = f"{value:.2f}"
    lines = [["arm", *map(str, seeds)], ["---"] * (1 + len(seeds))]
    lines += [[title, *(values.get(seed, "") for seed in seeds)] for title, values in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- figures -----------------------------------------------------------------------------------------------

def draw_seeds(arms: list[dict], steps: int = 250) -> None:
    """Every seed's accuracy in both arms of every round, joined, and with the seed states off."""
    from matplotlib.figure import Figure
    rounds = [name for name in load_rounds()[0]
              if select(arms, round=name, arm="no_fs", steps=steps) and
              select(arms, round=name, arm="prompt_fs", steps=steps)]
    figure = Figure(figsize=(10, 1.2 + 0.5 * len(rounds)), layout="constrained")
    panel = figure.subplots()
    for place, name in enumerate(rounds):
        without, with_fs = (select(arms, round=name, arm=arm, steps=steps) for arm in ARMS)
        for seed in sorted(set(without) & set(with_fs)):
            pair = end_of(without[seed]), end_of(with_fs[seed])
            panel.plot(pair, [place - 0.2, place], color="0.85", linewidth=0.7)
        for values, mark, colour, shift, label in (
            ([end_of(arm) for arm in without.values()], "o", "tab:gray", -0.2, "no_fs"),
            ([end_of(arm) for arm in with_fs.values()], "D", "tab:orange", 0.0, "prompt_fs"),
            ([arm["controls"]["off"] for arm in with_fs.values()], "x", "tab:blue", 0.2, "seed states off"),
        ):
            panel.plot(values, [place + shift] * len(values), mark, color=colour, markersize=4, alpha=0.7,
                       label=None if place else label)
        one = next(iter(without.values()))
        guess = chance(one["task"], one["facts"])
        panel.plot([guess] * 2, [place - 0.4, place + 0.4], ":", color="black", linewidth=1,
                   label=None if place else "a fact picked at random")
    titles = [f"{name}: {load_rounds()[0][name].title}" for name in rounds]
    panel.set_yticks(range(len(rounds)), titles, fontsize=8)
    panel.set_ylim(len(rounds) - 0.4, -0.6)
    panel.set_xlim(0, 1.02)
    panel.set_xlabel("accuracy in the miniature, a mark a seed")
    figure.legend(fontsize=8, loc="outside upper right", ncols=4)
    figure.savefig(HERE / "seeds.png", dpi=110)


def draw_steps(arms: list[dict]) -> None:
    """Accuracy against training steps, a thin line a seed and the median thick, a panel a task."""
    from matplotlib.figure import Figure
    long = [arm for arm in arms if len(arm["acc"]) > 3]
    tasks = sorted({arm["task"] for arm in long})
    figure = Figure(figsize=(5.5 * max(1, len(tasks)), 4), layout="constrained")
    for panel, task in zip(np.atleast_1d(figure.subplots(1, max(1, len(tasks)), sharey=True)), tasks):
        lines = sorted({(arm["arm"], arm["round"] if arm["arm"] == "prompt_fs" else "") for arm in long
                        if arm["task"] == task})
        for number, (name, round_name) in enumerate(lines):
            members = [arm for arm in long if arm["task"] == task and arm["arm"] == name
                       and round_name in ("", arm["round"])]
            steps = sorted(map(int, members[0]["acc"]))
            curves = np.array([[arm["acc"][str(step)] for step in steps] for arm in members])
            panel.plot(steps, curves.T, color=f"C{number}", linewidth=0.5, alpha=0.4)
            panel.plot(steps, np.median(curves, axis=0), color=f"C{number}", linewidth=2,
                       label=f"{name} {round_name}, {len(members)} seeds")
        panel.set_title(task)
        panel.set_xlabel("training steps")
        panel.legend(fontsize=8)
    figure.savefig(HERE / "steps.png", dpi=110)


def draw_cost(arms: list[dict], steps: int = 250) -> None:
    """Accuracy against the tokens that a prompt's prefill reads, before training and after."""
    from matplotlib.figure import Figure
    tasks = sorted({arm["task"] for arm in arms})
    figure = Figure(figsize=(5.5 * len(tasks), 4), layout="constrained")
    for panel, task in zip(np.atleast_1d(figure.subplots(1, len(tasks), sharey=True)), tasks):
        here = [arm for arm in arms if arm["task"] == task and arm["steps"] == steps]
        for order, cost in TOKENS.items():
            for name, mark in (("no_fs", "o"), ("prompt_fs", "D")):
                group = [arm for arm in here if arm["order"] == order and arm["arm"] == name
                         and (name == "no_fs" or arm["round"] in ("S20", "S21", "S22", "S23"))]
                for step, fill in (("0", "none"), (str(steps), "full")):
                    values = [arm["acc"][step] for arm in group]
                    if values and (name == "no_fs" or step != "0"):
                        panel.plot(cost, np.median(values), mark, fillstyle=fill, markersize=9,
                                   color="tab:orange" if name == "prompt_fs" else "tab:gray")
                        panel.annotate(f"{order}, {name}{', untrained' if step == '0' else ''}",
                                       (cost, np.median(values)), fontsize=7, xytext=(6, -2),
                                       textcoords="offset points")
        panel.set_title(task)
        panel.set_xlabel("tokens read, in prompts")
        panel.set_xlim(0.9, 2.6)
    figure.savefig(HERE / "cost.png", dpi=110)


# ---- where an answer comes from ----------------------------------------------------------------------------

def influence(model, fs, example, layer_inputs: list):
    """How much each prompt token's input to each layer counts for the right answer: |gradient x input|, its
    channels summed, (L, T)."""
    from data import collate
    from fs import answer_logits
    layer_inputs.clear()
    logits, _ = answer_logits(model, fs, *collate([example])[:3])
    logits[0, 0].log_softmax(dim=-1)[example.answer[0]].backward()
    return np.array([(x.grad * x).sum(dim=-1).abs()[0, :len(example.prompt)].tolist() for x in layer_inputs])


def where(folder: Path) -> None:
    """For the first validation question: how much each fact counts, layer by layer, in both arms."""
    import torch
    from matplotlib.figure import Figure
    from fs import FutureSeed
    from model import RWKV7, read_tensors
    from rounds import Round
    from standin import small_tokenizer, validation_examples
    recipe = Round(folder.parent.name, "", **read_run(folder / "prompt_fs")["settings"])
    example = validation_examples(recipe)[0]
    words = [small_tokenizer().decode([token]) for token in example.prompt]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for panel, arm in zip(figure.subplots(2, 1, sharex=True), ARMS):
        model, fs = RWKV7.load(folder / arm / "model.pth"), None
        if arm == "prompt_fs":
            fs = FutureSeed(model.config, **recipe.fs_settings())
            fs.load_state_dict(read_tensors(folder / arm / "fs.pth")[0])
            fs.detach = False
        layer_inputs: list[torch.Tensor] = []

        def keep(block, inputs):
            inputs[0].retain_grad()
            layer_inputs.append(inputs[0])

        for block in model.blocks:
            block.register_forward_pre_hook(keep)
        counts = influence(model, fs, example, layer_inputs)
        panel.imshow(counts / counts.max(axis=1, keepdims=True), aspect="auto", cmap="Oranges")
        panel.set_ylabel(f"{arm}: layer")
    panel.set_xticks(range(len(words)), [repr(word)[1:-1] for word in words], rotation=90, fontsize=7)
    figure.suptitle(f"how much each token counts for the answer {example.text!r}, a row a layer")
    figure.savefig(HERE / "where.png", dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        collect([Path(folder) for folder in sys.argv[2:]])
    elif sys.argv[1:2] == ["where"]:
        where(Path(sys.argv[2]))
    else:
        results = read_results()
        print(table(results))
        print(every_seed(results))
        draw_seeds(results)
        draw_steps(results)
        draw_cost(results)
