"""μ and σ of the sites of a part on their way to the disk (int8z): fixed once, before any row that uses them.

They come from train shard 0, or, in an extension, from the part that knows the site already: there is one calibration
a site in all of a cache. What is inherited was stored long ago, so it is held against the commit records that were
written with it: a part must not be filled, and sealed, with a calibration that no row of the cache was stored with.
"""

from collections.abc import Mapping

import numpy as np

from thresher.cache.arrays import write_plain
from thresher.cache.codec import Calibration
from thresher.cache.commit import check_calibration, committed, read_commit
from thresher.cache.errors import UserError
from thresher.cache.layout import calibration_array
from thresher.cache.place import Place
from thresher.cache.plan import Plan
from thresher.cache.stored import (
    Stored,
    calibration_digest,
    has_calibration,
    parts,
    read_calibration,
    read_calibrations,
)


def publish_calibrations(path: Place, plan: Plan, by_site: Mapping[str, Calibration]) -> None:
    """Fix μ and σ of every site of the part at `path`; what is there already has to be the same.

    A process that was killed here may have published some. They were made from the same rows.
    """
    for site in plan.sites:
        values = by_site[site.name].as_array()
        if not has_calibration(path, site):
            write_plain(path / "calibration" / site.name, calibration_array(site), values, exclusive=True)
        elif not np.array_equal(values, read_calibration(path, site).as_array()):
            raise UserError(
                f"the calibration of {site.name!r} in {path} differs from the one computed now, and rows may "
                f"be stored with it. Expected the same rows on every run: use one kind of device, dtype and "
                f"software, or harvest into another place."
            )


def load_calibrations(path: Place, plan: Plan, *, used: bool) -> dict[str, Calibration]:
    """μ and σ by site; {} while they are not there for all. Raises UserError when they are not and were `used`."""
    if plan.codec != "int8z":
        return {}
    if all(has_calibration(path, site) for site in plan.sites):
        return read_calibrations(path, plan)
    if used:
        raise UserError(
            f"{path / 'calibration'} is incomplete, yet shards were stored with it. Restore the folder, "
            f"or remove the cache {path} and harvest again."
        )
    return {}


def inheritance(path: Place, plan: Plan) -> dict[str, Calibration]:
    """μ and σ of those sites of the extension at `path` that its cache knows already, checked, by site.

    Raises UserError when they are damaged, or are not those that the rows of their part were stored with.
    """
    if plan.extends is None or plan.codec != "int8z":
        return {}
    others = [part for part in parts(path.parent.parent) if part.path != path]
    found, checked = dict[str, Calibration](), set[Place]()
    for site in plan.sites:
        holder = next((part for part in others if has_calibration(part.path, site)), None)
        if holder is not None:
            if holder.path not in checked:
                _check_used(holder)
                checked.add(holder.path)
            found[site.name] = read_calibration(holder.path, site)
    return found


def inherit(path: Place, plan: Plan, inherited: Mapping[str, Calibration]) -> None:
    """Publish what `inheritance` found, where the part at `path` has none of its own yet."""
    for site in plan.sites:
        if site.name in inherited and not has_calibration(path, site):
            values = inherited[site.name].as_array()
            write_plain(path / "calibration" / site.name, calibration_array(site), values)


def _check_used(part: Stored) -> None:
    """Raise UserError unless the calibration of a part is the one that its first committed shard was stored with."""
    shards = sorted(committed(part.path, part.plan))
    if shards:  # else no row was stored with it
        record = read_commit(part.path, part.plan, *shards[0])
        check_calibration(part.path, record, calibration_digest(part.plan, read_calibrations(part.path, part.plan)))
