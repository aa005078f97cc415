# SPDX-License-Identifier: Apache-2.0
"""JSON and YAML that may come from anybody: bounded in size and depth, plain values, of the types that are expected.

Nothing in them is resolved: a text that OmegaConf would take for an interpolation, ``${…}``, is refused, since it could
name a variable of the environment of who opens the file.
"""

import json
import re
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args

MOST_BYTES = 1 << 20  # of a configuration
MOST_NODES = 10_000  # of YAML: texts, numbers, lists and mappings
MOST_DEPTH = 40
LONGEST = 20_000  # characters of a text in YAML
SHOWN = 80  # characters of a foreign text in a message
REFERENCE = "${"
_FLOAT = re.compile(  # YAML 1.2's numbers, as OmegaConf reads them: 1e-5 is one, though YAML 1.1 has it for a text
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
Shape = Any
"""What a value has to be: a type or a union of types; a dict of shapes by name (``name?`` may be missing, ``*`` is any
other name); a list of one shape, for any number of it; a tuple of shapes, for a list of as many."""


def shown(value: object) -> str:
    """Return a foreign value for a message: texts and numbers cut short, of all else the type."""
    if isinstance(value, str):
        return repr(value[:SHOWN])
    if isinstance(value, bool | float) or value is None or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    return f"a {type(value).__name__}"


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """Return what a file of JSON holds.

    Raises
    ------
    OSError, ValueError
        No plain file, one of more than ``most`` bytes, no JSON, or nested too deeply; the error says so in a few words.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise ValueError("no plain file")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes, which it cannot need")
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError(_DEEP) from None
    for _ in _texts(found):
        pass  # the depth is looked at
    return found


_DEEP = f"it is nested more than {MOST_DEPTH} deep"


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value, keys included; ValueError where it is nested too deeply."""
    todo = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if depth > MOST_DEPTH:
            raise ValueError(_DEEP)
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            todo += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            todo += [(part, depth + 1) for part in item]


def refuse_references(value: Any) -> None:
    """Raise ValueError where a text in a value holds ``${``."""
    for text in _texts(value):
        if REFERENCE in text:
            raise ValueError(f"it holds {shown(text)}: what stands in ${{…}} is never resolved")


def parse_yaml(content: bytes, *, references: bool = False) -> dict[str, Any]:
    """Return the options that a configuration in YAML holds, read as OmegaConf would, but for references.

    Parameters
    ----------
    content : bytes
    references : bool, default False
        Let texts with ``${…}`` pass, as they stand.

    Raises
    ------
    ValueError
        No mapping, no YAML, larger or deeper than a configuration is, with anchors and aliases, or with ``${…}``.
    """
    import yaml

    if len(content) > MOST_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, a configuration {MOST_BYTES:,} at most")
    try:
        text = content.decode()
        _look_through(text)
        found = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is no YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError("it holds no options")
    if not references:
        refuse_references(found)
    return found


def _look_through(text: str) -> None:
    """Raise ValueError for YAML whose reading could take long; its events come one by one, before anything is made."""
    import yaml

    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_loader())):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError("it has anchors or aliases, by which a few bytes can stand for any number")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise ValueError(_DEEP)
        if number > 2 * MOST_NODES:  # a list or mapping has an event at its end too
            raise ValueError(f"it has more than {MOST_NODES:,} values")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST:
            raise ValueError(f"it has a text of {len(event.value):,} characters, {LONGEST:,} at most are taken")


@cache
def _loader() -> Any:
    """Return the class that reads YAML: PyYAML's safe one, with OmegaConf's numbers and without dates."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":timestamp", ":float"))]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), [*"-+.0123456789"])
    return Loader


def check_shape(value: Any, shape: Shape, at: str = "") -> None:
    """Raise ValueError, with the place, unless a value is what it has to be; see `Shape`."""
    if isinstance(shape, dict):
        _check_mapping(value, shape, at)
    elif isinstance(shape, list | tuple):
        if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
            raise ValueError(f"{at or 'it'} is {shown(value)}, where a list is expected")
        for number, part in enumerate(value):
            check_shape(part, shape[number if isinstance(shape, tuple) else 0], f"{at}[{number}]")
    elif type(value) not in _kinds(shape) or (isinstance(value, int) and abs(value) >= 1 << 64):
        raise ValueError(f"{at or 'it'} is {shown(value)}, where {_in_words(shape)} is expected")


def _check_mapping(value: Any, shape: dict[str, Shape], at: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{at or 'it'} is {shown(value)}, where names and values are expected")
    known = {name.removesuffix("?"): part for name, part in shape.items()}
    for name in shape:
        if name not in value and not name.endswith("?") and name != "*":
            raise ValueError(f"{f'{at}.' if at else ''}{name} is missing")
    for name, part in value.items():
        if (expected := known.get(name, shape.get("*"))) is not None:
            check_shape(part, expected, f"{at}.{name[:SHOWN]}" if at else name[:SHOWN])


def _kinds(shape: Shape) -> tuple[type, ...]:
    return get_args(shape) if isinstance(shape, UnionType) else (shape,)


def _in_words(shape: Shape) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "nothing",
             dict: "names and values", list: "a list"}  # fmt: skip
    kinds = _kinds(shape)
    return " or ".join(words[kind] for kind in kinds if not (kind is int and float in kinds))
