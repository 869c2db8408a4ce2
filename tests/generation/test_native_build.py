"""How the kernel library comes to be: found, compiled, kept, refused; and its sources under the sanitizers."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from glassgpt.config import UserError
from glassgpt.config.compute import Compute
from glassgpt.generation.backend import backend
from glassgpt.generation.native import NativeModel, Unavailable, build, library

Compiler = Callable[[str], Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for compiled libraries."""
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GLASSGPT_CXX", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A compiler that writes its command line into each file that it makes; first it runs some lines of a shell script."""

    def make(lines: str) -> Path:
        script = tmp_path / "compiler"
        script.write_text(f'#!/bin/sh\n{lines}\nfor last; do :; done\necho "$@" > "$last"\necho "$@" >> {tmp_path}/asked\n')
        script.chmod(0o755)
        monkeypatch.setenv("GLASSGPT_CXX", str(script))
        return script

    return make


def asked(tmp_path: Path) -> list[str]:
    """The command lines that the compiler has had."""
    return (tmp_path / "asked").read_text().splitlines()


def files(cache: Path) -> list[str]:
    return sorted(os.listdir(cache))


# ---------------------------------------------------------------------- finding it


def test_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler found \(looked for c\+\+, g\+\+, clang\+\+; install one"):
        build.library()
    monkeypatch.setenv("GLASSGPT_CXX", "nosuch++")
    with pytest.raises(Unavailable, match=r"the compiler 'nosuch\+\+' \(GLASSGPT_CXX\) is not there"):
        build.library()
    assert not cache.exists()


def test_what_a_user_reads_without_a_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch computes, with a notice; who insists on the native engine gets one line."""
    from test_native import model_of

    monkeypatch.setenv("PATH", str(tmp_path))
    library._library.cache_clear()
    try:
        assert not isinstance(backend(model_of(), Compute()), NativeModel)
        assert "no C++ compiler found" in capsys.readouterr().err
        with pytest.raises(UserError, match="the native engine cannot be used: no C\\+\\+ compiler found"):
            backend(model_of(), Compute(engine="native"))
    finally:
        library._library.cache_clear()


def test_a_compiler_that_fails(cache: Path, compiler: Compiler) -> None:
    """The first line that says an error is shown, and nothing is left in the folder."""
    compiler("echo 'x.cpp: note: hello' >&2; echo 'x.cpp:3: error: no such header' >&2; exit 1")
    with pytest.raises(Unavailable, match=r"compiler could not compile the kernels: x\.cpp:3: error: no such header"):
        build.library()
    assert files(cache) == []
    compiler("exit 1")
    with pytest.raises(Unavailable, match="could not compile the kernels: no message"):
        build.library()
    script = compiler("")
    script.write_text("no program")
    with pytest.raises(Unavailable, match=r"the compiler .* does not run: Exec format error"):
        build.library()
    assert files(cache) == []


def test_a_linker_that_fails(cache: Path, compiler: Compiler) -> None:
    """Half a library does not stay."""
    compiler('case "$*" in *-shared*) for last; do :; done; echo half > "$last"; exit 1;; esac')
    with pytest.raises(Unavailable, match="no message"):
        build.library()
    assert files(cache) == []


def test_a_folder_that_cannot_be_made(cache: Path, compiler: Compiler) -> None:
    compiler("")
    cache.write_text("a file")
    with pytest.raises(Unavailable, match=r"cannot write to .*cache \(File exists; GLASSGPT_CACHE names another folder\)"):
        build.library()


# ---------------------------------------------------------------------- what it is asked


@pytest.mark.parametrize("unknown", [None, "-mamx-tile", "-mavxvnni", "-mavx512f"])
def test_instruction_sets_that_the_compiler_does_not_know(
    cache: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: str | None
) -> None:
    """Are left out of the library, and dispatch is told."""
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    compiler(f'case "$*" in *{unknown}*) exit 1;; esac')
    build.library()
    there = [name for name, flags in build.INSTRUCTION_SETS.items() if unknown not in flags]
    assert len(there) == {None: 6, "-mamx-tile": 5, "-mavxvnni": 5, "-mavx512f": 3}[unknown]
    (dispatch,) = [line for line in asked(tmp_path) if "dispatch.cpp" in line]
    (link,) = [line for line in asked(tmp_path) if "-shared" in line]
    for name in build.INSTRUCTION_SETS:
        assert (f"-DGG_HAS_{name.upper()} " in dispatch) == (f"kernels-{name}.o" in link) == (name in there)
    assert all(f"/{name}.o" in link for name in ("engine", "matrix", "draw", "dispatch"))


def test_other_processors(cache: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the portable kernels alone, without which there is no library."""
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    compiler("")
    build.library()
    assert len(asked(tmp_path)) == 6  # portable kernels, engine, matrix, draw, dispatch, the library
    assert not any("-mavx" in line for line in asked(tmp_path))
    compiler('case "$*" in *GG_ISA=portable*) echo "error: broken" >&2; exit 1;; esac')
    with pytest.raises(Unavailable, match="error: broken"):
        build.library()


# ---------------------------------------------------------------------- keeping it


def test_it_is_compiled_once(cache: Path, compiler: Compiler, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiler("")
    path = build.library()
    assert files(cache) == [path.name]
    assert "compiling the native kernels, once" in capsys.readouterr().err
    lines = asked(tmp_path)
    assert build.library() == path
    assert (asked(tmp_path), capsys.readouterr().err) == (lines, "")


def test_what_changes_it(cache: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources, the flags, the compiler, each alone."""
    compiler("")
    paths = [build.library(), build.library(flags=["-O1"])]
    sources = tmp_path / "src"
    sources.mkdir()
    for path in build.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.library() == paths[0]
    (sources / "simd.h").write_text((sources / "simd.h").read_text() + "// changed")
    paths.append(build.library())
    compiler("true  # another one")
    paths.append(build.library())
    assert len(set(paths)) == 4 and files(cache) == sorted(path.name for path in paths)


@pytest.mark.parametrize("size", [0, 10, None])
def test_a_damaged_file_is_made_again(cache: Path, compiler: Compiler, size: int | None) -> None:
    compiler("")
    path = build.library()
    whole = path.read_bytes()
    damaged = whole.replace(b"shared", b"sharks") if size is None else whole[:size]
    path.write_bytes(damaged)
    again = build.library()
    assert again.read_bytes() not in (whole, damaged)  # each of these "libraries" names the folder in which it was made
    assert build.library() == again


def test_several_at_once(cache: Path, compiler: Compiler) -> None:
    """Each has a whole library, and nothing else is left."""
    compiler("")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = [job.result() for job in [pool.submit(build.library) for _ in range(4)]]
    assert all(build._is_whole(path) for path in paths)
    assert files(cache) == sorted({path.name for path in paths})


def test_a_file_that_is_no_library(cache: Path, compiler: Compiler) -> None:
    compiler("")
    with pytest.raises(Unavailable, match=r"the compiled kernels .* do not load"):
        library.opened(str(build.library()))


# ---------------------------------------------------------------------- with the real compiler


@pytest.fixture
def real() -> str:
    """The system's compiler."""
    try:
        return build.find_compiler()
    except Unavailable as error:
        pytest.skip(f"the native engine cannot be compiled: {error}")


@pytest.mark.slow
def test_a_compiler_that_knows_few_instructions(cache: Path, real: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a library that works, with the portable kernels."""
    script = tmp_path / "old"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-mavx*) exit 1;; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("GLASSGPT_CXX", str(script))
    found = library.opened(str(build.library(flags=["-O0"])))
    assert found.glass_kernels() == b"portable"


DRIVER = Path(__file__).parent / "native_driver.cpp"


@pytest.mark.slow
@pytest.mark.parametrize("checks", ["address,undefined", "thread"])
def test_sanitizers(real: str, tmp_path: Path, checks: str) -> None:
    """No read or write beside what is owned, no undefined arithmetic, no race; and the same bits for any batch and threads."""
    sets = ["portable", *[name for name in library.kernels() if name != "portable"][:1]]
    common = [real, "-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={checks}", "-fno-sanitize-recover=all"]

    def kernels(name: str) -> str:
        flags = [*build.KERNELS, *build.INSTRUCTION_SETS[name], f"-DGG_ISA={name}", f'-DGG_NAME="{name}"']
        out = str(tmp_path / f"{name}.o")
        subprocess.run([*common, *flags, "-c", str(build.SOURCES / "kernels.cpp"), "-o", out], check=True)
        return out

    with concurrent.futures.ThreadPoolExecutor() as pool:
        objects = list(pool.map(kernels, sets))
    has = [f"-DGG_HAS_{name.upper()}" for name in sets]
    sources = [str(build.SOURCES / f"{name}.cpp") for name in ("engine", "matrix", "draw", "dispatch")]
    program = str(tmp_path / "driver")
    subprocess.run([*common, *has, f"-I{build.SOURCES}", *sources, str(DRIVER), *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == set(sets)
