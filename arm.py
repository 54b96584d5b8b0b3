"""One arm of a run: the loss, the training loop, and a folder that survives whatever happens to the process.

An arm lives in runs/R8/seed1/no_fs or .../prompt_fs:

    run.json         settings, data and base by fingerprint, versions, device, status
    metrics.jsonl    a line a step (train_loss) and a line an evaluation
    records.jsonl    a line an example and evaluation: all that eval.py needs
    seed_off.jsonl   prompt_fs, at the end: the same, scored once more with the seed switched off
    checkpoint.pt    while it runs: all that is needed to go on, on the CPU bit for bit
    model.pth        when it is done: the weights, in the official format; fs.pth: Future-Seed's own
                     parameters

Everything that decides the numbers is a function of (base, settings, seed, step): batches are drawn by step,
there is no dropout, and the two arms differ in nothing but the seed of fs.py. So a checkpoint is weights,
optimiser and step. Several processes (torchrun) share each batch's rows and each evaluation's examples.

Shapes: B batch rows, T prompt tokens, A answer tokens, C channels, V vocabulary entries.
"""

import json
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import batches, collate, fingerprint
from files import atomic_write, save_tensors
from fs import FutureSeed
from model import RWKV7
from records import differences
from rounds import Round, without_fs
from score import score, summarise

SECONDS_BETWEEN_CHECKPOINTS = 300
SECONDS_BETWEEN_LINES = 2
TOKENS_PER_EVALUATION_BATCH = 16384


# ---- processes, devices, words -----------------------------------------------------------------------------

class Stopped(Exception):
    """Ctrl-C or SIGTERM, after everything was saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


stop_requested: list[int] = []    # numbers of the signals received


def catch_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)


def request_stop(number, frame) -> None:
    stop_requested.append(number)
    signal.signal(number, signal.default_int_handler)    # a second one stops at once
    say("finishing this step, then saving; once more to stop at once")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def gathered(items: list) -> list:
    """Every process's items, in the order of the processes, on every process."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def agreed(value: float) -> float:
    """The largest of the processes' values: clocks and signals differ, but all must stop at the same step."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def make_reproducible() -> None:
    """From here on, the same command gives the same bits on the same machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # without it cuBLAS may differ between runs
    torch.use_deterministic_algorithms(True, warn_only=True)
    # or every new tensor would be filled first, though nothing here reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False


def device_name(device: torch.device) -> str:
    return (torch.cuda.get_device_name(device) if device.type == "cuda"
            else platform.processor() or platform.machine())


def changes(before: dict, now: dict) -> str:
    return "; ".join(f"{name} was {old}, now {new}" for name, old, new in differences(before, now))


def say(text: str) -> None:
    if is_main():
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- one arm -----------------------------------------------------------------------------------------------

class Arm(nn.Module):
    """A model and, in the prompt_fs arm, its seed. Its forward is the training loss of a batch."""

    def __init__(self, model: RWKV7, fs: FutureSeed | None):
        super().__init__()
        self.model = model
        self.fs = fs

    def forward(self, prompt, prompt_lengths, answer, answer_lengths):
        """Each example's loss, as in the log: the first answer token's, plus the mean of the other tokens'.

        Args: prompt (B, T), prompt_lengths (B,), answer (B, A), answer_lengths (B,), as data.collate gives
        them.
        Returns: (B,) fp32, negative log likelihoods in nats. Only answer positions get logits: (B, A, V), not
        (B, T, V), which would be a gigabyte at T = 4096.
        """
        given = answer[:, :-1] if answer.shape[1] > 1 else None
        hidden, _ = self.model(prompt, lengths=prompt_lengths, seed=self.fs, answer=given)
        rows = torch.arange(len(prompt), device=prompt.device)
        before_first = hidden[rows, prompt_lengths - 1].unsqueeze(1)     # (B, 1, C), predicts the first token
        before_answer = torch.cat([before_first, hidden[:, prompt.shape[1]:]], dim=1)    # (B, A, C)
        logits = self.model.head(before_answer)                          # (B, A, V)
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), answer.flatten(), reduction="none",
        ).view(answer.shape)
        positions = torch.arange(answer.shape[1], device=answer.device)
        rest = (positions > 0) & (positions < answer_lengths.unsqueeze(1))
        rest_loss = loss.masked_fill(~rest, 0).sum(dim=1) / (answer_lengths - 1).clamp_min(1)
        return loss[:, 0] + rest_loss


def make_optimizer(arm: Arm, round: Round) -> torch.optim.AdamW:
    """AdamW: weight decay on the matrices only, and Future-Seed's parameters at rates of their own."""
    matrices, others = [], []
    for name, parameter in arm.model.named_parameters():
        if parameter.requires_grad:
            is_matrix = name.endswith(".weight") and parameter.ndim == 2
            (matrices if is_matrix else others).append(parameter)
    groups = [
        {"params": matrices, "lr": round.lr, "weight_decay": round.weight_decay},
        {"params": others, "lr": round.lr, "weight_decay": 0.0},
    ]
    if arm.fs is not None:
        for name, parameter in arm.fs.named_parameters():
            if parameter.requires_grad:
                lr = round.fs_alpha_lr if name.startswith("alpha") else round.fs_gate_lr
                groups.append({"params": [parameter], "lr": lr, "weight_decay": 0.0})
    for group in groups:
        group["full_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, round.beta2), fused=True)


def update(arm: Arm, optimizer: torch.optim.Optimizer, round: Round, step: int) -> None:
    """The optimiser's step after `step` others: gradients clipped, the learning rate risen over warm_up."""
    if round.grad_clip:
        nn.utils.clip_grad_norm_(arm.parameters(), round.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * min(1.0, (step + 1) / max(1, round.warm_up))
    optimizer.step()


@dataclass
class Progress:
    """What a resumable checkpoint holds beside weights and optimiser."""

    step: int = 0             # optimiser steps taken
    tokens: int = 0           # read in them, without padding
    seconds: float = 0.0      # spent in them
    metrics: list[dict] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)


class ArmRun:
    """One arm of one seed of a round, from its folder to its folder; `material` is a train.Material."""

    def __init__(self, material, seed: int, arm_name: str, folder: Path, args):
        self.round = round = material.round
        self.seed = seed
        self.name = f"{round.name} seed {seed} {arm_name}"
        self.train_examples = material.train
        self.validation_examples = material.validation
        self.tokenizer = material.tokenizer
        self.device = torch.device(args.device)
        self.minutes = args.minutes
        self.folder = folder
        self.identity = {
            "round": round.name, "seed": seed, "arm": arm_name, "standin": round.facts > 0,
            "settings": round.settings(), "minutes": args.minutes, "base": material.base.identity,
            "data": {"train": fingerprint(material.train), "validation": fingerprint(material.validation)},
        }
        self.surroundings = {
            "device": device_name(self.device), "threads": torch.get_num_threads(),
            "world_size": world_size(),
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
            },
        }
        self.base = material.base
        self.progress = Progress()
        # step, losses not yet read from the device, ids
        self.pending: list[tuple[int, torch.Tensor, list[str]]] = []
        self.last_save = time.monotonic()
        self.last_line = 0.0

    def state(self) -> str:
        """From run.json: absent, running or done. Raises ValueError where another run is in the folder."""
        path = self.folder / "run.json"
        if not path.exists():
            return "absent"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            status, identity = found["status"], {key: found[key] for key in self.identity}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error!r}); use --fresh to start over") from error
        changed = changes(identity, json.loads(json.dumps(self.identity)))
        if changed:
            raise ValueError(f"{self.folder} holds a run with other settings: {changed}; use --fresh to "
                             "replace it or --runs DIR to keep both")
        elsewhere = changes({key: found.get(key) for key in self.surroundings}, self.surroundings)
        if elsewhere and status != "done":
            say(f"{self.name}: resuming elsewhere ({elsewhere}); the last bits may differ")
        return status

    def recipe(self, run: dict) -> dict:
        """All that decides an arm's bits: not the round's name nor, without it, its Future-Seed."""
        settings = run["settings"]
        if self.identity["arm"] == "no_fs":
            settings = without_fs(settings)
        decisive = {key: run[key] for key in (*self.identity, *self.surroundings)}
        return {**decisive, "round": None, "settings": {**settings, "name": None}}

    def twin(self, runs: Path) -> Path | None:
        """A finished arm of another round that is the same run, bit for bit.

        no_fs does not depend on a round's Future-Seed: R6, R8, R9b and R10 share theirs. Budgets in minutes
        depend on the clock, so such arms have no twins.
        """
        if self.minutes is not None or (self.folder / "run.json").exists():
            return None
        wanted = self.recipe(json.loads(json.dumps(self.identity | self.surroundings)))
        for path in sorted(runs.glob(f"*/seed{self.seed}/{self.folder.name}/run.json")):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if found["status"] == "done" and self.recipe(found) == wanted:
                    return path.parent
            except (ValueError, KeyError, TypeError, OSError):
                continue    # its own round will complain
        return None

    def copy_twin(self, runs: Path) -> bool:
        """Take over the arm's twin instead of training, and return whether there was one."""
        # one process looks, for all: another might find what the first has just written
        twin = gathered([self.twin(runs) if is_main() else None])[0]
        if twin is None:
            return False
        if is_main():
            for name in ("metrics.jsonl", "records.jsonl", "seed_off.jsonl", "model.pth", "fs.pth"):
                if (twin / name).exists():
                    with open(twin / name, "rb") as file, atomic_write(self.folder / name) as copy:
                        shutil.copyfileobj(file, copy)
            found = json.loads((twin / "run.json").read_text(encoding="utf-8"))
            with atomic_write(self.folder / "run.json", "w") as file:
                json.dump(found | self.identity | {"copied_from": found["round"]}, file, indent=1)
        say(f"{self.name}: the same run as {twin.parent.parent.name}'s, copied from there")
        return True

    def run(self) -> None:
        """Train to the end of the budget, evaluating on the way, and leave the folder complete."""
        model = self.base.model().to(self.device)
        model.checkpoint_activations = self.round.checkpoint_activations
        fs = None
        if self.identity["arm"] == "prompt_fs":
            fs = FutureSeed(model.config, **self.round.fs_settings()).to(self.device)
        self.arm = Arm(model, fs)
        self.optimizer = make_optimizer(self.arm, self.round)
        self.resume()
        self.write_run("running")
        catch_signals()
        trainer = nn.parallel.DistributedDataParallel(self.arm) if world_size() > 1 else self.arm
        stream = batches(self.train_examples, self.round.batch_size, self.seed, start=self.progress.step,
                         shuffle=not self.round.facts)
        while True:
            finished = self.finished()
            if (finished or self.progress.step % self.round.eval_every == 0) and not self.evaluated():
                self.evaluate()
                self.save()
            if finished:
                break
            if agreed(len(stop_requested)):
                self.save()
                raise Stopped(f"{self.name}: stopped after step {self.progress.step}; "
                              "run the same command to go on",
                              max(stop_requested, default=signal.SIGTERM))
            self.train_step(trainer, next(stream))
            if agreed(time.monotonic() - self.last_save) > SECONDS_BETWEEN_CHECKPOINTS:
                self.save()
        seed_off = self.scored(fs=None) if fs is not None else []
        if is_main():
            self.write_lines()    # once more: a run may have died between its last checkpoint and these files
            model.save(self.folder / "model.pth")
            if fs is not None:
                write_json_lines(self.folder / "seed_off.jsonl", seed_off)
                save_tensors({name: tensor.cpu() for name, tensor in fs.state_dict().items()},
                             self.folder / "fs.pth")
            self.write_run("done")
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def finished(self) -> bool:
        """The step budget or, with --minutes, the log's kind of budget: seconds spent in training steps."""
        if self.minutes is None:
            return self.progress.step >= self.round.steps
        return agreed(self.progress.seconds) >= 60 * self.minutes

    def evaluated(self) -> bool:
        return any("loss" in line and line["step"] == self.progress.step for line in self.progress.metrics)

    def train_step(self, trainer: nn.Module, batch) -> None:
        """One optimiser step on a batch, this process's share of it in pieces of micro_batch_size rows."""
        started = time.monotonic()
        share = batch[rank()::world_size()]
        # DistributedDataParallel averages over processes: world_size makes it the mean over the whole batch.
        # A process without a row, where a last batch is small, takes part with one that does not count
        weight = world_size() / len(batch) if share else 0.0
        rows = share or batch[:1]
        size = self.round.micro_batch_size or len(rows)
        pieces = [rows[i:i + size] for i in range(0, len(rows), size)]
        losses = []
        self.optimizer.zero_grad(set_to_none=True)
        for i, piece in enumerate(pieces):
            if world_size() > 1:
                trainer.require_backward_grad_sync = i == len(pieces) - 1    # as no_sync() does: once a step
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = trainer(*collate(piece, self.device))
            (loss.sum() * weight).backward()
            losses.append(loss.detach())
        update(self.arm, self.optimizer, self.round, self.progress.step)
        self.progress.step += 1
        self.progress.tokens += sum(len(example.prompt) + len(example.answer) for example in batch)
        self.pending.append(
            (self.progress.step, torch.cat(losses)[:len(share)], [example.id for example in share]),
        )
        show = agreed(time.monotonic() - self.last_line) > SECONDS_BETWEEN_LINES
        if show:
            self.read_losses()    # a GPU may be steps behind: its time counts too
        self.progress.seconds += time.monotonic() - started
        if show:
            self.print_progress()

    def read_losses(self) -> None:
        """Bring the losses since the last call from the device, and stop if one is not finite."""
        for step, losses, ids in self.pending:
            losses = gathered(losses.tolist())
            mean = sum(losses) / len(losses)
            if not mean < float("inf"):
                examples = ", ".join(gathered(ids))
                raise self.diverged(f"the loss at step {step} is {mean} (examples {examples})")
            self.progress.metrics.append({"step": step, "train_loss": mean})
        self.pending.clear()

    def diverged(self, says: str) -> ValueError:
        kept = "the last checkpoint is kept" if self.has_checkpoint() else "nothing was saved yet"
        return ValueError(f"{self.name}: {says}; {kept}; a lower lr may help, as in "
                          f"--set lr={self.round.lr / 3:.1g}")

    def print_progress(self) -> None:
        step, seconds = self.progress.step, self.progress.seconds
        total = self.round.steps if self.minutes is None else f"~{int(step * 60 * self.minutes / seconds)}"
        left = (seconds / step * (self.round.steps - step) if self.minutes is None
                else 60 * self.minutes - seconds)
        loss = self.progress.metrics[-1]["train_loss"]
        say(f"{self.name}: step {step}/{total}, loss {loss:.3f}, "
            f"{self.progress.tokens / seconds:,.0f} tokens/s, {duration(left)} left")
        self.last_line = time.monotonic()

    def scored(self, fs: FutureSeed | None) -> list[dict]:
        """Records of the whole validation set, in its order, on every process."""
        records = score(
            self.arm.model, self.validation_examples[rank()::world_size()], fs, device=self.device,
            batch_size=max(1, TOKENS_PER_EVALUATION_BATCH // self.round.max_prompt),
            task=self.round.task, step=self.progress.step, tokenizer=self.tokenizer,
            autocast=torch.bfloat16 if self.device.type == "cuda" else None,
        )
        by_id = {record["id"]: record for record in gathered(records)}
        return [by_id[example.id] for example in self.validation_examples]

    def evaluate(self) -> None:
        """Score the whole validation set and append what came out."""
        self.read_losses()
        step = self.progress.step
        records = self.scored(self.arm.fs)
        last = {"step": step, **summarise(records)}
        if not last["loss"] < float("inf"):
            raise self.diverged(f"the validation loss after step {step} is {last['loss']}")
        self.progress.records += records
        self.progress.metrics.append(last)
        say(f"{self.name}: step {step}, validation loss {last['loss']:.4f}, "
            f"token accuracy {last['accuracy']:.4f}, exact match {last['exact']:.4f}, F1 {last['f1']:.4f}")

    # -- what is kept on the disk

    def has_checkpoint(self) -> bool:
        return (self.folder / "checkpoint.pt").exists()

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.arm.load_state_dict(saved["arm"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.progress = Progress(**saved["progress"])
        except Exception as error:    # a damaged file raises half a dozen types
            raise ValueError(f"{path}: damaged ({str(error).splitlines()[0][:120]}); "
                             "use --fresh to start over") from error
        say(f"{self.name}: going on from step {self.progress.step}")

    def save(self) -> None:
        """Write the resumable checkpoint, then the files made from it; each whole or not at all."""
        self.read_losses()
        self.last_save = time.monotonic()
        if not is_main():
            return
        try:
            state = {"arm": self.arm.state_dict(), "optimizer": self.optimizer.state_dict(),
                     "progress": vars(self.progress)}
            save_tensors(state, self.folder / "checkpoint.pt")
            self.write_lines()
            self.write_run("running")
        except OSError as error:
            kept = "the previous checkpoint is kept" if self.has_checkpoint() else "nothing was saved before"
            raise OSError(f"{self.folder}: cannot save at step {self.progress.step} "
                          f"({error.strerror or error}); {kept}; free some space "
                          "and run the same command to go on") from error

    def write_lines(self) -> None:
        write_json_lines(self.folder / "metrics.jsonl", self.progress.metrics)
        write_json_lines(self.folder / "records.jsonl", self.progress.records)

    def write_run(self, status: str) -> None:
        if is_main():
            progress = {"status": status, "steps": self.progress.step, "seconds": int(self.progress.seconds)}
            with atomic_write(self.folder / "run.json", "w") as file:
                json.dump(self.identity | self.surroundings | progress, file, indent=1)


def write_json_lines(path: Path, lines: list[dict]) -> None:
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
