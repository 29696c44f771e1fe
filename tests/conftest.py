"""What many tests share: a small real dataset, run files over it, and runs in real processes that can be killed."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: processes that share cores must not wait for each other's threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import yaml

from franca.core.run import current_metrics
from franca.data.prepare import PrepareConfig, TokenizerConfig, prepare
from franca.data.sources import CorpusConfig

torch.set_num_threads(1)

STDLIB = Path(os.__file__).parent
FILES = ("argparse", "ast", "bdb", "calendar", "codecs", "configparser", "copy", "csv", "dataclasses", "difflib", "dis", "enum")
TIMING = {"time", "attempt", "tokens_per_s", "step_s"}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some modules of the standard library, prepared with a tokenizer of 512 tokens: about 200k tokens."""
    output = tmp_path_factory.mktemp("data") / "stdlib"
    corpus = CorpusConfig(paths=tuple(str(STDLIB / f"{name}.py") for name in FILES), documents="paragraph")
    settings = PrepareConfig(output=str(output), sources={"stdlib": corpus}, tokenizer=TokenizerConfig(vocab_size=512))
    return prepare(settings)


@pytest.fixture
def run_file(tmp_path: Path, dataset: Path) -> Callable[..., Path]:
    """Write a run file of a tiny Llama; keywords replace whole sections' keys. Returns its path."""

    def write(name: str = "run", **sections: Mapping[str, Any]) -> Path:
        values: dict[str, Any] = {
            "run": str(tmp_path / name),
            "model": {"kind": "llama", "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 64},
            "data": {"sources": [{"path": str(dataset)}], "seq_len": 32},
            "train": {"length": "40 steps", "batch_samples": 8, "precision": "fp32", "log_every": "1 steps"},
            "optim": {"lr": 1e-2, "warmup": "5 steps"},
            "checkpoint": {"every": "10 steps", "keep": None},
            "validation": {"at_end": False},
        }
        for key, section in sections.items():
            values[key] = values.get(key, {}) | dict(section) if isinstance(section, Mapping) else section
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@dataclass
class Ranks:
    """Real processes, one per rank, each in `franca train`."""

    processes: list[Any]
    folder: Path

    def wait_for_step(self, step: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.step() < step:
            assert time.monotonic() < deadline, f"step {step} was not reached: {self.folder}"
            assert any(p.is_alive() for p in self.processes), f"the run ended before step {step}: {self.folder}"
            time.sleep(0.001)

    def step(self) -> int:
        try:
            return max((record["step"] for record in current_metrics(self.folder / "metrics.jsonl")), default=0)
        except OSError:
            return 0

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.processes)) if ranks is None else ranks:
            os.kill(self.processes[rank].pid, number)

    def wait(self, timeout_s: float = 90.0) -> list[int]:
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.signal(signal.SIGKILL, alive)
        assert not alive, f"ranks {alive} did not end within {timeout_s} s: {self.folder}"
        return [process.exitcode for process in self.processes]


def _train(path: Path, words: list[str], variables: dict[str, str], log: Path) -> None:
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from franca.train.loop import main

    sys.exit(main(path, words))


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Ranks]:
    """Start `franca train` on some ranks. Forked, since a fresh interpreter would spend seconds on imports."""

    def start(path: Path, *words: str, ranks: int = 1) -> Ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"} if ranks > 1 else {}
            log = tmp_path / f"rank{rank}.out"
            processes.append(fork.Process(target=_train, args=(path, list(words), place | address, log)))
            processes[-1].start()
        folder = Path(yaml.safe_load(path.read_text())["run"])
        return Ranks(processes, folder)

    return start


@pytest.fixture
def records() -> Callable[[Path], list[dict[str, Any]]]:
    """The metric records of a run that count, without what a clock says."""

    def read(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k not in TIMING} for record in current_metrics(folder / name)]

    return read
