"""minGRU and minLSTM: gates that see the input alone, so that training scans in parallel (Feng et al. 2024, sections 3.1, 3.2).

Shape letters: see `models.base`; R: recurrent width. A block is the recurrence alone, gated at its end, as in Meta Lingua.
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
from franca.models.scan import CausalConv, linear_scan


@config
class MinRNNConfig(TrunkConfig):
    """What both have. `gate: lingua` is Lingua's way: SiLU between convolution and sigmoid. As silu >= -0.278, a minGRU then
    keeps at most 0.57 of its state from one position to the next, and a minLSTM 0.70.
    """

    width: Positive = 2.0  # of the recurrence, in multiples of dim; rounded up to a multiple of `width_multiple`
    width_multiple: Count = 256
    conv_size: Count = 4  # positions of the causal convolution before the gates; 1: none
    gate: Literal["paper", "lingua"] = "paper"

    num_gates: ClassVar[int]

    @property
    def recurrent_dim(self) -> int:
        return self.width_multiple * math.ceil(self.width * self.dim / self.width_multiple)

    def block(self, number: int) -> nn.Module:
        return Block(self)

    def problems(self) -> list[str]:
        return []


@config
class MinGRUConfig(MinRNNConfig):
    """h_t = (1 - z_t) h_{t-1} + z_t W_h x_t, with z_t = sigmoid(W_z x_t)."""

    kind: Literal["mingru"]
    num_gates: ClassVar[int] = 1


@config
class MinLSTMConfig(MinRNNConfig):
    """h_t = f_t h_{t-1} + i_t W_h x_t, with gates sigmoid(W_f x_t), sigmoid(W_i x_t) divided by their sum."""

    kind: Literal["minlstm"]
    num_gates: ClassVar[int] = 2


class Block(nn.Module):
    """x + W_o (h * silu(W_g u)) where u = norm(x) and h is the recurrence over u."""

    def __init__(self, c: MinRNNConfig) -> None:
        super().__init__()
        self.gate_form, self.num_gates, width = c.gate, c.num_gates, c.recurrent_dim
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.gates = Linear(c.dim, c.num_gates * width, c.init_std)
        self.conv = CausalConv(c.num_gates * width, c.conv_size) if c.conv_size > 1 else None
        self.candidate = Linear(c.dim, width, c.init_std)
        self.gate = Linear(c.dim, width, c.init_std)
        self.output = Linear(width, c.dim, c.residual_std)

    def forward(self, x_BTD: Tensor, context: Context, state: dict[str, Tensor] | None) -> Tensor:
        u_BTD = self.norm(x_BTD)
        gates = self.gates(u_BTD)
        if self.conv is not None:
            gates = self.conv(gates, context.starts_BT, state)
        if self.gate_form == "lingua":
            gates = F.silu(gates)
        odds_BTR = self._odds(gates.to(torch.promote_types(gates.dtype, torch.float32)))
        keep_BTR, new_BTR = torch.sigmoid(odds_BTR), torch.sigmoid(-odds_BTR) * self.candidate(u_BTD)
        if context.starts_BT is not None:
            keep_BTR = keep_BTR.masked_fill(context.starts_BT.unsqueeze(2), 0)
        h_BTR = linear_scan(keep_BTR, new_BTR, None if state is None else state["hidden"])
        if state is not None:
            state["hidden"].copy_(h_BTR[:, -1])
        return x_BTD + self.output(h_BTR.to(x_BTD.dtype) * F.silu(self.gate(u_BTD)))

    def _odds(self, gates: Tensor) -> Tensor:
        """Logarithm of what is kept of the state over what is taken of the candidate, whose sum is 1: (B, T, R)."""
        if self.num_gates == 1:
            return -gates
        forget, take = F.logsigmoid(gates).chunk(2, dim=-1)
        return forget - take

    def new_state(self, rows: int, max_len: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        hidden = torch.zeros(rows, self.output.weight.shape[1], device=device)
        return {"hidden": hidden} | ({} if self.conv is None else self.conv.new_state(rows, dtype, device))

    def mixing_flops(self, context: int) -> float:
        """A product and a sum for each recurrent feature."""
        return 2 * self.output.weight.shape[1]
