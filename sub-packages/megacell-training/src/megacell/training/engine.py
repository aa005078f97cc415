# SPDX-License-Identifier: Apache-2.0
"""The training step: Megatron's DDP, its forward-backward schedule, DistributedOptimizer and learning-rate schedule."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from omegaconf import DictConfig

from megacell.training.distributed.device import device
from megacell.training.family import Network

Accept = Callable[[float, int, float | None], bool]
"""Whether to make an update: of the loss summed over this rank's items, their number, and the gradient norm over all
ranks; None where the gradients overflowed in 16 bits."""
Summed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of a pack: its losses' sum, to be gone back from; their number; both, for the figures of the step."""


@dataclass
class StepResult:
    """What one step did on this rank.

    Attributes
    ----------
    loss_sum, items : float, int
        Loss summed over this rank's items (masked genes, say), and their number.
    grad_norm : float
        Over all ranks, before clipping; infinite where the gradients overflowed in fp16.
    lr : float
        Learning rate of the update.
    applied : bool
        False where the update was left out: it was not accepted, or the gradients overflowed in fp16.
    loss_scale : float
        What the next step's loss is multiplied by, so that its gradients fit into fp16; else 1.
    """

    loss_sum: float
    items: int
    grad_norm: float
    lr: float
    applied: bool
    loss_scale: float


class Engine:
    """Trains one network; the process groups stand, and every rank of a data parallel group brings its own packs.

    Parameters
    ----------
    cfg : DictConfig
        ``optim``, ``parallel.reduce_fp32``, ``precision`` and ``steps`` of a run.
    network : megacell.training.family.Network
        With its initial weights.
    """

    def __init__(self, cfg: DictConfig, network: Any):
        shared = parallel_state.get_data_parallel_world_size() > 1
        config = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=cfg.parallel.reduce_fp32,
            overlap_grad_reduce=shared,
            overlap_param_gather=shared,  # during the next forward pass: who reads weights otherwise gathers them first
        )
        network.model_type = ModelType.encoder_or_decoder  # Megatron's schedule asks for it
        self.network: Network = network
        self.ddp = DistributedDataParallel(network.config, config, network)
        self.optimizer = _optimizer(cfg, self.ddp)
        self.clip, self.scaled = float(cfg.optim.clip), network.config.fp16
        self.scheduler = schedule(cfg, self.optimizer)
        network.config.no_sync_func = self.ddp.no_sync
        network.config.grad_scale_func = self.optimizer.scale_loss
        network.config.finalize_model_grads_func = finalize_model_grads

    def train_step(self, packs: list[Any], accept: Accept | None = None) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of one global batch.

        The gradient is that of the mean loss over the items of all ranks.

        Parameters
        ----------
        packs : list
            As the network takes them.
        accept : Accept, optional
            Asked on all ranks before the update, which is left out where it answers no, on all alike.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss_sum, items = self.forward_backward(packs)
        self.scheduler.step(1)  # before the update: the n-th step takes the schedule's n-th rate
        grad_norm, applied = self._update(accept and partial(accept, loss_sum, items))
        rate = self.optimizer.param_groups[0]["lr"]
        scale = float(self.optimizer.get_loss_scale()) if self.scaled else 1.0  # asked, a GPU is waited for
        return StepResult(loss_sum, items, grad_norm, rate, applied, scale)

    @torch.no_grad()
    def _update(self, accept: Callable[[float | None], bool] | None) -> tuple[float, bool]:
        """Go through Megatron's update step by step; return the gradient norm, and whether weights were changed."""
        if self.optimizer.prepare_grads():  # they overflowed in 16 bits
            if accept:
                accept(None)
            return math.inf, False
        norm = norm_of_gradients(self.optimizer)
        if accept and not accept(norm):
            return norm, False
        if self.clip and norm > self.clip:
            grads = [p.grad for part in parts(self.optimizer) for p in part.get_parameters() if p.grad is not None]
            torch._foreach_mul_(grads, self.clip / (norm + 1e-6))
        return norm, bool(self.optimizer.step_with_ready_grads())

    def forward_backward(self, packs: list[Any], *, forward_only: bool = False) -> tuple[float, int]:
        """Run Megatron's schedule; return the loss summed over this rank's items, and their number."""
        sums = forward_backward_no_pipelining(
            forward_step_func=_forward_step,
            data_iterator=iter(packs),
            model=[self.ddp],
            num_microbatches=len(packs),
            seq_length=0,  # unused without pipelining
            micro_batch_size=0,
            forward_only=forward_only,
        )
        loss_sum, items = torch.stack(sums).sum(0).tolist()
        return loss_sum, int(items)


def _forward_step(packs: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Summed]]:
    pack = next(packs)

    def summed(losses: torch.Tensor) -> Summed:
        total = losses.sum()
        # made where the losses are, so that a GPU is not waited for
        count = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)
        return total, count, torch.stack([total.detach().double(), count.double()])

    return model(pack), summed


def _optimizer(cfg: DictConfig, ddp: DistributedDataParallel) -> Any:
    optim, dtype = cfg.optim, ddp.module.config.params_dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        initial_loss_scale=optim.initial_loss_scale,
        loss_scale_window=optim.loss_scale_window,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=ddp.ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, [ddp])
    for part in parts(optimizer):
        _give_state(part)
    fuse(optimizer)
    return optimizer


def parts(optimizer: Any) -> list[Any]:
    """Return the distributed optimizers that Megatron has chained."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _give_state(part: Any) -> None:
    """Give Adam its state now: a checkpoint may be due before gradients fit into fp16 and the first update is made."""
    part.init_state_fn(part.optimizer, part.config)
    if not HAVE_APEX_OR_TE:  # torch's Adam counts the steps of each parameter
        for state in part.optimizer.state.values():
            state["step"] = torch.tensor(0.0)


def fuse(optimizer: Any) -> None:
    """Have torch's Adam work in one kernel on a GPU, and count steps there; elsewhere as torch chooses."""
    if HAVE_APEX_OR_TE:
        return
    on_gpu = device().type == "cuda"
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            group["fused"] = True if on_gpu else None
            for state in (part.optimizer.state[param] for param in group["params"]):
                state["step"] = state["step"].to(state["exp_avg"].device if on_gpu else "cpu")


def norm_of_gradients(optimizer: Any) -> float:
    """Return the norm of the gradients over all ranks, waiting once for the device.

    As Megatron's own does, which without Apex or Transformer Engine waits once a tensor.
    """
    grads = [grad for part in parts(optimizer) for grad in part.get_main_grads_for_grad_norm()]
    norms = torch._foreach_norm(grads) if grads else [torch.zeros(1, device=device())]
    square = torch.stack(norms).norm().square()
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return float(square.sqrt())


def schedule(cfg: DictConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Return what sets the learning rate: warm-up, decay, and the steps held at the lowest rate."""
    optim = cfg.optim
    warmup, hold = (round(part * cfg.steps) if part < 1 else int(part) for part in (optim.warmup, optim.hold))
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=cfg.steps - hold,  # from there on it stays at min_lr
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=cfg.steps,
        wd_incr_style="constant",
    )
