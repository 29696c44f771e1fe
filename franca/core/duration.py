"""Lengths and cadences in any unit of one clock: "2000 steps", "5M samples", "260B tokens", "2 epochs", "26e18 FLOPs".

A `Duration` is what a user writes; a `Clock` is where a run stands. Turning one unit into another needs the batch plan and
lives in `schedule.Timeline`.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic_core import core_schema

Unit = Literal["steps", "samples", "tokens", "epochs", "flops", "chinchilla", "seconds"]

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12, "p": 10**15, "e": 10**18, "z": 10**21}
_COUNTED: tuple[Unit, ...] = ("steps", "samples", "tokens", "epochs", "flops")
_SECONDS = {1: "s sec second seconds", 60: "min minute minutes", 3600: "h hour hours", 86400: "d day days"}
_UNITS: dict[str, tuple[Unit, int]] = {
    **{name: (unit, 1) for unit in _COUNTED for name in (unit, unit[:-1])},
    **{f"{prefix}flops": ("flops", factor) for prefix, factor in _PREFIXES.items()},
    "chinchilla": ("chinchilla", 1),
    **{name: ("seconds", factor) for factor, names in _SECONDS.items() for name in names.split()},
}
_PATTERN = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([kKMBGTPEZ]?)\s+([a-zA-Z]+)\s*")
_ALLOWED = "a number and a unit, for example '2000 steps', '5M samples', '260B tokens', '2 epochs', '26e18 FLOPs', '20 min'"


@dataclass(frozen=True, slots=True)
class Clock:
    """Where a run stands: what was consumed so far. `seconds` is wall time since this attempt began.

    One `chinchilla` is 20 tokens for each parameter of the model; see `schedule.TOKENS_PER_PARAMETER`.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    flops: float = 0.0
    chinchilla: float = 0.0

    def read(self, unit: Unit) -> float:
        return float(self.step if unit == "steps" else getattr(self, unit))


@dataclass(frozen=True, slots=True)
class Duration:
    """An amount of one unit of the clock. Durations of time are kept in seconds."""

    value: int | float
    unit: Unit

    @classmethod
    def parse(cls, text: Any) -> "Duration":
        """Raises ValueError that says what was given and what is allowed."""
        if isinstance(text, Duration):
            return text
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if not match:
            raise ValueError(f"{text!r} is not {_ALLOWED}")
        number, prefix, name = match[1].replace("_", ""), match[2].lower(), match[3].lower()
        if name not in _UNITS:
            raise ValueError(f"{text!r}: {match[3]!r} is not a unit; expected {_ALLOWED}")
        unit, factor = _UNITS[name]
        exact = Fraction(number) * _PREFIXES[prefix] * factor
        if unit in ("steps", "samples", "tokens") and exact.denominator != 1:
            raise ValueError(f"{text!r} is not a whole number of {unit}")
        return cls(int(exact) if exact.denominator == 1 else float(exact), unit)

    def __str__(self) -> str:
        return f"{self.value} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        serializer = core_schema.plain_serializer_function_ser_schema(str)
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=serializer)


def _above_zero(duration: Duration) -> Duration:
    if not duration.value:
        raise ValueError(f"'{duration}' is not above 0")
    return duration


def _repeatable(duration: Duration) -> Duration:
    if duration.unit == "seconds":
        raise ValueError(f"'{duration}' is wall time; give steps, samples, tokens, epochs or FLOPs, which a resume repeats")
    return duration


Length = Annotated[Duration, AfterValidator(_repeatable)]
Cadence = Annotated[Duration, AfterValidator(_above_zero)]
RepeatableCadence = Annotated[Duration, AfterValidator(_repeatable), AfterValidator(_above_zero)]


def crossed(every: Duration, before: Clock, after: Clock) -> bool:
    """Whether a multiple of `every` lies in (before, after]: the one rule of every cadence.

    It needs no memory: after a resume the same multiples are crossed at the same steps.
    """
    hair = 1 + 1e-15  # for fractions of an epoch: 0.3 / 0.1 is 2.9999999999999996
    passed_before, passed = (math.floor(clock.read(every.unit) / every.value * hair) for clock in (before, after))
    return passed > passed_before
