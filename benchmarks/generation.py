"""Generation: new tokens per second against `generate` of the exported model in transformers. The tokens must be equal.

Mixed: 64 prompts of 8 to 256 tokens (lengths uniform in their logarithm), each with its own number of new tokens, as if an
end-of-text token came there: exponential with mean 64, cut to 8 to 256. transformers takes them in their order, in batches of
the size that is fastest for it, padded at the left; a batch runs until its last row has ended. Only new tokens that were
asked for count. franca takes all of them at once, with its defaults.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_run import VOCAB_SIZE, build
from benchmarks.table import THREADS, Row, say
from franca.checkpoint.convert import export, open_model
from franca.infer.generate import SamplingConfig, generate
from franca.train import loop

REQUIRED, REQUIRED_MIXED = 1.5, 3.0
MIXED, BATCHES, MIXED_ROUNDS = 64, (8, 16, 32, 64), 3
PROMPT, NEW, ROUNDS, LIMIT_S = 32, 128, 7, 45.0  # no new round is begun after so many seconds


def rows(root: Path) -> list[Row]:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    run = build(root, "generation", "fp32", False)
    loop.save(run)
    exported = root / "exported"
    export(run.folder.root, exported)
    ours, _, _ = open_model(run.folder.root, torch.device("cpu"), "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return [*(_alike(ours, theirs, batch) for batch in (1, 8)), _mixed(ours, theirs)]


def _alike(ours: torch.nn.Module, theirs: Any, batch: int) -> Row:
    prompts = torch.randint(1, VOCAB_SIZE, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=0.0)
    ones, lists = torch.ones_like(prompts), prompts.tolist()

    def own() -> list[list[int]]:
        return [result.tokens for result in generate(ours, lists, sampling)]

    def other() -> list[list[int]]:
        output = theirs.generate(input_ids=prompts, attention_mask=ones, do_sample=False, max_new_tokens=NEW)
        return output[:, PROMPT:].tolist()

    assert own() == other(), "franca and transformers continue the same prompts differently"  # and the warm-up
    return _measure(f"generation, batch {batch}", own, other, batch * NEW, REQUIRED, ROUNDS)


def _mixed(ours: torch.nn.Module, theirs: Any) -> Row:
    draw = np.random.default_rng(0)
    lengths = np.exp(draw.uniform(np.log(8), np.log(257), MIXED)).astype(int)
    limits = draw.exponential(64, MIXED).astype(int).clip(8, 256).tolist()
    prompts = [draw.integers(1, VOCAB_SIZE, length).tolist() for length in lengths]

    def own() -> list[list[int]]:
        results = generate(ours, prompts, SamplingConfig(temperature=0.0), limits=dict(enumerate(limits)))
        return [result.tokens for result in results]

    def other(batch: int) -> list[list[int]]:
        found = []
        for first in range(0, MIXED, batch):
            part, asked = prompts[first : first + batch], limits[first : first + batch]
            longest = max(map(len, part))
            tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in part])
            real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part])
            output = theirs.generate(input_ids=tokens, attention_mask=real, do_sample=False, max_new_tokens=max(asked))
            found += [row[longest:][:count] for row, count in zip(output.tolist(), asked, strict=True)]
        return found

    seconds = {}
    for batch in BATCHES:
        begin = time.perf_counter()
        outputs = other(batch)
        seconds[batch] = time.perf_counter() - begin
        say(f"generation, mixed: transformers in batches of {batch}: {sum(limits) / seconds[batch]:,.0f} tokens/s")
    equal = sum(a == b for a, b in zip(own(), outputs, strict=True))
    assert equal >= 0.9 * MIXED, f"only {equal} of {MIXED} texts are equal; rounding may change a few"
    best = min(seconds, key=lambda batch: seconds[batch])
    name = f"generation, {MIXED} mixed prompts (peer: batches of {best})"
    return _measure(name, own, lambda: other(best), sum(limits), REQUIRED_MIXED, MIXED_ROUNDS)


def _measure(
    name: str, own: Callable[[], object], other: Callable[[], object], num_tokens: int, required: float, rounds: int
) -> Row:
    seconds: tuple[list[float], list[float]] = ([], [])
    started = time.monotonic()
    while len(seconds[0]) < rounds and (not seconds[0] or time.monotonic() - started < LIMIT_S):
        for call, values in zip((own, other), seconds, strict=True):
            begin = time.perf_counter()
            call()
            values.append(time.perf_counter() - begin)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    speeds = [f"{num_tokens / statistics.median(v):,.0f} (best {num_tokens / min(v):,.0f}) tokens/s" for v in seconds]
    say(f"{name}: {speeds[0]} against {speeds[1]}, ratio {ratio:.2f}")
    return Row(name, *speeds, ratio, f">= {required:.2f}", ratio >= required)
