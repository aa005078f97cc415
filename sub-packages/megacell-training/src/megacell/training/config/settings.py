# SPDX-License-Identifier: Apache-2.0
"""A run's settings: composed by Hydra from the options of training and of the family, and checked before it starts."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megacell.core.errors import DataError, UsageError
from megacell.training.config.overrides import key_of, parsed, quoted, value_of
from megacell.training.family import DEFAULT, ModelFamily, find_family
from megacell.training.foreign.plain import MOST_BYTES, parse_yaml, refuse_references
from megacell.training.nn.layout import Layout

SAVED = "config.yaml"  # in the run folder: what the run was started with
ELSEWHERE = ("launcher", "sweep")  # how the processes are started: not a part of the run, may change at any time
KEPT = ("family", "seed", "batch.cells", "model", "data", "init", "precision")  # what makes a run the run that it is
FREE = ("data.prefetch", "data.threads")  # but not these
QUERY = "data.where="
TEXTS = ("out", "init")  # paths, beside the inputs of a family: taken as they stand
SCHEDULES = ("cosine", "linear", "constant")
REFUSED = {  # of Megatron's ways to spread a network, those that nothing here needs
    "pipeline": "the layers stay together; raise parallel.tensor where a copy does not fit on one GPU",
    "context": "a cell stays in one piece; parallel.sequence shares its tokens among the ranks of parallel.tensor",
}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # the groups that all families share


def family_of(overrides: list[str]) -> ModelFamily:
    """Return the family that a command line asks for: by ``family=``, or as the run that it resumes recorded it.

    Raises
    ------
    UsageError
        It is not installed.
    """
    chosen = {key_of(o): value_of(o) for o in overrides}
    if "family" in chosen:
        return find_family(chosen["family"])
    out = Path(chosen.get("out", ""))
    if chosen.get("resume", "").lower() == "true" and (out / SAVED).is_file():
        return find_family(str(read_saved(out).get("family", DEFAULT)))
    return find_family()


def read_saved(run: Path) -> dict[str, Any]:
    """Return the options that a run was started with, as its folder has them; nothing in them is resolved.

    How its processes were started is left out: that is for who goes on with the run to say.

    Raises
    ------
    DataError
        ``config.yaml`` cannot be read, or is none of ours.
    """
    path = run / SAVED
    try:
        with open(path, "rb") as file:
            saved = parse_yaml(file.read(MOST_BYTES + 1))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not the options of a run ({error}); take the file that the run wrote") from None
    return {name: value for name, value in saved.items() if name not in ELSEWHERE}


def config_dirs(family: str = DEFAULT) -> list[Path]:
    """Return the folders of Hydra's YAML: the family's own, where pretrain.yaml lies, and that of training."""
    return [find_family(family).configs, CONFIGS]


def searchpath() -> str:
    """Return the override that lets Hydra find the options of training beside a family's."""
    return f"hydra.searchpath=['file://{CONFIGS}']"


def as_texts(overrides: list[str], family: ModelFamily, *, several: bool = False) -> list[str]:
    """Return overrides as Hydra has to be told them, so that paths may hold anything; see `overrides.quoted`."""
    return [quoted(o, (*TEXTS, *family.inputs), several=several) for o in overrides]


@contextlib.contextmanager
def hydra_configs(family: ModelFamily) -> Iterator[None]:
    """Let Hydra compose from a family's folder inside."""
    from hydra import initialize_config_dir

    with initialize_config_dir(str(family.configs), version_base="1.3"):
        yield


def compose(overrides: list[str]) -> DictConfig:
    """Compose a run's settings; with ``resume=true`` on top of what the run was started with.

    Parameters
    ----------
    overrides : list of str
        Hydra's: ``store=STORE``, ``model=tiny``, ``optim.lr=3e-4``.

    Raises
    ------
    UsageError
        For an unknown option, a missing or malformed value, or sizes that do not fit.
    DataError
        As `read_saved`.
    """
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

    family = family_of(overrides)
    overrides = as_texts(overrides, family)
    try:
        with hydra_configs(family):
            cfg = hydra_compose("pretrain", [searchpath(), *(o for o in overrides if not o.startswith(QUERY))])
        for query in (o.removeprefix(QUERY) for o in overrides if o.startswith(QUERY)):
            cfg.data.where = None if query == "null" else query  # as it stands: Hydra would want quotes around it
        if cfg.resume:
            cfg = _resumed(cfg, overrides, family)
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (MissingMandatoryValue, InterpolationKeyError) as error:  # the latter: ${given.…} of an experiment
        raise UsageError(f"{error.full_key}=… must be given") from error
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split()).split(" Config search path:")[0].split(" full_key:")[0]
        raise UsageError(f"{text}; `megacell pretrain --cfg …` prints all options") from error
    try:
        refuse_references(plain)  # what is written down for the run is read again as it stands
    except ValueError as error:
        raise UsageError(f"options: {error} there; give the value itself") from None
    cfg = DictConfig(plain)
    OmegaConf.set_struct(cfg, True)
    _check(cfg)
    family.check(cfg)
    return cfg


def _resumed(cfg: DictConfig, overrides: list[str], family: ModelFamily) -> DictConfig:
    """Return what a run was started with, with what was given anew; refuse what would make it another run."""
    if OmegaConf.is_missing(cfg, "out"):
        raise UsageError("resume=true needs out=RUN, the run to go on with")
    saved = Path(cfg.out) / SAVED
    if not saved.is_file():
        raise UsageError(f"out={cfg.out}: no run to resume there; leave resume=true out to start one")
    given = [o for o in overrides if key_of(o).split(".")[0] not in ("resume", "out", *ELSEWHERE)]
    for key in map(key_of, given):
        if key in FREE:
            continue
        group = any((folder / key).is_dir() for folder in (family.configs, CONFIGS))
        if key.split(".")[0] in KEPT or key in KEPT or group:
            raise UsageError(f"{key}=…: a run that goes on keeps it; start a new one, with init={cfg.out}")
    own = read_saved(Path(cfg.out))
    merged = OmegaConf.merge(cfg, own, _given(given), {"resume": True, "out": cfg.out})
    assert isinstance(merged, DictConfig)
    return merged


def check_positive(cfg: DictConfig, names: Iterable[str]) -> None:
    """Raise UsageError unless each of the options is a whole number of at least 1."""
    for name in names:
        value = OmegaConf.select(cfg, name)
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value}: must be a whole number of at least 1")


def _given(overrides: list[str]) -> DictConfig:
    """Return the options of overrides, as Hydra reads their values."""
    cfg = OmegaConf.create()
    for key, value in parsed(overrides):
        OmegaConf.update(cfg, key, value)
    return cfg


def _check(cfg: DictConfig) -> None:
    positive = ("steps", "devices", "batch.cells", "batch.tokens", "validation.every", "validation.cells",
                "checkpoint.every", "checkpoint.keep", "guard.window", "guard.stop_after", "log_every",
                "parallel.tensor", "data.prefetch")  # fmt: skip
    check_positive(cfg, positive)
    _check_guard(cfg)
    for name in ("lr", "min_lr", "warmup", "hold", "weight_decay", "beta1", "beta2", "eps", "clip"):
        if not isinstance(cfg.optim[name], int | float) or cfg.optim[name] < 0:
            raise UsageError(f"optim.{name}={cfg.optim[name]}: must be a number of at least 0")
    for name in ("initial_loss_scale", "loss_scale_window"):
        if not isinstance(cfg.optim[name], int) or cfg.optim[name] < 1:
            raise UsageError(f"optim.{name}={cfg.optim[name]}: must be a whole number of at least 1")
    if cfg.optim.schedule not in SCHEDULES:
        raise UsageError(f"optim.schedule={cfg.optim.schedule}: choose one of {', '.join(SCHEDULES)}")
    parts = [part * (cfg.steps if part < 1 else 1) for part in (cfg.optim.warmup, cfg.optim.hold)]
    if sum(parts) >= cfg.steps:
        raise UsageError(
            f"optim.warmup={cfg.optim.warmup} and optim.hold={cfg.optim.hold} leave none of steps={cfg.steps}: "
            "lower them, or raise steps"
        )
    _check_parallel(cfg)
    if not isinstance(cfg.data.threads, int) or cfg.data.threads < 0:
        raise UsageError(f"data.threads={cfg.data.threads}: must be a whole number of at least 0")


def _check_parallel(cfg: DictConfig) -> None:
    for name, why in REFUSED.items():
        if cfg.parallel[name] != 1:
            raise UsageError(f"parallel.{name}={cfg.parallel[name]}: not offered: {why}")
    for name in ("sequence", "reduce_fp32"):
        if not isinstance(cfg.parallel[name], bool):
            raise UsageError(f"parallel.{name}={cfg.parallel[name]}: must be true or false")
    layout(cfg)


def layout(cfg: DictConfig) -> Layout:
    """Return how the settings have the network run."""
    parallel = cfg.parallel
    sequence = parallel.sequence and parallel.tensor > 1
    return Layout(
        parallel.tensor, sequence, parallel.recompute, cfg.precision, cfg.attention, cfg.compile, cfg.deterministic
    )


def _check_guard(cfg: DictConfig) -> None:
    for name in ("loss", "grad_norm"):
        value = cfg.guard[name]
        if value is not None and (not isinstance(value, int | float) or value <= 1):
            raise UsageError(f"guard.{name}={value}: must be a number above 1, or null")
    if not isinstance(cfg.checkpoint.best, int) or cfg.checkpoint.best < 0:
        raise UsageError(f"checkpoint.best={cfg.checkpoint.best}: must be a whole number of at least 0")
    if not isinstance(cfg.checkpoint.asynchronous, bool):
        raise UsageError(f"checkpoint.asynchronous={cfg.checkpoint.asynchronous}: must be true or false")


def check_ranks(cfg: DictConfig, ranks: int) -> None:
    """Raise UsageError if the settings cannot be spread over this many ranks."""
    if ranks % cfg.parallel.tensor:
        raise UsageError(
            f"parallel.tensor={cfg.parallel.tensor} does not divide the {ranks} rank(s): "
            f"set devices={cfg.parallel.tensor} or a multiple"
        )
    copies = ranks // cfg.parallel.tensor
    if cfg.batch.cells < copies:
        raise UsageError(f"batch.cells={cfg.batch.cells} is under the {copies} data parallel ranks: raise it")
