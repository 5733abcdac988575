"""The firing rules: which latents of a token are active, and how active.

A rule is a class that `register` makes known by its name; a recipe's `dictionary.firing` names it. What is known of it
without an instance (whether k or a penalty sets its sparsity, whether it freezes to a constant threshold) stands on the
class, so that spec.py checks a recipe without tables of its own. A user's module adds rules the same way:

    from thresher.train.dictionary.rules import Rule, register

    @register
    class Halves(Rule):
        name = "halves"
        …

and `thresher --plugin FILE.py …` imports it before the recipe is read.
"""

from typing import TYPE_CHECKING

from thresher.cache.errors import UserError
from thresher.train.dictionary.rules.base import Deployed, Line, Rule, Seen
from thresher.train.dictionary.rules.controlled import Global
from thresher.train.dictionary.rules.counted import BatchTopK, GroupMax, TopK
from thresher.train.dictionary.rules.gated import Gated
from thresher.train.dictionary.rules.gates import Gate
from thresher.train.dictionary.rules.penalised import JumpReLU, ReLU
from thresher.train.dictionary.rules.registry import facts, known, names, register, users

if TYPE_CHECKING:
    from thresher.train.dictionary.spec import DictionarySpec

__all__ = [
    "BatchTopK",
    "Deployed",
    "Gate",
    "Gated",
    "Global",
    "GroupMax",
    "JumpReLU",
    "Line",
    "ReLU",
    "Rule",
    "Seen",
    "TopK",
    "facts",
    "known",
    "names",
    "register",
    "rule",
    "users",
]


def rule(spec: "DictionarySpec", deployed: bool) -> Rule:
    """The rule a spec names; deployed, one that freezes to a constant threshold is that threshold.

    Raises UserError when the rule is not registered and would be needed itself.
    """
    found = facts(spec.firing)
    if deployed and found.thresholded:
        return Deployed(spec)
    if found.name != spec.firing:
        raise UserError(
            f"Firing rule {spec.firing!r} is not known here, so its dictionaries can be used but not trained. Give the "
            "file that defines it with --plugin FILE.py."
        )
    return found(spec)
