"""From a YAML file and `a.b=c` words to one frozen, fully checked dataclass.

What it knows: merging (`base:` under the file, words over it), types, open choices told apart by `kind:`, and how to say
everything that is wrong in one message. What it refuses to know: any particular section; each stands beside its user.
Modules that define choices must not use `from __future__ import annotations`: `kind` is read from the real annotation.
"""

import dataclasses
import difflib
import importlib
import json
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, dataclass_transform

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from franca.core.errors import ConfigError

T = TypeVar("T")

# Ranges that sections use as types, so that a wrong number is reported with all other problems.
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16"]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Make a class a section of the configuration: a frozen dataclass that refuses keys it does not know."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    return cls


class Choice:
    """Base of an open set of sections told apart by `kind:`.

    A direct subclass opens a set (`class ModelConfig(Choice)`); each class below it with a `kind: Literal["name"]` joins it.
    A user's own module joins by being named under `imports:`.
    """

    members: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if Choice in cls.__bases__:
            cls.members = {}
        elif "kind" in cls.__annotations__:
            cls.members[typing.get_args(cls.__annotations__["kind"])[0]] = cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        if Choice not in cls.__bases__:
            return handler(source)
        if not cls.members:
            raise TypeError(f"no module that defines a {cls.__name__} was imported")
        if len(cls.members) == 1:
            return handler.generate_schema(next(iter(cls.members.values())))
        union: Any = Union[tuple(cls.members.values())]  # noqa: UP007 (built at run time)
        return handler.generate_schema(Annotated[union, Field(discriminator="kind")])


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML file as a plain dict, with its `base:` file (relative to it) merged under it, and so on down."""
    seen: list[Path] = []
    layers = []
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen:
            raise ConfigError(f"{current}: `base:` goes round in a circle ({' -> '.join(map(str, seen))})")
        seen.append(current.resolve())
        layer = _read_layer(current)
        base = layer.pop("base", None)
        layers.append(layer)
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{current}: base: expected the path of one YAML file, got {base!r}")
        current = current.parent / base if base is not None else None
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged = merge(merged, layer)
    return merged


def _read_layer(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file. Give the path of a YAML file.") from None
    try:
        layer = OmegaConf.to_container(OmegaConf.create(text), resolve=True) if text.strip() else {}
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: is not valid YAML: {str(error).strip()}") from None
    if not isinstance(layer, dict) or (None in layer.values() and len(layer) == 1 and ":" not in text):
        raise ConfigError(f"{path}: expected `key: value` lines, got {text.strip()[:60]!r}")
    return typing.cast(dict[str, Any], layer)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, section by section; a section of another `kind` replaces the whole section below it."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and value.get("kind", below.get("kind")) == below.get("kind"):
            result[key] = merge(below, value)
        else:
            result[key] = value
    return result


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """`["optim.lr=3e-4", "data.sources=[a,b]"]` as a nested dict (OmegaConf's dot-list syntax)."""
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{word!r}: expected a setting of the form section.key=value, for example optim.lr=3e-4")
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(list(words)), resolve=True))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(words)}: cannot be understood: {str(error).strip()}") from None


def load(cls: type[T], path: Path, words: Sequence[str] = ()) -> T:
    """The file at `path`, changed by `words`, as a checked `cls`.

    Raises:
        ConfigError: with every problem at once, each with its dotted path, what was given and what is allowed.
    """
    return check(cls, merge(read_yaml(path), parse_words(words)), str(path))


def check(cls: type[T], values: dict[str, Any], where: str) -> T:
    """A plain dict as a checked `cls`; `where` names it in messages."""
    modules = values.get("imports", ())
    for name in modules if isinstance(modules, list | tuple) else ():
        try:
            importlib.import_module(str(name))
        except ImportError as error:
            raise ConfigError(f"{where}: imports: {name!r} cannot be imported ({error}). Is it on PYTHONPATH?") from None
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        lines = [_explain(cls, problem) for problem in error.errors()]
        raise ConfigError(_join(where, lines)) from None
    except TypeError as error:  # json: a YAML date, for instance
        raise ConfigError(
            f"{where}: holds a value that is no number, text, list or section ({error}). Put it in quotes."
        ) from None


def problems_error(where: str, problems: Sequence[str]) -> ConfigError:
    """One error out of a list of problems found by a later check (sizes that do not divide, files that are missing)."""
    return ConfigError(_join(where, problems))


def _join(where: str, lines: Sequence[str]) -> str:
    if len(lines) == 1:
        return f"{where}: {lines[0]}"
    return f"{where}: {len(lines)} problems\n" + "\n".join(f"  {line}" for line in lines)


def _explain(cls: type, problem: Any) -> str:
    """One of pydantic's errors in our words: `optim.lrr: unknown key (did you mean 'lr'?)`."""
    path, section = _walk(cls, problem["loc"])
    given = problem["input"]
    kind = problem["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        names = [field.name for field in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []
        return f"{path}: unknown key{_did_you_mean(path.rsplit('.', 1)[-1], names)}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path}: is required and was not given"
    if kind == "union_tag_invalid":
        allowed = sorted(section.members)
        given_kind = given.get("kind") if isinstance(given, dict) else given
        return f"{path}.kind: {given_kind!r} is not one of {', '.join(allowed)}{_did_you_mean(str(given_kind), allowed)}"
    if kind == "union_tag_not_found":
        return f"{path}.kind: is required and was not given; one of {', '.join(sorted(section.members))}"
    if kind == "value_error":
        return f"{path}: {problem['ctx']['error']}"
    if kind == "literal_error":
        return f"{path}: {given!r} is not one of {problem['ctx']['expected']}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{path}: {message}, got {given!r} ({type(given).__name__})"


def _did_you_mean(word: str, allowed: Iterable[str]) -> str:
    names = sorted(allowed)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known here: {', '.join(names)})" if names else ""


def _walk(cls: Any, location: tuple[int | str, ...]) -> tuple[str, Any]:
    """The dotted path a user would write for pydantic's location, and the section that holds its last part."""
    path, section, current = "", cls, cls
    for part in location:
        current = _unwrap(current)
        if _is_open(current) and part in current.members:
            current = section = current.members[str(part)]  # pydantic puts the kind into the path; a user does not
        elif isinstance(part, int):
            path, current = f"{path}[{part}]", next(iter(typing.get_args(current)), Any)
        else:
            path = f"{path}.{part}" if path else part
            section = next(iter(current.members.values())) if _is_open(current) else current
            if dataclasses.is_dataclass(section):
                current = typing.get_type_hints(section).get(part, Any)
            else:
                current = (*typing.get_args(section), Any, Any)[1]  # dict[str, X]
    current = _unwrap(current)
    return path or "(top level)", current if _is_open(current) else section


def _is_open(hint: Any) -> bool:
    """Whether a type is the base of an open choice."""
    return isinstance(hint, type) and Choice in hint.__bases__


def _unwrap(hint: Any) -> Any:
    """`X | None` as X."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return inner[0] if len(inner) == 1 else hint
    return hint


def to_dict(value: Any) -> dict[str, Any]:
    """A config as plain YAML types; `check` of it gives back an equal config."""
    return typing.cast(dict[str, Any], TypeAdapter(type(value)).dump_python(value, mode="json"))


def to_yaml(value: Any) -> str:
    """A config as YAML, in the order of its fields."""
    return yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Every `(dotted path, old value, new value)` in which two plain configs differ."""
    found: list[tuple[str, Any, Any]] = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((f"{prefix}{key}", before, after))
    return found
