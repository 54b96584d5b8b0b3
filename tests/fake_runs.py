"""A fake of runs: the folders that train.py leaves, made in milliseconds, with scores that are drawn.

    folder = write_runs(tmp_path)                        tmp_path/R8 with the finished seeds 0, 1 and 2
    write_runs(tmp_path, "S20", range(6), source="standin", shift=0.4)
    change_run(folder / "seed1" / "no_fs", status="running")
"""

import json
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch

from eval import means_of
from rounds import load_rounds
from runs import ARMS, CONTROLS, FOLDERS

HERE = {"code": "c0de", "machine": {"cpu": "AVX2", "threads": 1, "torch": "2.13.0"}}
REAL, STANDIN = load_rounds()


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def identity_of(name: str = "R8", seed: int = 0, arm: str = "no_fs", source: str = "real",
                settings: dict | None = None) -> dict:
    """What run.json says that a run is; `settings` are those that differ from the round's own."""
    rounds = STANDIN if source == "standin" else REAL
    recipe = rounds[name].settings() | (settings or {})
    if source == "standin":    # there every seed has a base and training questions of its own
        base, train = {"name": "stand-in", "sha256": f"base {seed}"}, f"train {seed}"
    else:
        base, train = {"name": recipe["base"], "sha256": "base"}, "train"
    return {"round": name, "seed": seed, "arm": arm, "source": source, "settings": recipe, "minutes": None,
            "base": base, "data": {"train": train, "validation": "validation", "questions_cut": 0}}


def write_runs(runs: Path, name: str = "R8", seeds: Sequence[int] = (0, 1, 2), n: int = 30, *,
               source: str = "real", settings: dict | None = None, shift: float = 0.0, rng_seed: int = 0,
               model=None, fs=None, **changes) -> Path:
    """Both arms of finished seeds of a round. Returns the round's folder, as runs/standin/R8.

    Args: runs, as train.py's --runs; n, questions, each scored at step 0 and at the end; source, "real",
    "own" or "standin"; settings that differ from the round's; shift, added to the chance that prompt_fs has
    of a right token, which lies between 0.1 and 0.5 for no_fs; rng_seed draws all scores; model and fs, to be
    saved in every arm (by default their files hold a word of text); changes, to be made in every run.json.
    """
    recipe = identity_of(name, source=source, settings=settings)["settings"]
    folder = Path(runs) / FOLDERS[source] / name
    last_step = changes.get("steps", recipe["steps"])
    tokens = 1 if recipe["task"] == "arc" or source == "standin" else 4
    rng = np.random.default_rng(rng_seed)
    chance = rng.uniform(0.1, 0.5, n)    # of a right token, by question

    def evaluation(shift: float, **kind) -> list[dict]:
        records = []
        for question in range(n):
            correct = int(rng.binomial(tokens, chance[question] + shift))
            gold = f"gold {question}"
            text = gold if correct == tokens else f"wrong {question}"
            records.append({**kind, "id": f"q{question}", "loss": float(rng.gamma(2)), "tokens": tokens,
                            "correct": correct, "exact": int(correct == tokens), "f1": correct / tokens,
                            "option": text if recipe["task"] == "arc" else None, "gold": gold, "text": text})
        return records

    for seed in seeds:
        for arm in ARMS:
            place = folder / f"seed{seed}" / arm
            place.mkdir(parents=True)
            own_shift = shift if arm == "prompt_fs" else 0.0
            first, last = (evaluation(own_shift, step=step) for step in (0, last_step))
            losses = rng.gamma(2, size=last_step).tolist()
            training = [{"step": step, "train_loss": loss} for step, loss in enumerate(losses, start=1)]
            write_lines(place / "records.jsonl", first + last)
            write_lines(place / "metrics.jsonl", [{"step": 0, **means_of(first)}, *training,
                                                  {"step": last_step, **means_of(last)}])
            save(model, place / "model.pth")
            if arm == "prompt_fs":
                write_lines(place / "controls.jsonl", [
                    record for control in CONTROLS
                    for record in evaluation(0.0, step=last_step, control=control)])
                save(fs, place / "fs.pth")
            identity = identity_of(name, seed, arm, source, settings)
            run = identity | {"status": "done", "steps": last_step, "seconds": 60,
                              "history": [{"from_step": 0, **HERE}]}
            (place / "run.json").write_text(json.dumps(run | changes, indent=1) + "\n")
    return folder


def save(module, path: Path) -> None:
    """The file of a model or of Future-Seed's parameters, or a word of text where there is none."""
    if module is None:
        path.write_text("weights\n")
    elif hasattr(module, "save"):
        module.save(path)
    else:
        torch.save(module.state_dict(), path)


def change_run(folder: Path, **changes) -> None:
    """Change what a run's run.json says."""
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | changes, indent=1) + "\n")


def change_lines(path: Path, change: Callable[[dict], dict]) -> None:
    """Change every line of a .jsonl: `change` gives the new values of some of its keys."""
    write_lines(path, [line | change(line) for line in read_lines(path)])


def change_text(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))
