"""The README: its commands and code run, its map is complete, and imports go the way that it says."""

import ast
import re
import shlex

import torch

import eval
import train
from conftest import ROOT
from model import RWKV7, Config
from rounds import expand, load_rounds

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_code_runs(monkeypatch, capsys):
    """Catches a renamed function or argument, and a shape that is not as the comments say."""
    model = RWKV7.init(Config.published(n_layer=12, n_embd=16, head_size=16))
    monkeypatch.setattr(RWKV7, "load", lambda path: model)
    names = {}
    exec(SNIPPETS[0], names)
    assert len(capsys.readouterr().out) > 1
    B, T = names["prompt"].shape
    assert names["hidden"].shape == (B, T, 16) and len(names["state"]) == 12
    assert names["logits"].shape == (B, 65536)

    inputs = [torch.rand(2, 5, 3, 4) for _ in range(6)] + [torch.rand(2, 3, 4, 4)]
    inputs[1] = -0.6 * inputs[1]
    for name, x in zip(("r", "log_w", "k", "v", "a", "b", "state"), inputs):
        names[name] = x.requires_grad_()
    exec(SNIPPETS[1], names)
    (names["y"].sum() + names["final_state"].sum()).backward()
    assert names["y"].shape == (2, 5, 3, 4) and names["final_state"].shape == (2, 3, 4, 4)
    assert all(x.grad is not None for x in inputs)


def test_the_commands_are_understood():
    """Catches an option or a round that is gone, here and in the study; nothing is run."""
    study = (ROOT / "study" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"(?:python|nproc_per_node=\d+) (train|eval)\.py ([^`#\n]*)", README + study)
    assert len(commands) > 10
    for program, words in commands:
        if program == "train":
            expand(train.parse_arguments(shlex.split(words)).round, load_rounds()[0])
        else:
            eval.parse_arguments(shlex.split(words))


def test_the_logs_numbers_are_the_logs():
    """Catches a digit that was mistyped: every round's numbers, in the order of its row."""
    rows = re.findall(r"^\| (R\d+[a-d]?(?:, R\d+[a-d]?)*) \|[^|]*\| ([^|]*) \| ([^|]*) \|$", README, re.M)
    rounds, seen = load_rounds()[0], []
    for names, d_acc, means in rows:
        names = names.split(", ")
        numbers = [float(number.replace("−", "-")) for number in re.findall(r"[+−][\d.]+", d_acc)]
        assert numbers == [delta for name in names for delta in rounds[name].log["d_acc"]], names
        means = [float(number.replace("−", "-")) for number in re.findall(r"[+−][\d.]+", means)]
        assert means == [rounds[name].log["mean"] for name in names], names
        seen += names
    assert sorted(seen) == sorted(name for name in rounds if rounds[name].log)


def test_the_map_names_every_file():
    listed = re.findall(r"^(\w+\.(?:py|cu|toml)) ", README, re.M)
    there = [path.name for path in ROOT.iterdir() if path.suffix in (".py", ".cu", ".toml")]
    assert sorted(listed) == sorted(there)


def test_the_house_keeps_its_budget():
    """Catches the growth that this repository had to be cut back from."""
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("*.py")}
    assert len(lines) <= 12 and max(lines.values()) <= 600 and sum(lines.values()) <= 3300, lines
    assert len(README.splitlines()) <= 200
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("study/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 110, (path, number)


def test_imports_go_one_way():
    """No file imports, by whatever way round, a file that imports it; the chains in the README are real."""
    modules = {path.stem: set() for path in ROOT.glob("*.py")}
    for name, imported in modules.items():
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {module for module in [*names, getattr(node, "module", None)] if module in modules}

    def reached(name, path=()):
        assert name not in path, f"{' -> '.join(path)} -> {name}"
        return {name}.union(*(reached(below, (*path, name)) for below in modules[name]))

    for name in modules:
        reached(name)
    chains = re.search(r"Imports go one way: (.*?)\.\n", README, re.S)[1]
    for chain in chains.split(";"):
        above, *rest = (part.split(",") for part in re.sub(r"\s", "", chain).split("→"))
        for below in rest:
            assert all(name in reached(above[0]) for name in below), (above, below)
            above = below
