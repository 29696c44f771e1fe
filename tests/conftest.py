"""What many tests share: a small real dataset, run files over it, and runs in real processes that can be killed."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: processes that share cores must not wait for each other's threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import yaml
from ranks import Blow, Ranks, train

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


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Ranks]:
    """Start `franca train` on some ranks. Forked, since a fresh interpreter would spend seconds on imports."""

    def start(path: Path, *words: str, ranks: int = 1, blow: Blow | None = None) -> Ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"} if ranks > 1 else {}
            arguments = (path, list(words), place | address, tmp_path / f"rank{rank}.out", blow)
            processes.append(fork.Process(target=train, args=arguments))
            processes[-1].start()
        return Ranks(processes, Path(yaml.safe_load(path.read_text())["run"]))

    return start


@pytest.fixture
def records() -> Callable[[Path], list[dict[str, Any]]]:
    """The metric records of a run that count, without what a clock says."""

    def read(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k not in TIMING} for record in current_metrics(folder / name)]

    return read
