"""Run a round: post-train one base twice, without and with Future-Seed, and say what that changed.

    python train.py --list                            the rounds, the log's numbers, what is on disk
    python train.py --round R8 --seed 1               both arms; without a GPU in miniature, in minutes
    python train.py --round R8 --seed 1 --real        the real thing, whatever it takes
    python train.py --round R2 --seed 1 --base init:L12-D64 --set steps=20 n_train=64 n_val=32
    torchrun --nproc_per_node=4 train.py --round R2 R6 --seeds 0-9     processes share rounds and seeds

Both arms start from the same weights and take the same batches for the same number of steps. They differ in
nothing but fs.py's seed states. Batches are drawn by step, and there is no dropout. So weights, optimiser and
step make a checkpoint; the same command goes on from it, and on a CPU it ends with the same bits.

A seed lives in runs/R8/seed1 (on the stand-in: runs/standin/R8/seed1), an arm in its no_fs or prompt_fs:

    run.json         what the run is: settings, base, data; on which machine and code; how far it is
    metrics.jsonl    a line a step (train_loss) and a line an evaluation
    records.jsonl    a line an example and evaluation: all that eval.py needs
    controls.jsonl   prompt_fs, at the end: the same, its seed states switched off or from a wrong prompt
    checkpoint.pt    while it runs: all that is needed to go on
    model.pth        when it is done: the weights, in the official format; fs.pth: Future-Seed's own

Reference: the Future-Seed post-training experiment log; rounds.toml holds its recipes.
"""

import argparse
import copy
import hashlib
import math
import os
import platform
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import standin
from data import Example, batches, collate, download, fingerprint, load_examples
from eval import CONTROLS, explain, log_numbers, means_of, report, score, text_of_log
from files import (ARMS, NO_MEMORY, Progress, clear, complain, copy_twin, damage_told, duration, in_words,
                   locked, read_run, read_seed, refuse_another, save_tensors, say, status_of, twin_key,
                   write_json)
from fs import FutureSeed, answer_logits, answer_loss
from model import RWKV7, Config
from rounds import SETTINGS, Round, expand, load_rounds, seeds_of, with_settings
from tokenizer import Tokenizer

BASE_URL = "https://huggingface.co/BlinkDL/rwkv7-g1/resolve/main/"
SECONDS_BETWEEN_CHECKPOINTS = 300
TOKENS_PER_EVALUATION_BATCH = 16384
SOURCES = sorted(Path(__file__).resolve().parent.glob("*.[cp][uy]"))    # .py and .cu decide a run's numbers
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()


# ---- what was asked ----------------------------------------------------------------------------------------

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--round", nargs="+", default=[], metavar="R", help="as --list names them; R9 is R9a and R9b")
    option("--list", action="store_true", help="show the rounds and what is on disk, and stop")
    option("--seed", "--seeds", dest="seeds", metavar="N", help="one, or 0-9 or 0,3,5; default: the round's")
    option("--arm", choices=(*ARMS, "both"), default="both")
    option("--base", metavar="PATH|init|init:L12-D64", help="a .pth, or fresh; default: the round's own")
    option("--assets", type=Path, default=Path("assets"), metavar="DIR", help="of data and bases (assets)")
    option("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs go (runs)")
    option("--set", nargs="+", action="extend", default=[], metavar="key=value", dest="settings",
           help="change settings of the round, see --list")
    option("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    option("--minutes", type=float, metavar="M", help="the log's kind of budget, in place of steps")
    option("--fresh", action="store_true", help="start over, deleting what the arms' folders hold")
    option("--offline", action="store_true", help="never use the network")
    option("--standin", action="store_true", help="run in miniature, on made-up questions")
    option("--real", action="store_true", help="never run in miniature, with or without a GPU")
    args = parser.parse_args(argv)
    if not args.list and not args.round:
        parser.error("name a round with --round (python train.py --list shows them)")
    if args.standin and (args.base or args.minutes or args.real):
        parser.error("--standin has its own base and counts steps; leave --base, --minutes and --real out")
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        parser.error(f"--minutes {args.minutes}: must be more than 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device that torch can use")
    args.arms = list(ARMS) if args.arm == "both" else [args.arm]
    return args


def list_rounds(runs_dir: Path) -> None:
    """Every round's recipe, the log's numbers, recomputed, and the runs that are on the disk."""
    for name, recipe in load_rounds()[0].items():
        print(f"{name}: {recipe.title}")
        own = {key: value for key, value in recipe.settings().items() if value != getattr(Round, key, "")}
        print("   ", *(f"{key}={value}".lower() for key, value in own.items()))
        if recipe.log:
            print(f"    the log: {text_of_log(log_numbers(recipe))}")
        for path in sorted(runs_dir.glob(f"**/{name}/seed*/*/run.json")):
            try:
                run = read_run(path.parent)
                print(f"    on disk: {path.parent}, {run['status']} at step {run['steps']}")
            except ValueError as error:
                print(f"    on disk: {error}")
    print("\nsettings, for --set, and their defaults:")
    print("   ", *(f"{key}={getattr(Round, key, '')}".lower() for key in SETTINGS))


# ---- what it takes -----------------------------------------------------------------------------------------

class Material(NamedTuple):
    """What the arms are made from and scored on."""

    train: list[Example]
    validation: list[Example]
    base: RWKV7             # read once: both arms start from these tensors
    base_name: str
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Job:
    """One seed of a round: what its two arms have in common."""

    recipe: Round
    seed: int
    standin: bool
    minutes: float | None
    device: torch.device
    folder: Path            # runs/R8/seed1
    material: Material

    def identity(self, arm: str) -> dict:
        """What a run is. Where any of it differs it is another run."""
        train, validation, base, base_name, _ = self.material
        return {"round": self.recipe.name, "seed": self.seed, "arm": arm, "standin": self.standin,
                "settings": self.recipe.settings(), "minutes": self.minutes,
                "base": {"name": base_name, "sha256": base.sha256},
                "data": {"train": fingerprint(train), "validation": fingerprint(validation)}}

    def surroundings(self) -> dict:
        """What a run should not depend on, but for its last bits."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        machine = {"device": gpu or platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability(),
                   "threads": torch.get_num_threads(), "torch": str(torch.__version__),
                   "python": platform.python_version()}
        return {"code": CODE[:16], "machine": machine}


def find_base(choice: str | None, recipe: Round, assets: Path, offline: bool) -> tuple[RWKV7, str]:
    """The base that --base names, or the round's own, downloaded if need be; and its name."""
    fresh = re.fullmatch(r"init(?::L([1-9]\d*)-D([1-9]\d*))?", choice or "")
    if fresh:
        width = int(fresh[2] or 768)
        if width % 16:    # the width of a head, whose norm would drown what fewer channels hold
            raise ValueError(f"--base {choice}: the width must be a multiple of 16")
        config = Config.published(int(fresh[1] or 12), width, head_size=math.gcd(width, 64))
        return RWKV7.init(config, seed=0), f"init:L{config.n_layer}-D{width}"
    path = Path(choice) if choice else assets / "weights" / recipe.base
    if choice is None and not path.exists():
        download(BASE_URL + recipe.base, path, RWKV7.load, offline)
    return RWKV7.load(path), path.name


def real_material(recipe: Round, args: argparse.Namespace) -> Material:
    """What a Job needs of the publishers' data and base. FileNotFoundError, a line a file that is missing."""
    rules = dict(order=recipe.order, max_prompt=recipe.max_prompt, min_prompt=recipe.min_prompt,
                 max_answer=recipe.max_answer, assets=args.assets, offline=args.offline)
    found, missing = [], []
    for load in (
        lambda: load_examples(recipe.task, "train", n=recipe.n_train, seed=recipe.data_seed, **rules),
        lambda: load_examples(recipe.task, "validation", n=recipe.n_val, seed=recipe.validation_seed,
                              **rules),
        lambda: find_base(args.base, recipe, args.assets, args.offline),
    ):
        try:
            found.append(load())
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("\n".join(missing))
    train, validation, (base, name) = found
    largest = max(max(example.prompt + example.answer) for example in train + validation)
    if largest >= base.config.vocab_size:
        raise ValueError(f"{name} has a vocabulary of {base.config.vocab_size} tokens, and examples hold "
                         f"{largest}; use a base with the RWKV World vocabulary")
    if recipe.fs_layer_start >= base.config.n_layer:
        say(f"note: {name} has no layer {recipe.fs_layer_start}, fs_layer_start: nothing is seeded")
    return Material(train, validation, base, name, Tokenizer())


def standin_material(recipe: Round, seed: int, args: argparse.Namespace, progress: Progress) -> Material:
    """The same of the stand-in: the seed's own questions, and its base, trained here if it is not there."""
    path = standin.base_path(recipe, seed, args.assets)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)    # or fail before the work, not after
        standin.pretrain(recipe, seed, path, torch.device(args.device), progress)
    return Material(standin.training_examples(recipe, seed), standin.validation_examples(recipe),
                    RWKV7.load(path), "stand-in", standin.small_tokenizer())


def work_of(recipe: Round, arms: list[str]) -> float:
    """The tokens that a seed's arms may read; a training step counts three times, four if it recomputes."""
    training = (3 + recipe.checkpoint_activations) * recipe.steps * recipe.batch_size
    scoring = (1 + -(-recipe.steps // recipe.eval_every)) * recipe.n_val
    controls = len(CONTROLS) * recipe.n_val if "prompt_fs" in arms else 0
    return recipe.max_prompt * (len(arms) * (training + scoring) + controls)


def announce(recipe: Round, real: Round, reason: str, args: argparse.Namespace) -> None:
    """What is about to happen, before the first slow thing; with a reason, in miniature."""
    lines = [f"{recipe.name}: {recipe.title}"]
    if reason:
        lines += [f"ON THE STAND-IN, in miniature: {reason}",
                  f"made-up questions of {recipe.facts} facts, and a tiny base that is trained here first"]
    if args.device == "cpu" and args.base is None:
        # real prompts are 1.2 to 1.4 times min_prompt on average, and ARC's a seventh of max_prompt; the 0.1b
        # model multiplies 91 million weights with every token; one AMD EPYC core manages 55 GFLOP/s
        filled = max(1.25 * real.min_prompt / real.max_prompt, 1 / 7)
        taken = duration(work_of(real, args.arms) * filled * 2 * 91e6 / 55e9)
        lines.append(f"the real round takes about {taken} a seed on a CPU{'; --real runs it' * bool(reason)}")
    budget = f"{args.minutes:g} minutes" if args.minutes and not reason else f"{recipe.steps} steps"
    lines += [f"to do: {' and '.join(args.arms)}, {budget}, {recipe.batch_size} questions a step, scored on "
              f"{recipe.n_val} questions every {recipe.eval_every} steps",
              f"on {args.device}, into {args.runs / ('standin' if reason else '') / recipe.name}"]
    say("\n  ".join(lines))


# ---- one arm -----------------------------------------------------------------------------------------------

class Interrupt:
    """Makes a KeyboardInterrupt of Ctrl-C and SIGTERM: at once or, while `patient`, when a step is saved."""

    patient = False
    requested = 0

    def __call__(self, number, frame) -> None:
        if self.requested or not self.patient:
            raise KeyboardInterrupt(number)
        self.requested = number
        say("finishing this step, then saving; once more to stop at once")


@dataclass
class Ledger:
    """What a checkpoint holds beside weights and optimiser."""

    step: int = 0             # optimiser steps taken
    seconds: float = 0.0      # spent in them
    metrics: list[dict] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)    # from which step on it ran in which surroundings


def make_optimizer(model: RWKV7, fs: FutureSeed | None, recipe: Round) -> torch.optim.AdamW:
    """AdamW: weight decay on the matrices only, and Future-Seed's parameters at rates of their own."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith(".weight") and parameter.ndim == 2
        (matrices if is_matrix else others).append(parameter)
    # train_step sets the rates, which may have to rise to these first
    groups = [{"params": matrices, "full_lr": recipe.lr, "weight_decay": recipe.weight_decay},
              {"params": others, "full_lr": recipe.lr, "weight_decay": 0.0}]
    for name, parameter in fs.named_parameters() if fs is not None else ():
        full_lr = recipe.alpha_lr if name.startswith("alpha") else recipe.fs_gate_lr
        groups.append({"params": [parameter], "full_lr": full_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, betas=(0.9, recipe.beta2), fused=True)


class Arm:
    """One arm of a job: its model, optimiser and ledger, and what changes them."""

    def __init__(self, job: Job, name: str):
        self.job = job
        self.name = f"{job.recipe.name} seed {job.seed} {name}"
        self.folder = job.folder / name
        self.identity = job.identity(name)
        self.model = copy.deepcopy(job.material.base).to(job.device)
        self.model.checkpoint_activations = job.recipe.checkpoint_activations
        self.fs = None
        if name == "prompt_fs":
            self.fs = FutureSeed(self.model.config, **job.recipe.fs_settings()).to(job.device)
        self.optimizer = make_optimizer(self.model, self.fs, job.recipe)
        self.ledger = Ledger()

    def train_step(self, batch: list[Example]) -> float:
        """One optimiser step in pieces of micro_batch_size rows. Returns the loss, a mean over the batch."""
        recipe, device = self.job.recipe, self.job.device
        started = time.monotonic()
        size = recipe.micro_batch_size or len(batch)
        losses = []
        self.optimizer.zero_grad(set_to_none=True)
        for i in range(0, len(batch), size):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                prompt, lengths, answer, answer_lengths = collate(batch[i:i + size], device)
                logits, _ = answer_logits(self.model, self.fs, prompt, lengths, answer)
                loss = answer_loss(logits, answer, answer_lengths)
            (loss.sum() / len(batch)).backward()
            losses.append(loss.detach())
        if recipe.grad_clip:
            own = [] if self.fs is None else self.fs.parameters()
            torch.nn.utils.clip_grad_norm_([*self.model.parameters(), *own], recipe.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * min(1.0, (self.ledger.step + 1) / max(1, recipe.warm_up))
        self.optimizer.step()
        self.ledger.step += 1
        loss = torch.cat(losses).mean().item()    # waits for a GPU, so that its time counts
        self.ledger.seconds += time.monotonic() - started
        self.finite(loss, f"the loss at step {self.ledger.step} (examples {', '.join(e.id for e in batch)})")
        self.ledger.metrics.append({"step": self.ledger.step, "train_loss": loss})
        return loss

    def finite(self, loss: float, what: str) -> None:
        """Raises ValueError unless a loss is a number: of what follows, nothing could be kept."""
        if not loss < float("inf"):
            raise ValueError(f"{self.name}: {what} is {loss}; the last checkpoint is kept; a lower lr may "
                             f"help, as in --set lr={self.job.recipe.lr / 3:.1g}")

    def scored(self, progress: Progress, control: str | None = None) -> list[dict]:
        """Records of the whole validation set."""
        job, step, longest = self.job, self.ledger.step, self.job.recipe.max_prompt
        validation, rows = job.material.validation, max(1, TOKENS_PER_EVALUATION_BATCH // longest)
        what = f"its seed states {CONTROLS[control]}" if control else f"validation at step {step}"

        def tick(done, more):
            progress.tick(more * longest, f"{self.name}: {what}: {done} of {len(validation)} questions")

        return score(self.model, validation, self.fs, device=job.device, step=step, control=control,
                     batch_size=rows, tokenizer=job.material.tokenizer, tick=tick)

    def evaluate(self, progress: Progress) -> None:
        """Score the whole validation set and write down what came out."""
        records = self.scored(progress)
        means = means_of(records)
        self.finite(means["loss"], f"the validation loss after step {self.ledger.step}")
        self.ledger.records += records
        self.ledger.metrics.append({"step": self.ledger.step, **means})
        exact = "option accuracy" if self.job.recipe.task == "arc" else "exact match"
        say(f"{self.name}: step {self.ledger.step}, validation loss {means['loss']:.4f}, token accuracy "
            f"{means['acc']:.4f}, {exact} {means['EM']:.4f}")

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if any. ValueError if it is damaged or another run's."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            with damage_told(path):
                saved = torch.load(path, map_location="cpu", weights_only=True)
                identity, self.ledger = saved["identity"], Ledger(**saved["ledger"])
            refuse_another(path, identity, self.identity)
            self.model.load_state_dict(saved["model"])
            if self.fs is not None:
                self.fs.load_state_dict(saved["fs"])
            self.optimizer.load_state_dict(saved["optimizer"])
            say(f"{self.name}: going on from step {self.ledger.step}")
        here, history = self.job.surroundings(), self.ledger.history
        moved = in_words({key: history[-1][key] for key in here}, here) if history else ""
        if moved:
            say(f"{self.name}: not where it ran before ({moved}); the last bits may differ")
        if moved or not history:
            history.append({"from_step": self.ledger.step, **here})

    def save(self, status: str = "running") -> None:
        """Write the resumable checkpoint, then the files made from it; each whole or not at all."""
        ledger = self.ledger
        if status == "running":
            save_tensors({"identity": self.identity, "ledger": vars(ledger), "model": self.model.state_dict(),
                          "fs": self.fs and self.fs.state_dict(), "optimizer": self.optimizer.state_dict()},
                         self.folder / "checkpoint.pt")
        write_json(self.folder / "metrics.jsonl", ledger.metrics)
        write_json(self.folder / "records.jsonl", ledger.records)
        run = {**self.identity, "twin": twin_key(self.identity, ledger.history[0]), "status": status,
               "steps": ledger.step, "seconds": int(ledger.seconds), "history": ledger.history}
        write_json(self.folder / "run.json", [run], indent=1)

    def finish(self, controls: list[dict]) -> None:
        """Leave the folder complete."""
        self.model.save(self.folder / "model.pth")
        if self.fs is not None:
            write_json(self.folder / "controls.jsonl", controls)
            own = {key: value.cpu() for key, value in self.fs.state_dict().items()}
            save_tensors(own, self.folder / "fs.pth")
        self.save("done")
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)


def run_arm(job: Job, name: str, progress: Progress, interrupt: Interrupt) -> None:
    """Train an arm to the end of its budget, evaluating on the way, and leave its folder complete."""
    arm, recipe = Arm(job, name), job.recipe
    arm.resume()
    ledger = arm.ledger
    each = (3 + recipe.checkpoint_activations) * recipe.max_prompt
    progress.total -= each * ledger.step * recipe.batch_size    # an earlier process took these steps
    stream = batches(job.material.train, recipe.batch_size, job.seed, ledger.step, shuffle=not job.standin)
    saved = time.monotonic()
    while True:
        interrupt.patient = True
        # --minutes, the log's kind of budget, counts the seconds spent in training steps
        finished = ledger.seconds >= 60 * job.minutes if job.minutes else ledger.step >= recipe.steps
        evaluated = ledger.records and ledger.records[-1]["step"] == ledger.step
        due = (finished or ledger.step % recipe.eval_every == 0) and not evaluated
        if due or finished or interrupt.requested or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            arm.save()    # before an evaluation too: it may be killed
            saved = time.monotonic()
        if interrupt.requested:
            raise KeyboardInterrupt(interrupt.requested)
        if due:
            interrupt.patient = False    # nothing is lost where an evaluation is left
            arm.evaluate(progress)
            continue
        if finished:
            break
        batch = next(stream)
        loss = arm.train_step(batch)
        progress.tick(each * len(batch), f"{arm.name}: step {ledger.step} of {recipe.steps}, loss {loss:.3f}")
    interrupt.patient = False
    controls = []
    for control in CONTROLS if arm.fs is not None else ():
        controls += arm.scored(progress, control)
    arm.finish(controls)


# ---- the verdict -------------------------------------------------------------------------------------------

def run_seed(recipe: Round, seed: int, material: Material | None, args: argparse.Namespace,
             progress: Progress, interrupt: Interrupt) -> None:
    """One seed, from taking its folder to the report. Without material it runs on the stand-in."""
    folder = args.runs / ("standin" if material is None else "") / recipe.name / f"seed{seed}"
    with locked(folder):
        here = material or standin_material(recipe, seed, args, progress)
        minutes = args.minutes if material else None    # the stand-in's questions are made for its steps
        job = Job(recipe, seed, material is None, minutes, torch.device(args.device), folder, here)
        if args.fresh:
            clear(folder, args.arms)
        # of all arms before the first runs: a refusal comes at once
        states = [status_of(folder / arm, job.identity(arm)) for arm in args.arms]
        for arm, state in zip(args.arms, states):
            twin = twin_key(job.identity(arm), job.surroundings())
            if state == "done":
                say(f"{recipe.name} seed {seed} {arm}: done before; --fresh runs it again")
            elif state == "running" or args.fresh or not copy_twin(folder / arm, job.identity(arm), twin):
                run_arm(job, arm, progress, interrupt)
        if args.arm == "both":
            read_seed(folder)    # a report leaves out what is damaged, but not without a word on this seed
            result, text = report(folder.parent)
            print(text)
            if job.standin:
                print(explain(result, seed, here.validation, here.tokenizer, folder))


def reproducible(device: str) -> None:
    """From here on, the same command gives the same bits on the same machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # without it cuBLAS may differ between runs
    torch.use_deterministic_algorithms(True, warn_only=True)
    # or every new tensor would be filled first, though nothing here reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        # and on others: sums in AVX-512 end in other bits, and 250 steps make other models of them
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
                       "ONEDNN_MAX_CPU_ISA": "AVX2"}    # read at the libraries' first operation


def choose_material(real: Round, small: Round, args: argparse.Namespace) -> Material | None:
    """What all seeds of a round need of the publishers' data and base; None: it runs on the stand-in."""
    no_gpu = args.device == "cpu" and not args.real and args.base is None
    reason = "asked for with --standin" if args.standin else "there is no GPU" if no_gpu else ""
    if not reason:
        announce(real, real, "", args)
        try:
            return real_material(real, args)
        except FileNotFoundError as error:
            if args.real or args.base is not None:
                raise
            missing = [line.partition(";")[0] for line in str(error).splitlines()]
            reason = "\n    ".join(["the real data or base cannot be had:", *missing])
    announce(small, real, reason, args)
    return None


def run(args: argparse.Namespace, interrupt: Interrupt) -> int:
    """Every round and seed that was asked for. Returns the exit code: a seed that fails stops no other."""
    published, miniatures = load_rounds()
    names = expand(args.round, published)
    asked = seeds_of(args.seeds) if args.seeds else None
    # settings first: a wrong one is told before anything is loaded or made
    real = {name: with_settings(published[name], args.settings) for name in names}
    small = {name: with_settings(miniatures[name], args.settings) for name in names}
    jobs = [(name, seed) for name in names for seed in asked or real[name].seeds]
    # torchrun's processes share them: rounds and seeds do not depend on each other
    jobs = jobs[int(os.environ.get("RANK", 0))::int(os.environ.get("WORLD_SIZE", 1))]
    if "LOCAL_RANK" in os.environ and args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    threads = torch.get_num_threads()
    materials, failed = {}, False
    for number, (name, seed) in enumerate(jobs):
        try:
            if name not in materials:    # once a round: all its seeds get the same answer
                materials[name] = choose_material(real[name], small[name], args)
            made_up = materials[name] is None
            recipes = small if made_up else real
            progress = Progress(0.0)    # of all that is left, at this seed's own pace
            for later, its_seed in jobs[number:]:
                progress.total += work_of(recipes[later], args.arms)
                if made_up and not standin.base_path(small[later], its_seed, args.assets).exists():
                    progress.total += standin.base_work(small[later])
            # to small arrays a second thread is worth little; on a busy machine it costs ten times as much
            torch.set_num_threads(1 if made_up else threads)
            run_seed(recipes[name], seed, materials[name], args, progress, interrupt)
        except (ValueError, OSError) as error:
            complain(error)
            failed = True
    return 2 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, 2 for an error told in one line, or 130 or 143 when it was stopped."""
    args = parse_arguments(argv)
    interrupt = Interrupt()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        reproducible(args.device)
        if args.list:
            list_rounds(args.runs)
            return 0
        return run(args, interrupt)
    except KeyboardInterrupt as stop:
        again = "the same command without --fresh" if args.fresh else "the same command"
        say(f"stopped; what was saved is kept, and {again} goes on from there")
        return 128 + stop.args[0]
    except (ValueError, OSError) as error:
        complain(error)
        return 2
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and NO_MEMORY not in str(error):
            raise
        complain("out of memory; try --set micro_batch_size=1 checkpoint_activations=true max_prompt=1024")
        return 2


if __name__ == "__main__":
    sys.exit(main())
