"""minGRU, minLSTM, Hawk and Mamba-2 against the equations of their papers, step by step in float64, and transformers."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import Mamba2Config, Mamba2ForCausalLM

from franca.core.config import check, config, to_dict
from franca.core.errors import ConfigError
from franca.models.base import Context, ModelConfig
from franca.models.hawk import RGLRU, STEEPEST, HawkConfig, _root
from franca.models.mamba import MambaConfig
from franca.models.minrnn import MinGRUConfig, MinLSTMConfig
from franca.parallel.apply import init_weights

SHARED = {"vocab_size": 61, "dim": 12, "num_layers": 2, "max_seq_len": 80, "init_std": 0.3}
ROUND = {**SHARED, "width_multiple": 8}
MAMBA = {**SHARED, "head_dim": 4, "state_dim": 5}
SHAPES: dict[str, Any] = {
    "mingru": MinGRUConfig(kind="mingru", **ROUND),
    "mingru lingua": MinGRUConfig(kind="mingru", gate="lingua", **ROUND),
    "mingru without convolution": MinGRUConfig(kind="mingru", conv_size=1, **ROUND),
    "minlstm": MinLSTMConfig(kind="minlstm", **ROUND),
    "minlstm lingua": MinLSTMConfig(kind="minlstm", gate="lingua", conv_size=3, **ROUND),
    "hawk": HawkConfig(kind="hawk", mlp_dim=20, **ROUND),
    "hawk lingua": HawkConfig(kind="hawk", mlp_dim=20, form="lingua", **ROUND),
    "hawk relu2": HawkConfig(kind="hawk", mlp_dim=20, mlp="relu2", **ROUND),
    "mamba": MambaConfig(kind="mamba", **MAMBA),
    "mamba groups": MambaConfig(kind="mamba", num_groups=3, conv_size=2, dt_bias=False, tied=True, **MAMBA),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@config
class Section:
    model: ModelConfig


def build(shape: Any, scatter: float = 0.3) -> Any:
    """With biases and gains that differ, unless they are to be as they begin."""
    model = shape.build()
    init_weights(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += scatter * (parameter.ndim == 1) * torch.randn(parameter.shape, generator=generator)
    return model


def ids(rows: int, length: int, seed: int = 2) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the papers' equations, for one row x_TD and the parameters p of a block


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return torch.stack([row / math.sqrt(float(row @ row) / len(row) + eps) for row in x]) * gain


def short_conv(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    weight, rows = p["conv.weight"], []
    for t in range(len(x)):
        seen = [x[t - back] * weight[:, -1 - back] for back in range(min(weight.shape[1], t + 1))]
        rows.append(sum(seen) + p.get("conv.bias", 0))
    return torch.stack(rows)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def min_rnn(c: Any, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Feng et al. 2024, sections 3.1.3 and 3.2.4, behind Lingua's norm, convolution and gate."""
    u = rms(x, p["norm.weight"], c.norm_eps)
    gates = u @ p["gates.weight"].t()
    gates = short_conv(gates, p) if c.conv_size > 1 else gates
    gates = torch.sigmoid(silu(gates) if c.gate == "lingua" else gates)
    candidate, width = u @ p["candidate.weight"].t(), p["candidate.weight"].shape[0]
    h, found = torch.zeros(width, dtype=x.dtype), []
    for t in range(len(x)):
        if c.kind == "mingru":
            z = gates[t]
            h = (1 - z) * h + z * candidate[t]
        else:
            f, i = gates[t, :width], gates[t, width:]
            h = f / (f + i) * h + i / (f + i) * candidate[t]
        found.append(h)
    return x + (torch.stack(found) * silu(u @ p["gate.weight"].t())) @ p["output.weight"].t()


def hawk(c: Any, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """De et al. 2024, equations 1 to 4 and figure 2; Lingua's differences as its code has them."""
    u, lingua = rms(x, p["norm.weight"], c.norm_eps), c.form == "lingua"
    v = short_conv(u @ p["input.weight"].t(), p)
    v = silu(v) if lingua else v
    a = torch.sigmoid(-p["recurrence.decay"])
    h, found = torch.zeros_like(v[0]), []
    for t in range(len(x)):
        r = torch.sigmoid(p["recurrence.decay_gate.weight"] @ v[t] + p["recurrence.decay_gate.bias"])
        i = torch.sigmoid(p["recurrence.input_gate.weight"] @ v[t] + p["recurrence.input_gate.bias"])
        a_t = a ** (8 * r)
        h = a_t * h + torch.sqrt(1 - a_t**2) * (i * v[t])
        found.append(h)
    gate = u @ p["gate.weight"].t()
    gate = silu(gate) if lingua else F.gelu(gate, approximate="tanh")
    x = x + (torch.stack(found) * gate) @ p["output.weight"].t() + (u if lingua else 0)
    u = rms(x, p["mlp_norm.weight"], c.norm_eps)
    up = u @ p["mlp.up.weight"].t()
    inner = silu(u @ p["mlp.gate.weight"].t()) * up if c.mlp == "swiglu" else up.clamp(min=0) ** 2
    return x + inner @ p["mlp.down.weight"].t()


def mamba(c: Any, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Dao and Gu 2024: the recurrence of section 2, the block of figure 6, head by head."""
    inner, heads, size = c.expand * c.dim, c.expand * c.dim // c.head_dim, c.num_groups * c.state_dim
    projected = rms(x, p["norm.weight"], c.norm_eps) @ p["input.weight"].t()
    z, xbc, dt = projected[:, :inner], projected[:, inner:-heads], projected[:, -heads:]
    xbc = silu(short_conv(xbc, p))
    dt = torch.log1p(torch.exp(dt + p.get("recurrence.dt_bias", 0)))
    y = torch.zeros_like(z)
    for head in range(heads):
        mine, group = slice(head * c.head_dim, (head + 1) * c.head_dim), head * c.num_groups // heads
        first = inner + group * c.state_dim
        state = torch.zeros(c.head_dim, c.state_dim, dtype=x.dtype)
        for t in range(len(x)):
            write, read = xbc[t, first : first + c.state_dim], xbc[t, first + size : first + size + c.state_dim]
            decay = torch.exp(-dt[t, head] * torch.exp(p["recurrence.a_log"][head]))
            state = decay * state + dt[t, head] * torch.outer(xbc[t, mine], write)
            y[t, mine] = state @ read + p["recurrence.skip"][head] * xbc[t, mine]
    gated, width = y * silu(z), inner // c.num_groups
    parts = [slice(first, first + width) for first in range(0, inner, width)]
    normed = torch.cat([rms(gated[:, part], p["gate_norm.weight"][part], c.norm_eps) for part in parts], dim=1)
    return x + normed @ p["output.weight"].t()


BLOCKS: dict[str, Callable[..., Tensor]] = {"mingru": min_rnn, "minlstm": min_rnn, "hawk": hawk, "mamba": mamba}


@torch.no_grad()
def by_the_papers(model: Any, tokens_T: Tensor) -> Tensor:
    """Logits (T, V) in float64."""
    c, p = model.config, {name: parameter.double() for name, parameter in model.named_parameters()}
    x = p["embedding.weight"][tokens_T]
    for number in range(c.num_layers):
        prefix = f"layers.{number}."
        x = BLOCKS[c.kind](c, {name.removeprefix(prefix): v for name, v in p.items() if name.startswith(prefix)}, x)
    return rms(x, p["norm.weight"], c.norm_eps) @ p["embedding.weight" if c.tied else "head.weight"].t()


@every_shape
def test_a_family_computes_the_equations_of_its_paper(shape: Any) -> None:
    model, tokens = build(shape), ids(2, 75)
    expected = torch.stack([by_the_papers(model, row) for row in tokens])
    assert expected.std() > 0.3
    trained = model(tokens)
    with torch.no_grad():
        read = model(tokens)
        cache = model.new_cache(2, 80)
        stepped = torch.stack([model.next_logits(tokens[:, t : t + 1], cache) for t in range(75)], dim=1)
        cache = model.new_cache(2, 80)
        parts = torch.cat([model(part, cache=cache) for part in tokens.split([2, 1, 30, 3, 39], dim=1)], dim=1)
    for name, given in {"training": trained, "reading": read, "step by step": stepped, "in parts": parts}.items():
        torch.testing.assert_close(given.double(), expected, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    model.double()
    model.compute_dtype = torch.float64
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "length"),
    [(shape, length) for name, shape in SHAPES.items() for length in ((3, 24) if name in BLOCKS else (24,))],
    ids=lambda value: getattr(value, "kind", value),
)
def test_the_gradient_of_a_block_is_its_slope(shape: Any, length: int) -> None:
    smaller = {
        "hawk": {"mlp_dim": 3},
        "mamba": {"state_dim": 2, "num_groups": min(getattr(shape, "num_groups", 1), 2)},
    }.get(shape.kind, {}) | ({} if shape.kind == "mamba" else {"width": 0.7, "width_multiple": 3})
    block = build(dataclasses.replace(shape, dim=4, **smaller)).layers[0].double()
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[:, [0, length // 2]] = True
    context = Context(None, None, {}, starts, length)
    names = [name for name, _ in block.named_parameters()]
    x = torch.randn(1, length, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(block, dict(zip(names, parameters, strict=True)), (x, context, None))

    assert torch.autograd.gradcheck(run, (x, *block.parameters()), fast_mode=length > 3)  # fast: a few random directions


# --- gates and decays


def kept(shape: Any, steps: int = 1) -> Tensor:
    """What is left, of a state of ones, after some random tokens whose candidates are zero: (rows, R)."""
    block = build(shape).layers[0]
    generator = torch.Generator().manual_seed(4)
    torch.nn.init.normal_(block.gates.weight, std=1.5, generator=generator)
    torch.nn.init.zeros_(block.candidate.weight)
    state = block.new_state(3000, steps, torch.float32, torch.device("cpu"))
    state["hidden"].fill_(1)
    x = torch.randn(3000, steps, shape.dim, generator=generator)
    with torch.no_grad():
        block(x, Context(None, None, {}, None, steps), state)
    return state["hidden"]


@pytest.mark.parametrize(("kind", "most"), [("mingru", 0.57), ("minlstm", 0.70)])
def test_gates_of_the_papers_can_keep_all_and_those_of_lingua_forget(kind: str, most: float) -> None:
    lingua, paper = kept(SHAPES[f"{kind} lingua"]), kept(SHAPES[kind])
    assert most - 0.015 < float(lingua.max()) < most
    assert float(paper.max()) > 0.999
    assert float((paper > 0.95).float().mean()) > 0.02
    assert float(paper.min()) < 0.001
    assert float(kept(SHAPES[f"{kind} lingua"], steps=12).max()) < most**12
    assert float(kept(SHAPES[kind], steps=12).max()) > 0.3


@pytest.mark.parametrize("kind", ["mingru", "minlstm"])
@pytest.mark.parametrize("size", [1.0, 200.0])
def test_what_is_kept_and_what_is_taken_are_one_whole_however_far_the_gates_go(kind: str, size: float) -> None:
    block = build(SHAPES[kind]).layers[0]
    block.gates.weight.data *= size
    block.candidate.forward = lambda u: torch.ones(1, 40, 24)  # type: ignore[method-assign]
    x, context = torch.randn(1, 40, 12, generator=torch.Generator().manual_seed(5)), Context(None, None, {}, None, 40)
    state = block.new_state(1, 40, torch.float32, x.device)
    state["hidden"].fill_(1)
    with torch.no_grad():
        block(x, context, state)
    torch.testing.assert_close(state["hidden"], torch.ones(1, 24))
    block(x, context, None).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters() if not name.startswith("candidate")}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert gradients["gates.weight"].abs().max() > 0


@pytest.mark.parametrize(("form", "least", "most"), [("paper", 0.65, 1.0), ("lingua", 0.06, 0.08)])
def test_initial_decays_at_half_open_gates(form: Any, least: float, most: float) -> None:
    unit = RGLRU(HawkConfig(kind="hawk", dim=1000, width=2.0, form=form))
    init_weights(unit, torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(unit.decay_gate.weight)  # r = sigmoid(0)
    ones = torch.ones(1, unit.decay.numel())
    with torch.no_grad():
        a = unit(torch.zeros(1, 1, len(unit.decay)), None, ones)[0, 0]
    assert least < float(a.min()) < float(a.max()) < most
    if form == "paper":
        squares = a.double().sqrt()  # a = sigmoid^(8 r), so the square of the sigmoid is the root of a
        assert float(squares.min()) == pytest.approx(0.81, abs=0.002)
        assert float(squares.max()) == pytest.approx(0.998, abs=0.002)
        assert float(squares.mean()) == pytest.approx((0.81 + 0.998) / 2, abs=0.004)
        assert float(squares.std()) == pytest.approx((0.998 - 0.81) / math.sqrt(12), rel=0.05)


def test_a_decay_of_one_has_a_finite_gradient() -> None:
    unit = RGLRU(SHAPES["hawk"])
    init_weights(unit, torch.Generator().manual_seed(0))
    torch.nn.init.constant_(unit.decay_gate.bias, -200)  # r = 0: nothing decays, nothing is taken in
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    h = unit(x, None, None)
    assert float(h.detach().abs().max()) == 0
    h.sum().backward()
    assert all(bool(y.grad.isfinite().all()) for y in (x, *unit.parameters()))


def test_a_root_has_its_slope_up_to_a_bound() -> None:
    x = torch.tensor([0.0, 1e-12, 1e-6, 0.04, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    roots = _root(x)
    assert torch.equal(roots, x.sqrt())
    roots.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([STEEPEST, STEEPEST, 500, 2.5, 1, 0.5], dtype=torch.float64))


def test_mambas_steps_and_decays_begin_in_their_ranges() -> None:
    shape = MambaConfig(kind="mamba", dim=2000, head_dim=2, dt_min=0.002, dt_max=0.05, a_min=0.01, a_max=2.0)
    recurrence = shape.block(0).recurrence
    init_weights(recurrence, torch.Generator().manual_seed(0))
    dt, rate = F.softplus(recurrence.dt_bias.detach().double()), recurrence.a_log.detach().double().exp()
    assert 0.00199 < float(dt.min()) < 0.0022
    assert 0.048 < float(dt.max()) < 0.0501
    assert float(dt.log().mean()) == pytest.approx((math.log(0.002) + math.log(0.05)) / 2, abs=0.06)
    assert 0.0099 < float(rate.min()) < 0.05
    assert float(rate.mean()) == pytest.approx(1.005, abs=0.05)
    assert bool((recurrence.skip == 1).all())


# --- transformers' Mamba-2

THEIRS: dict[str, dict[str, Any]] = {
    "one group": {"n_groups": 1, "head_dim": 8},
    "groups": {"n_groups": 2, "head_dim": 8},
    "a group for each head": {"n_groups": 4, "head_dim": 16},
    "narrow": {"n_groups": 2, "head_dim": 4, "hidden_size": 16, "conv_kernel": 2, "state_size": 3},
    "wide and tied": {"n_groups": 3, "head_dim": 16, "hidden_size": 48, "expand": 3, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("scatter", [0.0, 0.3], ids=["as they begin", "other gains"])
@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_mamba_is_transformers_mamba_2(options: dict[str, Any], scatter: float) -> None:
    given = {"hidden_size": 32, "expand": 2, "state_size": 16, "conv_kernel": 4, "tie_word_embeddings": False} | options
    heads = given["hidden_size"] * given["expand"] // given["head_dim"]
    torch.manual_seed(0)
    theirs = Mamba2ForCausalLM(Mamba2Config(vocab_size=61, num_hidden_layers=3, num_heads=heads, chunk_size=16, **given)).eval()
    for parameter in theirs.parameters():
        parameter.data += scatter * (parameter.ndim == 1) * torch.randn(parameter.shape)
    shape = MambaConfig(
        kind="mamba",
        vocab_size=61,
        dim=given["hidden_size"],
        num_layers=3,
        expand=given["expand"],
        head_dim=given["head_dim"],
        state_dim=given["state_size"],
        num_groups=given["n_groups"],
        conv_size=given["conv_kernel"],
        tied=given["tie_word_embeddings"],
    )
    ours, stored = shape.build(), dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            pattern = shape.hf_names[re.sub(r"\.\d+\.", ".{}.", name)]
            parameter.copy_(stored.pop(pattern.format(*re.findall(r"\d+", name))).view_as(parameter))
        assert not stored
        tokens = ids(2, 70)
        expected = theirs(tokens).logits
        assert expected.std() > 0.05
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-4)
        cache = ours.new_cache(2, 70)
        parts = torch.cat([ours(part, cache=cache) for part in tokens.split([40, 29, 1], dim=1)], dim=1)
        torch.testing.assert_close(parts, expected, rtol=0, atol=1e-4)


# --- the config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 7}, ["model.head_dim: 7", "expand * dim = 24", "divisor"]),
        ({"head_dim": 48}, ["model.head_dim: 48", "expand * dim = 24", "divisor"]),
        ({"num_groups": 4}, ["model.num_groups: 4", "6 heads", "divisor"]),
        ({"num_groups": 12}, ["model.num_groups: 12", "6 heads", "divisor"]),
        ({"dt_min": 0.2}, ["model.dt_min: 0.2", "dt_max = 0.1"]),
        ({"a_max": 0.5}, ["model.a_min: 1.0", "a_max = 0.5"]),
    ],
)
def test_a_mamba_that_cannot_be_built_is_one_problem_in_words(options: dict[str, Any], words: list[str]) -> None:
    found = dataclasses.replace(SHAPES["mamba"], **options).problems()
    assert len(found) == 1
    assert all(word in found[0] for word in words), found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "mingru", "gate": "papers"}, r"model\.gate: 'papers' is not one of 'paper' or 'lingua'"),
        ({"kind": "minlstm", "conv_size": 0}, r"model\.conv_size: .*greater than or equal to 1, got 0"),
        ({"kind": "hawk", "width": 0.0}, r"model\.width: .*greater than 0, got 0\.0"),
        ({"kind": "hawk", "form": "griffin"}, r"model\.form: 'griffin' is not one of"),
        ({"kind": "mamba", "heads": 4}, r"model\.heads: unknown key"),
        ({"kind": "minrnn"}, r"model\.kind: 'minrnn' is not one of .*mingru, minlstm"),
    ],
)
def test_what_is_not_allowed_is_refused_when_the_config_is_read(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^here: {words}"):
        check(Section, {"model": values}, "here")


@every_shape
def test_a_config_survives_the_way_to_plain_types_and_back(shape: Any) -> None:
    assert check(Section, {"model": to_dict(shape)}, "here").model == shape
    assert shape.problems() == []


def test_widths_are_rounded_up() -> None:
    assert dataclasses.replace(SHAPES["mingru"], dim=100, width=1.0).recurrent_dim == 104
    assert HawkConfig(kind="hawk", dim=2048).recurrent_dim == 2816
    assert HawkConfig(kind="hawk", dim=2048, mlp="relu2").width_of_mlp == 8192
