"""Every family at about 3M parameters besides its embedding, on the same tokens, with the same trials of the learning rate.

`python -m benchmarks.families [FOLDER]` prints the table of docs/models.md, after about half an hour on two cores. Quality does
not depend on what else the machine does, the speeds do. Started again it goes on.
"""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import yaml

from benchmarks.table import machine, say

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
STEPS, BATCH, SEQ_LEN, VOCAB_SIZE = 120, 12, 256, 4096
RATES = (1.5e-3,)  # each family has all of them, and keeps the best

LLAMA = {"kind": "llama", "num_heads": 4, "mlp_dim": 704}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "num_layers": 4},
    "llama, 2 future tokens": {**LLAMA, "num_layers": 4, "future_tokens": 2},
    "gpt2": {"kind": "gpt2", "num_heads": 4, "num_layers": 4, "dropout": 0.0},
    "mingru": {"kind": "mingru", "num_layers": 6},
    "mingru, gate: lingua": {"kind": "mingru", "num_layers": 6, "gate": "lingua"},
    "minlstm": {"kind": "minlstm", "num_layers": 5},
    "hawk": {"kind": "hawk", "num_layers": 3, "width_multiple": 32, "mlp_dim": 640},
    "mamba": {"kind": "mamba", "num_layers": 7, "state_dim": 64},
    "hybrid: hawk, hawk, llama": {
        "kind": "hybrid",
        "num_layers": 3,
        "blocks": [*[{"kind": "hawk", "width_multiple": 32, "mlp_dim": 640}] * 2, {**LLAMA, "window": 128}],
    },
}


def main(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    data = _prepare(root)
    rows = []
    for name, model in MODELS.items():
        losses = {rate: _bits(root, data, name, model, rate) for rate in RATES}
        rate = min(losses, key=lambda rate: losses[rate])
        speed = _speed(root, data, name, model, rate)
        rows.append((name, _parameters(root, data, name, model, rate), rate, losses[rate], speed))
        say(f"{name}: " + ", ".join(f"{bits:.3f} bits per byte at lr {rate:g}" for rate, bits in losses.items()))
    print(
        f"{machine()}\n\n{STEPS * BATCH * SEQ_LEN:,} tokens each, seq {SEQ_LEN}, fp32, {THREADS} threads, best of lr {RATES}\n"
    )
    print("| model | parameters besides the embedding | lr | bits per byte | tokens/s, training |\n|---|---|---|---|---|")
    for name, parameters, rate, bits, speed in rows:
        print(f"| {name} | {parameters:,} | {rate:g} | {bits:.3f} | {speed:,.0f} |")
    print("\nTo repeat: python -m benchmarks.families")


def _prepare(root: Path) -> Path:
    """Python's standard library, without tests; one file in a hundred is held out."""
    library = sysconfig.get_path("stdlib")
    names = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3")
    settings = {
        "output": str(root / "data"),
        "sources": {
            "stdlib": {
                "paths": [f"{library}/**/*.py"],
                "exclude": [f"{library}/{depth}{name}/**" for name in names for depth in ("", "*/", "*/*/")],
            }
        },
        "tokenizer": {"vocab_size": VOCAB_SIZE},
        "validation_share": 0.01,
        "on_bad_document": "skip",
    }
    (root / "data.yaml").write_text(yaml.safe_dump(settings))
    _franca("prepare", str(root / "data.yaml"))
    return root / "data"


def _run_file(
    root: Path, data: Path, name: str, model: dict[str, Any], rate: float, steps: int, label: str
) -> tuple[Path, Path]:
    folder = root / "-".join([*name.replace(":", "").replace(",", "").split(), label])
    settings = {
        "run": str(folder),
        "model": {"dim": 256, "max_seq_len": SEQ_LEN, "tied": True, **model},
        "data": {"sources": [{"path": str(data)}], "seq_len": SEQ_LEN},
        "train": {"length": f"{steps} steps", "batch_samples": BATCH, "precision": "fp32", "log_every": "1 steps"},
        "optim": {
            "lr": rate,
            "beta2": 0.98,
            "warmup": f"{steps // 10} steps",
            "decay": {"kind": "cosine", "final_ratio": 0.05},
        },
        "checkpoint": {"every": f"{steps} steps"},
    }
    path = root / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path, folder


def _bits(root: Path, data: Path, name: str, model: dict[str, Any], rate: float) -> float:
    path, folder = _run_file(root, data, name, model, rate, STEPS, f"{rate:g}")
    _franca("train", str(path))
    return float(_records(folder / "metrics.validation.jsonl")[-1]["bits_per_byte"])


def _parameters(root: Path, data: Path, name: str, model: dict[str, Any], rate: float) -> int:
    path, _ = _run_file(root, data, name, model, rate, STEPS, f"{rate:g}")
    plan = json.loads(_franca("plan", str(path), "--json"))
    return int(plan["params"]["non_embedding"])


def _speed(root: Path, data: Path, name: str, model: dict[str, Any], rate: float) -> float:
    """The median over the steps of the run."""
    _, folder = _run_file(root, data, name, model, rate, STEPS, f"{rate:g}")
    return statistics.median(record["tokens_per_s"] for record in _records(folder / "metrics.jsonl"))


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _franca(*words: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run([sys.executable, "-m", "franca", *words], env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"franca {' '.join(words)}: exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "families"))
