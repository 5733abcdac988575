"""One shard on its way from the model to the disk.

The caller runs the model on the contexts of the shard, in order and in batches of any size, and hands the activations
to `add`. Rows to be stored collect in a block of fixed size, kept rows and special rows apart; a full block is
encoded where it lies, measured, copied to the host and scattered to the permuted places of its rows. Blocks are cut
from the row stream, never from the caller's batches, so the bytes and the statistics of a shard do not depend on how
it was fed.

The first shard of a cache with codec int8z has no calibration yet: its blocks wait in memory until all are there,
yield μ and σ, and are encoded then.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from thresher.cache import stats
from thresher.cache.codec import (
    LEVELS,
    Calibration,
    EncodedBlock,
    calibrate,
    encode_bf16,
    encode_int8z,
)
from thresher.cache.commit import Quality
from thresher.cache.contracts import Site, UserError
from thresher.cache.layout import KEPT, SPECIAL, Contexts, raw_dtype
from thresher.cache.order import ShardSource, shard_order
from thresher.cache.plan import Plan
from thresher.cache.stats import Moments

_BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}  # a block fits a CPU's L2 cache; a GPU wants fewer launches


class ShardData(NamedTuple):
    """A finished shard, ready to be published."""

    arrays: dict[str, np.ndarray]
    """Stored rows by array name, bf16 as bit patterns."""
    moments: np.ndarray
    """[2, P] float64."""
    quality: dict[str, Quality]


class Owner(Protocol):
    """What a shard asks of the writer it belongs to."""

    plan: Plan
    fvu_gate: float

    def calibration(self, site: str) -> Calibration | None: ...

    def calibrated(self, by_site: Mapping[str, Calibration]) -> None: ...

    def publish_shard(self, split: str, index: int, data: ShardData) -> None: ...


class _Lane:
    """Rows of one class (kept or special) of a shard, per site: the block being filled and the sums so far."""

    def __init__(self, rows: np.ndarray, sites: tuple[Site, ...]) -> None:
        self.rows = rows  # indices into the shard's stream rows
        self.done = 0  # how many of them left in blocks
        self.fill = 0
        self.stage: dict[str, Tensor] = {}
        self.shift: dict[str, Tensor] = {}
        self.moments = {s.name: stats.empty(s.width) for s in sites}
        self.error_D = {s.name: np.zeros(s.width) for s in sites}
        self.peak = {s.name: 0.0 for s in sites}


class ShardWriter:
    """Collects the rows of one shard. Obtained from `CacheWriter.shard`."""

    def __init__(self, owner: Owner, split: str, index: int, source: ShardSource, packed: Contexts) -> None:
        self.contexts = source.contexts
        """[K] context ids that this shard needs, in the order in which `add` expects them."""
        self.split, self.index = split, index
        self._owner, self._plan, self._source, self._packed = owner, owner.plan, source, packed
        rows = len(source.context)
        self._stored_at = np.empty(rows, np.int64)
        self._stored_at[shard_order(rows, owner.plan.seed, split, index)] = np.arange(rows)
        keep = packed.keep[source.contexts[source.context], source.position]
        self._lanes = {c: _Lane(np.flatnonzero(keep == c), owner.plan.sites) for c in (KEPT, SPECIAL)}
        self._buffers = {
            name: np.empty((rows, *spec.shape[1:]), raw_dtype(spec.dtype))
            for name, spec in owner.plan.site_arrays(split).items()
        }
        self._calibration: dict[str, Calibration] = {}
        self._waiting: list[tuple[int, int, dict[str, Tensor]]] | None = None
        self._cursor = 0
        self._device: torch.device | None = None

    @torch.inference_mode()
    def add(self, acts: Mapping[str, Tensor]) -> None:
        """Take the activations [b, T, width] of the next b contexts, by site name, on any device.

        Raises UserError for an activation that is not finite, naming site, context and position.
        """
        batch = self._checked(acts)
        first, last = np.searchsorted(self._source.context, [self._cursor, self._cursor + batch])
        tokens = self._packed.keep.shape[1]
        for code, lane in self._lanes.items():
            begin, end = np.searchsorted(lane.rows, [first, last])
            rows = lane.rows[begin:end]
            flat = (self._source.context[rows] - self._cursor) * tokens + self._source.position[rows]
            self._feed(code, lane, flat, acts)
        self._cursor += batch

    @torch.inference_mode()
    def commit(self) -> None:
        """Close the shard: all its contexts were added. Publishing goes on in the background."""
        assert self._cursor == len(self.contexts), f"{self._cursor} of {len(self.contexts)} contexts were added"
        for code, lane in self._lanes.items():
            if lane.fill:
                self._flush(code, lane)
        if self._waiting is not None:
            self._calibrate()
        data = self._finished()
        self._check_gate(data.quality)
        self._owner.publish_shard(self.split, self.index, data)
        self.abandon()

    def abandon(self) -> None:
        """Forget the shard; nothing of it was written."""
        self._buffers, self._lanes, self._waiting = {}, {}, None

    def _checked(self, acts: Mapping[str, Tensor]) -> int:
        """Number of contexts in `acts`; on the first call also learn the device and load the calibration."""
        names = [site.name for site in self._plan.sites]
        x = acts[names[0]]
        batch, tokens = x.shape[0], self._packed.keep.shape[1]
        for site in self._plan.sites:
            got = tuple(acts[site.name].shape)
            assert got == (batch, tokens, site.width), f"{site.name}: {got}, expected {(batch, tokens, site.width)}"
        assert self._cursor + batch <= len(self.contexts), "more contexts than the shard has"
        if self._device is None:
            self._device = x.device
            if self._plan.codec == "int8z":
                known = {name: self._owner.calibration(name) for name in names}
                self._calibration = {name: c.to(x.device) for name, c in known.items() if c is not None}
                if not self._calibration:
                    self._waiting = []
        return batch

    def _block_rows(self) -> int:
        assert self._device is not None
        widest = max(site.width for site in self._plan.sites)
        rows = _BLOCK_ELEMENTS.get(self._device.type, 1 << 17) // widest
        return max(64, 1 << (max(rows, 1).bit_length() - 1))

    def _feed(self, code: int, lane: _Lane, flat: np.ndarray, acts: Mapping[str, Tensor]) -> None:
        """Copy the picked rows of the batch into the lane's block, and send every full block on."""
        if not len(flat):
            return
        picked, capacity, at = torch.from_numpy(flat).to(self._device), self._block_rows(), 0
        while at < len(flat):
            count = min(capacity - lane.fill, len(flat) - at)
            for site in self._plan.sites:
                x_ND = acts[site.name].reshape(-1, site.width)
                if site.name not in lane.stage:
                    lane.stage[site.name] = x_ND.new_empty(min(capacity, len(lane.rows)), site.width)
                target = lane.stage[site.name][lane.fill : lane.fill + count]
                torch.index_select(x_ND, 0, picked[at : at + count], out=target)
            lane.fill += count
            at += count
            if lane.fill == capacity:
                self._flush(code, lane)

    def _flush(self, code: int, lane: _Lane) -> None:
        """Encode the lane's block, or let it wait for the calibration."""
        start, count = lane.done, lane.fill
        lane.done, lane.fill = start + count, 0
        block = {name: stage[:count] for name, stage in lane.stage.items()}
        if self._waiting is None:
            self._encode(code, start, block)
        else:
            self._waiting.append((code, start, {name: x_ND.to("cpu", copy=True) for name, x_ND in block.items()}))

    def _calibrate(self) -> None:
        """μ and σ from the kept rows that waited, then encode all that waited."""
        assert self._waiting is not None
        assert self._device is not None
        made = {}
        for site in self._plan.sites:
            kept = [(start, block[site.name]) for code, start, block in self._waiting if code == KEPT]
            for start, x_ND in kept:
                self._check_finite(KEPT, start, site.name, torch.linalg.vector_norm(x_ND.float(), dim=1).numpy())
            moments = stats.merged((stats.of_rows(x_ND.float().numpy()) for _, x_ND in kept), site.width)
            if not moments.rows:
                raise UserError(
                    "the first shard of train holds no kept row, so int8z cannot be calibrated. Expected ordinary "
                    'tokens in the training split; check the keep-mask, or harvest with codec = "bf16".'
                )
            made[site.name] = calibrate(moments.mean, moments.m2 / moments.rows)
        self._owner.calibrated(made)
        self._calibration = {name: c.to(self._device) for name, c in made.items()}
        waiting, self._waiting = self._waiting, None
        for code, start, block in waiting:
            self._encode(code, start, {name: x_ND.to(self._device) for name, x_ND in block.items()})

    def _encode(self, code: int, start: int, block: Mapping[str, Tensor]) -> None:
        """Encode and measure a block of the lane that begins at its row `start`, then store it in the buffers."""
        lane = self._lanes[code]
        for site in self._plan.sites:
            staged = block[site.name]
            moments = None
            if code == SPECIAL:  # massive rows would cancel in float32 sums, and there are few of them
                moments = stats.of_rows(staged.to(torch.float32).cpu().numpy())
            x_ND = staged if staged.dtype == torch.float32 else staged.to(torch.float32)
            if self._plan.codec == "int8z":
                calibration = self._calibration[site.name]
                encoded = encode_int8z(x_ND, calibration)
                shift_D, scale_D = calibration
            else:
                if site.name not in lane.shift:
                    lane.shift[site.name] = x_ND.mean(dim=0)
                shift_D = lane.shift[site.name]
                encoded, scale_D = encode_bf16(x_ND, shift_D), torch.ones_like(shift_D)
            self._land(code, start, site, encoded, shift_D, scale_D, moments)

    def _land(
        self,
        code: int,
        start: int,
        site: Site,
        encoded: EncodedBlock,
        shift_D: Tensor,
        scale_D: Tensor,
        moments: Moments | None,
    ) -> None:
        """Bring a block to the host: check it, add its sums, scatter its rows to their stored places."""
        lane, name = self._lanes[code], site.name
        norm_N, sums_3D = encoded.norm.cpu().numpy(), encoded.sums.cpu().numpy()
        self._check_finite(code, start, name, norm_N)
        at = self._stored_at[lane.rows[start : start + len(norm_N)]]
        codes = encoded.codes if encoded.scale is not None else encoded.codes.view(torch.int16)
        self._buffers[name].view(np.int8 if encoded.scale is not None else np.int16)[at] = codes.cpu().numpy()
        if encoded.scale is not None:
            row_scale_N = encoded.scale.cpu().numpy()
            self._check_finite(code, start, name, row_scale_N)
            self._buffers[f"{name}.scale"][at] = row_scale_N
            lane.peak[name] = max(lane.peak[name], float(row_scale_N.max()) * LEVELS)
        shift, scale = shift_D.cpu().numpy().astype(np.float64), scale_D.cpu().numpy().astype(np.float64)
        part = moments or stats.of_block(sums_3D[:2], norm_N, shift, scale)
        lane.moments[name] = lane.moments[name].merge(part)
        lane.error_D[name] += sums_3D[2].astype(np.float64) * np.square(scale)

    def _check_finite(self, code: int, start: int, site: str, values_N: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(values_N))
        if not len(bad):
            return
        row = self._lanes[code].rows[start + bad[0]]
        context, position = self._source.contexts[self._source.context[row]], self._source.position[row]
        token = self._packed.token_id[context, position]
        raise UserError(
            f"site {site!r} has an activation that cannot be stored in context {context} of {self.split!r}, position "
            f"{position} (token {token}): expected finite values, got NaN, infinity or a number too large for the "
            f'codec. The model overflows on this text; choose a wider dtype (target.dtype = "float32"), or leave '
            f"the site out."
        )

    def _finished(self) -> ShardData:
        sites, lanes = self._plan.sites, self._lanes
        packed = np.stack([stats.pack(sites, lanes[code].moments) for code in (KEPT, SPECIAL)])
        quality = {}
        for site in sites:
            kept, special = lanes[KEPT], lanes[SPECIAL]
            fvu, worst = _unexplained(kept.error_D[site.name], kept.moments[site.name].m2)
            rest, _ = _unexplained(special.error_D[site.name], special.moments[site.name].m2)
            peak = max(kept.peak[site.name], special.peak[site.name])
            quality[site.name] = Quality(fvu, worst, peak, rest)
        return ShardData(self._buffers | self._provenance(), packed, quality)

    def _provenance(self) -> dict[str, np.ndarray]:
        """Token, document, source and class of every stored row."""
        order = np.argsort(self._stored_at)
        context, position = self._source.contexts[self._source.context[order]], self._source.position[order]
        return {
            "token_id": self._packed.token_id[context, position].astype(np.int32),
            "document_id": self._packed.document_id[context, position].astype(np.int32),
            "source": np.stack([context, position], axis=1).astype(np.int32),
            "keep": self._packed.keep[context, position].astype(np.uint8),
        }

    def _check_gate(self, quality: Mapping[str, Quality]) -> None:
        """Raise UserError when a site was stored worse than the gate allows."""
        name, q = max(quality.items(), key=lambda item: max(item[1].fvu, item[1].worst))
        if max(q.fvu, q.worst) <= self._owner.fvu_gate:
            return
        other = "bf16" if self._plan.codec == "int8z" else "int8z"
        raise UserError(
            f"site {name!r} loses too much in codec {self._plan.codec!r}: in shard {self.index} of {self.split!r} the "
            f"stored rows leave {q.fvu:.2e} of the variance unexplained ({q.worst:.2e} in the worst dimension), "
            f'expected at most harvest.fvu_gate = {self._owner.fvu_gate:.0e}. Harvest with codec = "{other}", or '
            f"raise the gate if that error is acceptable. The shards committed before stay valid."
        )


def _unexplained(error_D: np.ndarray, m2_D: np.ndarray) -> tuple[float, float]:
    """Squared error over squared deviation: in all, and of the worst dimension (floor: a millionth of the median)."""
    tiny = np.finfo(np.float64).tiny
    floor_D = np.maximum(m2_D, max(1e-6 * float(np.median(m2_D)), tiny))
    return float(error_D.sum() / max(m2_D.sum(), tiny)), float((error_D / floor_D).max())
