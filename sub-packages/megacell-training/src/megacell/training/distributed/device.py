# SPDX-License-Identifier: Apache-2.0
"""Where Megatron-core runs: its CUDA calls answered on the CPU where there is no GPU, process groups, random state.

Megatron names "cuda" in factory calls, asks ``torch.cuda`` for its device and keeps random states of it. Inside
``megatron()`` these are answered for the CPU, so that the code path of a GPU is the one that is tested without one;
outside of it nothing is changed.
"""

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megacell.training.distributed.light_imports import import_libraries

_DETERMINISTIC = {  # what libraries want to be told, in the words of their own documentation
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS: no workspace that streams share
    "NCCL_ALGO": "Ring",  # NCCL: the switches of NVLink sum in no fixed order
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine
}
_NOISE = (  # said by Megatron and torch at every start, and nothing that a user of ours can mend
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    "When using async grad allreduce",
    "When using sequence parallelism",
    r"`torch.distributed\.\w+` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "Converting a tensor with requires_grad=True",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
)


def device() -> torch.device:
    """Return the device of this process: its current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def use_local() -> None:
    """Have a process that torchrun or srun started use the GPU of its number on its machine."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    if torch.cuda.is_available() and local is not None:
        torch.cuda.set_device(int(local) % torch.cuda.device_count())


def quiet() -> None:
    """Have NeMo, Lightning and Megatron say only what is wrong; a run says itself what it does."""
    for message in (*_NOISE, r"`LightningModule.configure_optimizers` returned `None`"):
        warnings.filterwarnings("ignore", message=message)
    for name in ("nv_one_logger", "OneLogger"):  # telemetry that NeMo brings along, and does not use
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import_libraries()  # they set their levels when they are imported
    from nemo.utils import logging as nemo_logging

    for name in ("lightning.pytorch", "lightning.fabric", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)  # its errors are also raised
    nemo_logging.setLevel(logging.ERROR)


@contextlib.contextmanager
def deterministic(asked: bool = True) -> Iterator[None]:
    """Take inside, if asked for, only what gives the same bits every time; raise RuntimeError where there is no such.

    To be entered before CUDA is first used, since cuBLAS reads its setting then.
    """
    if not asked:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, _DETERMINISTIC))
        filling: Any = torch.utils.deterministic
        stack.callback(setattr, filling, "fill_uninitialized_memory", filling.fill_uninitialized_memory)
        filling.fill_uninitialized_memory = False  # what for: nothing reads memory before it is written
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True)
        yield


class _CudaOnCpu(TorchFunctionMode):
    """Factory calls that name a CUDA device, ``.cuda()`` and ``.type()`` are answered for the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and (named := kwargs.get("device")) is not None and (
            isinstance(named, int) or torch.device(named).type == "cuda"
        ):  # fmt: skip
            kwargs = {**kwargs, "device": "cpu"}
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1 and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")  # Megatron's optimizer asserts on this name
        return result


def _redirect_random_state(stack: contextlib.ExitStack) -> None:
    """Have Megatron's tracker of random states, and with it recomputation, keep those of the CPU's generator."""
    from megatron.core.tensor_parallel import random

    get, put = lambda *_, **__: torch.get_rng_state(), lambda state, *_, **__: torch.set_rng_state(state)
    stack.enter_context(mock.patch.object(random, "_get_cuda_rng_state", get))
    stack.enter_context(mock.patch.object(random, "_set_cuda_rng_state", put))
    stack.enter_context(mock.patch("torch.cuda.get_rng_state", get))
    stack.enter_context(mock.patch("torch.cuda.manual_seed", torch.manual_seed))
    log = logging.getLogger(random.__name__)  # it warns that the CPU's state has changed
    stack.callback(log.setLevel, log.level)
    log.setLevel(logging.ERROR)


@contextlib.contextmanager
def megatron() -> Iterator[None]:
    """Run Megatron-core's code inside on this machine's device; on a machine with a GPU it changes nothing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")))
            stack.enter_context(mock.patch("torch.cuda.synchronize", return_value=None))
            _redirect_random_state(stack)
            stack.enter_context(_CudaOnCpu())
        yield


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Enter ``megatron()`` with process groups of one, for a model used outside of training."""
    with megatron():
        from megatron.core import parallel_state

        if not dist.is_initialized():
            kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # gloo cannot read a GPU's memory
            dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        yield


def _key(*words: object) -> int:
    digest = hashlib.sha256(":".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2  # torch takes 63 bits, and Megatron adds to it


def seed_step(seed: int, step: int) -> None:
    """Set the random state (dropout) as a function of (seed, step, rank), so that no state has to be saved.

    Ranks of one tensor parallel group share the state where they hold copies of the same activations, and differ
    where each has a part of its own: the heads of attention, and all tokens' states under sequence parallelism.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    copies = _key(seed, step, "data", parallel_state.get_data_parallel_rank())
    heads = _key(copies, "tensor", parallel_state.get_tensor_model_parallel_rank())
    torch.cuda.manual_seed(copies)
    tracker = random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(random._MODEL_PARALLEL_RNG_TRACKER_NAME, heads)
