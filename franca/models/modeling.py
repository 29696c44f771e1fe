"""Hugging Face folders with their own code, for models that transformers has not got (`trust_remote_code=True`).

The code is the source of the model itself, each module a file: its imports are turned to the files beside it, and it needs
torch and transformers, not franca. A user's architecture goes the same way; of the user's modules, those of its package or
folder go with it. The shape stands in config.json, and is read back from there: the code of a folder is never run here.
"""

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import franca
from franca.core.config import check, config, to_dict
from franca.core.errors import ConfigError
from franca.models.base import ModelConfig

MODEL_TYPE = "franca_lm"
STAND_INS = {"franca.core.config": "franca.models.plain_config"}
NOTICE = f"# From franca {franca.__version__} (Apache License 2.0), by `franca export`: imports and annotations were changed.\n"


@config
class Stored:
    """What of config.json is ours."""

    shape: ModelConfig


def to_config(c: ModelConfig) -> dict[str, Any]:
    """The part of config.json that says what the model is. The padding of a vocabulary is not exported."""
    classes = {"AutoConfig": "FrancaConfig", "AutoModelForCausalLM": "FrancaForCausalLM"}
    without: Any = replace(c, vocab_multiple=1) if is_dataclass(c) and hasattr(c, "vocab_multiple") else c
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["FrancaForCausalLM"],
        "auto_map": {auto: f"modeling_franca.{name}" for auto, name in classes.items()},
        "shape": to_dict(without),
    }


def from_config(values: dict[str, Any], where: str) -> Any:
    """Our config of such a folder. Raises ConfigError for kinds that are not known here."""
    shape = values.get("shape")
    kind = shape.get("kind") if isinstance(shape, dict) else None
    if kind not in ModelConfig.members:
        known = ", ".join(sorted(ModelConfig.members))
        raise ConfigError(
            f"{where}: its model is of kind {kind!r}; expected one of {known}. The code in the folder is not run: "
            "if you have the module that defines this kind, and trust it, name it under --imports"
        )
    return check(Stored, {"shape": shape}, where).shape


def sources(c: ModelConfig) -> dict[str, str]:
    """The code of a model as files by their names, none of which imports franca. Raises ConfigError for what cannot be."""
    own = sorted({type(section).__module__ for section in _sections(c)})
    roots = {"franca", *(name.split(".")[0] for name in own)}
    folders = {Path(inspect.getfile(sys.modules[name])).parent for name in own}

    def goes_along(name: str) -> bool:
        path = getattr(sys.modules.get(name), "__file__", None)
        return name.split(".")[0] in roots or (path is not None and Path(path).parent in folders)

    texts: dict[str, str] = {}
    pending = ["franca.core.config", *own]
    while pending:
        name = pending.pop()
        if name not in texts:
            texts[name] = ""  # it may be asked for by what it needs
            texts[name], needed = _turned(STAND_INS.get(name, name), goes_along)
            pending += needed
    face, here = Path(__file__).with_name("modeling_franca.py").read_text(encoding="utf-8"), "from franca.models.plain_config "
    # All are imported here: what copies such a folder may look at the imports of this file alone.
    every = "".join(f"from .{_file(name)} import __name__ as _  # noqa: F401\n" for name in sorted(texts))
    turned = NOTICE + face.replace(here, f"{every}from .franca_models_plain_config ")
    return {"modeling_franca.py": turned} | {f"{_file(name)}.py": text for name, text in texts.items()}


def _sections(value: Any) -> Iterator[Any]:
    """A config and all that are in it."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _sections(part)
    elif is_dataclass(value):
        yield value
        for field in fields(value):
            yield from _sections(getattr(value, field.name))


def _file(module: str) -> str:
    return STAND_INS.get(module, module).replace(".", "_")


def _turned(name: str, goes_along: Callable[[str], bool]) -> tuple[str, list[str]]:
    """The source of a module with imports of the files beside it, and the modules that it needs."""
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    tree, lines, needed = ast.parse(source), source.splitlines(), list[str]()
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
        if isinstance(node, ast.ImportFrom):
            new = _import_from(node, module.__spec__, goes_along, needed)
        else:
            along = [alias for alias in node.names if goes_along(alias.name)]
            for alias in along:
                if alias.asname or alias.name.split(".")[0] in used:  # else it was imported for its effect: to join a choice
                    where = f"{name}, line {node.lineno}"
                    raise ConfigError(f"{where}: `import {alias.name}` cannot be exported; write `from ... import ...`")
            new = [] if along else None
        if new is not None:
            new = new or ["pass"] * bool(node.col_offset)
            lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line for line in new]
    if not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in imports):
        after = tree.body[0].end_lineno if ast.get_docstring(tree) is not None else 0
        lines.insert(after or 0, "\nfrom __future__ import annotations\n")
    # An operator is registered once in a process: under the name of the module, which each folder has its own.
    text = re.sub(r'custom_op\("(\w+)::', r'custom_op("\1_" + __name__.encode().hex() + "::', "\n".join(lines) + "\n")
    return (NOTICE if name.startswith("franca.") else "") + text, needed


def _import_from(node: ast.ImportFrom, spec: Any, goes_along: Callable[[str], bool], needed: list[str]) -> list[str] | None:
    """What stands for `from a import b` in the folder; None: the same. Only annotations need pydantic; there they are texts."""
    name = "." * node.level + (node.module or "")
    base = importlib.util.resolve_name(name, spec.parent) if node.level else name
    if base.split(".")[0] == "pydantic":
        return []
    if not goes_along(base):
        return None
    modules = {alias: f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in sys.modules}
    rest = [alias for alias in node.names if alias not in modules]
    if base in STAND_INS and (lost := [a.name for a in rest if not hasattr(importlib.import_module(STAND_INS[base]), a.name)]):
        raise ConfigError(f"{spec.name}, line {node.lineno}: {', '.join(lost)} of {base} cannot be exported; do without")
    new = [ast.ImportFrom(None, [ast.alias(_file(m), a.asname or a.name)], 1) for a, m in modules.items()]
    new += [ast.ImportFrom(_file(base), rest, 1)] if rest else []
    needed += [*modules.values(), *([base] if rest else [])]
    return [ast.unparse(statement) for statement in new]
