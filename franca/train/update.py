"""How new numbers take the place of old ones: a rule's part of an optimizer, rounding to bf16, and steps that are skipped.

It refuses to know rates, schedules and the configuration. Everything here is local: a rank writes its own shards.
"""

import random
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Part(NamedTuple):
    """A parameter and what is remembered of it: tensors that are sharded as it is, and scalars."""

    name: str
    parameter: Tensor
    state: dict[str, Tensor]

    @property
    def grad(self) -> Tensor:
        """This rank's part of the gradient, in fp32."""
        assert self.parameter.grad is not None
        return local(self.parameter.grad).float()


class Writer:
    """Writes what one step makes, unless `found_inf` (a scalar on the device, 0 or 1) is 1: then all stays as it is.

    The choice is made on the device (`where`, since 0 times NaN is NaN), and nothing waits for it. In bf16, moments and
    parameters without a residue are rounded stochastically: up or down with the probabilities that keep the mean. The draws
    follow from the seed, the step, the tensor's name and the place of the shard: equal after a resume, equal on replicas,
    independent on the shards. A parameter's residue keeps what rounding to the nearest took (Kahan 1965): since a bf16 is
    the upper half of an fp32, 16 bits hold all of it.
    """

    def __init__(self, found_inf: Tensor, seed: int, step: int) -> None:
        self.found_inf, self.skip, self.key = found_inf, found_inf > 0, f"{seed} {step}"

    def put(self, part: Part, key: str, new: Tensor) -> None:
        """`new`, fp32 and this rank's part, into the state's tensor `key`."""
        self._put(part.state[key], new, f"{part.name}.{key}")

    def put_parameter(self, part: Part, new: Tensor) -> None:
        """`new`, fp32 and this rank's part, into the parameter; see `value`."""
        if "residue" not in part.state:
            return self._put(part.parameter, new, part.name)
        old, residue = local(part.parameter), local(part.state["residue"])
        bits = new.view(torch.int32)
        upper = bits + (1 << 15) & -(1 << 16)
        residue.copy_(torch.where(self.skip, residue, (bits - upper).to(torch.int16)))
        old.copy_(torch.where(self.skip, old, upper.view(torch.float32)))
        return None

    def _put(self, tensor: Tensor, new: Tensor, name: str) -> None:
        old = local(tensor)
        if old.dtype == torch.bfloat16:
            seed = random.Random(f"{self.key} {name} {_place(tensor)}").getrandbits(63)
            new = round_stochastically(new, torch.Generator(old.device).manual_seed(seed))
        old.copy_(torch.where(self.skip, old, new))


def value(part: Part) -> Tensor:
    """This rank's part of the parameter in fp32, with what rounding took from it."""
    parameter = local(part.parameter).float()
    if "residue" in part.state:
        return (parameter.view(torch.int32) + local(part.state["residue"])).view(torch.float32)
    return parameter


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to one of the two nearest bf16, the nearer one with the higher probability; the mean is x."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, generator=generator, device=x.device)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()  # the upper half of an fp32 is a bf16


def _place(tensor: Tensor) -> list[int]:
    """Where on the mesh this rank's shard lies; copies of a shard lie at one place."""
    if not isinstance(tensor, DTensor):
        return []
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return [c for c, placement in zip(coordinate, tensor.placements, strict=True) if not placement.is_replicate()]


class Rule:
    """How some parameters are updated."""

    name: ClassVar[str]  # as it stands in the table of groups

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is remembered of a parameter, at its start; everything is there from the start, to be loaded into."""
        raise NotImplementedError

    def update(self, parts: list[Part], lr: float, weight_decay: float, writer: Writer) -> None:
        """One step of all parameters of a group, in place."""
        raise NotImplementedError
