"""Held-out loss on the live model: fixed windows, every token once, weighted by tokens."""

import math
from typing import Any

import torch
from torch import nn

from franca.core.config import config
from franca.core.duration import Duration
from franca.data.loader import Loader
from franca.models.base import Batch, Model
from franca.parallel.world import World


@config
class ValidationConfig:
    every: Duration | None = None  # in steps, samples, tokens or epochs; None: only at the end
    at_end: bool = True
    micro_samples: int | None = None  # rows per forward pass; None: as in training


def problems(validation: ValidationConfig) -> list[str]:
    found = []
    if validation.every is not None and (validation.every.unit == "seconds" or not validation.every.value):
        found.append(f"validation.every: is '{validation.every}'; give it in steps, samples, tokens or epochs, above 0")
    if validation.micro_samples is not None and validation.micro_samples < 1:
        found.append(f"validation.micro_samples: is {validation.micro_samples}; it must be at least 1")
    return found


@torch.no_grad()
def measure(model: nn.Module, loader: Loader, facts: dict[str, Any], micro_samples: int, world: World) -> dict[str, float]:
    """The mean loss (nats per token), perplexity and bits per byte of one held-out set, the same on every rank.

    Bits per byte count every byte of the set: tokens that nothing predicts (the very first) count as the mean of the others.
    """
    contract: Model = model  # type: ignore[assignment]
    model.eval()
    rows = loader.order.epoch_samples
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    for first in range(0, rows, micro_samples * world.size):
        batch = loader.rows(first + world.rank * micro_samples, micro_samples)
        losses = contract.losses(to_device(batch, world.device))
        totals += torch.stack([losses["nll"].double(), torch.tensor(batch.num_valid, dtype=torch.float64, device=world.device)])
    nll, valid = world.gather_sum(totals).tolist()
    model.train()
    loss = nll / max(valid, 1)
    bits_per_byte = loss / math.log(2) * facts["tokens"] / facts["bytes"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits_per_byte}


def to_device(batch: Any, device: torch.device) -> Batch:
    """A loader's batch of numpy arrays as tensors on `device`."""
    arrays = (batch.tokens_BT, batch.targets_BT, batch.document_BT, batch.position_BT)
    return Batch(*(torch.from_numpy(array).to(device, non_blocking=True) if array is not None else None for array in arrays))  # type: ignore[arg-type]
