# SPDX-License-Identifier: Apache-2.0
"""The `megacell` command: gathers the sub-commands of every installed sub-package and runs one."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version

from megacell.core.errors import MegacellError

INTERNAL_ERROR = 70  # exit code, sysexits' EX_SOFTWARE
COMMANDS = "megacell.commands"  # entry-point group: functions that take argparse's sub-parsers and add their own


def installed_version() -> str:
    """Return Megacell's version, or "unknown" where it is run without having been installed."""
    for name in ("megacell", "megacell-store"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with the sub-commands of all installed sub-packages; imports none of their heavy parts."""
    parser = argparse.ArgumentParser(prog="megacell", description="Pretrain foundation models on single cells.")
    parser.add_argument("--version", action="version", version=f"megacell {installed_version()}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for point in sorted(entry_points(group=COMMANDS), key=lambda p: p.name, reverse=True):
        point.load()(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code: 0, 1 for bad data, 2 for wrong usage, 70 for a defect,
    130 for Ctrl-C.

    A sub-parser names its function with ``set_defaults(run=…)``; with ``overrides=True`` it receives the
    arguments that argparse does not know (Hydra's) as ``args.overrides``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments  # wherever it stands
    arguments = [a for a in arguments if a != "--debug"]
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if getattr(args, "overrides", False):
        args.overrides = rest
    elif rest:
        parser.error(f"{args.command}: unknown arguments: {' '.join(rest)}")
    args.debug = debug
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("megacell: interrupted", file=sys.stderr)
        return 130
    except MegacellError as error:
        if debug:
            traceback.print_exc()
        print(f"megacell {args.command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a missing right: the message names the file
        if debug:
            traceback.print_exc()
        print(f"megacell {args.command}: error: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # a defect of ours, or of a library: the traceback is asked for with --debug
        if debug:
            raise
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"megacell {args.command}: internal error: {text}; --debug shows where", file=sys.stderr)
        return INTERNAL_ERROR


if __name__ == "__main__":
    sys.exit(main())
