"""The trunk every family shares: embedding -> blocks -> norm -> head. A family gives the block.

Shape letters: see `models.base`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from franca.models.base import Batch
from franca.models.layers import Embedding, KVCache, Linear, RMSNorm, Rope, cross_entropy_sum, document_mask, multiply


class Decoder(nn.Module):
    """A causal language model. `config` is the family's; `block(config, number)` makes its layers."""

    def __init__(self, config: Any, block: Callable[[Any, int], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.embedding = Embedding(config.vocab_size, config.dim, config.init_std)
        self.rope = Rope(config.width_of_head, config.max_seq_len, config.rope_theta, config.rope_scaling)
        self.layers = nn.ModuleList(block(config, number) for number in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else Linear(config.dim, config.vocab_size, config.init_std)

    def forward(
        self, tokens_BT: Tensor, document_BT: Tensor | None = None, position_BT: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """Logits (B, T, V) in the compute dtype. With a cache, `tokens_BT` follow what it holds, and it counts positions."""
        return multiply(self._trunk(tokens_BT, document_BT, position_BT, cache), self._head_weight())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`nll`: the sum of the negative log-likelihoods of the valid targets, in nats."""
        x_BTD = self._trunk(batch.tokens_BT, batch.document_BT, batch.position_BT, None)
        return {"nll": cross_entropy_sum(x_BTD, self._head_weight(), batch.targets_BT)}

    def next_logits(self, tokens_BT: Tensor, cache: KVCache) -> Tensor:
        """Logits of the position after `tokens_BT` alone: (B, V). The cache is extended by `tokens_BT`."""
        return multiply(self._trunk(tokens_BT, None, None, cache)[:, -1], self._head_weight())

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _trunk(
        self, tokens_BT: Tensor, document_BT: Tensor | None, position_BT: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x_BTD = self.embedding(tokens_BT).to(self.compute_dtype)
        positions = slice(0, tokens_BT.shape[1]) if position_BT is None else position_BT
        mask = document_mask(document_BT) if document_BT is not None else None
        if cache is not None:
            if document_BT is not None or position_BT is not None:
                given = "document_BT and position_BT were given with a cache"
                raise ValueError(f"{given}, which counts positions itself: leave them out")
            positions, mask = cache.place(tokens_BT.shape[1])
        cos, sin = self.rope(positions, self.compute_dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos, sin, mask, cache)
        return self.norm(x_BTD)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        c = self.config
        shape = (c.num_layers, batch, c.num_kv_heads or c.num_heads, max_len, c.width_of_head)
        return KVCache(shape, self.compute_dtype, self.embedding.weight.device)

    def flops_per_token(self, context: int) -> float:
        """6 per weight of every matrix product, and attention's two products over half of the context (causal), times 3.

        The input embedding is a look-up and counts nothing; the head counts, tied or not (Kaplan et al. 2020, table 1).
        """
        c = self.config
        weights = sum(p.numel() for p in self.layers.parameters() if p.ndim == 2) + c.vocab_size * c.dim
        attention = 2 * 2 * c.num_heads * c.width_of_head * (context + 1) / 2
        return 6.0 * weights + 3.0 * attention * c.num_layers

    def param_groups(self) -> dict[str, list[str]]:
        """Matrices and embeddings decay; gains and biases do not."""
        groups: dict[str, list[str]] = {"decay": [], "no_decay": []}
        for name, parameter in self.named_parameters():
            groups["decay" if parameter.ndim >= 2 else "no_decay"].append(name)
        return groups
