# SPDX-License-Identifier: Apache-2.0
"""What a model family brings, so that it can be trained: its options, its data, its network and its baselines.

A family is found by the entry-point group ``megacell.families``; the option ``family=NAME`` chooses one. All else in
this package (steps, checkpoints, ranks, guard, metrics, sweeps) is the same for each of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from omegaconf import DictConfig

from megacell.core.errors import UsageError
from megacell.training.nn.layout import Layout

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse as sp
    import torch

GROUP = "megacell.families"  # entry points: name → an object that is a `ModelFamily`
DEFAULT = "geneformer"  # where ``family=`` is not given


class MicroBatch(Protocol):
    """What is asked of a micro-batch before its family packs it for the network.

    Attributes
    ----------
    cells : int64 [cells]
        Numbers of the samples in it, which skipped.csv names.
    n_tokens : int
        Real tokens, padding left out.
    n_items : int
        Losses that the network will return for it.
    """

    @property
    def cells(self) -> "np.ndarray[Any, Any]": ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def n_items(self) -> int: ...


class Prefetched(Protocol):
    """Steps made ahead in threads, which end with the context.

    Attributes
    ----------
    wait_seconds : float
        How long the training loop has waited for them in all.
    """

    @property
    def wait_seconds(self) -> float: ...
    def __iter__(self) -> Iterator[list[Any]]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Stream(Protocol):
    """The steps of one rank, each a pure function of its number: a list of micro-batches."""

    def prefetched(self, first: int, last: int | None = None, *, threads: int, depth: int) -> Prefetched:
        """Return steps first … last - 1, made ahead by so many threads, each so many steps."""

    def state_dict(self, step: int) -> dict[str, int | str]:
        """Return what a checkpoint keeps of the stream at a step."""

    def step_of(self, state: dict[str, int | str]) -> int:
        """Return the step of a kept state; UsageError if it is that of another stream."""


class Network(Protocol):
    """A Megatron-core module that `FamilyRun.build` returns.

    Calling it with a pack gives its losses, float [items]. ``config`` is a Megatron ``TransformerConfig``.
    """

    config: Any

    def set_input_tensor(self, tensor: "torch.Tensor") -> None:
        """Nothing, without a pipeline; Megatron's schedule calls it."""

    def __call__(self, pack: Any) -> "torch.Tensor": ...
    def parameters(self) -> Iterator["torch.nn.Parameter"]: ...


@dataclass(frozen=True)
class Baselines:
    """Losses that need no network, in the unit of the network's.

    Attributes
    ----------
    losses : dict of float
        By name, as summary.json keeps them.
    line : str
        For the log, before the first step.
    short : str
        For the log, beside each held-out loss.
    """

    losses: dict[str, float] = field(default_factory=dict)
    line: str = ""
    short: str = ""


@dataclass(frozen=True)
class About:
    """A family's part of a run's README.md.

    Attributes
    ----------
    commands : list of (str, str)
        What can be done with the run, and the command for it.
    files : list of (str, str)
        What the family wrote into the run folder, and what it is.
    made_from : str
        Its inputs, in a sentence or two.
    """

    commands: list[tuple[str, str]] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)
    made_from: str = ""


class FamilyRun(Protocol):
    """The data and the network of one run; the same on every rank.

    Attributes
    ----------
    lines : list of str
        What a user should know of the data, for the log.
    unit : str
        Of the losses: "nats".
    digest : str
        Hexadecimal, names the data: ranks that see others refuse to train together.
    """

    @property
    def lines(self) -> list[str]: ...
    @property
    def unit(self) -> str: ...
    @property
    def digest(self) -> str: ...

    def stream(self, *, held_out: bool = False, rank: int = 0, ranks: int = 1, tensor: int = 1) -> Stream:
        """Return the steps of data parallel rank ``rank`` of ``ranks``, each cut over ``tensor`` ranks.

        Held out: the cells that measure the held-out loss, once, in an order of their own.
        """

    def build(self, layout: Layout) -> Any:
        """Return the `Network` of this rank, not filled yet; the process groups exist."""

    def fill(self, network: Any) -> None:
        """Give a network its initial weights: from the seed, or from the model of ``init=``."""

    def pack(self, batch: Any, device: "torch.device") -> Any:
        """Move a micro-batch to the device, in the form that the network takes."""

    def describe(self, network: Any) -> str:
        """Return how the network computes, for the log: which attention, which dropout."""

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint says of network and data."""

    def check_facts(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise DataError if a checkpoint belongs to another network or other data than this run's."""

    def write_inputs(self, out: Path) -> None:
        """Copy into the new run folder what the run needs later of its inputs."""

    def about(self, out: Path) -> About:
        """Return the family's part of the run's README.md."""

    def baselines(self, out: Path) -> Baselines:
        """Compute the baselines on the held-out cells, and keep in the run folder what they were fitted to."""


class CellModel(Protocol):
    """A trained model, opened for cells whose genes are known: what tasks ask of any family.

    Attributes
    ----------
    width : int
        Length of an embedding.
    """

    @property
    def width(self) -> int: ...

    def embed(self, rows: "sp.csr_matrix") -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
        """Embed cells.

        Parameters
        ----------
        rows : csr_matrix [cells, genes]
            Counts.

        Returns
        -------
        embeddings : float32 [cells, width]
            NaN for a cell that the model can say nothing of.
        n_tokens : int64 [cells]
            What the model saw of each.
        """


class ModelFamily(Protocol):
    """A family, before anything of it is opened.

    Attributes
    ----------
    name : str
    configs : Path
        Folder of its Hydra options: ``pretrain.yaml`` and the groups that it adds to those of training.
    inputs : tuple of str
        Options that name folders to be read, such as ``("store", "vocabulary")``.
    """

    @property
    def name(self) -> str: ...
    @property
    def configs(self) -> Path: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...

    def check(self, cfg: DictConfig) -> None:
        """Raise UsageError for options of the family that cannot be used, before anything is opened."""

    def open(self, cfg: DictConfig, facts: Mapping[str, Any] | None) -> FamilyRun:
        """Open the data of a run, as the checkpoint that it goes on from recorded them where there is one.

        Raises
        ------
        UsageError, DataError
            Inputs and options do not fit each other, or not the model of ``init=``.
        """


def find_family(name: str = DEFAULT) -> ModelFamily:
    """Return an installed family.

    Raises
    ------
    UsageError
        There is none of this name.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        known = ", ".join(sorted(points)) or "none is"
        raise UsageError(f"family={name}: not installed; choose one of: {known}")
    family: ModelFamily = points[name].load()
    return family
