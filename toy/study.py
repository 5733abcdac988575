"""Running experiments: into a directory each, once.

    OUT/models/          trained models, by what they were trained on
    OUT/NAME/data.json   settings, records and what figures need
    OUT/NAME/data.csv    the records
    OUT/NAME/*.png, svg  figures
    OUT/NAME/verdicts.json
    OUT/toy.html         all of it

An experiment whose data.json has the same settings is not measured again: its figures and verdicts are made anew from
the data, which takes no time.
"""

import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from thresher.cache.interrupts import Interrupted, deferred_interrupts
from thresher.cache.publish import publish
from thresher.cache.records import to_dict
from thresher.toy import figures, page
from thresher.toy.experiments.base import Data, Experiment, Verdict
from thresher.toy.lab import Lab
from thresher.toy.sizes import Size

VERSION = 1
"""Of what experiments measure: data of another one are measured again."""
PAGE = "toy.html"


class Done(NamedTuple):
    """An experiment on disk."""

    experiment: Experiment
    folder: Path
    reused: bool
    """Its data were there."""
    seconds: float
    """It took to measure, when it was measured."""
    verdicts: list[Verdict]
    figures: list[Path]


def run(experiments: Sequence[Experiment], size: Size, out: Path, console: Console) -> list[Done]:
    """Measure, draw and judge experiments, and write the page of all that lie in `out`.

    Raises Interrupted after Ctrl-C or SIGTERM: finished experiments and trained models are kept.
    """
    done = []
    with deferred_interrupts() as stop:
        lab = Lab(out / "models", console, stop)
        for experiment in experiments:
            try:
                done.append(_one(experiment, size, out / experiment.name, lab, console))
            except Interrupted as error:
                raise Interrupted(
                    f"The toy study was stopped during {experiment.name}. What it had trained is in {lab.folder}; the "
                    "same command goes on from there."
                ) from error
            if stop.requested and experiment is not experiments[-1]:
                raise Interrupted(
                    f"The toy study was stopped after {experiment.name}. The same command goes on from there."
                )
    publish(out / PAGE, [page.render(done, size).encode()])
    return done


def _one(experiment: Experiment, size: Size, folder: Path, lab: Lab, console: Console) -> Done:
    settings = {"experiment": experiment.name, "version": VERSION, **to_dict(size)}
    stored = _stored(folder / "data.json", settings)
    reused = stored is not None
    if stored is None:
        console.print(f"[bold]{experiment.name}[/] ({experiment.also}): {experiment.title}", highlight=False)
        started = time.perf_counter()
        data = experiment.measure(lab, size)
        stored = {"settings": settings, "seconds": time.perf_counter() - started, **data._asdict()}
        publish(folder / "data.csv", [_csv(data.records)])
        publish(folder / "data.json", [json.dumps(stored, allow_nan=False).encode()])
    data = Data(stored["records"], stored["extra"])
    verdicts = experiment.judge(data, size)
    publish(folder / "verdicts.json", [json.dumps([each._asdict() for each in verdicts], indent=1).encode()])
    return Done(experiment, folder, reused, stored["seconds"], verdicts, figures.save(experiment.draw(data), folder))


def _stored(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The data of these settings, None where there are none or others."""
    if not path.is_file():
        return None
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored if stored["settings"] == settings else None


def _csv(records: Sequence[dict[str, Any]]) -> bytes:
    keys = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()
