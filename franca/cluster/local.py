"""`franca launch` on this machine: one process per rank, signals passed on, exit codes kept.

torchrun would turn exit code 75 into 1 and cut a save short on a second SIGTERM; ranks started here are the plain
`franca train`, which works under torchrun and srun too.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from franca.core.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RESUMABLE, ConfigError

KILL_AFTER_S = 30.0
FORWARDED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def main(path: Path, words: list[str], num_ranks: int) -> int:
    """Run `franca train` on `num_ranks` processes here and wait for them. Returns the run's exit code."""
    if num_ranks < 1:
        raise ConfigError(f"--ranks: is {num_ranks}; it must be at least 1")
    command = [sys.executable, "-m", "franca", "train", str(path), *words]
    port = str(_free_port())
    ranks: list[subprocess.Popen[bytes]] = []
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: _signal(ranks, number))
    for rank in range(num_ranks):  # each in a group of its own: a terminal's Ctrl-C comes to them from here, once
        ranks.append(subprocess.Popen(command, env=_environment(rank, num_ranks, port), process_group=0))
    return _wait(ranks)


def _environment(rank: int, num_ranks: int, port: str) -> dict[str, str]:
    if num_ranks == 1:
        return dict(os.environ)
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    # Threads of ranks that share cores wait for each other: one each, unless the user says otherwise.
    defaults = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**defaults, **os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails, the others cannot go on: end them, by force if need be."""
    deadline = math.inf
    while any(process.poll() is None for process in ranks):
        time.sleep(0.05)
        failed = any(process.poll() not in (None, EXIT_DONE, EXIT_RESUMABLE) for process in ranks)
        if failed and deadline == math.inf:
            deadline = time.monotonic() + KILL_AFTER_S
            _signal(ranks, signal.SIGTERM)
        if time.monotonic() > deadline:
            _signal(ranks, signal.SIGKILL)
    codes = {process.returncode for process in ranks}
    if EXIT_CONFIG in codes:
        return EXIT_CONFIG
    code = max(codes - {EXIT_DONE, EXIT_RESUMABLE} or codes)  # one that failed by itself, before those ended by a signal
    return 128 - code if code < 0 else code


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)
