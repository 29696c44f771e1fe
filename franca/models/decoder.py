"""The trunk every family shares: embedding -> blocks -> norm -> head. A family gives the block.

Shape letters: see `models.base`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from franca.core.config import Count, NotNegative, Positive, config
from franca.models.base import IGNORE, Batch, Cache, Context, ModelConfig, Spread
from franca.models.layers import Embedding, HeadLoss, Linear, RMSNorm, Rope, document_mask, multiply, see

# How a block of attention and an MLP is split over devices, by heads and by features of the MLP; see `parallel.tensor.STYLES`.
TRANSFORMER_TP_PLAN = {
    "attention_norm": "sequence",
    "attention": "gather",
    "attention.query": "columns",
    "attention.key": "columns",
    "attention.value": "columns",
    "attention.query_norm": "heads",
    "attention.key_norm": "heads",
    "attention.output": "contract",
    "mlp_norm": "sequence",
    "mlp": "gather",
    "mlp.gate": "columns",
    "mlp.up": "columns",
    "mlp.down": "contract",
}


@config
class TrunkConfig(ModelConfig):
    """What all families have. Widths in numbers of features."""

    vocab_size: Count | None = None  # None: the tokenizer's
    vocab_multiple: Count = 1  # embedding and head have rows for a multiple of it; the rows added are never predicted
    dim: Count = 512
    num_layers: Count = 8
    max_seq_len: Count = 2048
    norm_eps: Positive = 1e-5
    tied: bool = False  # the head is the embedding
    future_tokens: Count = 1  # predicted at every position: that many heads (Gloeckle et al. 2024); one is used in decoding
    z_loss: NotNegative = 0.0  # weight of log(Z)^2, which keeps the softmax's denominator near 1 (PaLM: 1e-4)
    init_std: Positive = 0.02  # projections into the residual stream: divided by sqrt(2 num_layers)

    @property
    def num_rows(self) -> int:
        """Rows of the embedding."""
        assert self.vocab_size is not None
        return self.vocab_multiple * math.ceil(self.vocab_size / self.vocab_multiple)

    @property
    def residual_std(self) -> float:
        """Initial standard deviation of projections into the residual stream (Radford et al. 2019, section 2.3)."""
        return self.init_std / math.sqrt(2 * self.num_layers)

    def tp_plan(self) -> dict[str, str]:
        """The trunk's part, around the blocks' own."""
        trunk = {"embedding": "table", "positions": "table", "norm": "sequence", "head": "rows", "future_heads.*": "rows"}
        blocks = {f"layers.*.{name}": style for name, style in self.block_tp_plan().items()}
        return {**trunk, "loss": "loss", **blocks} if blocks else {}

    def block_tp_plan(self) -> dict[str, str]:
        """The same of one block; empty: it cannot be split."""
        return {}

    def block(self, number: int) -> nn.Module:
        """Layer `number`: `forward(x_BTD, context, state) -> x_BTD`, `new_state(...)`, `mixing_flops(context)`."""
        raise NotImplementedError

    def norm(self) -> nn.Module:
        """The norm before the head."""
        return RMSNorm(self.dim, self.norm_eps)

    def rope(self) -> Rope | None:
        """The tables of rotary positions, for families whose blocks turn by them."""
        return None

    def learned_positions(self) -> Embedding | None:
        """The table of learned positions, for families that have one."""
        return None

    def build(self) -> "Decoder":
        return Decoder(self)


class Decoder(nn.Module):
    """A causal language model whose blocks `config.block` makes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        c: TrunkConfig = config
        self.config = config
        self.compute_dtype = torch.float32
        self.spread: Spread | None = None
        self.embedding = Embedding(c.num_rows, c.dim, c.init_std)
        self.positions = c.learned_positions()
        self.rope = c.rope()
        self.layers = nn.ModuleList(c.block(number) for number in range(c.num_layers))
        self.windows = sorted({window for layer in self.layers if (window := getattr(layer, "window", None)) is not None})
        self.norm = c.norm()
        self.head = None if c.tied else Linear(c.dim, c.num_rows, c.init_std)
        self.loss = HeadLoss(c.vocab_size, c.z_loss)
        self.future_heads = nn.ModuleList(Linear(c.dim, c.num_rows, c.init_std) for _ in range(c.future_tokens - 1))

    def forward(
        self,
        tokens_BT: Tensor,
        document_BT: Tensor | None = None,
        position_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in the compute dtype. With a cache, `tokens_BT` follow what it holds, and it counts positions."""
        return self._logits(self._trunk(tokens_BT, document_BT, position_BT, cache))

    def losses(self, batch: Batch, x_BTD: Tensor | None = None) -> dict[str, Tensor]:
        """`nll`: the sum of the negative log-likelihoods of the valid targets, in nats; `nll_2`...: those of later tokens;
        `z_loss`: that of all heads, weighted.

        `x_BTD`: what the layers before, on other devices, made of the tokens; None: all layers are here.
        """
        x_BTD = self._trunk(batch.tokens_BT, batch.document_BT, batch.position_BT, None, x_BTD)
        weights: list[Any] = [self._head_weight(), *(head.weight for head in self.future_heads)]
        sums = [self.loss(x_BTD, head_VD, self._here(_later(batch, ahead))) for ahead, head_VD in enumerate(weights)]
        losses = {f"nll_{number}" if number > 1 else "nll": nll for number, (nll, _) in enumerate(sums, 1)}
        return losses if not self.config.z_loss else {**losses, "z_loss": torch.stack([z_loss for _, z_loss in sums]).sum()}

    def _here(self, rows_BT: Tensor) -> Tensor:
        """The positions of rows that are on this device."""
        return rows_BT if self.spread is None else rows_BT[:, self.spread.places(rows_BT.shape[1], rows_BT.device)]

    def hidden(self, batch: Batch, x_BTD: Tensor | None = None) -> Tensor:
        """What the layers make of the tokens or, if it is given, of `x_BTD`: (B, T, D) in the compute dtype."""
        return self._trunk(batch.tokens_BT, batch.document_BT, batch.position_BT, None, x_BTD)

    def next_logits(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Logits of the position after `tokens_BT` alone: (B, V). The cache is extended by `tokens_BT`."""
        return self._logits(self._trunk(tokens_BT, None, None, cache)[:, -1])

    def _logits(self, x: Tensor) -> Tensor:
        return multiply(x, self._head_weight())[..., : self.config.vocab_size]

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _trunk(
        self,
        tokens_BT: Tensor,
        document_BT: Tensor | None,
        position_BT: Tensor | None,
        cache: Cache | None,
        x_BTD: Tensor | None = None,
    ) -> Tensor:
        if cache is not None and (document_BT is not None or position_BT is not None):
            given = "document_BT and position_BT were given with a cache"
            raise ValueError(f"{given}, which counts positions itself: leave them out")
        positions, context = self._context(tokens_BT, document_BT, position_BT, cache)
        if x_BTD is None:
            x_BTD = self._embed(tokens_BT, positions)
        for number, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, context, None if cache is None else cache.states[number])
        if cache is not None:
            cache.lengths += tokens_BT.shape[1]
        return self.norm(x_BTD)

    def _embed(self, tokens_BT: Tensor, positions: slice | Tensor) -> Tensor:
        x_BTD = self.embedding(self._here(tokens_BT))
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(_numbers(positions, tokens_BT.device))
        return F.dropout(x_BTD.to(self.compute_dtype), getattr(self.config, "dropout", 0.0), self.training)

    def _context(
        self, tokens_BT: Tensor, document_BT: Tensor | None, position_BT: Tensor | None, cache: Cache | None
    ) -> tuple[slice | Tensor, Context]:
        """The numbers of the positions, and what blocks may know of them."""
        length, device = tokens_BT.shape[1], tokens_BT.device
        begin: int | None = None
        slots_BT: Tensor | None = None
        positions: slice | Tensor = slice(0, length) if position_BT is None else position_BT
        if cache is not None:
            first, last = int(cache.lengths.min()), int(cache.lengths.max())
            if first == last:
                begin, positions = first, slice(first, first + length)
            else:
                positions = slots_BT = (cache.lengths[:, None] + torch.arange(length)).to(device)
            seen = last + length
        else:
            seen = length
            if self.spread is not None:
                places = self.spread.places(length, device)
                positions = places[None] if position_BT is None else position_BT[:, places]
        masks = {window: self._mask(window, positions, seen, document_BT, cache is not None, device) for window in self.windows}
        starts_BT = None
        if document_BT is not None:
            starts_BT = F.pad(document_BT[:, 1:] != document_BT[:, :-1], (1, 0), value=True)
        cos, sin = (None, None) if self.rope is None else self.rope(positions, self.compute_dtype)
        return positions, Context(cos, sin, masks, starts_BT, seen, begin, slots_BT, self.spread)

    def _mask(
        self, window: int, positions: slice | Tensor, seen: int, document_BT: Tensor | None, cached: bool, device: torch.device
    ) -> Tensor | None:
        """Who may see whom, (B or 1, 1, T, S); None where each sees all before it."""
        if not cached:  # positions may begin again with every document: places count
            places = None if self.spread is None else self.spread.places(seen, device)
            if document_BT is not None:
                return document_mask(document_BT, window, places)
            if places is None and not 0 < window < seen:
                return None
            everywhere = torch.arange(seen, device=device)
            return see(everywhere if places is None else places, everywhere, window)[None, None]
        if isinstance(positions, slice):
            single = positions.stop - positions.start == 1
            if (positions.start == 0 or single) and not 0 < window < seen:
                return None
            positions = torch.arange(positions.start, positions.stop, device=device)[None]
        return see(positions, torch.arange(seen, device=device), window)[:, None]

    def new_cache(self, rows: int, max_len: int) -> Cache:
        """An empty cache, in the compute dtype (recurrent states in fp32)."""
        device = self.embedding.weight.device
        layers: list[Any] = list(self.layers)
        states = [layer.new_state(rows, max_len, self.compute_dtype, device) for layer in layers]
        return Cache(states, torch.zeros(rows, dtype=torch.int64))

    def flops_per_token(self, context: int) -> float:
        """6 per weight of every matrix product, and 3 times what mixing positions takes forward (attention's two products over
        half of the context, a recurrence's update).

        The input embedding is a look-up and counts nothing; the head counts, tied or not (Kaplan et al. 2020, table 1).
        """
        return sum(self.layer_flops(context)) + self.head_flops

    def layer_flops(self, context: int) -> list[float]:
        """What every layer has of them."""
        layers = list[Any](self.layers)
        weights = [sum(p.numel() for p in layer.parameters() if p.ndim == 2) for layer in layers]
        return [6.0 * count + 3.0 * layer.mixing_flops(context) for count, layer in zip(weights, layers, strict=True)]

    @property
    def head_flops(self) -> float:
        return 6.0 * self.config.num_rows * self.config.dim * self.config.future_tokens

    def param_groups(self) -> dict[str, list[str]]:
        """Matrices and embeddings decay; gains and biases do not."""
        groups: dict[str, list[str]] = {"decay": [], "no_decay": []}
        for name, parameter in self.named_parameters():
            groups["decay" if parameter.ndim >= 2 else "no_decay"].append(name)
        return groups


def _numbers(positions: slice | Tensor, device: torch.device) -> Tensor:
    return torch.arange(positions.start, positions.stop, device=device)[None] if isinstance(positions, slice) else positions


def _later(batch: Batch, ahead: int) -> Tensor:
    """The targets of `ahead` positions further on, (B, T); none past the row, nor of another document."""
    if ahead == 0:
        return batch.targets_BT
    targets_BT = F.pad(batch.targets_BT[:, ahead:], (0, ahead), value=IGNORE)
    if batch.document_BT is not None:
        same = F.pad(batch.document_BT[:, ahead:] == batch.document_BT[:, :-ahead], (0, ahead), value=False)
        targets_BT = targets_BT.masked_fill(~same, IGNORE)
    return targets_BT
