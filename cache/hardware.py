"""What a processor sustains, as values: from data sheets, or as given.

Data sheets name peaks. What remains of them was measured on an H200 alone: a large bfloat16 product runs at 0.8 of its
peak, a copy at 0.9 of the memory's rate, an all-reduce on one host at 0.89 of the link's. Those shares are taken for
every card here.
"""

from typing import Literal, NamedTuple

from thresher.cache.errors import UserError
from thresher.cache.records import nearest

PRODUCT_SHARE, MEMORY_SHARE, LINK_SHARE = 0.8, 0.9, 0.89


class Hardware(NamedTuple):
    """One processor of several alike, and what lies between them. Rates are sustained ones."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory: int
    """Bytes."""
    low: float
    """FLOP a second of a dense product in bfloat16, sums in float32."""
    full: float
    """The same in float32."""
    bandwidth: float
    """Bytes a second between processor and memory, read and written together."""
    link: float
    """Bytes a second that one processor sends to another of its host, while it receives as many."""
    network: float
    """The same between hosts."""
    per_host: int = 8
    """Processors of a host."""

    @property
    def product(self) -> float:
        """FLOP a second of an encoder's product, in the precision it has on such a processor."""
        return self.low if self.kind == "cuda" else self.full


class _Sheet(NamedTuple):
    """A data sheet: GB, TFLOP/s in bfloat16 (dense) and float32, GB/s of memory, GB/s of the link one way."""

    memory: float
    low: float
    full: float
    bandwidth: float
    link: float


_SHEETS = {
    "B200": _Sheet(180, 2250, 75, 7700, 900),
    "H200": _Sheet(141, 989, 67, 4800, 450),
    "H100": _Sheet(80, 989, 67, 3350, 450),
    "A100": _Sheet(80, 312, 19.5, 2039, 300),
    "A100-40GB": _Sheet(40, 312, 19.5, 1555, 300),
    "L40S": _Sheet(48, 362, 91.6, 864, 32),
    "A10": _Sheet(24, 125, 31.2, 600, 32),
    "RTX4090": _Sheet(24, 165, 82.6, 1008, 32),
}
_NETWORK_GB = 50.0  # 400 Gbit/s a GPU


def gpu(name: str) -> Hardware:
    """A GPU by its name, in whatever letters. Raises UserError for one that is not known."""
    known = {each.upper(): each for each in _SHEETS}
    found = known.get(name.upper())
    if found is None:
        raise UserError(
            f"--gpu is {name!r}, of which nothing is known here.{nearest(name.upper(), known)} Known: "
            f"{', '.join(_SHEETS)}. Of another, give --tflops, --bandwidth and --memory-gb beside the name of one that "
            "is like it, or --measure on the machine itself."
        )
    sheet = _SHEETS[found]
    return Hardware(
        found,
        "cuda",
        int(sheet.memory * 1e9),
        sheet.low * 1e12 * PRODUCT_SHARE,
        sheet.full * 1e12 * PRODUCT_SHARE,
        sheet.bandwidth * 1e9 * MEMORY_SHARE,
        sheet.link * 1e9 * LINK_SHARE,
        _NETWORK_GB * 1e9 * LINK_SHARE,
    )
