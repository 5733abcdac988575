"""What config.json says of a run that begins, and whether a directory that is there already is that run.

A run directory belongs to one resolved recipe. Finished: it is reused. Unfinished: it goes on from its last checkpoint
when that is wanted. Made from another recipe, or by something else: refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from thresher.cache.errors import UserError
from thresher.cache.records import differences, to_dict
from thresher.cache.source import Source
from thresher.train.files import CONFIG, check_weights, git_commit, read_config, versions
from thresher.train.finetune import Origin
from thresher.train.plan import RunPlan

_OPERATIONAL = ("checkpoint_every", "log_every")  # settings that change no number of the result


def config_of(
    plan: RunPlan,
    begun: Origin | None,
    total: int,
    reader: Source,
    device: torch.device,
    groups: Mapping[str, Sequence[RunPlan]],
) -> dict[str, Any]:
    """config.json of a run that is about to start."""
    return {
        "name": plan.name,
        "group": plan.group,
        "dictionary": to_dict(plan.spec),
        "recipe": plan.recipe,
        "cache": {"path": str(reader.path), "fingerprint": reader.fingerprint, "identity": dict(reader.identity)},
        "init_from": None if begun is None else begun.record(),
        "versions": versions(),
        "git_commit": git_commit(),
        "training": {
            "finished": False,
            "settings": to_dict(plan.train),
            "seed": plan.seed,
            "total_steps": total,
            "device": str(device),
            **({"together": sorted(other.name for other in groups[plan.group])} if plan.group in groups else {}),
        },
    }


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that decides the result."""
    training = config["training"]
    settings = {key: value for key, value in training["settings"].items() if key not in _OPERATIONAL}
    return {
        "dictionary": config["dictionary"],
        "train": settings,
        "seed": training["seed"],
        "cache": config["cache"]["fingerprint"],
        "init_from": config.get("init_from"),
        "together": training.get("together"),
    }


def reusable(plan: RunPlan, config: dict[str, Any], path: Path, resume: bool) -> dict[str, Any] | None:
    """Metrics of the finished run at `path`, or None when there is work to do. Raises UserError when in doubt."""
    if not path.exists() or not any(path.iterdir()):
        return None
    if not (path / CONFIG).exists():
        raise UserError(
            f"{path} is not empty and holds no {CONFIG}: it is no run of ours. Choose another place with --runs."
        )
    stored = read_config(path)
    lines = differences(_decisive(config), _decisive(stored))
    if lines:
        raise UserError(
            f"{path} holds a run with other settings ({'; '.join(lines[:5])}; 'expected' is the recipe's). Give this "
            "one another name or --runs, or delete the directory."
        )
    training: dict[str, Any] = stored["training"]
    if training.get("finished"):
        check_weights(path)
        return training
    if not resume:
        why = f"has failed ({training['failed']})" if training.get("failed") else "is unfinished"
        raise UserError(f"Run {path} {why}. Add --resume to go on from its last checkpoint, or delete the directory.")
    return None
