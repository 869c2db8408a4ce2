"""`glassgpt download` with the real hub client against a small hub on loopback, each command in a fresh interpreter."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import safetensors.torch
import torch

from glassgpt.config import ModelConfig
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer

TOKEN = "hf_the_right_one"
ALONE = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}


# ---------------------------------------------------------------------- a hub


@dataclass
class Repo:
    """Files of each revision, and who may see them."""

    revisions: dict[str, dict[str, bytes]]
    private: bool = False
    gated: bool = False


class Request(NamedTuple):
    method: str
    path: str
    authorization: str | None


@dataclass
class Hub:
    """What huggingface.co answers to `snapshot_download`; weights come by a redirect to a second server, as from its CDN."""

    repos: dict[str, Repo]
    cut: Literal["", "reset", "stall"] = ""
    """What happens in the middle of a weights file: nothing, the connection is reset, or no more bytes come."""
    requests: list[Request] = field(default_factory=list)
    cdn_requests: list[Request] = field(default_factory=list)
    in_the_middle: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.servers = [_server(self, _Hub), _server(self, _CDN)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def close(self) -> None:
        """Stop answering: later connections are refused."""
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fetched(self) -> set[str]:
        """Names of the files that were asked for."""
        return {r.path.rpartition("/")[2] for r in self.requests if "/resolve/" in r.path and r.method == "GET"}


def _server(hub: Hub, kind: type[_Answers]) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """A client that has gone is no news here."""

    server = Server(("127.0.0.1", 0), type(kind.__name__, (kind,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def log_message(self, *_: object) -> None:
        pass

    def request_line(self) -> Request:
        return Request(self.command, unquote(urlsplit(self.path).path), self.headers.get("Authorization"))

    def reply(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")


class _Hub(_Answers):
    def answer(self) -> None:
        request = self.request_line()
        self.hub.requests.append(request)
        match request.path.strip("/").split("/"):
            case ["api", "models", owner, name, "revision", revision]:
                if files := self.files(f"{owner}/{name}", revision):
                    siblings = [{"rfilename": path} for path in files]
                    self.reply_json({"id": f"{owner}/{name}", "sha": commit_of(files), "siblings": siblings, "tags": []})
            case ["api", "models", owner, name, "tree", revision]:
                if files := self.files(f"{owner}/{name}", revision):
                    self.reply_json([tree_entry(path, content) for path, content in files.items()])
            case [owner, name, "resolve", revision, *parts]:
                if files := self.files(f"{owner}/{name}", revision, contents=True):
                    self.resolve(files, "/".join(parts))
            case ["not", "a", "hub", *_]:
                self.reply(200, b"<html>Welcome to our hotel! Please log in.</html>", Content_Type="text/html")
            case _:
                self.fail(404, "", "Not Found")

    def files(self, repo_id: str, revision: str, contents: bool = False) -> dict[str, bytes] | None:
        """The files of a revision, None when an error has been sent in their place."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        repo = self.hub.repos.get(repo_id)
        if token and token != TOKEN:
            return self.fail(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.private and not token):
            return self.fail(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and contents:
            return self.fail(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        for name, files in repo.revisions.items():
            if revision in (name, commit_of(files)):
                return files
        return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def fail(self, status: int, code: str, message: str) -> None:
        headers = {"X_Error_Code": code} if code else {}
        self.reply(status, json.dumps({"error": message}).encode(), X_Error_Message=message, **headers)

    def resolve(self, files: dict[str, bytes], path: str) -> None:
        commit = {"X_Repo_Commit": commit_of(files)}
        content = files.get(path)
        if content is None:
            self.reply(404, X_Error_Code="EntryNotFound", **commit)
        elif is_large(path):
            sha = hashlib.sha256(content).hexdigest()
            linked = {"X_Linked_Etag": f'"{sha}"', "X_Linked_Size": len(content), "ETag": '"of-the-pointer"'}
            self.reply(302, Location=f"{self.hub.cdn_url}/{sha}", **linked, **commit)
        else:
            self.reply(200, content, ETag=f'"{blob_id(content)}"', **commit)


class _CDN(_Answers):
    def answer(self) -> None:
        request = self.request_line()
        self.hub.cdn_requests.append(request)
        everything = (c for repo in self.hub.repos.values() for files in repo.revisions.values() for c in files.values())
        content = next(c for c in everything if hashlib.sha256(c).hexdigest() == request.path.strip("/"))
        if not self.hub.cut:
            return self.reply(200, content)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.hub.in_the_middle.set()
        if self.hub.cut == "stall":
            self.hub.closing.wait(60)
        else:  # a close without FIN: the client sees "connection reset by peer"
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        return None


def is_large(path: str) -> bool:
    """What the hub keeps in LFS."""
    return path.endswith((".safetensors", ".bin"))


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def blob_id(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if is_large(path):
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry | {"lfs": lfs}
    return entry


# ---------------------------------------------------------------------- what it holds


def make_model(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(ModelConfig(vocab_size=300, context_tokens=32, n_layer=2, n_head=2, width=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


IDS = torch.arange(24).view(2, 12)


def files_of(model: GPT, tokenizer: Tokenizer, folder: Path) -> dict[str, bytes]:
    """A repository as they are: the model in both formats, and files that are not ours to fetch."""
    folder.mkdir()
    weights.save_hf(model, folder, tokenizer.end_id)
    tokenizer.save(folder)
    pickle = io.BytesIO()
    torch.save(weights.hf_tensors(model), pickle)
    others = {"README.md": b"# A model\n", ".gitattributes": b"*.bin filter=lfs\n", "onnx/model.onnx": b"\0" * 100}
    return {p.name: p.read_bytes() for p in folder.iterdir()} | {"pytorch_model.bin": pickle.getvalue()} | others


@pytest.fixture(scope="module")
def files(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(make_model(0), tokenizer, tmp_path_factory.mktemp("source") / "hf")


@contextlib.contextmanager
def running(**repos: Repo) -> Iterator[Hub]:
    hub = Hub({f"acme/{name.replace('_', '-')}": repo for name, repo in repos.items()})
    try:
        yield hub
    finally:
        hub.close()


# ---------------------------------------------------------------------- fresh interpreters

# `python -m glassgpt ...` once for each list of arguments; what each gave is printed as JSON.
SEVERAL = """
import contextlib, io, json, os, runpy, sys, traceback
outcomes = []
for environment, arguments in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(environment)
    sys.argv = ["glassgpt", *arguments]
    code, out, err = None, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module("glassgpt", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
    outcomes.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(outcomes))
"""
# Load by name, save the logits of some ids.
LOAD = """
import sys, safetensors.torch, torch, glassgpt
model, tokenizer = glassgpt.load(sys.argv[1], dtype=None)
with torch.no_grad():
    safetensors.torch.save_file({"logits": model(torch.arange(24).view(2, 12))}, sys.argv[2])
"""


class Outcome(NamedTuple):
    code: int | None
    out: str
    err: str

    def line(self) -> str:
        """The error, which is one line and the last one; the client's warnings may come before it."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        *_, last = self.err.strip().splitlines()
        return last


@dataclass
class Computer:
    """A machine with nothing in its Hugging Face cache."""

    home: Path
    root: Path

    def start(self, arguments: list[str], endpoint: str, **environment: str) -> subprocess.Popen[str]:
        settings = {"HF_HOME": str(self.home), "HF_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env=ALONE | settings | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def python(self, arguments: list[str], endpoint: str, **environment: str) -> Outcome:
        process = self.start(arguments, endpoint, **environment)
        out, err = process.communicate(timeout=120)
        return Outcome(process.returncode, out, err)

    def glassgpt(self, *arguments: str, endpoint: str, **environment: str) -> Outcome:
        return self.python(["-m", "glassgpt", *arguments], endpoint, **environment)

    def logits(self, name: str) -> torch.Tensor:
        """Of the cached model, loaded with the network switched off."""
        path = self.home / "logits.safetensors"
        outcome = self.python(["-c", LOAD, name, str(path)], "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
        assert outcome.code == 0, outcome.err
        return safetensors.torch.load_file(path)["logits"]

    def several(self, endpoint: str, *calls: tuple[dict[str, str], list[str]], **environment: str) -> list[Outcome]:
        outcome = self.python(["-c", SEVERAL, json.dumps(calls)], endpoint, **environment)
        assert outcome.code == 0, outcome.err
        return [Outcome(*x) for x in json.loads(outcome.out)]

    def snapshots(self) -> set[str]:
        """Names of the files that the cache shows, whatever they are."""
        return {path.name for path in self.home.glob("hub/models--*/snapshots/*/**/*") if path.exists()}


@pytest.fixture
def computer(tmp_path: Path, root: Path) -> Computer:
    (tmp_path / "home").mkdir()
    return Computer(tmp_path / "home", root)


@torch.no_grad()
def expected(seed: int) -> torch.Tensor:
    return make_model(seed)(IDS)


# ---------------------------------------------------------------------- the whole way


def test_download_then_work_offline(files: dict[str, bytes], computer: Computer) -> None:
    """A private model with HF_TOKEN; then the hub is gone and generate and load still have every bit of it."""
    with running(tiny_gpt2=Repo({"main": files}, private=True)) as hub:
        done = computer.glassgpt("download", "acme/tiny-gpt2", endpoint=hub.url, HF_TOKEN=TOKEN)
        assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert {r.authorization for r in hub.requests if "acme" in r.path} == {f"Bearer {TOKEN}"}
    assert hub.cdn_requests
    assert {r.authorization for r in hub.cdn_requests} == {None}  # the token stays with the hub
    assert hub.fetched() == {"config.json", "tokenizer.json", "model.safetensors"} - {"model.safetensors"} | {
        r.path.rpartition("/")[2] for r in hub.requests if r.path.endswith("model.safetensors") and r.method == "GET"
    }
    assert computer.snapshots() == {"config.json", "tokenizer.json", "model.safetensors"}  # no pickle, nothing else

    arguments = ["generate", "acme/tiny-gpt2", "the cat", "--max-new-tokens", "3", "--json", "--temperature", "0"]
    text = computer.glassgpt(*arguments, endpoint=hub.url, HF_HUB_OFFLINE="1")
    assert text.code == 0, text.err
    assert len(json.loads(text.out)["completions"][0]["ids"]) == 3
    assert torch.equal(computer.logits("acme/tiny-gpt2"), expected(0))
    folder = re.search(r"is in (\S+)", done.out)
    assert folder
    assert torch.equal(computer.logits(folder.group(1)), expected(0))  # the printed folder is the model too


def test_pickles_only_and_another_revision(files: dict[str, bytes], tokenizer: Tokenizer, computer: Computer) -> None:
    """Pickled weights are fetched when there are no safetensors; --revision fetches what it names."""
    old = {name: content for name, content in files.items() if name != "model.safetensors"}
    new = files_of(make_model(1), tokenizer, computer.home / "new")
    with running(old=Repo({"main": old}), both=Repo({"main": new, "v1": files})) as hub:
        done, tagged, latest = computer.several(
            hub.url,
            ({}, ["download", "acme/old"]),
            ({}, ["download", "acme/both", "--revision", "v1"]),
            ({}, ["download", "acme/both"]),
        )
    assert [done.code, tagged.code, latest.code] == [0, 0, 0], (done, tagged, latest)
    assert "pytorch_model.bin" in hub.fetched() or "pytorch_model.bin" in computer.snapshots()
    assert torch.equal(computer.logits("acme/old"), expected(0))
    assert torch.equal(computer.logits(tagged.out.split(" is in ")[1].strip()), expected(0))
    assert torch.equal(computer.logits("acme/both"), expected(1))


# ---------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def refusals(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, root: Path
) -> Iterator[dict[str, Outcome]]:
    """Every way in which the hub says no, one after the other in one interpreter."""
    llama = files | {"config.json": b'{"model_type": "llama"}'}
    calls: dict[str, tuple[dict[str, str], list[str]]] = {
        "private": ({}, ["download", "acme/private"]),
        "wrong token": ({"HF_TOKEN": "hf_wrong"}, ["download", "acme/private"]),
        "gated": ({"HF_TOKEN": TOKEN}, ["download", "acme/gated"]),
        "unknown": ({}, ["download", "acme/nothing"]),
        "unknown with token": ({"HF_TOKEN": TOKEN}, ["download", "acme/nothing"]),
        "revision": ({}, ["download", "acme/open", "--revision", "v9"]),
        "not an id": ({}, ["download", "a/b/c"]),
        "another kind": ({}, ["download", "acme/llama"]),
        "not downloaded": ({}, ["generate", "acme/open", "the cat"]),
    }
    computer = Computer(tmp_path_factory.mktemp("home"), root)
    repos = {
        "open": Repo({"main": files}),
        "private": Repo({"main": files}, private=True),
        "gated": Repo({"main": files}, gated=True),
        "llama": Repo({"main": llama}),
    }
    with running(**repos) as hub:
        yield dict(zip(calls, computer.several(hub.url, *calls.values()), strict=True))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("private", ["no repository 'acme/private' that you may see", "HF_TOKEN"]),
        ("wrong token", ["acme/private", "Invalid credentials", "HF_TOKEN"]),
        ("gated", ["acme/gated is gated", "accept its terms at http://127.0.0.1"]),
        ("unknown", ["no repository 'acme/nothing'"]),
        ("unknown with token", ["no repository 'acme/nothing'"]),
        ("revision", ["acme/open has no revision 'v9'"]),
        ("not an id", ["'a/b/c' is not a valid hub id"]),
        ("another kind", ["config.json", "model_type 'llama' is not supported"]),
        ("not downloaded", ["no model 'acme/open'", "glassgpt download acme/open"]),
    ],
)
def test_refusal_is_one_line(case: str, said: list[str], refusals: dict[str, Outcome]) -> None:
    """Exit code 2, one line that says what and what to do, no traceback."""
    line = refusals[case].line()
    assert line.startswith("glassgpt ")
    assert all(part in line for part in said), line


def test_nobody_answers(files: dict[str, bytes], computer: Computer) -> None:
    """Connection refused, offline with nothing cached, and a server that is no hub: each says so, none takes long."""
    with running(open=Repo({"main": files})) as hub:
        not_a_hub = computer.start(["-m", "glassgpt", "download", "acme/open"], f"{hub.url}/not/a/hub")
        offline = computer.start(["-m", "glassgpt", "download", "acme/open"], hub.url, HF_HUB_OFFLINE="1")
        outcomes = [Outcome(p.wait(120), *(f.read() for f in (p.stdout, p.stderr) if f)) for p in (not_a_hub, offline)]
        for process in (not_a_hub, offline):
            process.communicate()
        assert "cannot fetch acme/open" in outcomes[0].line()
        assert "HF_HUB_OFFLINE is set" in outcomes[1].line()
        assert not [r for r in hub.requests if r.path.startswith(("/api/models", "/acme"))]
    line = computer.glassgpt("download", "acme/open", endpoint=hub.url).line()
    assert f"cannot fetch acme/open from {hub.url}" in line
    assert "refused" in line


# ---------------------------------------------------------------------- interruptions


def test_interrupted_download(files: dict[str, bytes], computer: Computer) -> None:
    """Cut by the network, then killed, in the middle of the weights: nothing loads; the next download succeeds."""
    with running(tiny=Repo({"main": files})) as hub:
        hub.cut = "reset"
        cut = computer.glassgpt("download", "acme/tiny", endpoint=hub.url)
        assert "cannot fetch acme/tiny" in cut.line()
        assert "model.safetensors" not in computer.snapshots()

        hub.cut = "stall"
        hub.in_the_middle.clear()
        process = computer.start(["-m", "glassgpt", "download", "acme/tiny"], hub.url)
        assert hub.in_the_middle.wait(60)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert "model.safetensors" not in computer.snapshots()

        hub.cut = ""
        generate = ["generate", "acme/tiny", "the cat", "--max-new-tokens", "1"]
        refused, done, written = computer.several(hub.url, ({}, generate), ({}, ["download", "acme/tiny"]), ({}, generate))
    assert "no model 'acme/tiny'" in refused.line()
    assert "complete download" in refused.line()
    assert (done.code, written.code) == (0, 0), (done, written)
    assert torch.equal(computer.logits("acme/tiny"), expected(0))
