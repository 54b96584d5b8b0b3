"""The tasks: records into prompts and answers, their files and downloads, and batches.

ARC-Challenge (Clark et al. 2018, arXiv:1803.05457): a question, three to five labelled options, the answer a
label. HotpotQA, distractor setting (Yang et al. 2018, arXiv:1809.09600): ten paragraphs, a question, a short
answer. Both are read in their publishers' own formats, from an assets folder or downloaded into it. Prompts,
length rules and the way examples are drawn are the experiment log's, byte for byte.

Shapes: B examples in a batch, T tokens in its longest prompt, A tokens in its longest answer.
"""

import hashlib
import http.client
import json
import math
import random
import re
import socket
import tempfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from files import say
from tokenizer import Tokenizer

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
HOTPOTQA_SHA256 = {             # fetched without TLS, so its bytes are checked
    "hotpot_train_v1.1.json": "26650cf50234ef5fb2e664ed70bbecdfd87815e6bffc257e068efea5cf7cd316",
    "hotpot_dev_distractor_v1.json": "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
}
CHUNK = 1 << 18                 # bytes at the end of an archive that hold its table of contents, and more
LARGEST_MEMBER = 1 << 26        # bytes of one member of an archive: it is read into memory
SECONDS_TO_ANSWER = 10          # a server that does not answer in time is given up


@dataclass(frozen=True)
class Example:
    """One question, tokenised."""
    id: str                                 # the publisher's
    prompt: list[int]                       # tokens, up to and including "Answer:"
    answer: list[int]                       # tokens to be predicted
    text: str                               # the gold answer: "A", "Barack Obama"
    choices: dict[str, int] | None          # ARC: label -> its first token; HotpotQA: None
    cut: bool
    tail: int                               # the prompt's last tokens that come after its first block


# ---- records into prompts ----------------------------------------------------------------------------------

def clean(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ").strip()


def field(record: dict, key: str, kind: type):
    """record[key], which must be of this kind; ValueError otherwise."""
    if not isinstance(record, dict) or not isinstance(record.get(key), kind):
        raise ValueError(f"{key!r} is missing or not a {kind.__name__}")
    return record[key]


def arrange(order: str, context: str, question: str) -> list[str]:
    """A prompt's blocks. The log has the first two orders. The others are what people do with a question that
    comes last: put it at both ends, or have everything read twice (JRT-Prompt, arXiv:2407.05483)."""
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
    context = "Options:\n" + "\n".join(f"{label}. {text}" for label, text in options)
    return context, f"Question:\n{stem}", answer, labels


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
        pieces.append(clean(title) and clean(title) + ":")
        pieces.append(" ".join(filter(None, map(clean, sentences))))
    context = "\n\n".join(filter(None, pieces))
    if not question or not answer or not context:
        return None
    return f"Context:\n{context}", f"Question:\n{question}", answer, None


def make_example(task: str, record: dict, tokenizer: Tokenizer, *, order: str, max_prompt: int,
                 max_answer: int, min_prompt: int = 0, end_mark=False, arc_border='log') -> Example | None:
    """One official record as an Example, or None where the log's rules leave it out.

    Args: order, see `arrange`; lengths in tokens. Prompts keep their last max_prompt tokens, those shorter
    than min_prompt are left out, answers keep their first max_answer tokens. ValueError if malformed.
    """
    parts = read_arc(record) if task == "arc" else read_hotpotqa(record)
    if parts is None:
        return None
    context, question, answer, labels = parts
    # the log's ARC prompt ends in a space and the answer has none; with HotpotQA it is the other way round
    end, space = ("\n\nAnswer: ", "") if task == "arc" else ("\n\nAnswer:", " ")

    def encoded(blocks: list[str]) -> list[int]:
        return tokenizer.encode("\n\n".join(blocks) + end)

    blocks = arrange(order, context, question)
    prompt = encoded(blocks)[-max_prompt:]
    # what says a thing twice is measured as if it did not, so that all orders have the same records
    if len(prompt if len(blocks) == 2 else encoded([context, question])) < min_prompt:
        return None
    tail = min(len(encoded(blocks[1:])), len(prompt))
    choices = {label: tokenizer.encode(label)[0] for label in labels} if labels else None
    id = field(record, "id" if task == "arc" else "_id", str)
    answer_tokens = tokenizer.encode(space + answer)[:max_answer]
    return Example(id, prompt, answer_tokens, answer, choices, False, tail)


# ---- files of records --------------------------------------------------------------------------------------

def fetch_part(url: str, part: str, file: BinaryIO) -> None:
    """Ask for a part of a file, as in "0-99" or "-100", and write it where it stands in the whole."""
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": f"bytes={part}"})) as answer:
        place = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if answer.status != 206 or not place:
            raise OSError("the server did not send the part asked for")
        file.seek(int(place[1]))
        file.write(answer.read())


def read_member(url: str, name: str) -> bytes:
    """A member of a zip archive on a server, without fetching the rest of it (for ARC: 1 MB of 680)."""
    try:
        with tempfile.TemporaryFile() as file:    # as long as the archive, but with nothing in its gaps
            fetch_part(url, f"-{CHUNK}", file)    # an archive ends with its table of contents
            with zipfile.ZipFile(file) as archive:
                member = archive.getinfo(name)
                if member.file_size > LARGEST_MEMBER:
                    raise ValueError(f"{name} is larger than it should be")
                end = member.header_offset + member.compress_size + CHUNK
                fetch_part(url, f"{member.header_offset}-{end}", file)
                return archive.read(name)
    except (KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"damaged archive: {error}") from error


def download(url: str, path: Path, check: Callable[[Path], object], offline: bool, largest=0, member: str = "") -> None:
    """Fetch url, or a member of the zip archive there, to path: whole and checked or not at all.

    Args: check, called with the file before it gets its name, raises ValueError to refuse it.
    Raises FileNotFoundError, one line, where the file cannot be had or kept, and always if `offline`.
    """
    try:
        if offline:
            raise OSError("downloads are off")
        say(f"downloading {path.name} from {url.split('/')[2]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(SECONDS_TO_ANSWER)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            part = Path(folder, path.name)
            if member:
                part.write_bytes(read_member(url, member))
            else:
                torch.hub.download_url_to_file(url, str(part))
            check(part)
            part.rename(path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FileNotFoundError(f"{path} is missing, no download ({error}); fetch {url} by hand and put "
                                f"{member or 'it'} there") from None


def find_file(task: str, split: str, assets: Path, offline: bool) -> Path:
    """The file of a task's records, downloaded if it is missing; FileNotFoundError if it cannot be had."""
    name, published = FILES[task, split]
    path = assets / name

    def check(file: Path) -> None:
        content = file.read_bytes()
        if task == "arc" and len(content.splitlines()) != published:
            raise ValueError(f"not the published file: it should hold {published:,} records")
        if task == "hotpotqa" and hashlib.sha256(content).hexdigest() != HOTPOTQA_SHA256[path.name]:
            raise ValueError("not the published file: its sha256 differs")

    url, member = (ARC_ARCHIVE, ARC_FOLDER) if task == "arc" else (HOTPOTQA_FOLDER + path.name, "")
    if not path.exists():
        download(url, path, check, offline, 0, member and member + path.name)
    return path


def read_records(path: Path) -> list:
    """Every record of a .json or .jsonl file. ValueError names the file."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in filter(str.strip, text.splitlines())]
        if not isinstance(records, list) or not records:
            raise ValueError("no records")
        return records
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or cut off ({error}); delete it to fetch it again") from None


# ---- examples ----------------------------------------------------------------------------------------------

def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over everything in the examples, in their order."""
    return hashlib.sha256(json.dumps([vars(example) for example in examples]).encode()).hexdigest()


def load_examples(task: str, split: str, *, order: str, max_prompt: int, min_prompt: int = 0, max_answer: int,
                  n: int | None, seed: int, assets: str | Path, offline: bool = False, end_mark=False, arc_border='log') -> list[Example]:
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
                                   max_answer=max_answer, min_prompt=min_prompt)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: record {i + 1}: {error}") from None
        if example is not None:
            examples.append(example)
    if not examples or len(examples) < (n or 0):
        setting = "n_train" if split == "train" else "n_val"
        raise ValueError(f"{path}: only {len(examples)} of {len(records)} records qualify (min_prompt = "
                         f"{min_prompt}); lower {setting} = {n}" + " or min_prompt" * (min_prompt > 0))
    if len({example.id for example in examples}) < len(examples):
        raise ValueError(f"{path}: two of its records have the same id; restore the published file")
    return examples


# ---- batches -----------------------------------------------------------------------------------------------

def batches(examples: Sequence[Example], batch_size: int, seed: int, start: int = 0,
            shuffle: bool = True) -> Iterator[list[Example]]:
    """Endless batches; those from step `start` on are the same whether or not the earlier ones were drawn.

    Every epoch gives each example once, in an order drawn from (seed, epoch). Windows of 16 batches are
    sorted by prompt length, so that rows of like length are padded together, and the batches are then
    shuffled again; one is smaller where batch_size does not divide the number of examples. Without `shuffle`,
    the examples come as they are, which is how the stand-in's get harder.
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
    """Token lists -> (B, T) int64, right-padded with 0, and their lengths (B,)."""
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return padded.to(device), lengths.to(device)


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
    """prompt (B, T), prompt_lengths (B,), answer (B, A), answer_lengths (B,), as `pad` makes them."""
    return (*pad([example.prompt for example in examples], device),
            *pad([example.answer for example in examples], device))

def loses_question(example, order):
    return example.cut and order in ("question_first",)
def answer_cue(task, arc_border):
    return "\n\nAnswer: " if task == "arc" else "\n\nAnswer:"
def prompt_blocks(task, context, question):
    if task == "arc": return "Options:\n" + "\n".join(context), f"Question:\n{question}"
    return "Context:\n" + "\n\n".join(context), f"Question:\n{question}"
def load_own_examples(folder, split, *, order, max_prompt, min_prompt=0, max_answer, end_mark, n): ...
