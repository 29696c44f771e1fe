"""`franca status`: what a run folder says of its run. Reads files; needs no torch and no cluster."""

import json
import time
from pathlib import Path
from typing import Any

from franca.checkpoint.store import Store
from franca.core.config import read_yaml
from franca.core.errors import ConfigError
from franca.core.progress import clock_text
from franca.core.run import RunFolder, current_metrics, read_records


def main(path: Path, as_json: bool) -> None:
    facts = status(path)
    print(json.dumps(facts, indent=2) if as_json else render(facts))


def status(path: Path) -> dict[str, Any]:
    """Step, loss, checkpoints and attempts of a run. Raises ConfigError when `path` is no run folder."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ConfigError(f"{path}: is no run folder (it has no config.yaml). Start a run with: franca train run.yaml")
    train = [record for record in current_metrics(folder.metrics) if record["kind"] == "train"]
    held_out = {record["set"]: record for record in current_metrics(folder.validation_metrics)}
    events = list(read_records(folder.events))
    starts = [event for event in events if event["event"] == "start"]
    ends = [event for event in events if event["event"] == "exit" and event["attempt"] == starts[-1]["attempt"]]
    last = train[-1] if train else None
    return {
        "run": str(path),
        "state": ends[-1]["reason"] if ends else ("running, or killed" if starts else "not started"),
        "step": last["step"] if last else 0,
        "length": read_yaml(folder.config)["train"]["length"],
        "tokens": last["tokens"] if last else 0,
        "loss": last["loss"] if last else None,
        "tokens_per_s": last["tokens_per_s"] if last else None,
        "last_step_age_s": time.time() - last["time"] if last else None,
        "validation": {name: {key: r[key] for key in ("step", "loss", "bits_per_byte")} for name, r in held_out.items()},
        "checkpoints": [checkpoint.step for checkpoint in Store(folder.checkpoints).committed()],
        "attempts": len(starts),
        "world_size": starts[-1]["world_size"] if starts else None,
    }


def render(facts: dict[str, Any]) -> str:
    """The status for people."""
    rows = [("state", f"{facts['state']} (attempt {facts['attempts']}, {facts['world_size']} rank(s))")]
    if facts["loss"] is not None:
        age = clock_text(facts["last_step_age_s"])
        rows.append(("step", f"{facts['step']} of {facts['length']}, {age} ago: loss {facts['loss']:.4f}"))
        rows.append(("tokens", f"{facts['tokens']:,} at {facts['tokens_per_s']:,.0f} per second"))
    for name, values in facts["validation"].items():
        text = f"loss {values['loss']:.4f}, {values['bits_per_byte']:.4f} bits per byte at step {values['step']}"
        rows.append((f"held out: {name}", text))
    rows.append(("checkpoints", ", ".join(map(str, facts["checkpoints"])) or "none yet"))
    return "\n".join([facts["run"], *(f"  {label:20} {value}" for label, value in rows)])
