"""`franca plan`: the whole run before it starts, from the meta device, on a login node.

It uses the same checks as training, so that what it lets through starts.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from franca.core.errors import ConfigError
from franca.core.schedule import TOKENS_PER_PARAMETER
from franca.models.base import count_parameters
from franca.parallel.mesh import sizes_of
from franca.train.config import RunConfig, read_config, resolve
from franca.train.optim import state_bytes


def main(path: Path, words: list[str], num_ranks: int, as_json: bool) -> int:
    """Print the plan. Returns 0, or 78 when the run cannot finish."""
    result = plan(read_config(path, words), num_ranks)
    print(json.dumps(result, indent=2) if as_json else render(result, str(path), num_ranks))
    return 78 if result["problems"] else 0


def plan(settings: RunConfig, num_ranks: int) -> dict[str, Any]:
    """Every figure of the plan that can be had, and the problems that keep the run from finishing."""
    try:
        resolved = resolve(settings, num_ranks)
    except ConfigError as error:
        title, *lines = str(error).splitlines()
        return {"problems": [line.strip() for line in lines] or [title]}
    config, timeline = resolved.config, resolved.timeline
    with torch.device("meta"):
        model: Any = config.model.build()
    counts = count_parameters(model)
    clock = timeline.clock(resolved.total_steps)
    flops_per_token = timeline.flops_per_token
    weights_bytes = (4 if config.optim.bf16_params is None else 2) * counts["total"]
    states_bytes, sizes = state_bytes(model, config.optim), sizes_of(config.parallel, num_ranks)
    parts = math.prod(size for axis, size in sizes.items() if axis != "dp_replicate")
    return {
        "params": counts,
        "steps": resolved.total_steps,
        "samples": clock.samples,
        "tokens": clock.tokens,
        "epochs": clock.epochs,
        "chinchilla": clock.chinchilla,
        "batch_ramp": [{"iteration": s.step, "samples": s.samples, "batch": s.batch_samples} for s in timeline.stages],
        "flops": {"per_token": flops_per_token, "total": clock.flops},
        "checkpoint": {"full_bytes": weights_bytes + states_bytes, "weights_bytes": weights_bytes},
        # Parameters, their gradients and the optimizer's state, in parts over all ranks but the copies.
        "memory": {"static_bytes_per_device": (2 * weights_bytes + states_bytes) // parts},
        "problems": [],
    }


def render(result: dict[str, Any], name: str, num_ranks: int) -> str:
    """The plan for people."""
    if result["problems"]:
        return "\n".join([f"{name}: this run cannot finish:", *(f"  - {problem}" for problem in result["problems"])])
    params, checkpoint = result["params"], result["checkpoint"]
    memory = f"{decimal(result['memory']['static_bytes_per_device'])} on each of {num_ranks} device(s), without activations"
    parts = ", ".join(f"{part} {count:,}" for part, count in params.items() if part not in ("total", "non_embedding"))
    per_parameter = TOKENS_PER_PARAMETER * result["chinchilla"]
    rows = [
        ("parameters", f"{params['total']:,} ({params['non_embedding']:,} without embedding and head)"),
        ("", parts),
        ("steps", f"{result['steps']:,}"),
        ("samples", f"{result['samples']:,}"),
        ("tokens", f"{result['tokens']:,} ({result['epochs']:.3g} epochs, {per_parameter:.3g} for each parameter)"),
        ("FLOPs per token", f"{result['flops']['per_token']:.4g}"),
        ("FLOPs", f"{result['flops']['total']:.4g}"),
        ("checkpoint", f"{decimal(checkpoint['full_bytes'])}, weights alone {decimal(checkpoint['weights_bytes'])}"),
        ("static memory", memory),
        ("problems", "none found"),
    ]
    return "\n".join([f"{name}:", *(f"  {label:16} {value}" for label, value in rows)])
