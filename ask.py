"""A question from a person to a trained model: `python eval.py --ask "…" --checkpoint PATH`."""

import json
from pathlib import Path

import torch

from data import pad
from files import load_weights
from fs import FutureSeed, prefill
from model import RWKV7
from rounds import Round
from score import generate, text_of
from standin import small_tokenizer
from tokenizer import END_OF_DOCUMENT, Tokenizer


def trained_seed(checkpoint: Path, model: RWKV7) -> FutureSeed | None:
    """Future-Seed as the run beside the checkpoint was trained with it, None where there is no such run.

    Raises ValueError naming the file where run.json or fs.pth cannot be used.
    """
    path = checkpoint.with_name("run.json")
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["arm"] != "prompt_fs":
            return None
        round = Round(**run["settings"], title="", seeds=(run["seed"],))
        fs = FutureSeed(model.config, **round.fs_settings())
        path = checkpoint.with_name("fs.pth")
        if path.exists():
            fs.load_state_dict(load_weights(path))
    except Exception as error:    # torch raises half a dozen types here
        raise ValueError(f"{path}: cannot be used ({' '.join(str(error).split())[:160]})") from error
    return fs


def ask(checkpoint: str | Path, text: str, *, max_new=24, temperature=0.0, top_p=1.0) -> str:
    """A trained model's answer: its next tokens after the prompt, up to the end of the line.

    Args: checkpoint, an official-format file; the run.json and fs.pth that a run leaves beside it decide on
        Future-Seed; text, a whole prompt if it ends in "Answer:", else a question, put as the rounds put
        theirs; max_new, tokens (a model of the stand-in writes one); temperature, 0 for greedy; top_p, see
        `generate`.
    Raises: ValueError or OSError naming the file, or the value that is out of range.
    """
    if max_new < 1 or not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ValueError("--max-new must be 1 or more, --temperature 0 or more, --top-p above 0 and up to 1")
    prompt = text if text.rstrip().endswith("Answer:") else f"Question:\n{text.strip()}\n\nAnswer:"
    model = RWKV7.load(checkpoint)
    tokenizer = Tokenizer()
    if model.config.vocab_size < len(tokenizer.tokens):    # not an official one: the stand-in's?
        small = small_tokenizer()
        if model.config.vocab_size == len(small.tokens):
            tokenizer, max_new = small, 1    # its answers are a token long, and nothing marks their end
    fs = trained_seed(Path(checkpoint), model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    if fs is not None:
        fs.to(device)
    tokens, lengths = pad([tokenizer.encode(prompt)], device)
    if tokens.max() >= model.config.vocab_size:
        raise ValueError(f"{checkpoint}: its vocabulary has {model.config.vocab_size} entries, not 65536")
    with torch.no_grad():
        hidden, state = prefill(model, tokens, lengths, fs)
        logits = model.head(hidden[:, -1])
        stop = (END_OF_DOCUMENT, *tokenizer.encode("\n"))
        new = generate(model, logits, state, max_new, temperature=temperature, top_p=top_p, stop=stop)
    return text_of(new[0].tolist(), tokenizer).strip().split("\n")[0]
