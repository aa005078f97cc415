# SPDX-License-Identifier: Apache-2.0
"""Lightning, NeMo and Megatron without what they import and no run uses: 3 of 8 seconds of CPU at every start.

Lightning asks of torchmetrics whether a logged value is a `Metric`, and the import brings scipy.signal and
transformers; NeMo's tokenizers and scorers bring transformers, its export brings onnx, Megatron's inference brings
wandb. While they are imported, empty modules stand in their place; afterwards the real ones can be imported as ever.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIBRARIES = ("lightning.pytorch", "megatron.core", "nemo.core", "nemo.utils.exp_manager")
UNUSED = ("torchmetrics", "transformers", "onnx", "wandb")


class _StandIn(ModuleType):
    """A module in which every name is an empty class: nothing is an instance of it."""

    __path__: list[str] = []  # noqa: RUF012 - as of a package, without modules of its own
    __version__ = "0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


@contextlib.contextmanager
def without_unused() -> Iterator[None]:
    """Import libraries inside without what of `UNUSED` has not been imported yet."""
    stand_ins = {name: _StandIn(name) for name in UNUSED if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def import_libraries() -> None:
    """Import what every run needs; a version of theirs that needs one of `UNUSED` after all gets it."""
    try:
        with without_unused():
            _import()
    except (ImportError, AttributeError, TypeError):
        _import()


def _import() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
