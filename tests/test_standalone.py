"""The mathematics stands alone: these files, torch and the standard library run the README's Python examples."""

import ast
import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT

from model import RWKV7, Config

PROGRAMS = ("model.py", "wkv.py", "wkv_cuda.py", "fs.py", "tokenizer.py")
OTHERS = ("wkv_kernel.cu", "rwkv_vocab_v20230424.txt")


def test_no_file_imports_more_than_torch_and_the_standard_library():
    """Catches: an import of the plumbing (files.py, data.py, ...) or of another package, wherever it stands."""
    own = {name.removesuffix(".py") for name in PROGRAMS}
    optional = {"cuda"}    # NVRTC's bindings, which wkv_cuda.py can do without
    allowed = own | {"torch", "numpy"} | optional | set(sys.stdlib_module_names)
    for name in PROGRAMS:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                assert module.partition(".")[0] in allowed, f"{name} imports {module}"


def test_the_readmes_python_runs_from_a_folder_with_nothing_else(tmp_path):
    """Catches: an example that is out of date, and a file that needs what a stranger has not copied."""
    for name in PROGRAMS + OTHERS:
        shutil.copy(ROOT / name, tmp_path)
    # a small model in the place of the large one that the examples read; deep enough for the default settings
    RWKV7.init(Config.published(12, 16, 16)).save(tmp_path / "small.pth")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    examples = re.sub(r'"[^"\n]*\.pth"', '"small.pth"', "\n".join(blocks))
    assert "RWKV7.load" in examples and "small.pth" in examples and "wkv(" in examples
    check = """
import sys
from pathlib import Path
strangers = [name for name, module in sys.modules.items() if name.partition(".")[0] in
             ("files", "data", "eval", "train", "rounds", "stats", "standin", "filelock")]
assert not strangers, strangers
assert Path(sys.modules["model"].__file__).parent == Path.cwd()
print("all ran")
"""
    (tmp_path / "examples.py").write_text(examples + check, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-W", "error", "examples.py"], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "all ran" and len(run.stdout.splitlines()) > 1
    assert run.stderr == ""
