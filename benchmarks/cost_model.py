# SPDX-License-Identifier: Apache-2.0
"""How long a step takes on many ranks, computed from one rank's speed and the links between ranks.

    step = compute x (1 + imbalance) + gradients and weights that computing does not hide + tensor parallelism

Gradients are reduce-scattered and weights all-gathered by rings, as Megatron's DistributedOptimizer has it done.
`ASSUMPTIONS` says in words what is taken for granted.
"""

from dataclasses import dataclass

GRADIENT_BYTES = 4  # reduced in float32
BACKWARD = 2 / 3  # of the computing
BUCKET = 40_000_000, 1_000_000  # Megatron's gradient buckets: at least so many parameters, and so many a rank
ALL_REDUCES_A_LAYER = 4  # of tensor parallelism: behind attention and feed-forward layer, forward and backward
GATHERS_A_LAYER = 2  # more under sequence parallelism: the inputs of both, once more in the backward pass

ASSUMPTIONS = (
    "weak scaling: every data parallel copy has the same cells a step, whatever their number",
    "computing goes at the speed of one rank alone; tensor parallel ranks share it evenly; optimizer steps, data and "
    "logging stand in that speed and do not shrink or grow with the ranks",
    "the fullest rank is waited for: by so many tokens more than the mean as Megacell's own sharing out leaves with "
    "these cells; that attention costs more in long cells is left out",
    "rings: each of n ranks sends (n - 1)/n of the bytes in n - 1 hops; gradients are float32, weights the model's "
    "precision",
    "between machines every GPU's adapter carries a ring of its own, so that a machine's adapters add up; never faster "
    "than inside; other traffic, congestion and failures are left out",
    "gradients and weights go in Megatron's buckets, of max(40 M, 1 M x ranks) parameters; on a GPU all but one are "
    "hidden, as far as it is long enough, behind a micro-batch's pass: gradients behind the backward one of the last, "
    "weights behind the forward one of the next step's first; on a CPU nothing is hidden",
    "tensor parallelism: 4 all-reduces a layer of tokens x hidden in the model's precision, and 2 all-gathers more for "
    "its sequence parallelism, inside a machine, hidden behind nothing; those of embedding and head are left out",
)


@dataclass(frozen=True)
class Link:
    """What a ring passes from one rank to the next.

    Attributes
    ----------
    bandwidth : float
        Bytes a second, in one direction.
    latency : float
        Seconds a hop.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machines:
    """Equal machines of several ranks each.

    Attributes
    ----------
    ranks : int
        Of one machine.
    inside, between : Link
        Of one rank to another of its machine, and of another.
    overlap : bool
        Whether ranks go on computing while gradients and weights are on their way.
    """

    ranks: int
    inside: Link
    between: Link
    overlap: bool


@dataclass(frozen=True)
class Work:
    """What one copy of the model has to do in a step.

    Attributes
    ----------
    tokens : float
        Real tokens a step, of one copy.
    micro_batches : int
        That these are cut into.
    seconds_a_token : float
        Of one rank alone, for everything a step does.
    parameters, layers, hidden : int
    weight_bytes : int
        Of a parameter in the model's precision, and of an activation.
    """

    tokens: float
    micro_batches: int
    seconds_a_token: float
    parameters: int
    layers: int
    hidden: int
    weight_bytes: int


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by what they are spent on."""

    compute: float
    imbalance: float
    gradients: float
    weights: float
    tensor: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.compute + self.imbalance + self.gradients + self.weights + self.tensor


def ring_seconds(size: float, ranks: int, machines: Machines, stride: int = 1) -> float:
    """Return the seconds of one reduce-scatter or all-gather of ``size`` bytes; an all-reduce is one of each.

    Parameters
    ----------
    size : float
        Bytes, before they are scattered or once they are gathered.
    ranks : int
        In the ring.
    machines : Machines
    stride : int
        From one rank of the ring to the next; the ranks between belong to rings of their own.
    """
    if ranks == 1:
        return 0.0
    per_machine = max(1, machines.ranks // stride)
    hops_between = -(-ranks // per_machine) if ranks > per_machine else 0
    hops_inside = max(0, ranks - 1 - hops_between)
    bandwidth = machines.inside.bandwidth
    if hops_between:
        bandwidth = min(bandwidth, per_machine * machines.between.bandwidth)
    latency = hops_inside * machines.inside.latency + hops_between * machines.between.latency
    return (ranks - 1) / ranks * size / bandwidth + latency


def step(work: Work, machines: Machines, ranks: int, *, tensor: int = 1, imbalance: float = 0.0) -> Step:
    """Return how long a step takes.

    Parameters
    ----------
    work : Work
    machines : Machines
    ranks : int
        In all.
    tensor : int
        Tensor parallel ranks that one copy is cut over, neighbours on one machine; a divisor of ``ranks``.
    imbalance : float
        By which share the fullest copy's tokens exceed the mean.

    Raises
    ------
    ValueError
        Ranks that cannot be cut like that.
    """
    if ranks % tensor or tensor > machines.ranks:
        raise ValueError(
            f"{tensor} tensor parallel ranks do not fit into {ranks} ranks of machines with {machines.ranks}"
        )
    copies, own = ranks // tensor, work.parameters / tensor
    compute = work.tokens * work.seconds_a_token / tensor
    gradients, weights = (
        _exposed(bytes_each * own, own, copies, machines, tensor, share * compute / work.micro_batches)
        for bytes_each, share in ((GRADIENT_BYTES, BACKWARD), (work.weight_bytes, 1 - BACKWARD))
    )
    return Step(compute, compute * imbalance, gradients, weights, _tensor(work, machines, tensor))


def _exposed(size: float, parameters: float, copies: int, machines: Machines, tensor: int, passing: float) -> float:
    """Return the seconds of moving ``size`` bytes by buckets that ``passing`` seconds of computing do not hide."""
    buckets = -(-int(parameters) // max(BUCKET[0], BUCKET[1] * copies))
    each = ring_seconds(size / buckets, copies, machines, tensor)
    return each + max(0.0, (buckets - 1) * each - (passing if machines.overlap else 0.0))


def _tensor(work: Work, machines: Machines, tensor: int) -> float:
    rings = work.layers * (2 * ALL_REDUCES_A_LAYER + GATHERS_A_LAYER)
    return rings * ring_seconds(work.tokens * work.hidden * work.weight_bytes, tensor, machines)


def efficiency(work: Work, found: Step, tensor: int = 1) -> float:
    """Return the tokens a second a rank, as a share of one rank's alone."""
    return work.tokens * work.seconds_a_token / tensor / found.seconds
