"""What stands for `core.config` in a folder with its own code (`models.modeling`): sections that are plain dataclasses.

Knows no checks: what a folder says was checked when it was made. Annotations are texts there (`from __future__`).
"""

import dataclasses
import re
from typing import Any

Count = Positive = NotNegative = Share = BelowOne = Precision = Any
_SECTIONS: dict[str, Any] = {}  # by the name of the class, and by `kind`


def config(cls: type) -> type:
    """Make a class a section of the configuration."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    kinds = re.findall(r"""["'](.+?)["']""", str(cls.__annotations__.get("kind", "")))
    _SECTIONS.update(dict.fromkeys([cls.__name__, *kinds], cls))
    return cls


class Choice:
    """Base of sections that are told apart by `kind`."""


def read(value: Any, annotation: str = "") -> Any:
    """Plain values as sections: `kind` says of what class they are, or else the annotation of their field."""
    if isinstance(value, list):
        return tuple(read(part, annotation) for part in value)
    if not isinstance(value, dict):
        return value
    names = [value.get("kind"), *re.findall(r"\w+", annotation)]
    cls: Any = next((_SECTIONS[name] for name in names if name in _SECTIONS), dict)
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls)} if cls is not dict else {}
    return cls(**{name: read(part, fields.get(name, "")) for name, part in value.items()})
