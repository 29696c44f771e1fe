"""The optimizer: AdamW over the model's own groups, its learning rate set from the clock before every step."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from franca.core.config import BelowOne, NotNegative, Positive, Share, config
from franca.core.duration import Duration, Length
from franca.core.schedule import Decay, Timeline, learning_rate


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
    decay: Decay = "cosine"
    decay_length: Length | None = None  # from the start, warm-up included; None: the length of the run
    final_lr_ratio: Share = 0.1  # of the peak, at the end of the decay


def problems(optim: OptimConfig, timeline: Timeline, length: Duration) -> list[str]:
    """What is wrong with the section for a run of `length`."""
    end = optim.decay_length or length
    if optim.decay == "constant" or timeline.measure(optim.warmup, "samples") < timeline.measure(end, "samples"):
        return []
    return [f"optim.warmup: '{optim.warmup}' is not shorter than the decay's end ('{end}'); shorten it"]


def lr_at(optim: OptimConfig, timeline: Timeline, length: Duration, step: int) -> float:
    """The learning rate of `step`. The schedule runs in the unit that the warm-up is written in."""
    unit = optim.warmup.unit
    return learning_rate(
        timeline.clock(step + 1).read(unit),
        peak=optim.lr,
        warmup=float(optim.warmup.value),
        end=timeline.measure(optim.decay_length or length, unit),
        decay=optim.decay,
        final_ratio=optim.final_lr_ratio,
    )


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
