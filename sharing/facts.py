"""What a run says of itself in a few numbers: for a model card, and as the metadata of an artifact.

Everything comes from config.json. Runs that other tools trained may lack some of it, so every key is optional here.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Facts(NamedTuple):
    """One run."""

    name: str
    group: str
    """Of the set it belongs to."""
    kind: str
    firing: str
    k: float | None
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    n_latents: int | None
    l0: float | None
    """Active latents per token and source, mean over sources."""
    fvu: float | None
    """Mean over destinations."""
    dead: float | None
    """Share of latents silent at the end of training."""
    measured_on: str
    """Where `l0` and `fvu` are from: `validation rows`, or `training` where no rows were held out."""
    training_rows: int | None
    model: str | None
    """As the recipe names it."""
    model_hashes: tuple[tuple[str, str], ...]
    """What pins the model: `revision`, `weights`, as far as they are known."""
    data: str | None
    """Source of the text."""
    data_hashes: tuple[tuple[str, str], ...]
    """What pins the text: `revision`, `content`."""
    cache: str | None
    """Fingerprint."""
    weights: str
    """SHA-256."""


def facts(name: str, config: Mapping[str, Any], weights: str) -> Facts:
    """Facts of the run called `name`, from its config.json and the SHA-256 of its weights."""
    spec, training = config["dictionary"], config.get("training") or {}
    cache = config.get("cache") or {}
    made_from = cache.get("identity") or {}
    target, data = made_from.get("target") or {}, made_from.get("data") or {}
    held_out, final = training.get("held_out"), training.get("final") or {}
    return Facts(
        name=name,
        group=str(config.get("group", name)),
        kind=spec["kind"],
        firing=spec["firing"],
        k=spec.get("k"),
        reads=tuple(spec["reads"]),
        writes=tuple(spec["writes"]),
        n_latents=spec.get("n_latents"),
        l0=_mean(held_out["l0"]) if held_out else final.get("l0"),
        fvu=_mean(held_out["fvu"]) if held_out else final.get("fvu"),
        dead=final.get("dead"),
        measured_on=f"{held_out['split']} rows" if held_out else "training",
        training_rows=training.get("rows"),
        model=target.get("model"),
        model_hashes=_known(target, ("revision", "weights")),
        data=data.get("source"),
        data_hashes=_known(data, ("revision", "content")),
        cache=cache.get("fingerprint"),
        weights=weights,
    )


def _known(record: Mapping[str, Any], keys: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((key, str(record[key])) for key in keys if record.get(key))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def hub_name(name: str | None) -> str | None:
    """The name if it can be one of the hub's, else None: a path, a file, or something bundled with Thresher."""
    if name is None or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or Path(name).exists():
        return None
    return None if name.endswith((".txt", ".json", ".jsonl", ".parquet", ".safetensors")) else name


def short(name: str | None) -> str:
    """A model's or a text's name for people: of a path its last part."""
    if name is None:
        return "an unnamed source"
    return name if hub_name(name) or ":" in name else Path(name).name
