# SPDX-License-Identifier: Apache-2.0
"""The training step: Megatron's DDP, its forward-backward schedule, DistributedOptimizer and learning-rate schedule."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from omegaconf import DictConfig

from megacell.geneformer.model.bert import Pack, PackedBert


@dataclass
class StepResult:
    """What one step did on this rank: loss summed over its masked genes (nats), their number, and the update."""

    loss_sum: float
    masked: int
    grad_norm: float
    lr: float
    applied: bool


class Engine:
    """Trains one network; the process groups stand, and every rank of a data parallel group brings its own packs.

    Parameters
    ----------
    cfg : DictConfig
        ``optim``, ``precision`` and ``steps`` of a run.
    bert : PackedBert
        With its initial weights.
    """

    def __init__(self, cfg: DictConfig, bert: PackedBert):
        config = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel_state.get_data_parallel_world_size() > 1,
        )
        self.bert = bert
        self.ddp = DistributedDataParallel(bert.config, config, bert)
        self.optimizer = _optimizer(cfg, self.ddp)
        self.scheduler = _scheduler(cfg, self.optimizer)
        bert.config.no_sync_func = self.ddp.no_sync
        bert.config.grad_scale_func = self.optimizer.scale_loss
        bert.config.finalize_model_grads_func = finalize_model_grads

    def train_step(self, packs: list[Pack]) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of one global batch.

        The gradient is that of the mean loss over the masked genes of all ranks.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss_sum, masked = self.forward_backward(packs)
        self.scheduler.step(1)  # before the update: the n-th step takes the schedule's n-th rate
        applied, grad_norm, _ = self.optimizer.step()
        return StepResult(loss_sum, masked, float(grad_norm), self.optimizer.param_groups[0]["lr"], bool(applied))

    def forward_backward(self, packs: list[Pack], *, forward_only: bool = False) -> tuple[float, int]:
        """Run Megatron's schedule; return the loss summed over this rank's masked genes, and their number."""
        sums = forward_backward_no_pipelining(
            forward_step_func=_forward_step,
            data_iterator=iter(packs),
            model=[self.ddp],
            num_microbatches=len(packs),
            seq_length=0,  # unused without pipelining
            micro_batch_size=0,
            forward_only=forward_only,
        )
        loss_sum, masked = torch.stack(sums).sum(0).tolist()
        return loss_sum, int(masked)


def _forward_step(packs, model) -> tuple[torch.Tensor, Callable]:
    pack = next(packs)

    def summed(losses: torch.Tensor):
        total = losses.sum()
        count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
        return total, count, torch.stack([total.detach().double(), count.double()])

    return model(pack), summed


def _optimizer(cfg: DictConfig, ddp: DistributedDataParallel):
    optim, bf16 = cfg.optim, cfg.precision == "bf16"
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(config, [ddp])


def _scheduler(cfg: DictConfig, optimizer) -> OptimizerParamScheduler:
    optim = cfg.optim
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=round(optim.warmup * cfg.steps) if optim.warmup < 1 else int(optim.warmup),
        lr_decay_steps=cfg.steps,
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=cfg.steps,
        wd_incr_style="constant",
    )
