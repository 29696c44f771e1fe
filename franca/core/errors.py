"""The error a user may see, and the exit codes that a launcher may read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_DONE = 0
EXIT_RESUMABLE = 75  # stopped in good order: run the same command again
EXIT_CONFIG = 78  # wrong input: one message, no traceback


class ConfigError(ValueError):
    """The user's input is wrong: shown as one message without a traceback, exit code 78."""


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Say what the disk refuses, a full one among it, in one message (ConfigError); `place` where the error names no file."""
    try:
        yield
    except OSError as error:
        advice = "What is finished is kept: make room there, or mend it, and run the same command again"
        what = f"cannot be read or written ({error.strerror or error})"
        raise ConfigError(f"{error.filename or place}: {what}. {advice}") from None
