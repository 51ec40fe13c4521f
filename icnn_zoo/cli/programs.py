"""The programs: ``lightning`` is LightningCLI; ``icnn-zoo`` is the same and the zoo's own commands."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from icnn_zoo.cli import doctor, export, pictures, plan, prepare, reproduce, segment, zoo
from icnn_zoo.cli.options import Command
from icnn_zoo.io.console import replace_unprintable

ArgsType = Sequence[str] | None

COMMANDS: dict[str, Command] = {
    **prepare.COMMANDS,
    **plan.COMMANDS,
    **export.COMMANDS,
    **pictures.COMMANDS,
    **reproduce.COMMANDS,
    **zoo.COMMANDS,
    **segment.COMMANDS,
    **doctor.COMMANDS,
}

# What bad input raises, at the latest in the library that meets it.
_USER_ERRORS = (OSError, ValueError, TypeError, KeyError, OverflowError, RuntimeError, ImportError, MemoryError)


def lightning_main(args: ArgsType = None) -> None:
    """The program ``lightning``: fit, validate, test and predict."""
    replace_unprintable()
    _run_lightning(args)


def zoo_main(args: ArgsType = None) -> None:
    """The program ``icnn-zoo``: the zoo's own commands, else what ``lightning`` does."""
    replace_unprintable()
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments and arguments[0] in COMMANDS:
        _run_command(arguments)
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print("The zoo's own commands (icnn-zoo COMMAND --help):")
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {_summary(command)}")
        print()
    _run_lightning(args)


def in_a_line(program: Callable[[], None], name: str) -> None:
    """Runs a program for a person: what is wrong with the input is a line, without the way to where it was noticed.

    Other errors, which nobody foresaw, keep it; so do all with ``ICNN_ZOO_TRACEBACK=1``.
    """
    try:
        program()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("ICNN_ZOO_TRACEBACK") == "1" or not _is_ours(error):
            raise
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        print(f"{name} {command}: {error}\n(ICNN_ZOO_TRACEBACK=1 shows where this was raised)", file=sys.stderr)
        sys.exit(1)


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by a line of this package, whose messages say what to do."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").startswith("icnn_zoo")


def _run_command(arguments: list[str]) -> None:
    name = arguments[0]
    overrides: list[str] = []
    if COMMANDS[name].overrides and "--" in arguments:  # argparse would give them to a positional argument
        place = arguments.index("--")
        arguments, overrides = arguments[:place], arguments[place + 1 :]
    options = _parser(name).parse_args(arguments)
    options.overrides = overrides
    try:
        COMMANDS[name].run(options)
    except _USER_ERRORS as error:
        if options.traceback:
            raise
        _stop(name, error)
    except KeyboardInterrupt:
        if options.traceback:
            raise
        print(f"icnn-zoo {name}: interrupted", file=sys.stderr)
        sys.exit(130)  # as shells say of a program that Ctrl-C ended


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The parser with all commands, of which only the chosen one has its options: those of some need slow imports."""
    parser = argparse.ArgumentParser(prog="icnn-zoo")
    commands = parser.add_subparsers(required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=_summary(command), description=command.run.__doc__)
        if name == chosen:
            command.add_options(own)
            own.add_argument("--traceback", action="store_true", help="show where an error was raised")
    return parser


def _summary(command: Command) -> str:
    return (command.run.__doc__ or "").splitlines()[0]


def _stop(name: str, error: BaseException) -> NoReturn:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.strerror:
        text = ": ".join([error.strerror, *(repr(str(file)) for file in [error.filename] if file is not None)])
    if not isinstance(error, ValueError | FileNotFoundError | RuntimeError | ImportError):
        # Not foreseen where it was raised: the kind helps, and so does the place.
        text = f"{type(error).__name__}: {text} (--traceback shows where it was raised)"
    raise SystemExit(f"icnn-zoo {name}: {text}") from error


def _run_lightning(args: ArgsType) -> Any:
    from icnn_zoo.training.lightning_cli import ZooCLI

    return ZooCLI.run(args)
