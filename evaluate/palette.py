"""Colours and markers of the families, once for the page and for the pictures.

The hues are those that Okabe and Ito chose to be told apart by colour-blind readers (Color Universal Design, 2008), two
added, in their order of use. On white the light ones are darkened, on dark the dark ones lightened, until each has a
contrast of at least 3 to the card it is drawn on; and every family has a shape of its own besides.
"""

from typing import NamedTuple

CARD_LIGHT, CARD_DARK = "#ffffff", "#1d2127"


class Hue(NamedTuple):
    """How one family is drawn."""

    light: str
    """Colour on a light card and on paper."""
    dark: str
    """Colour on a dark card."""
    marker: str
    """matplotlib's letter for the shape of the same index in `svg.SHAPES`."""


HUES = (
    Hue("#0072b2", "#4ea8e0", "o"),  # blue
    Hue("#d55e00", "#f08a4b", "s"),  # vermillion
    Hue("#009e73", "#35c99c", "^"),  # bluish green
    Hue("#b8568f", "#e29cc6", "D"),  # reddish purple
    Hue("#b57f00", "#e6b84a", "v"),  # orange
    Hue("#3594cb", "#9ad4f5", "P"),  # sky blue
    Hue("#8c6d31", "#c9a766", "H"),
    Hue("#555555", "#b5b5b5", "*"),
)


def hue(index: int) -> Hue:
    """The hue of the family of that index; after eight families they repeat."""
    return HUES[index % len(HUES)]


def stylesheet() -> str:
    """The custom properties `--c0`, `--c1`, … and the classes that use them."""
    names = range(len(HUES))
    properties = " ".join(f"--c{i}: light-dark({HUES[i].light}, {HUES[i].dark});" for i in names)
    classes = " ".join(f".c{i} {{ color: var(--c{i}); }}" for i in names)
    return f":root {{ {properties} }}\n{classes}"
