"""`franca sample`: text in, text out."""

import sys
from pathlib import Path

import torch

from franca.checkpoint.convert import ids_of, open_model
from franca.core.config import Precision, check, parse_words
from franca.core.errors import ConfigError
from franca.data.tokenizer import Tokenizer
from franca.infer.generate import SamplingConfig, generate


def complete(source: Path, prompts: list[str], sampling: SamplingConfig, precision: Precision = "fp32") -> list[str]:
    """Continue each prompt with the model of a run, a checkpoint or a Hugging Face folder; returns the new text alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, special = open_model(source, device, precision)
    head, stops = ids_of(special, "bos")[:1], ids_of(special, "eos")
    start = head or stops[:1]  # a model without a start token begins a text where the one before it ended
    ids = [[*(head if prompt else start), *tokenizer.encode([prompt])[0].tolist()] for prompt in prompts]
    try:
        outputs = generate(model, ids, sampling, stops)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return [_new_text(tokenizer, given, output) for given, output in zip(ids, outputs, strict=True)]


def _new_text(tokenizer: Tokenizer, given: list[int], output: list[int]) -> str:
    """What the output adds to the text: alone, some tokenizers would drop the space that its first token begins with."""
    before, whole = tokenizer.decode(given), tokenizer.decode([*given, *output])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(output)


def main(source: Path, prompts: list[str], words: list[str], precision: Precision) -> None:
    """Print each prompt with its continuation; without prompts, read one from standard input."""
    if not prompts:
        prompts = [sys.stdin.read()] if not sys.stdin.isatty() else [""]
    sampling = check(SamplingConfig, parse_words(words), "franca sample")
    for number, (prompt, text) in enumerate(zip(prompts, complete(source, prompts, sampling, precision), strict=True)):
        print(("" if number == 0 else "\n---\n") + prompt + text)
