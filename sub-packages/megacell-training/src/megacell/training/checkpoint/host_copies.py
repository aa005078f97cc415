# SPDX-License-Identifier: Apache-2.0
"""Weights and optimizer state copied into host memory, so that they can be written while training goes on.

Megatron's own way to gather the optimizer's state (``fully_reshardable``, 0.16.1) stops training for it, and mixes
parameters up where gradients are reduced in several buckets, as they are from 40 million parameters on. What is made
here has the same form on disk: whole parameters, which any layout of ranks can load.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica

STATES = ("param", "exp_avg", "exp_avg_sq")  # of each parameter: float32 weights, Adam's two averages


class HostCopies:
    """Room in host memory for one checkpoint, taken once and written over by each save.

    Rank 0 of each data parallel group has room for 12 bytes a parameter and the weights; with several such ranks each
    has room for its share of the 12 bytes, too.

    Parameters
    ----------
    network : PackedBert
    optimizer : ChainedOptimizer
        Megatron's, over one DistributedOptimizer.
    """

    def __init__(self, network: Any, optimizer: Any):
        self.network, (self.part,) = network, optimizer.chained_optimizers
        self.group = parallel_state.get_data_parallel_group_gloo()  # used by nothing else: a thread may talk in it
        self.ranks, self.first = self.group.size(), self.group.rank() == 0
        self._room: dict[tuple[str, object], torch.Tensor] = {}
        self._buckets = [
            (number, buffer, bucket) for number, buffer in enumerate(self.part.buffers) for bucket in buffer.buckets
        ]
        if self.ranks > 1:
            shares = sum(bucket.grad_data.numel() // self.ranks for *_, bucket in self._buckets)
            self._shares = {state: self._get("share", state, (shares,)) for state in STATES}

    def take(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Copy what this rank holds, and return what Megatron saves of it; the caller may train on.

        Parameters
        ----------
        metadata : dict
            For Megatron's ``sharded_state_dict``.
        """
        (ddp,) = self.part.model_chunks
        if ddp.ddp_config.overlap_param_gather:
            ddp.start_param_sync(force_sync=True)  # else they would come with the next forward pass
        weights = self.network.sharded_state_dict(metadata=metadata)
        # an _extra_state is pickled bytes, which torch would read back through an open unpickler; ours are empty
        weights = {name: entry for name, entry in weights.items() if not name.endswith("_extra_state")}
        entries = {entry.data: entry for entry in nested_values(weights)}
        state = self.part.state_dict()
        state["param_state"] = dict(enumerate(self._whole(entries[param], param) for param in self._parameters()))
        state["param_state_sharding_type"] = metadata["distrib_optim_sharding_type"]
        with torch.no_grad():
            self._copy_state()
            for name, entry in weights.items():
                room = self._get("weights", name, entry.data.shape, entry.data.dtype, entry.replica_id)
                if is_main_replica(entry.replica_id):
                    room.copy_(entry.data, non_blocking=True)
                entry.data = room
        torch.cuda.synchronize()
        return {"model": weights, "optimizer": state}

    def gather(self) -> None:
        """Bring the shares of the optimizer's state together on the first data parallel rank; may run in a thread."""
        if self.ranks == 1:
            return
        first = dist.get_process_group_ranks(self.group)[0]
        for state, share in self._shares.items():
            shares = [torch.empty_like(share) for _ in range(self.ranks)] if self.first else None
            dist.gather(share, shares, dst=first, group=self.group)
            if shares is not None:
                self._put_together(state, shares)

    def _get(
        self,
        kind: str,
        name: object,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        replica_id: int | tuple[int, ...] = 0,
    ) -> torch.Tensor:
        """Return room, which costs memory only where it is written to."""
        if (kind, name) not in self._room:
            pinned = torch.cuda.is_available() and is_main_replica(replica_id)
            self._room[kind, name] = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned)
        return self._room[kind, name]

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return (param for buffer in self.part.buffers for param in buffer.param_index_map)

    def _whole(self, entry: Any, param: torch.nn.Parameter) -> dict[str, Any]:
        """Return the entries of a parameter's state, whole as in the network on this tensor parallel rank."""
        return {
            state: replace(
                entry,
                key=f"optimizer.state.{state}.{entry.key}",
                data=self._get(state, param, param.shape, replica_id=entry.replica_id),
                dtype=torch.float32,
            )
            for state in STATES
        }

    def _copy_state(self) -> None:
        start = 0
        for number, buffer, bucket in self._buckets:
            share = bucket.grad_data.numel() // self.ranks
            ranges = self.part.gbuf_ranges[number][buffer.param_dtype, buffer.grad_dtype][bucket.bucket_id]
            for param, where in ranges["param_map"].items():
                held = self.part._get_main_param_and_optimizer_states(param)
                for state in STATES:
                    if self.ranks == 1:
                        room = self._room[state, param].view(-1)
                    else:
                        place = where["gbuf_local"]
                        room = self._shares[state][start + place.start : start + place.end]
                    room.copy_(held[state].view(-1), non_blocking=True)
            start += share

    def _put_together(self, state: str, shares: list[torch.Tensor]) -> None:
        """Cut parameters out of the ranks' shares: of each bucket, rank r holds the r-th part."""
        start = 0
        for _, buffer, bucket in self._buckets:
            share = bucket.grad_data.numel() // self.ranks
            flat = torch.cat([held[start : start + share] for held in shares])
            for param in bucket.params:
                first, last, _ = buffer.param_index_map[param]
                self._room[state, param].view(-1).copy_(flat[first - bucket.offset : last - bucket.offset])
            start += share
