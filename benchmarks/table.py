"""What a benchmark reports, the machine it ran on, and the table that is printed."""

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

THREADS = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Row:
    """One line of the table. `meets` is None for a figure that is only reported."""

    name: str
    ours: str
    theirs: str = "-"
    ratio: float | None = None
    requirement: str = "reported"
    meets: bool | None = None


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def show(rows: list[Row]) -> str:
    """The rows as text in columns."""
    verdict = {True: "meets", False: "falls short", None: ""}
    lines = [("", "franca", "reference", "ratio", "required", "")]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append((row.name, row.ours, row.theirs, ratio, row.requirement, verdict[row.meets]))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def machine() -> str:
    """CPU, threads, how busy the machine is, and the versions of what is measured."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "numpy"))
    busy = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    return (
        f"{_cpu()}; {os.cpu_count()} cores, {THREADS} threads used; load {busy}\n"
        f"Python {platform.python_version()}, {versions}; {platform.platform()}"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(known) or 'no vector extension known here'})"
