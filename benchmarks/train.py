# SPDX-License-Identifier: Apache-2.0
"""`megacell bench train` on real cells with Geneformer's own tokens.

    python benchmarks/train.py CELLS GENEFORMER OPTION=VALUE... [--json FILE] [--chart FILE]

CELLS: a folder of .h5ad files. GENEFORMER: a folder with V2's dictionaries. The rest goes to `megacell bench train`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from dictionaries import WITH_NAMES, published_vocabulary

from megacell.core.cli import main as cli
from megacell.store import convert


def main() -> int:
    """Convert, import, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, metavar="CELLS")
    parser.add_argument("geneformer", type=Path, metavar="GENEFORMER")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        convert([args.cells], Path(folder) / "store")
        published_vocabulary(args.geneformer, WITH_NAMES).save(Path(folder) / "vocabulary")
        command = ["bench", "train", f"store={folder}/store", f"vocabulary={folder}/vocabulary", *rest]
        return cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
