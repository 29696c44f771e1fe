"""The laws of the house that no other tool checks: size, empty packages, and who may read the environment."""

import ast
import re
from pathlib import Path

import pytest

import franca

ROOT = Path(franca.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LIBRARY_LINES = 13_000
FILE_LINES = 600
FUNCTION_LINES = 80


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_library_stays_small() -> None:
    lines = {relative(path): len(path.read_text().splitlines()) for path in FILES}
    assert sum(lines.values()) < LIBRARY_LINES
    assert [name for name, count in lines.items() if count > FILE_LINES] == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_functions_are_short(path: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f"{f.name} ({f.end_lineno - f.lineno + 1})" for f in functions if f.end_lineno - f.lineno >= FUNCTION_LINES]
    assert long == []


def test_packages_export_nothing() -> None:
    packages = [path for path in FILES if path.name == "__init__.py" and path.parent != ROOT]
    assert len(packages) == 9
    assert [relative(path) for path in packages if path.read_text().strip()] == []


def test_every_file_says_what_it_is_for() -> None:
    assert [relative(p) for p in FILES if p.name != "__init__.py" and not ast.get_docstring(ast.parse(p.read_text()))] == []


def test_no_room_for_odds_and_ends() -> None:
    assert [relative(path) for path in FILES if re.search(r"util|common|helper|manager|misc", path.stem)] == []


def offenders(pattern: str, *allowed: str) -> list[str]:
    return [relative(p) for p in FILES if re.search(pattern, p.read_text()) and not relative(p).startswith(allowed)]


def test_the_environment_is_read_in_one_place_per_floor() -> None:
    assert offenders(r"os\.environ|getenv", "parallel/world.py", "cluster/") == []


def test_torch_distributed_stays_on_its_floors() -> None:
    assert offenders(r"torch\.distributed", "parallel/", "checkpoint/", "train/") == []


def test_nothing_is_unpickled_freely_or_passed_to_a_shell() -> None:
    assert (
        offenders(
            r"pickle\.loads?\(|torch\.load\((?!.*weights_only=True)|weights_only=False|shell=True|os\.system|(?<![.\w])(eval|exec)\("
        )
        == []
    )
