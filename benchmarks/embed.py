# SPDX-License-Identifier: Apache-2.0
"""`megacell bench embed` on real cells with Geneformer's own V1 tokens.

    python benchmarks/embed.py CELLS.h5ad GENEFORMER [--json FILE] [OPTION...]

GENEFORMER: a folder with V1's dictionaries. The rest goes to `megacell bench embed`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from megacell.geneformer.geneformer_pickles import import_geneformer
from megacell.store import cli


def main() -> int:
    """Import, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, metavar="CELLS")
    parser.add_argument("geneformer", type=Path, metavar="GENEFORMER")
    args, rest = parser.parse_known_args()
    names = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict", "gene_name_id_dict")
    with tempfile.TemporaryDirectory() as folder:
        paths = [next(args.geneformer.glob(f"{name}*.pkl")) for name in names]
        import_geneformer(*paths).save(Path(folder) / "vocabulary")
        return cli.main(["bench", "embed", str(args.cells), "--vocabulary", f"{folder}/vocabulary", *rest])


if __name__ == "__main__":
    sys.exit(main())
