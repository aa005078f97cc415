# SPDX-License-Identifier: Apache-2.0
"""Small shards merged: the same cells in the same order, and older readers undisturbed until they are pruned."""

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import kneighbors_graph

from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore, compact, convert
from megacell.store.format.manifest import Manifest
from megacell.store.format.verify import verify
from megacell.store.maintain import compaction

ALLOWED = {"allow_subset": True, "allow_low_counts": True}
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
DAYS = 86400


def assert_same_cells(found: CellStore, expected: CellStore) -> None:
    """Everything that a reader can ask of a store, cell by cell."""
    assert found.shape == expected.shape
    assert list(found.gene_ids) == list(expected.gene_ids)
    for own, theirs in zip(found.gather(slice(None)), expected.gather(slice(None)), strict=True):
        np.testing.assert_array_equal(own, theirs)
    np.testing.assert_array_equal(found.cell_hash, expected.cell_hash)
    np.testing.assert_array_equal(found.source_of, expected.source_of)
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    assert found.sources == expected.sources
    for source in range(len(found.sources)):
        np.testing.assert_array_equal(found.panel(source), expected.panel(source))
    assert found.manifest.neighbours == expected.manifest.neighbours
    for name in found.manifest.graphs:
        rows = [each.neighbours(name).rows(slice(None)) for each in (found, expected)]
        assert (rows[0] != rows[1]).nnz == 0


def dtypes(store: CellStore, name: str) -> list[str | None]:
    return [shard.files[f"{name}.npy"].dtype for shard in store.manifest.shards]


@pytest.fixture
def store(made, save, tmp_path) -> CellStore:
    """Five generations of a shard each; their metadata conflict, miss and unite, their genes differ."""
    path = tmp_path / "store"
    for number in range(5):
        counts = made.counts(20 + number, 120, seed=number, depth=500.0)
        counts[1, 2:5] = 255, 70_000, 2**32 - 257
        data = made.anndata(counts, first_gene=30 * number, name=f"s{number}")
        data.obs["mixed"] = [1.5, 2, "two", True, 7][number]
        data.obs["type"] = pd.Categorical(
            [["B", "T", None][i % 3] for i in range(len(counts))], ["T", "B", f"x{number}"]
        )
        data.obs[f"only-{number}"] = np.arange(len(counts))
        if number in (1, 3):
            data.obsp["distances"] = kneighbors_graph(counts, 4, mode="distance")
        names = ("distances",) if "distances" in data.obsp else ()
        convert(save(data, f"{number}.h5ad"), path, append=number > 0, neighbours=names, **ALLOWED)
    return CellStore.open(path)


def test_the_cells_are_the_same_in_one_shard(store):
    report = compact(store.path)
    assert (report.generation, report.merged, report.shards, report.pruned, report.freed) == (6, 5, 1, [], 0)
    new = CellStore.open(store.path)
    assert_same_cells(new, CellStore.open(store.path, generation=5))
    assert len(new.manifest.shards) == 1
    assert [source.cells for source in new.sources] == [20, 21, 22, 23, 24]
    assert verify(store.path).damages == []
    assert verify(store.path).files == sum(path.is_file() for path in store.path.rglob("*"))


def test_shards_are_filled_and_no_further_and_full_ones_left_alone(store):
    sizes = [sum(file.bytes for file in shard.files.values()) for shard in store.manifest.shards]
    report = compact(store.path, shard_bytes=sum(sizes[:2]))
    new = CellStore.open(store.path)
    assert [shard.cells for shard in new.manifest.shards][:2] == [41, 22]
    assert report.merged == 5 - sum(shard in store.manifest.shards for shard in new.manifest.shards)
    assert_same_cells(new, store)
    again = compact(store.path, shard_bytes=1)
    assert (again.generation, again.merged) == (6, 0)
    assert Manifest.open(store.path).digest == new.digest


def test_readers_of_every_generation_go_on_reading(store):
    opened = CellStore.open(store.path, generation=3)
    opened.rows([0])  # one shard mapped, two not yet
    expected = [CellStore.open(store.path, generation=g).rows(slice(None)).toarray() for g in range(1, 6)]
    compact(store.path)
    np.testing.assert_array_equal(opened.rows(slice(None)).toarray(), expected[2])
    for generation, counts in enumerate(expected, 1):
        reader = CellStore.open(store.path, generation)
        np.testing.assert_array_equal(reader.rows(slice(None)).toarray(), counts)
        assert len(reader.obs) == len(counts)


def test_later_conversions_leave_shards_of_earlier_generations_alone(store, made, save):
    """A failed one sweeps, and a new shard must not take the name of one that is no longer in the manifest."""
    expected = store.rows(slice(None)).toarray()
    compact(store.path)
    with pytest.raises(DataError, match=r"bad\.h5ad"):
        convert(save(-made.counts(20, 300, seed=8), "bad.h5ad"), store.path, append=True, **ALLOWED)
    later = made.counts(25, 300, seed=9)
    convert(save(later, "later.h5ad"), store.path, append=True, **ALLOWED)
    old, new = CellStore.open(store.path, generation=5), CellStore.open(store.path)
    np.testing.assert_array_equal(old.rows(slice(None)).toarray(), expected)
    assert not {s.name for s in old.manifest.shards} & {s.name for s in new.manifest.shards}
    np.testing.assert_array_equal(made.all_counts(new, [f"ENSG{i:011d}" for i in range(300)])[110:], later)
    assert verify(store.path).damages == []


@pytest.mark.parametrize(
    ("share", "expected"), [(0.015, "uint8"), (0.05, "uint16")], ids=["few of all are large", "many are large"]
)
def test_counts_widen_only_where_they_must(share, expected, made, save, tmp_path):
    """A shard of uint16 among byte counts: what a conversion of all at once would have written."""
    small, large = (np.minimum(made.counts(60, 300, seed=i), 254) for i in range(2))
    stored = np.flatnonzero(large)
    large.flat[np.random.default_rng(3).choice(stored, int(share * len(stored)), replace=False)] = 300
    for number, counts in enumerate((small, large)):
        convert(save(counts, f"{number}.h5ad"), tmp_path / "store", append=number > 0, **ALLOWED)
    convert([tmp_path / "0.h5ad", tmp_path / "1.h5ad"], tmp_path / "at-once", **ALLOWED)
    before = CellStore.open(tmp_path / "store")
    assert dtypes(before, "counts") == ["uint8", "uint16"]
    compact(tmp_path / "store")
    after, at_once = CellStore.open(tmp_path / "store"), CellStore.open(tmp_path / "at-once")
    assert dtypes(after, "counts") == [expected]
    assert after.manifest.shards[0].files["counts.npy"] == at_once.manifest.shards[0].files["counts.npy"]
    assert_same_cells(after, before)


def test_fractions_and_whole_counts_stay_apart(made, save, tmp_path):
    parts = [made.counts(40, 150, seed=i, depth=900.0) for i in range(5)]
    for i in (2, 3):
        parts[i] *= np.random.default_rng(i).uniform(0.7, 1, parts[i].shape).astype(np.float32)
    for number, counts in enumerate(parts):
        convert(save(counts, f"{number}.h5ad"), tmp_path / "store", append=number > 0, **ALLOWED)
    before = CellStore.open(tmp_path / "store")
    report = compact(tmp_path / "store")
    after = CellStore.open(tmp_path / "store")
    assert (report.merged, dtypes(after, "counts")) == (4, ["uint8", "float32", "uint8"])
    assert after.manifest.shards[2] == before.manifest.shards[4]
    assert_same_cells(after, before)


@pytest.mark.exhaustive
def test_gene_numbers_stay_narrow_where_the_genes_came_later(made, save, tmp_path):
    for number, (genes, first) in enumerate([(300, 0), (300, 100), (70_000, 0)]):
        counts = np.zeros((30, genes), np.float32)
        counts[:, :300] = made.counts(30, 300, seed=number)
        counts[0, -1] = 3
        path = save(counts, f"{number}.h5ad", first_gene=first)
        convert(path, tmp_path / "store", append=number > 0, shard_bytes=1 << 20, **ALLOWED)
    before = CellStore.open(tmp_path / "store")
    assert dtypes(before, "indices") == ["uint16", "uint16", "uint32"]
    sizes = [sum(file.bytes for file in shard.files.values()) for shard in before.manifest.shards]
    compact(tmp_path / "store", shard_bytes=sum(sizes[:2]))
    assert dtypes(CellStore.open(tmp_path / "store"), "indices") == ["uint16", "uint32"]
    compact(tmp_path / "store")
    assert dtypes(CellStore.open(tmp_path / "store"), "indices") == ["uint32"]
    assert_same_cells(CellStore.open(tmp_path / "store"), before)


@pytest.mark.exhaustive
def test_several_workers_make_the_same_shards(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "copy")
    sizes = [sum(file.bytes for file in shard.files.values()) for shard in store.manifest.shards]
    for path, workers in ((store.path, 1), (tmp_path / "copy", 2)):
        report = compact(path, workers=workers, shard_bytes=max(a + b for a, b in pairwise(sizes)))
    assert report.merged >= 4
    assert Manifest.open(store.path).digest == Manifest.open(tmp_path / "copy").digest
    assert_same_cells(CellStore.open(tmp_path / "copy"), store)


def test_after_a_kill_finished_shards_are_taken(store, tmp_path, monkeypatch):
    shutil.copytree(store.path, tmp_path / "copy")
    options = {"shard_bytes": 2 * max(sum(f.bytes for f in s.files.values()) for s in store.manifest.shards)}
    compact(tmp_path / "copy", **options)
    real, made = compaction.ShardWriter, tmp_path / "made"  # in another process, so a file tells
    made.touch()

    class Counted(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args, **kwargs):
            made.write_text(f"{made.read_text()} {args[1]}")
            if len(made.read_text().split()) == 2:
                raise KeyboardInterrupt
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(compaction, "ShardWriter", Counted)
    with pytest.raises(KeyboardInterrupt):
        compact(store.path, **options)
    assert Manifest.open(store.path).digest == store.digest
    compact(store.path, **options)
    assert made.read_text().split() == ["00005", "00006", "00006"]
    assert Manifest.open(store.path).digest == Manifest.open(tmp_path / "copy").digest
    assert sorted(p.name for p in store.path.rglob("*")) == sorted(p.name for p in (tmp_path / "copy").rglob("*"))


# -- pruning


def test_pruning_lets_go_of_what_was_replaced_long_enough_ago(store):
    compact(store.path)
    before = {path.relative_to(store.path).as_posix() for path in store.path.glob("shards/*")}
    report = compact(store.path, prune=True)
    assert (report.generation, report.pruned, report.freed) == (6, [], 0)
    assert report.kept > 0
    assert {path.relative_to(store.path).as_posix() for path in store.path.glob("shards/*")} == before
    for manifest in store.path.glob("manifest-[12345].json"):
        os.utime(manifest, (1, 1))
    os.utime(store.path / "manifest-6.json", times=(manifest.stat().st_mtime + 3 * DAYS,) * 2)
    report = compact(store.path, prune=True)
    assert (report.generation, report.pruned, report.kept) == (7, [1, 2, 3, 4, 5], 0)
    new = CellStore.open(store.path)
    assert new.manifest.earlier == ("manifest-6.json",)  # has no shard of its own, so costs nothing
    for generation in (6, 7):
        assert_same_cells(CellStore.open(store.path, generation), new)
    with pytest.raises(DataError, match="holds no generation 5; its newest is 7"):
        CellStore.open(store.path, generation=5)
    assert [path.name for path in store.path.glob("shards/*")] == ["00005"]
    assert [path.name for path in store.path.glob("neighbours/*")] == ["distances-4"]
    assert sorted(path.name for path in store.path.iterdir() if path.is_file()) == [
        *("genes-5.parquet", "manifest-6.json", "manifest-7.json", "manifest.json", "panels-5.parquet")
    ]
    assert verify(store.path).damages == []


def test_at_once_if_asked_and_mapped_shards_stay_readable(store):
    expected = store.rows(slice(None)).toarray()  # every shard is mapped now
    report = compact(store.path, prune=True, older_than=0)
    assert (report.generation, report.pruned, report.kept) == (6, [1, 2, 3, 4, 5], 0)
    assert report.freed > 0
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), expected)
    np.testing.assert_array_equal(CellStore.open(store.path).rows(slice(None)).toarray(), expected)
    late = CellStore(store.path, store.manifest)
    with pytest.raises(DataError, match=r"shards/00000.*cannot be read"):
        late.rows([0])


def test_generations_whose_shards_are_all_needed_stay(store):
    report = compact(store.path, prune=True, older_than=0, shard_bytes=1)
    # the first graph, of generation 2, was replaced by a grown one in generation 4
    assert (report.merged, report.pruned, report.generation) == (0, [2, 3], 6)
    assert CellStore.open(store.path).manifest.earlier == ("manifest-1.json", "manifest-4.json", "manifest-5.json")
    for generation in (1, 4, 5):
        assert len(CellStore.open(store.path, generation).obs) == [20, 41, 63, 86, 110][generation - 1]
    assert verify(store.path).damages == []
    again = compact(store.path, prune=True, older_than=0, shard_bytes=1)
    assert (again.generation, again.pruned) == (6, [])


def test_hours_below_none_are_wrong_usage(store):
    with pytest.raises(UsageError, match="--older-than -1: give hours, 0 or more"):
        compact(store.path, prune=True, older_than=-1)


# -- what goes wrong


@pytest.mark.parametrize("name", ["counts.npy", "obs.parquet", "panels.npy"])
def test_damage_is_not_copied_under_a_good_checksum(name, store):
    path = store.path / "shards/00002" / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(bytes(content))
    before = sorted(store.path.rglob("*"))
    with pytest.raises(DataError, match=rf"00002/{name}: damaged .*restore it from a copy, then compact"):
        compact(store.path)
    assert sorted(store.path.rglob("*")) == before
    assert Manifest.open(store.path).digest == store.digest


def test_cells_that_are_not_those_that_were_hashed_are_refused(store, monkeypatch):
    real = compaction._exact
    monkeypatch.setattr(compaction, "_exact", lambda *args: real(*args) + 1)
    with pytest.raises(DataError, match="are not those that were hashed"):
        compact(store.path)
    assert Manifest.open(store.path).digest == store.digest


def test_an_unfinished_conversion_is_not_thrown_away(store, made, save, tmp_path, monkeypatch):
    new = save(made.counts(30, 300, seed=9), "new.h5ad")
    convert(new, store.path, append=True, part=(1, 2), **ALLOWED)
    with pytest.raises(DataError, match="a conversion was not finished here"):
        compact(store.path)
    convert(new, store.path, append=True, finish=True, **ALLOWED)
    compact(store.path)
    assert len(CellStore.open(store.path)) == 140


def test_what_is_no_store_is_refused_and_left_alone(tmp_path):
    with pytest.raises(DataError, match="not a cell store"):
        compact(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_never_meet(store, made, save, monkeypatch):
    real, new = compaction._open_whole, save(made.counts(20, 300, seed=8), "new.h5ad")

    def second_writer(*args):
        for work in (lambda: compact(store.path), lambda: convert(new, store.path, append=True, **ALLOWED)):
            with pytest.raises(DataError, match="another conversion is writing here"):
                work()
        return real(*args)

    monkeypatch.setattr(compaction, "_open_whole", second_writer)
    compact(store.path)
    assert_same_cells(CellStore.open(store.path), store)


def test_a_full_disk_is_one_line_and_leaves_the_store_as_it_was(store):
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    limit = sum(shard.values for shard in store.manifest.shards)
    code = (
        "import resource, sys; from megacell.core.cli.main import main\n"
        "from megacell.store.maintain import compaction\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.exit(main(['compact', {str(store.path)!r}, '--workers', '1']))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=False)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "File too large" in answer.stderr
    assert {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()} == before


def test_real_cells_that_came_one_file_at_a_time(real_cells: Path, tmp_path):
    store = tmp_path / "store"
    for number, path in enumerate(sorted(real_cells.glob("*.h5ad"))):
        data = ad.read_h5ad(path) if number < 2 else None
        if data is not None:
            data.obsp["connectivities"] = kneighbors_graph(np.log1p(data.X.toarray()[:, :300]), 10).astype(np.float32)
            path = tmp_path / path.name
            data.write_h5ad(path)
        convert(path, store, append=number > 0, neighbours=("connectivities",) if number < 2 else ())
    before = CellStore.open(store)
    assert len(before.manifest.shards) == 3
    report = compact(store)
    assert (report.merged, report.shards) == (3, 1)
    assert_same_cells(CellStore.open(store), before)
    convert([*sorted(tmp_path.glob("*.h5ad")), real_cells / "pbmc5k_protein.h5ad"], tmp_path / "at-once")
    at_once = CellStore.open(tmp_path / "at-once")
    np.testing.assert_array_equal(at_once.cell_hash, CellStore.open(store).cell_hash)
