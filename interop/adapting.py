"""What may be done to a dictionary on its way out, when a reader cannot take it as it is.

One that counts its active latents gets thresholds (thresholds.py); one of an MLP's input is made to read before the
norm's gain (norms.py).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from thresher.cache.errors import UserError
from thresher.cache.interrupts import StopFlag
from thresher.cache.place import Place, place_at
from thresher.cache.reader import CacheReader
from thresher.interop.formats import Exported
from thresher.interop.norms import Norm, reading_at
from thresher.interop.thresholds import COUNTED, thresholded


class Moved(NamedTuple):
    """A hook that the reader shall read from, in the place of the one trained on."""

    hook: str
    """Inside the block: `ln2.hook_normalized`."""
    norms: Mapping[int, Norm]
    """By layer, of the target (`norms_of`)."""


class Thresholds(NamedTuple):
    """How dictionaries that count get thresholds."""

    rows: int
    """Training rows that they are set on."""
    cache: Place | None = None
    """Where those rows are; None: in the cache that each run names."""
    stop: StopFlag | None = None


class Ready(NamedTuple):
    """A dictionary with the config.json of its run."""

    config: Mapping[str, Any]
    item: Exported


def moved_to(ready: Ready, moved: Moved) -> Ready:
    """Reading at another hook."""
    return ready._replace(
        item=ready.item._replace(dictionary=reading_at(ready.item.dictionary, moved.hook, moved.norms))
    )


def foreseen(ready: Sequence[Ready]) -> list[Ready]:
    """As what they will be once they have thresholds: enough to refuse them before any is calibrated."""
    return [each._replace(item=_foreseen(each.item)) for each in ready]


def _foreseen(item: Exported) -> Exported:
    if item.dictionary.firing not in COUNTED:
        return item
    sources = tuple(part._replace(threshold=torch.zeros_like(part.b_enc)) for part in item.dictionary.sources)
    return item._replace(dictionary=item.dictionary._replace(firing="threshold", k=None, sources=sources))


def with_thresholds(ready: Sequence[Ready], how: Thresholds) -> list[Ready]:
    """Those that count with thresholds, and facts of them. Raises UserError when none does, or their cache is gone."""
    names = ", ".join(each.item.dictionary.name for each in ready[:3])
    if not any(each.item.dictionary.firing in COUNTED for each in ready):
        raise UserError(f"--thresholds is given, but {names} fire by thresholds already. Leave it out.")
    done = []
    with ExitStack() as opened:
        caches = Caches("--thresholds", how.cache, opened)
        for each in ready:
            if each.item.dictionary.firing in COUNTED:
                dictionary, facts = thresholded(each.item.dictionary, caches.of(each.config), how.rows, how.stop)
                done.append(each._replace(item=Exported(dictionary, {**each.item.facts, "thresholds": facts})))
            else:
                done.append(each)
    return done


class Caches:
    """Open caches by place, each opened once, for an option that looks at what runs were trained on."""

    def __init__(self, option: str, given: Place | None, opened: ExitStack) -> None:
        self.option, self.given, self._opened = option, given, opened
        self._readers: dict[Place, CacheReader] = {}

    def of(self, config: Mapping[str, Any]) -> CacheReader:
        """The cache that a run was trained on. Raises UserError when it is gone or another one."""
        path = self.given or place_at(config["cache"]["path"])
        if not path.exists():
            raise UserError(
                f"{self.option} needs the cache that run {config['name']} was trained on, but {path} does not exist. "
                "Harvest it again (thresher harvest), or say where it is with --cache."
            )
        if path not in self._readers:
            self._readers[path] = self._opened.enter_context(CacheReader.open(path))
        reader = self._readers[path]
        if reader.fingerprint != config["cache"]["fingerprint"]:
            raise UserError(
                f"{self.option}: run {config['name']} was trained on another cache than {path} (fingerprint "
                f"{config['cache']['fingerprint'][:12]}, found {reader.fingerprint[:12]}). Give its own with --cache."
            )
        return reader
