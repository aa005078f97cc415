# SPDX-License-Identifier: Apache-2.0
"""bench train: its arithmetic, its padded batches, and once the whole command."""

import json
import signal
import subprocess

import numpy as np
import pytest
from runs import Command

from megacell.core.cli.main import main as megacell
from megacell.core.errors import DataError
from megacell.geneformer.bench import train as bench_train
from megacell.geneformer.bench.train import Protocol, _cut, _figures, evenness, flops_a_token, times
from megacell.geneformer.bench.train_references import IGNORED, batches
from megacell.geneformer.bench.train_report import chart
from megacell.geneformer.pretraining.data import TrainingData
from megacell.training.config import settings

HEAD = "step,loss,tokens_per_second,data_wait,engine,memory_gib,cells,tokens"


@pytest.fixture
def cfg(store, vocabulary, tmp_path):
    return settings.compose([f"store={store}", f"vocabulary={vocabulary}", f"out={tmp_path}/run", "model=tiny"])


@pytest.mark.parametrize("grouped", [False, True], ids=["random", "grouped by length"])
def test_a_padded_batch_holds_the_cells_as_the_pack_does(grouped, cfg):
    cfg.batch.tokens = 1 << 20  # a step is one pack
    data = TrainingData.open(cfg)
    stream, pad = data.stream(), data.vocabulary.specials["pad"]
    (pack,) = stream.step(0)
    inside = slice(0, pack.n_tokens)
    endless = batches(stream, 8, pad, grouped=grouped)
    seen = [next(endless) for _ in range(cfg.batch.cells // 8)]
    tokens = np.concatenate([batch.tokens[batch.real].numpy() for batch in seen])
    labels = np.concatenate([batch.labels[batch.labels != IGNORED].numpy() for batch in seen])
    assert sorted(tokens) == sorted(pack.tokens[inside])
    assert sorted(labels) == sorted(pack.labels)
    assert all((batch.tokens[~batch.real] == pad).all() and batch.real.any(0).all() for batch in seen)
    spread = np.mean([np.ptp(batch.real.sum(1).numpy()) for batch in seen])
    lengths = np.diff(pack.cu_seqlens)[: len(pack.cells)]
    assert spread < np.ptp(lengths) if grouped else spread > 0


def test_windows_begin_after_the_warm_up_and_end_by_steps_or_seconds(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [f"{i},5.0,{1000 if i <= 2 else 100 * i},0.1,0.9,1.5,4,1000" for i in range(1, 9)]
    path.write_text("\n".join([HEAD, *rows]) + "\n")
    windows = _cut(path, Protocol(warmup=2, steps=2, seconds=1e9, windows=2))
    assert [w["tokens"] for w in windows] == [2000, 2000]
    assert windows[0]["seconds"] == pytest.approx(1000 / 300 + 1000 / 400)
    assert len(_cut(path, Protocol(warmup=2, steps=99, seconds=4.0, windows=3))) == 2
    figures = _figures(windows)
    assert figures["tokens_per_second"] == pytest.approx(np.median([w["tokens"] / w["seconds"] for w in windows]))
    assert figures["outside_the_engine"] == pytest.approx(0.1)


def test_required_flops_are_those_of_the_published_arithmetic():
    base = ["store=s", "vocabulary=v", "out=o", "model=geneformer_10m", "batch.tokens=4096"]
    full = np.array([2048])
    masked = flops_a_token(settings.compose(base), full, 25_426)
    whole = flops_a_token(settings.compose([*base, "data.masking.rate=1.0"]), full, 25_426)
    assert (round(masked / 1e6), round(whole / 1e6)) == (63, 96)


def test_ours_is_compared_by_precision_with_as_many_cells_or_else_its_fastest():
    def found(name, cells, precision, rate):
        return {"name": name, "cells": cells, "precision": precision, "tokens_per_second_a_rank": rate}

    ours = [
        found("megacell", 16, "fp32", 10.0),
        found("megacell", 32, "fp32", 8.0),
        found("megacell", 64, "bf16", 30.0),
    ]
    theirs = [found("hugging_face", cells, "fp32", 2.0) for cells in (16, 32, 99)]
    every = {str(n): each for n, each in enumerate([*ours, *theirs])}
    assert [times(every, each) for each in theirs] == [
        {"fp32": 5.0, "bf16": 15.0}, {"fp32": 4.0, "bf16": 15.0}, {"fp32": 5.0, "bf16": 15.0},
    ]  # fmt: skip


def test_the_fill_is_that_of_the_packs(cfg):
    stream = TrainingData.open(cfg).stream()
    packs = [pack for k in range(20) for pack in stream.step(k)]
    imbalance, fill = evenness(cfg, 1)
    assert imbalance == 0
    assert fill == pytest.approx(sum(p.n_tokens for p in packs) / sum(len(p.tokens) for p in packs), rel=1e-3)
    assert fill < 1
    assert evenness(cfg, 4)[0] > 0


def test_a_precision_that_is_none_is_refused(capsys):
    assert megacell(["bench", "train", "store=s", "vocabulary=v", "--precisions", "fp32,fp8"]) == 2
    assert "--precisions fp8: choose of fp32, bf16, fp16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "cells"), [((), (2, 4)), (("batch.cells=8",), (8,))], ids=["as many cells", "cells of its own"]
)
def test_sizes_and_precisions_are_swept(own, cells, store, vocabulary, monkeypatch):
    windows = [{"seconds": 2.0, "tokens": 100, "cells": 4, "steps": 1, "data_seconds": 0.1, "memory_gib": 1.0}]
    asked = []

    def pretrain(overrides, out, protocol):
        asked.append(dict(override.split("=") for override in overrides))
        return bench_train._figures(windows)

    def reference(command, **_):
        lines = "\n".join(json.dumps({**window, "padded_tokens": 200}) for window in windows)
        asked.append(json.loads(command[-1])["cfg"])
        return subprocess.CompletedProcess(command, 0, lines, "")

    monkeypatch.setattr(bench_train, "measure_pretrain", pretrain)
    monkeypatch.setattr(subprocess, "run", reference)
    given = [f"store={store}", f"vocabulary={vocabulary}", "model=tiny", *own]
    found = bench_train.bench_train(
        given, ["hugging_face"], [2, 4], ["fp16", "fp32"], Protocol(1, 2, 1.0, 1), log=lambda _: None
    )
    expected = [("megacell", n, p) for p in ("fp16", "fp32") for n in cells]
    expected += [("hugging_face", n, p) for p in ("fp16", "fp32") for n in (2, 4)]
    assert set(found["contenders"]) == {f"{name}, {n} cells, {p}" for name, n, p in expected}
    assert [each["precision"] for each in asked] == sorted(each["precision"] for each in asked)
    ours = found["contenders"][f"megacell, {cells[0]} cells, fp32"]
    assert ours["tokens_per_second_a_rank"] == ours["tokens_per_second"] == 50
    assert ours["padded_tokens_per_second"] == pytest.approx(50 / ours["real_of_computed"])
    assert found["contenders"]["hugging_face, 2 cells, fp16"]["real_of_computed"] == 0.5
    assert found["times"]["hugging_face, 4 cells, fp16"] == {"fp16": 1.0, "fp32": 1.0}


@pytest.fixture
def failing(store, vocabulary, monkeypatch, tmp_path):
    """`bench train --json`, whose references of 4 cells are killed; ours goes well, if it is asked to."""

    def run(*, ours: bool):
        windows = [{"seconds": 2.0, "tokens": 100, "cells": 4, "steps": 1, "data_seconds": 0.1, "memory_gib": 1.0}]

        def pretrain(overrides, out, protocol):
            if not ours:
                raise DataError("megacell pretrain: ended by itself with 1: no")
            return bench_train._figures(windows)

        def reference(command, **_):
            if json.loads(command[-1])["batch"] == 4 or not ours:
                return subprocess.CompletedProcess(command, -signal.SIGKILL, "", "")
            return subprocess.CompletedProcess(command, 0, json.dumps({**windows[0], "padded_tokens": 200}), "")

        monkeypatch.setattr(bench_train, "measure_pretrain", pretrain)
        monkeypatch.setattr(subprocess, "run", reference)
        given = [f"store={store}", f"vocabulary={vocabulary}", "model=tiny", "--references", "hugging_face"]
        json_file, picture = str(tmp_path / "figures.json"), str(tmp_path / "figures.png")
        return megacell(
            ["bench", "train", *given, "--batches", "2,4,8", "--json", json_file, "--chart", picture]
        ), tmp_path / "figures.json"

    return run


def test_a_contender_that_is_killed_is_named_and_the_others_are_measured(failing, capsys):
    code, written = failing(ours=True)
    figures = json.loads(written.read_text())
    assert code == 1
    why = "hugging_face: killed, most likely for want of memory; give fewer cells a step"
    assert figures["failed"] == {"hugging_face, 4 cells, fp32": why}
    assert [each["cells"] for each in figures["contenders"].values() if each["name"] == "hugging_face"] == [2, 8]
    assert f"hugging_face, 4 cells, fp32: not measured; {why}" in capsys.readouterr().out


def test_where_every_contender_fails_nothing_is_written(failing, capsys):
    code, written = failing(ours=False)
    assert code == 1
    assert "nothing could be measured" in capsys.readouterr().err
    assert not written.exists()


@pytest.mark.exhaustive
def test_the_command_measures_all_contenders_in_each_precision(store, vocabulary, tmp_path):
    json_file, picture = tmp_path / "f.json", tmp_path / "f.png"
    command = Command(
        "bench", "train", f"store={store}", f"vocabulary={vocabulary}", "model=tiny", "--batches", "2",
        "--precisions", "fp16,fp32", "--warmup", "2", "--seconds", "1", "--windows", "2", "--json", json_file,
        "--chart", picture,
    )  # fmt: skip
    said, errors = command.process.communicate(timeout=900)  # eight processes, one after the other
    assert command.process.returncode == 0, errors
    figures = json.loads(json_file.read_text())
    names = ("megacell", "hugging_face", "hugging_face_grouped", "stock_megatron")
    keys = {f"{name}, 2 cells, {precision}" for name in names for precision in ("fp16", "fp32")}
    assert set(figures["contenders"]) == keys
    for each in figures["contenders"].values():
        assert each["padded_tokens_per_second"] > each["tokens_per_second"] > 0
        assert 0 < each["real_of_computed"] < 1
    assert figures["times"].keys() == {name for name in keys if not name.startswith("megacell")}
    assert "padded tokens/s" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    chart(figures, tmp_path / "again.svg")
