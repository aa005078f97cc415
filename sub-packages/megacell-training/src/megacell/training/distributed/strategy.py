# SPDX-License-Identifier: Apache-2.0
"""Lightning's view of Megatron: starts the process groups, and puts Megatron's engine where torch's DDP would be."""

import contextlib
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from megacell.training.distributed import device


class MegatronStrategy(DDPStrategy):
    """Process groups of tensor and data parallel ranks; the module's network under an ``Engine``.

    Parameters
    ----------
    tensor_parallel : int
        Ranks that one copy of the network is cut over.
    """

    def __init__(self, tensor_parallel: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.tensor_parallel = tensor_parallel
        self._megatron = contextlib.ExitStack()

    def setup_environment(self) -> None:
        """Start torch's and Megatron's process groups."""
        super().setup_environment()
        self._megatron.enter_context(device.megatron())
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=self.tensor_parallel)
        self._megatron.callback(parallel_state.destroy_model_parallel)

    def setup(self, trainer: Any) -> None:
        """Let the module build its network, once the process groups stand and before Lightning looks at it."""
        self.lightning_module.build()
        super().setup(trainer)
        self.lightning_module.ready()

    def configure_ddp(self) -> None:
        """Megatron's DDP, not torch's."""
        self.lightning_module.make_engine()

    def teardown(self) -> None:
        """Leave Megatron's groups and its device layer."""
        super().teardown()
        self._megatron.close()
