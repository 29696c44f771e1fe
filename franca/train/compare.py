"""`franca verify losses RUN RUN`: whether two runs are the same, and the first step, then the first tensor, that differ.

It reads run folders, on any machine; what the numbers mean it refuses to know.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from franca.checkpoint import convert, sharded
from franca.checkpoint.store import Checkpoint, Store
from franca.core.errors import ConfigError
from franca.core.run import RunFolder, current_metrics

_BESIDE = {"kind", "attempt", "step", "time"}  # and what ends with a unit of time or memory: these are the machine's
_UNITS = ("_s", "_bytes", "mfu")
_PORTION_BYTES = 2**30  # of tensors read at a time


def main(one: Path, other: Path, rtol: float, as_json: bool) -> int:
    """Print what differs. Returns 0, or 1 when something differs by more than `rtol`."""
    found = compare(one, other, rtol)
    print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode() if as_json else render(found))
    return 0 if found["equal"] else 1


def compare(one: Path, other: Path, rtol: float = 0.0) -> dict[str, Any]:
    """The largest and the first difference of the records that count, and the first tensor of the checkpoints.

    Differences are relative to the larger number; with `rtol` 0 equal means the same bits.
    Raises ConfigError for a folder without records, and for two without a common step.
    """
    runs = (one, other)
    mine, theirs = (_records(path) for path in runs)
    steps = sorted(mine.keys() & theirs.keys())
    if not steps:
        shown = " and ".join(f"{path} steps {min(r)} to {max(r)}" for path, r in zip(runs, (mine, theirs), strict=True))
        raise ConfigError(f"the runs have no step in common to compare: {shown}. Train one of them further")
    largest = first = None
    for step in steps:
        for difference in _differences(step, mine[step], theirs[step]):
            if largest is None or difference["relative"] > largest["relative"]:
                largest = difference
            if first is None and difference["relative"] > rtol:
                first = difference
    saved = [{c.step: c for c in Store(RunFolder(path).checkpoints).committed()} for path in runs]
    common = sorted(saved[0].keys() & saved[1].keys())
    tensors = (d for step in common if (d := _first_tensor(saved[0][step], saved[1][step], rtol)))
    tensor = next(tensors, None)
    return {
        "runs": [str(path) for path in runs],
        "rtol": rtol,
        "equal": first is None and tensor is None,
        "steps": {"common": len(steps), "first": steps[0], "last": steps[-1], "only_in_one": len(mine.keys() ^ theirs.keys())},
        "largest": largest,
        "first": first,
        "checkpoints": common,
        "tensor": tensor,
    }


def _records(path: Path) -> dict[int, dict[str, Any]]:
    folder = RunFolder(path)
    records = {r["step"]: r for r in current_metrics(folder.metrics) if r["kind"] == "train"}
    if not records:
        raise ConfigError(
            f"{path}: has no record of a step ({folder.metrics.name}). Give the folders of two runs, as `run:` says"
        )
    return records


def _differences(step: int, mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every number of a step that is not the same on both sides, in the order of the record."""
    for name in mine | theirs:
        a, b = mine.get(name), theirs.get(name)
        if a != b and name not in _BESIDE and not name.endswith(_UNITS):
            relative = math.inf  # one is missing, or was not finite
            if isinstance(a, int | float) and isinstance(b, int | float):
                relative = abs(a - b) / max(abs(a), abs(b))
            yield {"step": step, "name": name, "values": [a, b], "relative": relative}


def _first_tensor(one: Checkpoint, other: Checkpoint, rtol: float) -> dict[str, Any] | None:
    """The first tensor of two checkpoints of a step that differs, in the model's order: weights, then the optimizer's."""
    here, there = (_stored(checkpoint) for checkpoint in (one, other))
    shapes = [{n: f"{tuple(e.size)} {e.properties.dtype}" for n, e in index.items()} for index in (here, there)]
    portion: dict[str, TensorStorageMetadata] = {}
    for name in _in_model_order(one, [*here, *(name for name in there if name not in here)]):
        shown = [shape.get(name, "missing") for shape in shapes]
        if shown[0] != shown[1]:
            odd = {"step": one.step, "name": name, "values": shown, "relative": math.inf}
            return _compare(one, other, portion, rtol) or odd
        portion[name] = here[name]
        if sum(math.prod(e.size) * e.properties.dtype.itemsize for e in portion.values()) > _PORTION_BYTES:
            if found := _compare(one, other, portion, rtol):
                return found
            portion = {}
    return _compare(one, other, portion, rtol)


def _stored(checkpoint: Checkpoint) -> dict[str, TensorStorageMetadata]:
    index = sharded.Reader(checkpoint.path).read_metadata().state_dict_metadata
    return {name: entry for name, entry in index.items() if isinstance(entry, TensorStorageMetadata)}


def _in_model_order(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """An index's own order is that of ranks and stages."""
    try:
        order = {name: place for place, name in enumerate(convert.parameter_names(checkpoint))}
    except ConfigError:  # a user's own model, whose code is not at hand
        order = {}

    def place(name: str) -> tuple[bool, int]:
        owner = name.removeprefix("model.") if (weight := name.startswith("model.")) else name.removeprefix("optimizer.")
        owner = owner if weight else owner.rpartition(".")[0]
        return not weight, order.get(owner, len(order))

    return sorted(names, key=place)


def _compare(
    one: Checkpoint, other: Checkpoint, stored: dict[str, TensorStorageMetadata], rtol: float
) -> dict[str, Any] | None:
    """The first of some tensors, alike in shape and type, that differs."""
    pair = [{n: torch.empty(entry.size, dtype=entry.properties.dtype) for n, entry in stored.items()} for _ in range(2)]
    for checkpoint, tensors in zip((one, other), pair, strict=True):
        sharded.load(checkpoint, tensors, num_ranks=1)
    for name in stored:
        a, b = (tensors[name] for tensors in pair)
        if not torch.equal(_bits(a), _bits(b)):
            x, y = a.double(), b.double()
            size = float((x - y).abs().max())
            relative = size / float(torch.maximum(x.abs(), y.abs()).max()) if size else 0.0
            relative = math.inf if math.isnan(relative) else relative
            if not rtol or relative > rtol:
                counts = {"numbers": a.numel(), "different": int((a != b).sum())}
                return {"step": one.step, "name": name, "largest": size, "relative": relative, **counts}
    return None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def render(found: dict[str, Any]) -> str:
    """The comparison for people."""
    steps, rtol = found["steps"], found["rtol"]
    rows = [("steps", f"{steps['common']} in common, {steps['first']} to {steps['last']}")]
    if steps["only_in_one"]:
        rows.append(("", f"{steps['only_in_one']} more in one of them alone, not compared"))
    for title, difference in (("largest", found["largest"]), (f"first above {rtol:g}", found["first"])):
        rows.append((title, _sentence(difference) if difference else "no difference"))
    rows.append(("checkpoints", ", ".join(map(str, found["checkpoints"])) or "none of a common step"))
    if found["checkpoints"]:
        rows.append(("first tensor", _sentence(found["tensor"]) if found["tensor"] else "no difference"))
    verdict = "equal" if found["equal"] else "DIFFERENT"
    return "\n".join([f"{' and '.join(found['runs'])}: {verdict}", *(f"  {label:16} {value}" for label, value in rows)])


def _sentence(difference: dict[str, Any]) -> str:
    where = f"step {difference['step']}: {difference['name']}"
    if "values" in difference:
        where += " is {} and {}".format(*difference["values"])
    else:
        counts = f"{difference['different']:,} of {difference['numbers']:,} numbers"
        where += f", {counts} by at most {difference['largest']:.3g}"
    return f"{where} (relative {difference['relative']:.3g})"
