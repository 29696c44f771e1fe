"""Training: tokens per second of the loop's own step against a plain PyTorch loop over transformers' Llama."""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench_run import BATCH, SEQ_LEN, SHAPE, VOCAB_SIZE, build
from benchmarks.table import THREADS, Row, say
from franca.core.config import Precision
from franca.data.loader import Batch
from franca.train import loop

REQUIRED, AIM = 1.05, 1.15
ROUNDS, LIMIT_S = 6, 90.0  # no new round is begun after so many seconds
SLOW_S = 20.0  # a first step of the reference longer than this is counted itself, and is the only one

Step = Callable[[], float]  # does one step, returns its loss


def franca_step(run: loop.Run) -> Step:
    """A step as the loop does it: the batch from the loader's thread, the verdict, the optimizer step."""
    batches: Iterator[Batch] = run.loader.ahead(range(1000), 0, 1)

    def step() -> float:
        batch = next(batches)
        verdict = run.faults.agree(run.world, batch.num_valid, False)
        noted = loop.step(run, batch, verdict.num_valid)
        run.step += 1
        return float(noted.sums["nll"]) / verdict.num_valid

    return step


def reference_step(run: loop.Run, precision: Precision, compiled: bool) -> Step:
    """The loop that one would write: autocast, fused AdamW, the gradient clipped to 1; batches from the same loader."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=SHAPE["dim"],
        intermediate_size=SHAPE["mlp_dim"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=SHAPE["tied"],
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if compiled else model
    batches: Iterator[Batch] = run.loader.ahead(range(1000), 0, 1)

    def step() -> float:
        tokens: Tensor = torch.from_numpy(next(batches).tokens_BT)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def timed(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def measure(steps: dict[str, Step]) -> tuple[dict[str, list[float]], bool]:
    """Seconds of the counted steps, interleaved: A B C D A B C D ...; and whether the reference was too slow for that."""
    seconds: dict[str, list[float]] = {}
    slow = False
    for name, step in steps.items():
        first = timed(step)
        say(f"  {name}: first step {first:.1f} s (warm-up{', counted' if name == 'eager' and first > SLOW_S else ''})")
        if name == "eager" and first > SLOW_S:
            slow, seconds[name] = True, [first]
        elif slow:
            seconds[name] = [timed(step) for _ in range(1 if name == "compiled" else ROUNDS // 2)]
    if not slow:
        seconds = {name: [] for name in steps}
        begin = time.monotonic()
        for number in range(ROUNDS):
            if number > 1 and time.monotonic() - begin > LIMIT_S:
                say("  the machine is slow: fewer rounds")
                break
            for name, step in steps.items():
                seconds[name].append(timed(step))
    for name, values in seconds.items():
        say(f"  {name}: median {statistics.median(values):.3f} s, best {min(values):.3f} s, {len(values)} step(s) counted")
    return seconds, slow


def rows(root: Path) -> list[Row]:
    torch.set_num_threads(THREADS)
    found = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        say(f"training {precision}")
        plain, compiled = (build(root, f"{precision}-{flag}", precision, flag) for flag in (False, True))
        steps = {
            "eager": reference_step(plain, precision, False),
            "compiled": reference_step(plain, precision, True),
            "franca": franca_step(plain),
            "franca, compile": franca_step(compiled),
        }
        seconds, slow = measure(steps)
        reference = min(("eager", "compiled"), key=lambda name: statistics.median(seconds[name]))
        for name in ("franca", "franca, compile"):
            found.append(_row(name, precision, seconds, reference, slow))
    return found


def _row(name: str, precision: str, seconds: dict[str, list[float]], reference: str, slow: bool) -> Row:
    ours, theirs = seconds[name], seconds[reference]
    pairs = [theirs[0] / own for own in ours] if slow else [b / a for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(pairs)
    note = f" ({len(theirs)} step: slow)" if slow else ""

    def speeds(values: list[float]) -> str:
        tokens = BATCH * SEQ_LEN
        return f"{tokens / statistics.median(values):,.0f} (best {tokens / min(values):,.0f}) tokens/s"

    required = f">= {REQUIRED:.2f}, aim {AIM:.2f}"
    label = f"training {precision}, {name.removeprefix('franca, ').replace('franca', 'no compile')}"
    return Row(label, speeds(ours), f"{reference} {speeds(theirs)}{note}", ratio, required, ratio >= REQUIRED)


def note() -> str:
    """What a reader must know of the bf16 figures on this machine."""
    if torch.cpu._is_avx512_bf16_supported():
        return ""
    return (
        "This CPU has no bf16 instructions: products in bf16 are emulated by PyTorch, which is what the bf16 reference pays "
        f"for; franca runs them in fp32. A reference whose first step takes more than {SLOW_S:.0f} s is measured by that "
        "step (eager) and by one step after the warm-up (compiled), not interleaved."
    )
