# SPDX-License-Identifier: Apache-2.0
"""Several processes, on several machines, that make parts of one plan at the same time."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from megacell.core.errors import DataError, UsageError
from megacell.store.conversion.options import Sample, State
from megacell.store.conversion.plan import Plan, load_plan
from megacell.store.format.lock import NAME as LOCK
from megacell.store.format.lock import is_held
from megacell.store.format.manifest import Manifest

PART_LOCK = f"{LOCK}-part-"
_POLL = 0.5  # seconds between looks for a plan that another part is making


def request_hash(before: Manifest | None, samples: Sequence[Sample], shard_bytes: int, *, skip_bad: bool) -> str:
    """Return what names a request: the store it adds to, the files as they are now, and every option.

    Raises
    ------
    DataError
        A file that cannot be looked at.
    """
    digest = xxhash.xxh3_128(json.dumps([before.digest if before else "", shard_bytes, skip_bad]).encode())
    for sample in samples:
        try:
            state = State.of(sample.path)
        except OSError as error:
            raise DataError(f"{sample.path}: cannot be read ({error}); check the file and its rights") from None
        digest.update(json.dumps([sample.to_json(), vars(state)]).encode())
    return digest.hexdigest()


def part_plan(store: Path, request: str, make: Callable[[], None]) -> Plan:
    """Return the plan for a request; the first of the parts to come makes it, the others wait.

    Raises
    ------
    UsageError
        A plan for something else is being worked on here.
    """
    while True:
        plan = load_plan(store)
        if plan is not None and plan.request == request:
            return plan
        try:
            make()
        except DataError:
            if not is_held(store / LOCK):
                raise
            time.sleep(_POLL)
            continue
        plan = load_plan(store)
        if plan is None or plan.request != request:
            raise UsageError(f"{store}: its plan is for other files or options; give every part the same ones")


def refuse_running_parts(store: Path) -> None:
    """Raise if a part of a conversion is being made now.

    Raises
    ------
    DataError
        Naming the part.
    """
    for lock in sorted(store.glob(f"{PART_LOCK}*")):
        if lock.suffix != ".claim" and is_held(lock):
            part = lock.name.removeprefix(PART_LOCK).replace("-of-", "/")
            raise DataError(f"{store}: part {part} is still running ({lock}); wait for it, or delete the lock if not")
