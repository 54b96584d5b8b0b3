"""The mathematics stands alone: its files, torch and the standard library run the README's Python."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from model import RWKV7, Config

PROGRAMS = ("model.py", "wkv.py", "wkv_cuda.py", "fs.py", "tokenizer.py")
OTHERS = ("wkv_kernel.cu", "rwkv_vocab_v20230424.txt")


def test_no_file_imports_more_than_torch_and_the_standard_library():
    """Catches: an import of the plumbing (files.py, data.py) or of another package, wherever it stands."""
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


def examples_of_the_readme(with_rwkv: bool) -> str:
    """README's Python, with a small checkpoint in the place of the large one. `with_rwkv`: the part that goes
    on in the `rwkv` package, or the rest."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    first, *others = blocks
    chosen = [first] + [block for block in others if ("from rwkv" in block) == with_rwkv]
    return re.sub(r'"assets/[^"\n]*?(\.pth)?"', r'"./small\1"', "\n".join(chosen))


def run_alone(folder, code: str) -> subprocess.CompletedProcess:
    """Run code in a folder with the files of the mathematics, a small checkpoint, and nothing else."""
    for name in PROGRAMS + OTHERS:
        shutil.copy(ROOT / name, folder)
    # deep enough for the default settings
    RWKV7.init(Config.published(12, 64, 64)).save(folder / "small.pth")
    (folder / "examples.py").write_text(code, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "examples.py"], cwd=folder, env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    return run


def test_the_readmes_python_runs_from_a_folder_with_nothing_else(tmp_path):
    """Catches: an example that is out of date, and a file that needs what a stranger has not copied."""
    examples = examples_of_the_readme(with_rwkv=False)
    assert "RWKV7.load" in examples and "small.pth" in examples and "wkv(" in examples
    run = run_alone(tmp_path, "import warnings\nwarnings.simplefilter('error')\n" + examples + """
import sys
from pathlib import Path
strangers = [name for name, module in sys.modules.items() if name.partition(".")[0] in
             ("files", "data", "eval", "train", "rounds", "stats", "standin", "filelock")]
assert not strangers, strangers
assert Path(sys.modules["model"].__file__).parent == Path.cwd()
print("all ran")
""")
    assert run.stdout.splitlines()[-1] == "all ran" and len(run.stdout.splitlines()) > 1
    assert run.stderr == ""


def test_a_prompt_read_here_goes_on_in_the_rwkv_package(tmp_path):
    """README's example continues a prompt in the official package, with the logits that this model has there.

    Catches: an example that is out of date, and a state in another order or layout.
    """
    pytest.importorskip("rwkv", reason="needs the rwkv package: pip install rwkv==0.8.32")
    run_alone(tmp_path, examples_of_the_readme(with_rwkv=True) + """
with torch.no_grad():
    expected, _ = model(logits.argmax(dim=-1, keepdim=True), state)
    error = (next_logits - model.head(expected[0, -1])).norm() / model.head(expected[0, -1]).norm()
assert error <= 1e-4, error
""")
