"""Numbers of a run to where people look: a progress line, `train.log`, `metrics.jsonl`, TensorBoard.

What it refuses to know: devices and ranks. It is given plain numbers, on one rank, on log steps only. A sink that fails
says so once and never stops the training.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from franca.core.config import config
from franca.core.errors import ConfigError
from franca.core.progress import Progress, clock_text, progress
from franca.core.run import RunFolder, append_record, current_metrics

Sink = Literal["console", "jsonl", "tensorboard"]


@config
class MetricsConfig:
    sinks: tuple[Sink, ...] = ("console", "jsonl")


class Metrics(ExitStack):
    """The sinks of one attempt, on the rank that is `speaking`; on the others it does nothing. A context manager."""

    def __init__(self, settings: MetricsConfig, folder: RunFolder, attempt: int, total_steps: int, speaking: bool = True):
        super().__init__()
        self.folder, self.attempt, self.total_steps, self.speaking = folder, attempt, total_steps, speaking
        self.sinks = settings.sinks if speaking else ()
        self.failed: set[str] = set()
        self.show: Progress | None = None
        self.writer: Any = None

    def __enter__(self) -> Self:
        if "console" in self.sinks:
            self.show = self.enter_context(progress("train", self.total_steps, every_s=0.0))
        if "tensorboard" in self.sinks:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError("metrics.sinks: tensorboard is not installed; run: pip install 'franca[track]'") from None
            self.writer = SummaryWriter(str(self.folder.tensorboard))
            self.callback(self.writer.close)
        return self

    def roll_back(self, step: int) -> None:
        """Mark the records after `step` as superseded: the run begins again from there. Nothing is rewritten."""
        for path in (self.folder.metrics, self.folder.validation_metrics):
            if any(record["step"] > step for record in current_metrics(path)):
                append_record(path, {"kind": "rollback", "to_step": step, "attempt": self.attempt})

    def has_validation(self, name: str, step: int) -> bool:
        """Whether this held-out set was measured at this step before."""
        return any(r["set"] == name and r["step"] == step for r in current_metrics(self.folder.validation_metrics))

    def train(self, record: Mapping[str, Any]) -> None:
        """One step: step, samples, tokens, loss terms, lr, grad_norm, tokens_per_s."""
        self._write(self.folder.metrics, {"kind": "train", **record}, prefix="train/")

    def validation(self, record: Mapping[str, Any]) -> None:
        """One held-out set at one step: set, loss, perplexity, bits_per_byte."""
        self._write(self.folder.validation_metrics, {"kind": "validation", **record}, prefix=f"validation/{record['set']}/")

    def progress(self, record: Mapping[str, Any], eta_s: float) -> None:
        """The one line a person reads."""
        losses = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}"
        text = f"step {record['step']}/{self.total_steps}  {losses}  {record['tokens_per_s']:,.0f} tokens/s"
        self._log(f"{text}  {clock_text(eta_s)} left")
        if self.show is not None:
            self.show(record["step"], text, eta_s)

    def say(self, text: str) -> None:
        """A sentence about the run: to the log, and to the console."""
        self._log(text)
        if "console" in self.sinks:
            print(text, file=sys.stderr, flush=True)

    def _log(self, text: str) -> None:
        if self.speaking:
            with self._guard("train.log"), open(self.folder.log, "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def _write(self, path: Path, record: dict[str, Any], prefix: str) -> None:
        record["attempt"] = self.attempt
        if "jsonl" in self.sinks:
            with self._guard(path.name):
                append_record(path, record)
        if self.writer is not None:
            with self._guard("tensorboard"):
                for name, value in record.items():
                    if isinstance(value, int | float) and name not in ("step", "attempt", "time"):
                        self.writer.add_scalar(prefix + name, value, record["step"])

    @contextmanager
    def _guard(self, sink: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if sink not in self.failed:
                self.failed.add(sink)
                print(f"warning: {sink} cannot be written ({error}); training goes on without it", file=sys.stderr, flush=True)
