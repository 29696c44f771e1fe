"""From the `parallel:` section and the number of ranks to a device mesh, or to a readable refusal."""

from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from franca.core.config import config


@config
class ParallelConfig:
    """How the model lies on the devices. All ranks shard it: `dp_shard` is the number of ranks."""

    dp_shard: int | Literal["all"] = "all"
    reshard_after_forward: bool = True  # False: keep whole layers between forward and backward; faster, more memory
    compile: bool = False  # torch.compile of every block


def problems(parallel: ParallelConfig, num_ranks: int) -> list[str]:
    """What keeps `parallel` from running on `num_ranks` ranks."""
    if parallel.dp_shard in ("all", num_ranks):
        return []
    return [f"parallel.dp_shard: is {parallel.dp_shard}, but there are {num_ranks} ranks; use their number, or 'all'"]


def make(num_ranks: int, device: torch.device) -> DeviceMesh | None:
    """The mesh of axis `dp_shard` over all ranks; None for one rank, which needs no collective."""
    return init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("dp_shard",)) if num_ranks > 1 else None
