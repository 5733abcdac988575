"""Which firing rules there are, by name: those of this package, and those that a user's module registers."""

from typing import TYPE_CHECKING, TypeVar

from thresher.cache.errors import UserError
from thresher.cache.records import nearest

if TYPE_CHECKING:
    from thresher.train.dictionary.rules.base import Rule

R = TypeVar("R", bound="type[Rule]")

_RULES: dict[str, "type[Rule]"] = {}


def register(rule: R) -> R:
    """Make a rule known by its `name`; a decorator. Raises UserError for a name that is taken or missing."""
    if not rule.name:
        raise UserError(f"Firing rule {rule.__qualname__} has no name. Give the class an attribute name = '…'.")
    other = _RULES.get(rule.name)
    if other is not None and (other.__module__, other.__qualname__) != (rule.__module__, rule.__qualname__):
        raise UserError(
            f"There is a firing rule {rule.name!r} already ({other.__module__}.{other.__qualname__}). Give "
            f"{rule.__module__}.{rule.__qualname__} another name."
        )
    _RULES[rule.name] = rule
    return rule


def names() -> list[str]:
    """Names of all registered rules, in the order of their registration."""
    return list(_RULES)


def known(name: str) -> "type[Rule]":
    """The rule of a name. Raises UserError with near misses."""
    if name not in _RULES:
        raise UserError(
            f"dictionary.firing is {name!r}; expected one of {', '.join(_RULES)}.{nearest(name, _RULES)} A rule of "
            "your own comes with --plugin FILE.py."
        )
    return _RULES[name]


def users(setting: str) -> list[str]:
    """Names of the rules that have a use for a setting."""
    return [name for name, rule in _RULES.items() if setting in rule.uses]


def facts(name: str) -> "type[Rule]":
    """The rule of a name; one that is not registered counts as the base class, about which nothing is known.

    A saved dictionary may name such a rule: it carries constant thresholds and needs none of the rule's own code.
    """
    return _RULES.get(name) or _base()


def _base() -> "type[Rule]":
    from thresher.train.dictionary.rules.base import Rule

    return Rule
