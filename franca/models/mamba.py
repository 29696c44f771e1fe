"""Mamba-2: a selective state space whose training is products of matrices (Dao and Gu 2024, sections 6 and 7).

Shape letters: see `models.base`, and `models.scan` for `ssd`: H heads, P width of a head, G groups, N state.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from franca.core.config import Count, Positive, config
from franca.models.base import Context
from franca.models.decoder import TrunkConfig
from franca.models.layers import Linear, RMSNorm
from franca.models.scan import CausalConv, ssd


@config
class MambaConfig(TrunkConfig):
    """Mamba-2. `expand * dim` features in heads of `head_dim`; `num_groups` of heads share what is written and what is read."""

    kind: Literal["mamba"]
    expand: Count = 2
    head_dim: Count = 64
    state_dim: Count = 128
    num_groups: Count = 1
    conv_size: Count = 4
    dt_bias: bool = True  # Lingua's configs have none
    dt_min: Positive = 0.001  # range of the initial steps of time
    dt_max: Positive = 0.1
    a_min: Positive = 1.0  # range of the initial decay rates
    a_max: Positive = 16.0

    hf_names: ClassVar[dict[str, str]] = {
        "embedding.weight": "backbone.embeddings.weight",
        "layers.{}.norm.weight": "backbone.layers.{}.norm.weight",
        "layers.{}.input.weight": "backbone.layers.{}.mixer.in_proj.weight",
        "layers.{}.conv.weight": "backbone.layers.{}.mixer.conv1d.weight",
        "layers.{}.conv.bias": "backbone.layers.{}.mixer.conv1d.bias",
        "layers.{}.recurrence.dt_bias": "backbone.layers.{}.mixer.dt_bias",
        "layers.{}.recurrence.a_log": "backbone.layers.{}.mixer.A_log",
        "layers.{}.recurrence.skip": "backbone.layers.{}.mixer.D",
        "layers.{}.gate_norm.weight": "backbone.layers.{}.mixer.norm.weight",
        "layers.{}.output.weight": "backbone.layers.{}.mixer.out_proj.weight",
        "norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    }

    @property
    def inner_dim(self) -> int:
        return self.expand * self.dim

    @property
    def num_heads(self) -> int:
        return self.inner_dim // self.head_dim

    def block(self, number: int) -> nn.Module:
        return Block(self)

    def problems(self) -> list[str]:
        found = []
        if self.inner_dim % self.head_dim:
            found.append(f"model.head_dim: {self.head_dim} does not divide expand * dim = {self.inner_dim}; use a divisor")
        elif self.num_heads % self.num_groups:
            found.append(f"model.num_groups: {self.num_groups} does not divide {self.num_heads} heads; use a divisor")
        for name, low, high in (("dt", self.dt_min, self.dt_max), ("a", self.a_min, self.a_max)):
            if low > high:
                found.append(f"model.{name}_min: {low} is above {name}_max = {high}; give the range from low to high")
        return found


class Recurrence(nn.Module):
    """Steps of time, decays and skips of the heads around `ssd`."""

    def __init__(self, c: MambaConfig) -> None:
        super().__init__()
        self.dt_range, self.a_range = (c.dt_min, c.dt_max), (c.a_min, c.a_max)
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads)) if c.dt_bias else None
        self.a_log = nn.Parameter(torch.empty(c.num_heads))
        self.skip = nn.Parameter(torch.empty(c.num_heads))

    def reset(self, generator: torch.Generator) -> None:
        """Decay rates uniform, steps of time uniform in their logarithm (through the inverse of softplus), skips of 1."""
        nn.init.uniform_(self.a_log, self.a_range[0], self.a_range[1], generator=generator)
        nn.init.ones_(self.skip)
        with torch.no_grad():
            self.a_log.log_()
            if self.dt_bias is not None:
                nn.init.uniform_(self.dt_bias, math.log(self.dt_range[0]), math.log(self.dt_range[1]), generator=generator)
                dt = self.dt_bias.exp()
                self.dt_bias.copy_(dt + (-torch.expm1(-dt)).log())

    def forward(
        self, x: Tensor, dt_BTH: Tensor, b: Tensor, c: Tensor, starts_BT: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(x.dtype, torch.float32)
        dt_BTH = dt_BTH.to(exact) if self.dt_bias is None else dt_BTH.to(exact) + self.dt_bias
        y_BTHP, last = ssd(x, F.softplus(dt_BTH), -self.a_log.to(exact).exp(), b, c, starts_BT, state)
        return torch.addcmul(y_BTHP, x, self.skip[:, None]).to(x.dtype), last


class GroupedRMSNorm(RMSNorm):
    """An RMSNorm of each group's features: on several devices, a group needs to know nothing of the others (section 8.2)."""

    def __init__(self, dim: int, eps: float, num_groups: int) -> None:
        super().__init__(dim, eps)
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        x_G = x.unflatten(-1, (self.num_groups, -1))
        return F.rms_norm(x_G, x_G.shape[-1:], None, self.eps).flatten(-2) * self.weight.to(x.dtype)


class Block(nn.Module):
    """x + W_out norm(ssd(...) * silu(z)), with z, x, B, C and dt from one projection of norm(x)."""

    def __init__(self, c: MambaConfig) -> None:
        super().__init__()
        self.group_shape, self.head_shape = (c.num_groups, c.state_dim), (c.num_heads, c.head_dim)
        self.sizes = [c.inner_dim, c.inner_dim + 2 * c.num_groups * c.state_dim, c.num_heads]  # z; x, B, C; dt
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.input = Linear(c.dim, sum(self.sizes), c.init_std)
        self.conv = CausalConv(self.sizes[1], c.conv_size, bias=True)
        self.recurrence = Recurrence(c)
        self.gate_norm = GroupedRMSNorm(c.inner_dim, c.norm_eps, c.num_groups)
        self.output = Linear(c.inner_dim, c.dim, c.residual_std)

    def forward(self, x_BTD: Tensor, context: Context, state: dict[str, Tensor] | None) -> Tensor:
        z_BTI, xbc, dt_BTH = self.input(self.norm(x_BTD)).split(self.sizes, dim=-1)
        xbc = F.silu(self.conv(xbc, context.starts_BT, state))
        group = math.prod(self.group_shape)
        x, b, c = xbc.split([self.sizes[0], group, group], dim=-1)
        x, b, c = x.unflatten(-1, self.head_shape), b.unflatten(-1, self.group_shape), c.unflatten(-1, self.group_shape)
        hidden = None if state is None else state["hidden"]
        y_BTHP, last = self.recurrence(x, dt_BTH, b, c, context.starts_BT, hidden)
        if hidden is not None:
            hidden.copy_(last)
        return x_BTD + self.output(self.gate_norm(y_BTHP.flatten(2) * F.silu(z_BTI)))

    def new_state(self, rows: int, max_len: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        hidden = torch.zeros(rows, *self.head_shape, self.group_shape[1], device=device)
        return {"hidden": hidden} | self.conv.new_state(rows, dtype, device)

    def mixing_flops(self, context: int) -> float:
        """The state's update and its reading: two products of P x N for each head, however the training computes them."""
        return 2 * 2 * math.prod(self.head_shape) * self.group_shape[1]
