# SPDX-License-Identifier: Apache-2.0
"""`python -m megacell`: the command, also for launchers such as torchrun."""

import sys

from megacell.core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
