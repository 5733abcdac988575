"""A run as Weights & Biases sees it: config, metrics, summary, and artifacts that depend on one another.

W&B gets one run per dictionary, grouped by sweep; its id is kept beside its files (`wandb/thresher.json`), so that a
run that goes on from a checkpoint goes on there too. Three types of artifact make up the lineage:

    cache        manifest and plan of what was trained from, used by training runs; never the rows
    dictionary   a finished run directory, made by a training run and used by an evaluation
    evaluation   a report, made by an evaluation (sharing/tracked.py)

An artifact is known by its content, so an evaluation that uses a run directory on its disk uses the very version that
training made. Nothing of W&B is imported while it is disabled; offline mode needs neither account nor network.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from thresher.cache.commit import MANIFEST, ROOT
from thresher.cache.errors import UserError
from thresher.cache.publish import publish
from thresher.cache.records import canonical

WandbMode = Literal["disabled", "online", "offline"]

PROJECT = "thresher"
IDENTITY = Path("wandb") / "thresher.json"
"""In a run directory: which W&B run its numbers go to."""

_OPTIMISER = ("lr", "gradient_norm", "left_out")
_SECTIONS = ("train", "optimiser", "fvu", "l0", "dead")
_TRIAL, _SWEEP = "WANDB_RUN_ID", "WANDB_SWEEP_ID"


class Labels(NamedTuple):
    """What a W&B run is called and how it is found."""

    name: str
    group: str
    """Shared by all runs of a sweep."""
    job: str
    """`train` or `evaluate`."""
    tags: tuple[str, ...]


class Tracker:
    """One W&B run that is open."""

    def __init__(self, run: Any, mode: WandbMode) -> None:
        """`run`: of wandb."""
        self._run, self._mode = run, mode

    def over_steps(self, sections: Sequence[str]) -> None:
        """Draw every curve of the sections over `step`; the training FVU's least value stands beside its last."""
        self._run.define_metric("step", hidden=True)
        for section in sections:
            self._run.define_metric(f"{section}/*", step_metric="step")
        self._run.define_metric("train/fvu", step_metric="step", summary="min,last")

    def log(self, values: Mapping[str, Any]) -> None:
        """One point of every curve; `step` among the values is the axis."""
        self._run.log(dict(values))

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Numbers that stand for the whole run."""
        self._run.summary.update({key: value for key, value in values.items() if value is not None})

    def uses(self, artifact: Any) -> None:
        """Say that this run rests on an artifact, made known to W&B along with it where it is not."""
        if self._mode == "offline":  # its public way refuses offline, and says the same to the server once it is synced
            self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        else:
            self._run.use_artifact(artifact)

    def makes(self, artifact: Any) -> None:
        """Say that this run made an artifact."""
        self._run.log_artifact(artifact)

    def finish(self, *, failed: bool = False) -> None:
        """Close the run."""
        self._run.finish(exit_code=int(failed))


def begin(path: Path, labels: Labels, config: Mapping[str, Any], mode: WandbMode, identity: str | None) -> Tracker:
    """Open a W&B run whose files go to `path`/wandb. `identity`: its id there; None leaves it to W&B.

    Raises UserError when it cannot be started.
    """
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity,
            resume=None if identity is None else "allow",
            name=labels.name,
            group=labels.group,
            job_type=labels.job,
            tags=[tag[:64] for tag in labels.tags],
            config=dict(config),
            dir=str(path.absolute()),  # W&B's service outlives a change of the working directory
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Exception as error:  # whatever its client raises: no account, no network, a bad key
        why = " ".join(str(error).split())
        raise UserError(
            f"Weights & Biases could not be started in mode {mode!r} for run {labels.name!r}: {why}. Log in with `"
            "wandb login`, or use --wandb offline or --wandb disabled."
        ) from error
    return Tracker(run, mode)


def begin_training(path: Path, config: Mapping[str, Any], mode: WandbMode) -> Tracker:
    """Open the W&B run of the run directory `path`, or go on with it; `config` is what config.json will say.

    The sweep is named after the folder of its run directories; the cache that is trained from is declared as used.
    """
    dictionary = config["dictionary"]
    sweep = path.absolute().parents[0 if trial() is None else 1].name
    labels = Labels(str(config["name"]), sweep, "train", (dictionary["kind"], dictionary["firing"]))
    told = {
        **config["recipe"],
        "run": {key: dictionary[key] for key in ("reads", "writes", "layers", "d_in", "d_out", "n_latents")}
        | {"set": config["group"], "total_steps": config["training"]["total_steps"]},
        "cache": {"fingerprint": config["cache"]["fingerprint"]},
        "versions": config["versions"],
        "git_commit": config["git_commit"],
    }
    tracker = begin(path, labels, told, mode, _identity(path))
    tracker.over_steps(_SECTIONS)
    tracker.uses(cache_artifact(config["cache"]))
    return tracker


def _identity(path: Path) -> str | None:
    """The W&B id of a run directory, made when it has none; None in a trial, whose id is the agent's."""
    if trial() is not None:
        return None
    if (known := tracked_before(path)) is not None:
        return known
    made = secrets.token_hex(4)
    publish(path / IDENTITY, [canonical({"id": made})])
    return made


def tracked_before(path: Path) -> str | None:
    """The W&B id under which the run directory was logged before, if it was."""
    try:
        return str(json.loads((path / IDENTITY).read_bytes())["id"])
    except (OSError, ValueError, KeyError):
        return None


def trial() -> str | None:
    """`SWEEP-TRIAL` where an agent of W&B started this process for one trial of a sweep, else None."""
    if os.environ.get(_SWEEP) and os.environ.get(_TRIAL):
        return f"{os.environ[_SWEEP]}-{os.environ[_TRIAL]}"
    return None


def check_trial(names: Sequence[str]) -> None:
    """Raise UserError where an agent's trial, which is one run, would train several dictionaries."""
    if trial() is not None and len(names) > 1:
        raise UserError(
            f"This is a trial of a W&B sweep, and a trial is one run, but the recipe makes {len(names)} dictionaries "
            f"({', '.join(names[:4])}{', …' if len(names) > 4 else ''}). Leave [sweep] out of the recipe and name one "
            "layer with dictionary.layers, or take a kind that is one over all layers."
        )


def point(values: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl under W&B's names: `step`, `train/fvu`, `optimiser/lr`, and by layer `fvu/L03`."""
    named = {}
    for key, value in values.items():
        head, _, part = key.partition(".")
        if key == "step":
            named[key] = value
        elif value is not None:
            named[f"{head}/{part}" if part else f"{'optimiser' if key in _OPTIMISER else 'train'}/{key}"] = value
    return named


def outcome(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished run came to, from its config.json: `held_out/fvu` and `held_out/l0`, by layer too, `dead`."""
    training, layers = config["training"], config["dictionary"]["layers"]
    found: dict[str, Any] = {"steps": training.get("steps"), "rows": training.get("rows")}
    found["dead"] = (training.get("final") or {}).get("dead")
    for key in ("fvu", "l0"):
        values = (training.get("held_out") or {}).get(key) or []
        if values and None not in values:
            found[f"held_out/{key}"] = sum(values) / len(values)
        if 1 < len(values) == len(layers):
            found |= {f"held_out/{key}/L{layer:02d}": value for layer, value in zip(layers, values, strict=True)}
    return found


def artifact_name(name: str) -> str:
    """A name that W&B takes: letters, digits, `-`, `_` and `.`, at most 128 of them."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:128]


def dictionary_artifact(path: Path, config: Mapping[str, Any], weights: str, files: Sequence[str]) -> Any:
    """A finished run directory as an artifact; `weights`: their SHA-256. Files are taken where they are, not copied."""
    import wandb

    dictionary = config["dictionary"]
    about = {key: dictionary[key] for key in ("kind", "firing", "k", "n_latents") if key in dictionary}
    about |= {"reads": list(dictionary["reads"]), "writes": list(dictionary["writes"]), "set": config.get("group")}
    about |= outcome(config) | {"weights_sha256": weights}
    artifact = wandb.Artifact(artifact_name(path.absolute().name), "dictionary", metadata=about)
    for name in files:
        if (path / name).is_file():
            artifact.add_file(str(path / name), policy="immutable", skip_cache=True)
    return artifact


def cache_artifact(cache: Mapping[str, Any]) -> Any:
    """What was trained from, as config.json states it: its identity, and of a cache on the disk manifest and plan."""
    import wandb

    artifact = wandb.Artifact(
        f"cache-{cache['fingerprint'][:12]}", "cache", metadata={"fingerprint": cache["fingerprint"]}
    )
    with artifact.new_file("identity.json", mode="wb") as file:
        file.write(canonical(cache["identity"]))
    for name in (MANIFEST, ROOT):
        if (Path(cache["path"]) / MANIFEST).is_file():  # live training and rings have none
            artifact.add_file(str(Path(cache["path"]) / name), policy="immutable", skip_cache=True)
    return artifact
