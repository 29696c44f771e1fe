"""The optimizer: which rule updates which parameter at what rate, the gradient's norm, and the state that a checkpoint keeps.

The rules stand in `train.adamw` and `train.muon`, how numbers are written in `train.update`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from franca.core.config import BelowOne, Choice, NotNegative, Positive, config
from franca.core.duration import Duration, Length
from franca.core.schedule import Cooldown, CosineDecay, Decay, Schedule, Timeline
from franca.parallel.pipeline import Pipeline
from franca.train.update import Part, Rule, Writer, local, value


@config
class GroupRule:
    """What is special about parameters whose names match (`*`: anything). Of several, the first that matches counts."""

    match: str
    lr: NotNegative = 1.0  # times the rate of the others
    weight_decay: NotNegative | None = None  # None: as without this rule


@config
class OptimConfig(Choice):
    """What all optimizers have, with a learning-rate schedule on the clock."""

    default_kind: ClassVar[str | None] = "adamw"

    lr: Positive = 3e-4  # the peak
    beta1: BelowOne = 0.9  # of AdamW, which every kind has for embeddings and gains
    beta2: BelowOne = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1  # of matrices and embeddings; gains and biases have none
    clip_norm: NotNegative = 1.0  # of the global gradient; 0: no clipping
    warmup: Length = Duration(100, "steps")
    decay: Decay = CosineDecay()
    cooldown: Cooldown | None = None  # may be added at a resume: it begins now, or whenever you say
    groups: tuple[GroupRule, ...] = ()
    moments: Literal["fp32", "bf16"] = "fp32"  # bf16: rounded stochastically
    bf16_params: Literal["stochastic", "kahan"] | None = None  # parameters in bf16, with or without a residue; None: fp32
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # keep an average of the weights that forgets so much slower: 0.999
    max_skipped: Annotated[int, Field(ge=0)] = 0  # steps in a row whose gradient may be not finite; more end the run

    @property
    def moment_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.moments == "bf16" else torch.float32

    def rules(self, products: torch.dtype) -> tuple[Rule, Rule]:
        """The rule for the matrices of the blocks, and that for all others. `products`: dtype of matrix products."""
        raise NotImplementedError


def problems(optim: OptimConfig, timeline: Timeline, length: Duration) -> list[str]:
    """What is wrong with the section for a run of `length`."""
    schedule = Schedule(timeline, length, optim.warmup, optim.decay, optim.cooldown)
    return [f"optim.{line}" for line in schedule.problems()]


def lr_at(optim: OptimConfig, timeline: Timeline, length: Duration, step: int, skipped: Collection[int] = ()) -> float:
    """The learning rate of `step`; its clock stood still in those steps before (from 0) whose update was `skipped`."""
    schedule = Schedule(timeline, length, optim.warmup, optim.decay, optim.cooldown)
    earlier = [number for number in skipped if number < step]
    return optim.lr * schedule.at(timeline.clock(step + 1, skipped=earlier).read)


class Group(NamedTuple):
    """How some parameters are updated."""

    rule: str
    weight_decay: float
    lr_factor: float


def assign(model: nn.Module, optim: OptimConfig) -> dict[str, Group]:
    """The group of every parameter, by name. Matrices are the weights of linear layers in `model.layers`."""
    contract: Any = model
    matrix_rule, other_rule = optim.rules(torch.float32)
    matrices = {id(module.weight) for module in contract.layers.modules() if isinstance(module, nn.Linear)}
    decayed = set(contract.param_groups()["decay"])
    groups = {}
    for name, parameter in model.named_parameters():
        rule = next((rule for rule in optim.groups if fnmatchcase(name, rule.match)), GroupRule(match=name))
        usual = optim.weight_decay if name in decayed else 0.0
        decay = usual if rule.weight_decay is None else rule.weight_decay
        kind = matrix_rule.name if id(parameter) in matrices else other_rule.name
        groups[name] = Group(kind, decay, rule.lr)
    return groups


def group_problems(model: nn.Module, optim: OptimConfig) -> list[str]:
    """Rules of `optim.groups` that decide nothing; `model` is the whole one, and may lie on the meta device."""
    names, found = [name for name, _ in model.named_parameters()], []
    for number, rule in enumerate(optim.groups):
        if not any(fnmatchcase(name, rule.match) for name in names):
            known = ", ".join(sorted({re.sub(r"\d+", "*", name) for name in names}))
            above = " that no rule above it matches" if number else ""
            found.append(f"optim.groups[{number}].match: {rule.match!r} matches no parameter{above} (there are {known})")
        names = [name for name in names if not fnmatchcase(name, rule.match)]
    return found


def table(model: nn.Module, optim: OptimConfig) -> list[tuple[Any, ...]]:
    """Rows (name, shape, tensors, parameters, rule, weight decay, factor of the rate); layers that are alike share one."""
    parameters = dict(model.named_parameters())
    rows = Counter((re.sub(r"\d+", "*", name), parameters[name].shape, group) for name, group in assign(model, optim).items())
    return [(name, tuple(shape), count, count * shape.numel(), *group) for (name, shape, group), count in rows.items()]


def table_text(model: nn.Module, optim: OptimConfig) -> str:
    """The table for people."""
    lines = [("parameters", "shape", "number", "rule", "decay", "rate x")]
    for name, shape, count, numel, rule, decay, factor in table(model, optim):
        size = " x ".join(map(str, shape)) + (f", {count} times" if count > 1 else "")
        lines.append((name, size, f"{numel:,}", rule, f"{decay:g}", f"{factor:g}"))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


class Optimizer:
    """Every parameter with its state and its rule. `products` is the dtype of the rules' own matrix products.

    States begin as zeros (the average, `ema`, takes the weights before step 0) and are all there from the start, ready to be
    loaded into: by parameter name, sharded as the parameter is.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig, seed: int = 0, products: torch.dtype = torch.float32) -> None:
        self.optim, self.seed = optim, seed
        self.rules = {rule.name: rule for rule in optim.rules(products)}
        groups = assign(model, optim)
        self.groups: dict[Group, list[Part]] = defaultdict(list)
        self.parts: dict[str, Part] = {}
        for name, parameter in model.named_parameters():
            data = parameter.detach()
            state = self.rules[groups[name].rule].state(data)
            if optim.bf16_params == "kahan":
                state["residue"] = torch.zeros_like(data, dtype=torch.int16)
            if optim.ema is not None:
                state["ema"] = torch.zeros_like(data, dtype=torch.float32)
            self.parts[name] = Part(name, parameter, state)
            self.groups[groups[name]].append(self.parts[name])

    @torch.no_grad()
    def step(self, lr: float, found_inf: Tensor, step: int) -> None:
        """Update at the rate `lr`, unless `found_inf` is 1 (an fp32 scalar on the device, the same on all ranks; else 0).

        `step` (from 0) keys what is drawn. Nothing waits for the device.
        """
        writer = Writer(found_inf, self.seed, step)
        if self.optim.ema is not None and step == 0:
            for part in self.parts.values():
                local(part.state["ema"]).copy_(value(part))
        for group, parts in self.groups.items():
            given = [part for part in parts if part.parameter.grad is not None]
            if given:
                self.rules[group.rule].update(given, lr * group.lr_factor, group.weight_decay, writer)
        if self.optim.ema is not None:
            share = (1.0 - self.optim.ema) * (1.0 - found_inf)
            for part in self.parts.values():
                local(part.state["ema"]).lerp_(value(part), share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the averages (`ema`) in place of the parameters."""
        kept = {name: local(part.parameter).clone() for name, part in self.parts.items()}
        with torch.no_grad():
            for part in self.parts.values():
                local(part.parameter).copy_(local(part.state["ema"]))
            yield
            for name, part in self.parts.items():
                local(part.parameter).copy_(kept[name])

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.parameter.grad = None


def clip(model: nn.Module, max_norm: float, loss_scale: Tensor | None = None) -> Tensor:
    """Divide the gradient by the loss scale, and scale it down to `max_norm` if it is then longer (0: never).

    Returns its length between the two, on every rank: not finite, if any number of the gradient is not. Sharded, replicated
    and plain parameters, also of several meshes, may be mixed.
    """
    grads = _whole_gradients(model.parameters())
    by_mesh: dict[Any, list[Tensor]] = defaultdict(list)
    for grad in _whole_gradients(model.counted_parameters()) if isinstance(model, Pipeline) else grads:
        by_mesh[grad.device_mesh if isinstance(grad, DTensor) else None].append(grad)
    norms = [torch.nn.utils.get_total_norm(some) for some in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if isinstance(model, Pipeline):
        norm = model.norm(norm)
    if loss_scale is not None:
        norm = norm / loss_scale
    factor = torch.ones_like(norm) if max_norm == 0.0 else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(grad) for grad in grads], factor if loss_scale is None else factor / loss_scale)
    return norm


def _whole_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients, each sharded as its parameter is; of parameters that are copies, each rank may have had its share."""
    grads = []
    for parameter in parameters:
        if isinstance(parameter.grad, DTensor) and isinstance(parameter, DTensor):
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)  # nothing, where it is whole
        if parameter.grad is not None:
            grads.append(parameter.grad)
    return grads


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, `optimizer.<parameter>.<key>`. Rates and the like come from the config, never from a file."""
    current = dict(model.named_parameters())
    parts = optimizer.parts
    assert all(current[name] is part.parameter for name, part in parts.items()), "parameters are not sharded as they were"
    return {f"optimizer.{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state.items()}


def state_bytes(model: nn.Module, optim: OptimConfig) -> int:
    """Bytes of the optimizer's state, over all devices, without scalars; `model` may lie on the meta device."""
    states = (tensor for part in Optimizer(model, optim).parts.values() for tensor in part.state.values())
    return sum(tensor.nbytes for tensor in states if tensor.ndim)
