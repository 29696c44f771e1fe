"""Llama and its kin (Touvron et al. 2023; Llama 3.1; Qwen 3 with `qk_norm`). Shape letters: see `models.base`."""

import math
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from franca.core.config import Count, Positive, config
from franca.models.base import ModelConfig
from franca.models.decoder import Decoder
from franca.models.layers import KVCache, Linear, RMSNorm, RopeScaling, attention, rotate


@config
class LlamaConfig(ModelConfig):
    """RMSNorm, RoPE, grouped-query attention, SwiGLU. Widths in numbers of features."""

    kind: Literal["llama"] = "llama"
    vocab_size: Count | None = None  # None: the tokenizer's
    dim: Count = 512
    num_layers: Count = 8
    num_heads: Count = 8
    num_kv_heads: Count | None = None  # None: as many as query heads
    head_dim: Count | None = None  # None: dim / num_heads
    mlp_dim: Count | None = None  # None: 8/3 dim, rounded up to a multiple of 256
    max_seq_len: Count = 2048
    norm_eps: Positive = 1e-5
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False  # the head is the embedding
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE, as in Qwen 3
    init_std: Positive = 0.02  # projections into the residual stream: divided by sqrt(2 num_layers)

    hf_names: ClassVar[dict[str, str]] = {
        "embedding.weight": "model.embed_tokens.weight",
        "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
        "layers.{}.attention.query.weight": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.attention.key.weight": "model.layers.{}.self_attn.k_proj.weight",
        "layers.{}.attention.value.weight": "model.layers.{}.self_attn.v_proj.weight",
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
        return self.mlp_dim or 256 * math.ceil(8 * self.dim / 3 / 256)

    def build(self) -> Decoder:
        return Decoder(self, Block)

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
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, c: LlamaConfig, number: int) -> None:
        super().__init__()
        self.number, self.head_dim = number, c.width_of_head
        heads, kv_heads = c.num_heads, c.num_kv_heads or c.num_heads
        self.query = Linear(c.dim, heads * self.head_dim, c.init_std)
        self.key = Linear(c.dim, kv_heads * self.head_dim, c.init_std)
        self.value = Linear(c.dim, kv_heads * self.head_dim, c.init_std)
        self.output = Linear(heads * self.head_dim, c.dim, c.init_std / math.sqrt(2 * c.num_layers))
        self.query_norm = RMSNorm(self.head_dim, c.norm_eps) if c.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, c.norm_eps) if c.qk_norm else None

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        shape = (*x_BTD.shape[:2], -1, self.head_dim)
        q, k, v = self.query(x_BTD).view(shape), self.key(x_BTD).view(shape), self.value(x_BTD).view(shape)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.number, k, v)
        out_BHTE = attention(q, k, v, mask, causal=mask is None and q.shape[2] > 1)
        return self.output(out_BHTE.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.gate = Linear(c.dim, c.width_of_mlp, c.init_std)
        self.up = Linear(c.dim, c.width_of_mlp, c.init_std)
        self.down = Linear(c.width_of_mlp, c.dim, c.init_std / math.sqrt(2 * c.num_layers))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, c: LlamaConfig, number: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c, number)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos, sin, mask, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))
