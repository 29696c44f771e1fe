"""A gated moving average in place of attention: a toy, made to be copied. `docs/your_own_architecture.md` goes through it.

Each feature of the average remembers for a time of its own, which is learned: the damped average of Mega (Ma et al. 2022,
equation 2, with alpha = 1 - a), gated at its end. Shape letters: see `franca.models.base`; R: recurrent width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from franca.core.config import Count, Positive, config
from franca.models.base import Context
from franca.models.decoder import TrunkConfig
from franca.models.layers import Linear, RMSNorm
from franca.models.scan import linear_scan


@config
class MovingAverageConfig(TrunkConfig):
    """What a run file may say under `model`, beside what all families share."""

    kind: Literal["moving_average"]
    expand: Count = 2  # width of the average, in multiples of dim
    shortest: Positive = 2.0  # memories at the start, in positions
    longest: Positive = 256.0

    def block(self, number: int) -> nn.Module:
        return Block(self)

    def problems(self) -> list[str]:
        if 1 < self.shortest <= self.longest:
            return []
        given = f"model.shortest: {self.shortest:g}, longest: {self.longest:g}"
        return [f"{given}; a memory is longer than 1 position, and the shortest comes first"]


class Average(nn.Module):
    """h_t = a h_{t-1} + (1 - a) v_t with a = sigmoid(decay); 1 / (1 - a) positions is how long it remembers."""

    def __init__(self, c: MovingAverageConfig) -> None:
        super().__init__()
        self.shortest, self.longest = c.shortest, c.longest
        self.decay = nn.Parameter(torch.empty(c.expand * c.dim))

    def reset(self, generator: torch.Generator) -> None:
        """Memories evenly spaced in their logarithm."""
        short, long = torch.tensor([self.shortest, self.longest]).log().tolist()
        memory_R = torch.linspace(short, long, len(self.decay), device=self.decay.device).exp()
        with torch.no_grad():
            self.decay.copy_((memory_R - 1).log())

    def forward(self, v_BTR: Tensor, starts_BT: Tensor | None, hidden_BR: Tensor | None) -> Tensor:
        a_BTR = torch.sigmoid(self.decay.float()).expand(v_BTR.shape)
        new_BTR = (1 - a_BTR) * v_BTR
        if starts_BT is not None:
            a_BTR = a_BTR.masked_fill(starts_BT.unsqueeze(2), 0)
        return linear_scan(a_BTR, new_BTR, hidden_BR)


class Block(nn.Module):
    """x + W_o (h * silu(W_g u)), where u = norm(x) and h is the average of W_v u."""

    def __init__(self, c: MovingAverageConfig) -> None:
        super().__init__()
        self.width = c.expand * c.dim
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.value = Linear(c.dim, self.width, c.init_std)
        self.gate = Linear(c.dim, self.width, c.init_std)
        self.average = Average(c)
        self.output = Linear(self.width, c.dim, c.residual_std)

    def forward(self, x_BTD: Tensor, context: Context, state: dict[str, Tensor] | None) -> Tensor:
        u_BTD = self.norm(x_BTD)
        h_BTR = self.average(self.value(u_BTD), context.starts_BT, None if state is None else state["hidden"])
        if state is not None:
            state["hidden"].copy_(h_BTR[:, -1])
        return x_BTD + self.output(h_BTR.to(x_BTD.dtype) * F.silu(self.gate(u_BTD)))

    def new_state(self, rows: int, max_len: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"hidden": torch.zeros(rows, self.width, device=device)}

    def mixing_flops(self, context: int) -> float:
        """A product and a sum for each feature of the average."""
        return 2 * self.width
