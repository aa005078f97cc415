# SPDX-License-Identifier: Apache-2.0
"""The sub-command completion: a script by which a shell completes all sub-commands that are installed."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh")
WORDS = "completion_words"  # of an argument: a function that returns {option: its values} for arguments OPTION=VALUE
_EPILOG = """\
examples:
  megacell completion bash > ~/.local/share/bash-completion/completions/megacell
  megacell completion zsh > ~/.zfunc/_megacell          ~/.zfunc stands in fpath, before compinit
"""
# bash cuts words at "=": what stands before the cursor may be NAME, NAME = or NAME = part
_BASH = """\
_megacell_options() {{
  local name= part=$1
  if [ "$part" = "=" ]; then
    name=${{COMP_WORDS[COMP_CWORD-1]}} part=
  elif [ "${{COMP_WORDS[COMP_CWORD-1]}}" = "=" ]; then
    name=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  case $name in
    "") compopt -o nospace; compgen -W "{names}" -- "$part" ;;
{values}
    *) compopt -o filenames; compgen -f -- "$part" ;;
  esac
}}"""
_BASH_VALUES = '    {name}) compgen -W "{values}" -- "$part" ;;'
_ZSH = """\
_megacell_options() {{
  if compset -P 1 '*='; then
    case ${{IPREFIX%=}} in
{values}
      *) _files ;;
    esac
  else
    compadd -S '' -- {names}
  fi
}}"""
_ZSH_VALUES = "      {name}) compadd -- {values} ;;"


def register_completion(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add `completion` to argparse's sub-parsers of `parser`, the one that is completed."""
    completion = commands.add_parser(
        "completion",
        help="print a script that completes commands and options in your shell",
        description="Print a script that completes commands and options in your shell.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=run_completion, parser=parser)


def run_completion(args: argparse.Namespace) -> int:
    """Print the script that completes all that ``args.parser`` takes."""
    import shtab

    for action in _arguments(args.parser):
        if words := getattr(action, WORDS, None):
            vars(action)["complete"] = _options(words())
        elif action.type in (None, Path) and action.nargs != 0 and action.choices is None:
            vars(action)["complete"] = shtab.FILE
    print(shtab.complete(args.parser, args.shell))
    return 0


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _arguments(inner)
        else:
            yield action


def _options(words: dict[str, list[str]]) -> dict[str, Any]:
    """Return, as shtab takes it, how OPTION=VALUE is completed: names, then values, or files where any will do."""
    names = " ".join(f"{name}=" for name in words)
    chosen = {name: " ".join(values) for name, values in words.items() if values}
    scripts = {
        shell: form.format(names=names, values="\n".join(one.format(name=n, values=v) for n, v in chosen.items()))
        for shell, form, one in (("bash", _BASH, _BASH_VALUES), ("zsh", _ZSH, _ZSH_VALUES))
    }
    return {"bash": "_megacell_options", "zsh": "_megacell_options", "preamble": scripts}
