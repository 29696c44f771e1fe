"""Matrix products of the blocks in 8-bit floating point, by torchao: e4m3 and e5m2 with scales from the numbers at hand
(Micikevicius et al. 2022).

Weights stay as they are, with their names and their start; a product casts what it is given. Without gradients to come
(validation) products are the plain ones.
"""

import dataclasses
import importlib.util
import logging
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from franca.core import hardware
from franca.core.config import config
from franca.core.errors import ConfigError
from franca.models.layers import Linear


@config
class Float8Config:
    """`tensorwise`: one scale for a tensor, the fastest; `rowwise`: one for a row, in powers of two, more exact;
    `rowwise_with_gw_hp`: the same, with the weights' gradients in full, the most exact.
    """

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    filter: tuple[str, ...] = ("layers.*",)  # which products, by name: layers.*.mlp.*; widths that 16 does not divide stay out
    emulate: bool = False  # round to float8, then multiply as always: for tests, on any device


class Float8Linear(Linear):
    """A `Linear` that was converted; see `convert`."""

    multiply8: Any  # torchao's function of (x, weight^T, configuration of the product, configuration of the casts)
    configs: tuple[Any, Any]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y: Tensor = self.multiply8(x, self.weight.to(x.dtype).t(), *self.configs)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def problems(float8: Float8Config, precision: str, seq_len: int, model: nn.Module) -> list[str]:
    """What keeps `train.float8` from running with a model (on any device, meta too), one line each."""
    found = []
    if importlib.util.find_spec("torchao") is None:
        found.append("train.float8: needs torchao, which is not installed; run: pip install 'franca[float8]'")
    if precision != "bf16" and not float8.emulate:
        found.append(f"train.float8: takes activations in bf16, but train.precision is {precision}; use bf16")
    if seq_len % 16 and not float8.emulate and float8.recipe != "rowwise_with_gw_hp":
        found.append(f"data.seq_len: is {seq_len}; products in float8 need a multiple of 16")
    for pattern in float8.filter:
        if not _named(model, (pattern,)):
            names = ", ".join(dict.fromkeys(name.split(".", 2)[2] for name in _named(model, ("*",))))
            what = f"{pattern!r} names no product of a block that float8 can do (both widths multiples of 16)"
            found.append(f"train.float8.filter: {what}; there are layers.N. with {names or 'none'}")
    return found


def convert(model: nn.Module, float8: Float8Config, device: torch.device) -> None:
    """Let the products that are named run in float8, in place. Raises ConfigError on a device that cannot."""
    if not float8.emulate and not _can(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        advice = "leave train.float8 out, or set train.float8.emulate for a test"
        raise ConfigError(f"train.float8: {name} has no products in float8 (an H100 or newer has); {advice}")
    function, configs = _torchao(float8)
    for linear in _named(model, float8.filter).values():
        linear.__class__ = Float8Linear
        linear.multiply8, linear.configs = function, configs  # type: ignore[assignment]


def _named(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, Linear]:
    """The blocks' products that fit float8 and one of the patterns. (The head's is one with the loss.)"""
    layers: Any = model.layers
    products = {f"layers.{name}": module for name, module in layers.named_modules() if isinstance(module, Linear)}
    fit = {name: m for name, m in products.items() if m.in_features % 16 == 0 and m.out_features % 16 == 0}
    return {name: m for name, m in fit.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _can(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    known = hardware.find(torch.cuda.get_device_name(device))
    return torch.cuda.get_device_capability(device) >= (8, 9) if known is None else known.fp8_flops is not None


def _torchao(float8: Float8Config) -> tuple[Any, tuple[Any, Any]]:
    """Its product, and the two configurations that it takes. Importing it complains of kernels for other devices."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    finally:
        logging.disable(before)
    casts = dataclasses.replace(Float8LinearConfig.from_recipe_name(float8.recipe), emulate=float8.emulate)
    converted: Any = convert_to_float8_training(nn.Linear(16, 16, device="meta"), config=casts)
    return matmul_with_hp_or_float8_args.apply, (converted.linear_mm_config, casts)
