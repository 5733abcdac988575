"""Where a recipe comes from, what it costs, what was published of it, and what of that it does not reproduce."""

from dataclasses import dataclass
from typing import Literal

from thresher.cache.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What is known of a recipe beside its settings: the table [reference]. No stage reads it, and no run stores it."""

    source: str = "Thresher"
    """The system whose settings these are, with version or date."""

    variant: Literal["own", "faithful", "corrected"] = "own"
    """faithful: the source's settings, in arithmetic that is right (see `differs`). corrected: the same without the
    faults that are known of them. own: nobody else's."""

    layers: int | None = None
    """Blocks of the target; with `width`, `thresher recipes check` resolves sites without loading it."""

    width: int | None = None
    """Dimensions of the target's residual stream."""

    compute: str = ""
    """How long the source trains: tokens, steps, hardware."""

    result: str = ""
    """Published numbers, each with its protocol; or that there are none."""

    differs: str = ""
    """What is not as in the source, or, of a corrected variant, as in the faithful one."""

    def __post_init__(self) -> None:
        for name in ("layers", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"reference.{name} is {value}; expected 1 or more.")
        if (self.layers is None) != (self.width is None):
            raise UserError(
                f"[reference] has layers = {self.layers} and width = {self.width}; expected both or neither: sites "
                "follow from the two together."
            )
        missing = [name for name in ("compute", "result", "differs") if not getattr(self, name)]
        if self.variant != "own" and missing:
            raise UserError(
                f"reference.variant is {self.variant!r}, but {', '.join(missing)} is empty. Say what is known, or that "
                "nothing is."
            )
