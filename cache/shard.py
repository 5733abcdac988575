"""One shard on its way from the model to the disk.

The caller runs the model on the contexts of the shard, in order and in batches of any size, and hands the activations
to `add`. Rows to be stored are encoded, measured and written to their permuted places in the shard's buffers, on the
device where they are (cache/lane.py). The bytes and the statistics of a shard do not depend on how it was fed.

The first shard of a cache with codec int8z has no calibration yet. Its first kept rows, a uniform sample because
contexts are drawn in the order of a keyed hash, wait in host memory, yield μ and σ, and are encoded then.
"""

import mmap
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from thresher.cache import stats
from thresher.cache.blocks import BlockEncoder
from thresher.cache.buffers import Buffers
from thresher.cache.codec import Calibration, calibrate
from thresher.cache.errors import UserError
from thresher.cache.host import HostEncoder, host_rows
from thresher.cache.kernels.encode import measure
from thresher.cache.lane import Encoder, Lane, Shelf
from thresher.cache.layout import KEPT, SPECIAL, Contexts, raw_dtype
from thresher.cache.order import ShardSource, shard_order
from thresher.cache.plan import Plan
from thresher.cache.quality import Quality, check_gate, quality

CALIBRATION_ROWS = 65_536
"""Kept rows that μ and σ are taken from, or all of the first shard: they bound what waits in memory, and give σ to
.3 %."""

ENCODERS: dict[str, Callable[[Shelf], Encoder]] = {"cpu": HostEncoder}
"""By type of device; any other encodes in blocks."""


class ShardData(NamedTuple):
    """A finished shard, ready to be published."""

    arrays: dict[str, np.ndarray]
    """Stored rows by array name, bf16 as bit patterns. Arrays of sites belong to the owner's `buffers`."""
    moments: np.ndarray
    """[2, P] float64."""
    quality: dict[str, Quality]


class Owner(Protocol):
    """What a shard asks of the writer it belongs to."""

    plan: Plan
    fvu_gate: float
    buffers: Buffers

    def calibration(self, site: str) -> Calibration | None: ...

    def calibrated(self, by_site: Mapping[str, Calibration]) -> None: ...

    def publish_shard(self, split: str, index: int, finish: Callable[[], ShardData]) -> None: ...


class ShardWriter:
    """Collects the rows of one shard. Obtained from `CacheWriter.shard`."""

    def __init__(self, owner: Owner, split: str, index: int, source: ShardSource, packed: Contexts) -> None:
        self.contexts = source.contexts
        """[K] context ids that this shard needs, in the order in which `add` expects them."""
        self.split, self.index = split, index
        self._owner, self._plan, self._source, self._packed = owner, owner.plan, source, packed
        rows = len(source.context)
        self._order = shard_order(rows, owner.plan.seed, split, index)
        stored_at = np.empty(rows, np.int64)
        stored_at[self._order] = np.arange(rows)
        keep = packed.keep[source.contexts[source.context], source.position]
        taken = {code: np.flatnonzero(keep == code) for code in (KEPT, SPECIAL)}
        self._lanes = {code: Lane(at, stored_at[at], owner.plan.sites) for code, at in taken.items()}
        self._buffers = {
            name: owner.buffers.take((rows, *spec.shape[1:]), raw_dtype(spec.dtype))
            for name, spec in owner.plan.site_arrays(split).items()
        }
        self._cursor = 0
        self._encoder: Encoder | None = None
        self._device = torch.device("cpu")
        self._waiting: deque[tuple[Lane, dict[str, Tensor]]] = deque()

    @torch.inference_mode()
    def add(self, acts: Mapping[str, Tensor]) -> None:
        """Take the activations [b, T, width] of the next b contexts, by site name, on any device.

        Raises UserError for an activation that is not finite, naming site, context and position; on a GPU some blocks
        later.
        """
        batch = self._checked(acts)
        rows = {site.name: acts[site.name].reshape(-1, site.width) for site in self._plan.sites}
        for lane, picked in self._picked(batch):
            if self._encoder is not None:
                self._encoder.add(lane, rows, picked)
            else:
                self._wait(lane, rows, picked)
        self._cursor += batch

    @torch.inference_mode()
    def commit(self) -> None:
        """Close the shard: all its contexts were added. Checks, publishing and the record follow in the background."""
        assert self._cursor == len(self.contexts), f"{self._cursor} of {len(self.contexts)} contexts were added"
        if self._encoder is None:
            self._calibrate()
        assert self._encoder is not None
        self._encoder.flush()
        self._owner.publish_shard(self.split, self.index, self._finish)

    def abandon(self) -> None:
        """Forget the shard; nothing of it was written."""
        if self._encoder is not None:
            self._encoder.close()
        self._buffers, self._lanes, self._waiting = {}, {}, deque()

    def _checked(self, acts: Mapping[str, Tensor]) -> int:
        """Number of contexts in `acts`; the first call also learns the device and finds out about the calibration."""
        sites = self._plan.sites
        x = acts[sites[0].name]
        batch, tokens = x.shape[0], self._packed.keep.shape[1]
        for site in sites:
            got = tuple(acts[site.name].shape)
            assert got == (batch, tokens, site.width), f"{site.name}: {got}, expected {(batch, tokens, site.width)}"
        assert self._cursor + batch <= len(self.contexts), "more contexts than the shard has"
        if self._cursor == 0:
            self._device = x.device
            known = {site.name: self._owner.calibration(site.name) for site in sites}
            calibrations = {name: c for name, c in known.items() if c is not None}
            if calibrations or self._plan.codec != "int8z":
                self._begin(calibrations)
        return batch

    def _begin(self, calibrations: Mapping[str, Calibration]) -> None:
        shelf = Shelf(self._plan.sites, self._buffers, calibrations, self._device, self._refuse)
        self._encoder = ENCODERS.get(self._device.type, BlockEncoder)(shelf)

    def _picked(self, batch: int) -> list[tuple[Lane, np.ndarray]]:
        """The rows [K] of the next `batch` contexts that each lane takes."""
        first, last = np.searchsorted(self._source.context, [self._cursor, self._cursor + batch])
        tokens = self._packed.keep.shape[1]
        out = []
        for lane in self._lanes.values():
            begin, end = np.searchsorted(lane.rows, [first, last])
            rows = lane.rows[begin:end]
            if len(rows):
                out.append((lane, (self._source.context[rows] - self._cursor) * tokens + self._source.position[rows]))
        return out

    def _wait(self, lane: Lane, acts: Mapping[str, Tensor], picked: np.ndarray) -> None:
        """Keep rows on the host until there are enough to calibrate with."""
        index = torch.from_numpy(picked).to(self._device)
        self._waiting.append((lane, {name: _copied(x_RD, index) for name, x_RD in acts.items()}))
        if lane is self._lanes[KEPT]:
            lane.done += len(picked)
            if lane.done >= CALIBRATION_ROWS:
                self._calibrate()

    def _calibrate(self) -> None:
        """μ and σ from the first kept rows that waited, then encode all that waited."""
        kept = self._lanes[KEPT]
        if not kept.done:
            raise UserError(
                "the first shard of train holds no kept row, so int8z cannot be calibrated. Expected ordinary tokens "
                'in the training split; check the keep-mask, or harvest with codec = "bf16".'
            )
        made = {}
        for site in self._plan.sites:
            sums = stats.Sums(site.width)
            for rows_ND in (rows[site.name] for lane, rows in self._waiting if lane is kept):
                sample_ND = host_rows(rows_ND[: CALIBRATION_ROWS - sums.rows])
                bad = measure(sample_ND, sums.values, sums.norms)
                if bad >= 0:
                    self._refuse(site.name, kept, sums.rows + bad)
                sums.rows += len(sample_ND)
            moments = sums.moments()
            made[site.name] = calibrate(moments.mean, moments.m2 / moments.rows)
        self._owner.calibrated(made)
        self._begin(made)
        assert self._encoder is not None
        kept.done = 0
        while self._waiting:
            lane, rows = self._waiting.popleft()
            moved = {name: x_ND.to(self._device) for name, x_ND in rows.items()}
            self._encoder.add(lane, moved, np.arange(len(next(iter(rows.values())))))

    def _refuse(self, site: str, lane: Lane, index: int) -> NoReturn:
        """Raise UserError for a row of a lane that cannot be stored."""
        row = lane.rows[index]
        context, position = self._source.contexts[self._source.context[row]], self._source.position[row]
        token = self._packed.token_id[context, position]
        raise UserError(
            f"site {site!r} has an activation that cannot be stored in context {context} of {self.split!r}, "
            f"position {position} (token {token}): expected finite values, got NaN, infinity or a number too large for "
            f'the codec. The model overflows on this text; choose a wider dtype (target.dtype = "float32"), or leave '
            f"the site out."
        )

    def _finish(self) -> ShardData:
        """The finished shard, in the background thread. Raises UserError when a site misses the gate."""
        assert self._encoder is not None
        self._encoder.finish()
        kept, special = (self._lanes[code].sums for code in (KEPT, SPECIAL))
        packed = [
            stats.pack(self._plan.sites, {name: sums.moments() for name, sums in lane.items()})
            for lane in (kept, special)
        ]
        measured = {
            site.name: quality(kept[site.name], special[site.name], self._unit(site.name)) for site in self._plan.sites
        }
        check_gate(self._plan.codec, f"shard {self.index} of {self.split!r}", measured, self._owner.fvu_gate)
        arrays, self._buffers = self._buffers | self._provenance(), {}
        return ShardData(arrays, np.stack(packed), measured)

    def _unit(self, site: str) -> np.ndarray | float:
        """What the errors of a site were measured in."""
        calibration = self._owner.calibration(site)
        return 1.0 if calibration is None else calibration.std.numpy().astype(np.float64)

    def _provenance(self) -> dict[str, np.ndarray]:
        """Token, document, source and class of every stored row, where the plan stores them."""
        if "source" not in self._plan.sharded_arrays(self.split):
            return {}
        at = self._source.context[self._order]
        context, position = self._source.contexts[at], self._source.position[self._order]
        return {
            "token_id": self._packed.token_id[context, position].astype(np.int32),
            "document_id": self._packed.document_id[context, position].astype(np.int32),
            "source": np.stack([context, position], axis=1).astype(np.int32),
            "keep": self._packed.keep[context, position].astype(np.uint8),
        }


def _copied(x_RD: Tensor, index: Tensor) -> Tensor:
    """Some rows on the host, in memory of their own that goes back to the kernel with them: a heap would keep it."""
    shape = (len(index), x_RD.shape[1])
    memory = mmap.mmap(-1, shape[0] * shape[1] * x_RD.itemsize)
    out = torch.frombuffer(memory, dtype=x_RD.dtype, count=shape[0] * shape[1]).view(shape)
    if x_RD.device.type == "cpu":
        return torch.index_select(x_RD, 0, index, out=out)
    return out.copy_(x_RD.index_select(0, index))
