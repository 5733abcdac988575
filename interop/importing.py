"""The way in: dictionaries of another tool into run directories that evaluation, fine-tuning and export take as ours.

Where they belong is a recipe's business: its target, its text and the cache of its activations. The cache gives the
sites' names and means, and held-out rows on which every reading of the files is measured (readings.py), so that a wrong
convention is seen before it becomes a number.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.records import to_dict
from thresher.cache.source import Source
from thresher.interop import formats
from thresher.interop.canonical import to_coder
from thresher.interop.formats import Foreign, Reading
from thresher.interop.hooks import site_of
from thresher.interop.readings import Measured, Served, held_out_split, measure, rows_of, serve, with_scales
from thresher.train.files import git_commit, save_run, versions


class Imported(NamedTuple):
    """One dictionary that was read."""

    path: Path
    """Its run directory."""
    chosen: str
    """Label of the reading that was taken."""
    readings: tuple[Measured, ...]
    """All readings on held-out rows, the one that the files state first."""
    served: Served
    """The saved run beside the chosen reading, on the same rows."""


class Naming(NamedTuple):
    """How runs are called and which sites they act on, where the files are not to decide."""

    name: str
    """Stem of the run names; a set of several gets -L00, -L01, … behind it."""
    reads: str | None = None
    """Stored site, for a set a pattern with one match per layer; None: what the files say."""
    writes: str | None = None


_EVERYWHERE = ("params", "ae")
"""Stems that Gemma Scope and dictionary_learning give the file of every dictionary."""


def called_after(path: Path) -> str:
    """Name of a run that was given none: the directory's or the file's, in whose place its directory's if it says
    nothing."""
    path = path.resolve()
    if path.is_file():
        return path.parent.name if path.stem in _EVERYWHERE else path.stem
    return path.name


def import_dictionaries(
    path: Path,
    form: str,
    source: Source,
    recipe: Mapping[str, Any],
    out: Path,
    naming: Naming,
    reading: str | None = None,
) -> list[Imported]:
    """Read `path` in the format `form` into `out`/NAME, as dictionaries of the target whose activations `source` holds.

    `recipe`: the resolved recipe of that target, JSON values. `reading`: label of the reading to take, in place of what
    the files state. Raises UserError, with nothing written, for files that are no such dictionary, for a site or width
    the cache does not have, for an unknown reading and for a run directory that exists.
    """
    read = formats.load(form).read
    if read is None:
        known = ", ".join(formats.names(writing=False))
        raise UserError(f"--from {form}: that format is only written; expected one of {known}.")
    if not path.exists():
        raise UserError(f"{path} does not exist. Give the directory or file that the other tool wrote.")
    found = read(path)
    placed = [with_scales(_placed(each, source, naming, found), source) for each in found]
    whole = [each.readings[0].dictionary for each in placed]
    acts = rows_of(source, [site for each in whole for site in each.reads + each.writes])
    checked = [_checked(each, acts, source, reading) for each in placed]
    seen = {"split": held_out_split(source), "rows": len(next(iter(acts.values())))}
    for each in checked:
        place = out / each.chosen.dictionary.name
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"{place} is there already. Give another --name or --runs, or delete it.")
    origin = {"format": form, "path": str(path), "sha256": _digest(path)}
    return [_saved(each, acts, origin, seen, source, recipe, out, naming.name) for each in checked]


class _Checked(NamedTuple):
    """A dictionary in its place, with what its readings come to."""

    foreign: Foreign
    chosen: Reading
    table: tuple[Measured, ...]
    means: list[Tensor]
    """[E] by destination."""


def _checked(foreign: Foreign, acts: Mapping[str, Tensor], source: Source, label: str | None) -> _Checked:
    writes = foreign.readings[0].dictionary.writes
    means = [torch.from_numpy(source.statistics(site).mean.copy()).double() for site in writes]
    table = tuple(measure(one, acts, means) for one in foreign.readings)
    return _Checked(foreign, _chosen(foreign, label), table, means)


def _placed(foreign: Foreign, source: Source, naming: Naming, found: Sequence[Foreign]) -> Foreign:
    """With the sites of the cache in the place of the names in the files, and the run's name."""
    first = foreign.readings[0].dictionary
    several = len(found) > 1 or len(first.reads) > 1
    layers = first.layers if several else ()
    reads = _sites(first.reads, layers, naming.reads, "--reads", source)
    writes, kind = reads, first.kind
    if kind != "sae" or naming.writes is not None:
        writes = _sites(first.writes, layers, naming.writes, "--writes", source)
    if kind == "sae" and writes != reads:
        if not foreign.sites_guessed:
            raise UserError(
                f"--writes is {naming.writes!r}, but the files say that this is an SAE: it writes {reads[0]}, which it "
                "reads. Leave --writes out."
            )
        kind = "transcoder"
    for side, names, width in (("reads", reads, first.d_in), ("writes", writes, first.d_out)):
        for site in names:
            if source.sites[site].width != width:
                raise UserError(
                    f"The dictionary {side} activations of width {width}, but {site} has width "
                    f"{source.sites[site].width}. It belongs to another model or site: give the recipe of its own "
                    "target, or say which site is meant with --reads and --writes."
                )
    layers = tuple(source.sites[site].layer for site in reads)
    name = naming.name if len(found) == 1 else f"{naming.name}-L{layers[0]:02d}"

    def moved(one: Reading) -> Reading:
        named = one.dictionary._replace(name=name, kind=kind, reads=reads, writes=writes, layers=layers)
        return one._replace(dictionary=named)

    return foreign._replace(readings=tuple(moved(one) for one in foreign.readings))


def _sites(
    names: Sequence[str], layers: Sequence[int], given: str | None, field: str, source: Source
) -> tuple[str, ...]:
    """Stored sites by source or destination.

    `given` replaces the name in the files, with {} in it for the layer where there are several: `layers`, by source.
    """
    sites = list(source.sites.values())
    if given is None:
        return tuple(site_of(name, sites, field).name for name in names)
    if layers and "{}" not in given:
        raise UserError(
            f"{field} is {given!r} for dictionaries of several layers; expected {{}} in the place of the layer, for "
            f"example {field} 'blocks.{{}}.mlp.hook_in'."
        )
    if not layers:
        return (site_of(given, sites, field).name,)
    return tuple(site_of(given.replace("{}", str(layer)), sites, field).name for layer in layers)


def _chosen(foreign: Foreign, label: str | None) -> Reading:
    if label is None:
        return foreign.readings[0]
    for one in foreign.readings:
        if one.label == label:
            return one
    raise UserError(
        f"--reading is {label!r}; expected one of {', '.join(repr(one.label) for one in foreign.readings)}."
    )


def _saved(
    each: _Checked,
    acts: Mapping[str, Tensor],
    origin: Mapping[str, Any],
    seen: Mapping[str, Any],
    source: Source,
    recipe: Mapping[str, Any],
    out: Path,
    group: str,
) -> Imported:
    """Save one; `acts`: the rows that its readings were measured on, `seen`: their split and number."""
    dictionary, table = each.chosen.dictionary, each.table
    coder = to_coder(dictionary, each.foreign.firing, each.foreign.k)
    coder.mean.copy_(torch.stack(each.means))
    measured = next(row for row in table if row.label == each.chosen.label)
    served = serve(coder, each.chosen, acts)
    spec = to_dict(coder.spec)
    config = {
        "name": dictionary.name,
        "group": group,
        "dictionary": spec,
        "recipe": {**recipe, "dictionary": spec, "train": {}},
        "cache": {"path": str(source.path), "fingerprint": source.fingerprint, "identity": dict(source.identity)},
        "imported": {
            **origin,
            "reading": each.chosen.label,
            "readings": [row._asdict() for row in table],
            "served": served._asdict(),
            **each.foreign.facts,
        },
        "versions": versions(),
        "git_commit": git_commit(),
        "training": {
            "finished": True,
            "settings": {},
            "seed": None,
            "rows": None,
            "held_out": {**seen, "fvu": [measured.fvu], "l0": [measured.l0]},
        },
    }
    save_run(out / dictionary.name, coder, config)
    return Imported(out / dictionary.name, each.chosen.label, table, served)


def _digest(path: Path) -> str:
    """SHA-256 over the files read, names and contents in order."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
