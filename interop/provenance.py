"""What travels with an exported dictionary: from which run, weights, cache and target it comes, and what it came to."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from thresher.train.files import weights_hash

_FIGURES = ("split", "rows", "fvu", "l0")
_ORIGIN = ("format", "tool", "version", "architecture", "model", "hook_name", "sha256", "reading")


def facts(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values: `config` is the run's config.json.

    Of an import also what it was before, and of a fine-tuned run the weights that it began from.
    """
    identity, training = config["cache"]["identity"], config["training"]
    held_out, origin, parent = training.get("held_out") or {}, config.get("imported"), config.get("init_from")
    return {
        "thresher_version": version("thresher"),
        "run": config["name"],
        "weights_sha256": weights_hash(path),
        "target": dict(identity["target"]),
        "data": {key: identity["data"].get(key) for key in ("source", "subset", "split", "column", "context", "bos")},
        "cache_fingerprint": config["cache"]["fingerprint"],
        "git_commit": config.get("git_commit"),
        "dictionary": {key: config["dictionary"][key] for key in ("kind", "firing", "k", "reads", "writes")},
        "training_rows": training.get("rows"),
        "held_out": {key: held_out[key] for key in _FIGURES if key in held_out},
        **({} if origin is None else {"imported": {key: origin[key] for key in _ORIGIN if key in origin}}),
        **({} if parent is None else {"finetuned_from_sha256": parent["weights"]}),
    }
