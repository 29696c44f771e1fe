"""The layers of a model on several ranks, one part after the other: layouts, and steps through PyTorch's 1F1B schedules.

A part ("chunk", its place a "stage") is the whole model without the modules that other ranks hold, so names stay as they
are. What it refuses to know: how a chunk is sharded, what optimizes it, where the rows come from.

1F1B: PipeDream-Flush, Narayanan et al. 2021 (ICML), section 3.2; interleaved: Narayanan et al. 2021 (SC), section 2.2.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from franca.models.base import IGNORE, Batch, Model

Before = Callable[[int, int], None]  # called with (first row, stage) before that micro-batch goes through that stage


def problems(num_layers: int, num_stages: int, stages: Sequence[int] | None) -> list[str]:
    """What keeps `num_layers` from lying on `num_stages`, in the numbers of layers that `stages` gives, if it does."""
    if num_layers < num_stages:
        return [f"parallel.pp: {num_stages} stages (pp x interleave) for {num_layers} layers; each needs one: use fewer stages"]
    if stages is not None and (len(stages) != num_stages or sum(stages) != num_layers or min(stages) < 1):
        wanted = f"{num_stages} numbers (pp x interleave) of at least 1 that add up to the {num_layers} layers"
        return [f"parallel.stages: is {list(stages)}; give {wanted}, or leave it out"]
    return []


def split(costs: Sequence[float], head_cost: float, num_stages: int, stages: Sequence[int] | None = None) -> tuple[range, ...]:
    """The layers of every stage. `stages` says how many each has; None: such that the slowest stage is as fast as it can be.

    `costs` of the layers, and `head_cost` which the last stage bears, in any one unit (FLOPs per token).
    """
    assert not problems(len(costs), num_stages, stages)
    ends = tuple(accumulate(stages)) if stages is not None else _balanced(costs, head_cost, num_stages)
    return tuple(range(first, last) for first, last in pairwise((0, *ends)))


def _balanced(costs: Sequence[float], head_cost: float, num_stages: int) -> tuple[int, ...]:
    """Where the stages end. Of the splits that have the fastest slowest stage, an even one."""
    before = (0.0, *accumulate(costs))

    @cache
    def best(end: int, stages: int) -> tuple[float, float, tuple[int, ...]]:
        """Of the first `stages` stages that hold the layers up to `end`: the slowest, the sum of squares, the ends."""
        extra = head_cost if stages == num_stages else 0.0
        found = []
        for first in range(stages - 1, end) if stages > 1 else (0,):
            slowest, squares, ends = best(first, stages - 1) if stages > 1 else (0.0, 0.0, ())
            cost = before[end] - before[first] + extra
            found.append((max(slowest, cost), squares + cost**2, (*ends, end)))
        return min(found)

    return best(len(costs), num_stages)[2]


def cut(model: nn.Module, layers: range) -> None:
    """Leave in a model these of its layers, which keep their numbers; the embedding in the first stage, norm and heads in the
    last. A head that is the embedding keeps it in the last stage too.
    """
    decoder: Any = model
    last = layers.stop == len(decoder.layers)
    for number in set(range(len(decoder.layers))) - set(layers):
        del decoder.layers._modules[str(number)]  # `del layers[number]` would give the others new names
    if layers.start > 0:
        decoder.positions = None
        if not (last and decoder.head is None):
            decoder.embedding = None
    if not last:
        decoder.norm, decoder.head, decoder.future_heads = nn.Identity(), None, nn.ModuleList()


class Pipeline(nn.Module):
    """A rank's chunks, in place of the model in the loop: stage s of all stages is chunk s // pp of rank s % pp.

    Every rank of the pipeline is given the same rows. Activations that travel are (micro-batch, `length`, D): `length` is T
    or, where its positions are spread over ranks, this rank's part of them. `step` and `losses` are collectives.
    """

    def __init__(self, chunks: Sequence[nn.Module], group: dist.ProcessGroup, device: torch.device, length: int) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        self.group, self.device, self.length = group, device, length
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        assert self.size > 1
        self.num_stages = self.size * len(chunks)
        self.is_last = self.rank == self.size - 1  # of the ranks: it holds the last stage
        self._schedules: dict[bool, tuple[tuple[int, int], Any, list[_Stage]]] = {}  # by whether gradients are wanted
        self._names: list[str] = []

    @property
    def _tied(self) -> nn.Parameter | None:
        """The embedding on the first rank, and its copy that is the head on the last."""
        chunk: Any = self.chunks[-1 if self.is_last else 0]
        return chunk.embedding.weight if chunk.config.tied and self.rank in (0, self.size - 1) else None

    @property
    def layers(self) -> nn.ModuleList:
        """Those of all chunks that are here."""
        chunks: list[Any] = list(self.chunks)
        return nn.ModuleList(layer for chunk in chunks for layer in chunk.layers)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the names that they have in the whole model."""
        for chunk in self.chunks:
            yield from chunk.named_parameters(*args, **kwargs)

    def counted_parameters(self) -> list[nn.Parameter]:
        """Those that the norm of the gradient counts here: all but the copy of the embedding that is the head."""
        return [p for p in self.parameters() if not (self.is_last and p is self._tied)]

    def param_groups(self) -> dict[str, list[str]]:
        """Parameter names by how the optimizer treats them, as in `models.base.Model`."""
        groups: dict[str, list[str]] = {}
        for chunk in self.chunks:
            model: Model = chunk  # type: ignore[assignment]
            for group, names in model.param_groups().items():
                groups[group] = groups.get(group, []) + names
        return groups

    def norm(self, mine: Tensor) -> Tensor:
        """The norm of the gradients of all ranks from those that are counted here."""
        square = mine.square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def step(self, batch: Batch, micro_samples: int, scale: float | Tensor, before: Before | None = None) -> dict[str, Tensor]:
        """Gradients of `scale` times the sum of all losses, in micro-batches of `micro_samples` rows; returns the named sums.

        They are zeros on all ranks but the last. There must be no gradients yet; over the ranks that share a chunk they are
        reduced once.
        """
        sums = self._run(batch, micro_samples, scale, before)
        self._add_tied()
        return sums

    @torch.no_grad()
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The named sums of losses, forward alone; zeros on all ranks but the last."""
        return self._run(batch, max(1, math.ceil(len(batch.tokens_BT) / self.size)), 1.0, None)

    def _run(self, batch: Batch, micro: int, scale: float | Tensor, before: Before | None) -> dict[str, Tensor]:
        count = self._num_micros(len(batch.tokens_BT), micro)
        batch = pad(batch, count * micro)
        parts = [Batch(*(None if t is None else t[i : i + micro] for t in batch)) for i in range(0, count * micro, micro)]  # type: ignore[arg-type]
        sums: dict[str, Tensor] = {}

        def forward(stage: _Stage, number: int, received: tuple[Tensor, ...]) -> Tensor:
            if before is not None:
                before(number * micro, stage.stage_index)
            chunk: Any = stage.submod
            if not stage.is_last:
                return chunk.hidden(parts[number], *received)  # type: ignore[no-any-return]
            losses = chunk.losses(parts[number], *received)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
            return torch.stack(list(losses.values())).sum() * scale

        schedule, stages = self._schedule(count, micro)
        for stage in stages:
            stage.work = forward
        schedule.step(target=batch.targets_BT if self.is_last else None, return_outputs=False)
        return self._named(sums)

    def _num_micros(self, rows: int, micro: int) -> int:
        """Enough micro-batches for the rows, one per rank, and a whole number of rounds where chunks are interleaved."""
        count = max(self.size, math.ceil(rows / micro))
        while len(self.chunks) > 1 and count % (count // self.size):
            count += 1
        return count

    def _schedule(self, count: int, micro: int) -> tuple[Any, list["_Stage"]]:
        """The schedule for `count` micro-batches, with its stages. They hold a place for every activation that is received."""
        train = torch.is_grad_enabled()
        if train not in self._schedules or self._schedules[train][0] != (count, micro):
            stages = [self._stage(number, micro, train) for number in range(len(self.chunks))]
            how: Any = {"n_microbatches": count, "loss_fn": _loss if train else None, "scale_grads": False}
            schedule: Any = Schedule1F1B(stages[0], **how) if len(stages) == 1 else ScheduleInterleaved1F1B([*stages], **how)
            self._schedules[train] = ((count, micro), schedule, stages)
        return self._schedules[train][1:]

    def _stage(self, number: int, micro: int, train: bool) -> "_Stage":
        chunk: Any = self.chunks[number]
        index = number * self.size + self.rank
        shape = (micro, self.length, chunk.config.dim)
        x = torch.empty(shape, dtype=chunk.compute_dtype, device="meta", requires_grad=train)
        loss = torch.empty((), device="meta", requires_grad=train)
        received, given = () if index == 0 else x, loss if index == self.num_stages - 1 else x
        return _Stage(chunk, index, self.num_stages, self.device, input_args=received, output_args=given, group=self.group)

    def _named(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums; zeros of the same names on ranks that have none. The last rank says the names, the first time."""
        if not self._names:
            names: list[Any] = [list(sums)]
            dist.broadcast_object_list(names, group=self.group, group_src=self.size - 1, device=self.device)
            self._names = names[0]
        return sums or {name: torch.zeros((), device=self.device) for name in self._names}

    def _add_tied(self) -> None:
        """Where the embedding is also the head: to the gradient of each copy, add the other's."""
        if (tied := self._tied) is None:
            return
        if isinstance(tied.grad, DTensor) and isinstance(tied, DTensor):  # the two uses may leave it in different forms
            tied.grad = tied.grad.redistribute(placements=tied.placements)
        mine: Any = tied.grad.to_local() if isinstance(tied.grad, DTensor) else tied.grad
        theirs, other = torch.empty_like(mine), self.size - 1 - self.rank
        pairs = (dist.isend, mine), (dist.irecv, theirs)
        for work in dist.batch_isend_irecv([dist.P2POp(do, t, group=self.group, group_peer=other) for do, t in pairs]):
            work.wait()
        mine += theirs


class _Stage(PipelineStage):
    """PyTorch's stage, which runs `work(stage, micro-batch, what it received)` in place of the module's `forward`.

    So the rows of every micro-batch come to all stages without PyTorch cutting them, and the loss is computed while the
    last stage's parameters are whole.
    """

    work: Callable[["_Stage", int, tuple[Tensor, ...]], Tensor] | None = None
    _micro = 0

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._micro = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        assert self.work is not None
        return self.work(self, self._micro, args)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """The last stage's output is the loss; the schedules insist on a target."""
    return output


def pad(batch: Batch, rows: int) -> Batch:
    """The batch with rows of nothing at the end, which have no loss, up to `rows`."""
    more, nothing = rows - len(batch.tokens_BT), Batch(0, IGNORE, 0, 0)  # type: ignore[arg-type]
    padded = (None if t is None else F.pad(t, (0, 0, 0, more), value=value) for t, value in zip(batch, nothing, strict=True))  # type: ignore[arg-type]
    return Batch(*padded)  # type: ignore[arg-type]
