"""Files that are complete or absent, and configurations to and from YAML."""

from __future__ import annotations

import dataclasses
import os
import shutil
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import yaml

from glassgpt.config.errors import UserError, nearest
from glassgpt.config.model import ModelConfig, preset

CONFIG_FILE = "config.yaml"
"""A run folder's options, as `auto` was resolved."""

Config = TypeVar("Config")


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Write a folder that becomes visible only when it is whole.

    Yields a hidden folder beside `target` to write into; on success every file is fsynced and the folder renamed to
    `target`, so a crash at any moment leaves either the finished folder or none. Never overwrites: raises UserError when
    `target` exists. A full disk raises UserError and leaves nothing behind.
    """
    if target.exists():
        raise UserError(f"{target} exists already and is never overwritten; choose another name or move it away")
    aside = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    _remove_left_over(target)
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            fsync(path)
        aside.rename(target)
        fsync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}; nothing that was there before has changed") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_left_over(target: Path) -> None:
    """Delete the hidden folders of processes that were killed while they wrote `target`."""
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        stem, _, writer = path.name.rpartition("-")
        if stem == f".tmp-{target.name}" and writer.isdigit() and not _is_alive(int(writer)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def fsync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- YAML


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as dicts, lists and scalars, ready for YAML or JSON."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in _fields(config).items()}


def _fields(config: Any) -> dict[str, Any]:
    return {
        field.name: to_plain(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else value
        for field in dataclasses.fields(config)
    }


def from_plain(kind: type[Config], values: Any, default: Config | None = None, where: str = "") -> Config:
    """Build a configuration of class `kind` from nested dicts, on top of `default`.

    A ModelConfig may be given as a preset's name, or as a mapping with `preset` and changes. Raises UserError naming an
    unknown key and the nearest known one, or a value of the wrong type.
    """
    if kind is ModelConfig and isinstance(values, str):
        values = {"preset": values}
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or 'configuration'}: expected keys and values; got {values!r}")
    if kind is ModelConfig and "preset" in values:
        default = typing.cast(Config, preset(str(values["preset"])))
        values = {key: value for key, value in values.items() if key != "preset"}
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    names = list(fields)
    given: dict[str, Any] = {}
    for key, value in values.items():
        name, path = str(key).replace("-", "_"), f"{where}{key}"
        if name not in names:
            raise UserError(f"unknown key {path!r}{nearest(name, names)}; known: {', '.join(names)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            given[name] = from_plain(
                typing.cast(type, hint), value, getattr(default, name, _own_default(fields[name])), f"{path}."
            )
        else:
            given[name] = _checked(hint, value, path)
    return dataclasses.replace(typing.cast(Any, default), **given) if default is not None else kind(**given)


def _own_default(field: dataclasses.Field[Any]) -> Any:
    """What the field holds when nothing is given for it, None when it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _checked(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type; YAML gives ints where floats are meant and lists where tuples are."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _checked(next(choice for choice in arguments if choice is not type(None)), value, path)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(
                f"{path} must be one of {', '.join(map(str, arguments))}; got {value!r}{nearest(str(value), map(str, arguments))}"
            )
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"{path} must be a list; got {value!r}")
        return tuple(_checked(arguments[0], item, path) for item in items)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{path} must be {hint.__name__}; got {value!r}")
    return value


def read_yaml(path: str | Path, kind: type[Config], default: Config | None = None) -> Config:
    """Read a configuration file. Raises UserError with the file's name for anything wrong in it."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    try:
        return from_plain(kind, values, default)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_yaml(path: Path, config: Any) -> None:
    """Write the resolved configuration; `--config PATH` runs it again."""
    aside = path.with_name(f".{path.name}.tmp")  # a full disk or a kill leaves the old file or the new one
    aside.write_text(yaml.safe_dump(to_plain(config), sort_keys=False), encoding="utf-8")
    aside.replace(path)
