"""Tensor parallelism and context parallelism: how the parts of a layer, and of a row, work together.

A model says in plain strings how its modules can be split (`tp_plan`); here is what the strings mean, in PyTorch's own
parallel styles. Between blocks each rank has its part of the positions (sequence parallelism, Korthikanti et al. 2022);
the loss is computed from parts of the vocabulary, so that no rank ever holds all logits.
"""

import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel

from franca.models.layers import VocabShard

try:
    from torch.distributed._functional_collectives import all_gather_single_autograd as all_gather
except ImportError:  # before PyTorch 2.13
    from torch.distributed._functional_collectives import all_gather_tensor_autograd as all_gather


class Gather(ParallelStyle):
    """A module whose first input is a part of the positions, and who needs them all."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = inputs
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, [Shard(1)], run_check=False)
            return (x.redistribute(placements=[Replicate()]), *others)

        module.register_forward_pre_hook(gather)
        return module


class Rows(ParallelStyle):
    """A table or a head, of which each rank has some rows; it is used from outside."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def split(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
            for key, parameter in module.named_parameters(recurse=False):
                module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))

        return distribute_module(module, device_mesh, split)


class VocabularyLoss(ParallelStyle):
    """`models.layers.HeadLoss` for a head of which each rank has some rows, and for its part of the positions."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def prepare(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, head, *others = inputs
            x = DTensor.from_local(x, device_mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])
            local, group = head.to_local(), device_mesh.get_group()

            def reduce(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
                dist.all_reduce(values, operation, group)
                return values

            largest, total = (partial(reduce, operation=op) for op in (dist.ReduceOp.MAX, dist.ReduceOp.SUM))
            module.shard = VocabShard(device_mesh.get_local_rank() * len(local), largest, total)
            return (x.to_local(grad_placements=[Partial()]), local, *others)

        module.register_forward_pre_hook(prepare)
        return module


STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "table": lambda: RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),  # rows by rank; gives its positions
    "rows": Rows,
    "sequence": lambda: SequenceParallel(use_local_output=True),  # works on its positions
    "heads": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),  # works on its heads
    "gather": Gather,
    "columns": ColwiseParallel,  # all positions in, its features out
    "contract": lambda: RowwiseParallel(output_layouts=Shard(1)),  # its features in, its positions out
    "loss": VocabularyLoss,
}


def split_layers(model: nn.Module, plan: dict[str, str], mesh: DeviceMesh) -> None:
    """Apply a model's `tp_plan()`: patterns of module names -> names of STYLES. A module that is not here is passed over."""
    for name, module in model.named_modules():
        for pattern, style in plan.items():
            if fnmatch.fnmatchcase(name, pattern):
                STYLES[style]()._apply(module, mesh)


class Spread:
    """Rows that lie over the ranks of a group: rank r has the parts r and 2n - 1 - r of 2n, so that all see equally much."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def places(self, length: int, device: torch.device) -> Tensor:
        """The positions of this rank, (T / n,) int64."""
        return self._all(length, device)[self.rank]

    def _all(self, length: int, device: torch.device) -> Tensor:
        parts = torch.arange(length, device=device).view(2 * self.size, -1)
        return torch.cat([parts[: self.size], parts[self.size :].flip(0)], dim=1)

    def gather(self, x_BKTE: Tensor) -> Tensor:
        """The keys or values of all positions, in order, (B, K, T, E), from those of this rank's."""
        whole_TBKE = all_gather(x_BKTE.movedim(2, 0).contiguous(), 0, self.group)
        order = self._all(len(whole_TBKE), whole_TBKE.device).flatten().argsort()
        return whole_TBKE[order].movedim(0, 2)
