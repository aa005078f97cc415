# SPDX-License-Identifier: Apache-2.0
"""The errors that a user sees as one line: what is wrong, where, and how to fix it."""


class MegacellError(Exception):
    """Base of the errors that the command line prints without a traceback.

    Attributes
    ----------
    exit_code : int
        1 for bad data, 2 for wrong usage.
    """

    exit_code = 1


class DataError(MegacellError):
    """The data are not what they should be: the message names the file, the place in it and the fix."""


class KilledError(DataError):
    """A process was killed from outside, or for want of memory: no file is to blame, and finished work is kept."""


class UsageError(MegacellError):
    """The command or call was wrong: the message names the argument and what it should have been."""

    exit_code = 2


def printable(text: object) -> str:
    """Return a text from a file, or a file's name, as it may be shown on a terminal: in one line, and without commands.

    A terminal takes what follows an escape character, and some others, as a command: to change its title, to answer as
    if a key had been pressed. What is not printable becomes an escape sequence as Python writes it.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
