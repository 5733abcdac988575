"""Memory of one processor while it trains, in bytes: what is kept, and what a step or the end of training adds.

Of a dictionary with N rows a step, widths D and E, F latents, K active ones a row, L sources and S destinations, P
parameters, of which a rank has its share:

    weights, gradients       4 P each
    moments, buffers         as counted (sizes.py)
    low                      2 L F D, copies of encoders, on a GPU
    block                    N F in bfloat16 on a GPU, else float32; one source's at a time, in tiles of 1 GiB
                             (GPU) or 256 MiB; TopK on a CPU with 128 K > F partitions a copy
    codes                    60 N K L: index, token and order (int64) and four numbers of every active entry
    reconstructions          4 N S E, four times (value, residual, two gradients), three times for one destination
    AuxK                     n dead latents: gathered rows, codes [N, n], their gradients
    Muon                     four of its largest matrix
    exchange                 4 N S E, and 8 N K for each rank of the latents

A batch is in memory once in float32, once per training space, and waits in three copies with a fourth in the making: as
stored on a GPU, in float32 on a CPU. All dictionaries of a share keep theirs at once, a step has those of one at a time
(on a CPU of as many small ones as there are threads). At the end gradients are gone, and every dictionary is folded
into a second one, matrix by matrix in float64, and some thresholds are found in blocks of float32: for a single SAE
that is more than a step takes. A CPU's allocator finds room again for about half of those temporaries (measured: none
of them to all).

Left out: what an allocator loses to gaps, CUDA's context (0.3 to 0.6 GB), and temporaries that are none of these.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from thresher.cache.contracts import Site
from thresher.cache.layout import Codec
from thresher.train.calibrate import BATCH_ROWS, PIECE
from thresher.train.costs.layout import Layout
from thresher.train.costs.sizes import Sizes
from thresher.train.crew import Task
from thresher.train.dictionary.rules import facts
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import topology
from thresher.train.kernels.tiles import LIMIT_BYTES
from thresher.train.plan import RunPlan

Kind = Literal["cuda", "cpu"]

_ENTRY_BYTES = 60
_WAITING = 4  # batches: three in the queue, one in the making
_HEAP = 128  # kernels/firing.py: from there on TopK partitions a copy of the block


class Assumed(NamedTuple):
    """What a recipe does not say."""

    dead: float = 0.1
    """Share of latents that AuxK may find dead."""
    l0: float = 64.0
    """Active latents per token and layer of a rule whose penalty decides."""


class Memory(NamedTuple):
    """Of one processor, bytes."""

    weights: int
    gradients: int
    moments: int
    buffers: int
    low: int
    """bfloat16 copies of encoders."""
    block: int
    """Pre-activations of one source."""
    codes: int
    reconstructions: int
    auxk: int
    muon: int
    batch: int
    """Rows in training, and those that wait."""
    exchange: int
    end: int
    """What the end of training needs beyond weights, moments and buffers."""

    @property
    def kept(self) -> int:
        """Between two steps."""
        return self.weights + self.gradients + self.moments + self.buffers + self.low

    @property
    def step(self) -> int:
        """At the peak of a step."""
        passing = self.block + self.codes + self.reconstructions + self.auxk + self.muon + self.exchange
        return self.kept + passing + self.batch

    @property
    def ending(self) -> int:
        """While dictionaries are folded and checked."""
        return self.weights + self.moments + self.buffers + self.low + self.end

    @property
    def total(self) -> int:
        """At the peak."""
        return max(self.step, self.ending)


class Shape(NamedTuple):
    """What one rank of a layout has of a dictionary in a step."""

    rows: int
    """N of its part of the batch."""
    part: int
    """Rows whose activations are in memory at once."""
    latents: int
    """F of its share."""
    active: float
    """Active entries per row and source, of its share."""
    sources: int
    destinations: int
    written: int
    """Destinations of all sources, added up: L(L + 1)/2 of a CLT."""


def shape_of(plan: RunPlan, layout: Layout, assumed: Assumed) -> Shape:
    """The sizes that a step's costs follow from."""
    spec, kind = plan.spec, topology(plan.spec.kind)
    sources = len(kind.inputs_of(spec.reads))
    joint = kind.joint and sources == len(spec.writes)
    destinations = len(spec.writes)
    written = destinations * (destinations + 1) // 2 if joint and sources > 1 else sources * destinations
    rows = -(-plan.train.batch_rows // layout.data)
    active = min(assumed.l0 if spec.k is None else max(spec.k, 0.0), spec.n_latents)
    return Shape(
        rows,
        min(rows, plan.train.part_rows),
        -(-spec.n_latents // layout.latents),
        active / layout.latents,
        sources,
        destinations,
        written,
    )


def memory(
    plans: Sequence[RunPlan],
    sizes: Mapping[str, Sizes],
    sites: Mapping[str, Site],
    layout: Layout,
    kind: Kind,
    *,
    codec: Codec = "int8z",
    threads: int = 1,
    assumed: Assumed,
) -> Memory:
    """Of a processor that trains these plans, all of one stream; `sizes` by plan's name, `sites` by name.

    `threads`: of a CPU.
    """
    if not plans:
        return Memory(*[0] * len(Memory._fields))
    ranks = layout.latents
    every = [sizes[plan.name] for plan in plans]
    weights = sum(each.weights.of(ranks) for each in every)
    passing = [_passing(plan, sizes[plan.name], layout, kind, assumed) for plan in plans]
    busy = _side_by_side(plans, passing, kind, threads)
    batch = _batch(plans, sites, layout, kind, codec)
    exchange = max(_exchange(plan, layout, assumed) for plan in plans)
    fold = max((each.fold if kind == "cuda" else (each.fold + each.folded) // 2) // ranks for each in every)
    check = max(_calibration(plan, layout) for plan in plans)
    low = sum(each.low.of(ranks) for each in every) if kind == "cuda" else 0
    parts = {name: sum(one[name] for one in busy) for name in busy[0]}
    return Memory(
        weights,
        weights,
        sum(each.moments.of(ranks) for each in every),
        sum(each.buffers.of(ranks) for each in every),
        low,
        parts["block"],
        parts["codes"],
        parts["reconstructions"],
        parts["auxk"],
        parts["muon"],
        batch,
        exchange,
        weights + (max(fold, check) if kind == "cuda" else fold + max(check, parts["block"])),
    )


def _passing(plan: RunPlan, sizes: Sizes, layout: Layout, kind: Kind, assumed: Assumed) -> dict[str, int]:
    """What a step of one dictionary takes and gives back."""
    spec, shape = plan.spec, shape_of(plan, layout, assumed)
    widths = 4 * shape.destinations * spec.d_out
    copies = (4 if shape.destinations > 1 else 3) + max(0, len(spec.prefix_ends) - 1) * 2 + (spec.multi_topk > 0) * 3
    return {
        "block": _block(spec, shape, kind),
        "codes": int(_ENTRY_BYTES * shape.rows * shape.active * shape.sources),
        "reconstructions": copies * shape.part * widths,
        "auxk": _auxk(spec, shape, kind, assumed) if spec.aux > 0 else 0,
        "muon": 4 * sizes.sheet // layout.latents if plan.train.optimiser == "muon" else 0,
    }


def _block(spec: DictionarySpec, shape: Shape, kind: Kind) -> int:
    itemsize = 2 if kind == "cuda" else 4
    rows = min(shape.part, max(1, LIMIT_BYTES[kind] // (shape.latents * itemsize)))
    copied = kind == "cpu" and spec.firing == "topk" and _HEAP * shape.active > shape.latents
    return int(rows * shape.latents * itemsize * (2.25 if copied else 1))


def _calibration(plan: RunPlan, layout: Layout) -> int:
    """Blocks in float32 that a frozen threshold is found in, and the positive numbers of a piece of one."""
    if not facts(plan.spec.firing).calibrated:
        return 0
    block = BATCH_ROWS * -(-plan.spec.n_latents // layout.latents)
    return 4 * block + 3 * min(block, PIECE)


def _auxk(spec: DictionarySpec, shape: Shape, kind: Kind, assumed: Assumed) -> int:
    """Of one source at a time; of all at once where dead latents explain all layers."""
    together = shape.destinations if spec.aux_scope == "all" else 1
    width = together * spec.d_out if spec.aux_scope == "all" else spec.d_out
    dead = math.ceil(assumed.dead * shape.latents)
    itemsize = 2 if kind == "cuda" else 4
    rows = min(shape.part, max(1, LIMIT_BYTES[kind] // (max(dead, 1) * itemsize)))
    of_latents = dead * (width * (4 + itemsize) + spec.d_in * 4 + shape.destinations * spec.d_out * 4)
    return together * of_latents + 2 * rows * dead * itemsize + 2 * shape.part * width * 4


def _side_by_side(
    plans: Sequence[RunPlan], passing: Sequence[dict[str, int]], kind: Kind, threads: int
) -> list[dict[str, int]]:
    """Of the dictionaries that step at the same time, the largest."""
    order = sorted(range(len(plans)), key=lambda i: -sum(passing[i].values()))
    small = [i for i in order if Task(plans[i].spec, plans[i].train.part_rows, lambda: None).small]
    if kind == "cuda" or not small or (order[0] not in small):
        return [passing[order[0]]]
    return [passing[i] for i in small[: max(1, threads)]]


def _batch(plans: Sequence[RunPlan], sites: Mapping[str, Site], layout: Layout, kind: Kind, codec: Codec) -> int:
    """Rows of all sites that the plans use, in training and waiting."""
    rows = -(-plans[0].train.batch_rows // layout.data)
    used = dict.fromkeys(site for plan in plans for site in (*plan.spec.reads, *plan.spec.writes))
    width = sum(sites[name].width for name in used)
    views = {(site, plan.spec.normalise) for plan in plans for site in (*plan.spec.reads, *plan.spec.writes)}
    made = sum(sites[site].width for site, mode in views if mode != "none")
    stored = sum(_row_bytes(sites[name].width, codec) for name in used)
    side_by_side = sum(
        plan.spec.d_in
        for plan in plans
        if len(topology(plan.spec.kind).inputs_of(plan.spec.reads)) < len(plan.spec.reads)
    )
    waiting = _WAITING * (stored if kind == "cuda" else 4 * width)
    return rows * (4 * (width + made + side_by_side) + waiting)


def _row_bytes(width: int, codec: Codec) -> int:
    return width + 2 if codec == "int8z" else 2 * width


def _exchange(plan: RunPlan, layout: Layout, assumed: Assumed) -> int:
    """Room for what ranks of the latents send one another."""
    if layout.latents == 1:
        return 0
    shape = shape_of(plan, layout, assumed)
    entries = shape.part * shape.active * layout.latents * layout.latents
    return int(4 * shape.part * shape.destinations * plan.spec.d_out + 8 * entries)
