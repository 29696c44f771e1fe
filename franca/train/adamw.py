"""AdamW (Loshchilov and Hutter 2019): PyTorch's fused kernel, and the same rule for states and parameters in bf16."""

from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from franca.core.config import config
from franca.train.optim import OptimConfig
from franca.train.update import Part, Rule, Writer, local, value


@config
class AdamWConfig(OptimConfig):
    """AdamW for all parameters."""

    kind: Literal["adamw"] = "adamw"

    def rules(self, products: torch.dtype) -> tuple[Rule, Rule]:
        rule = AdamW(self)
        return rule, rule


class AdamW(Rule):
    """Two moments and a step counter for every parameter. `optim` gives their coefficients and dtype."""

    name = "adamw"

    def __init__(self, optim: OptimConfig) -> None:
        self.optim = optim

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        moments = {key: torch.zeros_like(parameter, dtype=self.optim.moment_dtype) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=parameter.device), **moments}

    def update(self, parts: list[Part], lr: float, weight_decay: float, writer: Writer) -> None:
        if self.optim.moments == "fp32" and self.optim.bf16_params is None:
            return self._fused(parts, lr, weight_decay, writer)
        for part in parts:
            self._rounded(part, lr, weight_decay, writer)
        return None

    def _fused(self, parts: list[Part], lr: float, weight_decay: float, writer: Writer) -> None:
        """PyTorch's kernel looks at `found_inf` itself."""
        adamw(
            [local(part.parameter) for part in parts],
            [part.grad for part in parts],
            [local(part.state["exp_avg"]) for part in parts],
            [local(part.state["exp_avg_sq"]) for part in parts],
            [],
            [part.state["step"] for part in parts],
            fused=True,
            found_inf=writer.found_inf,
            amsgrad=False,
            beta1=self.optim.beta1,
            beta2=self.optim.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.optim.eps,
            maximize=False,
        )

    def _rounded(self, part: Part, lr: float, weight_decay: float, writer: Writer) -> None:
        """Algorithm 2 of the paper in fp32, one parameter at a time."""
        optim, grad, step = self.optim, part.grad, part.state["step"]
        step += 1.0 - writer.found_inf
        steps = step.double()
        mean = local(part.state["exp_avg"]).float().lerp(grad, 1.0 - optim.beta1)
        square = local(part.state["exp_avg_sq"]).float().lerp(grad * grad, 1.0 - optim.beta2)
        spread = (square / (1.0 - optim.beta2**steps)).sqrt() + optim.eps
        update = mean / (1.0 - optim.beta1**steps) / spread
        writer.put_parameter(part, value(part) * (1.0 - lr * weight_decay) - lr * update)
        writer.put(part, "exp_avg", mean)
        writer.put(part, "exp_avg_sq", square)
