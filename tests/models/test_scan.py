"""The recurrences against loops over positions in float64, written from the formulas, and against transformers' Mamba-2."""

import inspect
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from franca.models import scan
from franca.models.scan import causal_conv, linear_scan, ssd

B, D, H, P, G, N = 2, 3, 4, 3, 2, 5
LENGTHS = [*range(1, 24), 31, 32, 33, 47, 50, 63, 64, 65, 70]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(given: Any, expected: Any, tolerance: float) -> None:
    """Up to `tolerance` of the largest value."""
    given, expected = ([x] if isinstance(x, Tensor) else list(x) for x in (given, expected))
    for i, (one, two) in enumerate(zip(given, expected, strict=True)):
        scale = float(two.detach().abs().double().flatten().max(dim=0).values.clamp(min=1)) if two.numel() else 1.0
        torch.testing.assert_close(one.double(), two.double(), rtol=0, atol=tolerance * scale, msg=lambda m, i=i: f"{i}: {m}")


def results(function: Callable[..., Any], *inputs: Tensor | None) -> list[Tensor]:
    """What a function returns, and the gradients of a weighted sum of it for every floating input."""
    leaves = [x if x is None or x.dtype == torch.bool else x.detach().clone().requires_grad_() for x in inputs]
    given = function(*leaves)
    outputs = [given] if isinstance(given, Tensor) else list(given)
    total = sum((y.double() * normal(*y.shape, seed=90 + i)).sum() for i, y in enumerate(outputs))
    gradients = torch.autograd.grad(total, [x for x in leaves if x is not None and x.requires_grad])  # type: ignore[arg-type]
    return [y.detach() for y in outputs] + list(gradients)


def to(dtype: torch.dtype, *inputs: Tensor | None) -> list[Tensor | None]:
    return [x if x is None or x.dtype == torch.bool else x.to(dtype) for x in inputs]


# --- linear scan


def naive_scan(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    found = []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        found.append(h)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_scan_of_any_length_is_the_loop_with_its_gradients(length: int) -> None:
    inputs = uniform(B, length, D), normal(B, length, D, seed=1), normal(B, D, seed=2)
    close(results(linear_scan, *inputs), results(naive_scan, *inputs), 1e-12)
    close(results(linear_scan, *to(torch.float32, *inputs)), results(naive_scan, *inputs), 2e-6)


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_the_gradient_of_a_scan_is_its_slope(length: int) -> None:
    inputs = [x.requires_grad_() for x in (uniform(1, length, 2), normal(1, length, 2, seed=1), normal(1, 2, seed=2))]
    assert torch.autograd.gradcheck(linear_scan, inputs)


def test_a_scan_without_a_state_starts_from_zero() -> None:
    a, b = uniform(B, 40, D), normal(B, 40, D)
    close(results(linear_scan, a, b), results(lambda a, b: naive_scan(a, b, torch.zeros(B, D)), a, b), 1e-12)
    with torch.no_grad():
        assert torch.equal(linear_scan(a[:, :1], b[:, :1]), b[:, :1])


def test_wide_rows_which_go_step_by_step_are_the_same() -> None:
    inputs = uniform(1, 40, 20_000), normal(1, 40, 20_000, seed=1), normal(1, 20_000, seed=2)
    assert inputs[0][:, 0].numel() > scan._WIDE
    close(results(linear_scan, *inputs), results(naive_scan, *inputs), 1e-12)


def test_a_scan_fed_in_parts_is_the_whole() -> None:
    a, b = uniform(B, 70, D).float(), normal(B, 70, D).float()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            h, found = torch.zeros(B, D), []
            for part in ((0, 1), (1, 2), (2, 33), (33, 34), (34, 70)):
                found.append(linear_scan(a[:, slice(*part)], b[:, slice(*part)], h))
                h = found[-1][:, -1]
            close(torch.cat(found, dim=1), linear_scan(a, b), 1e-6)


def test_no_decay_keeps_a_document_from_the_one_before() -> None:
    a, b = uniform(1, 70, D).float(), normal(1, 70, D).float()
    packed = a.clone()
    packed[:, [0, 20, 45]] = 0
    alone = [linear_scan(a[:, i:j], b[:, i:j]) for i, j in ((0, 20), (20, 45), (45, 70))]
    close(linear_scan(packed, b, normal(1, D).float() * 1e6), torch.cat(alone, dim=1), 1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.02, 1e-30, -0.9])
def test_extreme_decays_are_exact_and_finite(decay: float) -> None:
    inputs = torch.full((B, 70, D), decay, dtype=torch.float64), normal(B, 70, D), normal(B, D)
    found = results(linear_scan, *to(torch.float32, *inputs))
    assert all(bool(x.isfinite().all()) for x in found)
    close(found, results(naive_scan, *inputs), 5e-6)


def test_sums_of_a_long_bf16_row_are_kept_in_fp32() -> None:
    ones = torch.ones(1, 16_384, 1)
    assert float(linear_scan(ones, ones * 2**-7)[0, -1, 0]) == 128
    a, b = 1 - 1e-3 * uniform(1, 16_384, 4), uniform(1, 16_384, 4, seed=1)
    close(linear_scan(a.float(), b.float()), naive_scan(a.float().double(), b, torch.zeros(1, 4)), 2e-6)
    a, b = a.bfloat16(), b.bfloat16()
    found = linear_scan(a, b)
    assert found.dtype == torch.bfloat16
    close(found, naive_scan(a.double(), b.double(), torch.zeros(1, 4)), 2**-8)
    assert linear_scan(a, b.float()).dtype == torch.float32


def test_bf16_gradients_of_a_scan() -> None:
    inputs = to(torch.bfloat16, uniform(B, 50, D), normal(B, 50, D), normal(B, D))
    found = results(linear_scan, *inputs)
    assert {x.dtype for x in found} == {torch.bfloat16}
    close(found, results(naive_scan, *to(torch.float64, *inputs)), 2**-7)


def test_a_scan_keeps_only_its_decays_and_its_result() -> None:
    kept: list[Tensor] = []
    a, b = (normal(B, 200, D, seed=i).requires_grad_() for i in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        linear_scan(a, b)
    assert sum(x.numel() for x in kept) == 2 * a.numel() + B * D


def test_a_scan_refuses_a_second_gradient_rather_than_giving_a_wrong_one() -> None:
    a, b = (normal(B, 30, D, seed=i).requires_grad_() for i in range(2))
    (slope,) = torch.autograd.grad(linear_scan(a, b).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_scan_backward"):
        slope.sum().backward()


# --- causal convolution


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_a_convolution_is_torchs_behind_zeros_or_a_state(width: int, length: int) -> None:
    inputs = normal(B, length, D), normal(D, width, seed=1), normal(D, seed=2)
    state = normal(B, width - 1, D, seed=3)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return causal_conv(x, weight, bias, state_BWD=state)

    def expected(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        before = x.new_zeros(B, width - 1, D) if state is None else state
        seen = torch.cat([before, x], dim=1)
        y = F.conv1d(seen.transpose(1, 2), weight.unsqueeze(1), bias, groups=D).transpose(1, 2)
        return y, seen[:, seen.shape[1] - width + 1 :]

    close(results(ours, *inputs), results(expected, *inputs), 1e-12)
    if width > 1:
        close(results(ours, *inputs, state), results(expected, *inputs, state), 1e-12)


def test_a_convolution_sees_its_own_document_only_in_any_parts() -> None:
    x, weight = normal(B, 40, D), normal(D, 4, seed=1)
    starts = uniform(B, 40) < 0.2
    starts[0, 0], starts[1, 0], starts[:, 38] = True, False, True
    state = normal(B, 3, D, seed=3)
    expected = torch.zeros(B, 40, D, dtype=torch.float64)
    for row in range(B):
        for t in range(40):
            for back in range(4):
                here = t - back
                if any(bool(starts[row, s]) for s in range(max(here, -1) + 1, t + 1)):
                    continue
                expected[row, t] += (x[row, here] if here >= 0 else state[row, here]) * weight[:, 3 - back]
    whole, last = causal_conv(x, weight, None, starts, state)
    close(whole, expected, 1e-12)
    for sizes in ([40], [1] * 40, [39, 1], [3, 2, 1, 30, 4]):
        held, found = state, []
        for x_part, starts_part in zip(x.split(sizes, dim=1), starts.split(sizes, dim=1), strict=True):
            y, held = causal_conv(x_part, weight, None, starts_part, held)
            found.append(y)
        close(torch.cat(found, dim=1), whole, 1e-12)
        close(held, last, 0)
    after, _ = causal_conv(x, weight, None, None, last)  # the state has nothing of older documents
    assert torch.equal(last[:, 0], torch.zeros(B, D))
    close(after[:, 0], x[:, 0] * weight[:, 3] + last[:, 2] * weight[:, 2] + last[:, 1] * weight[:, 1], 1e-12)


def test_a_bf16_convolution_is_summed_in_the_weights_fp32() -> None:
    x, weight = normal(B, 30, D, dtype=torch.bfloat16), normal(D, 4, dtype=torch.float32)
    y, state = causal_conv(x, weight)
    assert y.dtype == state.dtype == torch.bfloat16
    close(y, causal_conv(x.double(), weight.double())[0].bfloat16(), 2**-9)


# --- state-space duality


def naive_ssd(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, starts: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    S, found = x.new_zeros(len(x), x.shape[2], x.shape[3], b.shape[3]) if state is None else state, []
    group = torch.arange(x.shape[2]) // (x.shape[2] // b.shape[2])
    for t in range(x.shape[1]):
        if starts is not None:
            S = torch.where(starts[:, t, None, None, None], torch.zeros_like(S), S)
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]
        S = decay * S + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b[:, t, group])
        found.append(torch.einsum("bhpn,bhn->bhp", S, c[:, t, group]))
    return torch.stack(found, dim=1), S


def ssd_inputs(length: int, rows: int = B) -> list[Tensor]:
    """x, dt, A, B, C, starts, state."""
    x, b, c = normal(rows, length, H, P), normal(rows, length, G, N, seed=1), normal(rows, length, G, N, seed=2)
    starts = uniform(rows, length, seed=3) < 0.08
    return [x, uniform(rows, length, H, seed=4), -2 * uniform(H, seed=5), b, c, starts, normal(rows, H, P, N, seed=6)]


def chunked(chunk: int) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *inputs: ssd(*inputs, chunk=chunk)


@pytest.mark.parametrize("length", LENGTHS)
def test_ssd_of_any_length_is_the_loop_with_its_gradients(length: int) -> None:
    inputs = ssd_inputs(length)
    close(results(chunked(8), *inputs), results(naive_ssd, *inputs), 1e-12)
    plain = [*inputs[:5], None, None]
    close(results(chunked(16), *to(torch.float32, *plain)), results(naive_ssd, *plain), 5e-6)


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (3, 4), (5, 2)])
def test_the_gradient_of_ssd_is_its_slope(length: int, chunk: int) -> None:
    x, dt, A, b, c, starts, state = ssd_inputs(length)
    inputs = [y[:1].clone() for y in (x[..., :2], dt, b[..., :2], c[..., :2], state[:, :, :2, :2])]
    assert torch.autograd.gradcheck(
        lambda x, dt, b, c, state, A: ssd(x, dt, A, b, c, starts[:1], state, chunk),
        [y.requires_grad_() for y in (*inputs, A)],
    )


def test_ssd_fed_in_parts_is_the_whole() -> None:
    *inputs, state = to(torch.float32, *ssd_inputs(70))
    whole, last = ssd(*inputs, state, chunk=16)
    for sizes in ([1, 1, 30, 1, 37], [69, 1], [16, 54]):
        held, found = state, []
        parts = [[y] * len(sizes) if y.dim() == 1 else y.split(sizes, dim=1) for y in inputs]
        with torch.inference_mode():
            for part in zip(*parts, strict=True):
                y, held = ssd(*part, held, chunk=16)
                found.append(y)
        close([torch.cat(found, dim=1), held], [whole, last], 2e-6)


def test_packed_documents_are_separate_documents() -> None:
    x, dt, A, b, c, _, state = to(torch.float32, *ssd_inputs(70, rows=1))
    starts = torch.zeros(1, 70, dtype=torch.bool)
    borders = [0, 1, 16, 17, 40, 70]
    starts[:, borders[:-1]] = True
    spans = [slice(i, j) for i, j in pairwise(borders)]

    def together(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(x, dt, A, b, c, starts, state * 1e6, chunk=16)

    def apart(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        found = [ssd(x[:, s], dt[:, s], A, b[:, s], c[:, s], chunk=16) for s in spans]
        return torch.cat([y for y, _ in found], dim=1), found[-1][1]

    close(results(together, x, dt, b, c), results(apart, x, dt, b, c), 2e-6)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1e-6, 1e-6), (50.0, 50.0), (1e-4, 300.0)])
def test_tiny_large_and_mixed_steps_are_exact_and_finite(low: float, high: float) -> None:
    x, _, A, b, c, starts, state = ssd_inputs(70)
    dt = torch.where(uniform(B, 70, H) < 0.3, high, low).double()
    inputs = to(torch.float32, x, dt, 8 * A, b, c, starts, state)
    found = results(chunked(32), *inputs)
    assert all(bool(y.isfinite().all()) for y in found)
    close(found, results(naive_ssd, *to(torch.float64, *inputs)), 3e-6)


def test_a_long_row_stays_exact() -> None:
    length = 16_384
    x, b, c = (normal(1, length, *last, seed=i) for i, last in enumerate(((2, 2), (1, 3), (1, 3))))
    inputs = to(torch.float32, x, 0.01 * uniform(1, length, 2), -uniform(2), b, c)
    close(ssd(*inputs), naive_ssd(*to(torch.float64, *inputs)), 3e-6)


@pytest.mark.parametrize("length", [1, 50])
def test_bf16_gradients_of_ssd(length: int) -> None:
    inputs = to(torch.bfloat16, *ssd_inputs(length))
    inputs[2] = inputs[2].float()
    found = results(chunked(16), *inputs)
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    close(found, results(naive_ssd, *to(torch.float64, *inputs)), 2e-2)


@pytest.mark.parametrize("length", [5, 64, 100])
def test_ssd_is_transformers_mamba_2(length: int) -> None:
    x, dt, A, b, c, _, state = ssd_inputs(length)
    inputs = to(torch.float32, x, dt, A, b, c, state)

    def theirs(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return mamba2_chunk_scan(x, dt, A, b, c, chunk_size=32, initial_states=state, return_final_states=True)

    close(results(lambda *given: ssd(*given[:5], None, given[5]), *inputs), results(theirs, *inputs), 5e-6)


# --- compiled, and foreign kernels


def test_a_compiled_scan_has_the_same_values_and_gradients() -> None:
    inputs = to(torch.float32, normal(B, 40, D), normal(B, 40, D, seed=1), normal(B, D, seed=2))

    def gated(gate: Tensor, x: Tensor, h: Tensor) -> Tensor:
        return linear_scan(gate.sigmoid(), (-gate).sigmoid() * x, h)

    close(results(torch.compile(gated, fullgraph=True), *inputs), results(gated, *inputs), 2e-6)


def test_a_block_is_one_graph_with_the_same_values_and_gradients() -> None:
    x, dt, A, b, c, starts, state = to(torch.float32, *ssd_inputs(40))
    weight = normal(H * P, 4, dtype=torch.float32)

    def block(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        mixed, _ = causal_conv(x.flatten(2), weight, None, starts)
        h = linear_scan(mixed.sigmoid().masked_fill(starts.unsqueeze(2), 0), mixed)
        return ssd(h.view_as(x), dt, A, b, c, starts, state, chunk=16)

    traced = torch.compile(block, fullgraph=True, backend="aot_eager")  # Inductor would take minutes
    close(results(traced, x, dt, A, b, c, state), results(block, x, dt, A, b, c, state), 2e-6)


def fake_kernel(mistake: float, calls: list[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """mamba_ssm's function, as its signature has it, with an error of some size in one gradient."""

    def combined(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        initial_states: Tensor,
        seq_idx: Tensor,
        return_final_states: bool,
    ) -> tuple[Tensor, Tensor]:
        calls.append(x.shape[1])
        starts = None if seq_idx is None else seq_idx.diff(dim=1, prepend=torch.zeros_like(seq_idx[:, :1])) > 0
        if B.requires_grad:
            B = B.clone()
            B.register_hook(lambda grad: grad * (1 + mistake))
        return scan._ssd_chunks(x, dt, A, B, C, starts, initial_states, chunk_size)

    return combined


@pytest.mark.parametrize("mistake", [0.0, 1.0, float("nan"), None])
def test_a_foreign_kernel_is_used_when_it_agrees_and_refused_when_not(
    mistake: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    if mistake is not None:  # else the module has no such function
        sys.modules[name].mamba_chunk_scan_combined = fake_kernel(mistake, calls)  # type: ignore[attr-defined]
    monkeypatch.setattr(scan, "_KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(scan, "_ssd_kernel", cache(inspect.unwrap(scan._ssd_kernel)))
    inputs = to(torch.float32, *ssd_inputs(70))
    expected = naive_ssd(*to(torch.float64, *inputs))
    with torch.inference_mode(), nullcontext() if mistake == 0 else pytest.warns(UserWarning, match="is not used on cpu"):
        close(ssd(*inputs), expected, 2e-6)
    close(ssd(*inputs), expected, 2e-6)  # neither warned nor checked again
    assert calls == {0.0: [600, 70, 70], None: []}.get(mistake, [600])
