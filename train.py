"""Run a round: post-train one base twice, without and with Future-Seed, and report what it changed.

    python train.py --round R8 --seed 1

Both arms start from the same weights and take the same batches in the same order for the same number of
steps; arm.py is one arm, this file is the command line around it. Running the same command again goes on
where it stopped, and does nothing more once both arms are done.

Reference: the Future-Seed post-training experiment log; rounds.toml holds its recipes.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from arm import ArmRun, Stopped, is_main, make_reproducible, say, world_size
from data import Example, load_examples
from download import download
from eval import write_summary
from files import locked
from model import RWKV7, Config
from records import ARMS
from rounds import SETTINGS, Round, expand, load_rounds, miniature, seeds_of, with_settings
from standin import (QUESTION_FIRST, SmallTokenizer, pretrain, small_tokenizer, training_examples,
                     validation_examples)
from tokenizer import Tokenizer

BASE_URL = "https://huggingface.co/BlinkDL/rwkv7-g1/resolve/main/"
EXAMPLES = """examples:
  python train.py --list                  the rounds, their recipes, the log's numbers, what is on disk
  python train.py --round R8 --seed 1     both arms of one seed, as in the log
  python train.py --round R9 --seeds 0-4  both parts of R9, five seeds each
  python train.py --round R2 --base my.pth --set lr=1e-4 steps=500
  python train.py --round R2 --seed 1 --base init:L12-D64 --set steps=20 n_train=64 n_val=32
                                          a smoke test, no weights needed
  python train.py --round S1 --seed 17 --standin
                                          on the built-in stand-in: a few minutes, nothing else needed
  torchrun --nproc_per_node=4 train.py --round R2
                                          four processes share each batch; where a batch has fewer rows
                                          than there are processes (R6 to R10), they take a seed each
"""


# ---- the base ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Base:
    """What both arms start from: an official checkpoint, or a freshly initialised model of given sizes."""

    path: Path | None    # None: a fresh model
    config: Config
    identity: dict       # name and sha256, for run.json

    def model(self) -> RWKV7:
        return RWKV7.load(self.path) if self.path else RWKV7.init(self.config, seed=0)


def find_base(choice: str | None, round: Round, assets: Path, offline: bool) -> Base:
    """The base that --base names, or the round's own from the assets folder, downloaded there if need be."""
    if choice is not None and (choice == "init" or choice.startswith("init:")):
        sizes = re.fullmatch(r"init(?::L(\d+)-D(\d+))?", choice)
        layers, width = (int(size) if size else None for size in sizes.groups()) if sizes else (0, 0)
        head_size = next((size for size in (64, 32, 16) if (width or 768) % size == 0), None)
        if layers == 0 or width == 0 or head_size is None:
            raise ValueError(f"--base {choice}: write init, or init:L12-D64 for 12 layers of 64 channels "
                             "(a multiple of 16)")
        config = Config.published(layers or 12, width or 768, head_size)
        return Base(None, config, {"name": f"init:L{config.n_layer}-D{config.n_embd}", "sha256": None})
    if choice is not None:
        path = Path(choice)
    else:
        path = assets / "weights" / round.base
        if not path.exists():
            download(BASE_URL + round.base, path, offline=offline)
    config = RWKV7.load(path).config    # loaded once to see that it is whole, again by each arm
    return Base(path, config, {"name": path.name, "sha256": sha256_of(path)})


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_vocabulary(base: Base, examples) -> None:
    """A base of another vocabulary would be indexed out of range, deep inside and without a name."""
    vocab_size = base.config.vocab_size
    largest = max(max(example.prompt + example.answer) for example in examples)
    if largest >= vocab_size:
        raise ValueError(f"{base.identity['name']} has a vocabulary of {vocab_size} tokens, but the examples "
                         f"hold token {largest}: it needs a base trained with the RWKV World vocabulary "
                         "of 65536")


# ---- the command line --------------------------------------------------------------------------------------

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Post-train RWKV-7 on a round of the log, without and with Future-Seed, "
                    "and report the difference.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--round", nargs="+", default=[], metavar="R",
                        help="R2 to R10 (R9 is R9a and R9b), S1 to S11; standin trains the stand-in's bases")
    parser.add_argument("--list", action="store_true", help="show the rounds and what is on disk, and stop")
    parser.add_argument("--seed", type=int, help="draws the batches; default: the log's seeds of the round")
    parser.add_argument("--seeds", metavar="LIST", help="several seeds, as 0-9 or 0,3,5")
    parser.add_argument("--arm", choices=(*ARMS, "both"), default="both")
    parser.add_argument("--base", metavar="PATH|init|init:L12-D64",
                        help="an official .pth, or fresh weights; "
                             "default: the round's own, from the assets folder")
    parser.add_argument("--assets", type=Path, default=Path("assets"), metavar="DIR",
                        help="where data and base are, or are downloaded to (default: assets)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR",
                        help="where runs go (default: runs)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value",
                        dest="settings", help="change settings of the round, see --list")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, metavar="M",
                        help="the log's kind of budget: "
                             "minutes of training an arm in place of the round's steps")
    parser.add_argument("--fresh", action="store_true",
                        help="start over, deleting what the arms' folders hold")
    parser.add_argument("--offline", action="store_true", help="never use the network")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--standin", action="store_true",
                      help="run on the built-in stand-in, as rounds do whose base or data cannot be had")
    kind.add_argument("--real", action="store_true", help="never run on the stand-in")
    args = parser.parse_args(argv)
    if not args.list and not args.round:
        parser.error("name a round with --round (python train.py --list shows them)")
    if args.standin and args.base is not None:
        parser.error("--standin has a base of its own; leave --base out")
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        parser.error(f"--minutes {args.minutes}: must be more than 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device that torch can use; "
                     "leave it out to use the CPU")
    return args


def chosen_seeds(args: argparse.Namespace, default: tuple[int, ...]) -> list[int]:
    if args.seed is not None and args.seeds is not None:
        raise ValueError("give --seed or --seeds, not both")
    if args.seed is not None:
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed}: must be 0 or more")
        return [args.seed]
    return list(default) if args.seeds is None else seeds_of(args.seeds)


def check_writable(folder: Path, option: str) -> None:
    """Raises OSError where a folder cannot be written, or made: before hours of work, not after."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(f"{folder}: cannot be written; name another folder with {option} DIR")


def list_rounds(runs: Path) -> None:
    """Every round's recipe, the log's numbers, and the seeds that are on disk."""
    for name, round in load_rounds().items():
        print(f"{name}: {round.title}")
        trained = " trained" if round.fs_alpha_lr else ""
        gradient = "" if round.fs_detach else ", not detached"
        print(f"    prompts up to {round.max_prompt} tokens, {round.n_train} / {round.n_val} examples, batch "
              f"{round.batch_size}, {round.steps} steps, lr {round.lr:g}; alpha {round.fs_alpha:g}{trained} "
              f"from layer {round.fs_layer_start}, schedule {round.fs_schedule}{gradient}")
        if round.log:
            deltas = " ".join(f"{delta:+.4f}" for delta in round.log.d_acc)
            print(f"    the log: d_acc {deltas}, mean {round.log.mean:+.4f} ± {round.log.std:.4f}; "
                  f"{round.log.status}")
        found = sorted(path.parent.parent.name + "/" + path.parent.name
                       for path in runs.glob(f"{name}/seed*/*/run.json"))
        print(f"    on disk: {', '.join(found) or 'nothing'}")
    print("\nsettings, for --set:", ", ".join(SETTINGS))


@dataclass(frozen=True)
class Material:
    """What both arms of a seed are made from, and the round as it then runs."""

    round: Round
    train: list[Example]
    validation: list[Example]
    base: Base
    tokenizer: Tokenizer


class Missing(FileNotFoundError):
    """Files that are not there and could not be downloaded, a message each."""

    def __init__(self, messages: list[str]):
        super().__init__("; ".join(messages))
        self.messages = messages


def real_material(round: Round, args: argparse.Namespace) -> Material:
    """The publishers' data and base. Raises Missing where any of it cannot be had."""
    if round.facts:
        raise ValueError("--set facts: only questions of the stand-in have facts; add --standin")
    rules = dict(order=round.order, max_prompt=round.max_prompt, min_prompt=round.min_prompt,
                 max_answer=round.max_answer, assets=args.assets, offline=args.offline)
    wanted = (
        lambda: load_examples(round.task, "train", n=round.n_train, seed=round.data_seed, **rules),
        lambda: load_examples(round.task, "validation", n=round.n_val, seed=round.validation_seed, **rules),
        lambda: find_base(args.base, round, args.assets, args.offline),
    )
    found, missing = [], []
    for load in wanted:
        try:
            found.append(load())
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise Missing(missing)
    train, validation, base = found
    check_vocabulary(base, train + validation)
    if round.fs_layer_start >= base.config.n_layer:
        say(f"note: {base.identity['name']} has {base.config.n_layer} layers and fs_layer_start is "
            f"{round.fs_layer_start}: nothing is seeded, and both arms are the same")
    return Material(round, train, validation, base, Tokenizer())


def standin_material(round: Round, seed: int, args: argparse.Namespace) -> Material:
    """The seed's own questions and base, made up and trained here."""
    round = with_settings(miniature(round), args.settings)
    if not round.facts:
        raise ValueError("--set facts=0: the stand-in's questions need 2 facts or more; use --real")
    if args.minutes is not None:
        raise ValueError("--minutes: the stand-in's questions are made step by step, so its budget is steps; "
                         "use --set steps=N")
    tokenizer = small_tokenizer()
    path = standin_base(round.task, seed, args, tokenizer)
    base = Base(path, RWKV7.load(path).config, {"name": "stand-in", "sha256": sha256_of(path)})
    examples = training_examples(round, seed, tokenizer), validation_examples(round, tokenizer)
    try:
        check_vocabulary(base, examples[0] + examples[1])
    except ValueError as error:
        raise ValueError(f"{error}; delete {path} to have it made again") from None
    return Material(round, *examples, base, tokenizer)


def standin_base(task: str, seed: int, args: argparse.Namespace, tokenizer: SmallTokenizer) -> Path:
    """Where a seed's stand-in base lies, trained first if it is not there."""
    path = args.assets / "weights" / f"standin-{task}-seed{seed}.pth"
    if is_main() and not path.exists():
        check_writable(path.parent, "--assets")
        pretrain(task, seed, path, tokenizer, torch.device(args.device))
    if world_size() > 1:
        dist.barrier()
    return path


@functools.cache    # once a process for every reason
def announce_standin(reason: str) -> None:
    say(f"""
{"=" * 100}
STAND-IN: {reason}
So this runs on made-up questions, from a tiny base that is trained here first: see standin.py.
It shows the method at work; its numbers say nothing about the real round, and are marked wherever they go.
--real insists on the real thing and says what to put where; --standin asks for this straight away.
{"=" * 100}
""")


def find_real(round: Round, args: argparse.Namespace) -> Material | None:
    """The real material, or None, after a notice, where it is unwanted or cannot be had."""
    if args.standin:
        announce_standin("asked for with --standin")
        return None
    try:
        return real_material(round, args)
    except Missing as error:
        if args.real or args.base is not None:
            raise
        reasons = [message.partition(";")[0] for message in error.messages]    # without what to do
        announce_standin("\n    ".join(["the real data or base cannot be had:", *reasons]))
        return None


def show_answers(material: Material, folder: Path, n: int = 4) -> None:
    """A few validation questions of the stand-in, which fit on a line, with both arms' answers."""
    answers = {}
    for arm in ARMS:
        lines = (folder / arm / "records.jsonl").read_text(encoding="utf-8").splitlines()
        answers[arm] = [json.loads(line)["text"].strip() for line in lines[-len(material.validation):]]
    for i, example in enumerate(material.validation[:n]):
        print("  " + " ".join(material.tokenizer.decode(example.prompt).replace("\n\n", ", ").split()))
        given = ", ".join(f"{arm} says {answers[arm][i]}" for arm in ARMS)
        print(f"    right is {example.text}; {given}")
    prompt = material.tokenizer.decode(material.validation[0].prompt).replace("\n", "\\n")
    print(f"  to ask it yourself: python eval.py --checkpoint {folder}/prompt_fs/model.pth --ask $'{prompt}'")


def run_seed(material: Material, seed: int, args: argparse.Namespace) -> None:
    """Both arms of one seed, or the one that --arm names, then the round's summary."""
    round = material.round
    folder = args.runs / round.name / f"seed{seed}"
    arms = [ArmRun(material, seed, arm, folder / arm, args)
            for arm in (ARMS if args.arm == "both" else [args.arm])]
    if args.fresh:
        for arm in arms if is_main() else []:
            shutil.rmtree(arm.folder, ignore_errors=True)
        if world_size() > 1:
            dist.barrier()    # no process may look at a folder that is about to go
    states = [arm.state() for arm in arms]    # of all before the first runs: a refusal comes at once
    for arm, state in zip(arms, states):
        if state == "done":
            say(f"{arm.name}: done before; --fresh runs it again")
            continue
        with locked(arm.folder) if is_main() else contextlib.nullcontext():
            if args.fresh or not arm.copy_twin(args.runs):
                arm.run()
    if is_main() and args.arm == "both":
        as_published = load_rounds()[round.name]    # what --set changed is for the report to say
        try:
            print(write_summary(as_published, args.runs)[1])
        except ValueError as error:    # the run itself is fine: another seed on the disk does not go with it
            say(f"note: {round.name} seed {seed} is complete, but the round has no report: {error}")
        else:
            if round.facts:
                show_answers(material, folder)


def make_standins(args: argparse.Namespace, share: slice) -> None:
    """--round standin: train the bases of the stand-in, each once."""
    tokenizer = small_tokenizer()
    for task in QUESTION_FIRST:
        for seed in chosen_seeds(args, (0, 1, 2))[share]:
            say(f"{standin_base(task, seed, args, tokenizer)} is there")


def run(args: argparse.Namespace) -> None:
    if args.list:
        list_rounds(args.runs)
        return
    # settings first: a wrong one is told before anything is loaded or made, and seeds may be among them
    all_rounds = load_rounds()
    rounds = [with_settings(all_rounds[name], args.settings)
              for name in expand([name for name in args.round if name != "standin"])]
    seeds = [chosen_seeds(args, round.seeds) for round in rounds]
    check_writable(args.runs, "--runs")
    share = slice(None)
    processes = int(os.environ.get("WORLD_SIZE", 1))    # set by torchrun
    if processes > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if min((round.batch_size for round in rounds), default=0) >= processes:
            # to share batches
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        else:
            # too small to share: each has its own seeds
            share = slice(int(os.environ["RANK"]), None, processes)
    threads = torch.get_num_threads()
    if "standin" in args.round:
        torch.set_num_threads(1)
        make_standins(args, share)
    for round, round_seeds in zip(rounds, seeds):
        real = find_real(round, args)    # once a round: no seed of it may get another answer
        # to the small arrays of the stand-in a second thread is worth 20%, and on a busy machine it makes
        # a step ten times slower
        torch.set_num_threads(threads if real else 1)
        for seed in round_seeds[share]:
            run_seed(real or standin_material(round, seed, args), seed, args)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, 2 for an error told in one line, or 130 or 143 when it was stopped."""
    args = parse_arguments(argv)
    make_reproducible()
    try:
        run(args)
        return 0
    except Stopped as stop:
        say(str(stop))
        return 128 + stop.signal
    except KeyboardInterrupt:
        say("stopped at once; what was saved before is kept, and the same command goes on from there")
        return 130
    except torch.OutOfMemoryError:
        say("error: out of memory; lower micro_batch_size or set checkpoint_activations=true, as in "
            "--set micro_batch_size=1 checkpoint_activations=true, or lower max_prompt")
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
