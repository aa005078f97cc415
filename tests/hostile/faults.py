# SPDX-License-Identifier: Apache-2.0
"""Lets one call of a command fail, as on a full or a failing disk: one line says so, nothing is lost, it can go on."""

from collections.abc import Iterator

from bench import Bench, Tally
from shim import ERRORS, Order
from tries import Ended

GOLDEN = 0.6180339887498949  # multiples of it, cut to their fractions, are spread evenly however many there are
FIT = (1, 2)  # exit codes of an error that is told


def fail(bench: Bench, tries: int, seed: int) -> Tally:
    """Try a command so many times, each with another kind of call, error and number of the call."""
    tally = Tally("faults", bench.scenario.name)
    for order in _orders(bench.reference.counts, tries, seed):
        bench.fresh()
        ended = bench.run(order)
        tally.tried += 1
        tally.hit += ended.hit
        if complaint := _complaint(bench, ended):
            where = f" ({ended.seen.where.removeprefix(str(bench.place))})" if ended.hit else ""
            tally.lost.append(f"{bench.scenario.name}, {order}{where}: {complaint}")
        tally.left += bool(bench.left_behind())
    return tally


def _orders(counts: dict[str, int], tries: int, seed: int) -> Iterator[Order]:
    """Yield faults: all kinds of calls that the command makes with all errors, at calls spread over its life."""
    calls = [call for call, count in counts.items() if count]
    for number in range(tries if calls else 0):
        turn, kind = divmod(number, len(calls))
        error = list(ERRORS)[(turn + kind) % len(ERRORS)]
        share = (seed + number) * GOLDEN % 1.0
        sticky = error == "ENOSPC" and turn % 2 == 0  # a full disk stays full, as a rule
        yield Order(1 + int(share * counts[calls[kind]]), (calls[kind],), error, sticky)


def _complaint(bench: Bench, ended: Ended) -> str:
    """Return what is wrong with how a command met its fault, and with what it does after it; "" if nothing is."""
    if complaint := ended.complaint():
        return complaint
    if ended.code not in (0, *FIT):
        return f"exit code {ended.code}: {ended.err.strip()[-400:]}"
    errors = [line for line in ended.err.strip().splitlines() if line.startswith("megacell ")]
    if ended.code in FIT and (len(errors) != 1 or ": error: " not in errors[0]):  # warnings may stand before it
        return f"not one line that says what is wrong: {ended.err.strip()[-600:]}"
    shown = bench.shown()
    if shown not in (bench.reference.before, bench.reference.after):
        return f"neither old nor new: {shown}"
    if ended.code == 0 and shown != bench.reference.after:
        return f"exit code 0, but what is there is {shown}"
    return bench.finish(shown)
