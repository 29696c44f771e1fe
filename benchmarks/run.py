"""All benchmarks, one table: `python -m benchmarks.run [names of groups]`. Takes some minutes."""

import sys
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks import generation, loader, loss, parallel, prepare, start, training
from benchmarks.table import Row, machine, say, show

GROUPS = {
    "start": start.rows,
    "loader": loader.rows,
    "prepare": prepare.rows,
    "generation": generation.rows,
    "training": training.rows,
    "parallel": parallel.rows,
    "loss": loss.rows,
}


def main(names: list[str]) -> None:
    unknown = set(names) - set(GROUPS)
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(GROUPS)}")
    warnings.filterwarnings("ignore")
    begin, before = time.monotonic(), machine()
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="franca-bench-") as folder:
        for name, rows in GROUPS.items():
            if not names or name in names:
                say(f"-- {name}")
                found += rows(Path(folder))
    print(f"\n{before}\n\n{show(found)}\n")
    if not names or "training" in names:
        print(training.note())
    print(
        "Medians; ratios are medians over pairs of interleaved measurements. Other work on the machine slows all of it.\n"
        f"Took {time.monotonic() - begin:.0f} s. To repeat: python -m benchmarks.run"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
