"""What a harvest is asked to do, what it did, and the identity of the cache that it fills."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from thresher.cache.errors import UserError
from thresher.cache.layout import CODEC_IDS, FORMAT, VERSION
from thresher.cache.order import ORDER_ID
from thresher.cache.place import Place
from thresher.harvest.corpus import DataConfig, data_identity
from thresher.harvest.packing import PACKING_ID
from thresher.harvest.target import TargetConfig, model_identity

TAPS_ID = "thresher-taps-1"
"""Names what the taps mean (harvest/sites.py); another meaning would need another name."""


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Which activations are stored, and how: the table [harvest] of a recipe."""

    sites: tuple[str, ...] = ("mlp_in", "mlp_out")
    """Taps (resid_pre, resid_mid, mlp_in, mlp_hidden, mlp_out, resid_post), full names such as L05.mlp_in, or
    transformer-lens hook names; with patterns, such as blocks.[0-3].hook_mlp_out."""

    layers: tuple[int, ...] | None = None
    """Layers that bare taps are taken at, from 0; left out: all."""

    codec: Literal["int8z", "bf16", "bf16-lz4"] = "int8z"
    """int8z: one byte a number, its error measured and bounded. bf16: two bytes, exact for a bfloat16 model. bf16-lz4:
    the same compressed without loss, to keep rather than to train from."""

    store: Literal["kept", "all"] = "kept"
    """kept: without position 0 and special tokens. all: with them, marked, so that training may choose."""

    seed: int = 0
    """Key of the order in which rows are stored."""

    fvu_gate: float = 1e-3
    """Stop when storing loses more than this share of a site's variance in any shard."""

    window_gb: float | None = None
    """Rolling and live mode: bound in GB on the train shards that exist at a time; left out: all are stored. Harvest
    then refills a ring of that size while training reads it."""

    batch_contexts: int | None = None
    """Contexts per forward pass; left out: about 2,048 tokens on a CPU and 32,768 on a GPU, fewer when
    they would take more than 1 GiB."""

    def __post_init__(self) -> None:
        if not self.sites:
            raise UserError('harvest.sites is empty; expected at least one, such as sites = ["mlp_in", "mlp_out"].')
        if self.layers is not None and not self.layers:
            raise UserError("harvest.layers is empty; expected layer numbers. Leave it out for all layers.")
        if self.batch_contexts is not None and self.batch_contexts < 1:
            raise UserError(f"harvest.batch_contexts is {self.batch_contexts}; expected at least 1.")
        if self.window_gb is not None and not self.window_gb > 0:
            raise UserError(f"harvest.window_gb is {self.window_gb}; expected more than 0. Leave it out to store all.")
        if not self.fvu_gate > 0:
            raise UserError(f"harvest.fvu_gate is {self.fvu_gate}; expected more than 0, such as 1e-3.")


class HarvestResult(NamedTuple):
    """What a harvest did."""

    path: Place
    reused: bool
    """The cache was there already and nothing was computed."""
    rows: dict[str, int]
    """Stored rows by split."""
    tokens: int
    """Tokens that went through the model this time."""
    tokens_per_s: float
    """Of the time spent on shards, loading and tokenising left out; 0 when reused."""
    seconds: float
    """Everything."""


def window_bytes(config: HarvestConfig) -> int | None:
    """The bound on train shards in bytes; None: all are stored."""
    return None if config.window_gb is None else round(config.window_gb * 1e9)


def identity(target: TargetConfig, data: DataConfig, config: HarvestConfig) -> dict[str, Any]:
    """What the cache's fingerprint is of, from settings and files alone: no model is loaded, nothing tokenised.

    `software` names the definitions of ours that decide the bytes; versions of libraries stand beside the fingerprint.
    """
    return {
        "target": model_identity(target),
        "data": data_identity(data),
        "harvest": {
            "sites": list(config.sites),
            "layers": None if config.layers is None else sorted(set(config.layers)),
            "codec": config.codec,
            "store": config.store,
            "seed": config.seed,
            "window_gb": config.window_gb,
        },
        "software": {
            "format": f"{FORMAT}-{VERSION}",
            "order": ORDER_ID,
            "codec": CODEC_IDS[config.codec],
            "taps": TAPS_ID,
            "packing": PACKING_ID,
        },
    }
