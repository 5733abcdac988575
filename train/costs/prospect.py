"""What training a recipe takes under every layout that a number of processors allows, and which one to choose.

A group of the sweep trains its dictionaries in streams, one after the other (those that agree in batch and seed share
one), so its time is the sum of its streams' and its memory that of the largest, with the weights of those to come. What
one rank needs is that of the group that has most.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from thresher.cache.contracts import Site
from thresher.cache.hardware import Hardware
from thresher.cache.layout import Codec
from thresher.train.costs.layout import Layout, layouts, shares
from thresher.train.costs.memory import Assumed, Memory, memory
from thresher.train.costs.sizes import Sizes, sizes_of
from thresher.train.costs.work import Bound, Step, Traffic, step, traffic
from thresher.train.plan import RunPlan

ROOM = 0.9
"""Share of a processor's memory that is planned with; the rest is CUDA's own and what an allocator loses."""
RESIDENT = 0.85
"""Share of what is left beyond which a cache does not stay on the device (cache/loading.py)."""
ALIKE = 1.05
"""Times within this factor count as equal: the simpler layout is chosen."""
_WIDEST = 4096  # ranks looked at when nothing fits


class Job(NamedTuple):
    """What is to be trained."""

    plans: tuple[RunPlan, ...]
    steps: tuple[int, ...]
    """By plan."""
    sites: Mapping[str, Site]
    """By name, all that plans read or write."""
    codec: Codec
    """Of the cache that is read."""
    rows: int
    """Training rows of the cache."""
    sizes: Mapping[str, Sizes]
    """By plan's name."""


class Prospect(NamedTuple):
    """Training under one layout."""

    layout: Layout
    memory: Memory
    """Of the rank that needs most."""
    fits: bool
    step: Step
    """Seconds that the busiest rank takes for one step of all its dictionaries of a stream, the longest stream's."""
    reading_s: float
    """Seconds for which a batch's rows occupy the disk; 0 where they stay in the device's memory."""
    traffic: Traffic
    """What that rank sends in such a step."""
    seconds: float
    """Of the whole training."""
    bound: Bound
    """What takes longest."""

    @property
    def hours(self) -> float:
        """Of the whole training."""
        return self.seconds / 3600


class _Stream(NamedTuple):
    step: Step
    reading_s: float
    traffic: Traffic
    seconds: float
    bound: Bound


def counted(plans: Iterable[RunPlan]) -> dict[str, Sizes]:
    """Sizes of every plan, by name; those that differ in nothing but their sites are counted once."""
    known: dict[tuple[object, ...], Sizes] = {}
    found = {}
    for plan in plans:
        settings = {name: value for name, value in vars(plan.spec).items() if name not in ("reads", "writes", "layers")}
        key = (*settings.values(), len(plan.spec.reads), len(plan.spec.writes), plan.train.optimiser)
        if key not in known:
            known[key] = sizes_of(plan.spec, plan.train)
        found[plan.name] = known[key]
    return found


def prospects(
    job: Job, ranks: int, hardware: Hardware, disk: float, assumed: Assumed, threads: int = 1
) -> list[Prospect]:
    """Every layout of so many ranks, the least divided first. `disk`: bytes a second that a host reads of the cache."""
    return [prospect(job, layout, hardware, disk, assumed, threads) for layout in layouts(ranks, job.plans)]


def prospect(
    job: Job,
    layout: Layout,
    hardware: Hardware,
    disk: float,
    assumed: Assumed,
    threads: int = 1,
) -> Prospect:
    """One layout; `threads`: of a CPU."""
    shared = shares(job.plans, job.steps, layout.groups)
    memories = [_memory_of(share, job, layout, hardware, assumed, threads) for share in shared]
    most = max(memories, key=lambda each: each.total)
    fits = most.total <= ROOM * hardware.memory
    free = ROOM * hardware.memory - most.total
    per_group = min(hardware.per_host, layout.ranks) / (layout.data * layout.latents)
    readers = max(1.0, per_group)
    runs = []
    for share in shared:
        streams = [_stream(plans, job, layout, hardware, assumed, disk / readers, free) for plans in _streams(share)]
        if streams:
            runs.append(streams)
    slowest = max(runs, key=lambda streams: sum(each.seconds for each in streams))
    longest = max(slowest, key=lambda each: each.seconds)
    seconds = sum(each.seconds for each in slowest)
    return Prospect(layout, most, fits, longest.step, longest.reading_s, longest.traffic, seconds, longest.bound)


def recommended(found: Sequence[Prospect]) -> Prospect | None:
    """The simplest of the fastest that fit; None: none fits."""
    fitting = [each for each in found if each.fits]
    if not fitting:
        return None
    least = min(each.seconds for each in fitting)
    alike = [each for each in fitting if each.seconds <= ALIKE * least]
    return min(alike, key=lambda each: (each.layout.data * each.layout.latents, each.layout.latents))


def smallest(job: Job, hardware: Hardware, disk: float, assumed: Assumed) -> Prospect | None:
    """The fewest ranks that split latents with which everything fits, as one group; None: no number does."""
    ranks = 1
    while ranks <= _WIDEST:
        for layout in layouts(ranks, job.plans):
            if layout.groups == layout.data == 1:
                found = prospect(job, layout, hardware, disk, assumed)
                if found.fits:
                    return found
        ranks *= 2
    return None


def _streams(plans: Sequence[RunPlan]) -> list[list[RunPlan]]:
    """Plans that read together."""
    streams: dict[tuple[int, int], list[RunPlan]] = {}
    for plan in plans:
        streams.setdefault((plan.train.batch_rows, plan.seed), []).append(plan)
    return list(streams.values())


def _memory_of(
    share: Sequence[RunPlan],
    job: Job,
    layout: Layout,
    hardware: Hardware,
    assumed: Assumed,
    threads: int,
) -> Memory:
    """Of a rank with this share: the stream that takes most, and the weights of those after it."""
    streams, most = _streams(share), memory((), job.sizes, job.sites, layout, hardware.kind, assumed=assumed)
    for index, plans in enumerate(streams):
        found = memory(
            plans, job.sizes, job.sites, layout, hardware.kind, codec=job.codec, threads=threads, assumed=assumed
        )
        later = [plan for stream in streams[index + 1 :] for plan in stream]
        waiting = sum(
            job.sizes[p.name].weights.of(layout.latents) + job.sizes[p.name].buffers.of(layout.latents) for p in later
        )
        found = found._replace(weights=found.weights + waiting)
        most = max(most, found, key=lambda each: each.total)
    return most


def _stream(
    plans: Sequence[RunPlan],
    job: Job,
    layout: Layout,
    hardware: Hardware,
    assumed: Assumed,
    disk: float,
    free: float,
) -> _Stream:
    """Time of the plans that read together; `disk`: bytes a second that they get, `free`: of the device's memory."""
    of = dict(zip((plan.name for plan in job.plans), job.steps, strict=True))
    every = [step(plan, job.sizes[plan.name], layout, hardware, assumed) for plan in plans]
    sent = [traffic(plan, job.sizes[plan.name], layout, assumed) for plan in plans]
    used = dict.fromkeys(site for plan in plans for site in (*plan.spec.reads, *plan.spec.writes))
    row = sum(job.sites[name].width + 2 if job.codec == "int8z" else 2 * job.sites[name].width for name in used)
    resident = hardware.kind == "cuda" and row * job.rows <= RESIDENT * free
    reading = 0.0 if resident else plans[0].train.batch_rows * row / disk
    whole = Step(*(sum(part) for part in zip(*every, strict=True)))
    working = sum(of[plan.name] * each.total for plan, each in zip(plans, every, strict=True))
    seconds = max(working, reading * max(of[plan.name] for plan in plans))
    bounds: dict[Bound, float] = {"matmul": whole.matmul, "memory": whole.memory, "exchange": whole.exchange}
    bound: Bound = max(bounds, key=lambda name: bounds[name]) if seconds <= working else "reading"
    return _Stream(whole, reading, Traffic(*(sum(part) for part in zip(*sent, strict=True))), seconds, bound)
