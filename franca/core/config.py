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
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, dataclass_transform

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from franca.core.errors import ConfigError

T = TypeVar("T")

# Ranges that sections use as types, so that a wrong number is reported with all other problems.
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Make a class a section of the configuration: a frozen dataclass that refuses keys it does not know."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    return cls


class Choice:
    """Base of an open set of sections told apart by `kind:`.

    A direct subclass opens a set (`class ModelConfig(Choice)`); each class below it with a `kind: Literal["name"]` joins it,
    one of a user's own module by naming the module under `imports:`.
    """

    members: ClassVar[dict[str, type]] = {}
    default_kind: ClassVar[str | None] = None  # of a section that names none

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if Choice in cls.__bases__:
            cls.members = {}
        elif "kind" in cls.__annotations__:
            cls.members |= dict.fromkeys(typing.get_args(cls.__annotations__["kind"]), cls)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        if Choice not in cls.__bases__:
            return handler(source)
        assert cls.members, f"no module that defines a {cls.__name__} was imported"
        tagged: Any = [Annotated[member, Tag(kind)] if cls.default_kind else member for kind, member in cls.members.items()]
        union: Any = Union[tuple(tagged)]  # noqa: UP007 (built at run time)
        several = len(cls.members) > 1
        chooser: Any = Discriminator(cls._kind) if cls.default_kind else Field(discriminator="kind")
        return handler.generate_schema(Annotated[union, chooser] if several else union)

    @classmethod
    def _kind(cls, section: Any) -> Any:
        return (
            section.get("kind", cls.default_kind) if isinstance(section, dict) else getattr(section, "kind", cls.default_kind)
        )


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file as a plain dict, with its `base:` file (relative to it) merged under it, and so on down.

    `above` are the files that led here by their `base:`.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path}: `base:` goes round in a circle ({' -> '.join(map(str, above))})")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "is not a text file")
        raise ConfigError(f"{path}: cannot be read ({reason}). Give the path of a YAML file.") from None
    layer = _parse(str(path), text) if text.strip() else {}
    if not isinstance(layer, dict) or (layer and ":" not in text):
        raise ConfigError(f"{path}: expected `key: value` lines, got {text.strip()[:60]!r}")
    base = layer.pop("base", None)
    if base is None:
        return layer
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the path of one YAML file, got {base!r}")
    return merge(read_yaml(path.parent / base, (*above, path.resolve())), layer)


def _parse(where: str, content: str | list[str]) -> Any:
    """YAML text, or words in OmegaConf's dot-list syntax, as plain types with every `${...}` resolved."""
    try:
        values = OmegaConf.create(content) if isinstance(content, str) else OmegaConf.from_dotlist(content)
        return OmegaConf.to_container(values, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{where}: is not valid YAML: {str(error).strip()}") from None


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, section by section; a section of another `kind` replaces the whole section below it."""
    result = dict(under)
    for key, value in over.items():
        below: Any = under.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        same = both and ("kind" not in below or value.get("kind", below["kind"]) == below["kind"])
        result[key] = merge(below, value) if same else value
    return result


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """`["optim.lr=3e-4", "data.sources=[a,b]"]` as a nested dict (OmegaConf's dot-list syntax)."""
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{word!r}: expected a setting of the form section.key=value, for example optim.lr=3e-4")
    return dict(_parse(" ".join(words), list(words)))


def load(cls: type[T], path: Path, words: Sequence[str] = ()) -> T:
    """The file at `path`, changed by `words`, as a checked `cls`; one ConfigError lists every problem by its dotted path."""
    return check(cls, merge(read_yaml(path), parse_words(words)), str(path))


def check(cls: type[T], values: dict[str, Any], where: str) -> T:
    """A plain dict as a checked `cls`; `where` names it in messages."""
    fields: Any = getattr(cls, "__dataclass_fields__", ())
    modules = values.get("imports", ()) if "imports" in fields else ()  # what a download names is not imported
    for name in modules if isinstance(modules, list | tuple) else ():
        try:
            importlib.import_module(str(name))
        except ImportError as error:
            raise ConfigError(f"{where}: imports: {name!r} cannot be imported ({error}). Is it on PYTHONPATH?") from None
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise problems_error(where, [_explain(cls, problem) for problem in error.errors()]) from None
    except TypeError as error:  # json: a YAML date, for instance
        advice = "Put it in quotes."
        raise ConfigError(f"{where}: holds a value that is no number, text, list or section ({error}). {advice}") from None


def problems_error(where: str, problems: Sequence[str]) -> ConfigError:
    """One error out of a list of problems."""
    several = f"{len(problems)} problems\n  " if len(problems) > 1 else ""
    return ConfigError(f"{where}: {several}" + "\n  ".join(problems))


def _explain(cls: Any, problem: Any) -> str:
    """One of pydantic's errors in our words: `optim.lrr: unknown key (did you mean 'lr'?)`."""
    path, section = _walk(cls, problem["loc"])
    given, kind, context = problem["input"], problem["type"], problem.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        known = sorted(field.name for field in dataclasses.fields(section))
        return f"{path}: unknown key" + (did_you_mean(problem["loc"][-1], known) or f" (known here: {', '.join(known)})")
    if kind == "missing":
        return f"{path}: is required and was not given"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        allowed, name = sorted(section.members), given.get("kind")
        wrong = "is required and was not given;" if name is None else f"{name!r} is not"
        return f"{path}.kind: {wrong} one of {', '.join(allowed)}{did_you_mean(name, allowed)}"
    if kind == "value_error":
        return f"{path}: {context['error']}"
    if kind == "literal_error":
        return f"{path}: {given!r} is not one of {context['expected']}"
    return f"{path}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {given!r} ({type(given).__name__})"


def did_you_mean(word: Any, known: Sequence[str]) -> str:
    return "".join(f" (did you mean {close!r}?)" for close in difflib.get_close_matches(str(word), known, n=1))


def _walk(cls: Any, location: Sequence[int | str]) -> tuple[str, Any]:
    """The dotted path a user would write for pydantic's location, and the section that is, or holds, its last part."""
    path, section, hint = "", cls, cls
    for part in location:
        if Choice in getattr(hint, "__bases__", ()):
            several = len(hint.members) > 1  # pydantic then puts the kind into the path; a user does not
            hint = section = hint.members[part] if several else next(iter(hint.members.values()))
            if several:
                continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
        if dataclasses.is_dataclass(hint):
            section, hint = hint, typing.get_type_hints(hint).get(str(part))
        else:
            hint = _inner(hint)
        if typing.get_origin(hint) in (Union, types.UnionType):
            hint = _inner(hint)
    return path.removeprefix(".") or "(top level)", hint if hasattr(hint, "members") else section


def _inner(hint: Any) -> Any:
    """X of `X | None`, `tuple[X, ...]` and `dict[str, X]`."""
    return [*typing.get_args(hint), None][1 if typing.get_origin(hint) is dict else 0]


def to_dict(value: Any) -> dict[str, Any]:
    """A config as plain YAML types; `check` of it gives back an equal config."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def to_yaml(value: Any) -> str:
    """A config as YAML, in the order of its fields; a `${` in a text is escaped, so that it is read as itself."""
    escaped = json.loads(json.dumps(to_dict(value)).replace("${", "\\\\${"))
    return yaml.safe_dump(escaped, sort_keys=False, allow_unicode=True)


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
