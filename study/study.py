"""The study's numbers, tables and figures.

    python study/study.py tables                             results.json -> the tables, on standard output
    python study/study.py figures                            results.json -> the figures beside it
    python study/study.py collect runs/standin --out FILE    every finished arm there -> a new file
    python study/study.py where runs/standin/S20             where an answer comes from -> where.png

`tables` and `figures` take --results FILE for numbers of your own; figures are then drawn beside that file.

results.json holds a line an arm: what it is, its accuracy at every evaluation, its controls, and which of the
validation questions it answered right at the end, as bits. Figures need matplotlib.
Shapes: L layers, B questions, T tokens of a prompt.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data import collate    # noqa: E402
from files import atomic_write, complain, say, tell    # noqa: E402
from fs import FutureSeed, answer_logits    # noqa: E402
from model import RWKV7, read_tensors    # noqa: E402
from report import COLOURS, Row, draw_legend, draw_scores    # noqa: E402
from rounds import load_rounds    # noqa: E402
from runs import ARMS, CONTROLS, differences, in_words, read_records, read_run    # noqa: E402
from runs import recipe_of, seeds_on_disk    # noqa: E402
from standin import chance, small_tokenizer, validation_examples    # noqa: E402
from stats import JUMP, chance_to_gain, holm, judge, mcnemar, sign_test    # noqa: E402

AXES = ("steps", "facts", "channels")    # what the study varies; eval_every goes with steps
MINIATURES = load_rounds()[1]


def usual(recipe) -> dict:
    """What a round's own runs have, and those on an axis have not."""
    return {"steps": recipe.steps, "facts": recipe.facts, "channels": recipe.channels}


def tokens_read(name: str) -> float:
    """The mean length of a round's prompts on the stand-in."""
    return float(np.mean([len(example.prompt) for example in validation_examples(MINIATURES[name])]))


# ---- runs into results.json --------------------------------------------------------------------------------

def check_round(folder: Path, run: dict) -> None:
    """ValueError unless a run is of a round as rounds.toml has it on the stand-in, but for the axes."""
    if run["source"] != "standin" or run["round"] not in MINIATURES:
        raise ValueError(f"{folder} is not a stand-in run of a round of rounds.toml")
    recipe = recipe_of(run)
    varied = {key: getattr(recipe, key) for key in (*AXES, "eval_every")}
    unlike = differences(replace(MINIATURES[run["round"]], **varied).settings(), recipe.settings())
    if unlike:
        raise ValueError(f"{folder} has other settings than its round: "
                         f"{in_words(unlike, 'in rounds.toml', 'in the run')}")


def collect(folders: list[Path], out: Path) -> None:
    """Every finished arm under the folders, as a line of `out` each. Some rounds have no arm but no_fs.

    ValueError where a run is not as its round says, where two runs claim the same place, where there is no
    run, or where `out` is there.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; name another --out FILE, or move it away")
    arms, places = [], {}
    for path in sorted(path for folder in folders for path in folder.glob("*/seed*/*/run.json")):
        folder = path.parent
        run = read_run(folder)
        if run["status"] != "done":
            say(f"note: {folder} is not finished, and left out")
            continue
        check_round(folder, run)
        settings = run["settings"]
        line = {"round": run["round"], "seed": run["seed"], "arm": run["arm"], "task": settings["task"],
                "order": settings["order"]} | {key: settings[key] for key in AXES}
        place = tuple(line.values())
        if place in places:
            raise ValueError(f"{folder} and {places[place]} are the same arm of the same seed; collect one "
                             "of them")
        places[place] = folder
        evaluations = read_records(folder / "records.jsonl")
        if run["steps"] not in evaluations:
            raise ValueError(f"{folder}: no evaluation of its last step, {run['steps']}")
        last = evaluations[run["steps"]]
        right = np.packbits([scores["acc"] == 1 for _, scores in sorted(last.items())])
        machine = run["history"][-1]["machine"]
        line |= {"acc": {step: mean_of(scores) for step, scores in evaluations.items()},
                 "questions": len(last), "right": right.tobytes().hex(), "code": run["history"][-1]["code"],
                 "machine": f"{machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}"}
        if run["arm"] == "prompt_fs":
            controls = read_records(folder / "controls.jsonl", by="control")
            line["controls"] = {control: mean_of(scores) for control, scores in controls.items()}
        arms.append(line)
    if not arms:
        raise ValueError(f"no finished runs in {', '.join(map(str, folders))}")
    lines = ",\n".join(json.dumps(arm, separators=(",", ":")) for arm in arms)
    with atomic_write(out, "w") as file:
        file.write(f"[\n{lines}\n]\n")
    say(f"{len(arms)} arms in {out}")


def mean_of(scores: dict[str, dict]) -> float:
    return round(float(np.mean([score["acc"] for score in scores.values()])), 4)


# ---- results.json into a table -----------------------------------------------------------------------------

def read_results(path: Path = HERE / "results.json") -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def select(arms: list[dict], **wanted) -> dict[int, dict]:
    """The arms that are as wanted, by seed."""
    return {arm["seed"]: arm for arm in arms if all(arm[key] == value for key, value in wanted.items())}


def end_of(arm: dict) -> float:
    return arm["acc"][str(arm["steps"])]


def bits_of(arm: dict) -> np.ndarray:
    right = np.frombuffer(bytes.fromhex(arm["right"]), np.uint8)
    return np.unpackbits(right)[:arm["questions"]].astype(float)


def end_values(arms: list[dict], step: int | None = None, **wanted) -> list[float]:
    """The wanted arms' accuracy at a step, or at their end, in the order of their seeds."""
    members = sorted(select(arms, **wanted).items())
    return [end_of(arm) if step is None else arm["acc"][str(step)] for _, arm in members]


def in_short(values: list[float]) -> str:
    """Median, lowest and how many reach 0.95, of a cell's seeds."""
    if not values:
        return "–"
    reached = sum(value >= 0.95 for value in values)
    return f"{np.median(values):.3f}, {min(values):.3f}, {reached} of {len(values)}"


def markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def verdicts(arms: list[dict]) -> str:
    """A row for every round of which both arms ran, as it is registered: what the ruler says."""
    rows, tests = [], []
    for name, recipe in MINIATURES.items():
        both = [select(arms, round=name, arm=arm, **usual(recipe)) for arm in ARMS]
        seeds = sorted(set(both[0]) & set(both[1]))
        if not seeds:
            continue
        x = np.array([bits_of(both[1][seed]) - bits_of(both[0][seed]) for seed in seeds])
        deltas = x.mean(axis=1)
        jumped = [[end_of(side[seed]) > JUMP for seed in seeds] for side in both]
        verdict, low, high = judge(x)
        share, least, most = chance_to_gain(deltas)
        registered = recipe.primary and seeds == sorted(recipe.registered)
        tests.append((registered, sign_test(deltas)))
        controls = [np.median([both[1][seed]["controls"][control] for seed in seeds]) for control in CONTROLS]
        rows.append([
            f"{name}: {recipe.title}", *(in_short([end_of(side[seed]) for seed in seeds]) for side in both),
            ", ".join(f"{value:.3f}" for value in controls),
            f"{np.median(deltas):+.3f} [{low:+.3f}, {high:+.3f}]: **{verdict}**",
            f"{share:.2f} [{least:.2f}, {most:.2f}]",
            f"{sum(jumped[0])} and {sum(jumped[1])}, p {mcnemar(*jumped):.2g}",
        ])
    corrected = iter(holm([p for registered, p in tests if not registered]))
    for row, (registered, p) in zip(rows, tests):
        row.append(f"{p:.2g} (registered)" if registered else f"{next(corrected):.2g}")
    head = ["round", "no_fs: median, lowest, at 0.95 or more", "prompt_fs", "states off, other, shuffled",
            "d_acc of the typical seed", "a seed gains", "above 0.5 at the end", "sign test, p (Holm)"]
    return markdown([head, *rows])


def instead(arms: list[dict]) -> str:
    """What a user may do with a question that comes last, in both forms: tokens read, accuracy before and
    after the round's training."""
    rows = [["what is done", "form", "tokens read", "untrained: median, lowest, at 0.95 or more", "trained"]]
    for names, arm, what in (
            ("S20 S21", "no_fs", "nothing: question last"), ("S20 S21", "prompt_fs", "Future-Seed"),
            ("S22 S23", "no_fs", "question first"), ("S24 S26", "no_fs", "question at both ends"),
            ("S25 S27", "no_fs", "everything twice")):
        for name in names.split():
            wanted = dict(round=name, arm=arm, **usual(MINIATURES[name]))
            rows.append([what, MINIATURES[name].task, f"{tokens_read(name):.0f}",
                         in_short(end_values(arms, step=0, **wanted)), in_short(end_values(arms, **wanted))])
    return markdown(rows)


def axes(arms: list[dict]) -> str:
    """Accuracy by budget, from the runs of 1000 steps, and by size, with the seeds that both have."""
    runs = (("no_fs", "no_fs", "S20"), ("R6", "prompt_fs", "R6"), ("S20", "prompt_fs", "S20"))
    rows = [["axis", *(label for label, _, _ in runs)]]
    for step in range(125, 1001, 125):
        rows.append([f"{step} steps", *(in_short(end_values(arms, step, round=name, arm=arm, steps=1000))
                                        for _, arm, name in runs)])
    first_ten = [arm for arm in arms if arm["seed"] < 30]
    for facts, channels in ((10, 48), (16, 48), (24, 48), (32, 48), (10, 96)):
        size = dict(steps=250, facts=facts, channels=channels)
        rows.append([f"{facts} facts, {channels} wide", *(
            in_short(end_values(first_ten, round=name, arm=arm, **size)) for _, arm, name in runs)])
    return markdown(rows)


def every_seed(arms: list[dict]) -> str:
    """Every arm's accuracy at its end, by seed, and under the controls."""
    seeds = sorted({arm["seed"] for arm in arms})
    rows = {}
    for arm in arms:
        own = usual(MINIATURES[arm["round"]])
        changed = [f"{arm[key]} {key}" for key in own if arm[key] != own[key]]
        title = ", ".join([f"{arm['round']} {arm['arm']}", *changed])
        rows.setdefault(title, {})[arm["seed"]] = end_of(arm)
        for control, value in arm.get("controls", {}).items():
            rows.setdefault(f"{title}, seed states {control}", {})[arm["seed"]] = value
    lines = [[title, *(f"{values[seed]:.3f}".removeprefix("0") if seed in values else "" for seed in seeds)]
             for title, values in rows.items()]
    return markdown([["arm", *map(str, seeds)], *lines])


# ---- figures -----------------------------------------------------------------------------------------------

def draw_seeds(arms: list[dict], folder: Path) -> None:
    """Every seed's accuracy in both arms of every round, joined, and with the seed states off."""
    from matplotlib.figure import Figure
    arms = [arm for arm in arms if usual(MINIATURES[arm["round"]]).items() <= arm.items()]
    rows = []
    for name, recipe in MINIATURES.items():
        without, with_fs = (select(arms, round=name, arm=arm) for arm in ARMS)
        if without and with_fs:
            form = "HotpotQA's form" if recipe.task == "hotpotqa" else "ARC's form"
            order = recipe.title.partition(", ")[2].replace(", the recommended recipe", "")
            rows.append(Row(f"{name}: made-up questions in {form}, {order}",
                            {seed: end_of(arm) for seed, arm in without.items()},
                            {seed: end_of(arm) for seed, arm in with_fs.items()},
                            {seed: arm["controls"]["off"] for seed, arm in with_fs.items()},
                            chance(recipe.task, recipe.facts)))
    figure = Figure(figsize=(10, 1.2 + 0.5 * len(rows)), layout="constrained")
    panel = figure.subplots()
    draw_scores(panel, rows)
    panel.set_xlabel("accuracy on the stand-in, a mark a seed")
    draw_legend(panel, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1.02), ncols=4)
    figure.savefig(folder / "seeds.png", dpi=110)


def draw_steps(arms: list[dict], folder: Path) -> None:
    """Accuracy against training steps in HotpotQA's form, a thin line a seed and the median thick."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    panel = figure.subplots()
    for label, arm, name, colour in (
            ("no_fs", "no_fs", "S20", "tab:gray"), ("R6, the log's recipe", "prompt_fs", "R6", "tab:blue"),
            ("S20", "prompt_fs", "S20", "tab:orange")):
        members = select(arms, round=name, arm=arm, steps=1000).values()
        steps = range(0, 1001, 125)
        curves = np.array([[arm["acc"][str(step)] for step in steps] for arm in members])
        panel.plot(steps, curves.T, color=colour, linewidth=0.5, alpha=0.4)
        panel.plot(steps, np.median(curves, axis=0), "o-", color=colour, linewidth=2,
                   label=f"{label}, {len(members)} seeds")
    panel.set_xlabel("training steps")
    panel.set_ylabel("accuracy, question last")
    panel.legend(fontsize=8)
    figure.savefig(folder / "steps.png", dpi=100)


def draw_cost(arms: list[dict], folder: Path) -> None:
    """Accuracy against the tokens that are read, before training (hollow) and after: median and range of the
    seeds. What reads as many tokens stands side by side."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    kinds = (("question last", "no_fs", 0, "o", "tab:gray", 0.0),
             ("question last, Future-Seed", "prompt_fs", 0, "D", "tab:orange", 1.2),
             ("question first", "no_fs", 1, "s", "tab:blue", -1.2),
             ("question at both ends", "no_fs", 2, "^", "tab:green", 0.0),
             ("everything twice", "no_fs", 3, "v", "tab:purple", 0.0))
    for panel, names in zip(figure.subplots(1, 2, sharey=True), ("S20 S22 S24 S25", "S21 S23 S26 S27")):
        for what, arm, place, mark, colour, aside in kinds:
            name = names.split()[place]
            for step, fill, shift in ((0, "none", -0.4), (None, "full", 0.4)):
                values = end_values(arms, step, round=name, arm=arm, **usual(MINIATURES[name]))
                if values:
                    middle, tokens = np.median(values), tokens_read(name) + aside + shift
                    spread = [[middle - min(values)], [max(values) - middle]]
                    panel.errorbar(tokens, middle, spread, fmt=mark, color=colour, fillstyle=fill,
                                   markersize=8, elinewidth=0.8, label=what if step is None else None)
        panel.set_title({"arc": "ARC's form", "hotpotqa": "HotpotQA's form"}[MINIATURES[name].task])
        panel.set_xlabel("tokens read for a prompt")
        panel.set_ylim(0, 1.04)
    figure.axes[0].set_ylabel("accuracy; hollow: untrained")
    labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(*labels, fontsize=8, loc="outside upper center", ncols=5)
    figure.savefig(folder / "cost.png", dpi=100)


# ---- where an answer comes from ----------------------------------------------------------------------------

def influence(model, fs, examples) -> np.ndarray:
    """How much each prompt token's input to each layer counts for the right answer: |gradient x input| of its
    log probability, channels summed, (L, B, T)."""
    layer_inputs = []

    def keep(block, inputs):
        inputs[0].retain_grad()
        layer_inputs.append(inputs[0])

    hooks = [block.register_forward_pre_hook(keep) for block in model.blocks]
    prompt, lengths, answer, _ = collate(examples)
    logits, _ = answer_logits(model, fs, prompt, lengths, answer)
    logits[:, 0].log_softmax(dim=-1).gather(1, answer[:, :1]).sum().backward()
    for hook in hooks:
        hook.remove()
    return np.array([(x.grad * x).sum(dim=-1).abs().tolist() for x in layer_inputs])


def where(folder: Path, count: int = 128) -> None:
    """A round in HotpotQA's form. Its first seed and question: how much each token counts in each layer. All
    its seeds: what share of the context's counts falls on the fact that is asked for, over more questions."""
    from matplotlib.figure import Figure
    seeds = [folder / f"seed{seed}" for seed in seeds_on_disk(folder)]
    recipe = recipe_of(read_run(seeds[0] / "prompt_fs"))
    examples = validation_examples(recipe)[:count]
    # the question names the fact by the same token as the context; the fact's value is the token after it
    asked = [(e.prompt.index(e.prompt[-4]), len(e.prompt) - e.tail) for e in examples]
    words = [repr(small_tokenizer().decode([token]))[1:-1] for token in examples[0].prompt[:-1]]
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    *maps, lines = figure.subplots(3, 1)
    for panel, arm, colour in zip(maps, ARMS, (COLOURS[arm] for arm in ARMS)):
        shares = []    # by seed and layer
        for seed in seeds:
            model, fs = RWKV7.load(seed / arm / "model.pth"), None
            if arm == "prompt_fs":
                fs = FutureSeed(model.config, **recipe.fs_settings())
                fs.load_state_dict(read_tensors(seed / arm / "fs.pth")[0])
                fs.detach = False
            counts = influence(model, fs, examples)
            shares.append([np.mean([of_one[place:place + 2].sum() / of_one[:end].sum()
                                    for of_one, (place, end) in zip(layer, asked)]) for layer in counts])
            if seed == seeds[0]:
                first = counts[:, 0, :len(words)]
                panel.imshow(first / first.max(axis=1, keepdims=True), aspect="auto", cmap="Oranges")
                panel.set_ylabel(f"{arm}: layer")
                panel.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
        lines.plot(np.transpose(shares), color=colour, linewidth=0.5, alpha=0.5)
        middle = np.median(shares, axis=0)
        lines.plot(middle, "o-", color=colour, label=f"{arm}, median of {len(seeds)} seeds")
        shares_in_words = " ".join(f"{share:.2f}" for share in middle)
        tell(f"{arm}, share by layer, median of seeds: {shares_in_words}")
    alike = np.mean([2 / end for _, end in asked])
    lines.axhline(alike, linestyle=":", color="black", label="if all tokens of the context counted alike")
    lines.set_xlabel("layer")
    lines.set_ylabel("share of the asked fact")
    lines.legend(fontsize=8)
    figure.suptitle(f"{folder.name}, {seeds[0].name}: how much each token counts for the answer "
                    f"{examples[0].text!r}, a row a layer, without the last token")
    figure.savefig(HERE / "where.png", dpi=100)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for an error told in one line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tables", "figures", "collect", "where"))
    parser.add_argument("folders", nargs="*", type=Path, help="of runs: for collect, and for where")
    parser.add_argument("--out", type=Path, help="a new file, for collect")
    parser.add_argument("--results", type=Path, default=HERE / "results.json", help="for tables and figures")
    args = parser.parse_args(argv)
    if args.what == "collect" and not (args.folders and args.out):
        parser.error("collect needs folders of runs and --out FILE")
    if args.what == "where" and len(args.folders) != 1:
        parser.error("where needs one round's folder, as in runs/standin/S20")
    try:
        if args.what == "collect":
            collect(args.folders, args.out)
        elif args.what == "where":
            where(args.folders[0])
        elif args.what == "tables":
            arms = read_results(args.results)
            for table in (verdicts, instead, axes, every_seed):
                tell(table(arms))
        else:
            arms = read_results(args.results)
            for draw in (draw_seeds, draw_steps, draw_cost):
                draw(arms, args.results.parent)
    except (ValueError, OSError) as error:
        complain(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
