"""`hf:` sources with the real `datasets`: folders of this machine, and a small hub on loopback. HF_* are read at import, so
everything runs in fresh interpreters."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import ALONE, TOKEN, Answers, serve

from glassgpt.config import UserError
from glassgpt.data import documents

NOBODY = "http://127.0.0.1:9"
# Reads each source; prints its documents or its error as a line of JSON, and at last the hosts that were looked up.
READ = """
import json, socket, sys, time
hosts, lookup = set(), socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **named: (hosts.add(str(host)), lookup(host, *rest, **named))[1]
time.sleep = lambda seconds: None  # the hub's client waits 23 s in all for a network that is gone
from glassgpt.config import UserError
from glassgpt.data import documents
for source in sys.argv[1:]:
    texts, error = [], None
    try:
        texts.extend(documents([source]))
    except UserError as caught:
        error = str(caught)
    print(json.dumps([texts, error]))
print(json.dumps(sorted(hosts)))
"""


class Read(NamedTuple):
    found: dict[str, tuple[list[str], str | None]]
    hosts: list[str]

    def texts(self, source: str) -> list[str]:
        texts, error = self.found[source]
        assert error is None
        return texts

    def error(self, source: str) -> str:
        error = self.found[source][1]
        assert error is not None
        assert "\n" not in error
        assert error.startswith(f"{source}")
        return error


def read(home: Path, *given: str, endpoint: str = NOBODY, **environment: str) -> Read:
    root = Path(__file__).resolve().parents[2]
    settings = {"HF_HOME": str(home / "hf"), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(root), "HOME": str(home)}
    command = [sys.executable, "-c", READ, *given]
    done = subprocess.run(command, cwd=home, env=ALONE | settings | environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *found, hosts = map(json.loads, done.stdout.splitlines())
    return Read(dict(zip(given, found, strict=True)), hosts)


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


# ---------------------------------------------------------------------- the grammar


@pytest.mark.parametrize(
    "source",
    [
        "hf:",
        "hf:name",
        "hf:a/b/c",
        "hf:a/b:",
        "hf:a/b@",
        "hf:a/b:train:test",
        "hf:a/b:train[:10]",
        "hf:a/b:test@x",
        "hf:-/b",
        "hf://datasets/a/b",
    ],
)
def test_what_is_no_source_is_told_the_grammar(source: str) -> None:
    with pytest.raises(UserError, match=r"expected hf:OWNER/NAME\[@CONFIG\]\[:SPLIT\]") as caught:
        list(documents([source]))
    assert str(caught.value).startswith(source)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"hf:\./nowhere:train: no folder /"):
        list(documents(["hf:./nowhere:train"]))


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as an import of a package that is not there
    for source in ("hf:acme/tales", f"hf:{tmp_path}"):
        with pytest.raises(UserError, match=r"reading it needs datasets .*pip install 'glassgpt\[data\]'"):
            list(documents([source]))


# ---------------------------------------------------------------------- folders of this machine


def test_local_folders(tmp_path: Path) -> None:
    configs = b"".join(b"- config_name: %s\n  data_files: %s.jsonl\n" % pair for pair in ((b"en", b"en"), (b"vi.x", b"vi")))
    files = {
        "tales/train-0.parquet": parquet(text=["một", "hai"], n=[1, 2]),
        "tales/train-1.parquet": parquet(text=[" ", "ba"], n=[3, 4]),
        "tales/test.parquet": parquet(text=["bốn"], n=[5]),
        "lines/train.jsonl": b'{"text": "x"}\n{"text": "y\\n<|endoftext|>z", "n": 3}\n',
        "lines/validation.jsonl": b'{"text": "ok"}\n{"text": null}\n',
        "body/train.parquet": parquet(body=["x"], n=[1]),
        "bodies/train.jsonl": b'{"body": "x"}\n',
        "numbers/train.parquet": parquet(text=[1]),
        "broken/train.parquet": b"PAR1 nothing more",
        "pictures/readme.xyz": b"",
        "acme/tales/train.parquet": parquet(text=["a folder called like a dataset"]),
        "two/README.md": b"---\nconfigs:\n" + configs + b"---\n",
        "two/en.jsonl": b'{"text": "one"}\n',
        "two/vi.jsonl": b'{"text": "m\xe1\xbb\x99t"}\n',
        "empty/.keep": b"",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    whole = f"hf:{tmp_path}/tales:test"
    texts = {
        "hf:./tales": ["một", "hai", "ba"],
        "hf:~/tales": ["một", "hai", "ba"],
        "hf:../" + tmp_path.name + "/tales:train": ["một", "hai", "ba"],
        whole: ["bốn"],
        "hf:./lines": ["x", "y\n<|endoftext|>z"],
        "hf:./two@en": ["one"],
        "hf:./two@vi.x:train": ["một"],
    }
    errors = {
        "hf:./tales:dev": ["no split 'dev'; it has train, test"],
        "hf:./lines:validation": ["row 2: expected a string in `text`; got null"],
        "hf:./body": ["no column `text`; its columns are body, n"],
        "hf:./bodies": ["no column `text`; its columns are body"],
        "hf:./numbers": ["row 1: expected a string in `text`; got int 1"],
        "hf:./broken": ["cannot read any of it", "Parquet magic bytes not found"],
        "hf:./pictures": ["cannot read any of it", "No (supported) data files"],
        "hf:./empty": ["cannot read any of it"],
        "hf:./two": ["Config name is missing", "'en', 'vi.x'", "hf:OWNER/NAME[@CONFIG][:SPLIT]"],
        "hf:./two@de": ["'de' not found", "'en', 'vi.x'"],
    }
    done = read(tmp_path, *texts, *errors)
    assert {source: done.texts(source) for source in texts} == texts
    for source, parts in errors.items():
        assert all(part in done.error(source) for part in parts), done.error(source)
    assert done.found["hf:./lines:validation"][0] == ["ok"]
    assert done.hosts == []  # nothing of this is the network's business


# ---------------------------------------------------------------------- a hub

COMMIT = "a" * 40


class Hub(Answers):
    """What huggingface.co answers to `datasets`; of one repository, acme/tales, and acme/closed for those with a token."""

    files: dict[str, bytes]
    paths: list[str]

    def reply(self, status: int, body: bytes = b"", **headers: object) -> None:
        super().reply(status, body, **{"X_Repo_Commit": COMMIT, **headers})

    def answer(self) -> None:
        path = self.asked_path().strip("/")
        self.paths.append(path)
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        match path.removeprefix("api/").split("/"):
            case ["datasets", "acme", name, *rest] if name == "tales" or (name == "closed" and is_known):
                self.of_repository(f"acme/{name}", rest)
            case _:
                self.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def of_repository(self, name: str, rest: list[str]) -> None:
        match rest:
            case ["resolve", _, *parts] if content := self.files.get("/".join(parts)):
                tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept_Ranges": "bytes"}
                if wanted := self.headers.get("Range"):
                    first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
                    piece = content[first : last + 1]
                    shown = f"bytes {first}-{first + len(piece) - 1}/{len(content)}"
                    self.reply(206, piece, Content_Range=shown, **tag)
                else:
                    self.reply(200, content, **tag)
            case ["resolve", *_]:
                self.reply(404, X_Error_Code="EntryNotFound")
            case ["tree", _, *folder]:
                self.reply_json(self.entries("/".join(folder)))
            case _:
                facts = {"id": name, "sha": COMMIT, "tags": []}
                self.reply_json(facts | {"siblings": [{"rfilename": path} for path in self.files]})

    def entries(self, folder: str) -> list[dict[str, object]]:
        """Files and folders directly inside a folder."""
        start = f"{folder}/" if folder else ""
        inside = {path.removeprefix(start): content for path, content in self.files.items() if path.startswith(start)}
        folders = {path.partition("/")[0] for path in inside if "/" in path}
        return [
            {"type": "directory", "path": start + path, "oid": "0" * 40, "size": 0} for path in sorted(folders)
        ] + [
            {"type": "file", "path": start + path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
            for path, content in inside.items()
            if "/" not in path
        ]  # fmt: skip


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """(endpoint, paths that were asked for)"""
    texts = [f"tale {n}" for n in range(1000)]
    files = {
        "README.md": b"# Tales\n",
        "data/train-00000-of-00002.parquet": parquet(text=texts, n=range(1000)),
        "data/train-00001-of-00002.parquet": parquet(text=["last"], n=[0]),
        "data/test-00000-of-00001.parquet": parquet(text=["a test"], n=[0]),
    }
    paths: list[str] = []
    server = serve(Hub, files=files, paths=paths)
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


def test_a_dataset_of_the_hub(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, paths = hub
    (tmp_path / "acme" / "tales").mkdir(parents=True)  # a folder called like a dataset is not the dataset
    (tmp_path / "acme" / "tales" / "train.jsonl").write_text('{"text": "not this one"}\n')
    good = ("hf:acme/tales", "hf:acme/tales:test", "hf:acme/closed@default:test")
    bad = ("hf:acme/tales:dev", "hf:acme/tales@big", "hf:acme/nothing")
    done = read(tmp_path, *good, *bad, endpoint=endpoint, HF_TOKEN=TOKEN)
    assert done.texts(good[0]) == [*(f"tale {n}" for n in range(1000)), "last"]
    assert done.texts(good[1]) == done.texts(good[2]) == ["a test"]
    assert "no split 'dev'; it has train, test" in done.error(bad[0]) or "it has test, train" in done.error(bad[0])
    assert "'big' not found. Available: ['default']" in done.error(bad[1])
    assert f"{endpoint} has no such dataset that you may see" in done.error(bad[2])
    # No download is counted at S3 and nothing but the dataset is asked for; datasets-server is the hub's own description.
    assert set(done.hosts) <= {"127.0.0.1", "datasets-server.127.0.0.1"}
    assert {path for path in paths if "datasets/acme/" not in path} == set()


def test_a_closed_dataset_without_a_token(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    assert "a private or gated one needs HF_TOKEN" in read(tmp_path, "hf:acme/closed", endpoint=hub[0]).error("hf:acme/closed")


def test_no_network(tmp_path: Path) -> None:
    error = read(tmp_path, "hf:acme/tales").error("hf:acme/tales")
    assert f"cannot reach {NOBODY}" in error
    assert "check the network" in error


def test_offline(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, paths = hub
    done = read(tmp_path, "hf:acme/tales", endpoint=endpoint, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in done.error("hf:acme/tales")
    assert (paths, done.hosts) == ([], [])
