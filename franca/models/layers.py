"""The parts that models are made of. Shape letters: see `models.base`.

Every module that owns parameters says how they start (`reset`). Parameters keep their own dtype (fp32 in training); each
product is computed in the dtype of its input, so one model serves fp32, bf16, and sharded parameters alike.
"""

import math
import platform
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from franca.core.config import Count, Positive, config
from franca.models.base import IGNORE, Context

CHUNK_ROWS, CHUNK_BYTES = 1024, 2**27  # of logits in fp32, that the loss holds at a time at most
_FEW_ROWS = 64  # up to so many, `multiply` takes its own way on a CPU


class Linear(nn.Linear):
    """y = x W^T + b. Weight (out, in), drawn from N(0, init_std^2); the bias, if there is one, begins at zero."""

    def __init__(self, in_features: int, out_features: int, init_std: float, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.init_std = init_std

    def reset_parameters(self) -> None:
        """PyTorch's own start, not wanted: see `reset`."""

    def reset(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = multiply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x run: its own, but on a CPU fp32 for fp16, and for bf16 without its instructions (x86).

    There, products of numbers rounded to bf16 run in fp32 about 20 times faster than in bf16, and more exactly.
    """
    if x.device.type == "cpu" and (x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not _cpu_has_bf16())):
        return torch.float32
    return x.dtype


@cache
def _cpu_has_bf16() -> bool:
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return platform.machine() not in ("x86_64", "AMD64") or has is None or bool(has())


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the dtype of x, (..., in) x (out, in) -> (..., out)."""
    if x.dtype == weight.dtype == torch.float32:  # in decoding, even casts that do nothing add up
        return _product(x, weight)
    fast = product_dtype(x)
    return _product(x.to(fast), weight.to(x.dtype).to(fast)).to(x.dtype)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; for the few rows of decoding on a CPU as W x, which runs on all threads where F.linear would take one."""
    width = x.shape[-1]
    if torch.is_grad_enabled() or not x.is_cpu or x.numel() > _FEW_ROWS * width:
        return F.linear(x, weight)
    x_WN = x.reshape(-1, width).t()
    if x_WN.shape[1] > 1:
        return torch.mm(weight, x_WN).t().contiguous().view(*x.shape[:-1], -1)
    parts = math.gcd(len(weight), torch.get_num_threads())  # of a product with one vector, each thread takes a part
    return torch.bmm(weight.view(parts, -1, width), x_WN.expand(parts, -1, -1)).reshape(*x.shape[:-1], -1)


class Embedding(nn.Embedding):
    """Rows of a table (V, D), drawn from N(0, init_std^2)."""

    def __init__(self, vocab_size: int, dim: int, init_std: float) -> None:
        super().__init__(vocab_size, dim)
        self.init_std = init_std

    def reset_parameters(self) -> None:
        """PyTorch's own start, not wanted: see `reset`."""

    def reset(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain, over the last dimension (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled():  # in decoding, half of PyTorch's time
            return x * x.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_() * self.weight
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * gain + bias, over the last dimension (Ba et al. 2016, eq. 4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


@config
class RopeScaling:
    """Llama 3.1's rule for longer contexts: slow frequencies are divided by `factor`, the ones between are blended.

    Hugging Face's names, which everybody's configs use.
    """

    factor: Positive = 8.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Count = 8192


class Rope(nn.Module):
    """Rotary positions (Su et al. 2021), pairs (i, i + E/2). Holds the tables that `rotate` takes, (max_seq_len, E) each."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta, self.scaling = head_dim, max_seq_len, theta, scaling
        self.register_buffer("cos", torch.empty(max_seq_len, head_dim), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, head_dim), persistent=False)

    def reset(self, generator: torch.Generator | None = None) -> None:
        frequencies = 1.0 / self.theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        if self.scaling is not None:
            frequencies = _scale_frequencies(frequencies, self.scaling)
        angles = torch.outer(torch.arange(self.max_seq_len).float(), frequencies)
        self.cos.copy_(torch.cat([angles.cos(), angles.cos()], dim=-1))
        self.sin.copy_(torch.cat([-angles.sin(), angles.sin()], dim=-1))

    def forward(self, positions: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both tables for a range of positions, (T, E), or for a tensor (B, T) of them, (B, 1, T, E)."""
        cos, sin = self.cos[positions].to(dtype), self.sin[positions].to(dtype)
        return (cos, sin) if isinstance(positions, slice) else (cos.unsqueeze(1), sin.unsqueeze(1))


def _scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)  # 0: divided by the factor, 1: as it was
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotate(x_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of every head by its position's angle."""
    return x_BHTE * cos + x_BHTE.roll(x_BHTE.shape[-1] // 2, dims=-1) * sin


def attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, causal: bool, dropout: float = 0.0
) -> Tensor:
    """Softmax attention with H / K query heads per key head: (B, H, T, E).

    `mask`: bool, (B or 1, 1, T, S), True where a position may see another; None: with `causal` all before it, else all.
    `dropout`: the share of the probabilities that is set to zero; the rest grows to make up for it.
    """
    fast = product_dtype(q_BHTE)
    q, k, v = q_BHTE.to(fast), k_BKSE.to(fast), v_BKSE.to(fast)
    causal = causal or (mask is not None and q.shape[2] == k.shape[2])
    by_blocks = not torch.compiler.is_compiling()  # traced, its loop would be unrolled: slow to compile, no faster
    by_blocks = by_blocks and causal and q.is_cpu and q.requires_grad and not dropout
    if by_blocks and q.shape[2] <= _BlockedAttention.longest:
        out = _blocked_attention(q, k, v, mask)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=causal and mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.to(q_BHTE.dtype)


def _blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return cast(Tensor, _BlockedAttention.apply(*(x.contiguous() for x in (q, k, v)), mask))


class _BlockedAttention(torch.autograd.Function):
    """Causal attention for training on a CPU: by blocks of queries, each with the keys that it may see and no others.

    Keeps the probabilities for the backward pass: a third faster than PyTorch's flash kernel for CPUs up to `longest`
    positions, with which its memory grows quadratically.
    """

    block, longest = 64, 1024

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        length, block, scale = q.shape[2], _BlockedAttention.block, q.shape[3] ** -0.5
        future = torch.ones(block, block, dtype=torch.bool).triu(1)
        out, kept = torch.empty_like(q), []
        for i in range(0, length, block):
            j = min(i + block, length)
            scores = (q[:, :, i:j] * scale) @ k[:, :, :j].transpose(2, 3)
            scores[..., i:].masked_fill_(future[: j - i, : j - i], -torch.inf)
            if mask is not None:
                scores.masked_fill_(~mask[:, :, i:j, :j], -torch.inf)
            probabilities = scores.softmax(dim=-1)
            out[:, :, i:j] = probabilities @ v[:, :, :j]
            kept.append(probabilities)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, out, *kept = ctx.saved_tensors
        scale = q.shape[3] ** -0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for probabilities, i in zip(kept, range(0, q.shape[2], _BlockedAttention.block), strict=True):
            j = i + probabilities.shape[2]
            grad = grad_out[:, :, i:j]
            grad_v[:, :, :j] += probabilities.transpose(2, 3) @ grad
            grad_p = grad @ v[:, :, :j].transpose(2, 3)
            inner = (grad * out[:, :, i:j]).sum(dim=-1, keepdim=True)  # sum of grad_p times p, at the price of one row
            grad_scores = grad_p.sub_(inner).mul_(probabilities).mul_(scale)
            grad_q[:, :, i:j] = grad_scores @ k[:, :, :j]
            grad_k[:, :, :j] += grad_scores.transpose(2, 3) @ q[:, :, i:j]
        return grad_q, grad_k, grad_v, None


def see(q_T: Tensor, k_S: Tensor, window: int) -> Tensor:
    """Who may see whom by position, (..., T) x (S,) -> (..., T, S): not what is later, nor what is `window` or more before."""
    distance = q_T[..., :, None] - k_S
    return (distance >= 0) & (distance < window) if window else distance >= 0


def document_mask(document_BS: Tensor, window: int = 0, places_T: Tensor | None = None) -> Tensor:
    """True where a position may see another: not later, not beyond the window, and in the same document. (B, 1, T, S) bool.

    `places_T`: the positions that look; None: all.
    """
    everywhere = torch.arange(document_BS.shape[1], device=document_BS.device)
    places_T = everywhere if places_T is None else places_T
    return (document_BS[:, None, places_T, None] == document_BS[:, None, None, :]) & see(places_T, everywhere, window)


def remember(state: dict[str, Tensor], k_BKTE: Tensor, v_BKTE: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Store the keys and values of new positions; returns those of all positions so far, (B, K, S, E)."""
    count, stored = k_BKTE.shape[2], []
    for cache_BKSE, new_BKTE in ((state["keys"], k_BKTE), (state["values"], v_BKTE)):
        if context.begin is not None:
            cache_BKSE.narrow(2, context.begin, count).copy_(new_BKTE)
            stored.append(cache_BKSE.narrow(2, 0, context.begin + count))
        else:
            slots_BT = context.slots_BT
            assert slots_BT is not None
            rows = torch.arange(len(slots_BT), device=slots_BT.device)[:, None]
            cache_BKSE.transpose(1, 2)[rows, slots_BT] = new_BKTE.transpose(1, 2)
            stored.append(cache_BKSE.narrow(2, 0, context.seen))
    return stored[0], stored[1]


class VocabShard(NamedTuple):
    """Which rows of the head are here, and how the places that hold the others are asked; the model knows no more of them."""

    first: int  # the number of the first row, in the whole vocabulary
    largest: Callable[[Tensor], Tensor]  # elementwise over all shards; not differentiated
    total: Callable[[Tensor], Tensor]


@_disable_dynamo  # traced, its loop would be unrolled
def cross_entropy_sum(
    x_BTD: Tensor,
    head_VD: Tensor,
    targets_BT: Tensor,
    chunk: int | None = None,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over the valid targets, scalars in fp32: -log softmax(x W^T)[target], and z_loss * log(Z)^2 with the softmax's
    denominator Z (Chowdhery et al. 2022, section 5). Holds at most `chunk` rows of logits; None: of moderate size.

    Rows of the head from `vocab_size` on are padding, and have no probability. With a z-loss both sums have to get the same
    factor on the way back, as they do in a total; otherwise the gradients are NaN. They can be taken once.
    With a `shard`, `head_VD` is its rows alone: the sums are the whole ones, the gradient of x is the shard's part of it.
    """
    assert shard is None or vocab_size is not None  # the shards may differ in size, their chunks must not
    vocab_size = vocab_size or len(head_VD)
    chunk = chunk or max(1, min(CHUNK_ROWS, CHUNK_BYTES // (4 * vocab_size)))
    given = (x_BTD.flatten(0, 1), head_VD, targets_BT.flatten()[:, None])
    return cast(
        tuple[Tensor, Tensor], _CrossEntropySum.apply(*given, chunk, vocab_size, z_loss, shard, torch.is_grad_enabled())
    )


class HeadLoss(nn.Module):
    """`cross_entropy_sum` as a module, so that its inputs can be prepared where each device has some rows of the head."""

    def __init__(self, vocab_size: int | None, z_loss: float) -> None:
        super().__init__()
        self.vocab_size, self.z_loss = vocab_size, z_loss
        self.shard: VocabShard | None = None

    def forward(self, x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy_sum(x_BTD, head_VD, targets_BT, None, self.vocab_size, self.z_loss, self.shard)


class _CrossEntropySum(torch.autograd.Function):
    """The head's product and its cross-entropy in one: the gradient of a chunk of logits, softmax minus one-hot, is taken while
    the chunk is there, so that nothing of size (tokens, V) is stored or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        head_VD: Tensor,
        targets_N1: Tensor,
        chunk: int,
        vocab_size: int,
        z_loss: float,
        shard: VocabShard | None,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        shard = shard or VocabShard(0, lambda value: value, lambda value: value)
        fast = product_dtype(x_ND)
        weight = head_VD.to(x_ND.dtype).to(fast)
        nll, z_term = (x_ND.new_zeros((), dtype=torch.float32) for _ in range(2))
        if with_gradient:
            grad_x, grad_head = torch.empty_like(x_ND), torch.zeros_like(head_VD, dtype=torch.float32)
        for begin in range(0, len(x_ND), chunk):
            part = slice(begin, begin + chunk)
            x, target = x_ND[part].to(fast), targets_N1[part]
            valid, index = target != IGNORE, (target - shard.first).clamp_(0, len(weight) - 1)
            here = valid & (index + shard.first == target)
            logits = F.linear(x, weight).float()
            if vocab_size < shard.first + len(weight):
                logits[:, max(vocab_size - shard.first, 0) :] = -torch.inf
            top = shard.largest(logits.amax(dim=1, keepdim=True))
            wanted = logits.gather(1, index).masked_fill_(~here, 0.0)
            exp = logits.sub_(top).exp_()  # in place: the logits are this function's own
            denominator, wanted = shard.total(torch.cat([exp.sum(dim=1, keepdim=True), wanted], dim=1)).split(1, dim=1)
            log_z = denominator.log() + top
            nll += ((log_z - wanted) * valid).sum()
            z_term += (log_z.square() * valid).sum() * z_loss
            if with_gradient:
                grad = exp.mul_(valid * (1.0 + 2.0 * z_loss * log_z) / denominator)
                grad = grad.scatter_add_(1, index, -here.float()).to(fast)
                grad_x[part] = grad @ weight
                if fast == torch.float32:
                    torch.addmm(grad_head, grad.t(), x, out=grad_head)  # (what counts operations knows no addmm_)
                else:
                    grad_head += grad.t() @ x
                del grad
            del logits, exp  # or the next chunk would find this one still there
        if with_gradient:
            ctx.save_for_backward(grad_x, grad_head.to(head_VD.dtype))
            ctx.z_loss = z_loss
        return nll, z_term

    @staticmethod
    def backward(ctx: Any, factor: Tensor, z_factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x, grad_head = ctx.saved_tensors
        if ctx.z_loss:
            factor = torch.where(factor == z_factor, factor, torch.nan)
        return grad_x.mul_(factor), grad_head.mul_(factor), *[None] * 6  # in place: a head's gradient may be a gigabyte
