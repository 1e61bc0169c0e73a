"""The command `m1`: parses, imports the command asked for, runs it, and turns users' mistakes into one line.

Exit codes: 0 done, 2 a mistake in what was asked (one line says which input and what to do), 1 a fault of M1 (with
traceback), 130 interrupted. Heavy imports come after parsing, so that help is quick.
"""

import difflib
import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from m1.config import COMMANDS
from m1.recipe_file import build, read_recipe

RUNNERS = {
    "quickstart": "m1.quickstart.run",
    "convert": "m1.conversion.convert",
    "sample": "m1.sample",
    "align": "m1.training.align",
    "select": "m1.training.select",
    "distill": "m1.training.distill",
    "on-policy": "m1.training.on_policy",
    "sft": "m1.training.sft",
    "grpo": "m1.training.grpo",
    "solve": "m1.solve",
    "report": "m1.report",
    "eval": "m1.evaluate",
}
# The field that a first word without a dash gives, so that `m1 solve "2 + 2 =?"` and `m1 eval models/x` do.
FIRST_WORD = {"solve": "problem", "eval": "model"}
# The field that all first words without a dash give, so that `m1 report runs/x runs/y` does.
FIRST_WORDS = {"report": "directories"}

USAGE = """\
usage: m1 COMMAND [RECIPE.toml] [--option value …]

M1 turns a Transformer that reasons into a hybrid Mamba model, and votes over its samples.

{commands}

m1 COMMAND --help lists a command's options. A recipe is a TOML file with a table a command; flags override it.
m1 --version prints the version."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {(cls.__doc__ or '').strip()}" for name, cls in COMMANDS.items())
    return USAGE.format(commands="\n".join(lines))


def describe(command: str) -> str:
    """What stands above a command's options in its help: what it does, and which words may come before the options."""
    first = {**FIRST_WORD, **FIRST_WORDS}.get(command)
    forms = [f"m1 {command} {first.upper()} --option value …"] if first else []
    forms.append(f"m1 {command} RECIPE.toml --option value …")
    return f"{COMMANDS[command].__doc__}\n\n{', or '.join(forms)}"


def parse(arguments: list[str]) -> tuple[str, Any]:
    """Command and its config from the words after `m1`. Raises ValueError for an unknown command or recipe key."""
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? Commands" if near else "commands"
        raise ValueError(f"unknown command {command!r}; {hint} are {', '.join(COMMANDS)}")
    values: dict[str, Any] = {}
    source = "defaults"
    if rest and rest[0].endswith(".toml"):
        source, *rest = rest
        values = read_recipe(source, command)
    elif command in FIRST_WORD and rest and (not rest[0].startswith("-") or rest[0] == "-"):
        values = {FIRST_WORD[command]: rest[0]}
        rest = rest[1:]
    elif command in FIRST_WORDS and rest and not rest[0].startswith("-"):
        num_words = next((index for index, word in enumerate(rest) if word.startswith("-")), len(rest))
        values = {FIRST_WORDS[command]: rest[:num_words]}
        rest = rest[num_words:]
    default = build(command, values, source)
    import tyro  # here, because it takes a quarter of a second that `m1 --help` need not wait for

    config = tyro.cli(
        COMMANDS[command],
        prog=f"m1 {command}",
        description=describe(command),
        args=rest,
        default=default,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
    )
    return command, config


def is_users_mistake(error: BaseException) -> bool:
    """A ValueError that M1's own code raised, or the system's word about a file, the disk, or memory."""
    if isinstance(error, (OSError, MemoryError)):
        return True
    if isinstance(error, ValueError):
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        return Path(frame.f_code.co_filename).resolve().is_relative_to(Path(__file__).resolve().parent)
    return type(error).__name__ == "OutOfMemoryError"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from m1 import __version__

        print(__version__)
        return 0
    try:
        command, config = parse(arguments)
        importlib.import_module(RUNNERS[command]).run(config)
    except KeyboardInterrupt:
        print("\nm1: interrupted; what was finished is kept, run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_users_mistake(error):
            raise
        print(f"m1: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
