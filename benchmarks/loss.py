"""The head's loss at a vocabulary of 128k, forward and backward, beside PyTorch's ways: seconds, peak memory of a process."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import THREADS, Row, say
from franca.models.layers import cross_entropy_sum

VOCAB, TOKENS, DIM, ROUNDS = 131072, 2048, 512, 3
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def franca(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy_sum(x[None], head, targets[None])[0]


def plain(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, head.to(x.dtype)).float(), targets, reduction="sum")


def chunked(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, head.to(x.dtype), targets, reduction="sum", options=options)


def ways() -> dict[str, Loss]:
    """PyTorch has its own since 2.13."""
    return {"franca": franca, "plain": plain} | ({"torch": chunked} if hasattr(torch.nn, "LinearCrossEntropyOptions") else {})


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = (torch.randn(VOCAB, DIM) * 0.02).requires_grad_()
    return torch.randn(TOKENS, DIM).to(dtype).requires_grad_(), head, torch.randint(0, VOCAB, (TOKENS,))


def seconds(way: Loss, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    begin = time.perf_counter()
    way(*tensors).backward()
    took = time.perf_counter() - begin
    tensors[0].grad = tensors[1].grad = None
    return took


def peak_mib(name: str, dtype: torch.dtype) -> float:
    """What a fresh process holds above its inputs; the gradients count."""
    torch.set_num_threads(THREADS)
    tensors = given(dtype)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ways()[name](*tensors).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def rows(root: Path) -> list[Row]:
    torch.set_num_threads(THREADS)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        label = f"loss {str(dtype).removeprefix('torch.')}, {TOKENS} x {VOCAB}, dim {DIM}"
        tensors, times = given(dtype), {name: list[float]() for name in ways()}
        for round_number in range(ROUNDS + 1):  # the first is not counted
            for name, way in ways().items():
                took = seconds(way, tensors)
                say(f"  {label}: {name} {took:.2f} s")
                times[name] += [took] if round_number else []
        peaks = {}
        for name in times:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                peaks[name] = fresh.submit(peak_mib, name, dtype).result()
        for name in list(times)[1:]:
            ratio = statistics.median(b / a for a, b in zip(times["franca"], times[name], strict=True))
            middle = [f"{statistics.median(times[which]):.2f} s" for which in ("franca", name)]
            found.append(Row(f"{label}: time", middle[0], f"{name} {middle[1]}", ratio))
            less = peaks[name] / peaks["franca"]
            needed = (">= 5", less >= 5) if name == "plain" else ("reported", None)
            found.append(Row(f"{label}: peak", f"{peaks['franca']:,.0f} MiB", f"{name} {peaks[name]:,.0f} MiB", less, *needed))
    return found
