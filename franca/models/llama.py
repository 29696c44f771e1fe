"""Llama and its kin (Touvron et al. 2023; Llama 3.1; Qwen 3 with `qk_norm`). Shape letters: see `models.base`."""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from franca.core.config import Count, Positive, config
from franca.models.base import Context
from franca.models.decoder import TRANSFORMER_TP_PLAN, TrunkConfig
from franca.models.layers import Linear, RMSNorm, Rope, RopeScaling, attention, remember, rotate


@config
class LlamaConfig(TrunkConfig):
    """RMSNorm, RoPE, grouped-query attention, SwiGLU. With `window` Mistral, with `qkv_bias` Qwen 2, with `qk_norm` Qwen 3."""

    kind: Literal["llama"] = "llama"
    num_heads: Count = 8
    num_kv_heads: Count | None = None  # None: as many as query heads
    head_dim: Count | None = None  # None: dim / num_heads
    window: Count | None = None  # positions that a query sees, itself among them (sliding window); None: all before it
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE
    mlp: Literal["swiglu", "relu2", "gelu"] = "swiglu"
    mlp_dim: Count | None = None  # None: 8/3 dim (4 dim without a gate), rounded up to a multiple of 256
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None

    hf_names: ClassVar[dict[str, str]] = {
        "embedding.weight": "model.embed_tokens.weight",
        "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
        "layers.{}.attention.query.weight": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.attention.key.weight": "model.layers.{}.self_attn.k_proj.weight",
        "layers.{}.attention.value.weight": "model.layers.{}.self_attn.v_proj.weight",
        "layers.{}.attention.query.bias": "model.layers.{}.self_attn.q_proj.bias",
        "layers.{}.attention.key.bias": "model.layers.{}.self_attn.k_proj.bias",
        "layers.{}.attention.value.bias": "model.layers.{}.self_attn.v_proj.bias",
        "layers.{}.attention.output.weight": "model.layers.{}.self_attn.o_proj.weight",
        "layers.{}.attention.query_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
        "layers.{}.attention.key_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
        "layers.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "layers.{}.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
        "layers.{}.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
        "layers.{}.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    @property
    def width_of_mlp(self) -> int:
        return self.mlp_dim or 256 * math.ceil((8 / 3 if self.mlp == "swiglu" else 4) * self.dim / 256)

    attends_only: ClassVar[bool] = True

    def block(self, number: int) -> nn.Module:
        return Block(self)

    def block_tp_plan(self) -> dict[str, str]:
        return TRANSFORMER_TP_PLAN

    def tp_widths(self) -> dict[str, int]:
        heads = {"model.num_heads": self.num_heads, "model.num_kv_heads": self.num_kv_heads or self.num_heads}
        return {**heads, "the MLP's width": self.width_of_mlp, "model.vocab_size (see vocab_multiple)": self.num_rows}

    def rope(self) -> Rope:
        return Rope(self.width_of_head, self.max_seq_len, self.rope_theta, self.rope_scaling)

    def problems(self) -> list[str]:
        found = []
        if self.head_dim is None and self.dim % self.num_heads:
            found.append(f"model: dim {self.dim} does not divide into {self.num_heads} heads; change one or give head_dim")
        elif self.width_of_head % 2:
            found.append(f"model: heads are {self.width_of_head} wide; RoPE turns pairs, so the width must be even")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            found.append(f"model.num_kv_heads: {self.num_kv_heads} does not divide {self.num_heads} query heads; use a divisor")
        return found


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), within a window if there is one (Beltagy et al. 2020)."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.head_dim, self.window = c.width_of_head, c.window or 0
        self.num_heads, self.num_kv_heads = c.num_heads, c.num_kv_heads or c.num_heads
        self.query = Linear(c.dim, self.num_heads * self.head_dim, c.init_std, c.qkv_bias)
        self.key = Linear(c.dim, self.num_kv_heads * self.head_dim, c.init_std, c.qkv_bias)
        self.value = Linear(c.dim, self.num_kv_heads * self.head_dim, c.init_std, c.qkv_bias)
        self.output = Linear(self.num_heads * self.head_dim, c.dim, c.residual_std)
        self.query_norm = RMSNorm(self.head_dim, c.norm_eps) if c.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, c.norm_eps) if c.qk_norm else None

    def forward(self, x_BTD: Tensor, context: Context, state: dict[str, Tensor] | None) -> Tensor:
        shape = (*x_BTD.shape[:2], -1, self.head_dim)
        q, k, v = self.query(x_BTD).view(shape), self.key(x_BTD).view(shape), self.value(x_BTD).view(shape)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        assert context.cos is not None
        assert context.sin is not None
        q, k = (rotate(x.transpose(1, 2), context.cos, context.sin) for x in (q, k))
        v = v.transpose(1, 2)
        if state is not None:
            k, v = remember(state, k, v, context)
        if context.spread is not None:
            k, v = context.spread.gather(k), context.spread.gather(v)
        mask = context.masks[self.window]
        out_BHTE = attention(q, k, v, mask, causal=mask is None and q.shape[2] > 1)
        return self.output(out_BHTE.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)) (Shazeer 2020), or down(act(up(x))) with relu(x)^2 (So et al. 2021) or gelu."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.kind = c.mlp
        self.gate = Linear(c.dim, c.width_of_mlp, c.init_std) if c.mlp == "swiglu" else None
        self.up = Linear(c.dim, c.width_of_mlp, c.init_std)
        self.down = Linear(c.width_of_mlp, c.dim, c.residual_std)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        up = self.up(x_BTD)
        return self.down(F.relu(up).square() if self.kind == "relu2" else F.gelu(up))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)
        self.window = self.attention.window

    def forward(self, x_BTD: Tensor, context: Context, state: dict[str, Tensor] | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context, state)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))

    def new_state(self, rows: int, max_len: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        shape = (rows, self.attention.num_kv_heads, max_len, self.attention.head_dim)
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("keys", "values")}

    def mixing_flops(self, context: int) -> float:
        """Scores and sums over what a position sees on average, up to half of the context: forward, for one token."""
        window = min(self.window or context, context)
        seen = window - window * (window - 1) / (2 * context)
        return 2 * 2 * self.attention.num_heads * self.attention.head_dim * seen
