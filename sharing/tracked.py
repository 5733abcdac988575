"""An evaluation in Weights & Biases: its table, its plots, its page, and what rests on what.

One run of the job type `evaluate` uses the artifacts of the dictionaries that were judged (train/tracking.py) and makes
an artifact of the type `evaluation`, so W&B's lineage leads from a report to the runs behind it and to their caches.
Everything is read from the report's directory: what W&B shows is what `thresher evaluate` wrote.
"""

from collections.abc import Sequence
from pathlib import Path

from thresher.sharing.directories import RESULTS, shared_report
from thresher.sharing.evaluated import Evaluation, Row, read_results
from thresher.train.files import read_config, weights_hash
from thresher.train.metrics import FILES
from thresher.train.tracking import Labels, Tracker, WandbMode, artifact_name, begin, dictionary_artifact

METRICS = (
    "l0",
    "fvu",
    "delta",
    "kl",
    "recovered_zero",
    "agree",
    "dead",
    "n_latents",
    "n_parameters",
    "active_parameters",
)
COLUMNS = (
    "dictionary",
    "family",
    "kind",
    "protocol",
    *METRICS,
    "delta_low",
    "delta_high",
    "on_front",
    "reads",
    "writes",
)
"""Of the table `pareto`: one row for each dictionary or baseline and protocol."""


def track_evaluation(report: Path, runs: Sequence[Path], mode: WandbMode) -> None:
    """Log the evaluation in the directory `report`, which judges the run directories `runs`.

    Raises UserError when W&B cannot be started; the report is on the disk by then, and stays.
    """
    evaluation = read_results((report / RESULTS).read_bytes(), str(report / RESULTS))
    group = runs[0].absolute().parent.name
    families = tuple(dict.fromkeys(row.family for row in evaluation.replacements))
    told = {"evaluate": evaluation.provenance.get("evaluate"), "masks": dict(evaluation.masks)}
    tracker = begin(report, Labels(f"evaluate {report.name}", group, "evaluate", families), told, mode, None)
    whole = False
    try:
        _log(tracker, evaluation, report, runs)
        whole = True
    finally:
        tracker.finish(failed=not whole)


def _log(tracker: Tracker, evaluation: Evaluation, report: Path, runs: Sequence[Path]) -> None:
    import wandb

    judged = []
    for path in runs:
        config, weights = read_config(path), weights_hash(path)
        judged.append({"run": path.absolute().name, "weights_sha256": weights})
        tracker.uses(dictionary_artifact(path, config, weights, FILES))
    shown: dict[str, object] = {
        "pareto": wandb.Table(columns=list(COLUMNS), data=[_cells(row) for row in evaluation.rows])
    }
    for plot in sorted((report / "plots").glob("*.png")):
        shown[f"plots/{plot.stem}"] = wandb.Image(str(plot), caption=plot.stem)
    if (report / "report.html").is_file():
        shown["report"] = wandb.Html(str(report / "report.html"))
    tracker.log(shown)
    tracker.summarise(
        {
            f"{row.protocol}/{key}/{row.name}": row.metric(key)
            for row in evaluation.replacements
            for key in ("delta", "fvu", "l0")
        }
    )
    about = {"dictionaries": judged, "scored_tokens": evaluation.masks.get("scored_tokens")}
    artifact = wandb.Artifact(artifact_name(f"evaluation-{report.absolute().name}"), "evaluation", metadata=about)
    for name in shared_report(report):
        artifact.add_file(str(report / name), name=name, policy="immutable", skip_cache=True)
    tracker.makes(artifact)


def _cells(row: Row) -> list[object]:
    """A row of the table, in the order of COLUMNS."""
    low, high = row.interval or (None, None)
    named = [row.name, row.family, row.kind, row.protocol]
    return [*named, *(row.metric(key) for key in METRICS), low, high, row.on_front, _list(row.reads), _list(row.writes)]


def _list(sites: Sequence[str]) -> str:
    return ", ".join(sites)
