"""The recurrences of models with a state: a linear scan, a short causal convolution, and Mamba-2's state-space duality.

Numbers in, numbers out, for any device: knows no model. Letters beside those of `models.base`: W width of
the convolution, L positions of a chunk, C chunks of a row; and in `ssd` H heads, P width of a head, N state, G groups of heads
that share B and C, R = H / G heads of a group. A start is a position where a document begins; nothing passes over it.
"""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from franca.models.layers import product_dtype

Pair = tuple[Tensor, Tensor]
_WIDE = 2**14  # numbers of one step that keep a CPU core busy for longer than it takes to begin the step
_KERNEL_DEVICES = ("cuda",) if importlib.util.find_spec("mamba_ssm") else ()


def linear_scan(a_BTD: Tensor, b_BTD: Tensor, h_BD: Tensor | None = None) -> Tensor:
    """All h_t = a_t h_{t-1} + b_t, from the state h (zeros if None): (B, T, D), in the dtype of b; the last is the new state.

    Computed in fp32 at least: give b in fp32 where the state must stay so. A document begins where the caller sets a = 0.
    Work in O(T), about 3 sqrt(T) steps one after the other; no division or logarithm, so any a is good, 0 and above 1 too.
    The backward pass is the same scan in reverse; it keeps a and h alone and has no gradient itself.
    """
    assert a_BTD.shape == b_BTD.shape, (a_BTD.shape, b_BTD.shape)
    h_BD = b_BTD.new_zeros(b_BTD[:, 0].shape) if h_BD is None else h_BD
    if b_BTD.shape[1] == 1 and not torch.is_grad_enabled():
        return torch.addcmul(b_BTD, a_BTD, h_BD.unsqueeze(1)).to(b_BTD.dtype)
    return _scan(a_BTD, b_BTD, h_BD)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# One operator, opaque to torch.compile: traced, its steps would be unrolled. `a` may have size 1 in dimensions after T.
@torch.library.custom_op("franca::linear_scan", mutates_args=())
def _scan(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return _run(a, b, h, reverse=False)[0].to(b.dtype)


@_scan.register_fake
def _(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return b.new_empty(b.shape)


@torch.library.custom_op("franca::linear_scan_backward", mutates_args=())
def _scan_backward(a: Tensor, h: Tensor, all_h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_b, grad_h = _run(a, grad, torch.zeros_like(h), reverse=True)
    grad_a = torch.empty_like(grad_b)
    torch.mul(grad_b[:, 1:], all_h[:, :-1], out=grad_a[:, 1:])
    torch.mul(grad_b[:, 0], h, out=grad_a[:, 0])
    return grad_a.sum_to_size(a.shape).to(a.dtype), grad_b.to(grad.dtype), grad_h.to(h.dtype)


@_scan_backward.register_fake
def _(a: Tensor, h: Tensor, all_h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), grad.new_empty(grad.shape), h.new_empty(h.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[2], output)


_scan.register_autograd(lambda ctx, grad: _scan_backward(*ctx.saved_tensors, grad), setup_context=_keep)


def _run(a: Tensor, b: Tensor, state: Tensor, reverse: bool) -> Pair:
    """All h_t = b_t + a_t h_{t-1}, or in reverse all h_t = b_t + a_{t+1} h_{t+1}, whose state is a_t h_t; and the last state.

    Three passes: what each chunk makes of a zero state, all chunks side by side; the state that each chunk starts from; each
    chunk from there. The positions after the last whole chunk go one by one, as do all where chunks save no time.
    """
    length = math.isqrt(b.shape[1] // 2)  # the steps are 2 * length + T / length
    wide = b.is_cpu and b[:, 0].numel() > _WIDE
    cut = 0 if wide or length < 3 else b.shape[1] // length * length
    order = slice(None, None, -1 if reverse else 1)
    out = torch.empty(b.shape, dtype=_state_dtype(b), device=b.device)
    rest = [x[:, cut:].unbind(1)[order] for x in (a, b, out)]
    state = state.to(out.dtype)
    if reverse:
        state = _steps(rest, state, reverse)
    if cut:
        chunks = [x[:, :cut].unflatten(1, (-1, length)) for x in (a, b, out)]
        parts = [x.unbind(2)[order] for x in chunks]
        ends = _steps(parts[:2], torch.zeros_like(chunks[2][:, :, 0]), reverse)
        decays = chunks[0].prod(2, dtype=out.dtype)
        starts = [state]
        for end, decay in zip(ends.unbind(1)[order], decays.unbind(1)[order], strict=True):
            starts.append(torch.addcmul(end, decay, starts[-1]))
        state = starts.pop()
        _steps(parts, torch.stack(starts[order], 1), reverse)
    return out, state if reverse else _steps(rest, state, reverse)


def _steps(parts: list[tuple[Tensor, ...]], state: Tensor, reverse: bool) -> Tensor:
    """Step by step through a and b, into the third part if there is one; returns the last state."""
    for a, b, *out in zip(*parts, strict=True):
        place = out[0] if out else None
        state = a * torch.add(b, state, out=place) if reverse else torch.addcmul(b, a, state, out=place)
    return state


def causal_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    starts_BT: Tensor | None = None,
    state_BWD: Tensor | None = None,
) -> Pair:
    """Each channel's weighted sum of its last W inputs, `weight[:, -1]` for the newest: y (B, T, D) and the new state.

    Inputs of another document count as zero. `state`: the W-1 inputs before x, (B, W-1, D), zeros if None; the new one has
    those that the next position may see, if no document begins there. y is in the dtype of x, the sums in that of the weight.
    """
    length, width = x_BTD.shape[1], weight_DW.shape[1]
    state = x_BTD.new_zeros(len(x_BTD), width - 1, x_BTD.shape[2]) if state_BWD is None else state_BWD.to(x_BTD.dtype)
    padded = torch.cat([state, x_BTD], dim=1)
    parts = [padded[:, i : i + length] for i in range(width)]
    state = padded[:, length:].clone()
    if starts_BT is not None:
        document_BS = F.pad(starts_BT.cumsum(1), (width - 1, 0))  # what the state holds goes before the first start
        for i in range(width - 1):
            other_BT = document_BS[:, i : i + length] != document_BS[:, width - 1 :]
            parts[i] = parts[i].masked_fill(other_BT.unsqueeze(2), 0)
        state.masked_fill_((document_BS[:, length:] != document_BS[:, -1:]).unsqueeze(2), 0)
    y = parts[-1] * weight_DW[:, -1]
    for part, weight_D in zip(parts[:-1], weight_DW.unbind(1), strict=False):
        y = torch.addcmul(y, part, weight_D)
    return (y if bias_D is None else y + bias_D).to(x_BTD.dtype), state


class CausalConv(nn.Module):
    """`causal_conv` with its weight (D, W), which begins like that of PyTorch's Conv1d, and a bias if there is one."""

    def __init__(self, dim: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, width))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None

    def reset(self, generator: torch.Generator) -> None:
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, x_BTD: Tensor, starts_BT: Tensor | None, state: dict[str, Tensor] | None) -> Tensor:
        """With the state of a cache, which has the inputs before x as `conv`: it is moved on."""
        y_BTD, last = causal_conv(x_BTD, self.weight, self.bias, starts_BT, None if state is None else state["conv"])
        if state is not None:
            state["conv"].copy_(last)
        return y_BTD

    def new_state(self, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        shape = (rows, self.weight.shape[1] - 1, self.weight.shape[0])
        return {"conv": torch.zeros(shape, dtype=dtype, device=device)}


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    starts_BT: Tensor | None = None,
    state_BHPN: Tensor | None = None,
    chunk: int = 64,
) -> Pair:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t: y (B, T, H, P) in the dtype of x, and the last S, in fp32.

    Dao and Gu 2024, section 6: in chunks, as masked products of matrices; from chunk to chunk, as a linear scan of states.
    `dt` >= 0 and A <= 0. The products run in the dtype of x, decays and states in fp32 at least. For its gradient it keeps,
    beside its inputs, about 2 chunk H + 2 H P N / chunk + 5 H P numbers for each position: least near chunk = sqrt(P N), and
    on a CPU core 64 was the fastest of 16 to 256.
    """
    assert x_BTHP.shape[2] % B_BTGN.shape[2] == 0, "the heads must be a multiple of the groups"
    if x_BTHP.shape[1] == 1:
        return _ssd_step(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, starts_BT, state_BHPN)
    if x_BTHP.device.type in _KERNEL_DEVICES and (kernel := _ssd_kernel(x_BTHP.device, x_BTHP.dtype)):
        return kernel(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, starts_BT, state_BHPN)
    return _ssd_chunks(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, starts_BT, state_BHPN, chunk)


def _ssd_step(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, state: Tensor | None) -> Pair:
    """One position: decoding."""
    exact = _state_dtype(x)
    b, c = (y.squeeze(1).to(exact).repeat_interleave(x.shape[2] // y.shape[2], dim=1) for y in (b, c))  # (B, H, N)
    dt = dt.squeeze(1).to(exact)
    decay = (dt * A).exp() if starts is None else (dt * A).exp().masked_fill(starts, 0)
    new = (x.squeeze(1) * dt.unsqueeze(2)).unsqueeze(3) * b.unsqueeze(2)
    state = torch.zeros_like(new) if state is None else state.to(exact)
    new = torch.addcmul(new, decay[:, :, None, None], state)
    return (new @ c.unsqueeze(3)).squeeze(3).unsqueeze(1).to(x.dtype), new


def _ssd_chunks(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, state: Tensor | None, chunk: int
) -> Pair:
    (rows, length, heads, width), (groups, size) = x.shape, b.shape[2:]
    L = math.ceil(length / math.ceil(length / chunk))  # chunks of one length, with few zeros at the end
    fast, exact = product_dtype(x), _state_dtype(x)

    def split(y: Tensor) -> Tensor:
        """(B, T, ...) -> (B, C, L, ...), with zeros at the end: dt = 0 changes no state."""
        return F.pad(y, (0, 0) * (y.dim() - 2) + (0, -length % L)).unflatten(1, (-1, L))

    def by_group(y: Tensor) -> Tensor:
        """(B, T, H, ...) -> (B, C, G, L, R, ...)."""
        return split(y).unflatten(3, (groups, -1)).transpose(2, 3)

    sums = by_group(dt.to(exact) * A).transpose(3, 4).double().cumsum(-1)  # in fp64: small decays count after large ones
    x_BCGLRP = by_group(x.to(exact) * dt.to(exact).unsqueeze(3))
    b_BCGLN, c_BCGLN = (split(y.to(fast)).transpose(2, 3) for y in (b, c))

    seen, from_start, to_end = torch.ones(L, L, dtype=torch.bool, device=x.device).tril(), None, None
    if starts is not None:
        document_BCL = split(starts).cumsum(2)[:, :, None, None]  # (B, C, 1, 1, L)
        seen = seen & (document_BCL.unsqueeze(5) == document_BCL.unsqueeze(4))
        from_start, to_end = document_BCL == 0, document_BCL == document_BCL[..., -1:]

    def decay(log: Tensor, keep: Tensor | None) -> Tensor:
        """Masked before the exponential: a difference the other way round may be large."""
        log = log.to(exact)
        return (log if keep is None else log.masked_fill(~keep, -torch.inf)).exp()

    # what the positions of a chunk make of each other
    between = decay(sums.unsqueeze(5) - sums.unsqueeze(4), seen)
    weights = ((c_BCGLN @ b_BCGLN.transpose(3, 4)).unsqueeze(3) * between).to(fast)
    inner_BCGRLP = weights @ x_BCGLRP.transpose(3, 4).to(fast)
    # what each chunk adds to the state, and the state before each chunk
    left_BCGLR = decay(sums[..., -1:] - sums, to_end).transpose(3, 4)
    inputs_BCGLD = (x_BCGLRP * left_BCGLR.unsqueeze(5)).to(fast).flatten(4)
    added = (inputs_BCGLD.transpose(3, 4) @ b_BCGLN).to(exact).reshape(*sums.shape[:4], width * size)
    first = torch.zeros_like(added[:, 0]) if state is None else state.to(exact).view_as(added[:, 0])
    whole = decay(sums[..., -1:], None if from_start is None else from_start[..., -1:])
    after = _scan(whole, added, first)
    before = torch.cat([first.unsqueeze(1), after[:, :-1]], dim=1).reshape(*added.shape[:3], -1, size)
    # what the positions see of that state
    outer_BCGLRP = (c_BCGLN @ before.to(fast).transpose(3, 4)).view_as(x_BCGLRP)
    outer_BCGLRP = outer_BCGLRP * decay(sums, from_start).transpose(3, 4).unsqueeze(5)
    y = (inner_BCGRLP.transpose(3, 4) + outer_BCGLRP).to(x.dtype)
    return y.transpose(2, 3).reshape(rows, -1, heads, width)[:, :length], after[:, -1].reshape(rows, heads, width, size)


@_disable_dynamo
@cache
def _ssd_kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., Pair] | None:
    """mamba_ssm's kernel, if it agrees on this device with `_ssd_chunks`, in values and gradients, up to rounding to bf16."""

    @_disable_dynamo
    def kernel(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, state: Tensor | None) -> Pair:
        document = None if starts is None else starts.cumsum(1, dtype=torch.int32)
        return function(x, dt, A, b, c, 256, initial_states=state, seq_idx=document, return_final_states=True)

    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(to).requires_grad_()

    def results(run: Callable[..., Pair], *more: int) -> tuple[Tensor, ...]:
        y, last = run(*given, starts, state, *more)
        total = (y.float() * y_weight).sum() + (last * state_weight).sum()
        return y.detach(), last.detach(), *torch.autograd.grad(total, (*given, state))

    try:
        function = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        with torch.inference_mode(False), torch.enable_grad():
            x, b, c, y_weight = draw(2, 600, 4, 64), draw(2, 600, 2, 64), draw(2, 600, 2, 64), draw(2, 600, 4, 64)
            dt, A = draw(2, 600, 4).abs() / 10, -draw(4, to=torch.float32).abs()
            given, state, state_weight = (x, dt, A, b, c), draw(2, 4, 64, 64, to=torch.float32), draw(2, 4, 64, 64)
            starts = torch.rand(2, 600, generator=generator, device=device) < 0.01
            pairs = zip(results(kernel), results(_ssd_chunks, 64), strict=True)
            errors = [float((one - two).abs().max() / two.abs().max()) for one, two in pairs]
        problem = "" if all(error < 0.03 for error in errors) else f"is off by these parts of the largest values: {errors}"
    except Exception as error:  # whatever a foreign kernel raises, there is another way
        problem = f"fails: {error!r}"
    if problem:
        warnings.warn(f"mamba_ssm's kernel is not used on {device} for {dtype}: it {problem}", stacklevel=2)
    return None if problem else kernel
