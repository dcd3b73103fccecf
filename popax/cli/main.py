"""The `popax` command: finds the subcommand's module, runs it, and turns what a user can cause into one line.

A command is a module with NAME, HELP (one line), EXAMPLE (a command line), configure(parser) and run(args) -> exit
code. It imports jax and the library inside `run`, so that `popax --help` answers at once and a command that needs no
accelerator does not wake one. A group of commands (`popax bench train`) is a module with NAME, HELP, EXAMPLE and
COMMANDS, a table like the one below.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

import popax
from popax.cli.processes import is_one_of_several, leave, supervised
from popax.errors import PopaxError, Preempted, ProcessError

COMMANDS: dict[str, str] = {
    "demo": "popax.cli.demo",
    "train": "popax.cli.train",
    "pretrain": "popax.cli.pretrain",
    "eval": "popax.cli.eval",
    "generate": "popax.cli.generate",
    "serve": "popax.cli.serve",
    "api-key": "popax.cli.api_key",
    "extract": "popax.cli.extract",
    "import": "popax.cli.import_",
    "migrate": "popax.cli.migrate",
    "compose": "popax.cli.compose",
    "merge": "popax.cli.merge",
    "remember": "popax.cli.remember",
    "users": "popax.cli.users",
    "plan": "popax.cli.plan",
    "methods": "popax.cli.methods",
    "bench": "popax.cli.bench",
    "report": "popax.cli.report",
}

EXIT_ERROR = 2
EXIT_SOFTWARE = 70  # EX_SOFTWARE of sysexits.h: an error that is popax's own
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; 2 for bad input, after `error: ...` on stderr; 130 after Ctrl-C, 143
    after SIGTERM, 75 where another process of the run is lost."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(_named_command(arguments)).parse_args(arguments)
    if (code := supervised(args, arguments)) is not None:
        return code
    if not args.debug:
        _quiet()
    try:
        return args.run(args) or 0
    except KeyboardInterrupt as interrupt:
        # Whoever was interrupted knows what it saved, and raises KeyboardInterrupt again with that as its message.
        saved = str(interrupt) or "what was committed or checkpointed before stays, nothing is half-written"
        print(f"\ninterrupted: {saved}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Preempted as preempted:
        print(f"\npreempted: {preempted}", file=sys.stderr)
        return preempted.exit_code
    except BrokenPipeError:
        # The reader went away (`popax users | head`); keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (PopaxError, OSError) as error:
        if args.debug:
            raise
        named = f"{type(error).__name__}: " if isinstance(error, ProcessError) else ""
        print(f"error: {named}{' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code if isinstance(error, PopaxError) else EXIT_ERROR
        leave(args, code)
        return code
    except Exception:
        if is_one_of_several(args):
            # Python's own way out would wait for the other processes, and they for this one.
            traceback.print_exc()
            leave(args, EXIT_SOFTWARE)
        raise


def _quiet() -> None:
    """Only errors of absl's log: Orbax warns there of what a user of popax neither chose nor can change."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of every command, or of the one that will run: then no other command's module is imported."""
    parser = argparse.ArgumentParser(
        prog="popax",
        description="One frozen base model and a population of small per-user adapters.",
        epilog="popax COMMAND --help shows a command's options and an example.",
    )
    parser.add_argument("--version", action="version", version=f"popax {popax.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS if only is None else (only,):
        command = importlib.import_module(COMMANDS[name])
        _add_command(subparsers, command)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json PATH, for commands whose numbers a script may want."""
    parser.add_argument("--json", metavar="PATH", help="also write the result as JSON")


def _add_command(subparsers, command: ModuleType) -> None:
    parser = subparsers.add_parser(
        command.NAME,
        help=command.HELP,
        description=command.HELP,
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if hasattr(command, "COMMANDS"):
        nested = parser.add_subparsers(dest=f"{command.NAME}_command", metavar="COMMAND", required=True)
        for module in command.COMMANDS.values():
            _add_command(nested, importlib.import_module(module))
        return
    command.configure(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=command.run)


def _named_command(arguments: Sequence[str]) -> str | None:
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    return first if first in COMMANDS and arguments[0] == first else None


if __name__ == "__main__":
    sys.exit(main())
