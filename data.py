"""The tasks: records into prompts and answers, their files and downloads, your own questions, and batches.

ARC-Challenge (Clark et al. 2018, arXiv:1803.05457): a question, three to five labelled options, the answer a
label. HotpotQA, distractor setting (Yang et al. 2018, arXiv:1809.09600): ten paragraphs, a question, a short
answer. Both are read in their publishers' own formats, from an assets folder or downloaded into it. Prompts,
length rules and the way examples are drawn are those of the experiment log ("the log", see rounds.py), byte
for byte. Your own questions are put in HotpotQA's form.

Shapes: B examples in a batch, T tokens in its longest prompt, A tokens in its longest answer.
"""

import contextlib
import hashlib
import http.client
import json
import lzma
import math
import random
import shutil
import struct
import tempfile
import threading
import time
import urllib.request
import zipfile
import zlib
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
from filelock import FileLock
from torch.nn.utils.rnn import pad_sequence

from files import Progress, counted, read_lines, read_text, say
from tokenizer import Tokenizer

# (task, split): the file under the assets folder, and how many records the published file holds
FILES = {
    ("arc", "train"): ("arc/ARC-Challenge-Train.jsonl", 1119),
    ("arc", "validation"): ("arc/ARC-Challenge-Dev.jsonl", 299),
    ("arc", "test"): ("arc/ARC-Challenge-Test.jsonl", 1172),
    ("hotpotqa", "train"): ("hotpotqa/hotpot_train_v1.1.json", 90_447),
    ("hotpotqa", "validation"): ("hotpotqa/hotpot_dev_distractor_v1.json", 7_405),
}
ARC_ARCHIVE = "https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip"
ARC_FOLDER = "ARC-V1-Feb2018-2/ARC-Challenge/"      # inside the archive, which is 680 MB for 1 MB of it
HOTPOTQA_FOLDER = "http://curtis.ml.cmu.edu/datasets/hotpot/"
# a community's copy of the same files, for the publisher's server is not always there
HOTPOTQA_COPY = ("https://huggingface.co/datasets/namlh2004/hotpotqa/resolve/"
                 "7e54db4656209750ff487f6fdf8e39a66dba136b/")
HOTPOTQA_SHA256 = {             # of the publisher's files: they come without TLS, so their bytes are checked
    "hotpot_train_v1.1.json": "26650cf50234ef5fb2e664ed70bbecdfd87815e6bffc257e068efea5cf7cd316",
    "hotpot_dev_distractor_v1.json": "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
}
HOTPOTQA_COPY_SHA256 = {        # of the copy's files; that of its training file is not known here
    "hotpot_dev_distractor_v1.json": "e3da074df24e8369009918aa5cdbdd254dadcde4c63f7569d36afd6f2268caa8",
}
LARGEST_FILE = 8_000_000_000    # bytes of a download; RWKV-7 with 2.9 billion weights has 5.9
LARGEST_MEMBER = 64_000_000     # bytes of one file of the archive, unpacked
SECONDS_TO_ANSWER = 10          # a server that is silent for longer is given up
SECONDS_TO_BEGIN = 60           # a server that has sent too little in this time is given up, too:
SLOWEST = 20_000                # fewer bytes a second than this
SECONDS_BETWEEN_LOOKS = 0.2     # at the size of a file that is being received
# what zipfile raises for an archive that is damaged; OSError for a place before its beginning
DAMAGED_ARCHIVE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError,
                   OSError)


@dataclass(frozen=True)
class Example:
    """One question, tokenised."""
    id: str                                 # as the publisher or the user gave it
    prompt: list[int]                       # tokens, up to and including "Answer:"
    answer: list[int]                       # tokens to be predicted
    text: str                               # the gold answer: "A", "Barack Obama"
    choices: dict[str, int] | None          # ARC: label -> its first token; HotpotQA: None
    tail: int                               # how many of the prompt's tokens come after its first block
    cut: bool = False                       # True if it was longer than max_prompt and lost its start


# ---- records into prompts ----------------------------------------------------------------------------------

def clean(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ").strip()


def field(record: dict, key: str, kind: type):
    """record[key], which must be of this type; ValueError otherwise."""
    if not isinstance(record, dict) or not isinstance(record.get(key), kind):
        raise ValueError(f"{key!r} is missing or not a {kind.__name__}")
    return record[key]


def arrange(order: str, context: str, question: str) -> list[str]:
    """The blocks of a prompt in their order.

    The log has the first two orders. The others are what people do against a question that comes last: they
    put it at both ends, or have everything read twice (JRT-Prompt, arXiv:2407.05483).
    """
    return {
        "context_first": [context, question],
        "question_first": [question, context],
        "both_ends": [question, context, question],
        "twice": [context, question, context, question],
    }[order]


def read_arc(record: dict) -> tuple[str, str, str, list[str]] | None:
    """An official ARC record -> context, question, answer, labels; None where the log leaves it out."""
    question = field(record, "question", dict)
    stem = clean(field(question, "stem", str))
    options = sorted((clean(field(choice, "label", str)), clean(field(choice, "text", str)))
                     for choice in field(question, "choices", list))
    options = [option for option in options if all(option)]
    labels = [label for label, _ in options]
    answer = clean(field(record, "answerKey", str))[:1]
    if not stem or not answer or len(options) < 2:
        return None
    if len(set(labels)) < len(labels) or answer not in labels:
        raise ValueError(f"the answer {answer!r} should be one of the labels {labels}, each given once")
    context, question = prompt_blocks("arc", [f"{label}. {text}" for label, text in options], stem)
    return context, question, answer, labels


def read_hotpotqa(record: dict) -> tuple[str, str, str, None] | None:
    """An official HotpotQA record -> context, question, answer, None; None where the log leaves it out."""
    question = clean(field(record, "question", str))
    answer = clean(field(record, "answer", str))
    pieces = []
    for paragraph in field(record, "context", list):
        if not isinstance(paragraph, list) or [type(part) for part in paragraph] != [str, list]:
            raise ValueError("'context' should be a list of [title, [sentence, …]]")
        title, sentences = paragraph
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise ValueError(f"a sentence of the paragraph {title!r} is not a str")
        sentences = [clean(sentence) for sentence in sentences]
        text = " ".join(sentence for sentence in sentences if sentence)
        if clean(title):
            pieces.append(clean(title) + ":")
        if text:
            pieces.append(text)
    if not question or not answer or not pieces:
        return None
    context, question = prompt_blocks("hotpotqa", pieces, question)
    return context, question, answer, None


def read_own(record: dict) -> tuple[str, str, str, None]:
    """A user's own record -> context, question, answer, None. ValueError where one of them is missing."""
    parts = {key: field(record, key, str).strip() for key in ("context", "question", "answer")}
    for key, text in parts.items():
        if not text:
            raise ValueError(f"{key!r} is empty")
    if "\n" in parts["answer"]:
        raise ValueError("'answer' has a line break, and an answer is one line")
    context, question = prompt_blocks("own", [parts["context"]], parts["question"])
    return context, question, parts["answer"], None


def prompt_blocks(task: str, context: list[str], question: str) -> tuple[str, str]:
    """The two blocks that `arrange` puts into order: paragraphs or options, and the question."""
    if task == "arc":
        return "Options:\n" + "\n".join(context), f"Question:\n{question}"
    return "Context:\n" + "\n\n".join(context), f"Question:\n{question}"


def answer_cue(task: str, arc_border: str = "log") -> str:
    """What a prompt ends with, before the answer.

    The log's ARC prompt ends in a space, and its answer "A" has none. The tokenizer itself would put the
    space into the answer's token, " A", as arc_border "token" does and as it is in HotpotQA.
    """
    if task == "arc" and arc_border == "log":
        return "\n\nAnswer: "
    return "\n\nAnswer:"


def make_example(task: str, record: dict, tokenizer: Tokenizer, *, order: str, max_prompt: int,
                 max_answer: int, min_prompt: int = 0, end_mark: bool = False,
                 arc_border: str = "log") -> Example | None:
    """One record as an Example, or None where the log's rules leave it out.

    Args: task, "arc", "hotpotqa" or "own", says how the record is read; order, see `arrange`; lengths in
    tokens. A prompt keeps its last max_prompt tokens, and one shorter than min_prompt is left out. An answer
    keeps its first max_answer tokens. With end_mark a line break follows the answer, unless that was cut.
    Raises: ValueError where the record is malformed.
    """
    parts = {"arc": read_arc, "hotpotqa": read_hotpotqa, "own": read_own}[task](record)
    if parts is None:
        return None
    context, question, answer, labels = parts
    cue = answer_cue(task, arc_border)
    space = " "    # between the cue and the answer, unless the cue has it
    if cue.endswith(" "):
        space = ""

    def encoded(blocks: list[str]) -> list[int]:
        return tokenizer.encode("\n\n".join(blocks) + cue)

    blocks = arrange(order, context, question)
    whole = encoded(blocks)
    prompt = whole[-max_prompt:]
    unrepeated = prompt
    if len(blocks) > 2:
        # min_prompt applies to the unrepeated prompt, so that every order keeps the same records
        unrepeated = encoded([context, question])
    if len(unrepeated) < min_prompt:
        return None
    tail = min(len(encoded(blocks[1:])), len(prompt))
    choices = None
    if labels:
        choices = {label: tokenizer.encode(space + label)[0] for label in labels}
    answer_tokens = tokenizer.encode(space + answer)
    if end_mark and len(answer_tokens) <= max_answer:
        answer_tokens = answer_tokens + tokenizer.encode("\n")
    else:
        answer_tokens = answer_tokens[:max_answer]
    id_key = "id"
    if task == "hotpotqa":
        id_key = "_id"
    return Example(field(record, id_key, str), prompt, answer_tokens, answer, choices, tail,
                   cut=len(whole) > len(prompt))


def loses_question(example: Example, order: str) -> bool:
    """Whether the prompt's start was cut off, and with it the only question, as happens in the log."""
    return example.cut and order == "question_first"


# ---- files of records --------------------------------------------------------------------------------------

def fetch(url: str, path: Path) -> None:
    """Write what a server sends to `path`. OSError where it sends too slowly, too much or not all.

    Another thread receives, and this one watches the file grow. Otherwise a server that is slow in its
    headers would hold up whoever looks at the clock. Where the server is given up, the other thread ends by
    itself, because the file that it writes to is closed.
    """
    promised = None    # bytes, where the server says how many there are
    finished = Future()

    def receive() -> None:
        nonlocal promised
        try:
            with urllib.request.urlopen(url, timeout=SECONDS_TO_ANSWER) as answer:
                promised = answer.length
                if promised is not None and promised > LARGEST_FILE:
                    raise OSError(f"it would be {promised:,} bytes")
                while part := answer.read1(1 << 16):
                    file.write(part)
                    if file.tell() > LARGEST_FILE:
                        raise OSError(f"the server does not stop sending, after {file.tell():,} bytes")
            finished.set_result(None)
        except Exception as error:    # it is for the thread that waits
            finished.set_exception(error)

    with open(path, "wb") as file:
        progress = Progress()
        watched_since, received_then = time.monotonic(), 0
        threading.Thread(target=receive, daemon=True).start()
        while not finished.done():
            wait([finished], timeout=SECONDS_BETWEEN_LOOKS)
            received, seconds = file.tell(), time.monotonic() - watched_since
            # measured minute by minute, or a fast beginning would excuse hours of a byte a second
            if seconds > SECONDS_TO_BEGIN:
                if received - received_then < SLOWEST * seconds:
                    raise OSError(f"the server is too slow: {received - received_then:,} bytes in "
                                  f"{seconds:.0f} s")
                watched_since, received_then = time.monotonic(), received
            progress.total = promised
            so_far = f"{received / 1e6:.0f} MB"
            if promised is not None:
                so_far = f"{received / 1e6:.0f} of {promised / 1e6:.0f} MB"
            progress.tick(received, f"downloading {path.name}: {so_far}")
        finished.result()    # raises what went wrong in the other thread
        received = file.tell()
    if promised is not None and received < promised:
        raise OSError(f"the server sent {received:,} of {promised:,} bytes")


def sweep(folder: Path) -> None:
    """Delete what a killed download left in a folder, unless another process is downloading into it now."""
    leftovers = list(folder.glob(".download-*"))
    if leftovers:
        with contextlib.suppress(OSError), FileLock(folder / ".lock", timeout=0):
            for leftover in leftovers:
                shutil.rmtree(leftover)


def download(url: str, path: Path, check: Callable[[Path], object], offline: bool,
             unpack: Callable[[Path], None] | None = None, member: str = "") -> None:
    """Fetch url to path, whole and checked or not at all. One process at a time does this in a folder.

    Args: check, called with the file before it gets its name, raises ValueError to refuse it; unpack, called
    with the file in place of giving it that name; member, the file that a person would take out of the
    archive.
    Raises: FileNotFoundError, one line, where the file cannot be had or kept, and always if `offline`.
    """
    sweep(path.parent)
    try:
        if offline:
            raise OSError("downloads are off")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            if path.exists():    # another process has fetched it meanwhile
                return
            say(f"downloading {path.name} from {url.split('/')[2]}")
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
                part = Path(folder, path.name)
                fetch(url, part)
                check(part)
                if unpack is None:
                    part.rename(path)
                else:
                    unpack(part)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(f"could not download {path}: {reason}. Download {url} yourself and save "
                                f"{member or 'it'} as {path}.") from None


def unpack_arc(archive: Path, folder: Path) -> None:
    """Take ARC-Challenge's three files out of the archive. ValueError, and none is kept, if one is wrong.

    A file that is in the folder already is left alone.
    """
    with tempfile.TemporaryDirectory(dir=archive.parent) as place:
        for split in ("train", "validation", "test"):
            name, published = FILES["arc", split]
            path = Path(place, Path(name).name)
            path.write_bytes(read_member(archive, ARC_FOLDER + path.name))
            check_records(path, published)
        for path in Path(place).iterdir():
            if not (folder / path.name).exists():
                path.rename(folder / path.name)


def read_member(archive: Path, name: str) -> bytes:
    """One file out of a zip archive. ValueError if it is missing, damaged or too large."""
    try:
        with zipfile.ZipFile(archive) as members:
            member = members.getinfo(name)
            if member.file_size > LARGEST_MEMBER:
                raise ValueError(f"{name} would be {member.file_size:,} bytes")
            # any other method unpacks a whole member at once, however large that turns out to be
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"the archive is damaged: {name} is compressed by method "
                                 f"{member.compress_type}, and not as the published one")
            with members.open(member) as file:
                # the table of contents may lie, and without a bound zipfile unpacks all that there is
                return file.read(LARGEST_MEMBER)
    except KeyError:
        raise ValueError(f"the archive has no {name}") from None
    except DAMAGED_ARCHIVE as error:
        raise ValueError(f"the archive is damaged: {error}") from None


def check_records(path: Path, published: int) -> None:
    """ValueError unless a file holds as many records as the published one."""
    found = len(parse_records(path))
    if found != published:
        raise ValueError(f"not the published file: it holds {found:,} records, which should be {published:,}")


def check_sha256(path: Path, expected: str) -> None:
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected:
            raise ValueError("not the published file: its sha256 differs")


def find_file(task: str, split: str, assets: Path, offline: bool) -> Path:
    """The file of a task's records, downloaded if it is missing; FileNotFoundError if it cannot be had."""
    name, published = FILES[task, split]
    path = assets / name
    if path.exists():
        sweep(path.parent)
        return path
    if task == "arc":
        download(ARC_ARCHIVE, path, lambda archive: None, offline,
                 unpack=lambda archive: unpack_arc(archive, path.parent), member=ARC_FOLDER + path.name)
        return path

    def check_copy(file: Path) -> None:
        if path.name in HOTPOTQA_COPY_SHA256:
            check_sha256(file, HOTPOTQA_COPY_SHA256[path.name])
        check_records(file, published)

    try:
        download(HOTPOTQA_FOLDER + path.name, path,
                 lambda file: check_sha256(file, HOTPOTQA_SHA256[path.name]), offline)
    except FileNotFoundError as error:
        if offline:
            raise
        say(f"note: {error}")
        say("note: trying a community's copy, which is another file of the same records")
        download(HOTPOTQA_COPY + path.name, path, check_copy, offline)
    return path


def read_records(path: Path) -> list:
    """Every record of a .json or .jsonl file. ValueError names the file."""
    try:
        return parse_records(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}). Delete it, and it is fetched "
                         "again.") from None


def parse_records(path: Path) -> list:
    """The records of a .json file, which holds a list, or of a .jsonl file, which holds one a line."""
    if path.suffix == ".json":
        records = parse_json(read_text(path))
    else:
        records = []
        for number, line in read_lines(path):
            try:
                records.append(parse_json(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError("no records")
    return records


def parse_json(text: str):
    """A JSON value. ValueError, in one line, where the text is not JSON.

    The message leaves out Python's line number, which would be 1 for every line of a .jsonl file.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: too deeply nested") from None


# ---- examples ----------------------------------------------------------------------------------------------

def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over everything in the examples, in their order."""
    return hashlib.sha256(json.dumps([vars(example) for example in examples]).encode()).hexdigest()


def load_examples(task: str, split: str, *, order: str, max_prompt: int, min_prompt: int = 0, max_answer: int,
                  n: int | None, seed: int, assets: str | Path, offline: bool = False, end_mark: bool = False,
                  arc_border: str = "log") -> list[Example]:
    """The first n examples that qualify, of the records shuffled by `seed`, as in the log.

    Args: task, "arc" or "hotpotqa"; split, "train" or "validation" (ARC has "test" too); n, None for all;
    assets, the folder of the files, which are downloaded into it unless `offline`; the rest as in
    make_example. Raises FileNotFoundError without the file, ValueError for a malformed record, two of one id,
    or too few that qualify.
    """
    path = find_file(task, split, Path(assets), offline)
    if path.stat().st_size > 100e6:
        say(f"reading {path.name}, a quarter of a minute")
    records, published = read_records(path), FILES[task, split][1]
    if len(records) != published:
        say(f"note: {path} holds {len(records):,} records; the published file holds {published:,}")
    tokenizer = Tokenizer()
    indices = list(range(len(records)))
    random.Random(seed).shuffle(indices)
    examples = []
    for i in indices:
        if len(examples) == n:
            break
        try:
            example = make_example(task, records[i], tokenizer, order=order, max_prompt=max_prompt,
                                   max_answer=max_answer, min_prompt=min_prompt, end_mark=end_mark,
                                   arc_border=arc_border)
        except ValueError as error:
            raise ValueError(f"{path}: record {i + 1}: {error}") from None
        if example is not None:
            examples.append(example)
    if not examples or len(examples) < (n or 0):
        setting = "n_train" if split == "train" else "n_val"
        remedy = f"lower {setting} = {n}"
        if min_prompt > 0:
            remedy += " or min_prompt"
        raise ValueError(f"{path}: only {len(examples)} of {len(records)} records qualify (min_prompt = "
                         f"{min_prompt}); {remedy}")
    if len({example.id for example in examples}) < len(examples):
        raise ValueError(f"{path}: two of its records have the same id; restore the published file")
    lost = sum(loses_question(example, order) for example in examples)
    if lost:
        say(f"note: {lost} of {counted(len(examples), 'prompt')} of {path.name} had more than {max_prompt} "
            "tokens and lost the question, which came first, as in the log")
    return examples


def load_own_examples(folder: Path, split: str, *, order: str, max_prompt: int, max_answer: int, n: int,
                      min_prompt: int = 0, end_mark: bool = False) -> list[Example]:
    """A user's own questions, the first n in the order of the file.

    Args: folder, with train.jsonl and validation.jsonl, one JSON object a line: context, question, answer,
    and perhaps id (else the line's number); split, "train" or "validation"; the rest as in make_example.
    Raises: FileNotFoundError without the file; ValueError that names file, line and what is wrong.
    """
    path = Path(folder, f"{split}.jsonl")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: write one JSON object a line there, with context, "
                                "question and answer")
    try:
        lines = read_lines(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from None
    tokenizer = Tokenizer()
    examples, short = [], 0
    line_of = {}    # id -> the number of its line
    for number, line in lines:
        if len(examples) == n:
            break
        try:
            record = parse_json(line)
            if isinstance(record, dict):
                record.setdefault("id", number)
                if type(record["id"]) is int:
                    record["id"] = str(record["id"])
            example = make_example("own", record, tokenizer, order=order, max_prompt=max_prompt,
                                   max_answer=max_answer, min_prompt=min_prompt, end_mark=end_mark)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if example is None:
            short += 1
            continue
        if example.id in line_of:
            raise ValueError(f"{path}, line {number}: its id {example.id!r} is that of line "
                             f"{line_of[example.id]}")
        line_of[example.id] = number
        examples.append(example)
    if short:
        say(f"note: {short} of the {counted(len(lines), 'question')} in {path} had fewer than min_prompt = "
            f"{min_prompt} tokens and are left out")
    least = 1
    if split == "validation":
        least = 2    # one difference has no spread
    if len(examples) < least:
        raise ValueError(f"{path} holds {counted(len(examples), 'question')} that can be used. Write at "
                         f"least {counted(least, 'question')} there.")
    say(f"{path}: {counted(len(examples), 'question')}")
    cut = sum(example.cut for example in examples)
    if cut:
        lost = "their start"
        if order == "question_first":
            lost = "the question, which came first"
        say(f"note: {cut} of them had more than max_prompt = {max_prompt} tokens and lost {lost}")
    return examples


# ---- batches -----------------------------------------------------------------------------------------------

def batches(examples: Sequence[Example], batch_size: int, seed: int, start: int = 0,
            shuffle: bool = True) -> Iterator[list[Example]]:
    """Endless batches; those from step `start` on are the same whether or not the earlier ones were drawn.

    Every epoch gives each example once, in an order drawn from (seed, epoch). Windows of 16 batches are
    sorted by prompt length, so that rows of like length are padded together, and the batches are then
    shuffled again. One batch is smaller where batch_size does not divide the number of examples. Without
    `shuffle` the examples come in their own order, as the stand-in needs, whose questions get harder.
    """
    per_epoch = math.ceil(len(examples) / batch_size)
    epoch, skip = divmod(start, per_epoch)
    while True:
        rng = random.Random(f"{seed} {epoch}")
        order = list(range(len(examples)))
        if shuffle:
            rng.shuffle(order)
            window = 16 * batch_size
            for i in range(0, len(order), window):
                order[i:i + window] = sorted(order[i:i + window], key=lambda j: len(examples[j].prompt))
        groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        if shuffle:
            rng.shuffle(groups)
        for group in groups[skip:]:
            yield [examples[j] for j in group]
        epoch, skip = epoch + 1, 0


def pad(rows: Sequence[list[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as (B, T) int64 on `device`, right-padded with 0, and their lengths (B,).

    The lengths are on the CPU, where the model can look at them without waiting for a GPU.
    """
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return padded.to(device), torch.tensor([len(row) for row in rows])


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
    """prompt (B, T), prompt_lengths (B,), answer (B, A) and answer_lengths (B,), as `pad` makes them.

    The answers' lengths alone are on `device`, where the loss needs them.
    """
    prompt, prompt_lengths = pad([example.prompt for example in examples], device)
    answer, answer_lengths = pad([example.answer for example in examples], device)
    return prompt, prompt_lengths, answer, answer_lengths.to(device)
