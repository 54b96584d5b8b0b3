"""Future-Seed in one plain training loop, on tasks that others made, from scratch, on one core of a CPU.

    python study/from_scratch.py directional       the demonstration, in about a minute
    python study/from_scratch.py needle --seed 3   another task of tasks.py

Two models start from the same weights and take the same batches: a plain RWKV-7, and one with Future-Seed,
whose layer i starts from a gated copy of the state in which layer i-1 has ended (fs.py). Nothing is
pretrained. Questions are small at first and grow at one pace for both models. A task gives tokens to read,
and under each of them the token that is to be said there, if any.
Shapes: B sequences in a batch, T tokens in a sequence, n facts in a question, C channels.
"""

import argparse
import inspect
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fs import FutureSeed, prefill    # noqa: E402
from model import Config, RWKV7    # noqa: E402
from tasks import SILENT, TASKS, WORDS, in_words, scores, show    # noqa: E402

# one recipe for all tasks; LOG.md tells how it was chosen. RANK is that of the model's low-rank adapters
LAYERS, CHANNELS, HEAD_SIZE, RANK = 4, 64, 16, 8
BATCH, LR, WARM_UP = 32, 4e-3, 50
GROW, GROWN = 0.4, 0.75    # the questions grow between these two shares of the steps
DECAY = 0.8                # the share of the steps after which the learning rate falls
TEST, TEST_SEED = 256, 2 ** 31    # sequences in the test, which are of full size and the same for every seed
SEED_STATES = dict(alpha=-2.0, layer_start=1, detach=False, clip=1.0, gate="heads", train_alpha=True)


class Arm(NamedTuple):
    model: RWKV7
    fs: FutureSeed | None
    optimizer: torch.optim.Optimizer


def new_arm(seed, future_seed):
    """A fresh model, with Future-Seed or without, and its optimizer. Arms of one seed start alike."""
    model = RWKV7.init(Config(LAYERS, CHANNELS, HEAD_SIZE, len(WORDS), 2 * CHANNELS, *[RANK] * 4), seed)
    # the published 1e-4 suits long runs: here most of the steps would go into growing the embedding
    torch.nn.init.uniform_(model.emb.weight, -0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    parameters = list(model.parameters())
    fs = None
    if future_seed:
        fs = FutureSeed(model.config, **SEED_STATES)
        parameters += fs.parameters()
    optimizer = torch.optim.AdamW(parameters, LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return Arm(model, fs, optimizer)


def train_step(arm, inputs, targets, lr):
    """One step on inputs (B, T) and targets (B, T); returns the loss."""
    for group in arm.optimizer.param_groups:
        group["lr"] = lr
    hidden, _ = prefill(arm.model, inputs, fs=arm.fs)    # (B, T, C)
    asked = targets != SILENT
    loss = F.cross_entropy(arm.model.head(hidden[asked]), targets[asked])
    arm.optimizer.zero_grad()
    loss.backward()
    # the gates' few gradients stay out of the norm, so that it is over the same parameters in both arms
    torch.nn.utils.clip_grad_norm_(arm.model.parameters(), 1.0)
    arm.optimizer.step()
    return loss.item()


@torch.no_grad()
def answers(arm, inputs):
    """What the arm would say at every token, (B, T)."""
    hidden, _ = prefill(arm.model, torch.tensor(inputs), fs=arm.fs)
    return arm.model.head(hidden).argmax(dim=-1).numpy()


def ramp(x, start, end):
    """0 up to start, 1 from end on, a straight line between them."""
    return min(1.0, max(0.0, (x - start) / (end - start)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the questions")
    parser.add_argument("--out", type=Path, help="append the results to this file, as a line of JSON")
    options = parser.parse_args()
    task = TASKS[options.task]
    torch.set_num_threads(1)
    print(inspect.cleandoc(task.make.__doc__), end="\n\n")

    test_inputs, test_targets = task.make(np.random.default_rng(TEST_SEED), TEST, task.last)
    arms = {"plain": new_arm(options.seed, False), "Future-Seed": new_arm(options.seed, True)}
    rng = np.random.default_rng(options.seed)
    began, curve = time.time(), {}
    for step in range(1, task.steps + 1):
        done = step / task.steps
        n = task.first + int((task.last - task.first) * ramp(done, GROW, GROWN))
        inputs, targets = map(torch.tensor, task.make(rng, BATCH, n))
        lr = LR * min(1.0, step / WARM_UP) * (1 - ramp(done, DECAY, 1.0))
        for arm in arms.values():
            train_step(arm, inputs, targets, lr)
        if step % (task.steps // 10) > 0:
            continue

        # ten times in a run: what both models answer to the test
        said = {name: answers(arm, test_inputs) for name, arm in arms.items()}
        shares = {name: scores(options.task, test_inputs, test_targets, said[name]) for name in arms}
        curve[step] = {f"{score}, {name}": round(float(shares[name][score]), 4)
                       for score in shares["plain"] for name in arms}
        if len(curve) == 1:
            print("step   n " + "".join(f"{title:21}" for title in curve[step]).rstrip())
        bars = "".join(f"{'#' * round(12 * share):.<12} {share:.2f}    " for share in curve[step].values())
        print(f"{step:4} {n:3} {bars}{(time.time() - began) * (1 / done - 1):3.0f} s left", flush=True)

    print("\nThe first question of the test, and what the two models say; [brackets] mark what is wrong.\n")
    asked = test_targets[0] != SILENT
    right = in_words(test_targets[0], asked)
    rows = {"read": WORDS[test_inputs[0]], "right": right}
    for name in arms:
        words = in_words(said[name][0], asked)
        rows[name] = np.where(words == right, words, np.char.add(np.char.add("[", words), "]"))
    show(rows)
    for title, share in curve[task.steps].items():
        print(f"{title:20} {share:6.1%} right after {task.steps} steps")
    # a model that was trained with seed states may have learned to do without them
    without = answers(arms["Future-Seed"]._replace(fs=None), test_inputs)
    off = {score: round(float(share), 4)
           for score, share in scores(options.task, test_inputs, test_targets, without).items()}
    for score, share in off.items():
        print(f"{score + ', Future-Seed':20} {share:6.1%} right with its seed states switched off")
    if options.out:
        answered = {name: said[name][test_targets != SILENT].tolist() for name in arms}
        result = {"task": options.task, "seed": options.seed, "seconds": round(time.time() - began),
                  "curve": curve, "off": off, "said": answered}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
