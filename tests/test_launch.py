# SPDX-License-Identifier: Apache-2.0
"""However its processes are started, a run is the same run."""

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from megacell.core import cache as array_cache
from megacell.core.cli.main import main as megacell
from megacell.training.distributed import launch
from megacell.training.run import sweep as sweep_module
from ranks import free_port

GENES, CELLS, WAIT = 12_000, 120, 240


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A small made-up store, its vocabulary, and the settings of a short run over them."""
    folder = tmp_path_factory.mktemp("launch")
    draw = np.random.default_rng(0)
    rates, depths = draw.gamma(0.1, 0.5, size=GENES), draw.lognormal(sigma=0.5, size=(CELLS, 1))
    counts = draw.poisson(rates * depths).astype(np.float32)
    names = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(GENES)])
    ad.AnnData(counts, var=names, obs=pd.DataFrame(index=[f"cell{i}" for i in range(CELLS)])).write_h5ad(
        folder / "cells.h5ad"
    )
    assert megacell(["convert", str(folder / "cells.h5ad"), "--out", str(folder / "store")]) == 0
    assert megacell(["vocabulary", "build", str(folder / "store"), "--out", str(folder / "vocabulary")]) == 0
    tiny = ["model.layers=1", "model.hidden=32", "model.ffn=64", "model.max_length=256"]
    short = ["steps=3", "batch.cells=8", "batch.tokens=1024", "log_every=1", "checkpoint.every=3", "validation.every=3"]
    return [f"store={folder / 'store'}", f"vocabulary={folder / 'vocabulary'}", *tiny, *short]


def losses(run: Path) -> list[float]:
    """Return the training losses of a run."""
    with open(run / "metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def finish(processes: list[subprocess.Popen], starts: int = 1) -> None:
    """Wait for processes that must all end well, and that start training so many times, one after the other."""
    for process in processes:
        output, _ = process.communicate(timeout=starts * WAIT)
        assert process.returncode == 0, output


def start(command: list[str], **environment: str) -> subprocess.Popen:
    """Start one process with what it needs in its environment."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def by_devices(pretrain: list[str]) -> list[subprocess.Popen]:
    return [start([sys.executable, "-m", *pretrain, "devices=2"])]


def by_torchrun_on_two_nodes(pretrain: list[str]) -> list[subprocess.Popen]:
    port = free_port()
    return [
        start([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
               "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test",
               "--rdzv-endpoint", f"127.0.0.1:{port}", "-m", *pretrain])
        for node in range(2)
    ]  # fmt: skip


def by_launcher_torchrun(pretrain: list[str]) -> list[subprocess.Popen]:
    meeting = ["launcher=torchrun", "launcher.nodes=2", f"launcher.endpoint=127.0.0.1:{free_port()}"]
    return [start([sys.executable, "-m", *pretrain, *meeting, "launcher.address=127.0.0.1"]) for _ in range(2)]


@pytest.fixture
def namespaces():
    """Two network namespaces with a cable between them: (name, address, device) of each end."""
    ends = [(f"megacell-{os.getpid()}-{k}", f"10.77.0.{k + 1}", f"mc{os.getpid()}-{k}") for k in range(2)]
    made = [["netns", "add", name] for name, *_ in ends]
    made += [["link", "add", ends[0][2], "netns", ends[0][0], "type", "veth", "peer", ends[1][2], "netns", ends[1][0]]]
    made += [["-n", name, "addr", "add", f"{address}/24", "dev", device] for name, address, device in ends]
    made += [["-n", name, "link", "set", device, "up"] for name, _, end in ends for device in (end, "lo")]
    try:
        for words in made:
            if shutil.which("ip") is None or subprocess.run(["ip", *words], capture_output=True).returncode:
                pytest.skip("no network namespaces can be made here")
        yield ends
    finally:
        for name, *_ in ends:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def by_srun(pretrain: list[str]) -> list[subprocess.Popen]:
    job = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": str(10_000 + free_port()),  # Lightning makes the port of it
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
    }
    return [
        start([sys.executable, "-m", *pretrain], **job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def reference(settings, tmp_path_factory) -> list[float]:
    """Losses of two ranks that `devices=2` started."""
    run = tmp_path_factory.mktemp("reference") / "run"
    finish(by_devices(["megacell", "pretrain", *settings, f"out={run}"]))
    return losses(run)


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(by_torchrun_on_two_nodes, marks=pytest.mark.exhaustive),
        pytest.param(by_launcher_torchrun, marks=pytest.mark.exhaustive),
        by_srun,
    ],
)
def test_every_way_to_start_two_ranks_gives_the_same_losses(way, settings, reference, tmp_path):
    run = tmp_path / "run"
    finish(way(["megacell", "pretrain", *settings, f"out={run}"]))
    assert len(reference) == 3
    assert losses(run) == reference


@pytest.mark.exhaustive
def test_machines_that_know_each_other_by_address_only_give_the_same_losses(settings, reference, namespaces, tmp_path):
    run, port = tmp_path / "run", free_port()
    meeting = ["launcher=torchrun", "launcher.nodes=2", f"launcher.endpoint={namespaces[0][1]}:{port}"]
    pretrain = ["-m", "megacell", "pretrain", *settings, f"out={run}", *meeting]
    finish(
        [
            start(
                ["ip", "netns", "exec", name, sys.executable, *pretrain, f"launcher.address={address}"],
                GLOO_SOCKET_IFNAME=device,
            )
            for name, address, device in namespaces
        ]
    )
    assert losses(run) == reference


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:0", "localhost:0", "[::1]:0", "192.0.2.1:0", "no-such-host.invalid:0", "host"]
)
def test_what_is_no_address_of_this_machine_but_its_loopback_is_left_to_torch(endpoint):
    assert not launch._is_here(endpoint)


def test_machines_that_do_not_meet_are_told_where_and_what_to_do(settings, tmp_path, monkeypatch, capsys):
    def elastic_launch(config, command):
        raise RendezvousConnectionError("nobody answers")

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    meeting = ["launcher=torchrun", "launcher.nodes=2", "launcher.endpoint=192.0.2.1:29400"]
    assert megacell(["pretrain", *settings, f"out={tmp_path / 'run'}", *meeting]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "launcher.endpoint=192.0.2.1:29400: 2 machine(s) did not meet there (nobody answers)" in line


# Slurm, played by three scripts


SBATCH = """\
#!{python}
# Runs the job at once, and again as long as it is queued again.
import os, subprocess, sys
print("Submitted batch job 1234567")
state = os.environ["FAKE_SLURM"]
for turn in range(3):
    code = subprocess.run(["bash", sys.argv[1]], env={{**os.environ, "SLURM_JOB_ID": "1234567"}}).returncode
    with open(f"{{state}}/turns", "a") as file:
        file.write(f"{{code}}\\n")
    if not os.path.exists(f"{{state}}/requeued"):
        sys.exit(code)
    os.unlink(f"{{state}}/requeued")
"""
SRUN = """\
#!{python}
# Two tasks; in the first turn they get SIGUSR1 once a step was logged, as --signal has it.
import os, signal, subprocess, sys, time
state, command = os.environ["FAKE_SLURM"], [word for word in sys.argv[1:] if not word.startswith("--wait")]
job = {{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
       "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": os.environ["FAKE_PORT"]}}
tasks = [
    subprocess.Popen(command, env={{**os.environ, **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(2)
]
metrics = f"{{os.environ['FAKE_RUN']}}/metrics.csv"
first = not os.path.exists(f"{{state}}/turns")
while first and tasks[0].poll() is None:
    if os.path.exists(metrics) and len(open(metrics).readlines()) > 3:
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
        break
    time.sleep(0.05)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """\
#!{python}
import os, sys
assert sys.argv[1:] == ["requeue", "1234567"], sys.argv
open(f"{{os.environ['FAKE_SLURM']}}/requeued", "w").close()
"""


@pytest.fixture
def slurm(tmp_path):
    """An environment in which sbatch, srun and scontrol are there."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    run = tmp_path / "a run"
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return run, {"PATH": path, "FAKE_SLURM": str(folder), "FAKE_RUN": str(run), "FAKE_PORT": str(free_port())}


@pytest.mark.exhaustive
def test_a_slurm_job_saves_before_its_time_is_up_and_is_queued_again_until_done(settings, slurm):
    run, environment = slurm
    given = [o for o in settings if not o.startswith(("steps=", "checkpoint.", "validation."))]
    job = ["launcher=srun", "devices=2", "launcher.nodes=1", "steps=200", "launcher.options=['--partition=gpu']"]
    command = [sys.executable, "-m", "megacell", "pretrain", *given, *job, f"out={run}"]
    finish([start(command, **environment)], starts=2)
    assert (Path(environment["FAKE_SLURM"]) / "turns").read_text().split() == ["75", "0"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["step"], summary["finished"]) == (200, True)
    script = Path(f"{run}.sbatch").read_text()
    for line in ("--ntasks-per-node=2", "--gpus-per-node=2", "--signal=USR1@300", "--requeue", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in script
    assert "launcher" not in (run / "config.yaml").read_text()


def test_without_sbatch_the_script_is_there_and_says_where_to_take_it(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    code = megacell(["pretrain", *settings, "launcher=srun", f"out={tmp_path / 'run'}"])
    assert code == 2
    assert f"submit {tmp_path / 'run'}.sbatch where Slurm is" in capsys.readouterr().err
    assert subprocess.run(["/bin/bash", "-n", f"{tmp_path / 'run'}.sbatch"]).returncode == 0


# sweeps


def sweep(settings: list[str], *more: str) -> None:
    finish([start([sys.executable, "-m", "megacell", "pretrain", "--multirun", *settings, *more])], starts=2)


@pytest.mark.exhaustive
def test_a_sweep_is_a_run_for_each_value_as_if_started_by_itself(settings, reference, tmp_path):
    sweep(settings, f"out={tmp_path / 'sweep'}", "optim.lr=1e-3,2e-3", "devices=2")
    one, two = (tmp_path / "sweep" / name for name in "01")
    assert losses(one) == reference
    assert losses(two) != reference
    assert losses(two)[0] == reference[0]


class Heard(logging.Handler):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record."""
        self.said.append(record.getMessage())


@pytest.fixture
def heard():
    """What one of our modules says in its log; Hydra's own changes to the root of all logs are undone."""
    root, handler = logging.getLogger(), Heard()
    kept = root.handlers[:], root.level, array_cache.log.disabled
    array_cache.log.addHandler(handler)
    yield handler.said
    array_cache.log.removeHandler(handler)
    root.handlers[:], root.level, array_cache.log.disabled = kept


def test_warnings_of_ours_are_heard_in_a_sweep_and_after_it(settings, heard, tmp_path, monkeypatch):
    def one(cfg) -> float:
        array_cache.log.warning("in run %s", cfg.seed)
        return 0.0

    monkeypatch.setattr(sweep_module, "one", one)
    assert sweep_module.main([*settings, f"out={tmp_path / 'sweep'}", "seed=1,2"]) == 0
    array_cache.log.warning("after it")
    assert heard == ["in run 1", "in run 2", "after it"]


@pytest.mark.exhaustive
def test_optuna_looks_for_the_lowest_held_out_loss(settings, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    out = tmp_path / "sweep"
    sweep(settings, f"out={out}", "sweep=optuna", "hydra.sweeper.n_trials=2")
    found = [json.loads((out / name / "summary.json").read_text())["held_out_loss"] for name in "01"]
    assert f"best_value: {min(found)}" in (out / "optimization_results.yaml").read_text()


@pytest.mark.exhaustive
def test_submitit_runs_a_sweep_in_jobs_of_its_own(settings, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    out = tmp_path / "sweep"
    sweep(settings, f"out={out}", "hydra/launcher=submitit_local", "seed=1,2")
    assert len(losses(out / "0")) == len(losses(out / "1")) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [((), "out=… must be given"), (("out=.",), "exists"), (("out=sweep", "launcher=srun"), "choose local or submitit")],
    ids=["out is missing", "out exists", "each run would be submitted"],
)
def test_a_sweep_is_refused_where(words, says, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert megacell(["pretrain", "--multirun", *settings, *words]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
