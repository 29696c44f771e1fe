"""Fetching from a hub that misbehaves in every way that a hub has been seen to: a real one, on real sockets."""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from huggingface_hub import constants

from franca.core.config import check
from franca.core.errors import EXIT_RESUMABLE, ConfigError
from franca.data import hub
from franca.data.indexed import Dataset
from franca.data.prepare import PrepareConfig, prepare
from franca.data.tokenizer import Tokenizer

REPO = "swiss/corpus"
TOKEN = "hf_" + "n0tAr3alT0ken" * 2
STALL_S = 0.5
COMMIT = hashlib.sha1(b"first").hexdigest()
LATER = hashlib.sha1(b"second").hexdigest()
BIG = "data/a.jsonl.gz"
CONTENTS = {
    ".gitattributes": b"*.gz filter=lfs\n",
    "README.md": b"# A corpus\n",
    BIG: random.Random(1).randbytes(600_000),
    "data/b.jsonl.gz": random.Random(2).randbytes(90_000),
    "data/deep/er/ c#d?é%20.jsonl": random.Random(3).randbytes(40_000),
    "data/deep/empty.jsonl": b"",
    "other/plain.txt": random.Random(4).randbytes(20_000),
}


@dataclass
class Hub:
    """What a hub and its delivery network hold, what they shall do wrong, and what they were asked."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(CONTENTS))
    faults: dict[str, list[str]] = field(default_factory=dict)  # by path: one for each request, in order
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT, "refs/pr/1": COMMIT})
    siblings: list[str] | None = None
    asked: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)  # server, path, token, range
    sent: dict[str, int] = field(default_factory=dict)  # bytes of bodies
    closing: threading.Event = field(default_factory=threading.Event)
    together: threading.Barrier = field(default_factory=lambda: threading.Barrier(3, timeout=20))
    betrayed: bool = False
    endpoint: str = ""
    network: str = ""

    def fault(self, path: str) -> str:
        return self.faults[path].pop(0) if self.faults.get(path) else ""

    def bodies(self, path: str) -> list[int]:
        """Where each request for a file's bytes began, as it reached who has the bytes."""
        starts = [ranged for _, asked, _, ranged in self.asked if asked == f"body {path}"]
        return [int(ranged.split("=")[1].split("-")[0]) if ranged else 0 for ranged in starts]


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **fields):
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.name = "network" if self.headers["Host"].startswith("localhost") else "hub"
        url = urlsplit(self.path)
        self.hub.asked.append((self.name, url.path, self.headers["Authorization"], self.headers["Range"]))
        self.hub.betrayed |= self.name == "network" and TOKEN in str(self.headers) + self.path
        with contextlib.suppress(OSError):  # who asked has gone
            if self.name == "network":
                self.body(unquote(url.path.removeprefix("/blobs/")))
            elif url.path.startswith("/api/resolve-cache/"):
                self.body(unquote(url.path.removeprefix("/api/resolve-cache/")))
            elif url.path.startswith(f"/api/datasets/{REPO}/"):
                self.api(url.path.removeprefix(f"/api/datasets/{REPO}/"), parse_qs(url.query))
            elif url.path.startswith(f"/datasets/{REPO}/resolve/"):
                self.resolve(unquote(url.path.removeprefix(f"/datasets/{REPO}/resolve/").partition("/")[2]))
            else:
                self.answer(404, X_Error_Code="RepoNotFound")

    def api(self, path, query):
        kind, _, name = path.partition("/")
        fault = self.hub.fault(kind)
        if fault in ("stall", "headers", "429", "503", "gated", "private"):
            return self.misbehave(fault)
        if kind == "revision":
            if unquote(name) not in self.hub.commits:
                return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"who sends {TOKEN}?")
            siblings = self.hub.files if self.hub.siblings is None else self.hub.siblings
            facts = {"sha": self.hub.commits[unquote(name)], "siblings": [{"rfilename": path} for path in siblings]}
            return self.answer(200, json.dumps(facts).encode())
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "data"}]
        for file, data in self.hub.files.items():
            entries.append({"type": "file", "oid": git_hash(data), "size": len(data), "path": file})
            if file.endswith(".gz"):
                lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                entries[-1] |= {"oid": "1" * 40, "lfs": lfs}
        begin = int(query.get("cursor", ["0"])[0])
        body = json.dumps(entries[begin : begin + 3]).encode()
        following = {"loop": begin, "last": len(entries)}.get(fault, begin + 3)
        # The next page is named at a foreign host: whoever goes there with the token gives it away.
        link = f'<{self.hub.network}/tree?recursive=true&cursor={following}>; rel="next"'
        return self.answer(200, body[:-5] if fault == "half" else body, **({"Link": link} if following < len(entries) else {}))

    def resolve(self, path):
        if (fault := self.hub.fault(f"resolve {path}")) or path not in self.hub.files:
            return self.misbehave(fault or "missing")
        elsewhere = self.hub.network + "/blobs/" if path.endswith(".gz") else "/api/resolve-cache/"
        return self.answer(302, Location=elsewhere + quote(path) + "?signature=1")

    def misbehave(self, fault):
        if fault == "stall":
            self.hub.closing.wait()
        elif fault == "headers":
            self.trickle(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"y" * 10_000)
        elif fault == "429":
            self.answer(429, Retry_After=7)
        elif fault == "429 limit":
            self.answer(429, RateLimit='"resolvers";r=0;t=9')
        elif fault == "gated":
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message=f"{TOKEN} is not on the list")
        elif fault == "private":
            self.answer(401, X_Error_Code="RepoNotFound")
        elif fault == "missing":
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.answer(int(fault), f"you sent {self.headers['Authorization']}".encode())

    def trickle(self, data):
        for place in range(len(data)):
            if self.hub.closing.wait(0.02):
                return
            self.wfile.write(data[place : place + 1])

    def body(self, path):
        """The bytes of a file, or what the script says instead."""
        self.hub.asked.append((self.name, f"body {path}", self.headers["Authorization"], self.headers["Range"]))
        fault, data, ranged = self.hub.fault(path), self.hub.files[path], self.headers["Range"]
        if fault in ("headers", "403", "429", "429 limit", "500", "503"):
            return self.misbehave(fault)
        if fault == "wrong":
            data = bytes(len(data))
        begin, last = (int(word) for word in ranged.split("=")[1].split("-"))
        if fault.startswith("whole"):
            begin, last, ranged = 0, len(data) - 1, None
        if fault == "shifted":
            begin += 1
        body = data[begin : last + 1]
        if fault == "longer":
            body += b"more"
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {begin}-{last}/{len(data)}")
        if fault not in ("nothing", "endless"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "together":
            self.hub.together.wait()
        if fault in ("nothing", "endless"):  # no length is given: the end of the connection is the end of the body
            self.close_connection = True
            while fault == "endless" and not self.hub.closing.wait(0.001):
                self.wfile.write(body + b"more")
            return None
        if fault == "trickle":
            return self.trickle(body)
        if fault in ("stall", "short", "drop", "whole but short"):
            body = body[: -(len(data) // 5)] if "whole" in fault else body[: len(body) // 2]
        if fault == "drip":
            for place in range(0, len(body), 4096):
                if self.hub.closing.wait(0.01):
                    return None
                self.wfile.write(body[place : place + 4096])
            return None
        self.wfile.write(body)
        self.hub.sent[path] = self.hub.sent.get(path, 0) + len(body)
        self.close_connection = "short" in fault or fault == "drop"
        if fault == "drop":  # a reset, not an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault == "stall":
            self.hub.closing.wait()
        return None


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 32

    def shutdown_request(self, request):  # without the polite half-close, which would undo a reset
        self.close_request(request)

    def handle_error(self, *_):
        pass


@pytest.fixture
def web(monkeypatch):
    """A hub at 127.0.0.1 and its delivery network at localhost, on another port."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)  # slow, and nothing here is encrypted
    monkeypatch.setattr(hub, "PAUSE_S", 0.001)
    state = Hub()
    servers = [Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state})) for _ in range(2)]
    state.endpoint = f"http://127.0.0.1:{servers[0].server_port}"
    state.network = f"http://localhost:{servers[1].server_port}"
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    yield state
    state.closing.set()
    state.together.abort()
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()
    assert not state.betrayed, "the delivery network was given the token"


def fetch(web, folder, *patterns, **settings):
    settings = {"token": TOKEN, "endpoint": web.endpoint, "stall_s": 20.0} | settings
    return hub.fetch(REPO, folder, patterns or ("**",), **settings)


def on_disk(folder):
    """The bytes of every file in a folder, without the books of the fetch."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and "franca-hub" not in f.name}


def loaded(web):
    return sorted({path for _, path, _, _ in web.asked if path.startswith("body ")})


def said_nothing_secret(web, folder, *texts):
    everything = [*texts, *(str(f) for f in folder.rglob("*"))]
    return not any(TOKEN in text for text in everything) and not any(TOKEN.encode() in f.read_bytes() for f in files(folder))


def files(folder):
    return [file for file in folder.rglob("*") if file.is_file()]


def test_everything_arrives_to_the_byte_and_once(web, tmp_path, capfd):
    listing = fetch(web, tmp_path)
    assert on_disk(tmp_path) == CONTENTS
    assert listing.repo == REPO
    assert listing.commit == COMMIT
    assert [(file.path, file.size) for file in listing.files] == sorted((path, len(data)) for path, data in CONTENTS.items())
    assert {f.hash for f in listing.files} >= {f"sha256:{hashlib.sha256(CONTENTS[BIG]).hexdigest()}"}
    assert web.sent == {path: len(data) for path, data in CONTENTS.items() if data}
    assert {token for name, _, token, _ in web.asked if name == "hub"} == {f"Bearer {TOKEN}"}
    output = capfd.readouterr()
    assert "100%" in output.err
    assert said_nothing_secret(web, tmp_path, output.out, output.err)
    record = json.loads((tmp_path / hub.RECORD).read_text())
    assert (record["repo"], record["commit"], sorted(record["files"])) == (REPO, COMMIT, sorted(CONTENTS))


def test_only_what_is_missing_or_changed_is_loaded_again(web, tmp_path):
    first = fetch(web, tmp_path)
    web.asked.clear()
    assert fetch(web, tmp_path) == first
    os.utime(tmp_path / BIG, (1, 1))  # another time, the same bytes: read, not loaded
    (tmp_path / hub.RECORD).unlink()  # as after a kill
    assert fetch(web, tmp_path) == first
    assert loaded(web) == []
    path = tmp_path / "other/plain.txt"
    path.write_bytes(bytes(20_000))  # the same size
    (tmp_path / "README.md").write_bytes(b"# A")
    (tmp_path / "data/b.jsonl.gz").unlink()
    fetch(web, tmp_path)
    assert loaded(web) == ["body README.md", "body data/b.jsonl.gz", "body other/plain.txt"]
    assert on_disk(tmp_path) == CONTENTS


@pytest.mark.parametrize(
    "faults",
    [
        ["stall"],
        ["trickle"],
        ["headers"],
        ["drop", "drop", "short"],
        ["429 limit", "429", "500", "503"],
        ["short", "short", "short", "whole but short"],  # with less than was here
        ["short", "shifted"],
        ["wrong"],
        ["short", "longer"],
        ["endless"],
        ["nothing"],
        ["short", "wrong"],
    ],
    ids=lambda faults: ",".join(faults),
)
@pytest.mark.parametrize("path", [BIG, "other/plain.txt"])
def test_it_arrives_whatever_the_line_does(web, tmp_path, faults, path, monkeypatch):
    slow = {"stall", "trickle", "headers"} & set(faults)
    if any(fault.startswith("4") for fault in faults):
        monkeypatch.setattr(hub, "LONGEST_ASKED_S", 0.01)
    web.faults[path] = list(faults)
    fetch(web, tmp_path, path, stall_s=STALL_S if slow else 20.0)
    assert on_disk(tmp_path) == {path: CONTENTS[path]}
    assert web.faults[path] == []


def test_a_signed_link_that_has_run_out_is_asked_for_again(web, tmp_path):
    web.faults[BIG] = ["short", "403"]
    fetch(web, tmp_path, BIG)
    assert on_disk(tmp_path) == {BIG: CONTENTS[BIG]}
    assert len([path for _, path, _, _ in web.asked if path.endswith(f"/resolve/{COMMIT}/{BIG}")]) == 3


def test_what_came_is_never_sent_again(web, tmp_path):
    web.faults[BIG] = ["short", "short", "503", "short"]
    fetch(web, tmp_path, BIG)
    assert web.bodies(BIG) == [0, 300_000, 450_000, 450_000, 525_000]
    assert web.sent[BIG] == 600_000


@pytest.mark.parametrize(("fault", "starts"), [("whole", [0, 300_000]), ("whole but short", [0, 300_000, 480_000])])
def test_a_hub_that_knows_no_ranges_sends_too_much_and_nothing_is_lost(web, tmp_path, fault, starts):
    web.faults[BIG] = ["short", fault]
    fetch(web, tmp_path, BIG)
    assert web.bodies(BIG) == starts
    assert on_disk(tmp_path) == {BIG: CONTENTS[BIG]}


def test_a_slow_line_is_not_a_standing_one(web, tmp_path):
    web.faults[BIG] = ["drip"]  # for longer than `stall_s`
    fetch(web, tmp_path, BIG, stall_s=STALL_S)
    assert web.bodies(BIG) == [0]


def test_a_file_may_come_in_parts(web, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PART_BYTES", 250_000)
    web.faults[BIG] = ["", "short"]
    fetch(web, tmp_path, BIG)
    assert web.bodies(BIG) == [0, 250_000, 375_000]
    assert on_disk(tmp_path) == {BIG: CONTENTS[BIG]}


def test_failures_are_forgiven_while_bytes_come(web, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PROGRESS_BYTES", 10_000)
    web.faults[BIG] = ["short"] * 5  # brings 300,000, then half of it, and so on
    fetch(web, tmp_path, BIG, attempts=2)
    assert on_disk(tmp_path) == {BIG: CONTENTS[BIG]}


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("503", "status 503"),
        ("stall", f"less than 10000 bytes per second in {STALL_S} s"),
        ("drop", ""),
        ("shifted", "status 206"),
        ("nothing", "ended early"),
        ("longer", "more bytes came"),
    ],
)
def test_when_nothing_helps_the_message_says_so_and_the_next_call_goes_on(web, tmp_path, fault, cause, capfd):
    stall_s = STALL_S if fault == "stall" else 20.0
    web.faults[BIG] = ["short", fault, fault]
    with pytest.raises(OSError, match="goes on where it stopped") as failure:
        fetch(web, tmp_path, BIG, attempts=3, stall_s=stall_s)
    partial = next(f for f in files(tmp_path / "data") if f.suffix == ".partial")
    here = partial.stat().st_size
    assert here >= 300_000
    assert CONTENTS[BIG].startswith(partial.read_bytes())
    for words in (REPO, BIG, f"{here:,} bytes are here", "3 failures in a row", cause):
        assert words in str(failure.value)
    assert said_nothing_secret(web, tmp_path, str(failure.value), *capfd.readouterr())
    assert not (tmp_path / hub.RECORD).exists()
    fetch(web, tmp_path, BIG)
    assert web.bodies(BIG)[-1] == here
    assert on_disk(tmp_path) == {BIG: CONTENTS[BIG]}


def test_wrong_bytes_are_never_kept(web, tmp_path):
    for path in (BIG, "README.md"):
        web.faults[path] = ["wrong"] * 2
        with pytest.raises(OSError, match=f"{path} came twice with other bytes"):
            fetch(web, tmp_path, path)
        assert on_disk(tmp_path) == {}
        assert web.bodies(path) == [0, 0]


def test_wrong_bytes_of_an_earlier_call_cost_one_more_load(web, tmp_path):
    web.faults[BIG] = ["short", *["503"] * 2]
    with pytest.raises(OSError, match="goes on"):
        fetch(web, tmp_path, BIG, attempts=3)
    partial = next(f for f in files(tmp_path / "data") if f.suffix == ".partial")
    for spoilt in (bytes(300_000), bytes(700_000)):
        partial.write_bytes(spoilt)
        web.asked.clear()
        fetch(web, tmp_path, BIG)
        assert on_disk(tmp_path) == {BIG: CONTENTS[BIG]}
        assert web.bodies(BIG)[-1] == 0
        (tmp_path / BIG).unlink()


@pytest.mark.parametrize(
    ("fault", "settings", "words"),
    [
        ({"resolve " + BIG: ["gated"]}, {}, ["terms must be accepted", "/datasets/swiss/corpus", "HF_TOKEN", "hf auth login"]),
        ({"resolve " + BIG: ["gated"]}, {"token": None}, ["terms must be accepted", "none was sent"]),
        ({"resolve " + BIG: ["403"]}, {}, ["terms must be accepted", "one was sent"]),
        ({"resolve " + BIG: ["missing"]}, {}, ["there is no", BIG]),
        ({"revision": ["private"]}, {}, ["no such dataset, or it is not for everybody", "HF_TOKEN"]),
        ({"revision": ["gated"]}, {}, ["terms must be accepted"]),
        ({"tree": ["gated"]}, {}, ["terms must be accepted"]),
        ({}, {"revision": "v9"}, ["there is no", "revision/v9"]),
    ],
)
def test_a_refusal_is_one_clear_error_at_once(web, tmp_path, fault, settings, words, monkeypatch, capfd):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    web.faults |= fault
    with pytest.raises(ConfigError) as failure:
        fetch(web, tmp_path, BIG, **settings)
    assert [word for word in words if word not in str(failure.value)] == []
    assert said_nothing_secret(web, tmp_path, str(failure.value), *capfd.readouterr())
    assert len(web.asked) <= 7  # nothing was asked twice


def test_the_users_own_token_is_sent_and_no_token_is_fine(web, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch(web, tmp_path / "own", BIG, token=None)
    assert {token for name, _, token, _ in web.asked if name == "hub"} == {f"Bearer {TOKEN}"}
    monkeypatch.setattr(hub, "get_token", lambda: None)
    web.asked.clear()
    fetch(web, tmp_path / "none", BIG, token=None)
    assert {token for _, _, token, _ in web.asked} == {None}


def test_the_hub_may_say_how_long_to_wait(web, tmp_path, monkeypatch):
    pauses, sleep = [], hub.asyncio.sleep
    monkeypatch.setattr(hub.asyncio, "sleep", lambda pause_s: (pauses.append(pause_s), sleep(0))[1])
    web.faults |= {BIG: ["429", "503", "429 limit"], "tree": ["429"]}
    fetch(web, tmp_path, BIG)
    assert pauses[:2] == [7.0, 7.0]
    assert pauses[2] < 0.01
    assert pauses[3:] == [9.0]


@pytest.mark.parametrize("kind", ["revision", "tree"])
def test_the_list_of_files_arrives_whatever_the_line_does(web, tmp_path, kind):
    web.faults[kind] = ["stall", "503", "headers", *(["half"] if kind == "tree" else [])]
    assert len(fetch(web, tmp_path, stall_s=STALL_S).files) == len(CONTENTS)


@pytest.mark.parametrize(
    ("faults", "words"),
    [(["", "last"], "lacks .*data/deep"), (["", "loop"], "does not go on after"), (["half"] * 9, "the answer is not JSON")],
)
def test_a_part_of_the_list_is_not_taken_for_the_whole(web, tmp_path, faults, words):
    web.faults["tree"] = faults
    with pytest.raises(OSError, match=words):
        fetch(web, tmp_path)
    assert loaded(web) == []


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        *[("**", 7), ("**/*", 7), ("*", 2), ("*/*", 3), ("data/**", 4), ("data/*", 2), ("data/?.jsonl.gz", 2)],
        *[("**/*.jsonl*", 4), ("data/**/[ab].*", 2), ("**/deep/**/*d*", 1), ("**/README.md/**", 1), ("*E.md", 1)],
    ],
)
def test_patterns_are_those_of_a_shell(pattern, count):
    everything = {path: hub.HubFile(path, 0, "") for path in CONTENTS}
    assert len(hub.matching("x", everything, [pattern])) == count
    assert len(hub.matching("x", everything, [pattern, "**"])) == 7


def test_a_pattern_without_a_file_is_refused(web, tmp_path):
    with pytest.raises(ConfigError, match=r"no file matches 'data/\*\.parquet' or 'x'\. Some of its 7 files: \.gitattributes"):
        fetch(web, tmp_path, "data/*.parquet", "**", "x")


@pytest.mark.parametrize("path", ["../evil", "/evil", "data/../../evil", "a//b"])
def test_no_path_leads_out_of_the_folder(web, tmp_path, path):
    web.files[path] = b"x"
    with pytest.raises(ConfigError, match="leads out of the folder"):
        fetch(web, tmp_path / "in")
    assert on_disk(tmp_path) == {}


def test_a_folder_never_mixes_commits_or_repositories(web, tmp_path):
    fetch(web, tmp_path, "data/*")
    fetch(web, tmp_path, "README.md")  # another part of the same commit
    assert len(json.loads((tmp_path / hub.RECORD).read_text())["files"]) == 3
    web.commits |= {"main": LATER, LATER: LATER}
    web.files[BIG] = CONTENTS[BIG][::-1]
    with pytest.raises(ConfigError, match=rf"1 files are of an earlier commit \({BIG}\).*fetch revision {COMMIT}"):
        fetch(web, tmp_path, "README.md")
    web.asked.clear()
    assert fetch(web, tmp_path, "data/*").commit == LATER
    assert loaded(web) == [f"body {BIG}"]
    assert (tmp_path / BIG).read_bytes() == web.files[BIG]
    del web.files["data/b.jsonl.gz"]
    with pytest.raises(ConfigError, match=r"earlier commit \(data/b.jsonl.gz\)"):
        fetch(web, tmp_path)
    (tmp_path / "data/b.jsonl.gz").unlink()
    fetch(web, tmp_path)
    assert on_disk(tmp_path) == web.files
    record = tmp_path / hub.RECORD
    record.write_text(record.read_text().replace(REPO, "another/corpus"))
    with pytest.raises(ConfigError, match=f"holds files of another/corpus. Take another folder for {REPO}"):
        fetch(web, tmp_path)
    record.write_text("{")
    with pytest.raises(ConfigError, match=r"is not JSON .* Remove it"):
        fetch(web, tmp_path)


def test_a_folder_has_one_fetch_at_a_time(web, tmp_path):
    with open(tmp_path / ".franca-hub.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is fetching here"):
            fetch(web, tmp_path)
    assert web.asked == []


def test_files_come_side_by_side(web, tmp_path):
    paths = [BIG, "data/b.jsonl.gz", "other/plain.txt"]
    web.faults |= {path: ["together"] for path in paths}  # each waits until all are asked for
    fetch(web, tmp_path, *paths, workers=3, attempts=1)
    assert on_disk(tmp_path) == {path: CONTENTS[path] for path in paths}


def test_a_killed_fetch_goes_on_where_it_was(web, tmp_path):
    chance = random.Random(5)
    words = f"{REPO!r}, Path({str(tmp_path)!r}), endpoint={web.endpoint!r}, workers=3"
    code = f"from pathlib import Path; from franca.data.hub import fetch; fetch({words})"
    variables = dict(os.environ) | {"HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
    here = 0
    for _ in range(2):
        web.faults[BIG] = ["drip"]
        enough = here + chance.randrange(20_000, 120_000)
        process = subprocess.Popen([sys.executable, "-c", code], env=variables, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while here < enough and process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
            here = sum(f.stat().st_size for f in (tmp_path / "data").glob(".a.*.partial"))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        here = sum(f.stat().st_size for f in (tmp_path / "data").glob(".a.*.partial"))
        assert here >= enough, f"{here} bytes of {enough} came before the kill"
    assert web.bodies(BIG)[0] == 0
    fetch(web, tmp_path)
    assert web.bodies(BIG)[-1] == here
    assert on_disk(tmp_path) == CONTENTS
    assert [len(web.bodies(path)) for path in ("README.md", "other/plain.txt")] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 0}, "attempts and stall_s above 0"),
        ({"patterns": ()}, "attempts and stall_s above 0"),
        ({"endpoint": "huggingface.co"}, "must begin with https://"),
        ({"token": f"{TOKEN}\nx"}, "the token has blanks"),
        ({"repo": "../x"}, "must read owner/name"),
        ({"repo": "a/b/c"}, "must read owner/name"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_asked(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words) as failure:
        hub.fetch(**{"repo": REPO, "folder": tmp_path / "x", "token": TOKEN} | settings)
    assert TOKEN not in str(failure.value)
    assert not (tmp_path / "x").exists()


def test_offline_is_respected(web, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        fetch(web, tmp_path)
    assert web.asked == []


def test_a_dataset_of_the_hub_is_prepared_and_an_interrupted_download_goes_on(web, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", web.endpoint)
    lines = {f"text/{n}.jsonl": b"".join(b'{"text": "document %d of file %d"}\n' % (d, n) for d in range(99)) for n in (0, 1)}
    web.files = lines
    tokenizer = Tokenizer.train(iter(["bytes alone"]), 257)
    (tmp_path / "tokenizer.json").write_text(tokenizer.json)
    sources = {"web": {"hub": REPO, "paths": ["text/*.jsonl"], "exclude": ["text/1.jsonl"]}}
    values = {"output": str(tmp_path / "out"), "sources": sources, "tokenizer": {"path": str(tmp_path / "tokenizer.json")}}
    settings = check(PrepareConfig, values | {"validation_share": 0.0}, "data")
    web.faults["text/0.jsonl"] = ["drop"] * 40
    with pytest.raises(SystemExit) as stopped:
        prepare(settings)
    assert stopped.value.code == EXIT_RESUMABLE
    assert "goes on where it stopped" in capfd.readouterr().err
    web.faults.clear()
    (shard,) = Dataset(prepare(settings)).shards("train", "web")
    assert tokenizer.decode(shard.tokens.tolist()).split("<|endoftext|>")[:-1] == [f"document {d} of file 0" for d in range(99)]
    assert on_disk(tmp_path / "out.download" / REPO) == lines
