"""The error a user may see, and the exit codes that a launcher may read."""

EXIT_DONE = 0
EXIT_RESUMABLE = 75  # stopped in good order: run the same command again
EXIT_CONFIG = 78  # wrong input: one message, no traceback


class ConfigError(ValueError):
    """The user's input is wrong: shown as one message without a traceback, exit code 78."""
