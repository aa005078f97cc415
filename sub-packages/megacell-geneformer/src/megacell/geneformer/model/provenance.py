# SPDX-License-Identifier: Apache-2.0
"""What a model says of its training: step, store, how cells were held out, chosen and masked; checked when read."""

from collections.abc import Mapping
from typing import Any

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.tokens.masking import MaskSettings
from megacell.store.sampling.split import SplitSettings
from megacell.training.foreign.plain import check_shape, refuse_references
from megacell.training.nn.layout import Layout
from megacell.training.run.recorded import RECORD

DATA = {
    "split": {"by": str, "holdout": int | float, "seed": int, "test?": int | float},
    "choice?": {"where": str | None, "exclude": dict | None},
    "masking": {"rate": int | float, "mask": int | float, "random": int | float, "rate_to?": int | float | None},
    "seed": int,
}
PROVENANCE = {
    "step?": int,
    "store?": RECORD,
    "data?": DATA,
    "versions?": {"*": str},
    **dict.fromkeys(("made?", "from?", "format?"), str),
}
TOLD = ("step", "store", "data", "versions")  # by a checkpoint
FACTS = {"network": dict, "precision": str, "vocabulary": str, "store": RECORD, "data": DATA, "versions": {"*": str}}
_VALUES = {"*": [str | int | float | bool | None]}  # of ``exclude``: values by column


def check_provenance(provenance: Any, place: str) -> None:
    """Refuse what no model of ours says of itself.

    Parameters
    ----------
    provenance : Any
    place : str
        The file, for the message.

    Raises
    ------
    DataError
        Another type somewhere, settings that cannot be, or ``${…}``, which is never resolved.
    """
    try:
        refuse_references(provenance)
        check_shape(provenance, PROVENANCE)
        if (data := provenance.get("data")) is not None:
            check_shape((data.get("choice") or {}).get("exclude") or {}, _VALUES, "data.choice.exclude")
            SplitSettings(**data["split"])
            MaskSettings(**data["masking"])
    except (ValueError, TypeError, UsageError) as error:
        raise DataError(f"{place}: what it says of its training cannot be: {error}; fetch it again") from None


def check_facts(facts: Mapping[str, Any], place: str) -> ModelConfig:
    """Return the network that a checkpoint says it is of; DataError for what no checkpoint of a Geneformer says."""
    try:
        check_shape(dict(facts), FACTS)
        Layout(precision=facts["precision"])
        network = ModelConfig.of(facts["network"])
    except (ValueError, UsageError) as error:
        raise DataError(f"{place}: not a checkpoint of a Geneformer ({error}); take another checkpoint") from None
    check_provenance({name: facts[name] for name in TOLD}, place)
    return network


def plain_name(name: str) -> str:
    """Return a file's name as provenance may hold it: OmegaConf would take ``${…}`` in it for something to resolve."""
    return name.replace("$", "_")
