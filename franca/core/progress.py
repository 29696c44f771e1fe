"""What a person sees of long work: a bar on a terminal, a plain line now and then in a log. Both go to stderr.

What it refuses to know: what the work is; it is told in words.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[..., None]  # (done, text="", left_s=None): how far the work is, and how long it will still take


def clock_text(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


@contextmanager
def progress(title: str, total: float, every_s: float = 10.0) -> Iterator[Progress]:
    """Yield `show(done, text)`; `done` counts up to `total` in whatever unit the caller chose."""
    if not sys.stderr.isatty():
        yield _lines(title, total, every_s)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    title_column, text_column = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
    columns = (title_column, BarColumn(), TaskProgressColumn(), text_column, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, text="")
        yield lambda done, text="", left_s=None: bar.update(task, completed=done, text=text)


def _lines(title: str, total: float, every_s: float) -> Progress:
    begin = last = time.monotonic()

    def show(done: float, text: str = "", left_s: float | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every_s and done < total:
            return
        last = now
        left = left_s if left_s is not None else (now - begin) * (total - done) / done if done else 0.0
        eta = f"  {clock_text(left)} left" if done < total else f"  in {clock_text(now - begin)}"
        print(f"{title}: {100 * done / total if total else 100:.0f}%  {text}{eta}", file=sys.stderr, flush=True)

    return show
