"""Times the tokenizer: python bench/bench_tokenizer.py [a HotpotQA json file]

Prints megabytes of UTF-8 that each encoder reads in a CPU second, the best of several runs, all on the same
texts in the same run. Two stand beside ours: a naive one, which looks up slices in the vocabulary from the
longest down, and the trie of the `rwkv` package where that is installed.
"""

import json
import os
import pydoc_data.topics
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tokenizer  # noqa: E402

SIZE = 1_000_000
# pieces are short and each counts at its best of several rounds, so that a busy machine disturbs them least
PIECE = 10_000
PIECES = 10
ROUNDS = 10


def english(path):
    """HotpotQA's paragraphs where there is such a file, and Python's own manual where there is not."""
    if not path.is_file():
        return "".join(pydoc_data.topics.topics.values()), "Python's manual"
    records = json.loads(path.read_text(encoding="utf-8"))
    paragraphs = ["".join(sentences) for record in records for _, sentences in record["context"]]
    return "\n".join(paragraphs), path.name


def python_code():
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def many_scripts(tokens):
    """Tokens beyond ASCII in random order, which belong to no language and to all of them."""
    beyond = [token for token in tokens.values() if token and max(token) > 127]
    return b"".join(random.Random(0).choices(beyond, k=SIZE // 3))


def naive(tokens):
    ids = {token: number for number, token in tokens.items()}

    def encode(data):
        out = []
        start = 0
        while start < len(data):
            end = start + 128
            while data[start:end] not in ids:
                end -= 1
            out.append(ids[data[start:end]])
            start += len(data[start:end])
        return out

    return encode


def seconds(function, *arguments):
    begin = time.process_time()
    function(*arguments)
    return time.process_time() - begin


def main():
    load = min(seconds(tokenizer.Tokenizer) for _ in range(3))
    ours = tokenizer.Tokenizer()
    del ours.tokens[tokenizer.END_OF_DOCUMENT]
    encoders = {"ours": ours.encode, "naive": naive(ours.tokens)}
    try:
        from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
        encoders["rwkv package"] = TRIE_TOKENIZER(str(tokenizer.VOCABULARY)).encodeBytes
    except ImportError:
        pass

    path = ROOT.parent / "shared" / "data" / "hotpotqa" / "hotpot_dev_distractor_v1.json"
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
    text, source = english(path)
    texts = {
        f"English ({source})": text.encode(),
        "Python code (standard library)": python_code().encode(),
        "all scripts (random tokens)": many_scripts(ours.tokens),
        "random bytes": random.Random(0).randbytes(SIZE),
    }
    print(f"load {load:.2f} s CPU")
    print("MB/s".ljust(50) + "".join(name.rjust(14) for name in encoders))
    for name, data in texts.items():
        step = min(SIZE, len(data)) // PIECES
        pieces = [data[start:start + PIECE] for start in range(0, step * PIECES, step)]
        best = {key: [float("inf")] * PIECES for key in encoders}
        for round_ in range(ROUNDS):
            for key, encode in encoders.items():
                if key == "naive" and round_ > 0:
                    continue
                for index, piece in enumerate(pieces):
                    best[key][index] = min(best[key][index], seconds(encode, piece))
        speeds = [PIECE * PIECES / sum(times) / 1e6 for times in best.values()]
        print(name.ljust(50) + "".join(f"{speed:14.2f}" for speed in speeds))
    token_bytes = len(text.encode()[:SIZE]) / len(ours.encode(text.encode()[:SIZE]))
    print(f"{token_bytes:.2f} bytes a token of English")


if __name__ == "__main__":
    main()
