# SPDX-License-Identifier: Apache-2.0
"""Kills a command at its calls and between them: the old state or the new one stays, and it can go on to its end.

Each try kills the command, and what goes on with it after that, before it is let to the end.
"""

import random
import signal
from collections.abc import Iterator

from bench import Bench, Tally
from shim import Order

METHODS = (
    (signal.SIGKILL, "all"),
    (signal.SIGTERM, "all"),
    (signal.SIGKILL, "parent"),
    (signal.SIGINT, "all"),
    (signal.SIGSTOP, "all"),  # and killed while it stands still
    (signal.SIGKILL, "caller"),  # one process of several, the one that writes
)
IN_A_ROW = 2
BETWEEN_CALLS = 4  # every so many-th kill comes at a time rather than at a call


def kill(bench: Bench, tries: int, seed: int) -> Tally:
    """Try a command so many times."""
    tally = Tally("kills", bench.scenario.name)
    moments = _moments(bench, tries * IN_A_ROW, random.Random(seed))
    for _ in range(tries):
        bench.fresh()
        done: list[str] = []
        complaint = _try(bench, moments, tally, done)
        if complaint:
            tally.lost.append(f"{bench.scenario.name}, {', then '.join(done)}: {complaint}")
        tally.left += bool(bench.left_behind())
    return tally


def _moments(bench: Bench, number: int, draw: random.Random) -> Iterator[tuple[Order, float | None]]:
    """Yield kills: spread over all calls, in a random order, each before or after its call, by all methods in turn."""
    reference = bench.reference
    shares = [(i + draw.random()) / number for i in range(number)]
    draw.shuffle(shares)
    for i, share in enumerate(shares):
        what, who = METHODS[i % len(METHODS)]
        if i % BETWEEN_CALLS == BETWEEN_CALLS - 1:
            yield Order(1, number=what, who="parent" if who == "parent" else "all"), share * reference.seconds
        else:
            at = 1 + int(share * reference.calls / (1 + i % IN_A_ROW))  # what goes on after a kill makes fewer
            yield Order(at, number=what, who=who, after=draw.random() < 0.5), None


def _try(bench: Bench, moments: Iterator[tuple[Order, float | None]], tally: Tally, done: list[str]) -> str:
    """Kill, go on, kill, go on to the end; return the first complaint, or ""."""
    reference, shown = bench.reference, bench.reference.before
    for turn in range(IN_A_ROW):
        order, moment = next(moments)
        ended = bench.run(order, again=turn > 0, signal_after=moment)
        done.append(str(order) if moment is None else f"{order.number.name} after {moment:.2f} s")
        tally.tried += 1
        tally.hit += ended.hit
        shown = bench.shown()
        if complaint := ended.complaint():
            return complaint
        if shown not in (reference.before, reference.after):
            return f"neither old nor new: {shown}, not {reference.before} or {reference.after}"
        if ended.code != 0 and not ended.hit:
            return f"exit code {ended.code} without a kill: {ended.err.strip()[-400:]}"
        if ended.code == 0 and shown != reference.after:
            return f"exit code 0, but what is there is {shown}"
        if ended.code == 0 or (shown == reference.after and not bench.scenario.repeatable):
            break
    return bench.finish(shown)
