# SPDX-License-Identifier: Apache-2.0
"""The errors that a user sees as one line: what, where, and how to mend it."""


class MegacellError(Exception):
    """Base of the errors that the command line prints without a traceback.

    Attributes
    ----------
    exit_code : int
        1 for bad data, 2 for wrong usage.
    """

    exit_code = 1


class DataError(MegacellError):
    """The data are not what they should be: names the file, the place and the mend."""


class KilledError(DataError):
    """A process was killed from outside, or for want of memory: no file is to blame, and what is done is kept."""


class UsageError(MegacellError):
    """The command or call was wrong: names the argument and what it should have been."""

    exit_code = 2
