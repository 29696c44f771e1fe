"""Held-out loss on the live model: fixed windows, every token once, weighted by tokens."""

import math
from functools import cache
from typing import Any

import torch
from torch import nn

from franca.core.config import Count, config
from franca.core.duration import RepeatableCadence
from franca.data.loader import Loader
from franca.models.base import Batch
from franca.parallel.apply import reshard
from franca.parallel.mesh import Mesh
from franca.parallel.world import World


@config
class ValidationConfig:
    every: RepeatableCadence | None = None  # None: only at the end
    at_end: bool = True
    micro_samples: Count | None = None  # rows per forward pass; None: as in training


@torch.no_grad()
def measure(
    model: nn.Module, loader: Loader, facts: dict[str, Any], micro_samples: int, world: World, mesh: Mesh
) -> dict[str, float]:
    """The mean loss (nats per token), perplexity and bits per byte of one held-out set, the same on every rank.

    Bits per byte count every byte of the set: tokens that nothing predicts (the very first) count as the mean of the others.
    """
    model.eval()
    rows = loader.order.epoch_samples
    total, num_valid = torch.zeros((), dtype=torch.float64, device=world.device), 0
    for first in range(0, rows, micro_samples * mesh.dp_size):
        batch = loader.rows(first + mesh.dp_rank * micro_samples, micro_samples)
        total += model.losses(to_device(batch, world.device))["nll"].double()  # type: ignore[operator]
        num_valid += batch.num_valid
    nll, valid = world.sum([total.item() * mesh.counts_losses, num_valid * mesh.counts_rows])
    model.train()
    reshard(model)
    loss = nll / max(valid, 1)
    bits = loss / math.log(2) * facts["tokens"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits / facts["bytes"]}


def to_device(batch: Any, device: torch.device) -> Batch:
    """A loader's batch of numpy arrays as tensors on `device`.

    On a GPU by way of pinned memory, on a stream of its own: the host, which is a step ahead, does not wait, and the copy
    goes beside the step that the GPU is still at.
    """
    arrays = (batch.tokens_BT, batch.targets_BT, batch.document_BT, batch.position_BT)
    tensors = [torch.from_numpy(array) if array is not None else None for array in arrays]
    if device.type == "cuda":
        now, copies = torch.cuda.current_stream(device), _copy_stream(device)
        with torch.cuda.stream(copies):
            tensors = [t.pin_memory().to(device, non_blocking=True) if t is not None else None for t in tensors]
        now.wait_stream(copies)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(now)  # its memory is not given to the next copy before the step has read it
    return Batch(*tensors)  # type: ignore[arg-type]


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
