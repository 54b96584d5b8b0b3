"""data.py and download.py: prompts, records, files, caches, batches, the stand-in, downloads."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

import data
import download as download_module
import standin
from data import (Example, batches, collate, fingerprint, index_records, load_examples, make_example,
                  read_arc, read_hotpotqa)
from download import download, read_members
from standin import standin_records
from tokenizer import Tokenizer

ROOT = Path(data.__file__).parent
TOKENIZER = Tokenizer()
ORDERS = ("context_first", "question_first")
ARC_RECORD = {"id": "Q1", "answerKey": "2", "question": {"stem": "Which is\nwet? ", "choices": [
    {"text": "sand", "label": "3"}, {"text": " rain\r", "label": "2"}, {"text": "dust", "label": "1"},
    {"text": "", "label": "4"}]}}
HOTPOTQA_RECORD = {"_id": "5a", "question": "Who wrote\nEmma? ", "answer": " Jane Austen", "type": "bridge",
                   "level": "hard", "supporting_facts": [["Emma", 0]],
                   "context": [["Emma ", ["Emma is a novel.", "", " It is by Jane Austen.\n"]], ["Bath", []],
                               ["", ["A city.\r\n"]]]}
HOTPOTQA_RULES = dict(order="context_first", max_prompt=64, min_prompt=0, max_answer=24, n=20, seed=0)


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Building the trie takes half a second; load_examples would build one at every cache miss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "Tokenizer", lambda: TOKENIZER)
        yield


@pytest.fixture(autouse=True)
def fresh_notes():
    data.note.cache_clear()


def write_assets(folder: Path, records: list[dict], split: str = "train") -> Path:
    path = folder / data.FILES["hotpotqa", split][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


# ---- prompts -----------------------------------------------------------------------------------------------

def test_arc_prompts_literally():
    """Catches: another template, unsorted or empty options, uncleaned fields, the answer's space."""
    prompt, answer, labels = read_arc(ARC_RECORD, "context_first")
    assert prompt == "Options:\n1. dust\n2. rain\n3. sand\n\nQuestion:\nWhich is wet?\n\nAnswer: "
    assert (answer, labels) == ("2", ["1", "2", "3"])
    prompt, _, _ = read_arc(ARC_RECORD, "question_first")
    assert prompt == "Question:\nWhich is wet?\n\nOptions:\n1. dust\n2. rain\n3. sand\n\nAnswer: "
    made = make_example("arc", ARC_RECORD, TOKENIZER, order="question_first", max_prompt=512, max_answer=8)
    assert TOKENIZER.decode(made.prompt) == prompt and TOKENIZER.decode(made.answer) == "2"
    assert made.choices == {label: TOKENIZER.encode(label) for label in "123"}


def test_hotpotqa_prompts_literally():
    """Catches: another template, wrong joints of the context, empty pieces kept, the answer's space."""
    context = "Emma:\n\nEmma is a novel. It is by Jane Austen.\n\nBath:\n\nA city."
    prompt, answer, _ = read_hotpotqa(HOTPOTQA_RECORD, "context_first")
    assert prompt == f"Context:\n{context}\n\nQuestion:\nWho wrote Emma?\n\nAnswer:"
    assert answer == "Jane Austen"
    prompt, _, _ = read_hotpotqa(HOTPOTQA_RECORD, "question_first")
    assert prompt == f"Question:\nWho wrote Emma?\n\nContext:\n{context}\n\nAnswer:"
    rules = dict(order="question_first", max_prompt=512, max_answer=24)
    made = make_example("hotpotqa", HOTPOTQA_RECORD, TOKENIZER, **rules)
    assert TOKENIZER.decode(made.prompt) == prompt and TOKENIZER.decode(made.answer) == " Jane Austen"
    assert made.choices is None


def test_length_rules():
    """Catches: prompts cut at the wrong end, answers cut at the wrong end, the minimum off by one."""
    def made(**rules):
        rules = dict(order="context_first", max_prompt=512, max_answer=24) | rules
        return make_example("hotpotqa", HOTPOTQA_RECORD, TOKENIZER, **rules)

    whole = made()
    assert made(max_prompt=7).prompt == whole.prompt[-7:]
    assert made(max_answer=1).answer == whole.answer[:1]
    assert made(min_prompt=len(whole.prompt)) == whole
    assert made(min_prompt=len(whole.prompt) + 1) is None
    assert made(max_prompt=7, min_prompt=8) is None    # the minimum is asked of the cut prompt, as in the log


@pytest.mark.parametrize("emptied", ["question", "answer", "context"])
def test_empty_records_are_left_out(emptied):
    record = HOTPOTQA_RECORD | {emptied: [] if emptied == "context" else " \n"}
    assert read_hotpotqa(record, "context_first") is None


def test_arc_answer_must_be_a_label():
    """Catches: a gold label that no scorer could ever choose."""
    with pytest.raises(ValueError, match="'E'"):
        read_arc(ARC_RECORD | {"answerKey": "E"}, "context_first")


KNOWN = st.sampled_from("id _id question stem choices text label answerKey answer context".split())
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("A")
JSON = st.recursive(LEAVES, max_leaves=12, extend=lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(KNOWN, inner, max_size=6)))


def replaced(record, path, value):
    """The record with the value at `path` (keys and positions) replaced."""
    if not path:
        return value
    changed = list(record) if isinstance(record, list) else dict(record)
    changed[path[0]] = replaced(record[path[0]], path[1:], value)
    return changed


def places(record, path=()):
    yield path
    if isinstance(record, (dict, list)):
        for key in (record if isinstance(record, dict) else range(len(record))):
            yield from places(record[key], (*path, key))


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(["arc", "hotpotqa"]), st.sampled_from(ORDERS))
def test_fuzzed_records_give_an_example_or_a_value_error(draw, task, order):
    """Catches: a record of an unforeseen shape that ends in a TypeError or a traceback."""
    record = ARC_RECORD if task == "arc" else HOTPOTQA_RECORD
    place = draw.draw(st.sampled_from(list(places(record))))
    record = replaced(record, place, draw.draw(JSON))
    with contextlib.suppress(ValueError):
        made = make_example(task, record, TOKENIZER, order=order, max_prompt=20, max_answer=4)
        assert made is None or (isinstance(made, Example) and made.answer and len(made.prompt) <= 20)


# ---- files of records --------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(st.dictionaries(st.text(max_size=6), JSON, max_size=4), min_size=1, max_size=8),
       ascii_only=st.booleans(), indent=st.sampled_from([None, 1]), chunk=st.integers(1, 40))
def test_index_finds_every_record(tmp_path, records, ascii_only, indent, chunk):
    """Catches: spans off where a chunk ends inside a record, a character, a separator."""
    path = tmp_path / "records.json"
    text = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK", chunk)
        spans, sha256 = index_records(path)
    content = path.read_bytes()
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert repr([json.loads(content[start:end]) for start, end in spans]) == repr(records)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400))
def test_cut_files_name_the_file_and_the_record(tmp_path, cut):
    """Catches: a truncated download trained on as if it were a smaller data set."""
    records = standin_records("hotpotqa", "train", 2, 0, 2)
    whole = json.dumps(records)
    path = tmp_path / "hotpot_train_v1.1.json"
    path.write_text(whole[:min(cut, len(whole) - 1)])
    ends = [len(json.dumps(records[:i])) - 1 for i in (1, 2)]
    with pytest.raises(ValueError) as caught:
        index_records(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert f"record {1 + sum(end <= cut for end in ends)} " in str(caught.value)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 5000)
@example(content=b'[{"a": ' + b"[" * 50_000)
@example(content=b'[{"a": ' + b"9" * 5000 + b"}]")
def test_fuzzed_files(tmp_path, content):
    """Catches: damaged files that end in anything but a line with the file and the record."""
    for name in ("hotpotqa/hotpot_train_v1.1.json", "arc/ARC-Challenge-Train.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            load_examples(name.split("/")[0], "train", assets=tmp_path, cache=False, **HOTPOTQA_RULES)
        message = str(caught.value)
        assert str(path) in message and "record" in message and "\n" not in message


@pytest.mark.parametrize("text, number", [("[1]", 1), ('[{"a": 1}, 12]', 2), ('[{"a": 1}, null]', 2),
                                          ("{}", 1)])
def test_records_are_objects(tmp_path, text, number):
    """Catches: a number taken for a record, of which a chunk may hold the first digits."""
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(ValueError, match=f"record {number} "):
        index_records(tmp_path / "records.json")


def test_malformed_record_is_named(tmp_path):
    """Catches: an error that gives the place in the shuffled order instead of the place in the file."""
    records = standin_records("hotpotqa", "train", 5, 0, 3)
    records[3]["context"][0] = ["Farm", ["x", None]]
    path = write_assets(tmp_path, records)
    with pytest.raises(ValueError, match="record 4: a sentence of .* 'Farm' is not a str") as caught:
        load_examples("hotpotqa", "train", assets=tmp_path, **HOTPOTQA_RULES | dict(n=5))
    assert str(path) in str(caught.value)


def test_lone_surrogates_are_named(tmp_path):
    """Catches: a character that JSON can spell and UTF-8 cannot, and that ends in an error far away."""
    records = standin_records("hotpotqa", "train", 1, 0, 3)
    records[0]["question"] = "\ud800"
    write_assets(tmp_path, records)
    with pytest.raises(ValueError, match="record 1: "):
        load_examples("hotpotqa", "train", assets=tmp_path, **HOTPOTQA_RULES | dict(n=1))


def test_memory_is_bounded_for_a_file_without_end(tmp_path, monkeypatch):
    """Catches: a file whose first record never ends being read into memory whole."""
    monkeypatch.setattr(data, "LONGEST_RECORD", 1000)
    monkeypatch.setattr(data, "CHUNK", 100)
    path = tmp_path / "records.json"
    path.write_bytes(b'[{"a": "' + b"x" * 100_000)
    reads = []
    real_open = open

    def counting_open(*args, **kwargs):
        file = real_open(*args, **kwargs)
        read = file.read
        file = io.BytesIO(read())
        read_bytes = file.read
        file.read = lambda n: reads.append(n) or read_bytes(n)
        return file

    monkeypatch.setattr(data, "open", counting_open, raising=False)
    with pytest.raises(ValueError, match="record 1 "):
        index_records(path)
    assert sum(reads) <= 1200


# ---- drawing, caching --------------------------------------------------------------------------------------

def test_draw_is_the_logs(tmp_path, capsys):
    """Catches: another shuffle, another order of the examples, skipped records counted towards n."""
    records = standin_records("hotpotqa", "train", 30, 0, 4)
    for i in (3, 4, 5, 17):
        records[i]["answer"] = " "
    write_assets(tmp_path, records)
    indices = list(range(30))
    random.Random(7).shuffle(indices)
    expected = [records[i]["_id"] for i in indices if i not in (3, 4, 5, 17)]
    rules = HOTPOTQA_RULES | dict(seed=7)
    assert [made.id for made in load_examples("hotpotqa", "train", assets=tmp_path, **rules)] == expected[:20]
    everything = load_examples("hotpotqa", "train", assets=tmp_path, **rules | dict(n=None))
    assert [made.id for made in everything] == expected
    assert capsys.readouterr().err.count("holds 30 records; the published file holds 90,447") == 1


def test_too_few_says_how_many_and_what_to_lower(tmp_path):
    write_assets(tmp_path, standin_records("hotpotqa", "train", 30, 0, 4), "validation")
    with pytest.raises(ValueError, match=r"only 30 of 30 .* lower n_val = 31$"):
        load_examples("hotpotqa", "validation", assets=tmp_path, **HOTPOTQA_RULES | dict(n=31))
    with pytest.raises(ValueError, match=r"only 0 of 30 .*min_prompt = 60.* lower n_val = 1 or min_prompt$"):
        load_examples("hotpotqa", "validation", assets=tmp_path, **HOTPOTQA_RULES | dict(n=1, min_prompt=60))
    for wrong in (dict(n=0), dict(max_prompt=0), dict(max_answer=0), dict(min_prompt=65), dict(order="up")):
        with pytest.raises(ValueError):
            load_examples("hotpotqa", "validation", assets=tmp_path, **HOTPOTQA_RULES | wrong)


def test_cache_equals_a_rebuild_and_heals(tmp_path, monkeypatch):
    """Catches: a cache that loses something, that is not used, or that is believed when damaged."""
    write_assets(tmp_path, standin_records("hotpotqa", "train", 30, 0, 4))

    def load(**changes):
        return load_examples("hotpotqa", "train", assets=tmp_path, **HOTPOTQA_RULES | changes)

    first = load()
    assert first == load(cache=False) and fingerprint(first) == fingerprint(load())
    with monkeypatch.context() as patch:
        patch.setattr(data, "make_example", None)      # a hit needs no record
        patch.setattr(data, "index_records", None)
        assert load() == first
    for store in (tmp_path / "cache").iterdir():
        whole = store.read_bytes()
        for damaged in (whole[:-10], b"", whole.replace(b"1", b"2", 3), b"\xff" * 100):
            store.write_bytes(damaged)
            assert load() == first and store.read_bytes() == whole
    others = (first[::-1], first[1:], [replace(first[0], text="x")] + first[1:])
    assert fingerprint(first) not in [fingerprint(other) for other in others]


def test_cache_key_holds_all_that_decides_the_examples(tmp_path):
    """Catches: a changed setting, or a changed file, answered from the cache of the old one."""
    path = write_assets(tmp_path, standin_records("hotpotqa", "train", 30, 0, 4))

    def stores():
        return {store.name for store in (tmp_path / "cache").glob("*.json")}

    def load(**changes):
        return load_examples("hotpotqa", "train", assets=tmp_path, **HOTPOTQA_RULES | changes)

    first = load()
    for change in (dict(order="question_first"), dict(max_prompt=63), dict(min_prompt=1), dict(max_answer=23),
                   dict(n=19), dict(seed=1)):
        before = stores()
        load(**change)
        assert len(stores() - before) == 1, change
    # same size, and the modification time set back: only the change time tells
    times = path.stat()
    path.write_text(path.read_text().replace("standin-train", "STANDIN-train"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and load() != first


def test_unwritable_cache_is_a_notice(tmp_path, capsys):
    """Catches: a read-only assets folder that stops a run."""
    write_assets(tmp_path, standin_records("hotpotqa", "train", 30, 0, 4))
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(load_examples("hotpotqa", "train", assets=tmp_path, **HOTPOTQA_RULES)) == 20
    assert capsys.readouterr().err.count("without a cache every start takes longer") == 1


@pytest.mark.parametrize("task, split", list(data.FILES))
def test_offline_names_file_source_and_place(tmp_path, monkeypatch, task, split):
    """Catches: an offline run that touches the network, or that leaves its user guessing."""
    monkeypatch.setattr(download_module.urllib.request, "urlopen", None)
    with pytest.raises(FileNotFoundError) as caught:
        load_examples(task, split, assets=tmp_path, offline=True, **HOTPOTQA_RULES)
    message = str(caught.value)
    assert str(tmp_path / data.FILES[task, split][0]) in message and "http" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


# ---- the real files ----------------------------------------------------------------------------------------

def test_real_arc(shared, capsys):
    """Catches: a real record the parser refuses or leaves out; a label that is more than one token."""
    for split, count in (("train", 1119), ("validation", 299), ("test", 1172)):
        examples = load_examples("arc", split, assets=shared / "data", cache=False, order="context_first",
                                 max_prompt=512, max_answer=8, n=None, seed=0)
        assert len(examples) == count == len({made.id for made in examples})
        for made in examples:
            assert made.text in made.choices and made.choices[made.text] == made.answer
            assert 2 <= len(made.choices) <= 5 and all(len(tokens) == 1 for tokens in made.choices.values())
            assert TOKENIZER.decode(made.prompt).endswith("\n\nAnswer: ")
    assert "published" not in capsys.readouterr().err


@pytest.mark.parametrize("order", ORDERS)
def test_real_hotpotqa(shared, order, capsys):
    """Catches: real records refused, length rules ignored, the question cut away."""
    examples = load_examples("hotpotqa", "train", assets=shared / "data", cache=False, order=order,
                             max_prompt=1600, min_prompt=1536, max_answer=24, n=60, seed=0)
    assert all(1536 <= len(made.prompt) <= 1600 and 1 <= len(made.answer) <= 24 for made in examples)
    for made in examples:
        prompt = TOKENIZER.decode(made.prompt)
        assert prompt.endswith("\n\nAnswer:") and ("\n\nQuestion:\n" in prompt or order == "question_first")
        assert TOKENIZER.decode(made.answer) == " " + made.text or len(made.answer) == 24
    assert "holds 1,300 records" in capsys.readouterr().err


# ---- batches -----------------------------------------------------------------------------------------------

def dummies(n: int) -> list[Example]:
    lengths = random.Random(n)
    return [Example(str(i), [1] * lengths.randint(1, 50), [2] * (1 + i % 3), "", None) for i in range(n)]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 9), st.integers(0, 300))
def test_batches(n, batch_size, seed, start):
    """Catches: examples lost or repeated in an epoch, an order not the seed's, a resume off by a step."""
    examples = dummies(n)
    per_epoch = -(-n // batch_size)
    stream = batches(examples, batch_size, seed)
    drawn = [next(stream) for _ in range(start + 2 * per_epoch)]
    for epoch in range(2):
        ids = [made.id for batch in drawn[epoch * per_epoch:(epoch + 1) * per_epoch] for made in batch]
        assert sorted(ids) == sorted(made.id for made in examples)
    resumed = batches(examples, batch_size, seed, start)
    assert [next(resumed) for _ in range(2 * per_epoch)] == drawn[start:]
    assert all(len(batch) <= batch_size for batch in drawn)


def test_batches_pad_little_and_change_with_seed_and_epoch():
    """Catches: bucketing that does nothing, and an order that is the same every epoch or for every seed."""
    examples = dummies(512)
    stream = batches(examples, 8, seed=0)
    first, second = ([next(stream) for _ in range(64)] for _ in range(2))
    assert first != second and first != [batch for batch, _ in zip(batches(examples, 8, seed=1), range(64))]
    used = sum(len(made.prompt) for made in examples)
    padded = sum(len(batch) * max(len(made.prompt) for made in batch) for batch in first)
    assert padded < 1.1 * used    # 1.8 in the order drawn
    longest = [max(len(made.prompt) for made in batch) for batch in first[:16]]
    assert longest != sorted(longest)


def test_collate():
    """Catches: padding on the wrong side, lengths of the wrong rows."""
    prompt, prompt_lengths, answer, answer_lengths = collate([Example("a", [5, 6, 7], [8], "", None),
                                                              Example("b", [9], [3, 4], "", None)])
    assert prompt.tolist() == [[5, 6, 7], [9, 0, 0]] and answer.tolist() == [[8, 0], [3, 4]]
    assert prompt_lengths.tolist() == [3, 1] and answer_lengths.tolist() == [1, 2]
    assert {part.dtype for part in (prompt, prompt_lengths, answer, answer_lengths)} == {torch.int64}


# ---- the stand-in ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["arc", "hotpotqa"])
@pytest.mark.parametrize("n_facts", [2, 22])
def test_standin_records_are_official_and_answerable(task, n_facts):
    """Catches: records the official parsers refuse, answers of several tokens or not among the facts."""
    for record in standin_records(task, "train", 50, 3, n_facts):
        for order in ORDERS:
            made = make_example(task, record, TOKENIZER, order=order, max_prompt=512, max_answer=8)
            prompt = TOKENIZER.decode(made.prompt)
            asked = prompt.partition("Question:\n")[2].split("\n")[0]
            fact = (f"\n{made.text}. {asked.removeprefix('Who is ').removesuffix('?')}\n" if task == "arc"
                    else f"\n{asked} {made.text}\n")
            assert len(made.answer) == 1 and prompt.count(fact) == 1
            assert task == "hotpotqa" or len(made.choices) == n_facts
    assert make_example(task, record, TOKENIZER, order=order, max_prompt=512, max_answer=8).id == record.get(
        "id", record.get("_id"))


@pytest.mark.parametrize("task", ["arc", "hotpotqa"])
def test_standin_splits_are_disjoint(task, monkeypatch):
    """Catches: validation questions that were trained on, in whatever order their facts stood."""
    monkeypatch.setattr(standin, "NAMES", standin.NAMES[:5])
    monkeypatch.setattr(standin, "VERBS", standin.VERBS[:2])

    def questions(split, seed):
        found = set()
        for record in standin_records(task, split, 300, seed, 2):
            if task == "arc":
                question = record["question"]
                options = frozenset((choice["label"], choice["text"]) for choice in question["choices"])
                found.add((options, question["stem"]))
            else:
                facts = frozenset(sentence for _, (sentence,) in record["context"])
                found.add((facts, record["question"]))
        return found

    train, validation = questions("train", 0) | questions("train", 1), questions("validation", 0)
    assert len(train) > 20 and len(validation) > 5 and not train & validation


def test_standin_is_its_seeds():
    """Catches: records that differ from run to run, or do not differ from seed to seed."""
    task = "hotpotqa"
    assert standin_records(task, "train", 20, 5, 6) == standin_records(task, "train", 20, 5, 6)
    assert standin_records(task, "train", 20, 5, 6) != standin_records(task, "train", 20, 6, 6)


def test_standin_words_are_single_tokens():
    """Catches: a word that the vocabulary splits, which would give some facts more tokens than others."""
    assert all(len(TOKENIZER.encode(" " + word)) == 1 for word in standin.NAMES + standin.VERBS)
    assert all(len(TOKENIZER.encode(name)) == 1 for name in standin.NAMES)
    assert len(set(standin.NAMES)) == 32 and len(set(standin.VERBS)) == 16


def test_standin_answers_are_balanced():
    """Catches: a guess that beats chance (the first fact asked more often, the label A more often right)."""
    records = standin_records("arc", "train", 2000, 0, 4)
    counts = [sum(record["answerKey"] == label for record in records) for label in "ABCD"]
    assert all(400 < count < 600 for count in counts)


@pytest.mark.parametrize("split, n_facts", [("test", 4), ("train", 1), ("train", 33)])
def test_standin_refuses(split, n_facts):
    with pytest.raises(ValueError):
        standin_records("hotpotqa", split, 1, 0, n_facts)


# ---- downloads ---------------------------------------------------------------------------------------------

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        fault = server.faults.pop(0) if server.faults else None
        server.asked.append(self.headers.get("Range"))
        content, first, status = server.content, 0, 200
        if fault in (404, 500, 503):
            return self.send_error(fault)
        if fault == "page":
            content = b"<!DOCTYPE html><html>Sign in to the network</html>"
        elif self.headers.get("Range") and fault != "no ranges":
            asked = self.headers["Range"].removeprefix("bytes=").split("-")
            if self.headers.get("If-Range", server.tag) == server.tag:
                first, status = int(asked[0]), 206
                if first >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                content = content[first:int(asked[1]) + 1 if asked[1] else None]
        self.send_response(status)
        if status == 206:
            last = first + len(content) - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(server.content)}")
        self.send_header("ETag", server.tag)
        # "longer": the server says that there is more than it has; "shorter": it says that there is less
        self.send_header("Content-Length", str(len(content) + {"longer": 5, "shorter": -5}.get(fault, 0)))
        self.end_headers()
        if fault == "slow":
            time.sleep(1)
        if fault == "cut":
            content = content[:len(content) // 2]
        with contextlib.suppress(OSError):      # a reader who has what it wanted hangs up
            self.wfile.write(content)


@pytest.fixture
def server():
    """A source on the loopback address whose next answers can be spoilt: server.faults."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content = random.Random(0).randbytes(1_000_000)
        server.tag, server.faults, server.asked = '"one"', [], []
        server.url = f"http://127.0.0.1:{server.server_address[1]}/file"
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download(server, tmp_path, capsys):
    path = tmp_path / "new folder" / "file.bin"
    download(server.url, path)
    assert path.read_bytes() == server.content and list(path.parent.iterdir()) == [path]
    assert "file.bin: 1.0 of 1.0 MB, 0 s left" in capsys.readouterr().err
    server.content = b"other"
    download(server.url, path)
    assert len(server.asked) == 1 and path.stat().st_size == 1_000_000    # what is there is left alone


@pytest.mark.parametrize("faults", [[500], [503, 500], ["cut"], ["cut", 500, "cut"], ["longer"]])
def test_download_tries_again(server, tmp_path, faults):
    """Catches: giving up on a passing fault; bytes twice or left out where a broken transfer is resumed."""
    server.faults = list(faults)
    download(server.url, tmp_path / "file", pause=0.001)
    assert (tmp_path / "file").read_bytes() == server.content and len(list(tmp_path.iterdir())) == 1
    if "cut" in faults:
        assert "bytes=500000-" in server.asked


@pytest.mark.parametrize("faults, message, requests", [
    ([500] * 4, "500", 4),
    (["cut"] * 4, "the connection ended after", 4),
    ([404], "404", 1),
    (["page"], "a web page", 1),
])
def test_download_gives_up_in_one_line(server, tmp_path, faults, message, requests):
    """Catches: a half file or a web page under the final name; endless or pointless retries."""
    server.faults = list(faults)
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        download(server.url, path, pause=0.001)
    message = str(caught.value)
    assert server.url in message and str(path) in message and "\n" not in message
    assert not path.exists() and len(server.asked) == requests
    server.faults = []
    download(server.url, path)
    assert path.read_bytes() == server.content


def test_download_resumes_in_a_later_call(server, tmp_path):
    """Catches: starting from nothing every time; joining the halves of two different files."""
    path = tmp_path / "file"
    for changed in (False, True):
        server.faults = ["cut"]
        with pytest.raises(FileNotFoundError):
            download(server.url, path, attempts=1)
        if changed:
            server.content, server.tag = server.content[::-1], '"two"'
        download(server.url, path)
        assert server.asked[-1] == "bytes=500000-" and path.read_bytes() == server.content
        path.unlink()


@pytest.mark.parametrize("excess, requests", [(b"", 1), (b"more than the server has", 2)])
def test_download_killed_after_its_last_byte(server, tmp_path, excess, requests):
    """Catches: a finished part that no request can complete (416), for ever; a part longer than the file."""
    (tmp_path / "file.part").write_bytes(server.content + excess)
    (tmp_path / "file.part.tag").write_text(server.tag)
    download(server.url, tmp_path / "file", pause=0.001)
    assert (tmp_path / "file").read_bytes() == server.content and len(server.asked) == requests


@pytest.mark.parametrize("faults", [["shorter"], []])
def test_download_refused_by_its_check(server, tmp_path, faults):
    """Catches: a file as long as the server said that is not the published one, kept or resumed for ever."""
    server.faults = faults

    def check(part: Path) -> None:
        if part.read_bytes() != good:
            raise ValueError("wrong size")

    good = server.content if faults else b"something else"
    with pytest.raises(FileNotFoundError, match="not the published file: wrong size"):
        download(server.url, tmp_path / "file", check)
    good = server.content
    download(server.url, tmp_path / "file", check)
    assert (tmp_path / "file").read_bytes() == server.content and server.asked[-1] is None


def test_download_without_a_network_does_not_wait(tmp_path, capsys):
    """Catches: seconds of retries on every start of a machine that is simply offline."""
    with pytest.raises(FileNotFoundError, match="refused"):
        download("http://127.0.0.1:9/file", tmp_path / "file", pause=0.001)
    with pytest.raises(FileNotFoundError, match="downloads are off"):
        download("http://127.0.0.1:9/file", tmp_path / "file", offline=True)
    assert "again" not in capsys.readouterr().err and not (tmp_path / "file").exists()


def test_two_downloads_at_once(server, tmp_path):
    """Catches: two processes that write the same .part and shuffle its bytes."""
    server.faults = ["slow"]
    code = "import sys; from download import download; download(*sys.argv[1:])"
    command = [sys.executable, "-c", code, server.url, str(tmp_path / "file")]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        assert process.communicate()[1].count(b"Traceback") == 0 and process.returncode == 0
    assert (tmp_path / "file").read_bytes() == server.content and len(list(tmp_path.iterdir())) == 1
    assert len(server.asked) == 1


def run_download(setup: str, url: str, path: Path) -> str:
    code = f"import os, resource, sys\nfrom download import download\n{setup}\ndownload(*sys.argv[1:])"
    command = [sys.executable, "-c", code, url, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def test_download_onto_a_full_disk(server, tmp_path):
    """Catches: a file cut where the disk was full; and the bytes so far are not lost."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    line = run_download(limit, server.url, tmp_path / "file")
    assert line.startswith("OSError:") and "cannot be stored (File too large)" in line and server.url in line
    assert not (tmp_path / "file").exists()
    download(server.url, tmp_path / "file")
    assert server.asked[-1] == "bytes=300000-" and (tmp_path / "file").read_bytes() == server.content


def test_download_into_a_read_only_folder(server):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "assets").mkdir(mode=0o555)
        as_nobody = "if os.getuid() == 0: os.setuid(65534)      # permissions do not bind root"
        for path in (Path(folder) / "assets" / "file", Path(folder) / "assets" / "arc" / "file"):
            line = run_download(as_nobody, server.url, path)
            assert "OSError" in line and "cannot be stored (Permission denied)" in line and str(path) in line


def zipped(members: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        for name, content in members.items():
            writer.writestr(name, content)
    return archive.getvalue()


def arc_archive(count: int = 1119) -> bytes:
    """The shape of the publisher's: a large corpus, and the files one wants."""
    member = data.ARC_FOLDER + "ARC-Challenge-Train.jsonl"
    records = "".join(json.dumps(record) + "\n" for record in standin_records("arc", "train", count, 0, 4))
    return zipped({"ARC_Corpus.txt": random.Random(1).randbytes(5_000_000), member: records.encode()})


@pytest.mark.parametrize("faults", [[], [None, 503, None, "cut"]])
def test_members_are_read_without_the_rest(server, faults):
    """Catches: fetching 680 MB for one; a member read wrong where a request breaks."""
    server.content = zipped({"a": random.Random(1).randbytes(3_000_000), "b": b"x" * 1000, "c": b"y"})
    sent, server.faults = server.asked, list(faults)
    assert read_members(server.url, ["b", "c"], pause=0.001) == {"b": b"x" * 1000, "c": b"y"}
    spans = [span.removeprefix("bytes=").split("-") for span in sent]
    assert sum(int(last) - int(first) + 1 for first, last in spans) < 1_500_000


@pytest.mark.parametrize("spoil, faults, message", [
    (lambda content: b"no archive" * 100, [], "not the archive expected"),
    (lambda content: zipped({"other": b""}), [], "not the archive expected"),
    (lambda content: content[:-5], [], "not the archive expected"),
    (lambda content: content.replace(b"z" * 40, b"w" * 40), [], "not the archive expected"),
    (lambda content: content, ["no ranges"], "does not send parts"),
    (lambda content: content, [404], "404"),
])
def test_broken_archives(server, spoil, faults, message):
    """Catches: BadZipFile, KeyError and the like reaching the user; a damaged member believed."""
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as writer:
        writer.writestr("member", b"z" * 100)
    server.content, server.faults = spoil(stored.getvalue()), faults
    with pytest.raises(FileNotFoundError, match=message):
        read_members(server.url, ["member"], pause=0.001)


def test_a_bomb_is_not_unpacked(server):
    server.content = zipped({"bomb": bytes(LARGE := download_module.LARGEST_MEMBER + 1)})
    assert len(server.content) < LARGE // 100
    with pytest.raises(FileNotFoundError, match="larger than it should be"):
        read_members(server.url, ["bomb"])


def test_arc_is_fetched_into_the_assets(server, tmp_path, monkeypatch):
    """Catches: a wrong member or place; an archive with another number of questions accepted."""
    monkeypatch.setattr(data, "ARC_ARCHIVE", server.url)
    server.content = arc_archive()
    rules = dict(order="context_first", max_prompt=512, max_answer=8, n=None, seed=0)
    assert len(load_examples("arc", "train", assets=tmp_path / "a", **rules)) == 1119
    assert (tmp_path / "a/arc/ARC-Challenge-Train.jsonl").stat().st_size > 100_000
    with pytest.raises(FileNotFoundError, match="ARC-Challenge-Dev"):
        load_examples("arc", "validation", assets=tmp_path / "a", **rules)
    server.content = arc_archive(1118)
    with pytest.raises(FileNotFoundError, match="holds 1,118 records there; 1,119 were published") as caught:
        load_examples("arc", "train", assets=tmp_path / "b", **rules)
    assert str(tmp_path / "b/arc/ARC-Challenge-Train.jsonl") in str(caught.value)
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").rglob("*.jsonl"))


def test_hotpotqa_is_fetched_and_verified(server, tmp_path, monkeypatch):
    """Catches: a file that is not the published one, by count or by content, under the final name."""
    monkeypatch.setattr(data, "HOTPOTQA_FOLDER", server.url + "/")
    name = "hotpotqa/hotpot_train_v1.1.json"
    server.content = json.dumps(standin_records("hotpotqa", "train", 30, 0, 4)).encode()
    for wrong in ("holds 30 records", "sha256", "damaged or cut off"):
        if wrong == "sha256":
            monkeypatch.setitem(data.FILES, ("hotpotqa", "train"), (name, 30))
        if wrong == "damaged or cut off":
            server.content = server.content[:-3]
        with pytest.raises(FileNotFoundError, match=wrong):
            load_examples("hotpotqa", "train", assets=tmp_path, **HOTPOTQA_RULES)
        assert not (tmp_path / name).exists()
    server.content = json.dumps(standin_records("hotpotqa", "train", 30, 0, 4)).encode()
    sha256 = hashlib.sha256(server.content).hexdigest()
    monkeypatch.setitem(data.HOTPOTQA_SHA256, "hotpot_train_v1.1.json", sha256)
    assert len(load_examples("hotpotqa", "train", assets=tmp_path, **HOTPOTQA_RULES)) == 20
