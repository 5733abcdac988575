"""Names of sites as other tools know them: transformer-lens's hook names, and back.

Our own taps have one name each in transformer-lens; any other site is called by its hook name already.
"""

import re
from collections.abc import Iterable

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.sites import matches, near_misses

_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "mlp_in": "mlp.hook_in",
    "mlp_hidden": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
}
_OURS = re.compile(r"L(\d+)\.(\w+)")


def tap_of(site: str) -> str:
    """The tap of a site's name, or its hook name without the block: `mlp_in`, `attn.hook_out`."""
    ours = _OURS.fullmatch(site)
    return ours[2] if ours else re.sub(r"^blocks\.\d+\.", "", site)


def hook_name(site: str) -> str:
    """transformer-lens's name: `blocks.5.mlp.hook_in` for `L05.mlp_in`."""
    ours = _OURS.fullmatch(site)
    return f"blocks.{int(ours[1])}.{_HOOKS[ours[2]]}" if ours and ours[2] in _HOOKS else site


def site_of(name: str, sites: Iterable[Site], field: str) -> Site:
    """The stored site that a hook, module or site name means. Raises UserError naming `field` when there is none."""
    known = list(sites)
    for site in known:
        if hook_name(site.name) == name or matches(name, site):
            return site
    names = [site.name for site in known]
    raise UserError(
        f"{field} is {name!r}, which is not in the cache; it holds {', '.join(names[:8])}"
        f"{', …' if len(names) > 8 else ''}.{near_misses(name, names)} Harvest that site (harvest.sites takes hook "
        "names), or say which stored site is meant with --reads and --writes."
    )
