"""Reading recipes: TOML files with a table a command. Values are checked against the dataclasses of m1.config.

The command line puts flags over them. Unknown keys and tables are refused by naming the nearest known one. No torch here.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from m1.config import COMMANDS


def read_recipe(path: str | Path, command: str) -> dict[str, Any]:
    """The values that a TOML recipe gives `command`: its table of that name, over the table [all] of shared values.

    Raises FileNotFoundError, or ValueError that names the file and the unknown key or table with the nearest known one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} = … stands outside a table; put it under [{command}]")
        if name != "all" and name not in COMMANDS:
            raise ValueError(f"{path}: unknown table [{name}]{_nearest(name, ['all', *COMMANDS])}")
    known = {name: {f.name for f in dataclasses.fields(cls)} for name, cls in COMMANDS.items()}
    known["all"] = set().union(*known.values())
    for name, table in tables.items():
        for key in table:
            if key not in known[name]:
                raise ValueError(f"{path}: [{name}] has an unknown key {key!r}{_nearest(key, known[name])}")
    shared = {key: value for key, value in tables.get("all", {}).items() if key in known[command]}
    return {**shared, **tables.get(command, {})}


def build(command: str, values: dict[str, Any], source: str) -> Any:
    """The dataclass of `command` from plain values; ValueError names one of the wrong type and where it stood (`source`)."""
    cls = COMMANDS[command]
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if not _fits(value, hints[key]):
            raise ValueError(f"{source}: {key} = {value!r} does not fit, expected {_describe(hints[key])}")
    return cls(**{key: tuple(v) if typing.get_origin(hints[key]) is tuple else v for key, v in values.items()})


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known are {', '.join(sorted(known))}"


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items())
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint).replace("typing.", "")
