"""Names of sites as other tools know them: transformer-lens's hook names and modules, and back.

Our own taps have one name each in transformer-lens; any other site is called by its hook name already. Tools that hook
modules know a site as what goes into one or comes out of it.
"""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

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
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(\w+))?")
_PARTS = {"mlp": "mlp", "attn": "attn", "self_attn": "attn", "attention": "attn"}
"""A block's modules by the names that models give them."""

Side = Literal["input", "output"]


class Port(NamedTuple):
    """A site as a side of a module."""

    module: str
    """`layers.5`, `layers.5.mlp`, `layers.5.attn`, whatever the model at hand calls it."""
    side: Side


_PORTS: dict[str, tuple[str, Side]] = {
    "hook_resid_pre": ("", "input"),
    "hook_resid_post": ("", "output"),
    "mlp.hook_in": (".mlp", "input"),
    "hook_mlp_out": (".mlp", "output"),
    "mlp.hook_out": (".mlp", "output"),
    "hook_attn_out": (".attn", "output"),
    "attn.hook_out": (".attn", "output"),
}
"""By hook name within a block. Where a hook has two names the first stands for both."""


def tap_of(site: str) -> str:
    """The tap of a site's name, or its hook name without the block: `mlp_in`, `attn.hook_out`."""
    ours = _OURS.fullmatch(site)
    return ours[2] if ours else re.sub(r"^blocks\.\d+\.", "", site)


def hook_name(site: str) -> str:
    """transformer-lens's name: `blocks.5.mlp.hook_in` for `L05.mlp_in`."""
    ours = _OURS.fullmatch(site)
    return f"blocks.{int(ours[1])}.{_HOOKS[ours[2]]}" if ours and ours[2] in _HOOKS else site


def layer_of(site: str) -> int:
    """The block that a site's or hook's name says; 0 where it says none."""
    found = _BLOCK.fullmatch(hook_name(site))
    return int(found[1]) if found else 0


def port_of(site: str) -> Port | None:
    """The module and its side that a site is; None: it is no module's."""
    found = _BLOCK.fullmatch(hook_name(site))
    if found is None or found[2] not in _PORTS:
        return None
    module, side = _PORTS[found[2]]
    return Port(f"layers.{found[1]}{module}", side)


def hook_of(port: Port) -> str:
    """The hook name of a module's side, or the module's name where it is not one that has a hook."""
    found = _MODULE.fullmatch(port.module)
    if found is None or (found[2] is not None and found[2] not in _PARTS):
        return port.module
    part = "" if found[2] is None else f".{_PARTS[found[2]]}"
    for name, known in _PORTS.items():
        if known == (part, port.side):
            return f"blocks.{found[1]}.{name}"
    return port.module


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
