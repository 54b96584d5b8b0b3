"""The tokenizer against a few lines that cannot be wrong: the longest slice found in the vocabulary."""

import ast
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from tokenizer import Tokenizer

TOKENIZER = Tokenizer()


def read_slowly():
    """The vocabulary read a second way, every literal through the parser: {bytes: id}."""
    ids = {}
    for line in tokenizer.VOCABULARY.read_text(encoding="utf-8").split("\n")[:-1]:
        number = int(line[: line.index(" ")])
        token = ast.literal_eval(line[line.index(" ") + 1 : line.rindex(" ")])
        token = token.encode() if isinstance(token, str) else token
        assert len(token) == int(line[line.rindex(" ") :])
        ids[token] = number
    return ids


IDS = read_slowly()
TOKENS = list(IDS)


def encode_naively(data):
    ids = []
    while data:
        end = min(len(data), 128)
        while data[:end] not in IDS:
            end -= 1
        ids.append(IDS[data[:end]])
        data = data[end:]
    return ids


def few(examples):
    return settings(max_examples=examples, deadline=None)


# text whose matches begin in one token and end in another: whole tokens, tokens cut short (so that a walk
# overshoots and must fall back), stray bytes, and long runs of the characters that have long tokens
token = st.sampled_from(TOKENS)
cut_token = st.tuples(token, st.integers(1, 127)).map(lambda pair: pair[0][: pair[1]])
repeated = st.sampled_from([b" ", b"=", b"-", b"\n", b"\t", b"*", b"ab"])
run = st.tuples(repeated, st.integers(1, 300)).map(lambda pair: pair[0] * pair[1])
mixture = st.lists(st.one_of(token, cut_token, run, st.binary(max_size=3)), max_size=12).map(b"".join)


def test_every_token_is_its_own_encoding():
    """Catches: a token lost, shadowed by another or read wrongly (escapes, quotes, bytes literals)."""
    assert len(IDS) == 65529
    assert sorted(IDS.values()) == list(range(1, 65530))
    for data, number in IDS.items():
        assert TOKENIZER.encode(data) == [number]
        assert TOKENIZER.decode_bytes([number]) == data


@few(300)
@given(mixture)
def test_longest_match_on_mixtures(data):
    """Catches: any match that is not the longest, at any place."""
    ids = TOKENIZER.encode(data)
    assert ids == encode_naively(data)
    assert TOKENIZER.decode_bytes(ids) == data


@few(100)
@given(st.binary(max_size=200))
def test_longest_match_on_bytes(data):
    """Catches: bytes outside UTF-8 treated as text."""
    ids = TOKENIZER.encode(data)
    assert ids == encode_naively(data)
    assert TOKENIZER.decode_bytes(ids) == data


@few(150)
@given(st.text(max_size=100))
def test_longest_match_on_text(text):
    """Catches: str and bytes going different ways, characters lost on the way back."""
    ids = TOKENIZER.encode(text)
    assert ids == TOKENIZER.encode(text.encode()) == encode_naively(text.encode())
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 255, 256, 257, 1000])
def test_runs_longer_than_any_token(length):
    """Catches: a lookahead that ends before the longest token does, or slips at the end of the text."""
    for data in (b" " * length, b"=" * length, b"x" + b" " * length + b"x"):
        assert TOKENIZER.encode(data) == encode_naively(data)


@pytest.mark.parametrize("text, ids", [
    ("", []),
    ("Hello, world! It's 2024.", [33155, 45, 40213, 34, 3918, 460, 3493, 644, 47]),
    ("The Eiffel Tower is in the city of Paris",
     [6699, 304, 25740, 109, 37480, 4600, 4596, 22590, 30449, 4706, 37138]),
    ("  if x:\n\t\treturn  None\n\n", [267, 1942, 355, 59, 3324, 42178, 267, 23960, 261]),
    ("Question: Où? Answer: 東京、日本。\n",
     [53648, 59, 314, 2519, 64, 43965, 59, 33, 13241, 10362, 10079, 13053, 13205, 28329]),
    ("你好，世界", [10464, 11685, 19137, 10267, 14610]),
    ("Привет 👋🏽 naïve café", [27858, 27950, 27930, 33, 3319, 146, 140, 3319, 144, 190, 46644, 37946]),
    ("\x00\uffff\r\n", [1, 3317, 192, 263]),
    ("User: hi\n\nAssistant:", [24281, 59, 4571, 261, 5585, 41693, 59]),
    (" " * 129, [65529, 33]),
    (b"\xff\xfe\x80abc", [256, 255, 129, 6891]),
    (b"\xf0\x9f\x91", [3319, 146]),
])
def test_known_encodings(text, ids):
    """Catches: a vocabulary or rule that is consistent but not the one the checkpoints were trained with
    (the ids are those of the `rwkv` package from PyPI).
    """
    assert TOKENIZER.encode(text) == ids


def test_same_as_the_rwkv_package():
    """Catches: what the known encodings do not happen to touch. Runs where the package is installed."""
    module = pytest.importorskip("rwkv.rwkv_tokenizer", reason="needs pip install rwkv==0.8.32")
    theirs = module.TRIE_TOKENIZER(str(tokenizer.VOCABULARY))
    choose = random.Random(0)
    for _ in range(300):
        data = b"".join(choose.choices(TOKENS, k=20))[choose.randrange(4) :] + choose.randbytes(10)
        assert TOKENIZER.encode(data) == theirs.encodeBytes(data)


@few(100)
@given(st.lists(st.integers(0, 65529), max_size=20), st.lists(st.integers(0, 65529), max_size=20))
def test_decoding_is_by_token(left, right):
    """Catches: decoding that depends on what stands around a token (a stop at 0, a separator)."""
    whole = TOKENIZER.decode_bytes(left + right)
    assert whole == TOKENIZER.decode_bytes(left) + TOKENIZER.decode_bytes(right)
    assert whole == TOKENIZER.decode_bytes([i for i in left + right if i != 0])
    assert TOKENIZER.decode(left + right) == whole.decode(errors="replace")


def test_half_a_character_decodes_to_the_replacement():
    """Catches: a sequence cut inside a character raising, or losing the text before the cut."""
    assert TOKENIZER.decode(TOKENIZER.encode("ok ".encode() + "東".encode()[:2])) == "ok \ufffd"


@pytest.mark.parametrize("bad", [-1, 65530, 65535, 65536, "a", None])
def test_ids_without_a_token(bad):
    """Catches: ids that wrap around (-1) or run past the vocabulary (the model has 65536 outputs)."""
    for decode in (TOKENIZER.decode, TOKENIZER.decode_bytes):
        with pytest.raises(ValueError, match="has no token") as caught:
            decode([33155, bad])
        assert repr(bad) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_lone_surrogate():
    """Catches: a lone surrogate silently replaced, or reported as a codec's business."""
    with pytest.raises(ValueError, match="character 3 of the text is a lone surrogate"):
        TOKENIZER.encode("abc\ud800")


def test_only_str_and_bytes():
    """Catches: a number taken for a count of zero bytes and ids taken for bytes, as bytes() would."""
    for wrong in (5, None, ["text"], [1, 2]):
        with pytest.raises(TypeError):
            TOKENIZER.encode(wrong)
    for right in (b"text", bytearray(b"text"), memoryview(b"text")):
        assert TOKENIZER.encode(right) == TOKENIZER.encode("text")


def test_damaged_vocabulary(tmp_path):
    """Catches: a vocabulary that lost its end, or a pointer file, and gives other ids in silence."""
    path = tmp_path / tokenizer.VOCABULARY.name
    for damaged in (tokenizer.VOCABULARY.read_bytes()[:-20], b"", b"version https://git-lfs"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not the published RWKV World vocabulary") as caught:
            tokenizer.read_vocabulary(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_line_ends(tmp_path):
    """Catches: a checkout that turned the line ends into CRLF."""
    path = tmp_path / tokenizer.VOCABULARY.name
    path.write_bytes(tokenizer.VOCABULARY.read_bytes().replace(b"\n", b"\r\n"))
    assert tokenizer.read_vocabulary(path) == {number: data for data, number in IDS.items()}
