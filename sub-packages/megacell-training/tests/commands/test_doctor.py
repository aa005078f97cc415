# SPDX-License-Identifier: Apache-2.0
"""`megacell doctor`, the part about torch and training, on machines that are made up."""

import json
import subprocess
import sys
from types import ModuleType

import pytest

from megacell.core.cli.main import main
from megacell.training.commands import doctor
from megacell.training.commands.doctor import Gpu, Torch

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30, 79 * 2**30)
V100 = Gpu("Tesla V100", (7, 0), 16 * 2**30, 15 * 2**30)
CUDA = {"version": "2.13.0", "cuda": "13.0", "cudnn": "91002", "nccl": "2.29.7"}


def states(findings) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


@pytest.mark.parametrize(
    ("torch", "driver", "wrong"),
    [
        pytest.param(Torch("2.13.0+cpu"), False, [], id="a machine without a GPU is well"),
        pytest.param(Torch("2.13.0+cpu"), True, ["GPUs"], id="a CPU build beside a GPU is wrong"),
        pytest.param(Torch(**CUDA), True, ["GPUs"], id="a GPU that torch cannot see is wrong"),
        pytest.param(Torch(**CUDA), False, [], id="a CUDA build without a GPU is well"),
        pytest.param(Torch(**CUDA, gpus=[H100] * 2), True, [], id="two GPUs are well"),
        pytest.param(Torch(**{**CUDA, "nccl": None}, gpus=[H100]), True, [], id="one GPU needs no NCCL"),
        pytest.param(
            Torch(**{**CUDA, "nccl": None}, gpus=[H100] * 2), True, ["NCCL"], id="two GPUs without NCCL are wrong"
        ),
    ],
)
def test_what_torch_sees_of_the_gpus(torch, driver, wrong):
    found = states(torch.findings(driver))
    assert [name for name, state in found.items() if state == "wrong"] == wrong


def test_a_gpu_is_named_with_its_memory_and_an_old_one_has_no_bf16():
    found = {finding.name: finding for finding in Torch(**CUDA, gpus=[H100, V100]).findings(True)}
    assert found["GPU 0"].value == "NVIDIA H100 80GB HBM3, 80 GiB, 79 free"
    assert found["GPU 0"].state == "ok"
    assert "precision=fp32" in found["GPU 1"].fix


@pytest.mark.parametrize(
    ("gpus", "device", "advice"),
    [([], "cpu: torch sees no GPU", "fp32"), ([H100], "cuda: one GPU", "bf16"), ([V100], "cuda: one GPU", "fp32"),
     ([H100] * 8, "cuda: devices=1 by default, devices=8 takes all", "bf16")],
    ids=["no GPU", "one", "an old one", "eight"],
)  # fmt: skip
def test_what_a_run_takes_is_what_the_model_would_choose(gpus, device, advice):
    import torch

    from megacell.training.nn.attention_backends import choose_backend
    from megacell.training.nn.fusion import missing_to_compile

    found = {finding.name: finding.value for finding in doctor.choices(Torch("2.13.0", gpus=gpus))}
    where = torch.device(device.split(":")[0])
    assert found["device"] == device
    assert found["precision advised"].startswith(advice)
    assert found["compile=true"] == (f"needs {missing}" if (missing := missing_to_compile()) else "available")
    assert found["attention, bf16"] == choose_backend(where, torch.bfloat16)
    assert found["attention, fp32"] == choose_backend(where, torch.float32)


@pytest.mark.parametrize(
    ("environment", "value", "state"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8"}, "torchrun's: rank 3 of 8", "ok"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, "Slurm's: 8 task(s)", "ok"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, "Slurm's", "wrong"),
        ({"SLURM_JOB_ID": "1"}, "Slurm's: 1 task(s)", "ok"),
    ],
    ids=["torchrun", "Slurm", "Slurm without tasks a node", "a shell under Slurm"],
)
def test_the_launcher_is_found_by_its_environment(environment, value, state):
    found = doctor.launcher(environment)
    assert (found.value, found.state) == (value, state)


def test_a_library_built_for_another_torch_is_wrong(monkeypatch):
    broken = ModuleType("flash_attn")
    broken.__spec__ = object()
    monkeypatch.setitem(sys.modules, "flash_attn", broken)

    def fail(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    (found,) = doctor.compiled()
    assert (found.name, found.state) == ("flash-attn", "wrong")
    assert "undefined symbol" in found.value


def test_a_cache_that_cannot_be_written_is_found(tmp_path, monkeypatch):
    assert doctor.cache(tmp_path / "deep" / "cache").state == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "MEGACELL_CACHE" in doctor.cache(tmp_path / "deep" / "cache").fix


def test_torch_that_cannot_be_imported_is_one_line(monkeypatch):
    def fail():
        raise OSError("libcudart.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(Torch, "here", fail)
    last = doctor.check(quick=False)[-1]
    assert (last.state, last.value) == ("wrong", "cannot be imported: libcudart.so.13: cannot open shared object file")


def test_quick_imports_neither_torch_nor_megatron(tmp_path):
    code = (
        "import sys; from megacell.core.cli.main import main; code = main(sys.argv[1:]); "
        "print({'torch', 'megatron', 'nemo', 'lightning'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    words = [sys.executable, "-c", code, "doctor", "--quick", "--json", "--path", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "set()")
    assert json.loads(done.stdout)["will_work"]


def test_the_whole_of_it_runs_here(tmp_path, capsys):
    assert main(["doctor", "--json", "--path", str(tmp_path)]) == 0
    found = {finding["name"]: finding["value"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert {"torch", "megatron-core", "cores", "memory", "reading", "device", "processes"} <= set(found)
