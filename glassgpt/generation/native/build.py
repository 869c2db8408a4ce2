"""The kernel library: compiled by the system's C++ compiler when it is first needed, and kept."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from glassgpt.config import UserError

SOURCES = Path(__file__).parent / "src"
LEFT_SECONDS = 3600
COMPILERS = ("c++", "g++", "clang++")
COMMON = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"]
KERNELS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma", "-DGG_AVX2"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mprefer-vector-width=512"]
AVX512 += ["-mtune=icelake-server"]  # else GCC keeps addresses in vector registers; weights then wait outside them
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni", "-DGG_VNNI"],
    "avx512": [*AVX512, "-DGG_AVX512", "-DGG_VNNI"],
    "avx512bf16": [*AVX512, "-mavx512bf16", "-DGG_AVX512", "-DGG_VNNI", "-DGG_BF16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-DGG_AVX512", "-DGG_VNNI", "-DGG_BF16", "-DGG_AMX"],
}
"""One library of kernels each, all in one file: which one runs is decided by the processor (dispatch.cpp). On other processors
than x86-64 there is the portable one alone."""


class Unavailable(Exception):  # noqa: N818
    """The native library cannot be used here; the message says why. PyTorch computes instead."""


def library(compiler: str | None = None, flags: list[str] | None = None) -> Path:
    """The compiled library; it is made when these sources have not yet been compiled by this compiler with these flags.

    GLASSGPT_CXX names another compiler, GLASSGPT_CACHE another folder than ~/.cache/glassgpt. Raises Unavailable when there is
    no compiler, or when it fails.
    """
    compiler = compiler or find_compiler()
    flags = flags or []
    name = f"glassgpt-{_key(compiler, flags)}"
    for path in cache_folder().glob(f"{name}-*.so"):
        if _is_whole(path):
            return path
    print("glassgpt: compiling the native kernels, once (about half a minute) ...", file=sys.stderr)
    return build(cache_folder(), name, compiler, flags)


def find_compiler() -> str:
    """The C++ compiler's path."""
    if name := os.environ.get("GLASSGPT_CXX"):
        if found := shutil.which(name):
            return found
        raise Unavailable(f"the compiler {name!r} (GLASSGPT_CXX) is not there")
    for name in COMPILERS:
        if found := shutil.which(name):
            return found
    raise Unavailable(f"no C++ compiler found (looked for {', '.join(COMPILERS)}; install one, e.g. apt install g++)")


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    if folder := os.environ.get("GLASSGPT_CACHE"):
        return Path(folder).expanduser().absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "glassgpt"
    except RuntimeError as error:
        raise Unavailable("there is no home folder to keep the kernels in; GLASSGPT_CACHE names a folder") from error


def build(folder: Path, name: str, compiler: str, flags: list[str]) -> Path:
    """Compile the library to a file in `folder`, which appears complete or not at all: `name` and the digest of what is in it."""
    sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"portable": []}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("tmp*"):  # by a build that was killed
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        work = tempfile.mkdtemp(dir=folder)
    except OSError as error:
        raise Unavailable(f"cannot write to {folder} ({error.strerror}; GLASSGPT_CACHE names another folder)") from error

    def compiled(name: str, *arguments: str) -> str:
        out = f"{work}/{name}.o"
        _run([compiler, *COMMON, *flags, "-c", *arguments, "-o", out])
        return out

    def kernels(name: str) -> str | None:
        """One set's, or None where this compiler does not know it."""
        try:
            return compiled(
                f"kernels-{name}", *KERNELS, *sets[name], f"-DGG_ISA={name}", f'-DGG_NAME="{name}"', str(SOURCES / "kernels.cpp")
            )
        except Unavailable:
            if name == "portable":
                raise
            return None

    try:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            rest = [pool.submit(compiled, name, str(SOURCES / f"{name}.cpp")) for name in ("engine", "matrix", "draw")]
            found = dict(zip(sets, pool.map(kernels, sets), strict=True))
            has = [f"-DGG_HAS_{name.upper()}" for name, out in found.items() if out]
            objects = [out for out in found.values() if out] + [job.result() for job in rest]
            objects.append(compiled("dispatch", *has, str(SOURCES / "dispatch.cpp")))
        whole = Path(work) / "whole.so"
        _run([compiler, "-shared", "-pthread", *flags, *objects, "-o", str(whole)])
        path = folder / f"{name}-{_digest(whole)}.so"
        os.replace(whole, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    """Whether a library is still what was compiled: half a file would end the process when it is opened."""
    try:
        return path.stem.endswith(_digest(path))
    except OSError:
        return False


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"the compiler {command[0]} does not run: {error.strerror}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise Unavailable(f"{command[0]} could not compile the kernels: {lines[0].strip()}")


def _key(compiler: str, flags: list[str]) -> str:
    """Changes with the sources, the compiler and the flags."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    try:
        stamp = os.stat(compiler)
    except OSError as error:
        raise UserError(f"the compiler {compiler} cannot be read: {error.strerror}") from error
    digest.update(
        repr((os.path.realpath(compiler), stamp.st_size, int(stamp.st_mtime), COMMON, KERNELS, INSTRUCTION_SETS, flags)).encode()
    )
    return digest.hexdigest()[:20]
