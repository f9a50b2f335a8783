"""From YAML and `section.key=value` to a RunConfig, and back.

A run is read as a flat list of settings, each with its dotted key and the place that states it, so that
every mistake can name the key and the place.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megalite.config.deepspeed import OWNED_BY_DEEPSPEED
from megalite.config.dialect import read_yaml, write_yaml
from megalite.config.run import RunConfig
from megalite.config.section import ConfigError, Section, explain

__all__ = ["ConfigError", "dump_run", "known_keys", "load_run"]

COMMAND_LINE = "on the command line"


class Setting(NamedTuple):
    """One stated fact: `key` is dotted; `where` reads "in FILE" or "on the command line"."""

    key: str
    value: Any
    where: str


def load_run(
    path: str | None, overrides: Sequence[str] = (), deepspeed_path: str = "the DeepSpeed JSON"
) -> RunConfig:
    """Read a run from the YAML file at `path` (None: all defaults), changed by `section.key=value` overrides.

    `deepspeed_path` is only named in messages. Raises ConfigError, in one line, for a file that is not there
    or not YAML, an unknown key, a value of the wrong kind, or a fact that the DeepSpeed JSON owns.
    """
    settings: dict[str, Setting] = {}
    for setting in [*_read_file(path), *_read_overrides(overrides)]:
        _check_key(setting, deepspeed_path)
        _replace(settings, setting)
    try:
        return RunConfig.model_validate(_as_tree(settings))
    except ValidationError as error:
        places = {setting.key: setting.where for setting in settings.values()}
        raise ConfigError(explain(error, places, default=f"in {path}" if path else "")) from None


def dump_run(run: RunConfig) -> str:
    """Write a run, complete with all defaults, as YAML that `load_run` reads back to an equal value."""
    return write_yaml(run.model_dump())


def known_keys(section: type[Section] = RunConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Map every dotted key below `section` to its field; the sections themselves are included."""
    keys: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        keys[prefix + name] = field
        inner = section_of(field)
        if inner is not None:
            keys.update(known_keys(inner, f"{prefix}{name}."))
    return keys


def section_of(field: FieldInfo) -> type[Section] | None:
    """The Section class that a field holds, or None for a plain value."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


_KNOWN = known_keys()
_REQUIRED_SECTIONS = {key for key, field in _KNOWN.items() if section_of(field) is field.annotation}


def _read_file(path: str | None) -> Iterator[Setting]:
    if path is None:
        return
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise ConfigError(f"run configuration {path} not found: check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run configuration {path} cannot be read: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(
            f"run configuration {path} holds {values!r}, expected sections of 'key: value' lines"
        )
    yield from _flatten(values or {}, f"in {path}")


def _read_overrides(overrides: Sequence[str]) -> Iterator[Setting]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"argument {override!r} is not understood: expected section.key=value")
        tree: Any = read_yaml(text, f"argument {override!r}")
        for part in reversed(key.split(".")):
            tree = {part: tree}
        yield from _flatten(tree, COMMAND_LINE)


def _flatten(values: dict[Any, Any], where: str, prefix: str = "") -> Iterator[Setting]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _flatten(value, where, f"{key}.")
        elif value or key not in _REQUIRED_SECTIONS:  # an empty section says nothing
            yield Setting(key, value, where)


def _check_key(setting: Setting, deepspeed_path: str) -> None:
    key, _, where = setting
    if key in _KNOWN:
        return
    owner = next((OWNED_BY_DEEPSPEED[part] for part in key.split(".") if part in OWNED_BY_DEEPSPEED), None)
    if owner:
        raise ConfigError(
            f"stated in two places: '{key}' {where} and '{owner}' in {deepspeed_path}; "
            f"remove the first, the DeepSpeed JSON owns it"
        )
    raise ConfigError(f"unknown key '{key}' {where}: {_suggestion(key)}")


def _suggestion(key: str) -> str:
    section, _, leaf = key.rpartition(".")
    elsewhere = [known for known in _KNOWN if not key.startswith(f"{known}.")]
    leaves = {known.rpartition(".")[2]: known for known in elsewhere}
    close = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.7)
    close = close or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    if leaf in leaves or close:
        return f"did you mean '{leaves.get(leaf, *close)}'?"
    around = section if section in _KNOWN else ""
    siblings = [name.rpartition(".")[2] for name in _KNOWN if name.rpartition(".")[0] == around]
    return f"known here are {', '.join(siblings)}"


def _replace(settings: dict[str, Setting], new: Setting) -> None:
    """Add a setting; it replaces older ones of the same key, of keys within it, or of a section around it."""
    for old in list(settings):
        if old == new.key or old.startswith(f"{new.key}.") or new.key.startswith(f"{old}."):
            del settings[old]
    settings[new.key] = new


def _as_tree(settings: dict[str, Setting]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value, _ in settings.values():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree
