"""What the tests of the native engine share: its instruction sets, and libraries that are wrong on purpose."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glassgpt.generation.native import Unavailable, build, library
from glassgpt.generation.native import model as native_model


@pytest.fixture(scope="session")
def emulated() -> Any:
    """The library with AMX's tiles in plain C++, for processors that have none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "INSTRUCTION_SETS", {name: build.INSTRUCTION_SETS[name] for name in ("portable", "amx")})
        return library.opened(str(build.library(flags=["-DGG_AMX_EMULATED"])))


@pytest.fixture(params=[*list(build.INSTRUCTION_SETS)[:-1], pytest.param("amx", marks=pytest.mark.slow)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of this processor, and AMX."""
    name: str = request.param
    try:
        there = library.kernels()
    except Unavailable as error:
        pytest.skip(f"the native engine cannot be compiled: {error}")
    if name == "amx" and name not in there:
        found = request.getfixturevalue("emulated")
        monkeypatch.setattr(native_model, "library", lambda: found)
    elif name not in there:
        pytest.skip(f"this processor has other instruction sets: no {name}")
    return name


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> str:
    """The one set that every machine has."""
    try:
        library.kernels()
    except Unavailable as error:
        pytest.skip(f"the native engine cannot be compiled: {error}")
    return "portable"


@pytest.fixture
def noticed(portable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`noticed(file, right, wrong, check)`: portable kernels with `wrong` in the place of `right` fail the check."""

    def fails(file: str, right: str, wrong: str, check: Callable[[str], None]) -> None:
        sources = tmp_path / "src"
        shutil.copytree(build.SOURCES, sources)
        text = (sources / file).read_text()
        assert text.count(right) == 1
        (sources / file).write_text(text.replace(right, wrong))
        monkeypatch.setattr(build, "SOURCES", sources)
        monkeypatch.setattr(build, "INSTRUCTION_SETS", {"portable": []})
        path = build.build(tmp_path, "wrong", build.find_compiler(), ["-O1"])
        mutant = library.opened(str(path))
        monkeypatch.setattr(native_model, "library", lambda: mutant)
        with pytest.raises(AssertionError):
            check(portable)

    return fails
