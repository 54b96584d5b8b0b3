"""The tasks: records into prompts and answers, their files, and batches.

ARC-Challenge (Clark et al. 2018, arXiv:1803.05457): a question, three to five labelled options, the answer a
label. HotpotQA, distractor setting (Yang et al. 2018, arXiv:1809.09600): ten paragraphs, a question, a short
answer. Both are read in their publishers' own formats, from an assets folder or downloaded into it. The
prompts, the length rules and the way examples are drawn are those of the experiment log, byte for byte;
`order` says which comes first, the question or what it is about (the options, the context).

Shapes: B examples in a batch, T tokens in its longest prompt, A tokens in its longest answer.
"""

import functools
import hashlib
import json
import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import torch

from download import download, read_members
from files import atomic_write
from tokenizer import VOCABULARY_SHA256, Tokenizer

CACHE_FORMAT = 1                # raise it whenever the same settings would give other examples

# (task, split): file under the assets folder, records in the published file
FILES = {
    ("arc", "train"): ("arc/ARC-Challenge-Train.jsonl", 1119),
    ("arc", "validation"): ("arc/ARC-Challenge-Dev.jsonl", 299),
    ("arc", "test"): ("arc/ARC-Challenge-Test.jsonl", 1172),
    ("hotpotqa", "train"): ("hotpotqa/hotpot_train_v1.1.json", 90_447),
    ("hotpotqa", "validation"): ("hotpotqa/hotpot_dev_distractor_v1.json", 7_405),
}
ARC_ARCHIVE = "https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip"
ARC_FOLDER = "ARC-V1-Feb2018-2/ARC-Challenge/"      # inside the archive
HOTPOTQA_FOLDER = "http://curtis.ml.cmu.edu/datasets/hotpot/"
HOTPOTQA_SHA256 = {             # fetched without TLS, so more than the number of records is checked
    "hotpot_train_v1.1.json": "26650cf50234ef5fb2e664ed70bbecdfd87815e6bffc257e068efea5cf7cd316",
    "hotpot_dev_distractor_v1.json": "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
}
CHUNK = 1 << 22                 # bytes read at once
OPENING = re.compile(r"[ \t\r\n]*\[[ \t\r\n]*(?=\{)")      # what stands before a JSON list's first record
BETWEEN = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=\{)")       # and before each later one
LONGEST_RECORD = 1 << 26        # bytes: a longer record is damage, and reading on would fill the memory


@dataclass(frozen=True)
class Example:
    """One question, tokenised."""
    id: str                                 # the publisher's
    prompt: list[int]                       # tokens, up to and including "Answer:"
    answer: list[int]                       # tokens to be predicted
    text: str                               # the gold answer: "A", "Barack Obama"
    choices: dict[str, list[int]] | None    # ARC: label -> its answer tokens; HotpotQA: None


# ---- records into prompts ----------------------------------------------------------------------------------

def clean(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ").strip()


def field(record: dict, key: str, kind: type):
    """record[key], which must be of this kind; ValueError otherwise."""
    if not isinstance(record, dict) or not isinstance(record.get(key), kind):
        raise ValueError(f"{key!r} is missing or not a {kind.__name__}")
    return record[key]


def read_arc(record: dict, order: str) -> tuple[str, str, list[str]] | None:
    """An official ARC record -> prompt, answer label, all labels; None where the log leaves it out."""
    question = field(record, "question", dict)
    stem = clean(field(question, "stem", str))
    options = []
    for choice in field(question, "choices", list):
        option = (clean(field(choice, "label", str)), clean(field(choice, "text", str)))
        if all(option):
            options.append(option)
    options.sort(key=lambda option: option[0])
    labels = [label for label, _ in options]
    answer = clean(field(record, "answerKey", str))[:1]
    if not stem or not answer or len(options) < 2:
        return None
    if len(set(labels)) < len(labels) or answer not in labels:
        raise ValueError(f"the answer {answer!r} should be one of the labels {labels}, each given once")
    options_block = "Options:\n" + "\n".join(f"{label}. {text}" for label, text in options)
    blocks = [options_block, f"Question:\n{stem}"]
    if order == "question_first":
        blocks.reverse()
    # the log's prompt ends in a space here and the answer has none; with HotpotQA it is the other way round
    return "\n\n".join(blocks) + "\n\nAnswer: ", answer, labels


def read_hotpotqa(record: dict, order: str) -> tuple[str, str, None] | None:
    """An official HotpotQA record -> prompt, answer, None; None where the log leaves it out."""
    question = clean(field(record, "question", str))
    answer = clean(field(record, "answer", str))
    pieces = []
    for paragraph in field(record, "context", list):
        if not isinstance(paragraph, list) or len(paragraph) != 2:
            raise ValueError("'context' should be a list of [title, [sentence, …]]")
        title, sentences = paragraph
        if not isinstance(title, str) or not isinstance(sentences, list):
            raise ValueError("'context' should be a list of [title, [sentence, …]]")
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise ValueError(f"a sentence of the paragraph {title!r} is not a str")
        if clean(title):
            pieces.append(clean(title) + ":")
        pieces.append(" ".join(clean(sentence) for sentence in sentences if clean(sentence)))
    context = "\n\n".join(piece for piece in pieces if piece)
    if not question or not answer or not context:
        return None
    blocks = [f"Context:\n{context}", f"Question:\n{question}"]
    if order == "question_first":
        blocks.reverse()
    return "\n\n".join(blocks) + "\n\nAnswer:", answer, None


def make_example(task: str, record: dict, tokenizer: Tokenizer, *, order: str, max_prompt: int,
                 max_answer: int, min_prompt: int = 0) -> Example | None:
    """One official record as an Example, or None where the log's rules leave it out.

    Args: order, "context_first" or "question_first"; lengths in tokens. Prompts keep their last max_prompt
    tokens, those shorter than min_prompt are left out, answers keep their first max_answer tokens.
    Raises ValueError for a malformed record.
    """
    read, id_key = (read_arc, "id") if task == "arc" else (read_hotpotqa, "_id")
    parts = read(record, order)
    if parts is None:
        return None
    prompt, answer, labels = parts
    prompt_tokens = tokenizer.encode(prompt)[-max_prompt:]
    if len(prompt_tokens) < min_prompt:
        return None
    space = " " if task == "hotpotqa" else ""
    choices = {label: tokenizer.encode(label)[:max_answer] for label in labels} if labels else None
    answer_tokens = tokenizer.encode(space + answer)[:max_answer]
    return Example(field(record, id_key, str), prompt_tokens, answer_tokens, answer, choices)


# ---- files of records --------------------------------------------------------------------------------------

@functools.cache        # once a process: the same is true of both splits
def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def index_records(path: Path) -> tuple[list[tuple[int, int]], str]:
    """Where each record of a .jsonl or .json file lies, [start, end) in bytes, and the file's sha256.

    One pass in bounded memory: HotpotQA's 540 MB as Python objects would take gigabytes. JSON's own
    punctuation is ASCII, so the bytes can be scanned as latin-1, where a character is a byte: places in the
    text are places in the file. Raises ValueError that names the first damaged record.
    """
    digest = hashlib.sha256()
    spans: list[tuple[int, int]] = []
    decoder = json.JSONDecoder()
    text, base, position = "", 0, 0     # text is the file from byte `base`; what is before `position` is done
    with open(path, "rb") as file:
        if path.suffix == ".jsonl":
            for line in file:
                digest.update(line)
                if line.strip():
                    spans.append((base, base + len(line)))
                base += len(line)
            return spans, digest.hexdigest()
        while len(text) - position < LONGEST_RECORD:
            start = (BETWEEN if spans else OPENING).match(text, position)
            if start:
                try:
                    position = decoder.raw_decode(text, start.end())[1]
                    spans.append((base + start.end(), base + position))
                    continue
                except (ValueError, RecursionError):
                    pass                    # the record may go on in the next chunk
            chunk = file.read(CHUNK)
            if not chunk:
                break
            digest.update(chunk)
            text = text[position:] + chunk.decode("latin-1")
            base, position = base + position, 0
    if text[position:].strip(" \t\r\n") != "]" or not spans:
        raise ValueError(f"{path}: record {len(spans) + 1} (from byte {base + position:,}) is damaged or cut "
                         "off; delete the file to have it downloaded again")
    return spans, digest.hexdigest()


def read_cache(path: Path):
    """What write_cache put there, or None where there is none or it is damaged."""
    try:
        checksum, _, payload = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if checksum != hashlib.sha256(payload).hexdigest().encode():
        return None
    return json.loads(payload)


def write_cache(path: Path, value) -> None:
    payload = json.dumps(value, separators=(",", ":")).encode()
    try:
        with atomic_write(path) as file:
            file.write(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
    except OSError as error:
        note(f"{path.parent} cannot be written ({error.strerror}); without a cache every start takes longer")


def indexed(path: Path, cache_folder: Path, cache: bool) -> tuple[list[tuple[int, int]], str]:
    """index_records, remembered until the file changes.

    A file counts as unchanged while its size, inode and both times are: the change time moves with every
    write and cannot be set back by a program, so nothing is read that was not indexed, without hashing 540 MB
    at every start.
    """
    info = path.stat()
    stamp = [info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns]
    store = cache_folder / f"{path.name}.index"
    known = read_cache(store) if cache else None
    if known and known["stamp"] == stamp:
        return known["spans"], known["sha256"]
    if info.st_size > 10 * CHUNK:
        note(f"indexing {path} ({info.st_size / 1e6:.0f} MB), once")
    spans, sha256 = index_records(path)
    if cache:
        write_cache(store, {"stamp": stamp, "sha256": sha256, "spans": spans})
    return spans, sha256


def check_hotpotqa(part: Path, name: str, published: int) -> None:
    """ValueError unless a downloaded file is the published one."""
    spans, sha256 = index_records(part)
    if sha256 != HOTPOTQA_SHA256[name]:
        raise ValueError(f"it holds {len(spans):,} records with sha256 {sha256[:9]}…; {published:,} were "
                         f"published, with {HOTPOTQA_SHA256[name][:9]}…")


def find_file(task: str, split: str, assets: Path, offline: bool) -> Path:
    """The file of a task's records, downloaded if it is missing; FileNotFoundError if it cannot be had."""
    name, published = FILES[task, split]
    path = assets / name
    if task == "hotpotqa":
        check = functools.partial(check_hotpotqa, name=path.name, published=published)
        download(HOTPOTQA_FOLDER + path.name, path, check, offline)
    elif not path.exists():
        member = ARC_FOLDER + path.name
        try:
            if offline:
                raise FileNotFoundError("downloads are off")
            content = read_members(ARC_ARCHIVE, [member])[member]
            count = sum(1 for line in content.splitlines() if line.strip())
            if count != published:
                raise FileNotFoundError(f"it holds {count:,} records there; {published:,} were published")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is missing, no download ({error}); fetch "
                                    f"{ARC_ARCHIVE} by hand and put its member {member} there") from None
        try:
            with atomic_write(path) as file:
                file.write(content)
        except OSError as error:
            raise OSError(f"{path} cannot be stored ({error.strerror}); name another folder") from None
    return path


# ---- examples ----------------------------------------------------------------------------------------------

def rows(examples: Sequence[Example]) -> list[list]:
    """Plain JSON values; dataclasses.astuple would copy every list of tokens."""
    return [list(vars(example).values()) for example in examples]


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over everything in the examples, in their order."""
    return hashlib.sha256(json.dumps(rows(examples)).encode()).hexdigest()


def load_examples(task: str, split: str, *, order: str, max_prompt: int, min_prompt: int = 0, max_answer: int,
                  n: int | None, seed: int, assets: str | Path, offline: bool = False,
                  cache: bool = True) -> list[Example]:
    """The first n examples that qualify, of the records shuffled by `seed`, as in the log.

    Args: task, "arc" or "hotpotqa"; split, "train" or "validation" (ARC has "test" too); n, None for all;
    assets, the folder of the files, which are downloaded into it unless `offline`; the rest as in
    make_example. With `cache` the result is kept in assets/cache under a name made of all that decides it.
    Raises FileNotFoundError where the file cannot be had, OSError where it cannot be stored, ValueError for a
    malformed record, an unknown task or order, or too few records that qualify.
    """
    if (task, split) not in FILES or order not in ("context_first", "question_first"):
        raise ValueError(f"no such task, split or order: {task!r}, {split!r}, {order!r}")
    if min(max_prompt, max_answer, 1 if n is None else n) < 1 or min_prompt > max_prompt:
        raise ValueError(f"max_prompt = {max_prompt}, max_answer = {max_answer}, n = {n}: at least 1; "
                         f"min_prompt = {min_prompt}: at most max_prompt")
    assets = Path(assets)
    path = find_file(task, split, assets, offline)
    published = FILES[task, split][1]
    spans, sha256 = indexed(path, assets / "cache", cache)
    if len(spans) != published:
        note(f"{path} holds {len(spans):,} records; the published file holds {published:,}")
    rules = dict(order=order, max_prompt=max_prompt, min_prompt=min_prompt, max_answer=max_answer)
    key = json.dumps([CACHE_FORMAT, task, split, sha256, VOCABULARY_SHA256, rules, n, seed])
    store = assets / "cache" / f"{task}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    known = read_cache(store) if cache else None
    if known is not None:
        return [Example(*row) for row in known]

    tokenizer = Tokenizer()
    indices = list(range(len(spans)))
    random.Random(seed).shuffle(indices)
    examples = []
    with open(path, "rb") as file:
        for i in indices:
            if n is not None and len(examples) == n:
                break
            start, end = spans[i]
            file.seek(start)
            try:
                example = make_example(task, json.loads(file.read(end - start)), tokenizer, **rules)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: record {i + 1}: {error}") from None
            if example is not None:
                examples.append(example)
    if not examples or (n is not None and len(examples) < n):
        setting = "n_train" if split == "train" else "n_val"
        raise ValueError(f"{path}: only {len(examples)} of {len(spans)} records qualify (min_prompt = "
                         f"{min_prompt}); lower {setting} = {n}" + " or min_prompt" * (min_prompt > 0))
    if cache:
        write_cache(store, rows(examples))
    return examples


# ---- batches -----------------------------------------------------------------------------------------------

def batches(examples: Sequence[Example], batch_size: int, seed: int, start: int = 0,
            shuffle: bool = True) -> Iterator[list[Example]]:
    """Endless batches; those from step `start` on are the same whether or not the earlier ones were drawn.

    Every epoch gives each example once, in an order drawn from (seed, epoch). Windows of 16 batches are
    sorted by prompt length, so that rows of like length are padded together, and the batches are then
    shuffled again. The last batch drawn from an epoch's examples is smaller where batch_size does not divide
    their number. Without `shuffle`, the examples come as they are, which is how the stand-in's get harder.
    """
    per_epoch = math.ceil(len(examples) / batch_size)
    epoch, skip = divmod(start, per_epoch)
    while True:
        generator = random.Random(f"{seed} {epoch}")
        order = list(range(len(examples)))
        if shuffle:
            generator.shuffle(order)
            window = 16 * batch_size
            windows = [order[i:i + window] for i in range(0, len(order), window)]
            order = [j for part in windows for j in sorted(part, key=lambda j: len(examples[j].prompt))]
        groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        if shuffle:
            generator.shuffle(groups)
        for group in groups[skip:]:
            yield [examples[j] for j in group]
        epoch, skip = epoch + 1, 0


def pad(rows: Sequence[list[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists -> (B, T) int64, right-padded with 0, and their lengths (B,)."""
    longest = max(len(row) for row in rows)
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    if torch.device(device).type == "cuda":
        # from pinned memory the copies queue up behind the work before them, and nobody waits
        padded, lengths = padded.pin_memory(), lengths.pin_memory()
    return padded.to(device, non_blocking=True), lengths.to(device, non_blocking=True)


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
    """prompt (B, T), prompt_lengths (B,), answer (B, A), answer_lengths (B,), as `pad` makes them."""
    prompts, answers = [example.prompt for example in examples], [example.answer for example in examples]
    return (*pad(prompts, device), *pad(answers, device))
