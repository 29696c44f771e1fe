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
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import franca
from franca.core.config import check, config, to_dict
from franca.core.errors import ConfigError
from franca.models.base import ModelConfig

MODEL_TYPE = "franca_lm"
FACE, PLAIN = "franca.models.modeling_franca", "franca.models.plain_config"
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
    """The code of a model as files by their names, none of which imports franca. Raises ConfigError for what cannot go along."""
    own = sorted({type(section).__module__ for section in _sections(c)})
    roots = {"franca", *(name.split(".")[0] for name in own)}
    folders = {Path(inspect.getfile(sys.modules[name])).parent for name in own}

    def goes_along(name: str) -> bool:
        path = getattr(sys.modules.get(name), "__file__", None)
        return name.split(".")[0] in roots or (path is not None and Path(path).parent in folders)

    texts: dict[str, str] = {}
    pending = [PLAIN, *own]
    while pending:
        name = pending.pop()
        if name not in texts:
            texts[name] = ""
            texts[name], needed = _turned(name, goes_along)
            pending += needed
    face = Path(__file__).with_name("modeling_franca.py").read_text(encoding="utf-8")
    # All are imported here: what copies such a folder may look at the imports of this file alone.
    every = "".join(f"from .{_file(name)} import __name__ as _  # noqa: F401\n" for name in sorted(texts))
    turned = NOTICE + face.replace(f"from {PLAIN} import read\n", f"from .{_file(PLAIN)} import read\n" + every)
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
    return module.replace(".", "_")


def _turned(name: str, goes_along: Any) -> tuple[str, list[str]]:
    """The source of a module with imports of the files beside it, and the modules that it needs."""
    module = sys.modules.get(name) or importlib.import_module(name)
    source = inspect.getsource(module)
    tree, lines, needed = ast.parse(source), source.splitlines(), list[str]()
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
        new = _import_from(node, module, goes_along, needed) if isinstance(node, ast.ImportFrom) else _import(node, tree, name)
        if new is not None:
            lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line for line in new or ["pass"]]
    if not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in imports):
        documented = ast.get_docstring(tree) is not None
        lines.insert(tree.body[0].end_lineno or 0 if documented else 0, "\nfrom __future__ import annotations")
    # An operator is registered once in a process: under the name of the module, which each folder has its own.
    text = re.sub(r'custom_op\("(\w+)::', r'custom_op("\1_" + __name__.encode().hex() + "::', "\n".join(lines) + "\n")
    return (NOTICE if name.startswith("franca.") else "") + text, needed
