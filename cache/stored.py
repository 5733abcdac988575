"""What a directory says about itself, whether it is complete or not: its plan, facts, contexts and calibration.

The writer resumes from this, an extension starts from it, and the reader opens with it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from thresher.cache.arrays import read_plain, read_sharded
from thresher.cache.codec import Calibration
from thresher.cache.commit import PARTS, ROOT, is_complete
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.index import is_listed
from thresher.cache.layout import CONTEXT_ARRAYS, FORMAT, VERSION, Contexts, calibration_array
from thresher.cache.place import Place
from thresher.cache.plan import Extends, Plan


class Root(NamedTuple):
    """What a part's root group says."""

    plan: Plan
    facts: dict[str, Any]
    """Library versions, device, counts of the first writer."""


class Stored(NamedTuple):
    """A part that may be complete or not."""

    path: Place
    plan: Plan
    facts: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether it was declared complete, an extension also to its cache, and no commit record was lost since."""
        return is_complete(self.path, self.plan) and (self.plan.extends is None or is_listed(self.path))


def read_root(path: Place) -> Root:
    """Plan and facts of the part at `path`, or UserError when there is none that this program understands."""
    root = path / ROOT
    if not root.exists():
        raise UserError(f"there is no cache at {path}: {root} is missing. Run harvest first, or correct --cache PATH.")
    try:
        raw = json.loads(root.read_bytes())["attributes"]["thresher"]
        found, version = raw["format"], int(raw["version"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{root} is not the root of a Thresher cache: expected a Zarr group with the attribute 'thresher'. "
            f"Correct --cache PATH, or restore the file if it was one."
        ) from None
    if found != FORMAT or version != VERSION:
        newer = found == FORMAT and version > VERSION
        advice = "Update thresher to use it." if newer else "Harvest again into another place."
        raise UserError(
            f"the cache {path} has format {found!r} version {version}; this program knows {FORMAT!r} version "
            f"{VERSION}. {advice}"
        )
    try:
        return Root(Plan.from_json(raw), dict(raw["facts"]))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{root} is damaged: its plan is incomplete. Restore the file or harvest again.") from None


def parts(root: Place) -> list[Stored]:
    """The base of a cache and the parts that extend it, in order of creation, complete or not."""
    extensions = sorted(path.parent for path in (root / PARTS).glob(f"*-*/{ROOT}"))
    return [Stored(path, *read_root(path)) for path in (root, *extensions)]


def extended_part(path: Place, extends: Extends) -> Stored:
    """The part that the one at `path` extends."""
    for part in parts(path.parent.parent):
        if part.plan.fingerprint == extends.base and not part.plan.rows_stored_elsewhere:
            return part
    raise UserError(f"{path.parent.parent} has no part with the fingerprint {extends.base}, which {path} is to extend.")


def read_contexts(path: Place, plan: Plan, split: str) -> Contexts:
    """The packed tokens that the part at `path` holds, checked against their digests."""
    arrays = {}
    for name in CONTEXT_ARRAYS:
        folder = path / split / "contexts" / name
        array = read_sharded(folder, plan.context_arrays(split)[name])
        if hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() != plan.splits[split].sha256[name]:
            raise UserError(
                f"{folder} is damaged: the digest of its tokens differs from the plan's in {path / ROOT}. Restore its "
                f"files c.*, or remove the cache and harvest again."
            )
        arrays[name] = array
    return Contexts(**arrays)


def has_calibration(path: Place, site: Site) -> bool:
    """Whether μ and σ of a site were published in the part at `path`."""
    return (path / "calibration" / site.name / calibration_array(site).file_name(0)).exists()


def read_calibration(path: Place, site: Site) -> Calibration:
    """μ and σ of a site, as the part at `path` holds them. Raises UserError when they are missing or damaged."""
    mean, std = torch.from_numpy(read_plain(path / "calibration" / site.name, calibration_array(site)).copy())
    return Calibration(mean, std)


def read_calibrations(path: Place, plan: Plan) -> dict[str, Calibration]:
    """μ and σ of every site of the part at `path`, by name; {} where its codec has none."""
    return {site.name: read_calibration(path, site) for site in plan.sites} if plan.codec == "int8z" else {}


def calibration_digest(plan: Plan, by_site: Mapping[str, Calibration]) -> str | None:
    """SHA-256 over μ and σ of all sites, as commit records have it; None where there are none."""
    if not by_site:
        return None
    digest = hashlib.sha256()
    for site in plan.sites:
        digest.update(by_site[site.name].as_array().data)
    return digest.hexdigest()
