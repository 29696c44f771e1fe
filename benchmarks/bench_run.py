"""A real run of franca to measure: a prepared dataset of source code, and the loop's own objects."""

import sysconfig
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import say
from franca.core.config import Precision, check
from franca.core.run import RunFolder
from franca.data.prepare import PrepareConfig, prepare
from franca.observe.metrics import Metrics
from franca.parallel.world import World
from franca.train import loop
from franca.train.faults import Faults

SHAPE: dict[str, Any] = {"dim": 384, "num_layers": 6, "num_heads": 6, "mlp_dim": 1024, "tied": False}
VOCAB_SIZE, SEQ_LEN, BATCH = 8192, 512, 8


def dataset(root: Path) -> Path:
    """Python's own standard library, prepared by franca; made once."""
    stdlib = sysconfig.get_paths()["stdlib"]
    paths = [f"{stdlib}/{pattern}" for pattern in ("*.py", "asyncio/*.py", "email/*.py", "json/*.py", "xml/**/*.py")]
    values = {
        "output": str(root / "dataset"),
        "sources": {"python": {"paths": paths}},
        "tokenizer": {"vocab_size": VOCAB_SIZE},
        "on_bad_document": "skip",
    }
    if not (root / "dataset").exists():
        say("preparing the text")
    return prepare(check(PrepareConfig, values, "benchmark data"))


def build(root: Path, name: str, precision: Precision, compile_blocks: bool) -> loop.Run:
    """What `franca train` builds before its first step."""
    values = {
        "run": str(root / name),
        "model": {"kind": "llama", "max_seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE, **SHAPE},
        "data": {"sources": [{"path": str(dataset(root)), "max_epochs": 1000}], "seq_len": SEQ_LEN},
        "train": {"length": "1000 steps", "batch_samples": BATCH, "precision": precision},
        "parallel": {"compile": compile_blocks},
        "metrics": {"sinks": []},
    }
    resolved = loop.resolve(check(loop.RunConfig, values, "benchmark run"), 1)
    folder = RunFolder(resolved.config.run)
    folder.checkpoints.mkdir(parents=True)
    metrics = Metrics(resolved.config.metrics, folder, 1, resolved.total_steps)
    return loop.build(resolved, World(0, 1, 0, torch.device("cpu")), Faults(), folder, 1, metrics)
