"""`franca sample`: text in, text out. Prompts from the command line, standard input or a file; answers to the screen or a file.

A file of answers appears whole, in the order of the prompts. Until then they lie in a hidden file beside it, one line each as
they end, so that the same command goes on after it was killed. It refuses to know how tokens are drawn.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import torch

from franca.checkpoint.convert import ids_of, is_hf_folder, open_model
from franca.checkpoint.store import find
from franca.core.config import Precision, check, differences, parse_words, problems_error, to_dict
from franca.core.errors import ConfigError
from franca.core.progress import progress
from franca.core.run import append_record, read_records, write_atomically
from franca.infer.generate import Result, SamplingConfig, stream

Record = dict[str, Any]
Answers = Iterator[tuple[int, str, Result | None]]

_OURS = {"text", "tokens", "logprobs", "finish"}  # what an answer adds to its prompt's record


def complete(source: Path, prompts: list[str], sampling: SamplingConfig, precision: Precision = "fp32") -> list[str]:
    """Continue each prompt with the model of a run, a checkpoint or a Hugging Face folder; returns the new text alone."""
    records = {number: {"prompt": prompt} for number, prompt in enumerate(prompts)}
    ends = {number: result.text for number, _, result in answer(source, records, sampling, precision) if result}
    return [ends[number] for number in records]


def answer(source: Path, records: Mapping[int, Record], sampling: SamplingConfig, precision: Precision) -> Answers:
    """What `generate.stream` yields for numbered records with a `prompt` and perhaps their own `max_new_tokens`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, special = open_model(source, device, precision)
    head, stops = ids_of(special, "bos")[:1], ids_of(special, "eos")
    start = head or stops[:1]  # a model without a start token begins a text where the one before it ended
    texts = [record["prompt"] for record in records.values()]
    encoded = zip(records, texts, tokenizer.encode(texts), strict=True)
    prompts = {number: [*(head if text else start), *ids.tolist()] for number, text, ids in encoded}
    limits = {number: record["max_new_tokens"] for number, record in records.items() if "max_new_tokens" in record}
    return stream(model, prompts, sampling, stops, tokenizer.decode, limits)


def main(
    source: Path, prompts: list[str], words: list[str], precision: Precision, file: Path | None = None, out: Path | None = None
) -> None:
    """Answer all prompts of `prompts` or of a JSONL file; without any, one is read from standard input."""
    sampling = check(SamplingConfig, parse_words(words), "franca sample")
    if file is not None and prompts:
        raise ConfigError("franca sample: was given --prompt and --prompts; give one of them")
    if file is None and not prompts:
        prompts = [sys.stdin.read()] if not sys.stdin.isatty() else [""]
    records = [{"prompt": prompt} for prompt in prompts] if file is None else _read(file)
    if out is None:
        _print(records, answer(source, dict(enumerate(records)), sampling, precision))
    else:
        _write(source if is_hf_folder(source) else find(source, whole=True).path, records, sampling, precision, out)


def _read(file: Path) -> list[Record]:
    """The objects of a JSONL file; one error tells all that is wrong with them."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a file with one JSON object per line") from None
    records, problems = [], [] if lines else ["has no lines; give one JSON object with a `prompt` per line"]
    for number, line in enumerate(lines, 1):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            problems.append(f"line {number}: is not JSON ({error})")
            continue
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            problems.append(f"line {number}: needs an object with a string `prompt`")
        elif type(limit := record.get("max_new_tokens", 1)) is not int or limit < 1:
            problems.append(f"line {number}: max_new_tokens is {limit!r}; give a whole number from 1 on, or leave it out")
        elif taken := sorted(_OURS & record.keys()):
            problems.append(f"line {number}: {', '.join(taken)}: the answer gets this name; rename yours")
        records.append(record)
    if problems:
        raise problems_error(str(file), problems)
    return records


def _print(records: list[Record], answers: Answers) -> None:
    """Prompts with their answers, in order; the first that has not ended is shown as it comes."""
    texts, ended, place = [record["prompt"] for record in records], set(), 0
    for number, piece, result in answers:
        texts[number] += piece
        ended |= {number} if result else set()
        while place < len(texts):
            print(texts[place], end="", flush=True)
            texts[place] = ""
            if place not in ended:
                break
            place += 1
            print("\n\n---" if place < len(texts) else "")


def _write(source: Path, records: list[Record], sampling: SamplingConfig, precision: Precision, out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another file or remove it")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: its folder does not exist; make it, or choose another place")
    partial = out.with_name(f".{out.name}.partial")
    digest = hashlib.sha256(orjson.dumps(records)).hexdigest()
    job = to_dict(sampling) | {"model": str(source.resolve()), "precision": precision, "prompts": digest}
    del job["max_rows"]  # it changes no answer
    known = list(read_records(partial))
    if not known:
        append_record(partial, {"job": job})
    elif changed := differences(known[0]["job"], job):
        told = "; ".join(f"{name}: was {old!r}, is {new!r}" for name, old, new in changed)
        raise ConfigError(f"{partial}: was begun with other settings ({told}); give those, or remove the file to begin anew")
    ends = {record.pop("number"): record for record in known[1:]}
    left = {number: record for number, record in enumerate(records) if number not in ends}
    with progress("sample", len(records)) as show:
        for number, _, result in answer(source, left, sampling, precision) if left else ():
            if result is not None:
                ends[number] = asdict(result)
                append_record(partial, {"number": number, **ends[number]})
                show(len(ends), f"{len(ends)} of {len(records)} prompts")
    lines = (orjson.dumps({**record, **ends[number]}) + b"\n" for number, record in enumerate(records))
    write_atomically(out, b"".join(lines))
    partial.unlink()
