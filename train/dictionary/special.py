"""Settings that only some topologies take: what they are, and why the others refuse them.

A topology's class names those it takes in `admits` (form.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from thresher.cache.errors import UserError
from thresher.train.dictionary.components import FIELDS, Components
from thresher.train.dictionary.topologies import known_topologies, topology


class Special(NamedTuple):
    """A setting, or a value of one, that only some topologies take."""

    field: str
    asked: Callable[[Any], bool]
    """Whether settings ask for it."""
    reason: str
    """Why the others do not."""


def _of_decomposition(field: str) -> Special:
    default = getattr(Components, field)
    return Special(field, lambda s: getattr(s, field) != default, "only a decomposition has components and gates")


SPECIAL = {
    "pre_bias": Special(
        "pre_bias",
        lambda s: bool(s.pre_bias),
        "subtracting the decoder's bias from the input only means something when input and output are the same site",
    ),
    "skip": Special(
        "skip",
        lambda s: bool(s.skip),
        "a linear map of the input needs one input for each output, and another than the output, or the map would be "
        "the identity",
    ),
    "norm": Special("norm", lambda s: s.norm != "joined", "only a row over several sites of equal rank has two norms"),
    "tied": Special(
        "init_decoder",
        lambda s: s.init_decoder == "tied",
        "'tied' needs an encoder's rows to start from, for decoder rows of the same width",
    ),
    "tied_encoder": Special(
        "init_encoder",
        lambda s: s.init_encoder == "tied",
        "'tied' needs one decoder row of the encoder row's width",
    ),
    "unit_per_target": Special(
        "decoder",
        lambda s: getattr(s, "decoder", "") == "unit_per_target" or getattr(s, "unit_per_target", False),
        "'unit_per_target' is a constraint on rows with several targets, known from published CLTs",
    ),
    "transforms": Special("transforms", lambda s: s.transforms is not None, "only a MoLT is made of transforms"),
    "multiples": Special("multiples", lambda s: s.multiples is not None, "only a MoLT is made of transforms"),
    "ranks": Special("ranks", lambda s: s.ranks != type(s).ranks, "only a MoLT is made of transforms"),
    "aux_scope": Special(
        "aux_scope",
        lambda s: s.aux_scope == "all",
        "its dead latents have the residual of one source to explain anyway",
    ),
    **{name: _of_decomposition(name) for name in FIELDS},
    "pool": Special("pool", lambda s: s.pool == "joint", "there is one source for each dictionary: nothing to share"),
}
"""By the name under which a topology `admits` it."""

OF_ROWS = (
    Special(
        "prefixes",
        lambda s: s.prefixes is not None,
        "its latents stand in order of rank, so that a prefix would be the largest ranks alone",
    ),
    Special("resample", lambda s: s.resample > 0, "a new latent starts with a decoder row, and here it has none"),
    Special("penalty_norm", lambda s: s.penalty_norm == "l1", "that is a norm of decoder rows, and here are none"),
)
"""Settings for topologies whose latents write by rows (`Coder.by_rows`)."""


def check_topology(settings: Any, kind: str) -> None:
    """Raise UserError for settings that a topology does not take, and for a firing rule that it refuses."""
    cls = topology(kind)
    for name, special in SPECIAL.items():
        if special.asked(settings) and name not in cls.admits:
            value = getattr(settings, special.field, None)
            known = sorted(known_topologies().items())
            takers = " or ".join(repr(other) for other, its in known if name in its.admits)
            raise UserError(
                f"dictionary.{special.field} is {value!r} for kind = {kind!r}, but {special.reason}. Remove it or set "
                f"kind = {takers}."
            )
    for special in () if cls.by_rows else OF_ROWS:
        if special.asked(settings):
            raise UserError(
                f"dictionary.{special.field} is {getattr(settings, special.field)!r} for kind = {kind!r}, but "
                f"{special.reason}. Remove it, or choose another kind."
            )
    if settings.firing in cls.refuses:
        raise UserError(
            f"dictionary.firing is {settings.firing!r} for kind = {kind!r}, which does not take it: "
            f"{cls.refuses[settings.firing]}. Use {cls.firing!r}, for example."
        )
