# SPDX-License-Identifier: Apache-2.0
"""The `megacell` command: gathers the sub-commands of every installed sub-package and runs one."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points

from megacell.core.cli.bus_error import explain_bus_errors
from megacell.core.cli.completion import register_completion
from megacell.core.cli.doctor import register_doctor
from megacell.core.errors import MegacellError, printable
from megacell.core.versions import COMMANDS, installed_version

INTERNAL_ERROR = 70  # exit code, sysexits' EX_SOFTWARE


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with the sub-commands of all installed sub-packages; imports none of their heavy parts."""
    parser = argparse.ArgumentParser(prog="megacell", description="Pretrain foundation models on single cells.")
    parser.add_argument("--version", action="version", version=f"megacell {installed_version()}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for point in sorted(entry_points(group=COMMANDS), key=lambda point: point.name, reverse=True):
        point.load()(commands)
    register_doctor(commands)
    register_completion(commands, parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code.

    0, 1 for bad data, 2 for wrong usage, 70 for a defect, 130 for Ctrl-C.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    explain_bus_errors(args.command)
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("megacell: interrupted", file=sys.stderr)
        return 130
    except MegacellError as error:
        return _report(args, f"error: {error}", error.exit_code)
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a missing right: the message names the file
        return _report(args, f"error: {error}", 1)
    except Exception as error:  # a defect of ours, or of a library: --debug shows the traceback
        if args.debug:
            raise
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return _report(args, f"internal error: {text}; --debug shows where", INTERNAL_ERROR)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, in which ``--debug`` may stand anywhere.

    A sub-parser names its function with ``set_defaults(run=…)``.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args([word for word in words if word != "--debug"])
    args.debug = "--debug" in words
    if rest:
        parser.error(f"{args.command}: unknown arguments: {' '.join(rest)}")
    return args


def _report(args: argparse.Namespace, text: str, exit_code: int) -> int:
    """Print the error that is being handled as one line, with ``--debug`` below its traceback."""
    if args.debug:
        traceback.print_exc()
    print(f"megacell {args.command}: {printable(text)}", file=sys.stderr)
    return exit_code
