"""Several processes on one machine: what FSDP2, tensor, context and pipeline parallelism cost beside one process, on a CPU.

Each row is a whole `franca launch` of the same run; the figure is tokens per second after the first steps, per core.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bench_run import SHAPE, dataset
from benchmarks.table import Row, say

MESHES: dict[str, dict[str, int]] = {
    "FSDP2": {"dp_shard": 2},
    "replicas": {"dp_replicate": 2, "dp_shard": 1},
    "TP": {"tp": 2},
    "CP": {"cp": 2},
    "PP, 4 micro-batches": {"pp": 2},
}
STEPS, WARM_UP, ROUNDS = 6, 2, 2


def rows(root: Path) -> list[Row]:
    speeds: dict[str, list[float]] = {name: [] for name in ("one process", *MESHES)}
    data = dataset(root)
    for number in range(ROUNDS):
        for name, values in speeds.items():
            values.append(_tokens_per_s(root, data, f"parallel-{name.split()[0]}-{number}", MESHES.get(name, {})))
            say(f"  {name}: {values[-1]:,.0f} tokens/s")
    one = statistics.median(speeds["one process"])
    found = []
    for name in MESHES:
        speed = statistics.median(speeds[name])
        ratio = statistics.median(a / b for a, b in zip(speeds[name], speeds["one process"], strict=True))
        found.append(Row(f"{name} on 2 processes", f"{speed:,.0f} tokens/s", f"1 process {one:,.0f}", ratio))
    return found


def _tokens_per_s(root: Path, data: Path, name: str, parallel: dict[str, int]) -> float:
    """One run, a core per process."""
    values: dict[str, Any] = {
        "run": str(root / name),
        "model": {"kind": "llama", "max_seq_len": 512, "vocab_multiple": 16, **SHAPE},
        "data": {"sources": [{"path": str(data)}], "seq_len": 512},
        "train": {
            "length": f"{STEPS} steps",
            "batch_samples": 8,
            "micro_samples": 2,
            "precision": "fp32",
            "log_every": "1 steps",
        },
        "optim": {"warmup": "1 steps"},
        "validation": {"at_end": False},
        "parallel": parallel,
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    ranks = 2 if parallel else 1
    command = [sys.executable, "-m", "franca", "launch", str(path), "--ranks", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    records = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(record["tokens_per_s"] for record in records[WARM_UP:])
