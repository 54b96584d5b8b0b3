"""Why a gate that starts half open holds a seed back: how large a seed state is beside what its layer writes.

    python study/gate.py --seed 0 --alpha 0 --clip 0    S20's start; the defaults are those of from_scratch.py

Trains on needle with 2 facts, at a constant rate, until the running loss is below 0.4 or for 700 steps.
Every 50 steps it prints three numbers for each seeded layer: the mean gate; the root mean square of its
seed state's entries; and that of its state at the end of the prompt when the same weights read it without
Future-Seed, which is what the layer writes itself. Then come the gradients' norms, of the weights and of
alpha. LOG.md has what came of it.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from from_scratch import BATCH, LR, SEED_STATES, WARM_UP, new_arm, train_step
from fs import prefill
from tasks import SILENT, TASKS

STEPS, EVERY, LEARNED = 700, 50, 0.4


def root_mean_square(x):
    return x.square().mean().sqrt().item()


def norm_of_gradients(parameters):
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item()


def in_line(values):
    return " ".join(f"{value:.3f}" for value in values)


def measure(arm, inputs, targets):
    """What the docstring promises, of one batch, in a line; the weights stay as they are."""
    given = []

    def noting(layer, below, x_last):
        seed_state = arm.fs(layer, below, x_last)
        given.append(root_mean_square(seed_state.detach()))
        return seed_state

    hidden, _ = prefill(arm.model, inputs, fs=noting)
    asked = targets != SILENT
    F.cross_entropy(arm.model.head(hidden[asked]), targets[asked]).backward()
    weights = norm_of_gradients(arm.model.parameters())
    alpha = norm_of_gradients(arm.fs.parameters())
    arm.optimizer.zero_grad()
    with torch.no_grad():
        gates = torch.sigmoid(arm.fs.alpha_head[1:]).mean(dim=1).tolist()
        _, states = prefill(arm.model, inputs)
    written = [root_mean_square(state.wkv) for state in states[1:]]
    return (f"gate {in_line(gates)}  seed state {in_line(given)}  written {in_line(written)}  "
            f"gradients {weights:.2f}, alpha {alpha:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alpha", type=float, default=SEED_STATES["alpha"])
    parser.add_argument("--clip", type=float, default=SEED_STATES["clip"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    SEED_STATES.update(alpha=options.alpha, clip=options.clip)
    arm = new_arm(options.seed, True)
    rng, running = np.random.default_rng(options.seed), 4.0
    for step in range(STEPS):
        inputs, targets = map(torch.tensor, TASKS["needle"].make(rng, BATCH, 2))
        if step % EVERY == 0:
            print(f"step {step:3}  loss {running:.2f}  {measure(arm, inputs, targets)}", flush=True)
        loss = train_step(arm, inputs, targets, LR * min(1.0, (step + 1) / WARM_UP))
        running = 0.9 * running + 0.1 * loss
        if running < LEARNED:
            break
    print(f"running loss {running:.2f} after {step + 1} steps")


if __name__ == "__main__":
    main()
