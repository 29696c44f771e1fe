"""Muon: the momentum of a matrix, made orthogonal, is its update. For the matrices of the blocks; AdamW for all others.

Sources: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); J. Liu et al., "Muon is scalable
for LLM training" (arXiv:2502.16982), section 2.2: the scale with which updates are as long as AdamW's, so that one
learning rate and one weight decay serve both.

Whatever the mesh, a matrix is made orthogonal as a whole: matrices of one shape are stacked, and redistributed from "a piece
of every matrix" to "some matrices whole" (an all-to-all), so that ranks share the work, and back.
"""

import math
from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from franca.core.config import BelowOne, config
from franca.models.layers import product_dtype
from franca.train.adamw import AdamW
from franca.train.optim import OptimConfig
from franca.train.update import Part, Rule, Writer, local, value

QUINTIC = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz polynomial a x + b x^3 + c x^5 (Jordan et al.)
STEPS = 5
STACK_NUMBERS = 2**26  # numbers of a stack of matrices on one rank: what the working memory is a small multiple of


@config
class MuonConfig(OptimConfig):
    """Muon for the matrices of the blocks, AdamW for embeddings, heads, gains and biases."""

    kind: Literal["muon"] = "muon"
    momentum: BelowOne = 0.95

    def rules(self, products: torch.dtype) -> tuple[Rule, Rule]:
        return Muon(self, products), AdamW(self)


class Muon(Rule):
    """Nesterov momentum, made orthogonal in products of the dtype `products`."""

    name = "muon"

    def __init__(self, optim: MuonConfig, products: torch.dtype) -> None:
        self.optim, self.products = optim, products

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(parameter, dtype=self.optim.moment_dtype)}

    def update(self, parts: list[Part], lr: float, weight_decay: float, writer: Writer) -> None:
        alike: dict[Any, list[Part]] = defaultdict(list)
        for part in parts:
            p = part.parameter
            alike[p.shape, (p.device_mesh, p.placements) if isinstance(p, DTensor) else None].append(part)
        for (shape, _), some in alike.items():
            ranks = some[0].parameter.device_mesh.size() if isinstance(some[0].parameter, DTensor) else 1
            height = ranks * max(1, STACK_NUMBERS // shape.numel())
            for first in range(0, len(some), height):
                stack = some[first : first + height]
                self._update_stack(stack, lr * 0.2 * math.sqrt(max(shape)), lr * weight_decay, writer)

    def _update_stack(self, parts: list[Part], length: float, decay: float, writer: Writer) -> None:
        pieces = []
        for part in parts:
            momentum = local(part.state["momentum"]).float().lerp(part.grad, 1.0 - self.optim.momentum)
            pieces.append(part.grad.lerp(momentum, self.optim.momentum))
            writer.put(part, "momentum", momentum)
        for part, update in zip(parts, self._orthogonal(torch.stack(pieces), parts[0].parameter), strict=True):
            writer.put_parameter(part, value(part) * (1.0 - decay) - length * update)

    def _orthogonal(self, pieces: Tensor, like: Tensor) -> Tensor:
        """This rank's pieces of some matrices, (N, piece), to its pieces of the orthogonal ones; `like` is one such matrix."""
        if not isinstance(like, DTensor):
            return orthogonalize(pieces, self.products)
        mesh, size = like.device_mesh, torch.Size([len(pieces), *like.shape])
        strides = (like.shape[0] * like.shape[1], like.shape[1], 1)
        pieces_placed = [_one_dim_on(placement) for placement in like.placements]
        stack = DTensor.from_local(pieces, mesh, pieces_placed, run_check=False, shape=size, stride=strides)
        whole = stack.redistribute(placements=[Shard(0)] * mesh.ndim)
        done = orthogonalize(whole.to_local(), self.products)
        back = DTensor.from_local(done, mesh, whole.placements, run_check=False, shape=size, stride=strides)
        return back.redistribute(placements=pieces_placed).to_local()


def _one_dim_on(placement: Placement) -> Placement:
    """The placement of a stack of tensors that are placed so."""
    if isinstance(placement, _StridedShard):  # of a dim that tensor parallelism has cut already
        return _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
    return Shard(placement.dim + 1) if isinstance(placement, Shard) else placement


def orthogonalize(matrices: Tensor, products: torch.dtype) -> Tensor:
    """U V^T, roughly, of every matrix U S V^T of (N, rows, columns): singular values go to between 0.7 and 1.2. fp32."""
    a, b, c = QUINTIC
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices  # the smaller side is squared
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x.to(products)
    x = x.to(product_dtype(x))
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if wide is not matrices else x).float()
