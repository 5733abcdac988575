"""From a recipe's tables to the dictionaries to be trained: one per matched site, or a joint one over all of them.

Pure: it sees the cache's sites, not the cache.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.sites import matches, near_misses
from thresher.train.config import TrainConfig
from thresher.train.dictionary.idle import refuse_idle_loss
from thresher.train.dictionary.layerwise import of_layers
from thresher.train.dictionary.spec import DictionaryConfig, DictionarySpec, concrete
from thresher.train.dictionary.topologies import topology


class RunPlan(NamedTuple):
    """One dictionary to be trained."""

    name: str
    """Names the run directory; unique in a sweep."""
    group: str
    """Shared by the dictionaries that form a set: one per layer, all of one tap."""
    spec: DictionarySpec
    """What is trained."""
    train: TrainConfig
    """How."""
    seed: int
    """Of the initial weights and the order of rows."""
    recipe: dict[str, Any]
    """The resolved recipe it came from, JSON values."""


def plan_runs(
    label: str,
    dictionary: DictionaryConfig,
    train: TrainConfig,
    sites: Mapping[str, Site],
    recipe: Mapping[str, Any],
) -> list[RunPlan]:
    """Resolve a [dictionary] table against the sites of a cache: a dictionary for every match, and for a CLT one.

    A pattern that matches several taps makes a set of each.
    Raises UserError when a pattern matches nothing there, when sources and destinations cannot be paired by layer,
    when the sites of a joint dictionary differ in width, and for settings that mean nothing under that [train] table.
    """
    topology(dictionary.kind).check_training(train)
    refuse_idle_loss(dictionary, train)
    pairs = _pairs(dictionary, sites)
    if topology(dictionary.kind).joint:
        return [RunPlan(label, label, _spec(dictionary, pairs), train, train.seed, dict(recipe))]
    several = len({reads.tap for reads, _ in pairs}) > 1
    layers = sorted({reads.layer for reads, _ in pairs})
    of_layer = dict(zip(layers, of_layers(dictionary, len(layers)), strict=True))
    return [
        RunPlan(
            _run_name(label, reads, several),
            f"{label}-{_tap_name(reads)}" if several else label,
            _spec(of_layer[reads.layer], [(reads, writes)]),
            train,
            train.seed,
            dict(recipe),
        )
        for reads, writes in pairs
    ]


def _run_name(label: str, site: Site, several: bool) -> str:
    """The label and the layer, with the tap where there are `several`; outside the layers the tap alone."""
    layer = f"-L{site.layer:02d}" if site.layer >= 0 else ""
    return f"{label}{layer}" + (f"-{_tap_name(site)}" if several or not layer else "")


def _tap_name(site: Site) -> str:
    return site.tap.replace(".", "_")


def _pairs(config: DictionaryConfig, sites: Mapping[str, Site]) -> list[tuple[Site, Site]]:
    """Source and destination of each layer, ascending."""
    kind = topology(config.kind)
    writes_pattern = config.writes or (config.reads if kind.own_site else "") or "mlp_out"
    writes = _matching(writes_pattern, "writes", config.layers, sites)
    if kind.own_site:
        return [(site, site) for site in writes]
    reads = _matching(config.reads or "mlp_in", "reads", config.layers, sites)
    by_layer = {site.layer: site for site in writes}
    if len(by_layer) < len(writes):
        raise UserError(
            f"dictionary.writes = {writes_pattern!r} matches several sites of one layer "
            f"({_listed(site.name for site in writes)}), so sources cannot be paired with them. Name one tap."
        )
    unpaired = sorted({site.layer for site in reads} ^ set(by_layer))
    if unpaired:
        raise UserError(
            f"dictionary.reads matches {_listed(site.name for site in reads)} and dictionary.writes matches "
            f"{_listed(site.name for site in writes)}; layers {unpaired} lack one side. Set dictionary.layers to those "
            "that have both, or harvest the missing sites."
        )
    if kind.joint and len(by_layer) < len(reads):
        raise UserError(
            f"dictionary.reads matches several sites of one layer ({_listed(site.name for site in reads)}); a "
            f"{config.kind} reads one per layer. Name one tap."
        )
    return [(site, by_layer[site.layer]) for site in reads]


def _matching(pattern: str, field: str, layers: tuple[int, ...] | None, sites: Mapping[str, Site]) -> list[Site]:
    """Sites by tap, name or glob, in layer order."""
    hits = [site for site in sites.values() if matches(pattern, site)]
    if not hits:
        known = {name for site in sites.values() for name in (site.tap, site.name, *site.aliases)}
        raise UserError(
            f"dictionary.{field} = {pattern!r} matches no site of the cache.{near_misses(pattern, known)} The cache "
            f"has {_listed(sites)}. Change dictionary.{field}, or add the site to harvest.sites and harvest again."
        )
    if layers is not None:
        missing = sorted(set(layers) - {site.layer for site in hits})
        if missing:
            raise UserError(
                f"dictionary.layers asks for layers {missing}, but the cache has {pattern!r} only at layers "
                f"{sorted({site.layer for site in hits})}. Remove them, or harvest those layers too."
            )
        hits = [site for site in hits if site.layer in layers]
    return sorted(hits, key=lambda site: (site.layer, site.name))


def _spec(config: DictionaryConfig, pairs: list[tuple[Site, Site]]) -> DictionarySpec:
    for side, field in ((0, "reads"), (1, "writes")):
        widths = {pair[side].width for pair in pairs}
        if len(widths) > 1:
            raise UserError(
                f"dictionary.{field} matches sites of different widths ({sorted(widths)}) for kind = {config.kind!r}, "
                "which needs one width at all of them. Narrow it with dictionary.layers or another site."
            )
    kind, (read, written) = topology(config.kind), pairs[0]
    sizes = kind.sizes(config, read.width)
    if not isinstance(latents := sizes["n_latents"], int) or latents < 1:
        raise UserError(f"dictionary.n_latents resolves to {sizes['n_latents']}; expected 1 or more.")
    unit = kind.unit_rows if config.decoder == "auto" else config.decoder == "unit"
    return concrete(
        config,
        kind=config.kind,
        reads=tuple(pair[0].name for pair in pairs),
        writes=tuple(pair[1].name for pair in pairs),
        layers=tuple(pair[0].layer for pair in pairs),
        d_in=kind.width(read.width, len(pairs)),
        d_out=written.width,
        **sizes,
        unit_norm=unit,
        unit_per_target=config.decoder == "unit_per_target",
    )


def _listed(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message, cut short."""
    some = list(names)
    return ", ".join(some[:limit]) + (f" and {len(some) - limit} more" if len(some) > limit else "")
