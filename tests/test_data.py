"""data.py: prompts, files of records, the draw, batches, downloads over the loopback."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import socket
import struct
import threading
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

import data
from data import Example, batches, collate, download, find_file, load_examples, make_example
from test_files import full_disk
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
    return [path for path in folder.rglob("*") if path.is_file()]


# ---- records into prompts ----------------------------------------------------------------------------------

@pytest.mark.parametrize("task", RECORDS)
@pytest.mark.parametrize("order, letters", ORDERS.items())
def test_prompts_literally(task, order, letters):
    """Catches another template or order, unsorted or empty options, empty pieces kept, the answer's space."""
    context, question, end, answer = LITERALLY[task]
    blocks = [context if letter == "c" else question for letter in letters]
    made = make_example(task, RECORDS[task], TOKENIZER, order=order, max_prompt=512, max_answer=24)
    assert TOKENIZER.decode(made.prompt) == "\n\n".join(blocks) + end
    assert TOKENIZER.decode(made.prompt[-made.tail:]) == "\n\n".join(blocks[1:]) + end
    assert TOKENIZER.decode(made.answer) == answer and made.text == answer.strip()
    assert made.choices == ({label: TOKENIZER.encode(label)[0] for label in "123"} if task == "arc" else None)


def test_length_rules():
    """Catches prompts or answers cut at the wrong end, a minimum off by one, a tail beyond its prompt."""
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
    """Catches an empty record trained on, and a gold label that no scorer could ever choose."""
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
    """Catches a record of an unforeseen shape that ends in a traceback, and a tail that is off by a token."""
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
    """Catches a truncated download trained on as a smaller data set, and a traceback at any damage."""
    for task, name in (("hotpotqa", HOTPOTQA_FILE), ("arc", ARC_FILE)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            load_examples(task, "train", assets=tmp_path, **DRAW)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_damaged_record_is_named(tmp_path):
    """Catches a place in the shuffled order told for that in the file, and an error far from its cause."""
    records = hotpotqa_records(5)
    for change in ({"context": 5}, {"question": "\ud800"}):    # JSON can spell this character, UTF-8 cannot
        path = write_assets(tmp_path, [*records[:3], records[3] | change, records[4]])
        with pytest.raises(ValueError, match="record 4: ") as caught:
            load_examples("hotpotqa", "train", assets=tmp_path, **DRAW | dict(n=5))
        assert str(path) in str(caught.value)
    path = tmp_path / ARC_FILE
    path.parent.mkdir()
    path.write_text(json.dumps(RECORDS["arc"]) + "\n\n" + json.dumps(RECORDS["arc"])[:-1])
    with pytest.raises(ValueError, match=f"{path}: damaged or cut off"):
        load_examples("arc", "train", assets=tmp_path, **DRAW)


def test_real_records(shared):
    """Catches a real record the parsers refuse, a label of more than one token, the question cut away."""
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
    """Catches another shuffle, another order of the examples, records left out that count towards n."""
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
    """Catches a round on fewer questions than it says, and one question scored as two."""
    records = hotpotqa_records(30)
    write_assets(tmp_path, records, "validation")
    for changes, words in ((dict(n=31), "only 30 of 30 .* lower n_val = 31$"),
                           (dict(min_prompt=60), "only 0 of 30 .*min_prompt = 60.* n_val = 20 or min_p")):
        with pytest.raises(ValueError, match=words):
            load_examples("hotpotqa", "validation", assets=tmp_path, **DRAW | changes)
    path = write_assets(tmp_path, [*records, records[3] | {"answer": "no"}])
    with pytest.raises(ValueError, match=f"{path}: two of its records have the same id"):
        load_examples("hotpotqa", "train", assets=tmp_path, **DRAW | dict(n=31))


# ---- batches -----------------------------------------------------------------------------------------------

def dummies(n: int) -> list[Example]:
    lengths = random.Random(n)
    return [Example(str(i), [1] * lengths.randint(1, 50), [2] * (1 + i % 3), "", None, 1) for i in range(n)]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 9), st.integers(0, 300), st.booleans())
def test_batches(n, batch_size, seed, start, shuffle):
    """Catches examples lost or repeated in an epoch, a resume off by a step, the stand-in's order lost."""
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
    """Catches bucketing that does nothing, and an order that is the same every epoch or for every seed."""
    examples = dummies(512)
    stream = batches(examples, 8, seed=0)
    first, second = ([next(stream) for _ in range(64)] for _ in range(2))
    assert first != second and first != [batch for batch, _ in zip(batches(examples, 8, seed=1), range(64))]
    used = sum(len(made.prompt) for made in examples)
    longest = [max(len(made.prompt) for made in batch) for batch in first]
    assert 8 * sum(longest) < 1.1 * used    # 1.8 in the order drawn
    assert longest[:16] != sorted(longest[:16])


def test_collate():
    """Catches padding on the wrong side, lengths of the wrong rows."""
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


GOOD = json.dumps(hotpotqa_records(5000)).encode()    # 2 MB
MEMBER = data.ARC_FOLDER + "ARC-Challenge-Train.jsonl"
LINES = b"".join(b'{"id": "%d"}%300s\n' % (i, b"") for i in range(1119))
STORED, ARCHIVE = zipped({MEMBER: LINES}, zipfile.ZIP_STORED), zipped({MEMBER: LINES})


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends server.content, whole or the part asked for; each answer takes the next of server.faults."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        fault = server.faults.pop(0) if server.faults else None
        content = server.content
        server.asked.append(asked)
        if isinstance(fault, int):
            return self.send_error(fault)
        if asked and fault != "no ranges":
            first, last = asked.removeprefix("bytes=").split("-")
            first = int(first or max(0, len(content) - int(last)))    # "-100": the last hundred
            content = content[first:int(last) + 1] if asked[6] != "-" else content[first:]
            self.send_response(206)
            span = f"{first}-{first + len(content) - 1}"
            self.send_header("Content-Range", f"bytes {span}/{len(server.content)}")
        else:
            self.send_response(200)
        if fault != "no length, cut":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):      # a reader who has what it wanted hangs up
            self.wfile.write(content[:len(content) // 2] if fault in ("cut", "no length, cut") else content)


@pytest.fixture
def server(monkeypatch):
    """The publishers' servers, on the loopback address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.faults, server.asked = GOOD, [], []
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        point_to(monkeypatch, server.server_address[1])
        yield server
        server.shutdown()
        thread.join()


def point_to(monkeypatch, port: int) -> None:
    monkeypatch.setattr(data, "HOTPOTQA_FOLDER", f"http://127.0.0.1:{port}/")
    monkeypatch.setattr(data, "ARC_ARCHIVE", f"http://127.0.0.1:{port}/ARC.zip")
    monkeypatch.setitem(data.HOTPOTQA_SHA256, "hotpot_train_v1.1.json", hashlib.sha256(GOOD).hexdigest())


def refused(task: str, assets: Path, words: str | None = None, offline=False) -> None:
    """The file cannot be had: one line says why and what to put where by hand, and nothing is left behind."""
    with pytest.raises(FileNotFoundError, match=words) as caught:
        find_file(task, "train", assets, offline)
    message, place = str(caught.value), assets / data.FILES[task, "train"][0]
    source = data.HOTPOTQA_FOLDER + place.name if task == "hotpotqa" else data.ARC_ARCHIVE
    assert f"{place} is missing" in message and f"fetch {source} by hand" in message and "\n" not in message
    assert not files_in(assets)


@pytest.mark.parametrize("fault, content, words", [
    ("cut", GOOD, None), ("no length, cut", GOOD, None), (404, GOOD, "404"), (500, GOOD, "500"),
    (None, b"", None), (None, b'{"error": "sign in"}', None), (None, b"<html>Sign in", None),
    (None, GOOD[1:], "sha256 differs"),
])
def test_a_file_comes_whole_and_checked_or_not_at_all(server, tmp_path, fault, content, words):
    """Catches a half file, an empty one or a web page under the final name, and temporary files left."""
    server.faults, server.content = [fault], content
    refused("hotpotqa", tmp_path, words)
    server.content = GOOD
    for _ in range(2):
        assert find_file("hotpotqa", "train", tmp_path, offline=False) == tmp_path / HOTPOTQA_FILE
    assert (tmp_path / HOTPOTQA_FILE).read_bytes() == GOOD and len(files_in(tmp_path)) == 1
    assert len(server.asked) == 2    # what is there is left alone


def test_two_downloads_at_once(server, tmp_path):
    """Catches processes that share a temporary file: the slower one finds it gone, or half another's."""
    def check(part: Path) -> None:
        if not (tmp_path / "file").exists():    # another process begins later and is faster
            download(f"{data.HOTPOTQA_FOLDER}file", tmp_path / "file", lambda part: None, offline=False)

    download(f"{data.HOTPOTQA_FOLDER}file", tmp_path / "file", check, offline=False)
    assert (tmp_path / "file").read_bytes() == GOOD and len(files_in(tmp_path)) == 1


@pytest.mark.parametrize("task", RECORDS)
def test_without_a_network(tmp_path, monkeypatch, request, task):
    """Catches an offline run that touches the network, and a minute of silence where nobody answers."""
    monkeypatch.setattr(data, "SECONDS_TO_ANSWER", 0.2)
    request.addfinalizer(lambda: socket.setdefaulttimeout(None))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(monkeypatch, silent.getsockname()[1])
        refused(task, tmp_path, "timed out")
    refused(task, tmp_path, "refused")
    monkeypatch.setattr(urllib.request, "urlopen", None)
    refused(task, tmp_path, "downloads are off", offline=True)


@pytest.mark.parametrize("task", RECORDS)
def test_onto_a_full_disk_or_into_no_folder(server, tmp_path, task):
    """Catches a file cut where the disk was full, and an error that names neither file nor folder."""
    server.content = {"hotpotqa": GOOD, "arc": ARCHIVE}[task]
    with full_disk(300_000):
        refused(task, tmp_path, "File too large")
    (tmp_path / "read-only").mkdir(mode=0o555)
    if os.geteuid():      # permissions do not bind root
        refused(task, tmp_path / "read-only", "Permission denied")
    (tmp_path / "file").write_text("where the folder should be")
    refused(task, tmp_path / "file", "Not a directory")


def test_arc_is_read_without_the_rest_of_its_archive(server, tmp_path):
    """Catches 680 MB fetched for one, another member, and a member cut off where its header is long."""
    corpus = random.Random(1).randbytes(2_000_000)
    server.content = zipped({"corpus": corpus, MEMBER: LINES, "more": corpus})
    assert find_file("arc", "train", tmp_path, offline=False).read_bytes() == LINES
    assert files_in(tmp_path) == [tmp_path / ARC_FILE]
    tail, span = (asked.removeprefix("bytes=").split("-") for asked in server.asked)
    assert tail[0] == "" and int(tail[1]) + int(span[1]) - int(span[0]) < 1_000_000


MEMBERS, END = b"PK\1\2", b"PK\5\6"    # marks in an archive


def overwritten(archive: bytes, mark: bytes, offset: int, value: int) -> bytes:
    """The archive with 4 bytes changed in its last record with this mark."""
    place = archive.rindex(mark) + offset
    return archive[:place] + struct.pack("<I", value) + archive[place + 4:]


@pytest.mark.parametrize("content, faults, words", [
    (b"no archive" * 100, [], None), (zipped({"other": b""}), [], None), (ARCHIVE[:-5], [], None),
    (STORED.replace(b'"7"', b'"8"'), [], "CRC"), (overwritten(ARCHIVE, MEMBERS, 8, 1), [], "encrypted"),
    (overwritten(ARCHIVE, MEMBERS, 10, 9), [], "method"), (overwritten(ARCHIVE, END, 16, 999_999), [], None),
    (overwritten(overwritten(STORED, MEMBERS, 20, 999_999), MEMBERS, 24, 999_999), [], None),    # cut off
    (zipped({MEMBER: LINES + b"\n"}), [], "should hold 1,119 records"),
    (zipped({MEMBER: bytes(1_000_001)}), [], "larger than it should be"),
    (ARCHIVE, ["no ranges"], "did not send the part"), (ARCHIVE, [404], "404"), (STORED, [None, 500], "500"),
    (STORED, [None, "no ranges"], "did not send the part"), (STORED, [None, "cut"], None), (b"", [], None),
])
def test_broken_archives(server, tmp_path, monkeypatch, content, faults, words):
    """Catches BadZipFile and the like reaching the user, a damaged member believed, a bomb unpacked."""
    monkeypatch.setattr(data, "LARGEST_MEMBER", 1_000_000)
    server.content, server.faults = content, faults
    refused("arc", tmp_path, words)
