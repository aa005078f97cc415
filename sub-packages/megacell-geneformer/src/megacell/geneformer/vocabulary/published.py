# SPDX-License-Identifier: Apache-2.0
"""Geneformer's published dictionaries, fetched over HTTPS into the cache: resumed, checked, and read offline after.

Proxies are those of the environment (HTTPS_PROXY, NO_PROXY). HF_ENDPOINT names a mirror of Hugging Face, as for their
own tools. Nothing is used before its SHA-256 is that of the file as published.
"""

import hashlib
import logging
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path

from megacell.core.cache import cache_directory
from megacell.core.errors import DataError, UsageError
from megacell.geneformer.vocabulary.geneformer_dictionaries import import_geneformer
from megacell.geneformer.vocabulary.vocabulary import Vocabulary

REPOSITORY = "ctheodoris/Geneformer/resolve/main"
BYTES_AT_ONCE = 1 << 16
TIMEOUT = 30.0  # seconds without a byte
TRIES = 3  # connections that may break off, a file
PUBLISHED_FILES = {  # part of an edition → (path in the repository, SHA-256 of the file, its bytes)
    "geneformer-v1": {
        "tokens": (
            "geneformer/gene_dictionaries_30m/token_dictionary_gc30M.pkl",
            "ab9dc40973fa5224d77b793e2fd114cacf3d08423ed9c4c49caf0ba9c7f218f1",
            788_424,
        ),
        "medians": (
            "geneformer/gene_dictionaries_30m/gene_median_dictionary_gc30M.pkl",
            "b3b589bb5ec75040d05fc44dd6bf0184cf87f3c362cf158d196a6ed3b7fe5f39",
            940_965,
        ),
        "gene_ids": (
            "geneformer/gene_dictionaries_30m/ensembl_mapping_dict_gc30M.pkl",
            "eac0fb0b3007267871b6305ac0003ceba19d4f28d85686cb9067ecf142787869",
            584_125,
        ),
        "symbols": (
            "geneformer/gene_dictionaries_30m/gene_name_id_dict_gc30M.pkl",
            "55e67962e79c0039a6c32d43c5c99f38e51964bbcfa32f736150ee1e285c438c",
            1_117_117,
        ),
    },
    "geneformer-v2": {
        "tokens": (
            "geneformer/token_dictionary_gc104M.pkl",
            "67c445f4385127adfc48dcc072320cd65d6822829bf27dd38070e6e787bc597f",
            425_590,
        ),
        "medians": (
            "geneformer/gene_median_dictionary_gc104M.pkl",
            "a51c53f6a771d64508dfaf61529df70e394c53bd20856926117ae5d641a24bf5",
            1_512_661,
        ),
        "gene_ids": (
            "geneformer/ensembl_mapping_dict_gc104M.pkl",
            "0819bcbd869cfa14279449b037eb9ed1d09a91310e77bd1a19d927465030e95c",
            3_957_652,
        ),
        "symbols": (
            "geneformer/gene_name_id_dict_gc104M.pkl",
            "fabfa0c2f49c598c59ae432a32c3499a5908c033756c663b5e0cddf58deea8e1",
            1_660_882,
        ),
    },
}
log = logging.getLogger(__name__)


def fetch_geneformer(edition: str) -> Vocabulary:
    """Return a published vocabulary, from the cache or the network.

    Parameters
    ----------
    edition : str
        "geneformer-v1" or "geneformer-v2".

    Raises
    ------
    UsageError
        Another edition.
    DataError
        No connection, or what came is not the published file; says what to do.
    """
    if edition not in PUBLISHED_FILES:
        raise UsageError(f"no edition {edition!r}; there are {', '.join(PUBLISHED_FILES)}")
    files = PUBLISHED_FILES[edition]
    places = {part: fetch(*file) for part, file in files.items()}
    return import_geneformer(places["tokens"], places["medians"], places["gene_ids"], places["symbols"])


def fetch(path: str, sha256: str, size: int) -> Path:
    """Return the place of one published file in the cache, after fetching what of it is not there yet.

    Raises
    ------
    DataError
        As for `fetch_geneformer`.
    """
    place = cache_directory() / "geneformer" / f"{sha256[:16]}-{path.rpartition('/')[2]}"
    if place.is_file() and _sha256(place) == sha256:
        return place
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{REPOSITORY}/{path}"
    part = place.with_name(place.name + ".part")
    place.parent.mkdir(parents=True, exist_ok=True)
    _download(url, part, size)
    if (found := _sha256(part)) != sha256:
        part.unlink()
        raise DataError(
            f"{url}: its SHA-256 is {found[:12]}…, that of the published file {sha256[:12]}…: a proxy's page, a "
            "git-lfs pointer or a changed file; give files that you have to `megacell vocabulary import`"
        )
    part.replace(place)
    return place


def _download(url: str, part: Path, size: int) -> None:
    """Fetch a file to ``part``, going on from what is there, as often as the connection breaks off."""
    if part.exists() and part.stat().st_size > size:
        part.unlink()
    for left in reversed(range(TRIES)):
        try:
            if _continue(url, part, size):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            raise DataError(
                f"{url}: the server answered {error.code} {error.reason}; look at HF_ENDPOINT and at the "
                "proxy, or give files you have to `megacell vocabulary import`"
            ) from None
        except (OSError, HTTPException) as error:  # URLError among them
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if left:
            log.info("%s: %s; going on from %d bytes", url, reason, part.stat().st_size if part.exists() else 0)
    raise DataError(
        f"{url}: cannot be fetched ({reason}); without a network, copy the dictionaries here and use "
        "`megacell vocabulary import`; behind a proxy, set HTTPS_PROXY; what came is kept for the next try"
    )


def _continue(url: str, part: Path, size: int) -> bool:
    """Append what is missing of a file, and return whether all of it came; DataError if more comes than it has."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing
            return True
        raise
    with answer, part.open("ab" if answer.status == 206 else "wb") as file:
        expected = answer.headers.get("Content-Length")
        begin = file.tell()
        while (block := answer.read(BYTES_AT_ONCE)) and file.tell() <= size:
            file.write(block)
        end = file.tell()
    if end > size:
        part.unlink()
        raise DataError(
            f"{url}: sends more than the {size:,} bytes of the published file: a proxy's page or a changed file; give "
            "files that you have to `megacell vocabulary import`"
        )
    if expected is None or not expected.isdecimal() or len(expected) > len(str(size)):  # told nothing that can be true
        return end == size
    return end - begin == int(expected)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
