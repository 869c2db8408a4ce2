"""The command as people type it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from glassgpt.cli import COMMANDS, _resolve, main, parse
from glassgpt.config import PRESETS, Pretrain, UserError
from glassgpt.config.files import read_yaml, write_yaml

HEAVY = ("torch", "numpy", "tokenizers", "transformers", "matplotlib")
PROBE = f"""
import sys
from glassgpt.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print("LOADED", [name for name in {HEAVY} if name in sys.modules], code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([*verb.split(), "--help"] for verb in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("LOADED [] 0"), done.stdout[-300:]
    assert "--config" in done.stdout or arguments == ["--version"]


def test_module_and_script_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "glassgpt", "--help"], capture_output=True, text=True, check=True)
    assert all(re.search(rf"^  {verb} ", done.stdout, re.MULTILINE) for verb in COMMANDS)


def test_every_command_names_a_class_and_a_function() -> None:
    for verb, command in COMMANDS.items():
        assert callable(_resolve(command.function)), verb
        kind = _resolve(command.config)
        assert kind.__doc__, verb
        assert all(line.strip() for line in (kind.__doc__, command.summary)), verb


def test_underscores_and_dashes() -> None:
    assert parse("pretrain", ["--max_steps", "7"]) == parse("pretrain", ["--max-steps", "7"]) == Pretrain(max_steps=7)


def test_model_starts_from_a_preset_and_takes_changes() -> None:
    config = parse("pretrain", ["--model", "tiny", "--model.n_layer", "5", "--optim.learning-rate", "0.01"])
    assert config.model.n_layer == 5
    assert config.model.width == PRESETS["tiny"].width
    assert config.optim.learning_rate == 0.01
    assert parse("pretrain", ["--model=gpt2"]).model == PRESETS["gpt2"]


def test_a_file_gives_defaults_and_flags_override_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 7\nmodel:\n  preset: tiny\n  n_layer: 3\ndata: {sources: [a.txt, b.txt]}\n")
    config = parse("pretrain", ["--config", str(path), "--max-steps", "9"])
    assert (config.max_steps, config.model.n_layer, config.model.width) == (9, 3, 16)
    assert config.data.sources == ("a.txt", "b.txt")
    written = tmp_path / "resolved.yaml"
    write_yaml(written, config)
    assert read_yaml(written, Pretrain) == config == parse("pretrain", ["--config", str(written)])


def test_a_file_may_leave_positional_arguments_to_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "generate.yaml"
    path.write_text("max_new_tokens: 3\nsampling:\n  temperature: 0.5\n")
    config = parse("generate", ["some-model", "a prompt", "--config", str(path)])
    assert (config.model, config.prompt, config.max_new_tokens) == ("some-model", ("a prompt",), 3)
    assert config.sampling.temperature == 0.5


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_step: 7\n", "unknown key 'max_step' (did you mean 'max_steps'?)"),
        ("model:\n  n_layers: 7\n", "unknown key 'model.n_layers' (did you mean 'n_layer'?)"),
        ("model: gpt3\n", "unknown preset 'gpt3'"),
        ("max_steps: many\n", "max_steps must be int; got 'many'"),
        ("max_steps: [\n", "cannot read the configuration"),
    ],
)
def test_mistakes_in_a_file(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["pretrain", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(path) in error
    assert "Traceback" not in error


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'generate'?" in fails(["genrate"], capsys)


def test_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--max-stepps", "7"])
    assert stop.value.code == 2
    assert "--max-steps" in capsys.readouterr().err


def test_out_of_range_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "max_steps must be at least 1; got 0" in fails(["pretrain", "--max-steps", "0"], capsys)


def test_resume_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to resume" in fails(["pretrain", "--resume", "--out-dir", str(tmp_path)], capsys)


def test_resume_takes_the_options_of_the_run(tmp_path: Path) -> None:
    config = Pretrain(out_dir=str(tmp_path), max_steps=7, seed=3)
    write_yaml(tmp_path / "config.yaml", config)
    for flag in ("--out-dir", "--out_dir"):
        resumed = parse("pretrain", ["--resume", flag, str(tmp_path)])
        assert (resumed.max_steps, resumed.seed, resumed.resume) == (7, 3, True)


def test_a_flag_without_its_value() -> None:
    with pytest.raises(UserError, match="--config needs a value"):
        parse("pretrain", ["--config"])


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m glassgpt info gpt2 --all | head -n 1", shell=True, capture_output=True, text=True, check=True
    )
    assert "124,439,808" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["bench"], ["lab", "--help"]])
def test_a_group_lists_its_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for verb in COMMANDS:
        assert (f"  {verb} " in out) == verb.startswith(f"{arguments[0]} ")


def test_an_unknown_command_of_a_group_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "scalling"]) == 2
    assert "unknown command 'lab scalling' (did you mean 'lab scaling'?)" in capsys.readouterr().err
