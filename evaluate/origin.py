"""Which trained runs may be judged together, and what the report says of them; from their config.json.

A run is judged in the model it was trained on, on documents that none of those beside it has seen.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from thresher.cache.contracts import Dictionary
from thresher.cache.errors import UserError
from thresher.cache.records import differences, fingerprint
from thresher.evaluate.checks import Replacement

_MAKING = ("data", "harvest", "dictionary", "train")
"""Tables that decide what a run is; [target] is compared by its weights, [evaluate] is free."""


class Run(NamedTuple):
    """A trained dictionary and where it comes from."""

    path: Path
    dictionary: Dictionary
    sparsity: str
    """How sparse its rule makes it, in words."""
    config: Mapping[str, Any]
    """config.json."""
    content: str
    """Hash of its weights."""
    curves: Mapping[str, list[float | None]]
    """What training logged, by metric."""


def check_recipe(path: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raise UserError for a run that was trained under another recipe than the one that is to be judged."""
    unlike = [line for table in _MAKING for line in differences({table: wanted[table]}, {table: stored[table]})]
    if unlike:
        raise UserError(
            f"{path} was trained under another recipe: {'; '.join(unlike[:5])}. Train it under this "
            "one into another place (--runs), or evaluate the run directory itself."
        )


def check_origin(configs: Sequence[Mapping[str, Any]], target: Mapping[str, Any]) -> None:
    """Refuse runs of another model than the one they would be patched into, and runs that do not share their splits.

    What one run holds out, a run with other splits may have been trained on. `target` is the model's identity.
    """
    here = {key: value for key, value in target.items() if key != "dtype"}
    first = configs[0]
    for config in configs:
        made_from = config["cache"]["identity"]
        unlike = differences({key: made_from["target"][key] for key in made_from["target"] if key != "dtype"}, here)
        if unlike:
            raise UserError(
                f"Run {config['name']} was trained on another target: {'; '.join(unlike)}. Evaluate it with its "
                "own target, or train on a cache of this one."
            )
        apart = differences(first["cache"]["identity"]["data"], made_from["data"])
        if apart:
            raise UserError(
                f"Runs {first['name']} and {config['name']} were trained on other text or splits: "
                f"{'; '.join(apart)}. What one holds out the other may have seen; evaluate them apart."
            )


def replacements(runs: Sequence[Run], *, together: bool) -> list[Replacement]:
    """What is patched in at once: the dictionaries of a group (for example one per layer), or each run by itself."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.config["group" if together else "name"], []).append(run)
    return [
        Replacement(
            group,
            tuple(run.dictionary for run in members),
            _facts(members),
            content=fingerprint([run.content for run in members]),
        )
        for group, members in groups.items()
    ]


def _facts(members: Sequence[Run]) -> dict[str, object]:
    """What the report says about a set: of the first run where all agree, of every run where they may differ."""
    first = members[0].config
    spec, training = first["dictionary"], first["training"]
    return {
        "kind": spec["kind"],
        **({"skip": True} if spec.get("skip") else {}),
        "firing": spec["firing"],
        "sparsity": " / ".join(dict.fromkeys(run.sparsity for run in members)),
        "k": _mean_k([run.config["dictionary"].get("k") for run in members]),
        "n_latents": spec["n_latents"],
        "seed": training["seed"],
        "setting": fingerprint([_setting(run.config) for run in members])[:12],
        "training_rows": training["rows"],
        "cache_fingerprint": first["cache"]["fingerprint"],
        "git_commit": first["git_commit"],
        "runs": [str(run.path) for run in members],
        "curves": _mean_curves([run.curves for run in members]),
    }


def _mean_k(ks: Sequence[float | None]) -> float | None:
    """k of a set: the mean over its dictionaries, which may have one each; None where some have none."""
    known = [k for k in ks if k is not None]
    if len(known) < len(ks):
        return None
    return known[0] if len(set(known)) == 1 else _mean(known)


_CURVES = ("rows", "fvu", "l0", "dead")
CURVE_POINTS = 120
"""So many points of a training curve are kept."""


def _mean_curves(all_curves: Sequence[Mapping[str, list[float | None]]]) -> dict[str, list[float | None]]:
    """Means over the dictionaries of a set, of the log lines that all of them have; thinned."""
    length = min((len(curves.get("rows", [])) for curves in all_curves), default=0)
    kept = sorted({round(i * (length - 1) / max(CURVE_POINTS - 1, 1)) for i in range(CURVE_POINTS)}) if length else []
    out = {}
    for key in _CURVES:
        if all(key in curves for curves in all_curves):
            columns = [[curves[key][i] for curves in all_curves] for i in kept]
            out[key] = [_mean([value for value in column if value is not None]) for column in columns]
    return out


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _setting(config: Mapping[str, Any]) -> dict[str, Any]:
    """All that a run was told but its seed, so that sets which differ in the seed alone can be recognised as such."""
    told = {key: value for key, value in config["training"]["settings"].items() if key != "seed"}
    return {"dictionary": config["dictionary"], "train": told}
