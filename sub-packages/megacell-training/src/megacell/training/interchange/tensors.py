# SPDX-License-Identifier: Apache-2.0
"""Weights in files: their types, and the check of their names, shapes and values."""

from collections.abc import Iterator, Mapping

import torch

from megacell.core.errors import DataError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights: 8 bits need scales beside them
State = Mapping[str, torch.Tensor]
Weights = Iterator[tuple[str, torch.Tensor]]  # checked, whole, by our names, each made when it is its turn
Shapes = dict[str, tuple[int, ...]]


def check_tensors(state: State, shapes: Shapes, place: str, config: str, unused: tuple[str, ...] = ()) -> None:
    """Refuse tensors that are missing, unknown, of another shape or kind, or not finite.

    Parameters
    ----------
    state : mapping of Tensor
        Of which one at a time is asked for.
    shapes : dict
        What has to be there.
    place, config : str
        The file, and the one beside the tensors that the shapes follow from, for messages.
    unused : tuple of str
        How the names of others begin that may be there, and are not looked at.

    Raises
    ------
    DataError
    """
    unknown = {name for name in set(state) - set(shapes) if not name.startswith(unused)}
    for names, what in ((set(shapes) - set(state), "missing"), (unknown, "unknown")):
        if names:
            first = sorted(names)[0]
            mend = "give the pretrained model, whole"
            raise DataError(f"{place}: {len(names)} tensors are {what} for its {config} ({first}, …); {mend}")
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise DataError(
                f"{place}: {name} is {tuple(tensor.shape)}, {config} and vocabulary say {shape}; they are no pair"
            )
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DataError(f"{place}: {name} holds {kind}, where weights should be; give them in 16 or 32 bits")
        if not all(map(torch.isfinite, tensor.aminmax())):  # takes no memory, unlike a mask
            raise DataError(f"{place}: {name} holds NaN or infinite values; fetch it again")
