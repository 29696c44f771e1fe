"""Blocks of several families in one trunk: `blocks: [hawk, hawk, llama]` is repeated over the depth (Griffin, Samba...).

Shape letters: see `models.base`.
"""

from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, SerializerFunctionWrapHandler, WrapSerializer
from torch import nn

import franca.models.gpt2
import franca.models.hawk
import franca.models.llama
import franca.models.mamba
import franca.models.minrnn  # noqa: F401 (all join the choice of blocks)
from franca.core.config import config
from franca.models.base import ModelConfig
from franca.models.decoder import TrunkConfig
from franca.models.layers import Rope

SHARED = {field.name for field in fields(TrunkConfig)}


def _spell_out(block: Any) -> Any:
    """`hawk` for `{kind: hawk}`; what belongs to the whole model is not a block's to say."""
    block = {"kind": block} if isinstance(block, str) else block
    if isinstance(block, dict) and (given := sorted(SHARED & set(block))):
        raise ValueError(f"{', '.join(given)}: said once for the whole model; move it out of the block, beside `blocks`")
    if isinstance(block, dict) and block.get("kind") == "hybrid":
        raise ValueError("a hybrid cannot be part of a hybrid; write its blocks into this list")
    return block


def _own(block: Any, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
    """What a block may say, so that what is written can be read again."""
    return {name: value for name, value in dump(block).items() if name not in SHARED}


@config
class HybridConfig(TrunkConfig):
    """Each of `blocks` is a family's name, or its section without what all families share: `{kind: llama, window: 1024}`."""

    kind: Literal["hybrid"]
    blocks: tuple[Annotated[ModelConfig, BeforeValidator(_spell_out), WrapSerializer(_own)], ...]

    def families(self) -> list[Any]:
        """The families' configurations in the order of `blocks`, with what is said for the whole model."""
        shared = {name: getattr(self, name) for name in SHARED}
        blocks: tuple[Any, ...] = self.blocks
        return [replace(block, **shared) for block in blocks]

    def block(self, number: int) -> nn.Module:
        block: nn.Module = self.families()[number % len(self.blocks)].block(number)
        return block

    @property
    def attends_only(self) -> bool:  # type: ignore[override]
        return all(member.attends_only for member in self.families())

    def block_tp_plan(self) -> dict[str, str]:
        plans = [member.block_tp_plan() for member in self.families()]
        return plans[0] if all(plan == plans[0] for plan in plans) else {}

    def tp_widths(self) -> dict[str, int]:
        members = self.families() if self.tp_plan() else []
        return {
            f"{name} of blocks[{n}]": width for n, member in enumerate(members) for name, width in member.tp_widths().items()
        }

    def rope(self) -> Rope | None:
        return next((rope for member in self.families() if (rope := member.rope()) is not None), None)

    def problems(self) -> list[str]:
        if not self.blocks:
            return ["model.blocks: is empty; name at least one family, for example [hawk, hawk, llama]"]
        members = self.families()
        found = list(dict.fromkeys(problem for member in members for problem in member.problems()))
        ropes = {(r.head_dim, r.theta, r.scaling) for member in members if (r := member.rope()) is not None}
        if len(ropes) > 1:
            found.append("model.blocks: attention blocks turn by different RoPE tables; give all the same heads and rope_theta")
        if any(member.learned_positions() is not None for member in members):
            found.append("model.blocks: a family with learned positions cannot be part of a hybrid; take another")
        return found
