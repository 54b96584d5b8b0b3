"""data.py: records into prompts, files of records, own questions, the draw, batches, and downloads.

Servers stand on the loopback address alone. The records beside the repository are used where they are.
"""

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import resource
import signal
import socket
import struct
import threading
import time
import tracemalloc
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, example, given, settings, strategies as st

import data
from data import (Example, answer_cue, arrange, batches, collate, find_file, load_examples, load_own_examples,
                  loses_question, make_example, prompt_blocks)
from tokenizer import Tokenizer

TOKENIZER = Tokenizer()
ORDERS = {"context_first": "cq", "question_first": "qc", "both_ends": "qcq", "twice": "cqcq"}
RECORDS = {
    "arc": {"id": "Q1", "answerKey": "2", "question": {"stem": "Which is\nwet? ", "choices": [
        {"text": "sand", "label": "3"}, {"text": " rain\r", "label": "2"}, {"text": "dust", "label": "1"},
        {"text": "", "label": "4"}]}},
    "hotpotqa": {"_id": "5a", "question": "Who wrote\nEmma? ", "answer": " Jane Austen", "type": "bridge",
                 "level": "hard", "supporting_facts": [["Emma", 0]],
                 "context": [["Emma ", ["Emma is a novel.", "", " It is by Jane Austen.\n"]], ["Bath", []],
                             ["", ["A\rcity.\r\n"]]]},
}
LITERALLY = {    # context, question, end, answer
    "arc": ("Options:\n1. dust\n2. rain\n3. sand", "Question:\nWhich is wet?", "\n\nAnswer: ", "2"),
    "hotpotqa": ("Context:\nEmma:\n\nEmma is a novel. It is by Jane Austen.\n\nBath:\n\nA city.",
                 "Question:\nWho wrote Emma?", "\n\nAnswer:", " Jane Austen"),
}
RULES = dict(order="context_first", max_prompt=64, max_answer=24)
DRAW = dict(**RULES, n=20, seed=0)
ARC_FILE, HOTPOTQA_FILE = (data.FILES[task, "train"][0] for task in ("arc", "hotpotqa"))
STRANGE = "a\u2028b\u2029c\x85d"    # str.splitlines would cut a line at each of these, JSON does not


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Building the trie takes a third of a second; and load_examples builds one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "Tokenizer", lambda: TOKENIZER)
        yield


def hotpotqa_records(n: int) -> list[dict]:
    return [RECORDS["hotpotqa"] | {"_id": f"id{i}", "question": f"Who wrote book {i}?"} for i in range(n)]


def write_assets(folder: Path, records: list[dict], split: str = "train") -> Path:
    path = folder / data.FILES["hotpotqa", split][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def files_in(folder: Path) -> list[Path]:
    """All that is there, hidden or not, but for the lock, which is empty and stays."""
    return [path for path in folder.rglob("*") if path.name.startswith(".download-")
            or path.is_file() and path.name != ".lock"]


# ---- records into prompts ----------------------------------------------------------------------------------

@pytest.mark.parametrize("task", RECORDS)
@pytest.mark.parametrize("order, letters", ORDERS.items())
def test_prompts_literally(task, order, letters):
    """A record becomes this very text in every order.
    Catches: another template, unsorted or empty options, empty pieces kept, the answer's space."""
    context, question, end, answer = LITERALLY[task]
    blocks = [context if letter == "c" else question for letter in letters]
    made = make_example(task, RECORDS[task], TOKENIZER, order=order, max_prompt=512, max_answer=24)
    assert TOKENIZER.decode(made.prompt) == "\n\n".join(blocks) + end
    assert TOKENIZER.decode(made.prompt[-made.tail:]) == "\n\n".join(blocks[1:]) + end
    assert TOKENIZER.decode(made.answer) == answer and made.text == answer.strip()
    assert made.choices == ({label: TOKENIZER.encode(label)[0] for label in "123"} if task == "arc" else None)


@pytest.mark.parametrize("border, end, answer", [
    ("log", "\n\nAnswer: ", "2"),
    ("token", "\n\nAnswer:", " 2"),
])
def test_arcs_border(border, end, answer):
    """The log ends ARC's prompt with a space; the tokenizer itself would write the space with the answer. The
    setting chooses, and the labels' tokens follow it. A model is asked with the same words as it was trained.
    Catches: a space in both or in neither, and choices under the other border, which no answer matches."""
    made = make_example("arc", RECORDS["arc"], TOKENIZER, arc_border=border, **RULES | dict(max_prompt=512))
    assert TOKENIZER.decode(made.prompt).endswith(end) and TOKENIZER.decode(made.answer) == answer
    assert made.choices == {label: TOKENIZER.encode(answer[:-1] + label)[0] for label in "123"}
    assert [made.choices["2"]] == made.answer
    context, question = prompt_blocks("arc", ["1. dust", "2. rain", "3. sand"], "Which is wet?")
    blocks = arrange("context_first", context, question)
    assert made.prompt == TOKENIZER.encode("\n\n".join(blocks) + answer_cue("arc", border))
    assert answer_cue("hotpotqa", border) == answer_cue("own", border) == "\n\nAnswer:"


def test_end_mark():
    """With end_mark the token of a line break follows the answer, but not one that was cut.
    Catches: a cut answer taught to end where it does not, and a mark that costs the answer a token."""
    def answer(**rules):
        return make_example("hotpotqa", RECORDS["hotpotqa"], TOKENIZER, **RULES | rules).answer

    whole = answer()
    assert answer(end_mark=True) == [*whole, *TOKENIZER.encode("\n")]
    assert answer(end_mark=True, max_answer=len(whole)) == [*whole, *TOKENIZER.encode("\n")]
    assert answer(end_mark=True, max_answer=len(whole) - 1) == whole[:-1]
    assert len(TOKENIZER.encode("\n")) == 1


def test_a_cut_prompt_says_so():
    """An example knows whether its prompt lost its start, and with the order, whether that was the question.
    Catches: a prompt without its question that counts as any other."""
    for order, lost in (("context_first", False), ("question_first", True), ("both_ends", False)):
        made = make_example("hotpotqa", RECORDS["hotpotqa"], TOKENIZER, **RULES | dict(order=order))
        assert not made.cut and not loses_question(made, order)
        length = len(made.prompt)
        for max_prompt in (length, length - 1):
            made = make_example("hotpotqa", RECORDS["hotpotqa"], TOKENIZER,
                                **RULES | dict(order=order, max_prompt=max_prompt))
            assert made.cut == (max_prompt < length)
            assert loses_question(made, order) == (lost and max_prompt < length)


def test_length_rules():
    """Catches: prompts or answers cut at the wrong end, a minimum off by one, a tail beyond its prompt."""
    def made(**rules):
        return make_example("hotpotqa", RECORDS["hotpotqa"], TOKENIZER, **RULES | rules)

    whole = made()
    assert made(max_prompt=7).prompt == whole.prompt[-7:] and made(max_prompt=7).tail == 7 < whole.tail
    assert made(max_answer=1).answer == whole.answer[:1] and len(whole.answer) > 1
    assert made(min_prompt=len(whole.prompt)) == whole
    assert made(min_prompt=len(whole.prompt) + 1) is None
    assert made(max_prompt=7, min_prompt=8) is None    # the minimum is asked of the cut prompt, as in the log
    for order in ("both_ends", "twice"):    # or they would be asked of other records
        assert made(order=order, min_prompt=len(whole.prompt) + 1) is None
        assert len(made(order=order, min_prompt=len(whole.prompt)).prompt) > len(whole.prompt)


@pytest.mark.parametrize("task, changes, outcome", [
    ("hotpotqa", {"question": " \n"}, None), ("hotpotqa", {"answer": ""}, None),
    ("hotpotqa", {"context": []}, None), ("arc", {"answerKey": " "}, None),
    ("arc", {"question": RECORDS["arc"]["question"] | {"stem": " "}}, None),
    ("arc", {"question": {"stem": "Which?", "choices": [{"text": "rain", "label": "2"}]}}, None),
    ("arc", {"answerKey": "E"}, "'E' should be one of"),
    ("arc", {"question": {"stem": "Which?", "choices": 2 * [{"text": "a", "label": "2"}]}}, "each given"),
    ("hotpotqa", {"context": [["Emma", ["x", None]]]}, "a sentence of the paragraph 'Emma'"),
])
def test_what_is_left_out_and_what_is_refused(task, changes, outcome):
    """Catches: an empty record trained on, and a gold label that no scorer could ever choose."""
    refused = pytest.raises(ValueError, match=outcome) if outcome else contextlib.nullcontext()
    with refused:
        assert make_example(task, RECORDS[task] | changes, TOKENIZER, **RULES) is None


KNOWN = st.sampled_from("id _id question stem choices text label answerKey answer context".split())
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("A")
JSON = st.recursive(LEAVES, max_leaves=12, extend=lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(KNOWN, inner, max_size=6)))


def variants(record, junk):
    """The record with junk in place of one of its parts, for every part, however deep."""
    yield junk
    if isinstance(record, (dict, list)):
        for key in record if isinstance(record, dict) else range(len(record)):
            for part in variants(record[key], junk):
                changed = record.copy()
                changed[key] = part
                yield changed


@settings(deadline=None, max_examples=50)
@given(junk=JSON, task=st.sampled_from(list(RECORDS)), order=st.sampled_from(list(ORDERS)))
def test_fuzzed_records_give_an_example_or_a_value_error(junk, task, order):
    """Whatever stands in whatever place of a record, there is an Example of sound lengths, or a ValueError.
    Catches: a shape nobody foresaw that ends in a traceback, and a tail that is off by a token."""
    second = LITERALLY[task][ORDERS[order][1] == "q"].partition("\n")[0]
    for record in variants(RECORDS[task], junk):
        with contextlib.suppress(ValueError):
            made = make_example(task, record, TOKENIZER, order=order, max_prompt=512, max_answer=4)
            if made is not None:
                assert 1 <= len(made.answer) <= 4 and 1 <= made.tail <= len(made.prompt) <= 512
                assert TOKENIZER.decode(made.prompt[-made.tail:]).startswith(second)


# ---- files of records --------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())
       | st.integers(0, 900).map(lambda cut: json.dumps(hotpotqa_records(3)).encode()[:cut]))
@example(content=b"[" * 100_000)
@example(content=b'[{"a": ' + b"[" * 50_000)
@example(content=b'[{"a": ' + b"9" * 5000 + b"}]")
def test_damaged_files_get_one_line(tmp_path, content):
    """Catches: a truncated download trained on as a smaller data set, and a traceback at any damage."""
    for task, name in (("hotpotqa", HOTPOTQA_FILE), ("arc", ARC_FILE)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            load_examples(task, "train", assets=tmp_path, **DRAW)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_damaged_record_is_named(tmp_path):
    """Catches: a place in the shuffled order told for that in the file, and an error far from its cause."""
    records = hotpotqa_records(5)
    for change in ({"context": 5}, {"question": "\ud800"}):    # JSON can spell this character, UTF-8 cannot
        path = write_assets(tmp_path, [*records[:3], records[3] | change, records[4]])
        with pytest.raises(ValueError, match="record 4: ") as caught:
            load_examples("hotpotqa", "train", assets=tmp_path, **DRAW | dict(n=5))
        assert str(path) in str(caught.value)
    path = tmp_path / ARC_FILE
    path.parent.mkdir()
    path.write_text(json.dumps(RECORDS["arc"]) + "\n\n" + json.dumps(RECORDS["arc"])[:-1])
    with pytest.raises(ValueError, match=f"{path} is damaged or cut off .line 3: not JSON"):
        load_examples("arc", "train", assets=tmp_path, **DRAW)


def test_strange_line_ends_are_no_line_ends(tmp_path):
    """JSON allows U+2028, U+2029 and U+0085 inside a string, and Windows writes a byte-order mark and CRLF.
    Catches: "damaged or cut off … delete it" for a file that is as its publisher wrote it."""
    records = [RECORDS["arc"] | {"id": f"{i}{STRANGE}", "question": RECORDS["arc"]["question"]
                                 | {"stem": STRANGE}} for i in range(3)]
    path = tmp_path / ARC_FILE
    path.parent.mkdir()
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    examples = load_examples("arc", "train", assets=tmp_path, **DRAW | dict(n=None))
    assert sorted(made.id for made in examples) == [record["id"] for record in records]
    assert all(f"Question:\n{STRANGE}\n\n" in TOKENIZER.decode(made.prompt) for made in examples)


# sha256 over the examples as the first version of this project drew them, from the records beside it
DRAWN = [
    ("arc", "train", "context_first", 512, 0, 8, 0, "fd8277991da9dfb7"),
    ("arc", "validation", "question_first", 512, 0, 8, 1234, "5cab129287650c90"),
    ("hotpotqa", "validation", "question_first", 2048, 1024, 24, 1234, "d7a4ef48a49dbe7c"),
    ("hotpotqa", "validation", "twice", 8192, 1536, 24, 1234, "b1d9887e73fc17a4"),
]


@pytest.mark.parametrize("task, split, order, max_prompt, min_prompt, max_answer, seed, digest", DRAWN)
def test_the_examples_stay_what_they_were(shared, task, split, order, max_prompt, min_prompt, max_answer,
                                          seed, digest):
    """Catches: any change of a template, a length rule or the draw, which would make old runs other runs."""
    examples = load_examples(task, split, order=order, max_prompt=max_prompt, min_prompt=min_prompt,
                             max_answer=max_answer, n=60, seed=seed, assets=shared / "data")
    values = [[made.id, made.prompt, made.answer, made.text, made.choices, made.tail] for made in examples]
    assert hashlib.sha256(json.dumps(values).encode()).hexdigest().startswith(digest)


def test_real_records(shared):
    """Catches: a real record the parsers refuse, a label of more than one token, the question cut away."""
    for split, count in (("train", 1119), ("validation", 299), ("test", 1172)):
        examples = load_examples("arc", split, assets=shared / "data", **DRAW | dict(max_prompt=512, n=None))
        assert len(examples) == count and all(2 <= len(made.choices) <= 5 for made in examples)
        assert all([made.choices[made.text]] == made.answer for made in examples)
    rules = DRAW | dict(max_prompt=1600, min_prompt=1536, n=20)
    for made in load_examples("hotpotqa", "validation", assets=shared / "data", **rules):
        assert 1536 <= len(made.prompt) <= 1600
        assert TOKENIZER.decode(made.prompt[-made.tail:]).startswith("Question:")
        assert TOKENIZER.decode(made.answer) == " " + made.text or len(made.answer) == 24


# ---- the draw ----------------------------------------------------------------------------------------------

def test_the_draw_is_the_logs(tmp_path, capsys):
    """Catches: another shuffle, another order of the examples, records left out that count towards n."""
    records = hotpotqa_records(30)
    for i in (3, 4, 5, 17):
        records[i]["answer"] = " "
    write_assets(tmp_path, records)
    indices = list(range(30))
    random.Random(7).shuffle(indices)
    expected = [f"id{i}" for i in indices if i not in (3, 4, 5, 17)]
    for n in (20, None):
        examples = load_examples("hotpotqa", "train", assets=tmp_path, **DRAW | dict(seed=7, n=n))
        assert [made.id for made in examples] == expected[:n]
    assert capsys.readouterr().err.count("holds 30 records; the published file holds 90,447") == 2


def test_too_few_and_twice_the_same(tmp_path):
    """Catches: a round on fewer questions than it says, and one question scored as two."""
    records = hotpotqa_records(30)
    write_assets(tmp_path, records, "validation")
    for changes, words in ((dict(n=31), "only 30 of 30 .* lower n_val = 31$"),
                           (dict(min_prompt=60), "only 0 of 30 .*min_prompt = 60.* n_val = 20 or min_p")):
        with pytest.raises(ValueError, match=words):
            load_examples("hotpotqa", "validation", assets=tmp_path, **DRAW | changes)
    path = write_assets(tmp_path, [*records, records[3] | {"answer": "no"}])
    with pytest.raises(ValueError, match=f"{path}: two of its records have the same id"):
        load_examples("hotpotqa", "train", assets=tmp_path, **DRAW | dict(n=31))


def test_lost_questions_are_told(tmp_path, capsys):
    """Catches: a control whose question was cut away, without a word (14 of 652 real prompts)."""
    write_assets(tmp_path, hotpotqa_records(30))
    for order, told in (("question_first", True), ("context_first", False)):
        load_examples("hotpotqa", "train", assets=tmp_path, **DRAW | dict(order=order, max_prompt=20))
        note = "20 of 20 prompts of hotpot_train_v1.1.json had more than 20 tokens and lost the question"
        assert (note in capsys.readouterr().err) == told


# ---- own questions -----------------------------------------------------------------------------------------

OWN = {"context": "Emma is a novel.\nIt is by Jane Austen.", "question": "Who wrote Emma?",
       "answer": "Jane Austen"}


def write_own(folder: Path, *lines: dict | str | bytes, split: str = "train") -> Path:
    path = folder / f"{split}.jsonl"
    texts = []
    for line in lines:
        if isinstance(line, dict):
            line = json.dumps(line, ensure_ascii=False)
        if isinstance(line, str):
            line = line.encode()
        texts.append(line)
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def read_own_file(folder: Path, split: str = "train", **rules) -> list[Example]:
    return load_own_examples(folder, split, **dict(order="context_first", max_prompt=512, max_answer=24, n=20)
                             | rules)


@pytest.mark.parametrize("order, letters", ORDERS.items())
def test_own_questions_literally(tmp_path, order, letters):
    """Own questions get HotpotQA's form in every order, and keep the line breaks that they have.
    Catches: another template than the README's, and a context whose lines are joined."""
    write_own(tmp_path, OWN)
    made, = read_own_file(tmp_path, order=order, end_mark=True)
    blocks = {"c": f"Context:\n{OWN['context']}", "q": f"Question:\n{OWN['question']}"}
    assert TOKENIZER.decode(made.prompt) == "\n\n".join(blocks[letter] for letter in letters) + "\n\nAnswer:"
    assert TOKENIZER.decode(made.answer) == " Jane Austen\n"
    assert (made.text, made.choices, made.cut) == ("Jane Austen", None, False)


def test_own_questions_keep_order_and_ids(tmp_path, capsys):
    """The first n come in the file's order, under their id or their line's number. A byte-order mark, CRLF,
    blank lines and U+2028 do no harm. Catches: a shuffle, ids that shift with a blank line."""
    write_own(tmp_path, b"\xef\xbb\xbf" + json.dumps(OWN).encode(), "", OWN | {"id": "b"}, OWN | {"id": 17},
              json.dumps(OWN | {"question": STRANGE}, ensure_ascii=False) + "\r", OWN)
    examples = read_own_file(tmp_path, n=4)
    assert [made.id for made in examples] == ["1", "b", "17", "5"]
    assert f"Question:\n{STRANGE}\n" in TOKENIZER.decode(examples[3].prompt)
    assert "train.jsonl: 4 questions\n" in capsys.readouterr().err
    assert len(read_own_file(tmp_path)) == 5    # as many as there are


@pytest.mark.parametrize("line, words", [
    ({"context": "c", "question": "q"}, "line 2: 'answer' is missing or not a str"),
    (OWN | {"context": ["c"]}, "line 2: 'context' is missing or not a str"),
    (OWN | {"question": " \n"}, "line 2: 'question' is empty"),
    (OWN | {"answer": "Jane\nAusten"}, "line 2: 'answer' has a line break, and an answer is one line"),
    (OWN | {"id": 1}, "line 2: its id '1' is that of line 1"),
    (OWN | {"id": None}, "line 2: 'id' is missing or not a str"), (OWN | {"id": True}, "line 2: 'id' is"),
    ('"c", "q"', "line 2: not JSON: Extra data at character 4"), ("[1]", "line 2: 'context' is missing"),
    ('{"context": "c', "line 2: not JSON: Unterminated string starting at at character 13"),
    ('{"context": ' + "[" * 100_000, "line 2: not JSON that can be read: too deeply nested"),
    ('{"context": "\\ud800", "question": "q", "answer": "a"}', "line 2: "),
    ("Ω".encode("utf-16"), r"is not UTF-8 \("),
], ids=lambda value: repr(value)[:40])
def test_a_wrong_line_of_ones_own(tmp_path, line, words):
    """Every fault is one line that names file and line. Catches: a traceback, a fault without its place."""
    path = write_own(tmp_path, OWN, line)
    with pytest.raises(ValueError, match=words) as caught:
        read_own_file(tmp_path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_too_few_own_questions(tmp_path, capsys):
    """Catches: a file that is not there, an empty one, one validation question, which has no spread, and
    questions that are left out as too short without a word."""
    with pytest.raises(FileNotFoundError, match="train.jsonl is missing: write one JSON object a line there"):
        read_own_file(tmp_path)
    write_own(tmp_path, "", "  ")
    with pytest.raises(ValueError, match="holds 0 questions that can be used. Write at least 1 question"):
        read_own_file(tmp_path)
    write_own(tmp_path, OWN, split="validation")
    with pytest.raises(ValueError, match="holds 1 question that can be used. Write at least 2 questions"):
        read_own_file(tmp_path, "validation")
    write_own(tmp_path, OWN, OWN | {"context": 50 * OWN["context"]})
    assert [made.id for made in read_own_file(tmp_path, min_prompt=100)] == ["2"]
    assert "1 of the 2 questions in" in (said := capsys.readouterr().err) and "min_prompt = 100" in said


def test_cut_own_questions_are_told(tmp_path, capsys):
    """Catches: prompts that lost their context, or the question itself, without a word."""
    write_own(tmp_path, OWN)
    for order, lost in (("context_first", "their start"),
                        ("question_first", "the question, which came first")):
        assert read_own_file(tmp_path, order=order, max_prompt=9)[0].cut
        assert f"1 of them had more than max_prompt = 9 tokens and lost {lost}\n" in capsys.readouterr().err


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(JSON | st.fixed_dictionaries({key: JSON for key in OWN}), min_size=1, max_size=3))
def test_any_own_file_is_read_or_refused(tmp_path, values):
    """Catches: any way out of a file but examples, or one line that names it."""
    path = write_own(tmp_path, *(json.dumps(value) for value in values))
    with contextlib.suppress(ValueError):
        try:
            assert all(made.prompt and made.answer for made in read_own_file(tmp_path))
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            raise


# ---- batches -----------------------------------------------------------------------------------------------

def dummies(n: int) -> list[Example]:
    lengths = random.Random(n)
    return [Example(str(i), [1] * lengths.randint(1, 50), [2] * (1 + i % 3), "", None, 1) for i in range(n)]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 9), st.integers(0, 300), st.booleans())
def test_batches(n, batch_size, seed, start, shuffle):
    """Catches: examples lost or repeated in an epoch, a resume off by a step, the stand-in's order lost."""
    examples = dummies(n)
    per_epoch = -(-n // batch_size)
    stream = batches(examples, batch_size, seed, shuffle=shuffle)
    drawn = [next(stream) for _ in range(start + 2 * per_epoch)]
    for first in (0, per_epoch):
        epoch = [made for batch in drawn[first:first + per_epoch] for made in batch]
        assert sorted(epoch, key=lambda made: int(made.id)) == examples if shuffle else epoch == examples
    resumed = batches(examples, batch_size, seed, start, shuffle)
    assert [next(resumed) for _ in range(2 * per_epoch)] == drawn[start:]
    assert all(len(batch) <= batch_size for batch in drawn)


def test_batches_pad_little_and_change_with_seed_and_epoch():
    """Catches: bucketing that does nothing, and an order that is the same every epoch or for every seed."""
    examples = dummies(512)
    stream = batches(examples, 8, seed=0)
    first, second = ([next(stream) for _ in range(64)] for _ in range(2))
    assert first != second and first != [batch for batch, _ in zip(batches(examples, 8, seed=1), range(64))]
    used = sum(len(made.prompt) for made in examples)
    longest = [max(len(made.prompt) for made in batch) for batch in first]
    assert 8 * sum(longest) < 1.1 * used    # 1.8 in the order drawn
    assert longest[:16] != sorted(longest[:16])


def test_collate():
    """Catches: padding on the wrong side, lengths of the wrong rows."""
    rows = [Example("a", [5, 6, 7], [8], "", None, 1), Example("b", [9], [3, 4], "", None, 1)]
    expected = [[5, 6, 7], [9, 0, 0]], [3, 1], [[8, 0], [3, 4]], [1, 2]
    for part, values in zip(collate(rows), expected, strict=True):
        assert part.tolist() == values and part.dtype == torch.int64


# ---- downloads ---------------------------------------------------------------------------------------------

def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", method) as writer:
        for name, content in members.items():
            writer.writestr(name, content)
    return archive.getvalue()


GOOD = json.dumps([*range(90_447)]).encode()    # as many records as the published file has, half a megabyte
COPY = b" " + GOOD
MEMBERS = {data.ARC_FOLDER + Path(name).name: b'{"id": 1}\n' * count
           for (task, _), (name, count) in data.FILES.items() if task == "arc"}
TRAIN = data.ARC_FOLDER + "ARC-Challenge-Train.jsonl"
ARCHIVE = zipped({"corpus": b"large", **MEMBERS})
SLOW_HEADERS = "HTTP/1.0 200 OK\r\nServer: x\r\n\r\n"


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends what server.contents holds for the first part of the path; each answer takes the next fault."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        fault = server.faults.pop(0) if server.faults else None
        content = server.contents[self.path.split("/")[1]]
        promised = len(content)
        if fault == "promises more":
            promised += 1
        if fault == "promises less":
            promised -= 1
        with contextlib.suppress(OSError):      # a reader who has what it wanted hangs up
            if isinstance(fault, int):
                return self.send_error(fault)
            if fault == "slow headers":
                return self.drip(SLOW_HEADERS.encode())
            self.send_response(200)
            if fault not in ("no length", "no length, cut", "endless"):
                self.send_header("Content-Length", "many" if fault == "wrong length" else str(promised))
            self.end_headers()
            if fault == "slow":
                self.drip(content)
            elif fault == "slow at last":
                self.wfile.write(content[:-1000])
                self.drip(content[-1000:])
            elif fault in ("cut", "no length, cut"):
                self.wfile.write(content[:len(content) // 2])
            else:
                self.wfile.write(content)
            while fault == "endless":
                self.wfile.write(content)

    def drip(self, content: bytes):
        for byte in content:
            if self.server.stopped.wait(0.05):
                return
            self.wfile.write(bytes([byte]))


@pytest.fixture
def server(monkeypatch):
    """The publishers' servers and that of the copy, on the loopback address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.contents = {"publisher": GOOD, "copy": COPY, "arc": ARCHIVE}
        server.faults, server.asked, server.stopped = [], [], threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        point_to(monkeypatch, server.server_address[1])
        yield server
        server.stopped.set()
        server.shutdown()
        thread.join()


def point_to(monkeypatch, port: int) -> None:
    monkeypatch.setattr(data, "HOTPOTQA_FOLDER", f"http://127.0.0.1:{port}/publisher/")
    monkeypatch.setattr(data, "HOTPOTQA_COPY", f"http://127.0.0.1:{port}/copy/")
    monkeypatch.setattr(data, "ARC_ARCHIVE", f"http://127.0.0.1:{port}/arc/ARC.zip")
    monkeypatch.setitem(data.HOTPOTQA_SHA256, "hotpot_train_v1.1.json", hashlib.sha256(GOOD).hexdigest())


def refused(task: str, assets: Path, words: str = "", offline=False) -> str:
    """The file cannot be had: one line says why and what to do by hand, and nothing is left behind."""
    with pytest.raises(FileNotFoundError) as caught:
        find_file(task, "train", assets, offline)
    message, place = str(caught.value), assets / data.FILES[task, "train"][0]
    source, what = data.HOTPOTQA_COPY + place.name, "it"
    if offline:
        source = data.HOTPOTQA_FOLDER + place.name
    if task == "arc":
        source, what = data.ARC_ARCHIVE, TRAIN
    assert message.startswith(f"could not download {place}: ") and words in message and "\n" not in message
    assert message.endswith(f". Download {source} yourself and save {what} as {place}.")
    assert ".download-" not in message    # a folder that is gone when the message is read
    assert not files_in(assets) and socket.getdefaulttimeout() is None
    return message


@pytest.mark.parametrize("fault, content, words", [
    (404, GOOD, "404"), (500, GOOD, "500"), ("cut", GOOD, "bytes"),
    ("no length, cut", GOOD, "sha256 differs"),
    ("promises more", GOOD, "bytes"), ("promises less", GOOD, "sha256 differs"),
    (None, b"", "sha256 differs"),
    (None, b"<html>Sign in", "sha256 differs"), (None, GOOD[:-1] + b" ]", "sha256 differs"),
])
def test_a_file_comes_whole_and_checked_or_not_at_all(server, tmp_path, capsys, fault, content, words):
    """Catches: a half file, an empty one or a web page under the final name, and temporary files left."""
    server.faults, server.contents["publisher"] = [fault, 503], content
    refused("hotpotqa", tmp_path, "503")
    assert words in capsys.readouterr().err
    server.contents["publisher"] = GOOD
    for _ in range(2):
        assert find_file("hotpotqa", "train", tmp_path, offline=False) == tmp_path / HOTPOTQA_FILE
    assert (tmp_path / HOTPOTQA_FILE).read_bytes() == GOOD and len(files_in(tmp_path)) == 1
    assert len(server.asked) == 3    # what is there is left alone


def test_a_file_without_a_promised_length(server, tmp_path, monkeypatch, capsys):
    """Catches: "12 of 0 MB" where the server does not say how much it sends."""
    monkeypatch.setattr("files.SECONDS_BETWEEN_LINES", 0)
    server.faults = ["no length"]
    assert find_file("hotpotqa", "train", tmp_path, offline=False).read_bytes() == GOOD
    said = capsys.readouterr().err
    assert "downloading hotpot_train_v1.1.json: 1 MB\n" in said and "of 0 MB" not in said


@pytest.mark.parametrize("fault, words", [
    ("slow", "too slow: "), ("slow at last", "too slow: "), ("slow headers", "too slow"),
    ("endless", "does not stop sending, after "), (None, "it would be "),
])
def test_a_server_is_not_waited_for_without_end(server, tmp_path, monkeypatch, fault, words):
    """A server is given up if it sends a byte now and then, from its first byte or after a fast beginning, or
    if it sends more than a file can be. Catches: a command that hangs for ever, a disk that fills up."""
    monkeypatch.setattr(data, "SECONDS_TO_BEGIN", 0.4)
    if fault in (None, "endless"):
        monkeypatch.setattr(data, "LARGEST_FILE", 10_000)
    server.contents["arc"] = 20 * ARCHIVE
    server.faults = [fault]
    started = time.monotonic()
    message = refused("arc", tmp_path, words)
    assert time.monotonic() - started < 8
    if fault == "endless":
        received = int(message.partition(words)[2].partition(" bytes")[0].replace(",", ""))
        assert received < 10_000 + (1 << 16)    # one part more than it may be


@pytest.mark.parametrize("split", ["train", "validation"])
def test_hotpotqas_copy_is_the_second_source(server, tmp_path, monkeypatch, capsys, split):
    """The publisher's server is tried first. The copy is another file, and is named as a copy; what is known
    of it is checked. Catches: a copy taken for the original, or one that holds other records."""
    name = Path(data.FILES["hotpotqa", split][0]).name
    if split == "validation":
        server.contents["copy"] = json.dumps([*range(7405)]).encode()
        digest = hashlib.sha256(server.contents["copy"]).hexdigest()
        monkeypatch.setitem(data.HOTPOTQA_COPY_SHA256, name, digest)
    server.faults = [404]
    path = find_file("hotpotqa", split, tmp_path, offline=False)
    assert path.read_bytes() == server.contents["copy"]
    assert server.asked == [f"/publisher/{name}", f"/copy/{name}"]
    said = capsys.readouterr().err
    assert "404" in said
    assert "note: trying a community's copy, which is another file of the same records" in said
    path.unlink()
    server.faults, server.contents["copy"] = [404], server.contents["copy"].replace(b"[0, ", b"[")
    with pytest.raises(FileNotFoundError) as caught:
        find_file("hotpotqa", split, tmp_path, offline=False)
    words = {"train": "it holds 90,446 records, which should be 90,447", "validation": "its sha256 differs"}
    assert words[split] in str(caught.value)
    assert not files_in(tmp_path)


@pytest.mark.parametrize("task", RECORDS)
def test_without_a_network(tmp_path, monkeypatch, task):
    """Catches: an offline run that touches the network, and a minute of silence where nobody answers."""
    monkeypatch.setattr(data, "SECONDS_TO_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(monkeypatch, silent.getsockname()[1])
        started = time.monotonic()
        refused(task, tmp_path, "timed out")
        assert time.monotonic() - started < 8
    refused(task, tmp_path, "refused")
    monkeypatch.setattr(urllib.request, "urlopen", None)
    refused(task, tmp_path / "offline", "downloads are off", offline=True)
    assert not (tmp_path / "offline").exists()


@pytest.mark.parametrize("task", RECORDS)
def test_onto_a_full_disk_or_into_no_folder(server, tmp_path, task):
    """Catches: a file cut where the disk was full, and an error that names neither file nor folder."""
    server.contents["arc"] = zipped(MEMBERS, zipfile.ZIP_STORED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        refused(task, tmp_path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (tmp_path / "file").write_text("where the folder should be")
    with pytest.raises(FileNotFoundError, match="Not a directory"):
        find_file(task, "train", tmp_path / "file", offline=False)


def in_child(act) -> int:
    """Run this in a process of its own; gives its id."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            act()
            os._exit(0)
        os._exit(1)
    return child


def test_two_processes_fetch_a_file_once(server, tmp_path):
    """Catches: a gigabyte fetched twice, and processes that share a temporary file."""
    children = [in_child(lambda: find_file("arc", "train", tmp_path, offline=False)) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert (tmp_path / ARC_FILE).read_bytes() == MEMBERS[TRAIN] and len(server.asked) == 1


@pytest.mark.parametrize("next_start", ["downloads", "is offline", "finds the file there"])
def test_what_a_killed_download_left_is_swept(server, tmp_path, next_start):
    """The next start deletes it, whatever else that start does. Catches: a gigabyte in a hidden folder."""
    server.faults = ["slow"]
    child = in_child(lambda: find_file("arc", "train", tmp_path, offline=False))
    while not (list(tmp_path.rglob(".download-*/*")) and server.asked):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deep = next(tmp_path.rglob(".download-*")) / "tmpabc"    # as if it had been killed while it unpacked
    deep.mkdir()
    (deep / "member").write_text("half")
    if next_start == "finds the file there":
        (tmp_path / ARC_FILE).write_bytes(MEMBERS[TRAIN])
    if next_start == "is offline":
        refused("arc", tmp_path, "downloads are off", offline=True)
    else:
        assert find_file("arc", "train", tmp_path, offline=False).read_bytes() == MEMBERS[TRAIN]
    assert not list(tmp_path.rglob(".download-*"))


def test_a_download_under_way_is_not_swept(tmp_path):
    """Catches: one process that deletes what another is just writing."""
    part = tmp_path / "arc" / ".download-x" / "part"
    part.parent.mkdir(parents=True)
    part.write_text("half")
    with FileLock(tmp_path / "arc" / ".lock"):
        with pytest.raises(FileNotFoundError):
            find_file("arc", "train", tmp_path, offline=True)
        assert part.exists()
    with pytest.raises(FileNotFoundError):
        find_file("arc", "train", tmp_path, offline=True)
    assert not part.parent.exists()


def test_arcs_archive_gives_all_three_files(server, tmp_path):
    """One download gives the three files, and leaves alone one that is there already.
    Catches: 680 MB fetched three times, the archive kept, a file of one's own overwritten."""
    own = tmp_path / data.FILES["arc", "test"][0]
    own.parent.mkdir()
    own.write_text("my own")
    for split in ("train", "validation"):
        path = find_file("arc", split, tmp_path, offline=False)
        assert path.read_bytes() == MEMBERS[data.ARC_FOLDER + path.name]
    assert len(server.asked) == 1 and len(files_in(tmp_path)) == 3 and own.read_text() == "my own"


CATALOGUE, END = b"PK\1\2", b"PK\5\6"    # mark an entry of an archive's table of contents, and its end
STORED = zipped(MEMBERS, zipfile.ZIP_STORED)


def overwritten(archive: bytes, mark: bytes, offset: int, value: int) -> bytes:
    """The archive with 4 bytes changed in its last record with this mark."""
    place = archive.rindex(mark) + offset
    return archive[:place] + struct.pack("<I", value) + archive[place + 4:]


@pytest.mark.parametrize("content, words", [
    (b"no archive" * 100, "not a zip file"), (b"", "not a zip file"), (ARCHIVE[:-5], "not a zip file"),
    (zipped({"other": b""}), "has no ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Train.jsonl"),
    (zipped({TRAIN: MEMBERS[TRAIN]}), "has no ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Dev.jsonl"),
    (STORED.replace(b'"id": 1', b'"id": 2', 1), "CRC"), (overwritten(ARCHIVE, CATALOGUE, 8, 1), "encrypted"),
    (overwritten(ARCHIVE, CATALOGUE, 10, 9), "damaged"), (overwritten(ARCHIVE, END, 16, 999_999), "damaged"),
    (overwritten(overwritten(STORED, CATALOGUE, 20, 999_999), CATALOGUE, 24, 999_999), "damaged"),
    (zipped(MEMBERS | {TRAIN: MEMBERS[TRAIN] + b"{}\n"}), "holds 1,120 records, which should be 1,119"),
    (zipped(MEMBERS | {TRAIN: b"{\n" * 1119}), "line 1: not JSON"),
    (zipped(MEMBERS | {TRAIN: bytes(1_000_001)}), "would be 1,000,001 bytes"),
], ids=lambda value: repr(value)[:30])
def test_broken_archives(server, tmp_path, monkeypatch, content, words):
    """Catches: BadZipFile and the like reaching the user, a damaged member believed, two of three files."""
    monkeypatch.setattr(data, "LARGEST_MEMBER", 1_000_000)
    server.contents["arc"] = content
    refused("arc", tmp_path, words)


def test_a_lying_table_of_contents_costs_no_memory(server, tmp_path, monkeypatch):
    """A member that says it is small would unpack to 100 MB.
    Catches: all of it in memory before anything looks at its size."""
    monkeypatch.setattr(data, "LARGEST_MEMBER", 1_000_000)
    server.contents["arc"] = overwritten(zipped({TRAIN: bytes(100_000_000)}), CATALOGUE, 24, 5000)
    tracemalloc.start()
    try:
        refused("arc", tmp_path, "the archive is damaged: Bad CRC")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_an_archive_is_one_error(tmp_path, draw):
    """Up to four bytes anywhere are changed: the member is read whole, or ValueError says why not.
    Catches: one of the dozen errors of zipfile that reaches the user as a traceback."""
    small = zipped({"corpus": b"large", TRAIN: b'{"id": 1}\n' * 20})
    damaged = bytearray(small)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(small) - 1))] = draw.draw(st.integers(0, 255))
    path = tmp_path / "archive.zip"
    path.write_bytes(damaged)
    with contextlib.suppress(ValueError):
        assert data.read_member(path, TRAIN) == b'{"id": 1}\n' * 20
