"""Which experiments there are, in the order they run."""

from thresher.cache.errors import UserError
from thresher.cache.records import nearest
from thresher.toy.experiments import compare, factors, mixing, offset, optimum, rank, sparsity
from thresher.toy.experiments.base import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    each.name: each
    for each in (
        sparsity.EXPERIMENT,
        mixing.EXPERIMENT,
        mixing.TRANSPLANT,
        optimum.EXPERIMENT,
        offset.EXPERIMENT,
        factors.EXPERIMENT,
        rank.EXPERIMENT,
        rank.SEEDED,
        compare.EXPERIMENT,
    )
}
ALL = "all"


def chosen(name: str) -> list[Experiment]:
    """The experiment of a name, or of its name in the published study; all for `all`. Raises UserError for others."""
    if name == ALL:
        return list(EXPERIMENTS.values())
    also = {each.also: each for each in EXPERIMENTS.values()}
    found = EXPERIMENTS.get(name) or also.get(name)
    if found is None:
        known = [*EXPERIMENTS, ALL]
        raise UserError(
            f"There is no toy experiment {name!r}.{nearest(name, known)} Expected one of {', '.join(known)}, or a name "
            f"of the published study ({', '.join(also)})."
        )
    return [found]
