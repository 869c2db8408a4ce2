"""Configurations to and from YAML, and folders that are complete or absent."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from glassgpt.config import PRESETS, DataConfig, ModelConfig, OptimConfig, ParallelConfig, Pretrain, UserError, preset
from glassgpt.config.files import complete_folder, from_plain, read_yaml, to_plain, write_yaml
from glassgpt.config.model import MoeConfig, RopeConfig

# Every field differs from its default, so that a field which is not stored shows.
UNUSUAL = Pretrain(
    out_dir="runs/thử nghiệm",
    resume=True,
    model=ModelConfig(
        *(300, 48, 3, 4, 20, 50, 0.25, 3e-6, False, "rope", RopeConfig(5e5, "yarn", 4.0, 12, 16.0, 2.0, 1.25), 2, 24, 0.5, True),
        *(("full", "window"), 16, "rms", True, "swiglu", MoeConfig(6, 3, 1, 10, False, 0.5, 0.25), False, True, 30.0),
    ),
    start="runs/before",
    keep_zeros=True,
    data=DataConfig(("a.txt", "b/"), (3.0, 1.0), "tok", 0.125, deduplicate=True, mask_documents=True, replay_share=0.25),
    optim=OptimConfig("muon", 3e-4, 0.5, 0.8, "linear", 0.75, 0.0, 7, 0.01, 0.85, 0.99, 0.5),
    max_steps=11,
    batch_size=3,
    accumulation_steps=2,
    eval_interval=4,
    eval_batches=6,
    save_interval=5,
    keep_checkpoints=9,
    sample_interval=8,
    sample_prompt="yes",
    seed=12,
    device="cpu",
    precision="bf16",
    compile="on",
    checkpoint_activations=True,
    parallel=ParallelConfig("fsdp", 2, sharded_checkpoints=True),
    bad_steps="skip",
    spike_deviations=5.0,
    track=("tensorboard", "wandb"),
    chaos=3,
)


def fields_at_their_default(config: Any, default: Any) -> list[str]:
    names = [field.name for field in dataclasses.fields(config)]
    pairs = [(name, getattr(config, name), getattr(default, name)) for name in names]
    inner = [name for _, a, b in pairs if dataclasses.is_dataclass(a) for name in fields_at_their_default(a, b)]
    return inner + [name for name, a, b in pairs if a == b]


# ---------------------------------------------------------------------- YAML


@pytest.mark.parametrize("config", [Pretrain(), UNUSUAL])
def test_yaml_round_trip(tmp_path: Path, config: Pretrain) -> None:
    path = tmp_path / "config.yaml"
    write_yaml(path, config)
    assert read_yaml(path, Pretrain) == config
    assert read_yaml(path, Pretrain, default=UNUSUAL) == config  # a full file leaves nothing to the default
    assert type(read_yaml(path, Pretrain).data.sources) is tuple
    assert list(to_plain(config)) == [field.name for field in dataclasses.fields(Pretrain)]


def test_the_round_trip_covers_every_field() -> None:
    assert fields_at_their_default(UNUSUAL, dataclasses.replace(Pretrain(), model=ModelConfig())) == []


def test_what_is_not_given_stays(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("max_steps: 7\nmodel:\n  dropout: 0.5\noptim: {learning-rate: 1e-4}\ndata: {sources: one.txt}\n")
    config = read_yaml(path, Pretrain)
    assert config == dataclasses.replace(
        Pretrain(),
        max_steps=7,
        model=dataclasses.replace(Pretrain().model, dropout=0.5),  # Pretrain's own model, not ModelConfig's
        optim=OptimConfig(learning_rate=1e-4),  # which YAML reads as text
        data=DataConfig(sources=("one.txt",)),
    )
    path.write_text(path.read_text().replace("one.txt", "[one.txt, two.txt]"))
    on_top = read_yaml(path, Pretrain, default=UNUSUAL)
    assert (on_top.model.width, on_top.model.dropout, on_top.max_steps, on_top.seed) == (20, 0.5, 7, 12)
    path.write_text("# nothing but a comment\n")
    assert read_yaml(path, Pretrain) == Pretrain()


def test_presets_by_name() -> None:
    assert from_plain(Pretrain, {"model": "gpt2"}).model == PRESETS["gpt2"]
    changed = from_plain(Pretrain, {"model": {"preset": "gpt2", "dropout": 0.0}}).model
    assert changed == preset("gpt2", dropout=0.0) != PRESETS["gpt2"]
    values = {"preset": "tiny", "n_layer": 1}
    assert from_plain(ModelConfig, values) == preset("tiny", n_layer=1)
    assert values == {"preset": "tiny", "n_layer": 1}  # what was passed in is left alone


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_step": 5}, r"unknown key 'max_step' \(did you mean 'max_steps'\?\)"),
        ({"optim": {"learning_rte": 1}}, r"unknown key 'optim.learning_rte' \(did you mean 'learning_rate'\?\)"),
        ({"zzz": 5}, "unknown key 'zzz'; known: out_dir, resume"),
        ({5: 6}, "unknown key '5'"),
        ({"max_steps": "many"}, "max_steps must be int; got 'many'"),
        ({"max_steps": 1.5}, "max_steps must be int; got 1.5"),
        ({"max_steps": True}, "max_steps must be int; got True"),
        ({"resume": 1}, "resume must be bool; got 1"),
        ({"optim": {"learning_rate": "fast"}}, "optim.learning_rate must be float; got 'fast'"),
        ({"optim": {"learning_rate": None}}, "optim.learning_rate must be float; got None"),
        ({"optim": {"optimizer": "adam"}}, r"optimizer must be one of adamw, muon; got 'adam' \(did you mean 'adamw'\?\)"),
        ({"data": {"sources": 5}}, "data.sources must be a list; got 5"),
        ({"data": {"sources": [5]}}, "data.sources must be str; got 5"),
        ({"data": {"tokenizer": 5}}, "data.tokenizer must be str; got 5"),
        ({"data": ["a.txt"]}, r"data: expected keys and values; got \['a.txt'\]"),
        ({"optim": None}, "optim: expected keys and values; got None"),
        ({"model": 5}, "model: expected keys and values; got 5"),
        ({"model": None}, "model: expected keys and values; got None"),
        ({"model": "gtp2"}, r"unknown preset 'gtp2' \(did you mean 'gpt2'\?\)"),
        ({"model": {"preset": ["gpt2"]}}, "unknown preset"),
        ({"model": {"n_head": 3}}, "n_head must divide width: width 128 / n_head 3 leaves 2"),
        ({"data": {"sources": []}}, "data.sources is empty"),
        ([1], r"configuration: expected keys and values; got \[1\]"),
    ],
)
def test_what_is_wrong_is_named(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_plain(Pretrain, values)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"max_step: 5\n", "unknown key"), (b"a: [1\n", "cannot read"), (b"a: \xff\n", "cannot read"), (None, "cannot read")],
)
def test_errors_name_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path, Pretrain)
    assert str(path) in str(caught.value)


def test_a_yaml_file_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(f"out_dir: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(UserError, match="cannot read"):
        read_yaml(path, Pretrain)
    assert not (tmp_path / "made").exists()


# ---------------------------------------------------------------------- folders


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "result"
    with complete_folder(target) as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "file").write_text("content")
        assert not target.exists()
        assert aside.parent == target.parent  # on the same disk, or the rename would not be atomic
    assert (target / "deep" / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), KeyboardInterrupt(), UserError("bad input")])
def test_an_interrupted_folder_is_absent(tmp_path: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with complete_folder(tmp_path / "result") as aside:
            (aside / "file").write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        interrupted()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    with pytest.raises(UserError, match="exists already and is never overwritten"), complete_folder(tmp_path / "result"):
        raise AssertionError("the body must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path, full_disk: Any) -> None:
    def write() -> None:
        with complete_folder(tmp_path / "result") as aside:
            (aside / "small").write_bytes(b"x" * 900)
            (aside / "large").write_bytes(b"x" * 1100)

    with full_disk(1000), pytest.raises(UserError, match=r"cannot write .*result: File too large"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Not a directory"), complete_folder(tmp_path / "file" / "result"):
        pass
