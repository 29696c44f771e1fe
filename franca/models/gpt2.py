"""GPT-2 (Radford et al. 2019) as Megatron trains it (Shoeybi et al. 2019): tr1-13B. Shape letters: see `models.base`."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from franca.core.config import BelowOne, Count, config
from franca.models.base import Context
from franca.models.decoder import TRANSFORMER_TP_PLAN, TrunkConfig
from franca.models.layers import Embedding, LayerNorm, Linear, attention, remember


@config
class GPT2Config(TrunkConfig):
    """LayerNorm, learned positions, a bias in every product, GELU in its tanh approximation, dropout."""

    kind: Literal["gpt2"] = "gpt2"
    num_heads: Count = 8
    mlp_dim: Count | None = None  # None: 4 dim
    tied: bool = True
    dropout: BelowOne = 0.1  # in training: of the embedding, the attention's probabilities, and what each block adds

    # Theirs is the transpose where `.T` says so; several of ours under one name are joined, in this order.
    hf_names: ClassVar[dict[str, str]] = {
        "embedding.weight": "transformer.wte.weight",
        "positions.weight": "transformer.wpe.weight",
        "layers.{}.attention_norm.weight": "transformer.h.{}.ln_1.weight",
        "layers.{}.attention_norm.bias": "transformer.h.{}.ln_1.bias",
        "layers.{}.attention.query.weight": "transformer.h.{}.attn.c_attn.weight.T",
        "layers.{}.attention.key.weight": "transformer.h.{}.attn.c_attn.weight.T",
        "layers.{}.attention.value.weight": "transformer.h.{}.attn.c_attn.weight.T",
        "layers.{}.attention.query.bias": "transformer.h.{}.attn.c_attn.bias",
        "layers.{}.attention.key.bias": "transformer.h.{}.attn.c_attn.bias",
        "layers.{}.attention.value.bias": "transformer.h.{}.attn.c_attn.bias",
        "layers.{}.attention.output.weight": "transformer.h.{}.attn.c_proj.weight.T",
        "layers.{}.attention.output.bias": "transformer.h.{}.attn.c_proj.bias",
        "layers.{}.mlp_norm.weight": "transformer.h.{}.ln_2.weight",
        "layers.{}.mlp_norm.bias": "transformer.h.{}.ln_2.bias",
        "layers.{}.mlp.up.weight": "transformer.h.{}.mlp.c_fc.weight.T",
        "layers.{}.mlp.up.bias": "transformer.h.{}.mlp.c_fc.bias",
        "layers.{}.mlp.down.weight": "transformer.h.{}.mlp.c_proj.weight.T",
        "layers.{}.mlp.down.bias": "transformer.h.{}.mlp.c_proj.bias",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "head.weight": "lm_head.weight",
    }

    attends_only: ClassVar[bool] = True

    def block(self, number: int) -> nn.Module:
        return Block(self)

    def block_tp_plan(self) -> dict[str, str]:
        return TRANSFORMER_TP_PLAN

    def tp_widths(self) -> dict[str, int]:
        rows = {"model.vocab_size (see vocab_multiple)": self.num_rows, "model.max_seq_len": self.max_seq_len}
        return {"model.num_heads": self.num_heads, "the MLP's width": self.mlp_dim or 4 * self.dim, **rows}

    def norm(self) -> nn.Module:
        return LayerNorm(self.dim, self.norm_eps)

    def learned_positions(self) -> Embedding:
        return Embedding(self.max_seq_len, self.dim, self.init_std)

    def problems(self) -> list[str]:
        if self.dim % self.num_heads:
            return [f"model: dim {self.dim} does not divide into {self.num_heads} heads; change one of them"]
        return []


class Attention(nn.Module):
    """Multi-head attention over all positions before (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.head_dim, self.dropout = c.dim // c.num_heads, c.dropout
        self.query = Linear(c.dim, c.dim, c.init_std, bias=True)
        self.key = Linear(c.dim, c.dim, c.init_std, bias=True)
        self.value = Linear(c.dim, c.dim, c.init_std, bias=True)
        self.output = Linear(c.dim, c.dim, c.residual_std, bias=True)

    def forward(self, x_BTD: Tensor, context: Context, state: dict[str, Tensor] | None) -> Tensor:
        projections = (self.query, self.key, self.value)
        q, k, v = (project(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections)
        if state is not None:
            k, v = remember(state, k, v, context)
        if context.spread is not None:
            k, v = context.spread.gather(k), context.spread.gather(v)
        mask = context.masks[0]
        dropout = self.dropout if self.training else 0.0
        out_BHTE = attention(q, k, v, mask, mask is None and q.shape[2] > 1, dropout)
        return self.output(out_BHTE.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(gelu(up(x))), with the GELU that GPT-2 was trained with (Hendrycks and Gimpel 2016, section 2)."""

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.up = Linear(c.dim, c.mlp_dim or 4 * c.dim, c.init_std, bias=True)
        self.down = Linear(c.mlp_dim or 4 * c.dim, c.dim, c.residual_std, bias=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    window = 0

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.dim, self.num_heads, self.dropout = c.dim, c.num_heads, c.dropout
        self.attention_norm = LayerNorm(c.dim, c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = LayerNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x_BTD: Tensor, context: Context, state: dict[str, Tensor] | None) -> Tensor:
        added = self.attention(self.attention_norm(x_BTD), context, state)
        x_BTD = x_BTD + F.dropout(added, self.dropout, self.training)
        return x_BTD + F.dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, self.training)

    def new_state(self, rows: int, max_len: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        shape = (rows, self.num_heads, max_len, self.dim // self.num_heads)
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("keys", "values")}

    def mixing_flops(self, context: int) -> float:
        """Scores and sums over half of the context: forward, for one token."""
        return 2 * 2 * self.dim * (context + 1) / 2
