# SPDX-License-Identifier: Apache-2.0
"""The benchmark of scaling: its cost model's formulas, what it says of many GPUs, and once the whole script."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from cost_model import Link, Machines, Step, Work, efficiency, ring_seconds, step
from hypothesis import given
from hypothesis import strategies as st
from many_gpus import CASES, CELLS, GPUS, H100, lines, many_gpus
from run_pinned import cores_of
from runs import Command

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

FLAT = Machines(8, Link(100.0, 0.5), Link(10.0, 2.0), overlap=False)
WORK = Work(
    tokens=1000, micro_batches=2, seconds_a_token=0.01, parameters=120_000_000, layers=3, hidden=64, weight_bytes=2
)
FAST = Machines(8, Link(1e11, 0.0), Link(1e10, 0.0), overlap=True)


def test_one_rank_takes_as_long_as_was_measured():
    alone = step(WORK, FLAT, 1)
    assert alone == Step(compute=10.0, imbalance=0, gradients=0, weights=0, tensor=0)
    assert alone.seconds == 10.0
    assert efficiency(WORK, alone) == 1


@pytest.mark.parametrize(
    ("ranks", "stride", "seconds"),
    [
        (1, 1, 0.0),
        (4, 1, 3 / 4 * 800 / 100 + 3 * 0.5),
        (16, 1, 15 / 16 * 800 / 80 + 13 * 0.5 + 2 * 2.0),  # eight adapters of 10
        (8, 2, 7 / 8 * 800 / 40 + 5 * 0.5 + 2 * 2.0),  # four ranks of a ring on each of two machines
    ],
    ids=["alone", "in one machine", "in two machines", "every second rank"],
)
def test_a_ring_sends_its_share_of_the_bytes_in_all_its_hops(ranks, stride, seconds):
    assert ring_seconds(800, ranks, FLAT, stride) == pytest.approx(seconds)


def test_adapters_add_up_to_no_more_than_the_links_inside():
    machines = replace(FLAT, between=Link(1e9, 2.0))
    assert ring_seconds(800, 16, machines) == pytest.approx(15 / 16 * 800 / 100 + 13 * 0.5 + 2 * 2.0)


def test_without_overlap_all_gradients_and_weights_are_waited_for():
    found = step(WORK, replace(FAST, overlap=False), 2)
    assert found.gradients == pytest.approx(1 / 2 * 4 * 120e6 / 1e11)
    assert found.weights == pytest.approx(1 / 2 * 2 * 120e6 / 1e11)
    assert found.seconds == pytest.approx(10 + 360e6 / 1e11)


def test_with_overlap_the_last_bucket_is_waited_for_and_what_the_backward_pass_is_too_short_for():
    each = 1 / 2 * 4 * 40e6 / 1e11  # three buckets of 40 M
    assert step(WORK, FAST, 2).gradients == pytest.approx(each)
    short = replace(WORK, tokens=0.1, micro_batches=1)
    assert step(short, FAST, 2).gradients == pytest.approx(3 * each - 2 / 3 * 0.1 * 0.01)


def test_tensor_parallel_ranks_share_the_work_and_exchange_activations():
    found = step(WORK, FAST, 4, tensor=4)
    rings = 3 * (2 * 4 + 2)
    assert found == Step(2.5, 0, 0, 0, pytest.approx(rings * 3 / 4 * 1000 * 64 * 2 / 1e11))
    assert efficiency(WORK, found, 4) == pytest.approx(2.5 / found.seconds)


def test_the_fullest_rank_is_waited_for():
    assert step(WORK, FLAT, 2, imbalance=0.1).imbalance == pytest.approx(1.0)


@pytest.mark.parametrize(("ranks", "tensor"), [(3, 2), (16, 16)], ids=["no divisor", "more than a machine has"])
def test_ranks_that_do_not_fit_are_refused(ranks, tensor):
    with pytest.raises(ValueError, match=f"{tensor} tensor parallel ranks do not fit"):
        step(WORK, FLAT, ranks, tensor=tensor)


speeds, parts = st.floats(1e6, 1e12), st.floats(0, 1e-3)


@given(
    power=st.integers(0, 9), inside=speeds, latency=parts, slower=st.floats(0.05, 1), later=parts,
    parameters=st.integers(1, 2_000_000_000), tokens=st.floats(1, 1e6), overlap=st.booleans(),
)  # fmt: skip
def test_more_ranks_never_make_a_step_shorter_and_faster_links_never_longer(
    power, inside, latency, slower, later, parameters, tokens, overlap
):
    machines = Machines(8, Link(inside, latency), Link(inside * slower, latency + later), overlap)
    work = replace(WORK, parameters=parameters, tokens=tokens)
    few, many = (step(work, machines, 2**p) for p in (power, power + 1))
    assert few.weights <= many.weights
    assert few.seconds <= many.seconds * (1 + 1e-9) + 4 * 2**power * (latency + later)  # fewer buckets: fewer rings
    faster = replace(machines, inside=Link(2 * inside, latency))
    assert step(work, faster, 2**power).seconds <= few.seconds * (1 + 1e-9)
    assert efficiency(work, many) <= 1


def test_up_to_512_gpus_are_computed_and_say_so(store, vocabulary):
    found = many_gpus([f"store={store}", f"vocabulary={vocabulary}", "out=unused"])
    assert found["kind"] == "computed, on assumptions; not measured"
    assert found["kind"] in lines(found)
    assert all(text in lines(found) for text in found["assumptions"])
    for (model, tensor, share), case in zip(CASES, found["cases"], strict=True):
        assert list(case["gpus"]) == [n for n in GPUS if n % tensor == 0]
        assert case["model"] == model
        of_one = share * H100.peak / case["flops_a_token"]
        if tensor == 1:
            assert case["gpus"][1]["tokens_per_second"] == pytest.approx(of_one)
        shares = [each["efficiency"] for each in case["gpus"].values()]
        assert shares == sorted(shares, reverse=True)
        for gpus, each in case["gpus"].items():
            assert each["tokens_per_second"] == pytest.approx(gpus * each["efficiency"] * of_one)
    assert found["cases"][1]["work"]["parameters"] == pytest.approx(
        found["cases"][0]["work"]["parameters"] * 10, rel=0.9
    )
    assert found["cases"][0]["work"]["tokens"] < CELLS * 2048


def test_a_rank_has_cores_of_its_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7, 9, 11})
    assert [cores_of(rank, 1, 2) for rank in (0, 1)] == [{5, 7}, {9, 11}]
    with pytest.raises(ValueError, match=r"rank 2 of 2 core\(s\), from core 1 on: this process may use 5"):
        cores_of(2, 1, 2)


@pytest.mark.exhaustive
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_the_script_measures_two_processes_predicts_them_and_draws(data, tmp_path):
    json_file, picture = tmp_path / "f.json", tmp_path / "f.png"
    script = Command(
        data / "cells", data / "geneformer" / "V2", "model=tiny", "--ranks", "1,2", "--cells", "2", "--warmup", "2",
        "--steps", "3", "--windows", "2", "--json", json_file, "--chart", picture,
        script=(BENCHMARKS / "scaling.py",),
    )  # fmt: skip
    said, errors = script.process.communicate(timeout=900)  # it starts training four times
    assert script.process.returncode == 0, errors
    figures = json.loads(json_file.read_text())
    one, two = figures["measured"]["1"], figures["measured"]["2"]
    assert one["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(two["tokens_per_second"] / 2 / one["tokens_per_second"])
    assert two["prediction_error"] == pytest.approx(two["predicted_seconds"] / two["step_seconds"] - 1)
    assert two["link"]["bandwidth"] > 0
    assert two["apart_tokens_per_second"] > 0
    (goal,) = figures["goals"]
    assert goal["result"] == ("met" if two["efficiency"] >= 0.9 else "missed")
    assert "at least 1.80" in said
    assert figures["computed"]["kind"] in said
    assert picture.read_bytes().startswith(b"\x89PNG")
