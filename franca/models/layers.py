"""The parts that models are made of. Shape letters: see `models.base`.

Every module that owns parameters says how they start (`reset`). Parameters keep their own dtype (fp32 in training); each
product is computed in the dtype of its input, so one model serves fp32, bf16, and sharded parameters alike.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from franca.core.config import config
from franca.models.base import IGNORE


class Linear(nn.Module):
    """y = x W^T (+ b). Weight (out, in), drawn from N(0, init_std^2)."""

    def __init__(self, in_features: int, out_features: int, init_std: float, bias: bool = False) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def reset(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Module):
    """Rows of a table (V, D), drawn from N(0, init_std^2)."""

    def __init__(self, vocab_size: int, dim: int, init_std: float) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain, over the last dimension (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


@config
class RopeScaling:
    """Llama 3.1's rule for longer contexts: slow frequencies are divided by `factor`, the ones between are blended."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


class Rope(nn.Module):
    """Rotary positions (Su et al. 2021), pairs (i, i + E/2). Holds the table of cosines and sines, (max_seq_len, E/2) each."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta, self.scaling = head_dim, max_seq_len, theta, scaling
        self.register_buffer("cos", torch.empty(max_seq_len, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, head_dim // 2), persistent=False)

    def reset(self, generator: torch.Generator | None = None) -> None:
        frequencies = 1.0 / self.theta ** (torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim)
        if self.scaling is not None:
            frequencies = _scale_frequencies(frequencies, self.scaling)
        angles = torch.outer(torch.arange(self.max_seq_len).float(), frequencies)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, length: int, position_BT: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions 0..length-1 or for `position_BT`: (T or B, T, 1, E/2)."""
        table = (
            [self.cos[:length], self.sin[:length]] if position_BT is None else [self.cos[position_BT], self.sin[position_BT]]
        )
        cos, sin = (part.unsqueeze(-2).to(dtype) for part in table)
        return cos, sin


def _scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelength = 2 * math.pi / frequencies
    low = scaling.original_max_seq_len / scaling.low_freq_factor
    high = scaling.original_max_seq_len / scaling.high_freq_factor
    blend = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow = torch.where(wavelength > low, frequencies / scaling.factor, frequencies)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, slow)


def rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of every head by its position's angle."""
    first, second = x_BTHE.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax attention with H / K query heads per key head: (B, T, H, E). `mask`: bool (B, 1, T, S), True = may see."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def document_mask(document_BT: Tensor) -> Tensor:
    """True where a position may see another: not later, and in the same document. (B, 1, T, T) bool."""
    length = document_BT.shape[1]
    same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=document_BT.device).tril()


class KVCache:
    """Keys and values of the positions seen so far, for every attention layer. `length` is the same for all rows.

    Rows of different lengths are padded at the left; `pads_B` says by how much.
    """

    def __init__(self, layers: int, batch: int, max_len: int, kv_heads: int, head_dim: int, like: Tensor, dtype: torch.dtype):
        shape = (layers, batch, max_len, kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=like.device)
        self.values = torch.zeros(shape, dtype=dtype, device=like.device)
        self.length, self.max_len = 0, max_len
        self.pads_B: Tensor | None = None

    def place(self, count: int) -> tuple[Tensor, Tensor | None]:
        """For the next `count` positions: their numbers (B or 1, T), and what each may see (B or 1, 1, T, S), None: all before.

        A pad may see itself, so that its softmax has a term; nobody else sees it.
        """
        slots_T = torch.arange(self.length, self.length + count, device=self.keys.device)
        seen_S = torch.arange(self.length + count, device=self.keys.device)
        causal_TS = seen_S <= slots_T[:, None]
        if self.pads_B is None:
            return slots_T[None], None if self.length == 0 or count == 1 else causal_TS[None, None]
        real_BS = seen_S >= self.pads_B[:, None]
        mask_BTS = causal_TS & (real_BS[:, None] | (seen_S == slots_T[:, None]))
        return (slots_T - self.pads_B[:, None]).clamp(min=0), mask_BTS[:, None]

    def extend(self, layer: int, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of a layer; returns all keys and values so far, (B, S, K, E). `advance` follows."""
        end = self.length + k_BTKE.shape[1]
        self.keys[layer, :, self.length : end] = k_BTKE
        self.values[layer, :, self.length : end] = v_BTKE
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, count: int) -> None:
        self.length += count


def cross_entropy_sum(x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, chunk_tokens: int = 4096) -> Tensor:
    """Sum of -log softmax(x W^T)[target] over valid targets, fp32, in chunks of tokens so that logits stay small."""
    x, targets = x_BTD.flatten(0, 1), targets_BT.flatten()
    weight = head_VD.to(x.dtype)
    total = x.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(x.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = F.linear(part, weight).float()
        total = total + F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum")
    return total
