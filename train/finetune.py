"""Fine-tuning: which finished run a new one begins from, and the check that it can.

`train.init_from` names a run directory, a folder of them, or the stem of their names (`runs/demo/transcoder-topk-k16`
for `transcoder-topk-k16-L00`, `-L01`, …); a new dictionary begins from the one among them that has its kind and its
sites. Kind, sites, widths and number of latents have to be the same. Firing rule, k, penalty, normalisation, the
constraint on decoder rows, optimiser and cache may differ.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from thresher.cache.errors import UserError
from thresher.cache.records import from_dict
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.holding import Holding
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.files import CONFIG, load_run, read_config, weights_hash
from thresher.train.plan import RunPlan

_SAME = ("kind", "reads", "writes", "d_in", "d_out", "n_latents", "skip", "transforms", "ranks", "multiples")
"""What a fine-tuned dictionary has to have in common with the one it begins from, in the order of the check."""


class Origin(NamedTuple):
    """The finished run that a new one begins from."""

    path: Path
    weights: str
    """SHA-256 of its weights."""

    def record(self) -> dict[str, Any]:
        """For config.json."""
        return {"path": str(self.path), "weights": self.weights}

    def load(self, holding: Holding | None = None) -> Coder:
        """The dictionary, on raw activations; `holding`: these of its latents alone."""
        return load_run(self.path, holding=holding).dictionary


def origin(plan: RunPlan) -> Origin | None:
    """What a plan's dictionary begins from; None: from random weights.

    Raises UserError when there is no such run, when several fit, and, naming the field, when the only one does not.
    """
    if plan.train.init_from is None:
        return None
    name = plan.train.init_from
    candidates = _candidates(Path(name))
    specs = [from_dict(DictionarySpec, read_config(path)["dictionary"], f"{path}: dictionary") for path in candidates]
    fitting = [
        path
        for path, spec in zip(candidates, specs, strict=True)
        if (spec.kind, spec.reads, spec.writes) == (plan.spec.kind, plan.spec.reads, plan.spec.writes)
    ]
    chosen = fitting or candidates
    if len(fitting) > 1 or (not fitting and len(candidates) > 1):
        raise UserError(_unclear(plan, name, candidates, fitting))
    (path,) = chosen
    _check(plan, name, path, specs[candidates.index(path)])
    if not read_config(path).get("training", {}).get("finished"):
        raise UserError(
            f"train.init_from = {name!r} leads to run {path}, which is not finished. Go on with it by `thresher train "
            "--resume` first."
        )
    return Origin(path, weights_hash(path))


def _candidates(place: Path) -> list[Path]:
    """Run directories that a name means: itself, those directly inside, or those whose names it begins."""
    if (place / CONFIG).is_file():
        return [place]
    below = sorted(config.parent for config in place.glob(f"*/{CONFIG}"))
    found = below or [
        config.parent for config in sorted(place.parent.glob(f"*/{CONFIG}")) if _stem_of(place.name, config.parent.name)
    ]
    if not found:
        raise UserError(
            f"train.init_from = {str(place)!r} is no run: expected a run directory with {CONFIG}, a folder of run "
            "directories, or the beginning of their names up to a dash (runs/demo/transcoder-topk-k16 for …-k16-L00 "
            "and so on). Give the path that `thresher train` printed."
        )
    return found


def _stem_of(stem: str, name: str) -> bool:
    return name == stem or name.startswith(f"{stem}-")


def _check(plan: RunPlan, name: str, path: Path, spec: DictionarySpec) -> None:
    for field in _SAME:
        wanted, there = getattr(plan.spec, field), getattr(spec, field)
        if wanted != there:
            raise UserError(
                f"{plan.name} cannot begin from {path} (train.init_from = {name!r}): dictionary.{field} is "
                f"{_shown(wanted)} in the recipe and {_shown(there)} in that run, and has to be the same. Change the "
                "recipe, or begin from another run; firing rule, k, penalty and normalisation may differ."
            )


def _unclear(plan: RunPlan, name: str, candidates: Sequence[Path], fitting: Sequence[Path]) -> str:
    listed = ", ".join(path.name for path in (fitting or candidates)[:6])
    listed += ", …" if len(fitting or candidates) > 6 else ""
    what = f"{plan.spec.kind} reading {_shown(plan.spec.reads)} and writing {_shown(plan.spec.writes)}"
    if fitting:
        return (
            f"train.init_from = {name!r} holds several runs that {plan.name} could begin from, each a {what}: "
            f"{listed}. Name one of them, or the stem of one set (all but the layer)."
        )
    return (
        f"train.init_from = {name!r} holds no run that {plan.name} could begin from: expected a {what}, got {listed}. "
        "Name runs of that kind and those sites, or restrict dictionary.layers to those that are there."
    )


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value[:3])) + (f" and {len(value) - 3} more" if len(value) > 3 else "")
    return repr(value)
