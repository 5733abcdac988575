"""Time of a training step: what is multiplied, what memory moves, what ranks exchange; a roofline, part by part.

One dense product per source (`matmul`), everything after it in O(active) (`memory`). With the symbols of memory.py, b
the bytes of a number in the encoder's precision (2 on a GPU, 4 on a CPU) and A = N K active entries of a source,

    matmul      2 N D F L FLOP, or its bytes b (N D + F D + N F) L where they take longer
    selection   one more pass over the block, b N F L
    gathers     4 A (3 W E + L D), W = Σ written destinations of all sources over L: decode, gradient of codes, of W_dec
    residuals   32 N S E: begun, subtracted, differentiated
    rows        N (stored + 12 D) for every site read or written
    update      32 P (write g; read g, w, m, v; write w, m, v), 2 more for a copy of W_enc; signum 32, muon 40 P
    AuxK        2 N n (3 E + D) FLOP for n dead latents

and skip connections, transforms of a MoLT and Muon's orthogonalisation as the products that they are. A ring passes
2 (R − 1) / R of what R ranks all-reduce: 4 P for `data`, 4 N S E for `latents`, which also gather 4 A (R − 1) L bytes
of candidates where latents compete by count.

Parts are added up, reading rows goes on beside them, and nothing else overlaps. What a GPU's launches and a CPU's
interpreter take is left out, so times are the least to be expected; caches that spare memory make them shorter.
Through the language model (objective kl or ce) its passes come on top and are not counted.
"""

from typing import Literal, NamedTuple

from thresher.cache.hardware import Hardware
from thresher.train.costs.layout import Layout
from thresher.train.costs.memory import Assumed, Shape, shape_of
from thresher.train.costs.sizes import Sizes
from thresher.train.dictionary.rules import facts
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import topology
from thresher.train.plan import RunPlan

Bound = Literal["matmul", "memory", "exchange", "reading"]

UPDATE_BYTES = {"adam": 32, "adamw": 32, "signum": 32, "muon": 40}
"""By parameter: gradient written and read, weight and state read and written."""
_NEWTON_SCHULZ = 5


class Traffic(NamedTuple):
    """What one rank sends in a step of one dictionary, bytes; it receives as many."""

    gradients: int
    """All-reduced among the ranks of `data`."""
    reconstructions: int
    """All-reduced among the ranks of `latents`."""
    candidates: int
    """Gathered there, for a choice by count over all latents."""

    @property
    def total(self) -> int:
        """Of all three."""
        return sum(self)


class Step(NamedTuple):
    """One dictionary's step on one rank, seconds."""

    matmul: float
    memory: float
    """Everything that moves bytes after the product, and lesser products."""
    exchange: float

    @property
    def total(self) -> float:
        """One after the other."""
        return sum(self)


def traffic(plan: RunPlan, sizes: Sizes, layout: Layout, assumed: Assumed) -> Traffic:
    """What a rank sends in one step."""
    shape, spec, ranks = shape_of(plan, layout, assumed), plan.spec, layout.latents
    competing = (
        4 * (ranks - 1) * shape.rows * shape.active * ranks * shape.sources if facts(spec.firing).by_count else 0
    )
    return Traffic(
        int(_ring(layout.data) * sizes.weights.of(ranks)),
        int(_ring(ranks) * 4 * shape.rows * shape.destinations * spec.d_out),
        int(competing),
    )


def _ring(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks


def step(plan: RunPlan, sizes: Sizes, layout: Layout, hardware: Hardware, assumed: Assumed) -> Step:
    """Seconds of one step of a dictionary on a rank of the layout."""
    spec, shape = plan.spec, shape_of(plan, layout, assumed)
    b = 2 if hardware.kind == "cuda" else 4
    rows, latents, sources = shape.rows, shape.latents, shape.sources
    flop = 2 * rows * spec.d_in * latents * sources
    moved = b * sources * (rows * spec.d_in + latents * spec.d_in + rows * latents)
    matmul = max(flop / hardware.product, moved / hardware.bandwidth)
    others = _other_flop(plan, sizes, shape, assumed)
    memory = others / hardware.product + _bytes(plan, sizes, shape, layout, hardware) / hardware.bandwidth
    sent = traffic(plan, sizes, layout, assumed)
    within = layout.data * layout.latents <= hardware.per_host
    inner = hardware.link if layout.latents <= hardware.per_host else hardware.network
    outer = hardware.link if within else hardware.network
    exchange = sent.gradients / outer + (sent.reconstructions + sent.candidates) / inner
    return Step(matmul, memory, exchange)


def _bytes(plan: RunPlan, sizes: Sizes, shape: Shape, layout: Layout, hardware: Hardware) -> float:
    """Moved after the product."""
    spec, rows = plan.spec, shape.rows
    low = hardware.kind == "cuda"
    block = (2 if low else 4) * rows * shape.latents * shape.sources
    gathers = 4 * rows * shape.active * (3 * shape.written * spec.d_out + shape.sources * spec.d_in)
    if not topology(spec.kind).by_rows:
        gathers = 0
    widths = shape.sources * spec.d_in + shape.destinations * spec.d_out
    parameters = sizes.weights.of(layout.latents) / 4
    update = UPDATE_BYTES[plan.train.optimiser] * parameters + (2 * sizes.low.of(layout.latents) if low else 0)
    return block + gathers + 32 * rows * shape.destinations * spec.d_out + 13 * rows * widths + update


def _other_flop(plan: RunPlan, sizes: Sizes, shape: Shape, assumed: Assumed) -> float:
    """Of products beside the encoders'."""
    spec, rows = plan.spec, shape.rows
    flop = 0.0
    if spec.aux > 0:
        dead = assumed.dead * shape.latents
        flop += 2 * rows * dead * (3 * spec.d_out + spec.d_in) * shape.sources
    if spec.skip:
        flop += 4 * rows * spec.d_in * spec.d_out * shape.destinations
    if not topology(spec.kind).by_rows:
        flop += 6 * rows * spec.row_work
    if plan.train.optimiser == "muon":
        flop += _orthogonalising(spec, shape)
    return flop


def _orthogonalising(spec: DictionarySpec, shape: Shape) -> float:
    """X Xᵀ, its square and its product with X, five times for every matrix [F, width]."""

    def of(width: int) -> float:
        short, long = sorted((width, shape.latents))
        return _NEWTON_SCHULZ * (4 * short * short * long + 2 * short**3)

    return shape.sources * of(spec.d_in) + shape.written * of(spec.d_out)
