"""The files of a Hugging Face dataset, brought to a local folder: whole, verified, and never twice, however bad the line is.

What it refuses to know: what is in the files. `huggingface_hub` knows the token and the client; the bytes are moved here, since
a download may neither hang, nor begin again, nor pass off a part as the whole.
"""

import asyncio
import hashlib
import os
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2
import orjson
from huggingface_hub import constants, get_async_session, get_token
from huggingface_hub.errors import OfflineModeIsEnabled

from franca import __version__
from franca.core.errors import EXIT_RESUMABLE, ConfigError
from franca.core.progress import progress
from franca.core.run import lock, sync_folder, write_atomically

RECORD = ".franca-hub.json"
PART_BYTES = 8 << 30  # of one request: plain HTTP gives no file beyond 50 GB in one piece
SLOWEST_BYTES_PER_S = 10_000  # on average over `stall_s`; what comes slower counts as standing still
PROGRESS_BYTES = 1 << 20  # after so many, the failures so far are forgiven
PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # after the first failure, and what doubling it leads to
LONGEST_ASKED_S = 3600.0  # what a hub that is asked too often may prescribe


@dataclass(frozen=True)
class HubFile:
    """A file at one commit. `hash` is `sha256:...` for large files, else `git-sha1:...`, that of a git blob."""

    path: str
    size: int
    hash: str


@dataclass(frozen=True)
class Listing:
    """What `fetch` brought: the files of `repo` at `commit` that its patterns match, sorted by path."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]


class _AgainError(Exception):
    """What may go better next time, but not before `pause_s`."""

    def __init__(self, cause: str, pause_s: float = 0.0) -> None:
        super().__init__(cause)
        self.pause_s = pause_s


def bring(repo: str, folder: Path, patterns: Sequence[str], revision: str) -> tuple[str, ...]:
    """`fetch` for a command: the same patterns, now of local files; exits as one that can be run again when the line is bad."""
    try:
        fetch(repo, folder, patterns, revision)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_RESUMABLE) from None
    return tuple(f"{folder}/{pattern}" for pattern in patterns)


def fetch(
    repo: str,
    folder: Path,
    patterns: Sequence[str] = ("**",),
    revision: str = "main",
    token: str | None = None,
    endpoint: str | None = None,
    workers: int = 4,
    stall_s: float = 60.0,
    attempts: int = 8,
) -> Listing:
    """Bring the files of a dataset that match `patterns` (`**` for any depth) into `folder`, `workers` of them at a time.

    A killed or failed call goes on where it stopped; what is there already is checked, not loaded. `attempts` in a row may fail
    before the call does; one fails when, over `stall_s` seconds, next to nothing comes. Without `token` the user's own is sent,
    to the hub and to nobody else; it is never written down.
    Raises ConfigError for what the hub refuses, and OSError when a file or the list of files cannot be had for now.
    """
    endpoint, token = (endpoint or constants.ENDPOINT).rstrip("/"), token or get_token()
    problems = {
        f"repo must read owner/name, not {repo!r}": not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo, re.ASCII),
        f"endpoint must begin with https:// or http://, not {endpoint!r}": not endpoint.startswith(("https://", "http://")),
        "the token has blanks or letters that no token has; copy it again": not re.fullmatch("[!-~]+", token or "none"),
        "patterns, workers, attempts and stall_s above 0 are needed": min(len(patterns), workers, attempts, stall_s) <= 0,
    }
    if any(problems.values()):
        raise ConfigError("fetch: " + "; ".join(text for text, is_so in problems.items() if is_so))
    folder.mkdir(parents=True, exist_ok=True)
    advice = "Wait for it, or take another folder."
    try:
        with lock(folder / ".franca-hub.lock", f"{folder}: another process is fetching here. {advice}"):
            return asyncio.run(_Fetch(repo, folder, token, endpoint, stall_s, attempts).run(patterns, revision, workers))
    except OfflineModeIsEnabled:
        raise ConfigError(f"{repo}: HF_HUB_OFFLINE is set, so that nothing can be fetched. Unset it.") from None
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def matching(name: str, everything: dict[str, HubFile], patterns: Sequence[str]) -> list[HubFile]:
    """The files that any pattern matches. Raises ConfigError when a pattern matches nothing."""

    def match(path: list[str], pattern: list[str]) -> bool:
        if not pattern:
            return not path
        if pattern[0] == "**" and match(path, pattern[1:]):
            return True
        return bool(path) and fnmatchcase(path[0], pattern[0]) and match(path[1:], pattern[pattern[0] != "**" :])

    found = {pattern: {p for p in everything if match(p.split("/"), pattern.split("/"))} for pattern in patterns}
    if useless := [repr(pattern) for pattern, paths in found.items() if not paths]:
        some = ", ".join(sorted(everything)[:5])
        raise ConfigError(f"{name}: no file matches {' or '.join(useless)}. Some of its {len(everything)} files: {some}")
    return [everything[path] for path in sorted(set().union(*found.values()))]


def _recorded(folder: Path, repo: str, everything: dict[str, HubFile], wanted: list[HubFile]) -> dict[str, Any]:
    """What an earlier call recorded of files here. Raises ConfigError if any of another repository or commit would stay."""
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        record = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: is not JSON ({error}). Remove it: the files are then read and checked instead.") from None
    if record["repo"] != repo:
        raise ConfigError(f"{folder}: holds files of {record['repo']}. Take another folder for {repo}.")
    files = {name: facts for name, facts in record["files"].items() if (folder / name).exists()}
    current = {file.path: file.hash for file in everything.values()}
    changed = {name for name, facts in files.items() if current.get(name) != facts["hash"]}
    if stale := sorted(changed - {file.path for file in wanted}):
        advice = f"Remove them, take another folder, or fetch revision {record['commit']}."
        raise ConfigError(f"{folder}: {len(stale)} files are of an earlier commit ({', '.join(stale[:5])}). {advice}")
    return files


@dataclass
class _Fetch:
    """One dataset on its way from one hub to one folder."""

    repo: str
    folder: Path
    token: str | None
    endpoint: str
    stall_s: float
    attempts: int
    done = received = total = 0  # bytes: here, come in this call, of all files

    async def run(self, patterns: Sequence[str], revision: str, workers: int) -> Listing:
        async with get_async_session() as self.client:
            self.commit, everything = await self.list_files(revision)
            wanted = matching(f"{self.repo}@{self.commit[:12]}", everything, patterns)
            self.recorded = _recorded(self.folder, self.repo, everything, wanted)
            self.total, self.begin, queue = sum(file.size for file in wanted), time.monotonic(), iter(wanted)
            with progress(f"fetch {self.repo}", self.total) as self.show:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(workers):
                        tasks.create_task(self.work(queue))
        files = self.recorded | {file.path: _facts(self.folder, file) for file in wanted}
        record = {"repo": self.repo, "commit": self.commit, "files": files}
        write_atomically(self.folder / RECORD, orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
        return Listing(self.repo, self.commit, tuple(wanted))

    async def list_files(self, revision: str) -> tuple[str, dict[str, HubFile]]:
        """The commit that `revision` is now, and its files by path. Raises OSError for a list that is not whole."""
        api = f"{self.endpoint}/api/datasets/{self.repo}"
        about, _ = await self.read_json(f"{api}/revision/{quote(revision, safe='')}", f"revision {revision}")
        files, query, asked = {}, "recursive=true", {""}
        while query not in asked:
            asked.add(query)
            page, response = await self.read_json(f"{api}/tree/{about['sha']}?{query}", "the list of files")
            for entry in page:
                if entry["type"] == "file" and entry["path"] != RECORD:  # a record that was uploaded with its files
                    hash_ = f"sha256:{entry['lfs']['oid']}" if entry.get("lfs") else f"git-sha1:{entry['oid']}"
                    files[entry["path"]] = HubFile(entry["path"], entry["size"], hash_)
            if "next" not in response.links:
                break
            query = urlsplit(response.links["next"]["url"]).query  # not the address: the token would follow it
        else:
            raise OSError(f"{self.repo}: the list of files does not go on after {len(files)} files. Try again later.")
        if missing := sorted({sibling["rfilename"] for sibling in about.get("siblings", [])} - files.keys() - {RECORD}):
            raise OSError(f"{self.repo}: the list of files lacks {', '.join(missing[:5])}. Try again later.")
        if unsafe := [path for path in files if {"", ".", ".."} & set(path.split("/"))]:
            raise ConfigError(f"{self.repo}: {unsafe[0]!r} leads out of the folder. Do not trust this repository.")
        return about["sha"], files

    async def read_json(self, url: str, what: str) -> tuple[Any, httpx2.Response]:
        async def once() -> tuple[Any, httpx2.Response]:
            body = bytearray()
            response = await self.read(url, body.extend)
            try:
                return orjson.loads(body), response
            except orjson.JSONDecodeError:
                raise _AgainError("the answer is not JSON") from None

        return await self.patiently(what, once)

    async def patiently(self, what: str, work: Callable[[], Awaitable[Any]], place: Callable[[], int] = lambda: 0) -> Any:
        """Do `work` until it succeeds. Raises OSError after `attempts` in a row that did not move `place` (bytes) forward."""
        failures, start = 0, place()
        while True:
            try:
                return await work()
            except (httpx2.RequestError, TimeoutError, _AgainError) as error:
                here = place()
                failures, start = (1, here) if here - start >= PROGRESS_BYTES else (failures + 1, start)
                if failures >= self.attempts:
                    slow = f"less than {SLOWEST_BYTES_PER_S} bytes per second in {self.stall_s:g} s"
                    cause = slow if isinstance(error, TimeoutError) else str(error) or type(error).__name__
                    problem = f"{what} ({here:,} bytes are here) cannot be had: {failures} failures in a row, the last: {cause}"
                    raise OSError(f"{self.repo}: {problem}. The same command goes on where it stopped.") from None
                pause_s = min(LONGEST_PAUSE_S, PAUSE_S * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
                await asyncio.sleep(max(pause_s, getattr(error, "pause_s", 0.0)))

    async def read(self, url: str, write: Callable[[bytes], Any], start: int = 0, end: int = 0) -> httpx2.Response:
        """Pass what `url` holds (its bytes from `start` to `end`) to `write` as it comes. Returns the answer, body read.

        Raises TimeoutError when the answer stands still, in its headers or in its body, and what `accept` and httpx2 raise.
        """
        headers = {"user-agent": f"franca/{__version__}", "accept-encoding": "identity"}
        headers |= {"authorization": f"Bearer {self.token}"} if self.token else {}  # httpx2 drops it when sent to another host
        headers |= {"range": f"bytes={start}-{end - 1}"} if end else {}
        request = self.client.stream("GET", url, headers=headers, follow_redirects=True)
        async with asyncio.timeout(self.stall_s) as clock, request as response:
            known, fresh = self.accept(response, start), 0
            async for chunk in response.aiter_bytes():
                fresh += len(chunk)
                if fresh >= self.stall_s * SLOWEST_BYTES_PER_S:
                    clock.reschedule(asyncio.get_running_loop().time() + self.stall_s)
                    fresh = 0
                write(chunk[known:])
                known = max(0, known - len(chunk))
        return response

    def accept(self, response: httpx2.Response, start: int) -> int:
        """How many bytes of this answer are here already. Raises ConfigError for a refusal, _AgainError for the rest."""
        status, fields = response.status_code, response.headers
        if status == 200:
            return start  # the range was ignored: everything comes once more
        if status == 206 and fields.get("content-range", "").startswith(f"bytes {start}-"):
            return 0
        at_hub = not response.history or response.url.netloc == response.history[0].url.netloc
        if status in (401, 403, 404) and at_hub:  # elsewhere it may be a signed link that has run out
            how = f"The token comes from HF_TOKEN or `hf auth login`; {'one' if self.token else 'none'} was sent."
            code = fields.get("x-error-code", "GatedRepo" if status == 403 else "")
            if code in ("RevisionNotFound", "EntryNotFound"):
                problem = f"there is no {response.url.path}. Is the revision right?"
            elif code == "GatedRepo":
                problem = f"its terms must be accepted first, at {self.endpoint}/datasets/{self.repo}. {how}"
            else:
                problem = f"there is no such dataset, or it is not for everybody. {how}"
            raise ConfigError(f"{self.repo}: {self.endpoint} says no ({status}): {problem}")
        asked = re.search(r"^\d+$", fields.get("retry-after", "")) or re.search(r"(?<=;t=)\d+", fields.get("ratelimit", ""))
        raise _AgainError(f"status {status}", min(float(asked[0]), LONGEST_ASKED_S) if asked else 0.0)

    async def work(self, queue: Iterator[HubFile]) -> None:
        """Bring one file after the other; other workers take from the same queue."""
        for file in queue:
            path = self.folder / file.path
            there = path.exists() and path.stat().st_size == file.size
            if there and (self.recorded.get(file.path) == _facts(self.folder, file) or await self.is_right(path, file)):
                self.count(file.size, 0)
            else:
                await self.bring(file, path)

    async def is_right(self, path: Path, file: HubFile) -> bool:
        return await asyncio.to_thread(_hash, path, file.hash.partition(":")[0]) == file.hash

    async def bring(self, file: HubFile, path: Path) -> None:
        """Load what is missing of one file, and give it its name when its hash is right. Raises OSError when it never is."""
        unfinished = path.with_name(f".{path.name}.{file.hash.partition(':')[2][:12]}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # the first time, it may be bytes of an earlier call that are wrong
            with open(unfinished, "ab") as out:
                self.count(out.tell(), 0)
                while out.tell() < file.size:
                    await self.patiently(file.path, partial(self.append, file, out), out.tell)
                out.flush()
                await asyncio.to_thread(os.fsync, out.fileno())
            if await self.is_right(unfinished, file):
                os.replace(unfinished, path)
                return sync_folder(path.parent)
            self.count(-unfinished.stat().st_size, 0)
            unfinished.unlink()
        problem = f"{file.path} came twice with other bytes than its hash {file.hash} says"
        raise OSError(f"{self.repo}: {problem}. Nothing of it was kept; the same command tries again.")

    async def append(self, file: HubFile, out: Any) -> None:
        """Append the next part of a file. Raises _AgainError if it ends early, and what `read` raises."""

        def write(chunk: bytes) -> None:
            if out.tell() + len(chunk) > file.size:
                raise _AgainError("more bytes came than the file has")
            self.count(out.write(chunk), len(chunk))

        url = f"{self.endpoint}/datasets/{self.repo}/resolve/{self.commit}/{quote(file.path)}"
        end = min(file.size, out.tell() + PART_BYTES)
        await self.read(url, write, out.tell(), end)
        if out.tell() < end:
            raise _AgainError("the answer ended early")

    def count(self, done: int, received: int) -> None:
        self.done, self.received = self.done + done, self.received + received
        speed = self.received / max(time.monotonic() - self.begin, 1e-3)
        left_s = (self.total - self.done) / speed if speed else None
        self.show(self.done, f"{self.done / 1e9:.2f}/{self.total / 1e9:.2f} GB  {speed / 1e6:.1f} MB/s", left_s)


def _facts(folder: Path, file: HubFile) -> dict[str, Any]:
    """What the record says of a file."""
    status = (folder / file.path).stat()
    return {"size": status.st_size, "hash": file.hash, "mtime_ns": status.st_mtime_ns}


def _hash(path: Path, kind: str) -> str:
    begin = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as content:
        return f"{kind}:{hashlib.file_digest(content, lambda: begin).hexdigest()}"
