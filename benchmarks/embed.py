# SPDX-License-Identifier: Apache-2.0
"""`megacell bench embed` on real cells with Geneformer's own V1 tokens.

    python benchmarks/embed.py CELLS.h5ad GENEFORMER [--json FILE] [OPTION...]

GENEFORMER: a folder with V1's dictionaries. The rest goes to `megacell bench embed`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from dictionaries import WITH_NAMES, published_vocabulary

from megacell.core.cli import main as cli


def main() -> int:
    """Import, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, metavar="CELLS")
    parser.add_argument("geneformer", type=Path, metavar="GENEFORMER")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        published_vocabulary(args.geneformer, WITH_NAMES).save(Path(folder) / "vocabulary")
        return cli.main(["bench", "embed", str(args.cells), "--vocabulary", f"{folder}/vocabulary", *rest])


if __name__ == "__main__":
    sys.exit(main())
