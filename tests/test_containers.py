# SPDX-License-Identifier: Apache-2.0
"""docker/, checked as far as it goes without a container engine, a cluster or a GPU."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from containers import DOCKER, ROOT, Replay, context, read_dockerfile
from runs import TINY, WAIT, metrics

from ranks import free_port

STAGES = read_dockerfile(DOCKER / "Dockerfile")
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICE, JOB = yaml.safe_load_all((DOCKER / "kubernetes" / "train.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(NODE,) = POD["containers"]
SBATCH = DOCKER / "slurm" / "train.sbatch"
TORCH = "2.11.0a0+a6c236b9fd.nv26.03.46836102"  # of nvcr.io/nvidia/pytorch:26.03-py3
(BOUNDS,) = (
    need
    for need in tomllib.loads((ROOT / "sub-packages/megacell-training/pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    if need.startswith("torch>")
)


def tool(name: str, *words: object, **options) -> subprocess.CompletedProcess:
    """Run a checking tool that is installed beside this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [shutil.which(name, path=path) or name, *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def fine(name: str, *words: object, **options) -> str:
    """Run a tool that has to find nothing wrong."""
    done = tool(name, *words, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


# the images


def test_the_dockerfile_has_nothing_that_hadolint_minds():
    fine("hadolint", "--failure-threshold", "style", DOCKER / "Dockerfile")


def test_the_build_is_sent_what_it_copies_and_no_tests():
    sent = context()
    for stage in STAGES.values():
        for line in stage.of("COPY"):
            for source in line.split()[:-1]:
                assert any(name == source or name.startswith(f"{source}/") for name in sent), source
    assert not [name for name in sent if "/tests/" in name or name.startswith((".git", "docs"))]
    for name in ("core/cli/main.py", "training/configs/launcher/local.yaml", "geneformer/configs/pretrain.yaml"):
        assert f"sub-packages/megacell-{name.split('/')[0]}/src/megacell/{name}" in sent


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_an_image_runs_as_another_user_than_root_and_looks_at_its_health(name):
    from megacell.core.cli.main import build_parser

    stage = STAGES[name]
    assert stage.of("USER") == ["10001"]
    assert any("useradd" in line and "--uid 10001" in line for line in stage.of("RUN"))
    (check,) = stage.of("HEALTHCHECK")
    program, *words = yaml.safe_load(check[check.index("[") :])
    assert program == "megacell"
    assert build_parser().parse_args(words).run
    labels = re.findall(r"org\.opencontainers\.image\.([\w.]+)=", " ".join(stage.of("LABEL")))
    assert {"title", "description", "licenses", "version", "revision", "base.name"} == set(labels)
    assert f'base.name="{stage.base}"'.replace("python:", "docker.io/library/python:") in " ".join(stage.of("LABEL"))
    assert all("--no-cache-dir" in line for line in stage.of("RUN") if "pip install" in line)


def test_the_gpu_image_never_touches_its_own_torch():
    stage = STAGES["gpu"]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", stage.base)
    lines = " ".join(arguments for _, arguments in stage.instructions)
    assert "PIP_CONSTRAINT" not in lines
    assert "uninstall" not in lines
    installed = [line.partition("pip install ")[2] for line in stage.of("RUN") if "pip" in line]
    assert installed == ["--no-cache-dir --constraint /opt/megacell/kept.txt /wheels/*.whl"]
    assert f"pytorch:{re.search(r'nv(..[.]..)', TORCH)[1]}-py3" in stage.base


def fake_packages(folder: Path, **versions: str) -> Path:
    """Make a folder in which packages of these versions seem to be installed."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def pip(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Ask pip what it would do where these packages are installed, without any index."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "--isolated", *words]
    own = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("version", "kept"),
    [
        pytest.param(TORCH, True, id="26.03's pre-release of torch is within our bounds"),
        pytest.param("2.10.0a0+b4e4ee81d3.nv25.12", False, id="25.12's is not"),
    ],
)
def test_pip_keeps_the_torch_of_the_base_image(version, kept, tmp_path):
    done = pip(fake_packages(tmp_path, torch=version), BOUNDS)
    assert ("already satisfied: torch" in done.stdout) == kept, done.stdout
    assert (done.returncode == 0) == kept


def test_what_the_base_image_brings_stays_and_our_constraints_hold_for_all_else(tmp_path):
    base = fake_packages(tmp_path / "site", torch=TORCH, numpy="2.1.0", Some_Name="1.0")
    ours = tmp_path / "constraints.txt"
    ours.write_text("# ours\nnumpy==2.4.6\nsome-name==3.0\nanother==1.5\ntorch==2.13.0\n")
    script = f"import sys; sys.path[:] = [{str(base)!r}, *(p for p in sys.path if 'site-packages' not in p)]\n"
    script += (DOCKER / "constrain.py").read_text()
    done = subprocess.run([sys.executable, "-S", "-", ours, tmp_path / "kept.txt"], input=script, text=True)
    assert done.returncode == 0
    assert (tmp_path / "kept.txt").read_text().split() == [f"torch=={TORCH}", "another==1.5"]
    done = pip(base, "--constraint", str(tmp_path / "kept.txt"), "torch==2.13.0")
    assert done.returncode != 0, "a torch that would be replaced has to end the build"


def test_an_image_without_torch_is_refused(tmp_path):
    (tmp_path / "constraints.txt").write_text("")
    words = [
        sys.executable,
        "-S",
        str(DOCKER / "constrain.py"),
        str(tmp_path / "constraints.txt"),
        str(tmp_path / "kept"),
    ]
    done = subprocess.run(words, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no torch here" in done.stderr


@pytest.mark.exhaustive
def test_the_cpu_image_builds_and_runs_in_a_clean_folder(tmp_path):
    if os.geteuid() or tool("unshare", "--mount", "true").returncode:
        pytest.skip("needs root and mount namespaces")
    replay = Replay(tmp_path, {"TORCH_INDEX": "https://pypi.org/simple", "VERSION": "1", "REVISION": "2"})
    replay.stage("wheel", STAGES["wheel"])
    replay.stage("cpu", STAGES["cpu"])
    replay.run("megacell doctor --quick")
    replay.run("megacell --help | grep pretrain")
    replay.run("megacell pretrain --cfg store=a vocabulary=b out=c model=geneformer_10m | grep 'hidden: 256'")
    replay.run("pip check")
    replay.run("pip list --format freeze > /workspace/installed.txt")
    replay.run("touch /workspace/of-another-user $HOME/of-another-user", user="12345")
    replay.run("cat /workspace/installed.txt; id -u; test ! -w /opt/megacell")
    printed = replay.finish().splitlines()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    found = dict(line.split("==") for line in printed if re.fullmatch(r"[\w.-]+==\S+", line))
    assert found["torch"].split("+")[0] == pins["torch"]
    assert "megacell" in found
    assert "10001" in printed
    assert "pytest" not in found


# one node


def test_compose_is_valid():
    fine("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")
    for name, service in COMPOSE["services"].items():
        assert service["build"]["target"] in STAGES, name
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()


def filled(text: str) -> str:
    """Put the defaults in place of ${NAME:-default}."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("name", ["train", "train-cpu"])
def test_what_compose_trains_with_are_options_of_pretrain(name):
    from megacell.training.config.settings import compose

    command, *options = map(filled, COMPOSE["services"][name]["command"])
    cfg = compose(options)
    assert command == "pretrain"
    assert Path(cfg.out).parts[0] == "runs", "TensorBoard looks there"


# several nodes


def stubs(folder: Path, **scripts: str) -> dict[str, str]:
    """Make programs that stand for those of a cluster; return an environment that finds them first."""
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


OPTIONS = ["store=cells.store", "vocabulary=vocabulary", "out=run", "model=geneformer_106m", "precision=bf16"]


def submit(tmp_path: Path, *options: str, code: int = 0) -> tuple[int, list[str], list[str]]:
    """Run the batch script; return its exit code, what srun was called with and what scontrol was."""
    log = 'printf "%s\\n" "$@" >'
    own = stubs(tmp_path, srun=f"{log} srun.log; exit {code}", scontrol=f"{log} scontrol.log")
    done = subprocess.run(["bash", SBATCH, *options], cwd=tmp_path, env=own)
    logs = [tmp_path / "srun.log", tmp_path / "scontrol.log"]
    return done.returncode, *(log.read_text().splitlines() if log.exists() else [] for log in logs)


def test_the_batch_script_has_nothing_that_shellcheck_minds():
    fine("shellcheck", "--severity", "style", SBATCH)


def test_slurm_starts_one_task_a_gpu_in_the_container(tmp_path):
    from megacell.training.config.settings import compose

    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SBATCH.read_text(), re.M))
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    code, words, requeued = submit(tmp_path, *OPTIONS)
    start = words.index("megacell")
    assert (code, requeued) == (0, [])
    assert all(word.startswith("--") for word in words[:start])
    assert f"--container-image={tmp_path}/megacell.sqsh" in words
    assert f"--container-mounts={tmp_path}:{tmp_path}" in words
    assert words[start:] == ["megacell", "pretrain", *OPTIONS]
    assert compose(words[start + 2 :]).model.layers == 12


def test_a_job_that_comes_back_goes_on_with_its_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    _, words, _ = submit(tmp_path, *OPTIONS)
    assert words[words.index("megacell") :] == ["megacell", "pretrain", "out=run", "resume=true"]


@pytest.mark.parametrize(
    ("code", "again"),
    [(75, ["requeue", "7"]), (1, []), (0, [])],
    ids=["after a save", "not after an error", "nor done"],
)
def test_a_job_is_queued_again(code, again, tmp_path):
    assert submit(tmp_path, *OPTIONS, code=code)[::2] == (code, again)


def test_a_job_without_a_run_folder_is_refused_before_it_starts(tmp_path):
    assert submit(tmp_path, "store=cells.store") == (2, [], [])


def test_kubernetes_takes_the_job():
    for each in (SERVICE, JOB):
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)


def test_the_pods_find_each_other_and_their_gpus():
    name, spec = JOB["metadata"]["name"], JOB["spec"]
    environment = {each["name"]: each["value"] for each in NODE["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["NODES"])
    assert NODE["resources"]["limits"]["nvidia.com/gpu"] == int(environment["GPUS"])
    assert SERVICE["spec"]["selector"] == {"job-name": name}
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    port = SERVICE["spec"]["ports"][0]["port"]
    assert f"--rdzv-endpoint {name}-0.{POD['subdomain']}:{port}" in NODE["args"][0]
    assert {mount["name"] for mount in NODE["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    assert POD["securityContext"]["runAsUser"] == int(STAGES["gpu"].of("USER")[0])


def start_pod(tmp_path: Path, torchrun: str) -> subprocess.Popen:
    """Start what a pod runs."""
    own = {each["name"]: each["value"] for each in NODE["env"]} | {"JOB_COMPLETION_INDEX": "1"}
    command = [*NODE["command"], *NODE["args"]]
    return subprocess.Popen(command, cwd=tmp_path, env=stubs(tmp_path, torchrun=torchrun) | own)


def test_what_a_pod_runs_has_nothing_that_shellcheck_minds():
    fine("shellcheck", "--shell", "bash", "-", input=NODE["args"][0])


@pytest.mark.parametrize("there", [False, True], ids=["a new run", "a run that is there goes on"])
def test_a_pod_starts_a_node_of_the_run(there, tmp_path):
    from torch.distributed.run import get_args_parser

    from megacell.training.config.settings import compose

    if there:
        (tmp_path / "runs/run").mkdir(parents=True)
        (tmp_path / "runs/run/config.yaml").touch()
    assert start_pod(tmp_path, 'printf "%s\\n" "$@" > called; exit 3').wait(30) == 3
    words = (tmp_path / "called").read_text().splitlines()
    parsed = get_args_parser().parse_args(words)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.node_rank) == ("2", "8", 1)
    assert parsed.training_script == "megacell"
    command, *options = parsed.training_script_args
    assert command == "pretrain"
    if there:
        assert options == ["out=runs/run", "resume=true"]
    else:
        assert compose(options).precision == "bf16"


def test_a_pod_that_is_ended_asks_its_ranks_for_a_checkpoint_and_waits(tmp_path):
    rank = "trap 'sleep 1; echo saved > checkpoint; exit 75' TERM; echo > ready; while :; do sleep 0.1; done"
    pod = start_pod(tmp_path, f"bash -c {shlex.quote(rank)} & wait $!; exit 1")
    for _ in range(100):
        if (tmp_path / "ready").exists():
            break
        try:
            pod.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(30) == 1
    assert (tmp_path / "checkpoint").read_text() == "saved\n"


# the same with real training

SMALL = ["model.layers=1", "batch.tokens=1024", "devices=1", "checkpoint.every=1000", "validation.every=1000", *TINY]
SRUN = f"""\
while [ "${{1#--}}" != "$1" ]; do shift; done
shift
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank {sys.executable} -m megacell "$@" &
done
code=0
for rank in $(jobs -p); do wait "$rank" || code=$?; done
exit $code
"""


def until_it_trains(process: subprocess.Popen, run: Path) -> None:
    """Wait for the first lines of metrics.csv."""
    for _ in range(WAIT):
        assert process.poll() is None, "it ended before it was to be ended"
        if (run / "metrics.csv").exists() and len(metrics(run)) >= 3:
            return
        time.sleep(1)
    raise AssertionError("it does not train")


def ranks_below(process: subprocess.Popen) -> list[int]:
    """Return the processes of `megacell pretrain` that a process and its children have started."""
    found, looked = [], [process.pid]
    for parent in looked:
        children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        looked += children
        found += [pid for pid in children if b"megacell" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


@pytest.mark.exhaustive
def test_a_slurm_job_saves_when_its_time_is_up_is_queued_again_and_goes_on(store, vocabulary, tmp_path):
    job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
           "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    own = stubs(tmp_path, srun=SRUN, scontrol='echo "$@" > requeued') | job
    options = [f"store={store}", f"vocabulary={vocabulary}", "out=run", *SMALL, "steps=100000"]
    first = subprocess.Popen(["bash", SBATCH, *options], cwd=tmp_path, env={**own, "SLURM_JOB_ID": str(free_port())})
    until_it_trains(first, tmp_path / "run")
    for pid in ranks_below(first):
        os.kill(pid, signal.SIGTERM)
    assert first.wait(WAIT) == 75
    assert (tmp_path / "requeued").read_text().startswith("requeue ")
    saved = max((tmp_path / "run/checkpoints").iterdir()).name
    again = subprocess.Popen(
        ["bash", SBATCH, *options], cwd=tmp_path, env={**own, "SLURM_JOB_ID": str(free_port())},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = next(line for line in again.stdout if "resuming" in line)
    assert saved in line
    for pid in ranks_below(again):
        os.kill(pid, signal.SIGTERM)
    again.communicate(timeout=WAIT)


@pytest.mark.exhaustive
def test_a_pod_that_is_ended_leaves_a_checkpoint_of_its_run(store, vocabulary, tmp_path):
    options = f"store={store} vocabulary={vocabulary} {' '.join(SMALL)} steps=100000"
    script = re.sub(r"options=\(store.*\)", f"options=({options})", NODE["args"][0])
    script = script.replace("megacell-train-0.megacell-train:29500", f"127.0.0.1:{free_port()}")
    assert options in script
    own = {**os.environ, "NODES": "1", "GPUS": "2", "RUN": "runs/run", "JOB_COMPLETION_INDEX": "0"}
    own |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    torchrun = f'exec {sys.executable} -m torch.distributed.run "$@"'
    pod = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=stubs(tmp_path, torchrun=torchrun) | own | {
        "PATH": f"{tmp_path}{os.pathsep}{own['PATH']}"})  # fmt: skip
    until_it_trains(pod, tmp_path / "runs/run")
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(WAIT) == 1, "torchrun's exit code once its ranks have ended with 75"
    assert [path for path in (tmp_path / "runs/run/checkpoints").iterdir() if path.name != "step-00000000"]
    assert metrics(tmp_path / "runs/run")[-1]["step"] == str(
        int(max((tmp_path / "runs/run/checkpoints").iterdir()).name[5:])
    )
