# SPDX-License-Identifier: Apache-2.0
"""The commands as users type them: what they print, and their exit codes."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pandas as pd
import pytest
from sklearn.neighbors import kneighbors_graph

from megacell.core.cli import main as cli
from megacell.store import CellStore


@pytest.fixture
def megacell(monkeypatch, capsys):
    """A function that runs the command line and returns exit code, output and errors."""
    point = EntryPoint("store", "megacell.store.commands.register:register", cli.COMMANDS)
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_convert_info_and_verify(megacell, counts, made, save, tmp_path):
    store = tmp_path / "store"
    a, b = save(counts, "a.h5ad"), save(made.counts(40, 300, seed=2), "b.h5ad")
    code, out, err = megacell("convert", a, "--out", store, "--allow-subset")
    assert (code, err) == (0, "")
    assert f"committed generation 1 of {store}: 60 cells, 300 genes" in out
    assert "a: 60 cells, 300 genes, umi counts from X" in out
    assert megacell("convert", b, "--out", store, "--allow-subset", "--append")[0] == 0
    code, out, _ = megacell("info", store, "--json")
    facts = json.loads(out)
    assert (code, facts["cells"], facts["generation"]) == (0, 100, 2)
    assert facts["digest"] == CellStore.open(store).digest
    assert [source["name"] for source in facts["sources"]] == ["a", "b"]
    code, out, _ = megacell("info", store)
    assert code == 0
    assert "cells      100\n" in out
    code, out, _ = megacell("verify", store)
    assert code == 0
    assert "all as they were written" in out


def test_verify_names_damages_and_exits_1(megacell, counts, save, tmp_path):
    megacell("convert", save(counts), "--out", tmp_path / "store", "--allow-subset")
    for name in ("counts.npy", "indices.npy"):
        path = tmp_path / "store/shards/00000" / name
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    code, out, err = megacell("verify", tmp_path / "store")
    assert (code, out) == (1, "")
    assert "counts.npy: damaged" in err
    assert "indices.npy: damaged" in err
    assert "(2 damaged)" in err


def test_dry_run_prints_a_table_and_writes_nothing(megacell, counts, save, tmp_path):
    save(counts, "good.h5ad")
    save(-counts, "bad.h5ad")
    code, out, _ = megacell("convert", tmp_path, "--out", tmp_path / "store", "--dry-run", "--allow-subset")
    assert code == 1
    head, bad, good = out.splitlines()
    assert head.split() == ["file", "cells", "genes", "matrix", "counts", "ids", "species", "verdict"]
    assert bad.split()[0] == "bad.h5ad"
    assert "refused: " in bad
    assert good.split()[:8] == ["good.h5ad", "60", "300", "X", "umi", "ensembl", "human", "good;"]
    assert not (tmp_path / "store").exists()


def test_dry_run_says_where_no_cell_would_be_kept(megacell, counts, made, save, tmp_path):
    obs = pd.DataFrame({"is_primary_data": [False] * 60}, index=[f"c{i}" for i in range(60)])
    path = save(made.anndata(counts, obs=obs))
    arguments = ("convert", path, "--out", tmp_path / "store", "--dry-run", "--allow-subset")
    code, out, _ = megacell(*arguments)
    assert code == 1
    assert "no cell would be kept: --all-cells keeps those marked as not primary" in out
    assert "good" not in out
    code, out, _ = megacell(*arguments, "--all-cells")
    assert (code, "good" in out) == (0, True)
    code, out, _ = megacell(*arguments, "--all-cells", "--where", "is_primary_data")
    assert code == 1
    assert "no cell would be kept: ask for others with --where" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["convert", "absent.h5ad", "--out", "store"], "absent.h5ad: no such file or folder"),
        (["convert", "--out", "store"], "nothing to convert; name files or folders, or --sheet"),
        (["convert", "a.h5ad"], "required: --out"),
        (["convert", "a.h5ad", "--out", "store", "--frobnicate"], "unknown arguments: --frobnicate"),
    ],
)
def test_wrong_usage_exits_2_in_one_line(megacell, arguments, reason):
    code, _, err = megacell(*arguments)
    assert code == 2
    assert reason in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["info", "verify"])
def test_bad_data_exits_1_in_one_line(megacell, command, tmp_path):
    code, _, err = megacell(command, tmp_path)
    assert code == 1
    assert err.count("\n") == 1
    assert err.startswith(f"megacell {command}: error: ")
    assert "Traceback" in megacell(command, tmp_path, "--debug")[2]


def test_help_shows_an_example_and_imports_nothing_slow():
    code = (
        "import sys, argparse; from megacell.store.commands.register import register\n"
        "parser = argparse.ArgumentParser(); register(parser.add_subparsers())\n"
        "try: parser.parse_args(['convert', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'pandas', 'numba', 'torch', 'anndata', 'rich') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "examples:" in answer
    assert "megacell convert samples/ --out cells.store" in answer
    assert answer.splitlines()[-1] == "[]"


def test_graphs_are_kept_listed_and_exported(megacell, counts, made, save, tmp_path):
    data, store = made.anndata(counts), tmp_path / "store"
    data.obsp["distances"] = kneighbors_graph(counts, 4, mode="distance")
    arguments = ("convert", save(data), "--out", store, "--allow-subset", "--neighbours", "distances")
    assert megacell(*arguments)[0] == 0
    assert "neighbours distances (240 edges of 60 cells)\n" in megacell("info", store)[1]
    facts = json.loads(megacell("info", store, "--json")[1])
    assert facts["neighbours"] == [{"name": "distances", "cells": 60, "edges": 240}]
    archive = tmp_path / "archive"
    assert megacell("scdl", "export", store, "--out", archive, "--neighbours", "distances")[0] == 0
    importing = ("scdl", "import", archive, "--out", tmp_path / "back", "--allow-subset", "--neighbours", "knn")
    assert megacell(*importing)[0] == 0
    assert CellStore.open(tmp_path / "back").neighbours("knn").edges == 240
    absent = ("convert", tmp_path / "made.h5ad", "--out", tmp_path / "b", "--allow-subset", "--neighbours", "knn")
    code, _, err = megacell(*absent)
    assert (code, err.count("\n")) == (2, 1)


def test_compact_says_what_it_did(megacell, counts, made, save, tmp_path):
    store = tmp_path / "store"
    for number in range(3):
        path = save(made.counts(30, 300, seed=number), f"{number}.h5ad")
        append = ["--append"] * (number > 0)
        assert megacell("convert", path, "--out", store, "--allow-subset", *append)[0] == 0
    code, out, err = megacell("compact", store, "--workers", 1)
    assert (code, err) == (0, "")
    merged, committed, kept = out.splitlines()
    assert merged == "merged 3 shards into 1"
    assert committed == f"committed generation 4 of {store}: 1 shard"
    assert kept.startswith("earlier generations keep ")
    assert kept.endswith(" bytes of their own; --prune removes them")
    nothing, kept = megacell("compact", store, "--prune")[1].splitlines()
    assert nothing.startswith("nothing to merge: 1 shard")
    assert kept.endswith("replaced under 24 hours ago")
    out = megacell("compact", store, "--prune", "--older-than", 0)[1]
    assert "pruned generations 1, 2, 3: " in out
    assert "earlier generations keep" not in out
    assert [path.name for path in (store / "shards").iterdir()] == ["00003"]
    code, _, err = megacell("compact", tmp_path)
    assert (code, err.count("\n")) == (1, 1)
    assert megacell("compact", store, "--older-than", "-1")[0] == 2
