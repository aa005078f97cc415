# SPDX-License-Identifier: Apache-2.0
"""The checks of `megacell doctor` for training: torch, GPUs, what a run would use and why; torch is imported late."""

import importlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megacell.core.findings import OK, WARNING, WRONG, Finding
from megacell.core.versions import own_distributions, package_versions

_SHOWN = ("torch", "megatron-core", "nemo-toolkit", "lightning", "hydra-core")
_OPTIONAL = ("transformer-engine", "flash-attn", "wandb")
_COMPILED = {"transformer-engine": "transformer_engine.pytorch", "flash-attn": "flash_attn"}  # built against one torch
_DRIVER = Path("/proc/driver/nvidia/version")
_OLDEST = (8, 0)  # compute capability; Ampere, the first with bf16


def check(quick: bool) -> list[Finding]:
    """Return versions and the cache, and unless it has to be quick what needs torch imported.

    An entry point of the group `core.versions.CHECKS`.
    """
    from megacell.core.cache import cache_directory

    found = package_versions(own_distributions(), _SHOWN, _OPTIONAL)
    found.append(cache(cache_directory()))
    if quick:
        return found
    try:
        torch = Torch.here()
    except (ImportError, OSError) as error:
        text = f"cannot be imported: {error}".splitlines()[0]
        return [*found, Finding("torch", "torch", text, WRONG, "install torch again, for this Python and this driver")]
    return [*found, *torch.findings(_DRIVER.exists()), *compiled(), *choices(torch), launcher(os.environ)]


def cache(folder: Path) -> Finding:
    """Return whether counts of tokens can be kept between runs."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if os.access(there, os.W_OK):
        return Finding("machine", "cache", str(folder))
    fix = "token counts and compiled loops are made anew each time: set MEGACELL_CACHE and NUMBA_CACHE_DIR"
    return Finding("machine", "cache", f"{folder} cannot be written", WARNING, fix)


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int


@dataclass(frozen=True)
class Torch:
    """Versions and GPUs that torch reports; None where its build has none of it."""

    version: str
    cuda: str | None = None
    cudnn: str | None = None
    nccl: str | None = None
    gpus: list[Gpu] = field(default_factory=list)

    @classmethod
    def here(cls) -> "Torch":
        """Return what the installed torch reports."""
        import torch

        if not torch.version.cuda:
            return cls(torch.__version__)
        gpus = []
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            about = torch.cuda.get_device_properties(number)
            free, _ = torch.cuda.mem_get_info(number)
            gpus.append(Gpu(about.name, (about.major, about.minor), about.total_memory, free))
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
        return cls(torch.__version__, torch.version.cuda, str(torch.backends.cudnn.version()), nccl, gpus)

    def findings(self, driver: bool) -> list[Finding]:
        """Return what this means for training; `driver`: whether an NVIDIA driver is loaded."""
        found = [Finding("GPU", "CUDA of torch", self.cuda or "none: a CPU build")]
        if self.cuda:
            found += [Finding("GPU", "cuDNN", self.cudnn or "none"), self._nccl()]
        for number, gpu in enumerate(self.gpus):
            value = f"{gpu.name}, {gpu.memory / 2**30:,.0f} GiB, {gpu.free / 2**30:,.0f} free"
            old = gpu.capability < _OLDEST
            fix = "older than Ampere: no bf16, take precision=fp32" if old else ""
            found.append(Finding("GPU", f"GPU {number}", value, WARNING if old else OK, fix))
        if not self.gpus:
            found.append(self._no_gpu(driver))
        return found

    def _nccl(self) -> Finding:
        if self.nccl is None and len(self.gpus) > 1:
            return Finding("GPU", "NCCL", "none", WRONG, "several GPUs need it: install a build of torch with NCCL")
        return Finding("GPU", "NCCL", self.nccl or "none")

    def _no_gpu(self, driver: bool) -> Finding:
        if driver and not self.cuda:
            fix = "there is a GPU, and this torch cannot use it: install a CUDA build of the same version"
            return Finding("GPU", "GPUs", "none that torch sees", WRONG, fix)
        if driver:
            fix = f"the driver may be too old for CUDA {self.cuda} (nvidia-smi), or CUDA_VISIBLE_DEVICES hides it"
            return Finding("GPU", "GPUs", "none that torch sees", WRONG, fix)
        return Finding("GPU", "GPUs", "none")


def compiled() -> list[Finding]:
    """Return the compiled packages that are installed and cannot be imported, as after a change of torch."""
    found = []
    for name, module in _COMPILED.items():
        if not importlib.util.find_spec(module.split(".")[0]):
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a library built for another torch may raise
            text = f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
            fix = f"build it again for this torch, or pip uninstall {name}"
            found.append(Finding("versions", name, text, WRONG, fix))
    return found


def choices(torch_here: Torch) -> list[Finding]:
    """Return what a run would take on this machine, and why."""
    import torch

    from megacell.training.nn.attention_backends import choose_backend
    from megacell.training.nn.fusion import missing_to_compile

    gpus = torch_here.gpus
    where = torch.device("cuda" if gpus else "cpu")
    bf16 = bool(gpus) and all(gpu.capability >= _OLDEST for gpu in gpus)
    found = [Finding("what a run takes", "device", f"{where.type}: {_why(gpus)}")]
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found.append(Finding("what a run takes", f"attention, {precision}", choose_backend(where, dtype)))
    missing = missing_to_compile()
    found.append(Finding("what a run takes", "compile=true", f"needs {missing}" if missing else "available"))
    advice = "bf16: half the memory, and several times the speed" if bf16 else "fp32: bf16 gains nothing here"
    return [*found, Finding("what a run takes", "precision advised", advice)]


def _why(gpus: list[Gpu]) -> str:
    if not gpus:
        return "torch sees no GPU"
    return f"devices=1 by default, devices={len(gpus)} takes all" if len(gpus) > 1 else "one GPU"


def launcher(environment: Any) -> Finding:
    """Return which launcher's environment this is, or which one devices=N would use."""
    topic, name = "what a run takes", "processes"
    if "TORCHELASTIC_RUN_ID" in environment:
        return Finding(topic, name, f"torchrun's: rank {environment.get('RANK')} of {environment.get('WORLD_SIZE')}")
    if "SLURM_JOB_ID" in environment:
        if "SLURM_NTASKS_PER_NODE" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
            return Finding(topic, name, "Slurm's", WRONG, "give --ntasks-per-node beside --nodes")
        return Finding(topic, name, f"Slurm's: {environment.get('SLURM_NTASKS', '1')} task(s)")
    slurm = "; srun is here for several nodes" if shutil.which("srun") else ""
    return Finding(topic, name, f"devices=N starts N on this machine{slurm}")
