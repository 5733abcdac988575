"""How `thresher evaluate` judges dictionaries of a toy model: against the known solution, without cross-entropy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from thresher.cache.errors import UserError
from thresher.cache.place import Place
from thresher.commands.options import WandbMode, out, refuse_several
from thresher.commands.wiring import texts_for

if TYPE_CHECKING:
    from thresher.evaluate.run import EvaluateConfig
    from thresher.harvest.corpus import DataConfig
    from thresher.harvest.target import TransformerTarget


def is_known(target: "TransformerTarget") -> bool:
    """Whether the target is a toy model."""
    return target.truths(()) is not None


def judge_known(
    paths: Sequence[Path],
    tables: Mapping[str, Any],
    target: "TransformerTarget",
    cache: Place | None,
    report: Path,
    own: "DataConfig | None",
    wandb: WandbMode = "disabled",
) -> dict[str, Any]:
    """Measure, print, write the report; returns what `--json` tells."""
    from thresher.evaluate.origin import Run, check_origin, replacements
    from thresher.evaluate.vector_report import print_vectors, to_json, write_vector_report
    from thresher.evaluate.vectors import evaluate_vectors
    from thresher.train.directions import directions
    from thresher.train.files import load_run, weights_hash
    from thresher.train.metrics import curves

    refuse_several("the evaluation of a toy model", "it is measured by one process", "Run it without torchrun.")
    if wandb != "disabled":
        raise UserError(
            f"--wandb is {wandb!r}; an evaluation of a toy model is not logged to Weights & Biases, since it has none "
            "of the metrics of a language model. Leave it out; results.json has everything."
        )
    loaded = [load_run(path, device=target.device) for path in paths]
    check_origin([run.config for run in loaded], target.identity)
    settings: EvaluateConfig = tables["evaluate"]
    texts = texts_for(loaded[0].config, tables, cache, target, own)
    judged = [
        Run(path, run.dictionary, run.dictionary.spec.sparsity_label, run.config, weights_hash(path), curves(path))
        for path, run in zip(paths, loaded, strict=True)
    ]
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("evaluate", total=None)
        results = evaluate_vectors(
            replacements(judged, together=settings.together),
            target,
            texts.contexts,
            known={id(run.dictionary): directions(run.dictionary) for run in loaded},
            protocols=settings.protocols,
            tokens=settings.tokens,
            provenance={"contexts": texts.source, "runs": [str(path) for path in paths], **texts.facts},
            told=lambda done, total: progress.update(task, completed=done, total=total),
        )
    results = results._replace(notes=(*texts.notes, *results.notes))
    print_vectors(results, out)
    written = write_vector_report(results, report)
    for label, path in written._asdict().items():
        for item in path if isinstance(path, tuple) else [path]:
            out.print(f"{label:<8} {item}", highlight=False, soft_wrap=True)
    document = to_json(results)
    told = ("name", "kind", "family", "sites", "metrics")
    rows = [
        {key: row[key] for key in told} | {"protocol": None, "intervals": {}, "front": {}} for row in document["rows"]
    ]
    return {"report": report, "rows": rows, "checks": [], "notes": document["notes"]}
