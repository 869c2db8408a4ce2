"""`glassgpt download` with the real hub client against a small hub on loopback, each command in a fresh interpreter."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import safetensors.torch
import torch
from loopback import ALONE, TOKEN, Answers, serve

from glassgpt.config import ModelConfig
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer

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
    """What huggingface.co answers to `snapshot_download`; weights come by a redirect to a second server, its CDN."""

    repos: dict[str, Repo]
    cut: Literal["", "reset", "stall"] = ""
    """What happens in the middle of a weights file: nothing, the connection is reset, or no more bytes come."""
    requests: list[Request] = field(default_factory=list)
    cdn_requests: list[Request] = field(default_factory=list)
    in_the_middle: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.servers = [serve(_Hub, hub=self), serve(_CDN, hub=self)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def close(self) -> None:
        """Stop answering: later connections are refused."""
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()


class _OfHub(Answers):
    hub: Hub

    def request_line(self) -> Request:
        return Request(self.command, self.asked_path(), self.headers.get("Authorization"))


class _Hub(_OfHub):
    def answer(self) -> None:
        request = self.request_line()
        self.hub.requests.append(request)
        match request.path.strip("/").split("/"):
            case ["api", "models", owner, name, "revision", revision]:
                if files := self.files(f"{owner}/{name}", revision):
                    facts = {"id": f"{owner}/{name}", "sha": commit_of(files), "tags": []}
                    self.reply_json(facts | {"siblings": [{"rfilename": path} for path in files]})
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


class _CDN(_OfHub):
    def answer(self) -> None:
        request = self.request_line()
        self.hub.cdn_requests.append(request)
        revisions = (files for repo in self.hub.repos.values() for files in repo.revisions.values())
        held = {hashlib.sha256(content).hexdigest(): content for files in revisions for content in files.values()}
        content = held[request.path.strip("/")]
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


# ---------------------------------------------------------------------- fresh processes

# Reads jobs from stdin and runs each in a fork of itself; for each it prints the fork's process id, then how it ended.
# Everything heavy is imported before the fork; the hub's client, which reads HF_* when it is imported, is not.
WARM = """
import contextlib, json, os, runpy, sys, traceback
import filelock, torch, tqdm.auto, tyro, yaml, glassgpt.generation.writer
with contextlib.suppress(ImportError):  # older clients use httpx
    import httpx2
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    environment, arguments, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.environ.update(environment)
        code, sys.argv = 1, arguments
        try:
            if arguments[0] == "-c":
                exec(arguments[1])
            else:
                runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Load a model by name, save the logits of some ids.
LOAD = """
import sys, safetensors.torch, torch, glassgpt
model, tokenizer = glassgpt.load(sys.argv[2], dtype=None)
with torch.no_grad():
    safetensors.torch.save_file({"logits": model(torch.arange(24).view(2, 12))}, sys.argv[3])
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def line(self) -> str:
        """The error, which is one line and the last one; the client's warnings may come before it."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        *_, last = self.err.strip().splitlines()
        return last


@pytest.fixture(scope="module")
def warm(root: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WARM]
    with subprocess.Popen(
        command, cwd=root, env=ALONE, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield process
        process.communicate()


@dataclass
class Computer:
    """A machine with nothing in its Hugging Face cache."""

    home: Path
    warm: subprocess.Popen[str]
    jobs: int = 0

    def settings(self, endpoint: str) -> dict[str, str]:
        return {"HF_HOME": str(self.home / "hf"), "HF_ENDPOINT": endpoint}

    def start(self, arguments: list[str], endpoint: str, **environment: str) -> int:
        """Start `python -m ARGUMENTS` (or `-c ...`); returns its process id. `end` waits for it."""
        self.jobs += 1
        job = [self.settings(endpoint) | environment, arguments, *map(str, self._outputs())]
        assert self.warm.stdin
        assert self.warm.stdout
        print(json.dumps(job), file=self.warm.stdin, flush=True)
        return int(self.warm.stdout.readline())

    def _outputs(self) -> tuple[Path, Path]:
        return self.home / f"{self.jobs}.out", self.home / f"{self.jobs}.err"

    def end(self) -> Outcome:
        assert self.warm.stdout
        code = int(self.warm.stdout.readline())
        return Outcome(code, *(path.read_text() for path in self._outputs()))

    def glassgpt(self, *arguments: str, endpoint: str, **environment: str) -> Outcome:
        self.start(["glassgpt", *arguments], endpoint, **environment)
        return self.end()

    def logits(self, name: str) -> torch.Tensor:
        """Of the cached model, loaded with the network switched off."""
        path = self.home / "logits.safetensors"
        self.start(["-c", LOAD, name, str(path)], "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
        outcome = self.end()
        assert outcome.code == 0, outcome.err
        return safetensors.torch.load_file(path)["logits"]

    def cached(self, repo_id: str) -> set[str]:
        """Names of the files that the cache shows of a repository."""
        folder = self.home / "hf" / "hub" / f"models--{repo_id.replace('/', '--')}" / "snapshots"
        return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def computer(tmp_path: Path, warm: subprocess.Popen[str]) -> Computer:
    return Computer(tmp_path, warm)


@torch.no_grad()
def expected(seed: int) -> torch.Tensor:
    return make_model(seed)(IDS)


# ---------------------------------------------------------------------- the whole way

WANTED = {"config.json", "tokenizer.json", "model.safetensors"}


def test_download_then_work_offline(files: dict[str, bytes], computer: Computer, root: Path) -> None:
    """A private model with HF_TOKEN; then the hub is gone and generate and load still have every bit of it."""
    with running(tiny_gpt2=Repo({"main": files}, private=True)) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "glassgpt", "download", "acme/tiny-gpt2"],
            cwd=root,
            env=ALONE | computer.settings(hub.url) | {"HF_TOKEN": TOKEN},
            text=True,
            capture_output=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert {r.authorization for r in hub.requests if "acme" in r.path} == {f"Bearer {TOKEN}"}
    assert [r.authorization for r in hub.cdn_requests] == [None]  # one large file; the token stays with the hub
    assert computer.cached("acme/tiny-gpt2") == WANTED  # no pickle, nothing else

    arguments = ["generate", "acme/tiny-gpt2", "the cat", "--max-new-tokens", "3", "--json", "--temperature", "0"]
    text = computer.glassgpt(*arguments, endpoint=hub.url, HF_HUB_OFFLINE="1")
    assert text.code == 0, text.err
    assert len(json.loads(text.out)["completions"][0]["ids"]) == 3
    assert torch.equal(computer.logits("acme/tiny-gpt2"), expected(0))
    printed = done.stdout.partition(" is in ")[2].strip()
    assert torch.equal(computer.logits(printed), expected(0))  # the folder it names is the model too


def test_pickles_when_there_is_nothing_else(files: dict[str, bytes], computer: Computer) -> None:
    old = {name: content for name, content in files.items() if name != "model.safetensors"}
    with running(old=Repo({"main": old})) as hub:
        done = computer.glassgpt("download", "acme/old", endpoint=hub.url)
    assert done.code == 0, done.err
    assert computer.cached("acme/old") == WANTED - {"model.safetensors"} | {"pytorch_model.bin"}
    assert torch.equal(computer.logits("acme/old"), expected(0))


def test_revision(files: dict[str, bytes], tokenizer: Tokenizer, computer: Computer) -> None:
    """--revision fetches what it names; the newest is another download."""
    new = files_of(make_model(1), tokenizer, computer.home / "new")
    with running(both=Repo({"main": new, "v1": files})) as hub:
        tagged = computer.glassgpt("download", "acme/both", "--revision", "v1", endpoint=hub.url)
        latest = computer.glassgpt("download", "acme/both", endpoint=hub.url)
    assert (tagged.code, latest.code) == (0, 0), (tagged, latest)
    assert torch.equal(computer.logits(tagged.out.partition(" is in ")[2].strip()), expected(0))
    assert torch.equal(computer.logits("acme/both"), expected(1))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("token", "arguments", "said"),
    [
        ("", ["download", "acme/private"], ["no repository 'acme/private' that you may see", "HF_TOKEN"]),
        ("hf_wrong", ["download", "acme/private"], ["does not accept your token", "Invalid credentials", "HF_TOKEN"]),
        (TOKEN, ["download", "acme/gated"], ["acme/gated is gated", "accept its terms at http://127.0.0.1"]),
        ("", ["download", "acme/nothing"], ["no repository 'acme/nothing'"]),
        (TOKEN, ["download", "acme/nothing"], ["no repository 'acme/nothing'"]),
        ("", ["download", "acme/open", "--revision", "v9"], ["acme/open has no revision 'v9'"]),
        ("", ["download", "a/b/c"], ["'a/b/c' is not a valid hub id"]),
        ("", ["download", "acme/falcon"], ["config.json", "model_type 'falcon' is not supported"]),
        ("", ["generate", "acme/open", "the cat"], ["no model 'acme/open'", "glassgpt download acme/open"]),
    ],
)
def test_refusal_is_one_line(
    token: str, arguments: list[str], said: list[str], files: dict[str, bytes], computer: Computer
) -> None:
    """Exit code 2, one line that says what and what to do, no traceback."""
    repos = {
        "open": Repo({"main": files}),
        "private": Repo({"main": files}, private=True),
        "gated": Repo({"main": files}, gated=True),
        "falcon": Repo({"main": files | {"config.json": b'{"model_type": "falcon"}'}}),
    }
    with running(**repos) as hub:
        line = computer.glassgpt(*arguments, endpoint=hub.url, HF_TOKEN=token).line()
    assert line.startswith(f"glassgpt {arguments[0]}: error: ")
    assert all(part in line for part in said), line


def test_connection_refused(computer: Computer) -> None:
    with running() as hub:
        pass
    line = computer.glassgpt("download", "acme/open", endpoint=hub.url).line()
    assert f"cannot fetch acme/open from {hub.url}" in line
    assert "refused" in line


def test_server_that_is_no_hub(computer: Computer) -> None:
    """A hotel's login page answers everything with 200."""
    with running() as hub:
        line = computer.glassgpt("download", "acme/open", endpoint=f"{hub.url}/not/a/hub").line()
    assert f"cannot fetch acme/open from {hub.url}/not/a/hub" in line


def test_offline_with_nothing_cached(files: dict[str, bytes], computer: Computer) -> None:
    """HF_HUB_OFFLINE is named as the reason, and nothing is sent to the hub, although it would answer."""
    with running(open=Repo({"main": files})) as hub:
        line = computer.glassgpt("download", "acme/open", endpoint=hub.url, HF_HUB_OFFLINE="1").line()
    assert "HF_HUB_OFFLINE is set" in line
    assert not hub.requests


# ---------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("weights_file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("cut", ["reset", "stall"])
def test_interrupted_download(
    cut: Literal["reset", "stall"], weights_file: str, files: dict[str, bytes], computer: Computer
) -> None:
    """Cut by the network, or killed, in the middle of the weights: nothing loads, and the next download succeeds."""
    held = {name: content for name, content in files.items() if name in WANTED - {"model.safetensors"} | {weights_file}}
    generate = ["generate", "acme/tiny", "the cat", "--max-new-tokens", "1"]
    with running(tiny=Repo({"main": held})) as hub:
        hub.cut = cut
        process = computer.start(["glassgpt", "download", "acme/tiny"], hub.url)
        assert hub.in_the_middle.wait(60)
        if cut == "stall":
            os.kill(process, signal.SIGKILL)
            assert computer.end().code == -signal.SIGKILL
        else:
            assert "cannot fetch acme/tiny" in computer.end().line()
        assert weights_file not in computer.cached("acme/tiny")
        refused = computer.glassgpt(*generate, endpoint=hub.url)
        assert "glassgpt download acme/tiny" in refused.line()

        hub.cut = ""
        done = computer.glassgpt("download", "acme/tiny", endpoint=hub.url)
        assert done.code == 0, done.err
    assert torch.equal(computer.logits("acme/tiny"), expected(0))
