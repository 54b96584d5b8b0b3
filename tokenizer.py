"""RWKV World tokenizer: bytes in, token ids out, always the longest token that matches.

The vocabulary is `rwkv_vocab_v20230424.txt`, as published in https://github.com/BlinkDL/RWKV-LM
(Apache-2.0, notice beside the file): one line a token, "id literal length", the literal being a
Python string (UTF-8) or, for tokens that are not whole characters, a Python bytes string.

    ids 1 .. 256        the single bytes 0 .. 255, so that every byte string has an encoding
    ids 257 .. 65529    longer tokens, of up to 128 bytes
    id  0               end of a document; no text encodes to it and it decodes to nothing
    ids from 65530      no tokens; a model's embedding has rows for them, because 65536 is a round number
"""

import ast
import hashlib
from pathlib import Path

VOCABULARY = Path(__file__).with_name("rwkv_vocab_v20230424.txt")
VOCABULARY_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"
END_OF_DOCUMENT = 0
LONGEST = 128    # bytes of the longest token
MATCH = -1       # the key of a trie node's longest match; its other keys are bytes, 0 .. 255


def read_vocabulary(path):
    """The published file as {id: bytes}, ids 1 .. 65529. Raises FileNotFoundError where there is none, and
    ValueError where the file is another one."""
    raw = path.read_bytes().replace(b"\r\n", b"\n")    # git on Windows may have changed the line ends
    if hashlib.sha256(raw).hexdigest() != VOCABULARY_SHA256:
        raise ValueError(f"{path}: not the published RWKV World vocabulary (sha256 differs); restore it "
                         f"with: git checkout -- {path.name}")
    tokens = {}
    for line in raw.decode().removesuffix("\n").split("\n"):
        number, literal = line.rpartition(" ")[0].split(" ", 1)
        if "\\" in literal:
            token = ast.literal_eval(literal)
        else:
            token = literal[1:-1]    # 99 lines in 100 have no escape, and the parser is slow
        if isinstance(token, str):
            token = token.encode()
        tokens[int(number)] = token
    return tokens


def build_trie(tokens):
    """The trie of all tokens: a node maps a byte to the next node, and MATCH to (id, length) of the
    longest token on the way from the root to that node, so that a walk may stop anywhere."""
    root = {}
    # in this order a prefix comes before its extensions: new nodes inherit the longest match so far
    for number, token in sorted(tokens.items(), key=lambda item: item[1]):
        node = root
        for byte in token:
            if byte not in node:
                node[byte] = {MATCH: node.get(MATCH)}
            node = node[byte]
        node[MATCH] = (number, len(token))
    return root


class Tokenizer:
    """It does not change once built, so threads may share it. `tokens` is {id: bytes}; id 0 has no bytes."""

    def __init__(self):
        self.tokens = read_vocabulary(VOCABULARY)
        self.trie = build_trie(self.tokens)
        self.tokens[END_OF_DOCUMENT] = b""

    def encode(self, text):
        """Ids (list of int) of a str, as UTF-8, or of bytes. decode_bytes(encode(data)) == data, always.
        Raises ValueError for a str with a lone surrogate, and TypeError for what is neither str nor bytes."""
        try:
            if isinstance(text, str):
                data = text.encode()
            else:
                data = bytes(memoryview(text))    # unlike bytes(text), which makes zeros of a number
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} of the text is a lone surrogate, which UTF-8 cannot "
                             "carry: replace it, or pass bytes") from None
        ids, start = [], 0
        while start < len(data):
            node = self.trie
            for byte in data[start:start + LONGEST]:
                if byte not in node:
                    break
                node = node[byte]
            number, length = node[MATCH]
            ids.append(number)
            start += length
        return ids

    def decode_bytes(self, ids):
        """The bytes of an iterable of ids. Raises ValueError for an id that is no int in 0 .. 65529."""
        try:
            return b"".join([self.tokens[number] for number in ids])
        except KeyError as error:
            last = len(self.tokens) - 1
            raise ValueError(f"token id {error.args[0]!r} has no token: give ints in 0..{last}") from None

    def decode(self, ids):
        """The text of an iterable of ids. Where their bytes are no UTF-8, as where a generated sequence ends
        inside a character, the text has U+FFFD; decode_bytes is exact. Raises what decode_bytes raises."""
        return self.decode_bytes(ids).decode(errors="replace")
