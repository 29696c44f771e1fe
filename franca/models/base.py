"""The contract between a model and the rest of franca. A model is single-device code that knows nothing of meshes.

Shape letters, here and in every model file: B rows, T positions of a row, S positions that can be attended to,
D model width, H query heads, K key/value heads, E width of a head, F width of the MLP, V vocabulary.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from franca.core.config import Choice

IGNORE = -100  # the target of a position that is not trained on


class Batch(NamedTuple):
    """What a loss is computed from: int64 tensors (B, T) on the model's device; see `data.loader.Batch`."""

    tokens_BT: Tensor
    targets_BT: Tensor
    document_BT: Tensor | None = None
    position_BT: Tensor | None = None


class Context(NamedTuple):
    """What blocks may know of the T positions they are given. None: nothing special, or nobody asked.

    `masks` by window (0: none): True where a position may see another, (B or 1, 1, T, S); None: all before it. S is `seen`.
    `begin` is where the positions go in a cache, for all rows alike, `slots_BT` where rows differ; both None without a cache.
    `spread`: the positions are some of the S that can be seen, the others lie on other devices; None: all are here.
    """

    cos: Tensor | None
    sin: Tensor | None
    masks: dict[int, Tensor | None]
    starts_BT: Tensor | None  # True where a document begins: recurrent state is forgotten there
    seen: int
    begin: int | None = None
    slots_BT: Tensor | None = None
    spread: "Spread | None" = None


class Cache:
    """What a model remembers of the sequences that it continues: `states[n]` are layer n's named tensors (rows, ...).

    `lengths` says how many positions each row holds, (rows,) on the host. An empty row is all zeros.
    """

    def __init__(self, states: list[dict[str, Tensor]], lengths: Tensor) -> None:
        self.states, self.lengths = states, lengths

    def rows(self, first: int, last: int) -> "Cache":
        """The rows [first, last), as views."""
        return Cache([{n: s[first:last] for n, s in state.items()} for state in self.states], self.lengths[first:last])

    def clear(self, row: int) -> None:
        """Forget a row."""
        for tensor in self._tensors():
            tensor[row] = 0

    def copy(self, source: int, target: int) -> None:
        """Make one row what another is."""
        for tensor in self._tensors():
            tensor[target] = tensor[source]

    def _tensors(self) -> Iterator[Tensor]:
        yield self.lengths
        for state in self.states:
            yield from state.values()


class Model(Protocol):
    """What the loop, the planner, generation and conversion use of a model (an `nn.Module`)."""

    config: "ModelConfig"
    layers: nn.ModuleList  # the unit of sharding, recomputation, compilation and probes
    compute_dtype: torch.dtype  # of activations and matrix products; parameters keep theirs

    def forward(
        self,
        tokens_BT: Tensor,
        document_BT: Tensor | None = None,
        position_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); extends the cache."""

    def next_logits(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Logits of the next position alone, (B, V); extends the cache."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Named sums over the valid tokens of the batch, as fp32 scalars; the loop adds them, and divides by the global count.

        `nll` is that of the next tokens: the `loss` of records and validation.
        """

    def new_cache(self, rows: int, max_len: int) -> Cache:
        """An empty cache for `rows` sequences of up to `max_len` positions."""

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of forward and backward for one token of a row of `context` tokens."""

    def param_groups(self) -> dict[str, list[str]]:
        """Parameter names by how the optimizer treats them: `decay` and `no_decay`."""

    spread: "Spread | None"  # how rows lie on several devices; None: whole


class Spread(Protocol):
    """Rows of which each device has some positions."""

    def places(self, length: int, device: torch.device) -> Tensor:
        """The positions that are here, of a row of `length`."""

    def gather(self, x_BKTE: Tensor) -> Tensor:
        """Keys or values of all positions, from those that are here."""


class ModelConfig(Choice):
    """The open choice `model: {kind: ...}`; every family registers by subclassing it."""

    vocab_size: int | None
    max_seq_len: int
    hf_names: ClassVar[dict[str, str]] = {}  # our parameter name -> Hugging Face's; {} stands for the layer's number
    attends_only: ClassVar[bool] = False  # positions meet in attention alone: a row may lie on several devices

    def build(self) -> Any:
        """The model (`Model`), on torch's current default device."""
        raise NotImplementedError

    def problems(self) -> list[str]:
        """What is wrong with the shape, one line each; empty when it can be built."""
        raise NotImplementedError

    def tp_plan(self) -> dict[str, str]:
        """How modules may be split over devices: pattern of names -> style (`parallel.tensor.STYLES`); empty: not at all."""
        return {}

    def tp_widths(self) -> dict[str, int]:
        """What then has to divide by the number of devices, by the name that a user knows it by."""
        return {}


def owners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module that itself holds parameters or buffers, and so has `reset(generator)`, with its name."""
    return ((name, module) for name, module in model.named_modules() if module._parameters or module._buffers)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: total, non_embedding (all but the input embedding and an untied head), and by part."""
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = re.sub(r"^layers\.\d+\.", "", name).split(".")[0]
        parts[part] += parameter.numel()
    return {"total": parts.total(), "non_embedding": parts.total() - parts["embedding"] - parts["head"], **parts}
