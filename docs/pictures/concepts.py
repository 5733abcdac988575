"""Draws the diagrams of docs/concepts.md: `python docs/pictures/concepts.py` writes them beside this file.

Plain SVG from a few shapes, so that a diagram is changed where its words are.
"""

from pathlib import Path
from typing import NamedTuple

INK, SOFT, PAPER = "#1f2937", "#6b7280", "#ffffff"
BLUE, GREEN, ORANGE, GREY = "#dbeafe", "#dcfce7", "#ffedd5", "#f3f4f6"


class Drawing:
    """Shapes on a sheet, in the order they were added."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size = (width, height)
        self.title = title
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, text: str, fill: str = GREY, small: str = "") -> None:
        """A rounded box with a centred line, and a smaller one below it."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{INK}" stroke-width="1.2"/>'
        )
        middle = y + h / 2 + (0 if small else 4.5)
        self.text(x + w / 2, middle, text)
        if small:
            self.text(x + w / 2, middle + 15, small, size=11, colour=SOFT)

    def text(self, x: float, y: float, text: str, size: int = 13, colour: str = INK, anchor: str = "middle") -> None:
        """One line."""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{text}</text>'
        )

    def arrow(self, *points: tuple[float, float], colour: str = INK, dashed: bool = False) -> None:
        """A line through points, with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"{dash} '
            f'marker-end="url(#{"soft" if colour == SOFT else "head"})"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, width: float = 1.2, colour: str = INK) -> None:
        """A plain line."""
        self.parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{width}"/>')

    def write(self, path: Path) -> None:
        """The file."""
        w, h = self.size
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
            for name, colour in (("head", INK), ("soft", SOFT))
        )
        body = "\n".join(self.parts)
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" '
            f'font-family="system-ui, sans-serif"><title>{self.title}</title><defs>{heads}</defs>\n'
            f'<rect width="{w}" height="{h}" rx="10" fill="{PAPER}"/>\n{body}\n</svg>\n'
        )


def flow() -> Drawing:
    """The three stages and what lies between them."""
    d = Drawing(860, 190, "Text through the model into a cache, many dictionaries from it, back into the model")
    d.box(20, 60, 90, 50, "text")
    d.arrow((110, 85), (138, 85))
    d.box(140, 60, 110, 50, "target", BLUE, "one pass")
    d.arrow((250, 85), (278, 85))
    d.box(280, 45, 130, 80, "cache", ORANGE, "rows of all sites")
    d.arrow((410, 85), (438, 85))
    for i, name in enumerate(("SAE", "transcoder", "CLT", "…")):
        d.box(440, 12 + 38 * i, 120, 32, name, GREEN)
    d.arrow((560, 85), (588, 85))
    d.box(590, 60, 110, 50, "target", BLUE, "patched")
    d.arrow((700, 85), (728, 85))
    d.box(730, 60, 110, 50, "report", GREY, "δ, L0, FVU, …")
    for x, word in ((170, "thresher harvest"), (498, "thresher train"), (700, "thresher evaluate")):
        d.text(x, 180, word, size=12, colour=SOFT)
    return d


class Block(NamedTuple):
    """Where a layer of a small model stands in a drawing."""

    x: float
    y: float


def dictionaries() -> Drawing:
    """What each kind reads and writes."""
    d = Drawing(860, 250, "What an SAE, a transcoder, a skip transcoder, a CLT and a crosscoder read and write")
    kinds = (("SAE", "sae"), ("transcoder", "transcoder"), ("with skip", "skip"), ("CLT", "clt"), ("crosscoder", "cc"))
    for i, (word, kind) in enumerate(kinds):
        x = 20 + i * 168
        d.text(x + 74, 24, word, size=14)
        for layer in range(2 if kind in ("clt", "cc") else 1):
            _layer(d, Block(x, 150 - 100 * layer + (0 if kind in ("clt", "cc") else -40)), kind, layer)
        if kind == "clt":
            d.arrow((x + 108, 141), (x + 140, 141), (x + 140, 110))
        if kind == "cc":
            d.box(x + 46, 112, 60, 30, "z", GREEN)
            for y in (89, 189):
                d.arrow((x + 10, y), (x - 4, y), (x - 4, 127), (x + 44, 127))
                d.arrow((x + 106, 127), (x + 154, 127), (x + 154, y), (x + 142, y))
    d.text(430, 240, "grey: a site of the model · green: latents · arrows: what is read and what is written", 12, SOFT)
    return d


def _layer(d: Drawing, at: Block, kind: str, layer: int) -> None:
    """One layer: its sites and, where it has them, its own latents."""
    x, y = at
    if kind == "cc":
        d.box(x + 10, y + 24, 130, 30, f"resid, layer {layer}", GREY)
        return
    if kind == "sae":
        d.box(x + 10, y + 60, 130, 30, "resid_post", GREY)
        d.box(x + 46, y, 60, 30, "z", GREEN)
        d.arrow((x + 30, y + 60), (x + 30, y + 15), (x + 44, y + 15))
        d.arrow((x + 106, y + 15), (x + 122, y + 15), (x + 122, y + 58))
        return
    tall = 12 if kind == "clt" else 0
    d.box(x + 4, y + 40 - tall, 58, 30, "mlp_in", GREY)
    d.box(x + 90, y + 40 - tall, 62, 30, "mlp_out", GREY)
    d.box(x + 48, y + 2 - tall * 2, 60, 26, "z", GREEN)
    d.arrow((x + 28, y + 40 - tall), (x + 28, y + 15 - tall * 2), (x + 46, y + 15 - tall * 2))
    d.arrow((x + 108, y + 15 - tall * 2), (x + 120, y + 15 - tall * 2), (x + 120, y + 38 - tall))
    if kind == "skip":
        d.arrow((x + 33, y + 70), (x + 33, y + 88), (x + 121, y + 88), (x + 121, y + 72), dashed=True)
        d.text(x + 77, y + 104, "W_skip x", size=11, colour=SOFT)


def protocols() -> Drawing:
    """How reconstructions are put into the model under each protocol."""
    d = Drawing(860, 210, "single_site, clean_input and cascade")
    for i, (word, note) in enumerate(
        (
            ("single_site", "one layer at a time is replaced"),
            ("clean_input", "all, computed from the clean model"),
            ("cascade", "all, each from what the others left"),
        )
    ):
        x = 20 + i * 282
        d.text(x + 128, 24, word, size=14)
        d.text(x + 128, 198, note, size=12, colour=SOFT)
        for layer in range(3):
            y = 132 - 44 * layer
            replaced = word != "single_site" or layer == 1
            d.line(x + 60, y + 46, x + 60, y - 2, 1.6)
            d.box(x + 82, y + 6, 78, 28, "ŷ" if replaced else "MLP", GREEN if replaced else GREY)
            clean = word == "clean_input"
            start = x + 206 if clean else x + 60
            d.arrow((start, y + 20), (x + (162 if clean else 80), y + 20), colour=SOFT if clean else INK, dashed=clean)
            d.arrow((x + 120, y + 6), (x + 120, y - 4), (x + 62, y - 4))
        if word == "clean_input":
            d.line(x + 206, 40, x + 206, 178, 1.6, SOFT)
            d.text(x + 212, 110, "clean", size=11, colour=SOFT, anchor="start")
    return d


def cache() -> Drawing:
    """How contexts become shuffled shards, and batches come out of them."""
    d = Drawing(860, 190, "Rows are permuted as they are written; batches take rows from 64 chunks at once")
    colours = (BLUE, GREEN, ORANGE, "#fce7f3")
    for i, colour in enumerate(colours):
        for j in range(6):
            d.parts.append(f'<rect x="{20 + 22 * j}" y="{30 + 30 * i}" width="20" height="20" fill="{colour}"/>')
    d.text(86, 20, "contexts, in order", size=12, colour=SOFT)
    d.arrow((165, 85), (238, 85))
    d.text(202, 72, "keyed", size=11, colour=SOFT)
    d.text(202, 104, "permutation", size=11, colour=SOFT)
    mixed = [(7 * n + 3 * (n // 4)) % 4 for n in range(24)]
    for n, which in enumerate(mixed):
        row, column = divmod(n, 6)
        d.parts.append(
            f'<rect x="{250 + 22 * column}" y="{30 + 30 * row}" width="20" height="20" fill="{colours[which]}"/>'
        )
        if column == 5:
            d.parts.append(
                f'<rect x="247" y="{27 + 30 * row}" width="134" height="26" rx="4" fill="none" stroke="{INK}"/>'
            )
    d.text(314, 20, "chunks of a shard, checksummed", size=12, colour=SOFT)
    d.arrow((388, 85), (468, 85))
    d.text(428, 72, "64 chunks", size=11, colour=SOFT)
    d.text(428, 104, "in turn", size=11, colour=SOFT)
    for row in range(3):
        for column in range(8):
            which = (5 * column + 3 * row + column // 3) % 4
            d.parts.append(
                f'<rect x="{480 + 22 * column}" y="{45 + 30 * row}" width="20" height="20" fill="{colours[which]}"/>'
            )
        d.parts.append(f'<rect x="477" y="{42 + 30 * row}" width="178" height="26" rx="4" fill="none" stroke="{INK}"/>')
    d.text(566, 20, "batches", size=12, colour=SOFT)
    d.arrow((662, 85), (698, 85))
    d.box(700, 40, 140, 90, "every dictionary", GREEN, "of the sweep")
    d.text(
        430,
        176,
        "each colour is one context: the text is torn apart before it is stored, and again when it is read",
        12,
        SOFT,
    )
    return d


def main() -> None:
    """Write all of them."""
    for draw in (flow, dictionaries, protocols, cache):
        draw().write(Path(__file__).with_name(f"{draw.__name__}.svg"))


if __name__ == "__main__":
    main()
