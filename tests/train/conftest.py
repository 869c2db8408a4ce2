"""The text that the runs of these tests learn from."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import write_sentences


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("text"))
