"""The pages: their commands run or are understood, the map is complete, imports go the way that it says, and
the log's numbers are the log's. test_standalone.py runs README's Python."""

import ast
import os
import re
import shlex
import subprocess
import sys

from conftest import ROOT

import eval
import train
from rounds import expand, load_rounds

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [path.read_text("utf-8") for folder in (".", "study") for path in ROOT.glob(f"{folder}/*.md")]


def test_your_own_questions_run_as_written(tmp_path):
    """README's example of own questions runs as it stands, in another folder, and an arm answers.

    Catches: an example that is out of date, and files that are looked for in the current folder.
    """
    script = re.search(r"^python - <<.*?(?=^```)", README, re.S | re.M)[0]
    script = re.sub(r"python (train|eval)\.py", rf"python {ROOT}/\1.py", script)
    # two steps of a smaller base: the same way in a few seconds
    script = script.replace("steps=40", "steps=2").replace("init:L4-D64", "init:L1-D16")
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "OWN DATA" in run.stdout and "30 questions" in run.stderr and "10 questions" in run.stdout
    assert (tmp_path / "runs/own/S20/seed1/prompt_fs/model.pth").exists()
    assert "the log" not in run.stdout.replace("not comparable with the log", "")


def test_the_commands_are_understood():
    """Catches: an option or a round that is gone, on any page; nothing is run."""
    commands = re.findall(r"(?:python|nproc_per_node=\d+) (train|eval)\.py ([^`#\n]*)", "\n".join(PAGES))
    assert len(commands) > 15
    for program, words in commands:
        words = shlex.split(words.removesuffix("\\"))
        if program == "train":
            expand(train.parse_arguments(words).round, load_rounds()[0])
        elif "--ask" not in words:
            eval.parse_arguments(words)


def test_the_logs_numbers_are_the_logs():
    """Every row of the log's table has the numbers of rounds.toml. Catches: a digit that was mistyped."""
    table = (ROOT / "ROUNDS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (R\d+[a-d]?(?:, R\d+[a-d]?)*) \|[^|]*\| ([^|]*) \| ([^|]*) \|$", table, re.M)
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
    """Catches: a file that a reader of the map would not know of, or would look for in vain."""
    listed = re.findall(r"^(\w+\.(?:py|cu|toml)) ", README, re.M)
    there = [path.name for path in ROOT.iterdir() if path.suffix in (".py", ".cu", ".toml")]
    assert sorted(listed) == sorted(there)


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
    chains = re.search(r"Imports go one way:\s*(.*?)\.\n", README, re.S)[1]
    for chain in chains.split(";"):
        above, *rest = (part.strip() for part in chain.split("→"))
        for below in rest:
            assert below in modules[above], (above, below)
            above = below


def test_links_between_the_pages_lead_somewhere():
    """Catches: a page or a figure that was renamed."""
    for page in ROOT.glob("**/*.md"):
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)


def test_lines_fit_a_screen():
    """Catches: a line of code longer than 110 characters."""
    for path in (path for folder in (".", "tests", "study", "bench") for path in ROOT.glob(f"{folder}/*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 110, (path, number)
