"""Run a round: post-train one base model twice, without and with Future-Seed, and say what that changed.

    python train.py --list                            the rounds, the settings, the log's numbers, your runs
    python train.py --round R8 --seed 1               both arms; without a GPU on the stand-in, in minutes
    python train.py --round R8 --seed 1 --real        the published model and records, whatever it takes
    python train.py --round S20 --seeds 0-5 --data DIR                 your own questions, see README.md
    python train.py --round R2 --seed 1 --base init:L12-D64 --set steps=20 n_train=64 n_val=32
    torchrun --nproc_per_node=4 train.py --round R2 R6 --seeds 0-9     four processes share rounds and seeds

The two trainings of a seed are its arms: no_fs without Future-Seed, prompt_fs with it. Both start from the
same weights and take the same batches for the same number of steps. They differ in nothing but fs.py's seed
states. A batch depends on the seed and the step alone, and there is no dropout. So weights, optimizer and
step make a checkpoint. The same command goes on from it, and on a CPU it ends with the same bits.

A seed lives in runs/R8/seed1 (on the stand-in in runs/standin/R8/seed1), and each arm in a folder of its own:

    run.json         what the run is: settings, base, data; on which machine and code; how far it is
    metrics.jsonl    a line a step (train_loss) and a line an evaluation
    records.jsonl    a line an example and evaluation: all that eval.py needs
    controls.jsonl   prompt_fs alone, at the end: records with its seed states switched off, or made from
                     a wrong prompt
    checkpoint.pt    while the arm is trained: all that is needed to go on
    model.pth        when the arm is done: the weights, in the official format; fs.pth: Future-Seed's own

To read this file as a story, begin with `main` at the end and go up: main, choose_material, run_seed,
train_arm, Arm.train_step.

Reference: the Future-Seed post-training experiment log; rounds.toml holds its recipes.
"""

import files

if __name__ == "__main__":
    files.stop_from_the_first_line()    # the imports below take seconds

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import os
import platform
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple

import torch

from data import Example, batches, collate, fingerprint, loses_question
from eval import answer_budget, means_of, score
from files import Progress, complain, counted, delete_folders, owned, say, tell, write_json
from fs import FutureSeed, answer_logits, answer_loss
from material import Material, cpu_time, own_examples, own_material, real_material, standin_material
from model import RWKV7, write_pt
from report import explain, log_numbers, text_of_log, write_report
from rounds import Round, check_together, expand, load_rounds, seeds_of, setting_lines, with_settings
from runs import (ARMS, CONTROLS, FOLDERS, NO_MEMORY, check_comparable, copy_identical_no_fs, differences,
                  in_words, naming_damage, read_checkpoint, read_run, read_seed, status_of)

SECONDS_BETWEEN_CHECKPOINTS = 300
TOKENS_PER_EVALUATION_BATCH = 16384
LOSSES_SHOWN = 20                      # the terminal shows the mean loss of this many steps
ORDERS = {"context_first": "the question last", "question_first": "the question first",
          "both_ends": "the question at both ends", "twice": "everything read twice"}
SOURCES = sorted(path for path in Path(__file__).resolve().parent.iterdir() if path.suffix in (".py", ".cu"))
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]


# ---- where it runs, and how it is stopped ------------------------------------------------------------------

def surroundings(device: torch.device) -> dict:
    """Code version and machine. They should change only the last bits of the numbers."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    machine = {"device": name, "cpu": torch.backends.cpu.get_cpu_capability(),
               "threads": torch.get_num_threads(), "torch": str(torch.__version__),
               "python": platform.python_version()}
    return {"code": CODE, "machine": machine}


class Interrupt:
    """The handler of Ctrl-C and SIGTERM. It raises KeyboardInterrupt at once or, while a stop has to wait,
    after the next save, when the loop calls stop_if_requested."""

    def __init__(self):
        self.waits = False
        self.requested = 0    # the number of a signal that came while a stop had to wait

    def __call__(self, number, frame) -> None:
        if self.requested or not self.waits:
            raise KeyboardInterrupt(number)
        self.requested = number
        say("finishing this step, then saving; once more to stop at once")

    def stop_if_requested(self) -> None:
        if self.requested:
            raise KeyboardInterrupt(self.requested)

    @contextlib.contextmanager
    def waiting(self, waits: bool) -> Iterator[None]:
        """Decide, for the block, whether a stop waits until the work is saved (True) or comes at once."""
        before, self.waits = self.waits, waits
        try:
            if not waits:
                self.stop_if_requested()
            yield
        finally:
            self.waits = before


# ---- one arm -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Experiment:
    """One seed of a round: what its two arms have in common."""

    recipe: Round
    seed: int
    material: Material
    minutes: float | None    # of training an arm, in place of the recipe's steps
    device: torch.device
    folder: Path             # runs/R8/seed1

    def identity(self) -> dict:
        """Everything that identifies a run but its arm. If any field differs, it is a different run."""
        material = self.material
        cut = sum(loses_question(example, self.recipe.order) for example in material.validation)
        return {"round": self.recipe.name, "seed": self.seed, "source": material.source,
                "settings": self.recipe.settings(), "minutes": self.minutes,
                "base": {"name": material.base_name, "sha256": material.base.sha256},
                "data": {"train": fingerprint(material.train), "questions_cut": cut,
                         "validation": fingerprint(material.validation)}}


def make_optimizer(model: RWKV7, fs: FutureSeed | None, recipe: Round) -> torch.optim.AdamW:
    """AdamW. Weight decay is on the matrices alone. Future-Seed's parameters have other learning rates."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    # train_step sets each group's lr from its full_lr, to which it may have to rise first
    groups = [{"params": matrices, "full_lr": recipe.lr, "weight_decay": recipe.weight_decay},
              {"params": others, "full_lr": recipe.lr, "weight_decay": 0.0}]
    if fs is not None:
        for name, parameter in fs.named_parameters():
            full_lr = recipe.fs_gate_lr
            if name.startswith("alpha"):
                full_lr = recipe.alpha_lr
            groups.append({"params": [parameter], "full_lr": full_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, betas=(0.9, recipe.beta2), fused=True)


class Arm:
    """One arm of an experiment: its model and optimizer, how far it is, and what came out so far."""

    def __init__(self, experiment: Experiment, identity: dict, check_owner=lambda: None):
        recipe = experiment.recipe
        self.experiment, self.recipe, self.identity = experiment, recipe, identity
        self.check_owner = check_owner    # raises ValueError if another process has taken the folder
        self.folder = experiment.folder / identity["arm"]
        self.name = f"{recipe.name} seed {experiment.seed} {identity['arm']}"
        # a copy, because the other arm starts from the same tensors
        self.model = copy.deepcopy(experiment.material.base).to(experiment.device)
        self.model.checkpoint_activations = recipe.checkpoint_activations
        self.fs = None
        if identity["arm"] == "prompt_fs":
            self.fs = FutureSeed(self.model.config, **recipe.fs_settings()).to(experiment.device)
        self.optimizer = make_optimizer(self.model, self.fs, recipe)
        self.step = 0             # optimizer steps taken
        self.seconds = 0.0        # spent in these steps
        self.metrics: list[dict] = []
        self.records: list[dict] = []
        self.controls: list[dict] = []
        self.history: list[dict] = []    # the code and the machine that it ran on, each from some step on
        self.saved = time.monotonic()    # when this arm was last saved, or else begun

    # -- training

    def train_step(self, batch: list[Example]) -> None:
        """One optimizer step on the mean loss of a batch, read in pieces of micro_batch_size rows."""
        device = self.experiment.device
        started = time.monotonic()
        rows = self.recipe.micro_batch_size or len(batch)
        losses = []
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(0, len(batch), rows):
            # products in bf16 on a GPU; on a CPU all is fp32, so that a run can be repeated to the bit
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                prompt, lengths, answer, answer_lengths = collate(batch[first:first + rows], device)
                logits, _ = answer_logits(self.model, self.fs, prompt, lengths, answer)
                loss = answer_loss(logits, answer, answer_lengths)
            (loss.sum() / len(batch)).backward()    # pieces add up to the gradient of the batch's mean
            losses.append(loss.detach())
        if self.recipe.grad_clip > 0:
            parameters = list(self.model.parameters())
            if self.fs is not None:
                parameters += self.fs.parameters()
            torch.nn.utils.clip_grad_norm_(parameters, self.recipe.grad_clip)
        warmth = min(1.0, (self.step + 1) / max(1, self.recipe.warm_up))
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * warmth
        self.optimizer.step()
        self.step += 1
        mean = torch.cat(losses).mean().item()    # a GPU is waited for here, so that its time counts
        self.seconds += time.monotonic() - started
        ids = ", ".join(example.id for example in batch)
        self.check_finite(mean, f"the loss at step {self.step} (examples {ids})")
        self.metrics.append({"step": self.step, "train_loss": mean})

    def budget_spent(self) -> bool:
        """Whether training is over. --minutes, the log's kind of budget, counts time in train_step alone."""
        if self.experiment.minutes is not None:
            return self.seconds >= 60 * self.experiment.minutes
        return self.step >= self.recipe.steps

    def show_progress(self, progress: Progress) -> None:
        """Say every few seconds how far this arm is. Batches differ in difficulty, so the loss is a mean."""
        losses = [line["train_loss"] for line in self.metrics if "train_loss" in line][-LOSSES_SHOWN:]
        shown = (f"loss {sum(losses) / len(losses):.3f} (mean of {counted(len(losses), 'step')}), "
                 f"{self.seconds / self.step:.2g} s a step")
        if self.experiment.minutes is None:
            text = f"{self.name}: step {self.step} of {self.recipe.steps}, {shown}"
            progress.tick(self.step, text, self.seconds)
        else:
            progress.tick(self.seconds, f"{self.name}: step {self.step}, {shown}", self.seconds)

    def check_finite(self, loss: float, what: str) -> None:
        """ValueError unless a loss is finite. After NaN the weights are lost, and so is all later work."""
        if not loss < float("inf"):
            raise ValueError(f"{self.name}: {what} is {loss}. The last checkpoint is kept. A lower learning "
                             f"rate may help, as in --set lr={self.recipe.lr / 3:.1g}")

    # -- scoring

    def evaluated(self) -> bool:
        return bool(self.records) and self.records[-1]["step"] == self.step

    def evaluate(self) -> None:
        """Score the whole validation set and keep what came out."""
        records = self.scored(f"validation at step {self.step}")
        means = means_of(records)
        self.check_finite(means["loss"], f"the validation loss after step {self.step}")
        self.records += records
        self.metrics.append({"step": self.step, **means})
        exact_match = "exact match"
        if self.recipe.task == "arc":
            exact_match = "option accuracy"
        say(f"{self.name}: step {self.step}, validation loss {means['loss']:.4f}, token accuracy "
            f"{means['acc']:.4f}, {exact_match} {means['EM']:.4f}")

    def score_controls(self) -> None:
        """Score the trained arm again, with its seed states switched off or made from a wrong prompt."""
        if self.fs is not None:
            for control, what in CONTROLS.items():
                self.controls += self.scored(f"its seed states {what}", control)

    def scored(self, what: str, control: str | None = None) -> list[dict]:
        """The records of the whole validation set; `what` says on the terminal what is being scored."""
        material = self.experiment.material
        questions = len(material.validation)
        progress = Progress(questions)

        def tick(done: int) -> None:
            progress.tick(done, f"{self.name}: {what}, {done} of {counted(questions, 'question')}")

        rows = max(1, TOKENS_PER_EVALUATION_BATCH // self.recipe.max_prompt)
        return score(self.model, material.validation, self.fs, device=self.experiment.device, step=self.step,
                     control=control, batch_size=rows, tokenizer=material.tokenizer,
                     max_new=answer_budget(self.recipe, material.source), tick=tick)

    # -- the disk

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if there is one. ValueError if it is damaged or another's."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            ids = [example.id for example in self.experiment.material.validation]
            saved = read_checkpoint(path, self.identity, ids)
            with naming_damage(path):
                self.take_over(saved)
            say(f"{self.name}: going on from step {self.step}")
        now = surroundings(self.experiment.device)
        moved = []
        if self.history:
            before = {key: self.history[-1][key] for key in now}
            moved = differences(before, now)
        if moved:
            say(f"{self.name}: resuming on a different machine or code version "
                f"({in_words(moved, 'before', 'now')}); results may differ in the last bits")
        if moved or not self.history:
            self.history.append({"from_step": self.step, **now})

    def take_over(self, saved: dict) -> None:
        """Load a checkpoint's contents. Raises an error of any type where its tensors do not fit this arm."""
        self.model.load_state_dict(saved["model"])
        if self.fs is not None:
            self.fs.load_state_dict(saved["fs"])
        # a checkpoint holds the moments alone: learning rates and decay come from the recipe
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved["optimizer"], "param_groups": groups})
        if saved["step"] > 0:
            self.check_moments(saved["step"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.metrics, self.records, self.history = saved["metrics"], saved["records"], saved["history"]

    def check_moments(self, step: int) -> None:
        """Raise an error of any type unless the optimizer has moments of `step` steps for each parameter."""
        parameters = list(self.model.parameters())
        if self.fs is not None and self.fs.layer_start < self.model.config.n_layer:
            parameters += self.fs.parameters()    # where no layer is seeded, they get no gradient
        for parameter in parameters:
            if parameter.requires_grad:
                moments = self.optimizer.state[parameter]
                fits = moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape
                if not fits or moments["step"].item() != step:
                    raise ValueError("its optimizer does not fit its model")

    def save(self) -> None:
        """Write the resumable checkpoint, then the files that show it; each whole or not at all."""
        self.check_owner()
        fs_weights = None
        if self.fs is not None:
            fs_weights = self.fs.state_dict()
        checkpoint = {"identity": self.identity, "step": self.step, "seconds": self.seconds,
                      "metrics": self.metrics, "records": self.records, "history": self.history,
                      "model": self.model.state_dict(), "fs": fs_weights,
                      "optimizer": self.optimizer.state_dict()["state"]}
        write_pt(checkpoint, self.folder / "checkpoint.pt")
        self.write_lines("running")
        self.saved = time.monotonic()

    def finish(self) -> None:
        """Leave the folder complete: weights, controls, and a run.json that says done."""
        self.check_owner()
        self.model.save(self.folder / "model.pth")
        if self.fs is not None:
            write_json(self.folder / "controls.jsonl", self.controls)
            write_pt({name: tensor.cpu() for name, tensor in self.fs.state_dict().items()},
                     self.folder / "fs.pth")
        self.write_lines("done")
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def write_lines(self, status: str) -> None:
        """Write what people and eval.py read: metrics, records and, last, run.json with the status."""
        write_json(self.folder / "metrics.jsonl", self.metrics)
        write_json(self.folder / "records.jsonl", self.records)
        run = self.identity | {"status": status, "steps": self.step, "seconds": int(self.seconds),
                               "history": self.history}
        write_json(self.folder / "run.json", [run], indent=1)


def train_arm(arm: Arm, interrupt: Interrupt) -> None:
    """Train an arm to the end of its budget, evaluating on the way, and leave its folder complete."""
    recipe, material = arm.recipe, arm.experiment.material
    arm.resume()
    budget = recipe.steps
    if arm.experiment.minutes is not None:
        budget = 60 * arm.experiment.minutes
    progress = Progress(budget)
    # the stand-in's questions get harder with every step, so they come as they are
    stream = batches(material.train, recipe.batch_size, arm.experiment.seed, arm.step,
                     shuffle=material.source != "standin")
    with interrupt.waiting(True):    # a stop waits for a save, so that no step is lost
        for batch in stream:
            finished = arm.budget_spent()
            if (finished or arm.step % recipe.eval_every == 0) and not arm.evaluated():
                arm.save()
                with interrupt.waiting(False):    # an evaluation is not waited for: it can be made again
                    arm.evaluate()
            if finished:
                break
            arm.train_step(batch)
            arm.show_progress(progress)
            if interrupt.requested or time.monotonic() - arm.saved > SECONDS_BETWEEN_CHECKPOINTS:
                arm.save()
            interrupt.stop_if_requested()
        arm.save()
    interrupt.stop_if_requested()
    arm.score_controls()
    with interrupt.waiting(True):    # this takes seconds, and then nothing is left half done
        arm.finish()
    interrupt.stop_if_requested()


# ---- both arms of a seed -----------------------------------------------------------------------------------

def run_seed(recipe: Round, seed: int, source: str, material: Material | None, args: argparse.Namespace,
             seeds_asked: list[int], interrupt: Interrupt) -> None:
    """One seed of a round, from taking its folder to the report.

    Args: source and material, as choose_material gives them; seeds_asked, all seeds of the command, whose
    runs --fresh starts over.
    """
    device = torch.device(args.device)
    minutes = args.minutes
    if source == "standin":
        minutes = None    # the stand-in makes its questions step by step, so its budget is steps
    folder = args.runs / FOLDERS[source] / recipe.name / f"seed{seed}"
    with owned(folder) as check_owner:
        replaced = set()
        if args.fresh:
            replaced = set(seeds_asked)
        # what can be refused is refused before anything is deleted or trained. This first look knows neither
        # base nor questions, and comes before the stand-in trains a base
        known = {"seed": seed, "source": source, "settings": recipe.settings(), "minutes": minutes}
        check_comparable(folder.parent, known, args.arms, replaced)
        if source == "standin":
            material = standin_material(recipe, seed, args.assets, device, surroundings(device))
        experiment = Experiment(recipe, seed, material, minutes, device, folder)
        identity = experiment.identity()
        identities = {arm: identity | {"arm": arm} for arm in args.arms}
        check_comparable(folder.parent, identity, args.arms, replaced)
        if args.fresh:
            delete_folders([folder / arm for arm in args.arms])
        # of both arms before one is trained: the second may hold a different run, which is refused
        statuses = {arm: status_of(folder / arm, identities[arm]) for arm in args.arms}
        for arm in args.arms:
            if statuses[arm] == "done":
                # a run that was killed in its last moment is done, but has kept its checkpoint
                (folder / arm / "checkpoint.pt").unlink(missing_ok=True)
                say(f"{recipe.name} seed {seed} {arm}: this run is done; --fresh starts it over")
                continue
            if statuses[arm] == "absent" and not args.fresh:
                if copy_identical_no_fs(folder / arm, identities[arm], surroundings(device)):
                    continue
            train_arm(Arm(experiment, identities[arm], check_owner), interrupt)
        if args.arm == "both":
            tell_outcome(experiment)


def tell_outcome(experiment: Experiment) -> None:
    """Print the report on all seeds of the round, and on the stand-in what came out in words."""
    folder = experiment.folder
    read_seed(folder)    # for its errors: the report leaves a damaged seed out, and this one must not be
    result, text = write_report(folder.parent)
    tell(text)
    if experiment.material.source == "standin":
        tell(explain(result, experiment.seed, experiment.material.validation, folder))


# ---- the command -------------------------------------------------------------------------------------------

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--round", nargs="+", default=[], metavar="R", help="as --list names them; R9 is R9a and R9b")
    option("--list", action="store_true", help="show rounds, settings and the runs on the disk, and stop")
    option("--seed", "--seeds", dest="seeds", metavar="N", help="one, or 0-9 or 0,3,5; default: the round's")
    option("--arm", choices=(*ARMS, "both"), default="both")
    option("--data", type=Path, metavar="DIR", help="your own DIR/train.jsonl, DIR/validation.jsonl")
    option("--base", metavar="PATH|init|init:L12-D64", help="a .pth, or fresh; default: the round's own")
    option("--assets", type=Path, default=Path("assets"), metavar="DIR", help="of downloads (assets)")
    option("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs go (runs)")
    option("--set", nargs="+", action="extend", default=[], metavar="key=value", dest="settings",
           help="change settings of the round, see --list")
    option("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    option("--minutes", type=float, metavar="M", help="the log's kind of budget, in place of steps")
    option("--fresh", action="store_true", help="start over, deleting what the arms' folders hold")
    option("--offline", action="store_true", help="never use the network")
    option("--standin", action="store_true", help="run on the stand-in: made-up questions and a tiny base")
    option("--real", action="store_true", help="never run on the stand-in, with or without a GPU")
    args = parser.parse_args(argv)
    if not args.list and not args.round:
        parser.error("name a round with --round (python train.py --list shows them)")
    if args.standin and (args.base or args.minutes or args.real or args.data):
        parser.error("--standin has its own base and questions and counts steps; leave --base, --data, "
                     "--minutes and --real out")
    if args.data and args.real:
        parser.error("--data and --real are two sources of questions; leave one out")
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        parser.error(f"--minutes {args.minutes}: must be more than 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device that torch can use")
    args.arms = [args.arm]
    if args.arm == "both":
        args.arms = list(ARMS)
    return args


def list_rounds(runs_dir: Path) -> None:
    """Every round's recipe, the log's numbers, recomputed, and the runs that are on the disk."""
    for name, recipe in load_rounds()[0].items():
        tell(f"{name}: {recipe.title}")
        words = []
        if recipe.inherits:
            words.append(f"as {recipe.inherits};")
        for key, value in recipe.settings().items():
            if value != getattr(Round, key, None):    # the default, where the setting has one
                words.append(f"{key}={value}".lower())
        tell("    " + " ".join(words))
        if recipe.log:
            tell(f"    the log: {text_of_log(log_numbers(recipe))}")
        for path in sorted(runs_dir.glob(f"**/{name}/seed*/*/run.json")):
            try:
                run = read_run(path.parent)
                tell(f"    on disk: {path.parent}, {run['status']} at step {run['steps']}")
            except (ValueError, OSError) as error:
                tell(f"    on disk: {error}")
    tell("\nsettings, for --set, with their defaults:")
    for line in setting_lines():
        tell(f"    {line}")


def share_of_this_process(jobs: list) -> list:
    """The jobs of this process: every WORLD_SIZE-th from the RANK-th on, as torchrun sets these two."""
    numbers = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not text.isascii() or not text.isdigit():
            raise ValueError(f"{name}={text}: must be a whole number, as torchrun sets it")
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if size < 1:
        raise ValueError("WORLD_SIZE=0: must be a whole number of 1 or more")
    if rank >= size:
        raise ValueError(f"RANK={rank} WORLD_SIZE={size}: RANK must be from 0 to WORLD_SIZE - 1")
    return jobs[rank::size]


def make_reproducible(device: torch.device) -> None:
    """From here on, the same command gives the same bits on the same machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # without it cuBLAS may differ between runs
    torch.use_deterministic_algorithms(True, warn_only=True)
    # else every new tensor is filled first, and nothing here reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        # sums in AVX-512 end in other bits, and after 250 steps these have become another model. AVX2 for all
        # keeps processors of one maker alike; an Intel and an AMD processor still differ (study/LOG.md)
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
                       "ONEDNN_MAX_CPU_ISA": "AVX2"}    # read at the libraries' first operation


def announce(recipe: Round, source: str, lines: list[str], args: argparse.Namespace) -> None:
    """Say what is about to happen, before the first slow thing. `lines` say where the questions come from."""
    budget = counted(recipe.steps, "step")
    if args.minutes is not None and source != "standin":
        budget = f"{args.minutes:g} minutes"
    lines = [f"{recipe.name}: {recipe.title}", *lines,
             f"to do: {' and '.join(args.arms)}, {budget}, {counted(recipe.batch_size, 'question')} a step, "
             f"scored on {counted(recipe.n_val, 'question')} every {counted(recipe.eval_every, 'step')}",
             f"on {args.device}, into {args.runs / FOLDERS[source] / recipe.name}"]
    say("\n  ".join(lines))


def choose_material(real: Round, on_standin: Round,
                    args: argparse.Namespace) -> tuple[str, Round, Material | None]:
    """Decide where a round's questions come from, and say so.

    Args: real and on_standin, the round's recipe on real records and on the stand-in.
    Returns: the source, "own", "real" or "standin"; the recipe for it; and the material that all seeds share,
        None on the stand-in, where every seed has its own.
    """
    if args.data:
        check_together(real, "these settings")
        train, validation = own_examples(real, args.data)
        recipe = dataclasses.replace(real, n_val=len(validation))
        lines = [f"OWN DATA, {args.data}: {counted(len(train), 'question')} to train on"]
        if args.device == "cpu" and args.base is None:
            tokens = sum(len(example.prompt) for example in train) / len(train)
            time_needed = cpu_time(recipe, args.arms, tokens)
            lines.append(f"this takes about {time_needed} a seed on one core of a CPU; a smaller --base "
                         "takes less")
        announce(recipe, "own", lines, args)
        material = own_material(real, train, validation, args.base, args.assets, args.offline)
        return "own", real, material
    slow = args.device == "cpu" and args.base is None    # the 0.1b model without a GPU
    # real prompts are about 1.25 times min_prompt long, and ARC's a seventh of max_prompt
    tokens = max(1.25 * real.min_prompt, real.max_prompt / 7)
    hours = f"the real round takes about {cpu_time(real, args.arms, tokens)} a seed on one core of a CPU"
    if args.standin:
        reason = "asked for with --standin"
    elif slow and not args.real:
        reason = "there is no GPU"
    else:
        check_together(real, "these settings")
        lines = []
        if slow:
            lines.append(hours)
        announce(real, "real", lines, args)
        try:
            return "real", real, real_material(real, args.base, args.assets, args.offline)
        except FileNotFoundError as error:
            if args.real or args.base is not None:
                raise    # whoever insists on the real round, or names a base, gets no stand-in instead
            reason = f"the real data or base cannot be had\n{error}".replace("\n", "\n    ")
    lines = [f"ON THE STAND-IN, in miniature: {reason}",
             f"a tiny base first learns to answer made-up questions on {on_standin.facts} facts, with the",
             f"question first; then the arms are trained and scored with {ORDERS[on_standin.order]}"]
    if slow:
        lines.append(f"{hours}; --real runs it")
    check_together(on_standin, "these settings")
    announce(on_standin, "standin", lines, args)
    return "standin", on_standin, None


class Plan(NamedTuple):
    """A round that was asked for."""

    real: Round               # its recipe on the publishers' records, or on a user's own questions
    on_standin: Round         # its recipe on the stand-in
    seeds_asked: list[int]    # of the whole command
    seeds: list[int]          # this process's share of them


def plans_of(args: argparse.Namespace) -> list[Plan]:
    """The rounds in which this process has seeds to run. ValueError for a wrong name, setting or seed."""
    published, on_standin = load_rounds()
    names = expand(args.round, published)
    seeds_asked = {name: list(published[name].seeds) for name in names}
    if args.seeds is not None:
        seeds_asked = dict.fromkeys(names, seeds_of(args.seeds))
    share = share_of_this_process([(name, seed) for name in names for seed in seeds_asked[name]])
    plans = []
    for name in names:
        real = published[name]
        if args.data:    # the shortest prompt that a round takes is about HotpotQA's articles
            real = dataclasses.replace(real, min_prompt=0)
        plan = Plan(real=with_settings(real, args.settings),
                    on_standin=with_settings(on_standin[name], args.settings),
                    seeds_asked=seeds_asked[name],
                    seeds=[seed for seed in seeds_asked[name] if (name, seed) in share])
        if plan.seeds:
            plans.append(plan)
    return plans


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, 2 for an error told in one line, or 130 or 143 when it was stopped."""
    args = parse_arguments(argv)
    device = torch.device(args.device)
    warnings.showwarning = lambda message, *_: say(f"note: {message}")    # on one line, as all messages
    interrupt = Interrupt()
    failed = False
    try:
        # until here a stop has ended the process; from here on it is an exception, which is caught below
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        make_reproducible(device)
        if args.list:
            list_rounds(args.runs)
            return 0
        if "LOCAL_RANK" in os.environ and args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        threads = torch.get_num_threads()
        for plan in plans_of(args):
            try:
                source, recipe, material = choose_material(plan.real, plan.on_standin, args)
            except (ValueError, OSError) as error:
                complain(error)    # the other rounds run all the same, and so do the other seeds below
                failed = True
                continue
            threads_used = threads
            if source == "standin":
                # small arrays gain little from a second thread, and on a busy machine they lose much
                threads_used = 1
            torch.set_num_threads(threads_used)
            for seed in plan.seeds:
                try:
                    run_seed(recipe, seed, source, material, args, plan.seeds_asked, interrupt)
                except (ValueError, OSError) as error:
                    complain(error)
                    failed = True
    except KeyboardInterrupt as stop:
        again = "the same command"
        if args.fresh:
            again += " without --fresh"
        say(f"stopped; what was saved is kept, and {again} goes on from there")
        number = signal.SIGINT
        if stop.args:    # our handler's exception has the number of the signal, and Python's own has none
            number = stop.args[0]
        return 128 + number
    except (ValueError, OSError) as error:
        complain(error)
        failed = True
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and NO_MEMORY not in str(error):
            raise
        complain("out of memory; try --set micro_batch_size=1 checkpoint_activations=true max_prompt=1024")
        failed = True
    if failed:
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
