"""The model and the examples that the runs of these tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from stages import write_examples, write_model


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture a run takes longer than the run; `test_pictures` has them."""
    if "pictures" not in request.node.name:
        monkeypatch.setattr("glassgpt.train.session.plot_loss", lambda run: [])
        monkeypatch.setattr("glassgpt.tuning.stage.plot_lengths", lambda audit, place: None)
        monkeypatch.setattr("glassgpt.tuning.reward.plot_calibration", lambda margins, run: [])


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and files of chats, pairs and prompts."""
    folder = tmp_path_factory.mktemp("tuning")
    write_model(folder / "model")
    return write_examples(folder)
