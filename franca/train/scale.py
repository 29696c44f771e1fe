"""The dynamic loss scale of fp16: gradients are computed of a multiple of the loss, so that small ones do not vanish.

Source: P. Micikevicius et al., "Mixed precision training" (ICLR 2018), section 3.2; window, hysteresis and smallest scale as
Megatron-LM counts them. It knows nothing of gradients: whoever finds one that is not finite says so.
"""

import torch
from torch import Tensor

from franca.core.config import Count, Positive, config


@config
class LossScaleConfig:
    """The defaults are those of BigScience's tr1-13B."""

    initial: Positive = 4096.0
    window: Count = 500  # steps without an overflow, in a row, before the scale is doubled
    hysteresis: Count = 2  # overflows since it was last doubled before it is halved; then at every one
    min: Positive = 1.0  # it is not halved below this


class LossScale:
    """Three scalars on the device: the scale, the steps since the last overflow, the overflows still forgiven."""

    def __init__(self, settings: LossScaleConfig, device: torch.device) -> None:
        self.settings = settings
        self.scale = torch.tensor(settings.initial, device=device)
        self.clean = torch.zeros((), device=device)
        self.patience = torch.tensor(float(settings.hysteresis), device=device)

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Count a step; `found_inf` is 1 when it overflowed, else 0. Nothing waits for the device."""
        overflow = found_inf > 0
        clean = torch.where(overflow, 0.0, self.clean + 1.0)
        patience = torch.where(overflow, (self.patience - 1.0).clamp(min=0.0), self.patience)
        halved = torch.maximum(self.scale / 2, self.scale.clamp(max=self.settings.min))
        grown = clean >= self.settings.window
        scale = torch.where(overflow & (patience == 0), halved, self.scale)
        self.scale.copy_(torch.where(grown, scale * 2, scale))
        self.clean.copy_(torch.where(grown, 0.0, clean))
        self.patience.copy_(torch.where(grown, float(self.settings.hysteresis), patience))

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        return {f"loss_scale.{name}": getattr(self, name) for name in ("scale", "clean", "patience")}
