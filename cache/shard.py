"""One shard on its way from the model to the disk.

The caller runs the model on the contexts of the shard, in order and in batches of any size, and hands the activations
to `add`. Rows to be stored collect in a block of fixed size, kept rows and special rows apart; a full block is
encoded where it lies, measured, copied to the host and scattered to the permuted places of its rows. Blocks are cut
from the row stream, never from the caller's batches, so the bytes and the statistics of a shard do not depend on how
it was fed. Blocks of a GPU reach the host in a thread of their own while the next forward pass runs.

The first shard of a cache with codec int8z has no calibration yet: its blocks wait in memory until all are there,
yield μ and σ, and are encoded then.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from thresher.cache import stats
from thresher.cache.codec import Calibration, block_sums, calibrate, encode_bf16, encode_int8z, one_thread
from thresher.cache.contracts import Site, UserError
from thresher.cache.lane import EncodedBlock, Lane
from thresher.cache.layout import KEPT, SPECIAL, Contexts, raw_dtype
from thresher.cache.order import ShardSource, shard_order
from thresher.cache.plan import Plan
from thresher.cache.quality import Quality, check_gate, quality

_BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}  # a block fits a CPU's L2 cache; a GPU wants fewer launches
_IN_FLIGHT = 4  # blocks of a GPU on their way to the host


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

    def publish_shard(self, split: str, index: int, finish: Callable[[], ShardData]) -> None: ...


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
        self._lanes = {c: Lane(np.flatnonzero(keep == c)) for c in (KEPT, SPECIAL)}
        self._by_width: dict[int, list[Site]] = {}
        for site in owner.plan.sites:
            self._by_width.setdefault(site.width, []).append(site)
        self._buffers = {
            name: np.empty((rows, *spec.shape[1:]), raw_dtype(spec.dtype))
            for name, spec in owner.plan.site_arrays(split).items()
        }
        self._calibration: dict[str, Calibration] = {}
        self._waiting: list[tuple[int, int, dict[str, Tensor]]] | None = None
        self._cursor = 0
        self._device: torch.device | None = None
        self._lander: ThreadPoolExecutor | None = None
        self._landings: deque[Future[None]] = deque()

    @torch.inference_mode()
    def add(self, acts: Mapping[str, Tensor]) -> None:
        """Take the activations [b, T, width] of the next b contexts, by site name, on any device.

        Raises UserError for an activation that is not finite, naming site, context and position; on a GPU some blocks
        later.
        """
        batch = self._checked(acts)
        with one_thread():
            self._take(acts, batch)
        self._cursor += batch

    @torch.inference_mode()
    def commit(self) -> None:
        """Close the shard: all its contexts were added. Checks, publishing and the record follow in the background."""
        assert self._cursor == len(self.contexts), f"{self._cursor} of {len(self.contexts)} contexts were added"
        with one_thread():
            for code, lane in self._lanes.items():
                if lane.fill:
                    self._flush(code, lane)
            if self._waiting is not None:
                self._calibrate()
        self._owner.publish_shard(self.split, self.index, self._finish)

    def abandon(self) -> None:
        """Forget the shard; nothing of it was written."""
        if self._lander is not None:
            self._lander.shutdown(wait=True, cancel_futures=True)
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

    def _take(self, acts: Mapping[str, Tensor], batch: int) -> None:
        """Feed the rows of a batch that the shard stores to their lanes."""
        first, last = np.searchsorted(self._source.context, [self._cursor, self._cursor + batch])
        tokens = self._packed.keep.shape[1]
        for code, lane in self._lanes.items():
            begin, end = np.searchsorted(lane.rows, [first, last])
            rows = lane.rows[begin:end]
            flat = (self._source.context[rows] - self._cursor) * tokens + self._source.position[rows]
            self._feed(code, lane, flat, acts)

    def _block_rows(self) -> int:
        assert self._device is not None
        rows = _BLOCK_ELEMENTS.get(self._device.type, 1 << 17) // max(self._by_width)
        return max(64, 1 << (max(rows, 1).bit_length() - 1))

    def _feed(self, code: int, lane: Lane, flat: np.ndarray, acts: Mapping[str, Tensor]) -> None:
        """Copy the picked rows of the batch into the lane's block, and send every full block on."""
        if not len(flat):
            return
        picked, capacity, at = torch.from_numpy(flat).to(self._device), self._block_rows(), 0
        rows = {site.name: acts[site.name].reshape(-1, site.width) for site in self._plan.sites}
        if not lane.stage:
            size = min(capacity, len(lane.rows))
            lane.stage = {name: x_ND.new_empty(size, x_ND.shape[1]) for name, x_ND in rows.items()}
        while at < len(flat):
            count = min(capacity - lane.fill, len(flat) - at)
            for name, x_ND in rows.items():
                target = lane.stage[name][lane.fill : lane.fill + count]
                torch.index_select(x_ND, 0, picked[at : at + count], out=target)
            lane.fill += count
            at += count
            if lane.fill == capacity:
                self._flush(code, lane)

    def _flush(self, code: int, lane: Lane) -> None:
        """Encode the lane's block, or let it wait for the calibration."""
        start, count = lane.done, lane.fill
        lane.done, lane.fill = start + count, 0
        block = {name: stage[:count] for name, stage in lane.stage.items()}
        if self._waiting is None:
            self._encode(code, start, block)
            return
        for name, x_ND in block.items():
            norm_N = torch.linalg.vector_norm(x_ND, dim=1, dtype=torch.float32)
            self._check_finite(code, start, [name], norm_N.cpu().numpy()[None])
        self._waiting.append((code, start, {name: x_ND.to("cpu", copy=True) for name, x_ND in block.items()}))

    def _calibrate(self) -> None:
        """μ and σ from the kept rows that waited, then encode all that waited."""
        assert self._waiting is not None
        assert self._device is not None
        made = {}
        for site in self._plan.sites:
            kept = [block[site.name].to(torch.float32) for code, _, block in self._waiting if code == KEPT]
            if not kept:
                raise UserError(
                    "the first shard of train holds no kept row, so int8z cannot be calibrated. Expected ordinary "
                    'tokens in the training split; check the keep-mask, or harvest with codec = "bf16".'
                )
            shift_D = kept[0].mean(dim=0)
            moments = stats.merged(_centred(x_ND.clone(), shift_D) for x_ND in kept)
            made[site.name] = calibrate(moments.mean, moments.m2 / moments.rows)
        self._owner.calibrated(made)
        self._calibration = {name: c.to(self._device) for name, c in made.items()}
        waiting, self._waiting = self._waiting, None
        for code, start, block in waiting:
            self._encode(code, start, {name: x_ND.to(self._device) for name, x_ND in block.items()})

    def _encode(self, code: int, start: int, block: Mapping[str, Tensor]) -> None:
        """Encode and measure a block of the lane that begins at its row `start`, then bring it to the host."""
        for width, sites in self._by_width.items():
            moments = None
            if code == SPECIAL:  # massive rows would cancel in float32 sums, and there are few of them
                moments = stats.stacked([stats.of_rows(block[s.name].to("cpu", torch.float32).numpy()) for s in sites])
            rows = [block[s.name].to(torch.float32) for s in sites]
            if self._plan.codec == "int8z":
                encoded = [encode_int8z(x_ND, self._calibration[s.name]) for x_ND, s in zip(rows, sites, strict=True)]
            else:
                shifts = self._centre(self._lanes[code], width, rows)[0]
                encoded = [encode_bf16(x_ND, shift_D) for x_ND, shift_D in zip(rows, shifts, strict=True)]
            scales = [e.scale for e in encoded if e.scale is not None]
            landing = EncodedBlock(
                code,
                start,
                width,
                [e.codes for e in encoded],
                torch.stack(scales) if scales else None,
                torch.stack([e.norm for e in encoded]),
                torch.stack([e.sums for e in encoded]),
                moments,
            )
            self._send(landing)

    def _centre(
        self, lane: Lane, width: int, rows: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
        """What the sums of the lane's blocks refer to; for bf16 the means of the first block."""
        if width not in lane.centre:
            if self._plan.codec == "int8z":
                known = [self._calibration[site.name] for site in self._by_width[width]]
                shifts, scales = [c.mean for c in known], [c.std for c in known]
            else:
                shifts = [x_ND.mean(dim=0) for x_ND in rows]
                scales = [torch.ones_like(shift_D) for shift_D in shifts]
            shift_SD, scale_SD = (torch.stack(parts).cpu().numpy().astype(np.float64) for parts in (shifts, scales))
            lane.centre[width] = (shifts, shift_SD, scale_SD)
        return lane.centre[width]

    def _send(self, landing: EncodedBlock) -> None:
        """Land a block: at once on the CPU, in a thread when it has to come from a GPU."""
        if not landing.norm.is_cuda:
            self._land(landing)
            return
        on_host = landing.to_host()
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(landing.norm.device))

        def land() -> None:
            copied.synchronize()
            self._land(on_host)

        if self._lander is None:
            self._lander = ThreadPoolExecutor(1, thread_name_prefix="thresher-land")
        self._landings.append(self._lander.submit(land))
        while len(self._landings) > _IN_FLIGHT:
            self._landings.popleft().result()

    def _land(self, block: EncodedBlock) -> None:
        """Check a block on the host, add its sums, and scatter its rows to their stored places."""
        lane, names = self._lanes[block.code], [site.name for site in self._by_width[block.width]]
        norm_SN = block.norm.numpy()
        self._check_finite(block.code, block.start, names, norm_SN)
        at = self._stored_at[lane.rows[block.start : block.start + norm_SN.shape[1]]]
        scale_SN = None if block.scale is None else block.scale.numpy().astype(np.float32)
        if scale_SN is not None:
            self._check_finite(block.code, block.start, names, scale_SN)
        for i, name in enumerate(names):
            if block.scale is not None:
                self._buffers[name][at] = block.codes[i].numpy()
                self._buffers[f"{name}.scale"][at] = block.scale[i].numpy()
            else:
                self._buffers[name][at] = block.codes[i].view(torch.int16).numpy().view(np.uint16)
        sums = block.sums.numpy().astype(np.float64)
        _, shift_SD, scale_SD = self._centre(lane, block.width)
        part = block.moments or stats.of_block(sums[:, :2], norm_SN, shift_SD, scale_SD)
        lane.tally.add(block.width, part, sums[:, 2] * np.square(scale_SD), scale_SN)

    def _check_finite(self, code: int, start: int, sites: Sequence[str], values_SN: np.ndarray) -> None:
        """Raise UserError for the first value that is not finite."""
        finite_SN = np.isfinite(values_SN)
        if finite_SN.all():
            return
        site, at = np.argwhere(~finite_SN)[0]
        row = self._lanes[code].rows[start + at]
        context, position = self._source.contexts[self._source.context[row]], self._source.position[row]
        token = self._packed.token_id[context, position]
        raise UserError(
            f"site {sites[site]!r} has an activation that cannot be stored in context {context} of {self.split!r}, "
            f"position {position} (token {token}): expected finite values, got NaN, infinity or a number too large for "
            f'the codec. The model overflows on this text; choose a wider dtype (target.dtype = "float32"), or leave '
            f"the site out."
        )

    def _finish(self) -> ShardData:
        """The finished shard, in the background thread. Raises UserError when a site misses the gate."""
        while self._landings:
            self._landings.popleft().result()
        if self._lander is not None:
            self._lander.shutdown()
        kept, special = self._lanes[KEPT].tally, self._lanes[SPECIAL].tally
        packed = [stats.pack(self._plan.sites, tally.moments(self._by_width)) for tally in (kept, special)]
        measured = quality(kept, special, self._by_width)
        check_gate(self._plan.codec, f"shard {self.index} of {self.split!r}", measured, self._owner.fvu_gate)
        arrays, self._buffers = self._buffers | self._provenance(), {}
        return ShardData(arrays, np.stack(packed), measured)

    def _provenance(self) -> dict[str, np.ndarray]:
        """Token, document, source and class of every stored row."""
        order = np.empty_like(self._stored_at)
        order[self._stored_at] = np.arange(len(order))
        context, position = self._source.contexts[self._source.context[order]], self._source.position[order]
        return {
            "token_id": self._packed.token_id[context, position].astype(np.int32),
            "document_id": self._packed.document_id[context, position].astype(np.int32),
            "source": np.stack([context, position], axis=1).astype(np.int32),
            "keep": self._packed.keep[context, position].astype(np.uint8),
        }


def _centred(x_ND: Tensor, shift_D: Tensor) -> stats.Moments:
    """Moments of a block of rows, by float32 sums around a shift; overwrites the rows."""
    sums_2D, norm_N = block_sums(x_ND, shift_D)
    shift = shift_D.numpy().astype(np.float64)
    return stats.of_block(sums_2D.numpy(), norm_N.numpy(), shift, np.ones_like(shift))
