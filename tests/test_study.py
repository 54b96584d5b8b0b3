"""The study's page says what its numbers say."""

import shutil
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, refusal
from fake_runs import write_runs
from data import Example, collate
from fs import FutureSeed, answer_logits
from model import RWKV7, Config

sys.path.insert(0, str(ROOT / "study"))
import study    # noqa: E402


@pytest.mark.parametrize("table", [study.verdicts, study.instead, study.axes, study.every_seed])
def test_the_tables_are_those_of_the_numbers(table):
    """Catches a digit that was mistyped, and a table that was not made anew."""
    assert table(study.read_results()) in (ROOT / "study" / "TABLES.md").read_text(encoding="utf-8")


def test_the_numbers_are_of_one_code():
    """Catches runs of other code or on another machine among those that are compared."""
    arms = study.read_results()
    assert len({(arm["code"], arm["machine"]) for arm in arms}) == 1
    keys = ("round", "seed", "arm", *study.AXES)
    assert len({tuple(arm[key] for key in keys) for arm in arms}) == len(arms)


def test_only_runs_as_registered_are_collected(tmp_path, capsys):
    """Runs of a round as it stands in rounds.toml, but for the axes of the study, become a file of their own;
    an arm that was run without the other does too, and what the tables say comes from that file.

    Catches: other settings under a round's name, one of two runs of the same seed chosen without a word, a
    published file replaced, and a table from the published numbers in place of one's own.
    """
    out = tmp_path / "mine.json"
    folder = write_runs(tmp_path / "one", "S20", seeds=[1, 2], n=8, source="standin", settings={"facts": 16})
    shutil.rmtree(folder / "seed2" / "prompt_fs")
    assert study.main(["collect", str(folder.parent), "--out", str(out)]) == 0
    arms = study.read_results(out)
    assert [(arm["seed"], arm["arm"], arm["facts"]) for arm in arms] == [
        (1, "no_fs", 16), (1, "prompt_fs", 16), (2, "no_fs", 16)]
    before = out.read_bytes()
    changed = write_runs(tmp_path / "changed", "S20", seeds=[3], n=8, source="standin", settings={"lr": 1e-9})
    for folders, words in (([folder.parent], "is there already"), ([folder.parent] * 2, "the same arm"),
                           ([changed.parent], "lr is 0.004"),
                           ([tmp_path / "nothing"], "no finished runs")):
        target = out if words == "is there already" else tmp_path / "other.json"
        arguments = ["collect", *map(str, folders), "--out", str(target)]
        assert words in refusal(capsys, study.main, arguments)
    assert out.read_bytes() == before and not (tmp_path / "other.json").exists()
    assert study.main(["tables", "--results", str(out)]) == 0
    assert "(registered)" not in capsys.readouterr().out


def test_influence_is_what_scaling_an_input_does():
    """Catches a gradient of another token, layer or answer: an input is made 0.01% larger, and the right
    answer's log probability looked at."""
    model = RWKV7.init(Config.published(n_layer=3, n_embd=32, head_size=16, vocab_size=40), seed=1).double()
    fs = FutureSeed(model.config, alpha=0.0, layer_start=1, detach=False, clip=0.0).double()
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    examples = [Example(f"q{b}", [5 + b, 7, 9, 11 - b], [3], "", None, 1) for b in range(2)]
    counts = study.influence(model, fs, examples)
    for layer, b, t in np.ndindex(counts.shape):
        def log_probability(scale):
            def scaled(block, inputs):
                x = inputs[0].clone()
                x[b, t] *= scale
                return x, *inputs[1:]

            hook = model.blocks[layer].register_forward_pre_hook(scaled)
            logits, _ = answer_logits(model, fs, *collate(examples)[:3])
            hook.remove()
            return logits[b, 0].log_softmax(dim=-1)[3].item()

        change = (log_probability(1 + 1e-4) - log_probability(1 - 1e-4)) / 2e-4
        assert abs(abs(change) - counts[layer, b, t]) <= 1e-5 * counts.max()
