"""Recomputation: what blocks compute is thrown away, and made again when the backward pass needs it (Chen et al. 2016).

The `forward` of blocks is wrapped in place, so that parameters keep their names. What blocks compute is not known here, only
which of PyTorch's operators are dear.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from franca.core.config import BelowOne, Choice, Count, config

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm")  # of the weights; batched ones are attention's, and quadratic
_DEAR = (  # attention, scans, and what waits for other ranks
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "franca::linear_scan",
    "_c10d_functional::reduce_scatter_tensor",
    "_c10d_functional::all_to_all_single",
)


class RecomputeConfig(Choice):
    """The choice `parallel.recompute: {kind: ...}`."""

    def problems(self, compiled: bool) -> list[str]:
        """What keeps it from running, one line each."""
        return []

    def apply(self, layers: nn.ModuleList) -> None:
        """Make the blocks recompute in training, in place; before they are compiled."""


@config
class RecomputeBlocks(RecomputeConfig):
    """Nothing, or whole blocks: each keeps its input alone."""

    kind: Literal["none", "full"] = "none"

    def apply(self, layers: nn.ModuleList) -> None:
        if self.kind == "full":
            _wrap(layers, 1)


@config
class RecomputeEvery(RecomputeConfig):
    """Whole blocks: the first, and every n-th after it."""

    kind: Literal["every"]
    n: Count = 2

    def apply(self, layers: nn.ModuleList) -> None:
        _wrap(layers, self.n)


@config
class RecomputeSelective(RecomputeConfig):
    """By operator: the results of matrix products and of fused attention are kept, all others are computed again."""

    kind: Literal["selective"]
    every_second_product: bool = False  # keep the results of every second product alone

    def apply(self, layers: nn.ModuleList) -> None:
        contexts: Any = partial(_selective_contexts, self.every_second_product)
        contexts.cache_hash = f"{self.every_second_product} {_PRODUCTS} {_DEAR}"  # the compiler's cache asks what it depends on
        _wrap(layers, 1, context_fn=contexts)


@config
class RecomputeBudget(RecomputeConfig):
    """The compiler chooses what to keep of each block, in `budget` times the memory that all of it would take."""

    kind: Literal["budget"]
    budget: BelowOne = 0.5

    def problems(self, compiled: bool) -> list[str]:
        if compiled:
            return []
        return ["parallel.recompute: kind budget is the compiler's work; set parallel.compile, or use kind selective"]

    def apply(self, layers: nn.ModuleList) -> None:
        import torch._functorch.config  # (takes a second: it is the compiler's)

        torch._functorch.config.activation_memory_budget = self.budget


def _wrap(layers: nn.ModuleList, every: int, **keywords: Any) -> None:
    for layer in list(layers)[::every]:
        layer.forward = partial(_recomputed, partial(checkpoint, use_reentrant=False, **keywords), layer.forward)


def _recomputed(run: Callable[..., Tensor], forward: Callable[..., Tensor], *args: Any) -> Tensor:
    return run(forward, *args) if torch.is_grad_enabled() else forward(*args)


def _selective_contexts(every_second_product: bool) -> Any:
    """For one pass through one block: its products are counted from the start, in the forward pass and when it is repeated."""
    counts: Counter[bool] = Counter()

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operator.name().removesuffix("." + operator._overloadname)
        keep = name in _DEAR or name in _PRODUCTS
        if every_second_product and name in _PRODUCTS:
            counts[context.is_recompute] += 1
            keep = counts[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
