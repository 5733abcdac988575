"""Which baselines stand beside the dictionaries of an evaluation, as replacements that the same passes measure.

Every set of written sites gets its own: the largest neurons of the MLPs whose outputs it writes, and the best affine
map from what it reads. baselines.py says what they are, fitting.py what is learned from training rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

from thresher.cache.contracts import Site, Target
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.records import fingerprint
from thresher.evaluate import splice
from thresher.evaluate.arms import means_of, protocols_of
from thresher.evaluate.baselines import Neurons, Pair, neuron_sites, pairs
from thresher.evaluate.checks import Replacement
from thresher.evaluate.costs import neuron_costs
from thresher.evaluate.fitting import Fitted, arrays, fit, restored
from thresher.evaluate.masks import text_hash
from thresher.evaluate.store import Store
from thresher.evaluate.tally import SUMS_VERSION


class Baselines(NamedTuple):
    """What stands beside the dictionaries."""

    replacements: list[Replacement]
    sites: dict[str, Site]
    """What they read and write."""
    notes: list[str]
    """Which could not be made, and why."""


def learned(
    replacements: Sequence[Replacement], target: Target, training: Contexts | None, tokens: int, store: Store | None
) -> Fitted:
    """What training rows say, or nothing without them; a store remembers it."""
    if training is None or tokens == 0:
        return Fitted({}, {}, {})
    wanted = list(dict.fromkeys(pair for r in replacements for pair in pairs(r.dictionaries)))
    written = list(dict.fromkeys(site for r in replacements for site in means_of(r)))
    key = fingerprint(
        {
            "version": SUMS_VERSION,
            "target": dict(target.identity),
            "text": text_hash(training),
            "pairs": [list(pair) for pair in wanted],
            "sites": written,
            "tokens": tokens,
        }
    )[:40]
    known = None if store is None else store.get(key)
    if known is not None:
        return restored(known, target.device)
    found = fit(target, training, wanted, written, tokens=tokens)
    if store is not None:
        store.set(key, arrays(found))
    return found


def baselines(replacements: Sequence[Replacement], target: Target, fitted: Fitted, neurons: Sequence[int]) -> Baselines:
    """Neurons and affine maps for every set of written sites, each once."""
    out = Baselines([], {}, [])
    run: dict[tuple[str, ...], tuple[str, ...]] = {}  # by written sites, protocols that some replacement is run under
    for replacement in replacements:
        written = tuple(means_of(replacement))
        own = protocols_of(replacement, splice.PROTOCOLS)
        run[written] = tuple(p for p in splice.PROTOCOLS if p in own or p in run.get(written, ()))
    seen: set[tuple[object, ...]] = set()
    for replacement in replacements:
        written = tuple(means_of(replacement))
        if neurons and written not in seen:
            seen.add(written)
            _add_neurons(out, replacement, target, neurons, run[written])
        read = tuple(pair for pair in pairs(replacement.dictionaries) if pair in fitted.affine)
        if len(read) == len(written) and read not in seen:
            seen.add(read)
            out.replacements.append(_affine(replacement, fitted, read)._replace(protocols=run[written]))
    return out


def _add_neurons(
    out: Baselines, replacement: Replacement, target: Target, neurons: Sequence[int], protocols: tuple[str, ...]
) -> None:
    means = means_of(replacement)
    outputs = {site.name: site for site in target.sites(list(means))}
    names = neuron_sites([outputs[site] for site in means])
    if names is None:
        return
    try:
        hidden = {site.name: site for site in target.sites(names)}
    except UserError as error:
        out.notes.append(f"No neuron baseline: {error}")
        return
    out.sites.update(hidden)
    reads = {site.layer: site.width for site in target.sites([f"L{s.layer:02d}.mlp_in" for s in outputs.values()])}
    widths = [(reads[outputs[site].layer], outputs[site].width) for site in means]
    for k in neurons:
        if k > min(site.width for site in hidden.values()):
            out.notes.append(f"No baseline of {k} neurons: the MLPs have {min(s.width for s in hidden.values())}.")
            continue
        cost = neuron_costs(k, widths, gated=target.gated_mlp)
        facts: dict[str, object] = {"title": f"neurons k={k}", "k": k, "cost": cost}
        parts = tuple(Neurons(hidden[name], k) for name in names)
        name = f"neurons k={k} at {','.join(means)}"
        out.replacements.append(Replacement(name, parts, facts, f"neurons {k}", True, means, protocols))


def _affine(replacement: Replacement, fitted: Fitted, read: Sequence[Pair]) -> Replacement:
    means = means_of(replacement)
    content = fingerprint({"fitted": fitted.facts, "pairs": [list(pair) for pair in read]})
    parts = tuple(fitted.affine[pair] for pair in read)
    name = f"affine at {','.join(pair.read for pair in read)} > {','.join(means)}"
    return Replacement(name, parts, {"title": "affine"}, content, baseline=True, means=means)
