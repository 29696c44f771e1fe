"""Generation: new tokens per second against `generate` of the exported model in transformers. The tokens must be equal."""

import statistics
import time
from pathlib import Path

import torch

from benchmarks.bench_run import VOCAB_SIZE, build
from benchmarks.table import THREADS, Row, say
from franca.checkpoint.convert import export, open_model
from franca.infer.generate import SamplingConfig, generate
from franca.train import loop

REQUIRED = 1.5
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
    return [_measure(ours, theirs, batch) for batch in (1, 8)]


def _measure(ours: torch.nn.Module, theirs: torch.nn.Module, batch: int) -> Row:
    prompts = torch.randint(1, VOCAB_SIZE, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=0.0)
    ones, lists = torch.ones_like(prompts), prompts.tolist()

    def own() -> list[list[int]]:
        return generate(ours, lists, sampling)

    def other() -> list[list[int]]:
        output = theirs.generate(input_ids=prompts, attention_mask=ones, do_sample=False, max_new_tokens=NEW)
        return output[:, PROMPT:].tolist()

    assert own() == other(), "franca and transformers continue the same prompts differently"  # and the warm-up
    seconds: tuple[list[float], list[float]] = ([], [])
    started = time.monotonic()
    while len(seconds[0]) < ROUNDS and (not seconds[0] or time.monotonic() - started < LIMIT_S):
        for call, values in zip((own, other), seconds, strict=True):
            begin = time.perf_counter()
            call()
            values.append(time.perf_counter() - begin)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    speeds = [f"{batch * NEW / statistics.median(v):,.0f} (best {batch * NEW / min(v):,.0f}) tokens/s" for v in seconds]
    say(f"generation, batch {batch}: {speeds[0]} against {speeds[1]}, equal tokens")
    return Row(f"generation, batch {batch}", *speeds, ratio, f">= {REQUIRED:.2f}", ratio >= REQUIRED)
