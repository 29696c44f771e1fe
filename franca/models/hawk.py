"""Hawk: the real-gated linear recurrent unit, RG-LRU, in place of attention (De et al. 2024, section 2.4).

Shape letters: see `models.base`; R: recurrent width.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from franca.core.config import Count, Positive, config
from franca.models.base import Context
from franca.models.decoder import TrunkConfig
from franca.models.layers import Linear, RMSNorm
from franca.models.llama import MLP
from franca.models.scan import CausalConv, linear_scan

SHARPNESS = 8.0  # c of equation 3
STEEPEST = 1000.0  # gradient of the square root of equation 4, near a decay of 1


@config
class HawkConfig(TrunkConfig):
    """`form: lingua` is Meta Lingua's: decays that begin near 0 (without the inverse softplus), SiLU in place of GELU and after
    the convolution, the norm's output added to the recurrence's. Gates have biases, and each feature its own decay, in both.
    """

    kind: Literal["hawk"]
    width: Positive = 4 / 3  # of the recurrence, in multiples of dim; rounded up to a multiple of `width_multiple`
    width_multiple: Count = 256
    conv_size: Count = 4  # positions of the causal convolution before the recurrence
    form: Literal["paper", "lingua"] = "paper"
    mlp: Literal["swiglu", "relu2", "gelu"] = "swiglu"
    mlp_dim: Count | None = None  # None: 8/3 dim (4 dim without a gate), rounded up to a multiple of 256

    @property
    def recurrent_dim(self) -> int:
        return self.width_multiple * math.ceil(int(self.width * self.dim) / self.width_multiple)

    @property
    def width_of_mlp(self) -> int:
        return self.mlp_dim or 256 * math.ceil((8 / 3 if self.mlp == "swiglu" else 4) * self.dim / 256)

    def block(self, number: int) -> nn.Module:
        return Block(self)

    def problems(self) -> list[str]:
        return []


def _root(x: Tensor) -> Tensor:
    """sqrt(x) with a bounded gradient: where the decay is 1, it would be infinite."""
    fixed = x.detach()
    return fixed.sqrt() + (x - fixed) / (4 * fixed).clamp_min(STEEPEST**-2).sqrt()  # adds nothing but the gradient


class RGLRU(nn.Module):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t), log a_t = -c softplus(decay) r_t; gates r, i of x (equations 1 to 4)."""

    def __init__(self, c: HawkConfig) -> None:
        super().__init__()
        self.form, width = c.form, c.recurrent_dim
        self.input_gate = Linear(width, width, c.init_std, bias=True)
        self.decay_gate = Linear(width, width, c.init_std, bias=True)
        self.decay = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        """sigmoid(-decay) in [0.9, 0.999], its square uniform, as in the authors' code."""
        nn.init.uniform_(self.decay, 0.9**2, 0.999**2, generator=generator)
        with torch.no_grad():
            half_log = 0.5 * self.decay.log()
            self.decay.copy_(half_log if self.form == "lingua" else (-half_log).expm1().log())

    def forward(self, x_BTR: Tensor, starts_BT: Tensor | None, hidden_BR: Tensor | None) -> Tensor:
        exact = torch.promote_types(x_BTR.dtype, torch.float32)
        log_a = -SHARPNESS * F.softplus(self.decay.to(exact)) * torch.sigmoid(self.decay_gate(x_BTR).to(exact))
        new = torch.sigmoid(self.input_gate(x_BTR).to(exact)) * x_BTR
        size = _root(-torch.expm1(2 * log_a))
        a_BTR = log_a.exp()
        if starts_BT is not None:
            a_BTR = a_BTR.masked_fill(starts_BT.unsqueeze(2), 0)
        return linear_scan(a_BTR, size * new, hidden_BR)


class Block(nn.Module):
    """The recurrent block and an MLP, each after a norm and added to the residual stream."""

    def __init__(self, c: HawkConfig) -> None:
        super().__init__()
        self.form, width = c.form, c.recurrent_dim
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.input = Linear(c.dim, width, c.init_std)
        self.gate = Linear(c.dim, width, c.init_std)
        self.conv = CausalConv(width, c.conv_size)
        self.recurrence = RGLRU(c)
        self.output = Linear(width, c.dim, c.residual_std)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x_BTD: Tensor, context: Context, state: dict[str, Tensor] | None) -> Tensor:
        u_BTD, lingua = self.norm(x_BTD), self.form == "lingua"
        v_BTR = self.conv(self.input(u_BTD), context.starts_BT, state)
        v_BTR = F.silu(v_BTR) if lingua else v_BTR
        h_BTR = self.recurrence(v_BTR, context.starts_BT, None if state is None else state["hidden"])
        if state is not None:
            state["hidden"].copy_(h_BTR[:, -1])
        gate_BTR = self.gate(u_BTD)
        gate_BTR = F.silu(gate_BTR) if lingua else F.gelu(gate_BTR, approximate="tanh")
        mixed_BTD = self.output(h_BTR.to(x_BTD.dtype) * gate_BTR)
        x_BTD = x_BTD + (mixed_BTD + u_BTD if lingua else mixed_BTD)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))

    def new_state(self, rows: int, max_len: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        hidden = torch.zeros(rows, self.output.weight.shape[1], device=device)
        return {"hidden": hidden} | self.conv.new_state(rows, dtype, device)

    def mixing_flops(self, context: int) -> float:
        """A product and a sum for each recurrent feature."""
        return 2 * self.output.weight.shape[1]
