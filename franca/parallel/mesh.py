"""From the `parallel:` section and the number of ranks to a mesh of devices, or to a readable refusal.

Axes, from the outermost (most distant ranks) to the innermost: pp (stages of layers), dp_replicate (copies), dp_shard
(other rows, parameters in parts), cp (parts of the same rows), tp (parts of the same layers).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from franca.core.config import Count, Positive, config
from franca.parallel import pipeline
from franca.parallel.recompute import RecomputeBlocks, RecomputeConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@config
class ParallelConfig:
    """How the model and its rows lie on the devices; the product of all axes is the number of ranks."""

    pp: Count = 1  # pipeline stages, one after the other over the layers
    dp_replicate: Count = 1  # copies of the model (with dp_shard 1: data parallelism as in DDP)
    dp_shard: Count | Literal["all"] = "all"  # ranks that share one copy, in parts (FSDP); all: those that are left
    cp: Count = 1  # ranks that share each row (context parallelism)
    tp: Count = 1  # ranks that share each layer and, between layers, each row (tensor and sequence parallelism)
    stages: tuple[Count, ...] | None = None  # layers of each pipeline stage; None: balanced, with the head's share
    interleave: Count = 1  # stages of each rank of the pipeline, one after the other: less waiting, more sending
    reshard_after_forward: bool = True  # False: keep whole layers between forward and backward; faster, more memory
    recompute: RecomputeConfig = RecomputeBlocks()  # what the backward pass computes again, to save memory
    compile: bool = False  # torch.compile of every block
    compile_cache: str = "auto"  # the folder of what was compiled, "none", or "auto": see `world.keep_compiled`
    # How long a collective of the GPUs may take before the run fails, and NCCL's flight recorder tells where each rank stood.
    first_timeout_s: Positive = 1800.0  # up to the end of an attempt's first step: ranks compile at different speeds
    timeout_s: Positive = 300.0  # after it; saves and slow disks are waited for on the host, not here


@dataclass(frozen=True)
class Mesh:
    """Where one rank stands. `sizes` and `here` by axis; what has one rank is None.

    `whole` has the axes pp, dp_replicate, fsdp (dp_shard x cp) and tp, those of one rank left out, but fsdp.
    """

    sizes: dict[str, int]
    here: dict[str, int]
    whole: DeviceMesh | None = None
    rows: dist.ProcessGroup | None = None  # the ranks that share rows: along cp

    @property
    def dp_size(self) -> int:
        """Into how many parts the rows of a batch go."""
        return self.sizes["dp_replicate"] * self.sizes["dp_shard"]

    @property
    def dp_rank(self) -> int:
        """Which part of a batch's rows is this rank's."""
        return self.here["dp_replicate"] * self.sizes["dp_shard"] + self.here["dp_shard"]

    @property
    def gradient_parts(self) -> int:
        """Over how many ranks FSDP2 takes the mean of the gradients; their sum is what is wanted."""
        return self.dp_size * self.sizes["cp"]

    @property
    def counts_rows(self) -> bool:
        """Whether this rank speaks for its rows: one of those that have the same."""
        return self.here["pp"] == self.here["cp"] == self.here["tp"] == 0

    @property
    def counts_losses(self) -> bool:
        """Whether this rank speaks for the losses that it has computed: one of those that have the same."""
        return self.here["tp"] == 0 and self.here["pp"] == self.sizes["pp"] - 1

    def axis(self, name: str) -> DeviceMesh | None:
        """The mesh along one axis; None when it has one rank."""
        return None if self.whole is None or self.sizes[name] == 1 else self.whole[name]

    @property
    def fsdp(self) -> DeviceMesh | None:
        """What parameters are sharded over (and copied over, as the first axis of two); None when they are not."""
        if self.whole is None or self.gradient_parts == 1:
            return None
        return self.whole[("dp_replicate", "fsdp")] if self.sizes["dp_replicate"] > 1 else self.whole["fsdp"]


ALONE = Mesh(dict.fromkeys(AXES, 1), dict.fromkeys(AXES, 0))


def sizes_of(parallel: ParallelConfig, num_ranks: int) -> dict[str, int]:
    """The number of ranks along each axis. Raises ValueError when they cannot make up `num_ranks`."""
    given = {axis: getattr(parallel, axis) for axis in AXES}
    known = math.prod(size for size in given.values() if size != "all")
    if given["dp_shard"] == "all":
        given["dp_shard"] = max(1, num_ranks // known)
    if math.prod(given.values()) != num_ranks:
        shown = " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in AXES if getattr(parallel, axis) not in (1, "all"))
        asked = f"{shown or 'dp_shard 1'} takes {'a multiple of ' if parallel.dp_shard == 'all' else ''}{known} rank(s)"
        raise ValueError(f"parallel: {asked}, but there are {num_ranks}; change one of them, or dp_shard to 'all'")
    return given


def problems(parallel: ParallelConfig, num_ranks: int, model: Any, seq_len: int) -> list[str]:
    """What keeps a model (a `ModelConfig`) with rows of `seq_len` tokens from running on `num_ranks` ranks."""
    found = parallel.recompute.problems(parallel.compile)
    if parallel.compile_cache != "auto" and not parallel.compile:
        found.append(f"parallel.compile_cache: is {parallel.compile_cache!r}, but nothing is compiled; set parallel.compile")
    try:
        sizes = sizes_of(parallel, num_ranks)
    except ValueError as error:
        return [*found, str(error)]
    tp, cp, pp = sizes["tp"], sizes["cp"], sizes["pp"]
    if pp > 1:
        found += pipeline.problems(model.num_layers, pp * parallel.interleave, parallel.stages)
    elif parallel.stages is not None or parallel.interleave > 1:
        found.append("parallel.stages and parallel.interleave: have no effect with pp 1; leave them out, or take more of pp")
    if tp > 1:
        widths = model.tp_widths()
        if not widths:
            found.append(f"parallel.tp: is {tp}, but blocks of '{model.kind}' cannot be split; take 1, and more of dp_shard")
        if parallel.compile:  # their backward pass loses track of what is sharded how, in PyTorch 2.13
            found.append("parallel.compile: blocks that are split by tp cannot be compiled; leave it out, or take tp 1")
        uneven = [f"{name} {width}" for name, width in widths.items() if width % tp]
        if uneven:
            found.append(f"parallel.tp: {tp} does not divide {', '.join(uneven)}; change tp or the model")
    if cp > 1 and not model.attends_only:
        found.append(f"parallel.cp: is {cp}, but '{model.kind}' reads a row from its beginning to its end; take 1")
    parts = tp * (2 * cp if cp > 1 else 1)
    if parts > 1 and seq_len % parts:
        why = " x ".join([*(["2", f"cp {cp}"] if cp > 1 else []), *([f"tp {tp}"] if tp > 1 else [])])
        found.append(f"data.seq_len: {seq_len} does not divide by {why}; take a multiple of {parts}")
    return found


def make(parallel: ParallelConfig, num_ranks: int, rank: int, device: torch.device) -> Mesh:
    """The mesh of all ranks. Every rank calls it."""
    sizes = sizes_of(parallel, num_ranks)
    if num_ranks == 1:
        return ALONE
    joined = {
        **{axis: sizes[axis] for axis in ("pp", "dp_replicate")},
        "fsdp": sizes["dp_shard"] * sizes["cp"],
        "tp": sizes["tp"],
    }
    names = tuple(axis for axis, size in joined.items() if size > 1 or axis == "fsdp")  # FSDP2 wants that one to be there
    whole, rows = init_device_mesh(device.type, tuple(joined[name] for name in names), mesh_dim_names=names), None
    if sizes["cp"] > 1:
        shape = (num_ranks // sizes["cp"] // sizes["tp"], sizes["cp"], sizes["tp"])
        rows = init_device_mesh(device.type, shape, mesh_dim_names=("others", "cp", "tp")).get_group("cp")
    here, left = {}, rank
    for axis in reversed(AXES):
        left, here[axis] = divmod(left, sizes[axis])
    return Mesh(sizes, here, whole, rows)
