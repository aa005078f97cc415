# SPDX-License-Identifier: Apache-2.0
"""A file of cells that was made to harm who reads it: it brings in no other file, changes none, and runs nothing."""

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numcodecs
import numpy as np
import pytest
import zarr
from stores_made import CELLS, listing, some_cells

from megacell.core.cli.main import main
from megacell.core.errors import DataError
from megacell.geneformer.embedding.files import embed_file
from megacell.store.conversion.inspection import inspect
from megacell.store.conversion.options import Options, Sample
from megacell.store.sources.registry import find_sources

OTHER = b"".join(b"line %05d holds the secret of another file" % i for i in range(200))


@pytest.fixture(scope="module")
def good(data, tmp_path_factory) -> Path:
    """A file of a few real cells with all that a file can have."""
    cells = some_cells(data)
    cells.obs["kind"] = np.array(["a", "b"] * (CELLS // 2), object)
    cells.obs["kind"] = cells.obs["kind"].astype("category")
    cells.var["n_cells"] = 1
    cells.layers["counts"] = cells.X.copy()
    cells.raw = cells.copy()
    cells.obsm["X_pca"] = np.zeros((CELLS, 3), np.float32)
    cells.uns["title"] = "cells"
    path = tmp_path_factory.mktemp("good") / "good.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture
def other(good, tmp_path) -> Path:
    """Another file of cells, which is none of the first one's business, in a folder of its own."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "secret.txt").write_bytes(OTHER)
    return Path(shutil.copy(good, folder / "other.h5ad"))


def external(name: str) -> Callable[[h5py.File, Path], None]:
    """Return what puts a link to another file in the place of what has a name."""

    def act(file: h5py.File, other: Path) -> None:
        if name in file:
            del file[name]
        file[name] = h5py.ExternalLink(str(other), f"/{name}")

    return act


def soft(name: str, target: str) -> Callable[[h5py.File, Path], None]:
    """Return what puts a link to another place in the place of what has a name."""

    def act(file: h5py.File, _: Path) -> None:
        if name in file:
            del file[name]
        file[name] = h5py.SoftLink(target)

    return act


def stored_elsewhere(name: str) -> Callable[[h5py.File, Path], None]:
    """Return what lets the values of an array lie in another file, as they would by HDF5's external storage."""

    def act(file: h5py.File, other: Path) -> None:
        old, attributes = file[name], dict(file[name].attrs)
        shape, dtype = old.shape, old.dtype if old.dtype.kind != "O" else np.dtype("S4")
        del file[name]
        size = int(np.prod(shape)) * dtype.itemsize
        new = file.create_dataset(name, shape, dtype, external=[(str(other.parent / "secret.txt"), 0, max(1, size))])
        new.attrs.update(attributes)

    return act


def virtual(name: str) -> Callable[[h5py.File, Path], None]:
    """Return what makes an array one whose values are those of another file's."""

    def act(file: h5py.File, other: Path) -> None:
        old, attributes = file[name], dict(file[name].attrs)
        layout = h5py.VirtualLayout(old.shape, old.dtype)
        layout[...] = h5py.VirtualSource(str(other), f"/{name}", old.shape, old.dtype)
        del file[name]
        file.create_virtual_dataset(name, layout).attrs.update(attributes)

    return act


LINKS = {
    **{f"a link at {name}": (external(name), name) for name in (
        *("X", "raw", "raw/X", "raw/var", "layers", "layers/counts", "layers/counts/data", "obs", "obs/n_counts"),
        *("obs/kind/categories", "obs/kind/codes", "var", "var/n_cells", "obsm", "obsm/X_pca", "obsp"),
        *("obsp/distances", "uns", "uns/title", "uns/new", "obsm/X_megacell", "uns/megacell", "varm"),
    )},
    "a link out of a group": (soft("obs/kind", "/obs/n_counts"), "obs/kind"),
    "a link that leads nowhere": (soft("X", "/nowhere"), "X"),
    "a link to itself": (soft("obs/loop", "/obs/loop"), "obs/loop"),
    "a link upwards": (soft("uns/up", ".."), "uns/up"),
    "obs that is a link": (soft("obs", "/var"), "obs"),
}  # fmt: skip
ELSEWHERE = {
    **{f"{name} stored elsewhere": (stored_elsewhere(name), name) for name in (
        *("layers/counts/data", "layers/counts/indices", "layers/counts/indptr", "obs/kind/codes"),
        *("obs/kind/categories", "obs/n_counts", "var/n_cells", "raw/var/n_cells"),
    )},
    **{f"{name} virtual": (virtual(name), name) for name in (
        *("layers/counts/data", "layers/counts/indptr", "obs/kind/codes", "obs/n_counts", "var/n_cells"),
    )},
}  # fmt: skip
IN_A_COPY = {
    "obsm/X_pca stored elsewhere": (stored_elsewhere("obsm/X_pca"), "obsm/X_pca"),
    "obsm/X_pca virtual": (virtual("obsm/X_pca"), "obsm/X_pca"),
}


def made_of(good: Path, folder: Path, other: Path, change: Callable[[h5py.File, Path], None]) -> Path:
    """Return a copy of a file that was changed."""
    path = Path(shutil.copy(good, folder / "evil.h5ad"))
    with h5py.File(path, "r+") as file:
        change(file, other)
    return path


def counts_of(name: str) -> str:
    """Return the matrix to be read so that what has a name is read too."""
    return "raw" if name.startswith("raw") else "layer:counts"


def refusal(path: Path, **options) -> str:
    """Return what a look at a source says against it, "" for nothing."""
    found = inspect(Sample(path, Options(**{"allow_subset": True, "allow_low_counts": True} | options)))
    return str(found.refused or "")


@pytest.mark.parametrize("kind", [*LINKS, *ELSEWHERE])
def test_what_leads_out_of_a_file_is_refused_by_name(kind, good, other, tmp_path):
    change, name = (LINKS | ELSEWHERE)[kind]
    path, before = made_of(good, tmp_path, other, change), listing(other.parent)
    said = refusal(path, counts=counts_of(name), neighbours=("distances",) if "obsp" in name else ())
    assert said.startswith(f"{path}: "), said
    assert name in said
    assert "\n" not in said
    assert "is a link" in said if kind in LINKS else "lie in other files" in said
    assert "secret" not in said.replace(str(tmp_path), "")
    assert listing(other.parent) == before


@pytest.mark.parametrize("kind", [*LINKS, *ELSEWHERE, *IN_A_COPY])
def test_embed_writes_to_no_other_file(kind, good, other, tmp_path):
    change, name = (LINKS | ELSEWHERE | IN_A_COPY)[kind]
    path, before = made_of(good, tmp_path, other, change), listing(tmp_path)
    with pytest.raises(DataError, match=r"is a link|lie in other files") as error:
        embed_file(tmp_path / "no_model.nemo", path, tmp_path / "e.h5ad", allow_subset=True, counts=counts_of(name))
    assert name in str(error.value)
    assert listing(tmp_path) == before


def test_a_good_file_and_a_link_within_a_group_are_taken(good, other, tmp_path):
    assert not refusal(good, neighbours=("distances",))
    assert not refusal(made_of(good, tmp_path, other, soft("obs/same", "n_counts")))


def test_a_whole_file_behind_categories_comes_into_no_store(good, other, tmp_path, capfd):
    def act(file: h5py.File, other: Path) -> None:
        del file["obs/kind/categories"]
        secret = str(other.parent / "secret.txt")
        new = file.create_dataset("obs/kind/categories", (50,), "S64", external=[(secret, 0, 3200)])
        new.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})

    path = made_of(good, tmp_path, other, act)
    assert main(["convert", str(path), "--out", str(tmp_path / "s"), "--workers", "1"]) == 1
    assert not (tmp_path / "s").exists()
    assert "secret of another" not in "".join(capfd.readouterr())


# Zarr


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path, content: bytes) -> None:
        self.marker, self.content = marker, content

    def __reduce__(self):
        return eval, (f"(open({str(self.marker)!r}, 'w').close(), {self.content!r})[1]",)


@pytest.fixture(scope="module", params=[2, 3])
def zarr_store(request, data, tmp_path_factory) -> Path:
    """A Zarr store of a few real cells with texts, of either version."""
    cells = some_cells(data)
    cells.obs["evil"] = np.array([f"c{i}" for i in range(CELLS)], object)
    path = tmp_path_factory.mktemp("zarr") / "good.zarr"
    with ad.settings.override(zarr_write_format=request.param):
        cells.write_zarr(path)
    return path


@pytest.fixture
def evil_zarr(zarr_store, tmp_path) -> Path:
    """A copy of it, to be made hostile."""
    return Path(shutil.copytree(zarr_store, tmp_path / "evil.zarr"))


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Change a file of JSON."""
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("codec", ["pickle", "msgpack2", "json2", "numcodecs.pickle", "no_such_codec"])
@pytest.mark.parametrize("place", ["array", "store"])
def test_a_codec_that_could_run_code_is_refused_before_anything_is_read(codec, place, evil_zarr, tmp_path):
    marker, array = tmp_path / "ran", evil_zarr / "obs/evil"
    texts = numcodecs.VLenUTF8().encode(np.array([f"c{i}" for i in range(CELLS)], object))
    version_2 = (array / ".zarray").exists()
    for chunk in [array / "0"] if version_2 else [path for path in array.rglob("*") if path.name == "0"]:
        chunk.write_bytes(pickle.dumps(Runs(marker, bytes(texts))))
    if version_2:
        own = {"filters": [{"id": "vlen-utf8"}], "compressor": {"id": codec}}
        gathered = lambda content: content["metadata"]["obs/evil/.zarray"].update(own)  # noqa: E731
        name, of_store = ".zarray", ".zmetadata"
    else:
        own = {"codecs": [{"name": "vlen-utf8"}, {"name": codec, "configuration": {}}]}
        name = of_store = "zarr.json"

        def gathered(content) -> None:
            content["consolidated_metadata"]["metadata"]["obs/evil"].update(own)

    if place == "array":
        edit_json(array / name, lambda content: content.update(own))
    else:
        edit_json(evil_zarr / of_store, gathered)
    said = refusal(evil_zarr)
    assert repr(codec.removeprefix("numcodecs.")) in said
    assert "evil.zarr" in said
    assert not marker.exists()


def test_a_sharded_codec_within_another_is_found(evil_zarr):
    if not (evil_zarr / "zarr.json").exists():
        pytest.skip("version 3 alone")
    inner = {"name": "sharding_indexed", "configuration": {"codecs": [{"name": "bytes"}, {"name": "pickle"}]}}
    edit_json(evil_zarr / "obs/evil/zarr.json", lambda content: content.update(codecs=[inner]))
    assert "'pickle'" in refusal(evil_zarr)


@pytest.mark.parametrize("name", ["obs", "obs/evil", "X", ".zattrs", "uns"])
def test_a_link_within_a_zarr_store_is_refused(name, evil_zarr, tmp_path):
    path, moved = evil_zarr / name, tmp_path / "elsewhere"
    if not path.exists():
        path = evil_zarr / "zarr.json"
    shutil.move(path, moved)
    path.symlink_to(moved)
    if path.name in ("zarr.json", ".zattrs"):
        (evil_zarr / ".zgroup").write_text('{"zarr_format": 2}')
    assert f"{path}: is a link" in refusal(evil_zarr)


def test_metadata_that_are_nested_deeply_are_refused(evil_zarr):
    name = ".zarray" if (evil_zarr / "obs/evil/.zarray").exists() else "zarr.json"
    (evil_zarr / "obs/evil" / name).write_text('{"a":' * 100_000)
    assert "cannot be read" in refusal(evil_zarr)


def test_a_good_zarr_store_is_taken(zarr_store):
    assert not refusal(zarr_store)
    assert {"pickle", "json2", "msgpack2"}.isdisjoint(
        codec for codec in zarr.open_group(str(zarr_store), mode="r").attrs
    )


def test_folders_that_lead_back_to_themselves_are_looked_into_once(good, tmp_path):
    folder = tmp_path / "cells"
    folder.mkdir()
    shutil.copy(good, folder / "a.h5ad")
    for i in range(8):
        (folder / f"loop{i}").symlink_to(folder)
    begun = time.process_time()
    assert find_sources(folder) == [folder / "a.h5ad"]
    assert time.process_time() - begun < 5
