"""The optimizer: AdamW over the model's own groups, its learning rate set from the clock before every step."""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from franca.core.config import BelowOne, NotNegative, Positive, config
from franca.core.duration import Duration, Length
from franca.core.schedule import Cooldown, CosineDecay, Decay, Schedule, Timeline


@config
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) with a learning-rate schedule on the clock."""

    lr: Positive = 3e-4  # the peak
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1  # of matrices and embeddings; gains and biases have none
    clip_norm: NotNegative = 1.0  # of the global gradient; 0: no clipping
    warmup: Length = Duration(100, "steps")
    decay: Decay = CosineDecay()
    cooldown: Cooldown | None = None  # may be added at a resume: it begins now, or whenever you say


def problems(optim: OptimConfig, timeline: Timeline, length: Duration) -> list[str]:
    """What is wrong with the section for a run of `length`."""
    schedule = Schedule(timeline, length, optim.warmup, optim.decay, optim.cooldown)
    return [f"optim.{line}" for line in schedule.problems()]


def lr_at(optim: OptimConfig, timeline: Timeline, length: Duration, step: int, skipped: Collection[int] = ()) -> float:
    """The learning rate of `step`; its clock stood still in those steps before (from 0) whose update was `skipped`."""
    schedule = Schedule(timeline, length, optim.warmup, optim.decay, optim.cooldown)
    earlier = [number for number in skipped if number < step]
    return optim.lr * schedule.at(timeline.clock(step + 1, skipped=earlier).read)


def build(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the groups that the model names, with its state in place (zeros), ready to be loaded into."""
    parameters = dict(model.named_parameters())
    decays = {"decay": optim.weight_decay, "no_decay": 0.0}
    named = model.param_groups().items()  # type: ignore[operator]
    groups = [{"params": [parameters[n] for n in names], "weight_decay": decays[group]} for group, names in named if names]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    for parameter in parameters.values():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm` if it is longer (0: never); returns its length before that, on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, `optimizer.<parameter>.<key>`. Rates and the like come from the config, never from a file."""
    assert all(parameter in optimizer.state for parameter in model.parameters()), "parameters are not sharded as they were"
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


STATE_BYTES_PER_PARAMETER = 8  # two fp32 moments
