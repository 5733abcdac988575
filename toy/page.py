"""One page with all figures and verdicts: a file without network and without script.

The reports' own page (`evaluate/page.py`) is built around tables of dictionaries; here are figures and one table of
verdicts each, so this page is its own, in the same colours.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from thresher.evaluate.palette import CARD_DARK, CARD_LIGHT, HUES
from thresher.toy.sizes import Size

if TYPE_CHECKING:
    from thresher.toy.study import Done

STYLE = f"""
:root {{ color-scheme: light dark; --card: light-dark({CARD_LIGHT}, {CARD_DARK});
  --good: light-dark({HUES[2].light}, {HUES[2].dark}); --bad: light-dark({HUES[1].light}, {HUES[1].dark}); }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#f5f6f8, #14171b); color: light-dark(#1d2127, #e4e7eb); }}
section {{ background: var(--card); border-radius: 8px; padding: .6rem 1.4rem 1.2rem; margin: 1.2rem 0; }}
nav a {{ margin-right: 1rem; }}
a {{ color: light-dark({HUES[0].light}, {HUES[0].dark}); }}
figure {{ margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; }}
figure svg {{ width: 100%; height: auto; max-height: 40rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .15rem .9rem .15rem 0; text-align: left; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.ok {{ color: var(--good); }} .miss {{ color: var(--bad); font-weight: 600; }}
.soft {{ color: light-dark(#5b636e, #a2abb6); }}
"""


def render(done: Sequence["Done"], size: Size) -> str:
    """The page of experiments, in order."""
    passed = sum(verdict.passed for one in done for verdict in one.verdicts)
    total = sum(len(one.verdicts) for one in done)
    quick = (
        "Quick form: a fifth of the steps at ten times the rate, wider tolerances; no numbers to cite. "
        if size.quick
        else ""
    )
    contents = "".join(f'<a href="#{one.experiment.name}">{escape(one.experiment.title)}</a>' for one in done)
    sections = "".join(_section(one) for one in done)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Compressed computation</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>Compressed computation</h1><p>A network of {size.neurons} ReLUs asked for {size.features} of them. "
        f"{quick}{passed} of {total} numbers are as expected.</p><nav>{contents}</nav>{sections}</body></html>\n"
    )


def _section(one: "Done") -> str:
    rows = "".join(
        f'<tr><td class="{"ok" if v.passed else "miss"}">{"as expected" if v.passed else "not so"}</td>'
        f'<td>{escape(v.what)}</td><td class="number">{v.measured:.4g}</td>'
        f'<td class="soft">{escape(v.expected)}</td></tr>'
        for v in one.verdicts
    )
    pictures = "".join(
        f"<figure>{_inline(path.read_text(encoding='utf-8'), f'{one.experiment.name}-{path.stem}')}</figure>"
        for path in one.figures
        if path.suffix == ".svg"
    )
    return (
        f'<section id="{one.experiment.name}"><h2>{escape(one.experiment.title)} '
        f'<span class="soft">· {escape(one.experiment.name)}, {escape(one.experiment.also)}</span></h2>'
        f"<p>{escape(one.experiment.lead)}</p>{pictures}<table><tr><th></th><th>number</th><th>measured</th>"
        f'<th>expected</th></tr>{rows}</table><p class="soft">Measured in {one.seconds:,.0f} s.</p></section>'
    )


def _inline(svg: str, prefix: str) -> str:
    """An SVG file as an element; ids get a prefix, since those of several figures would meet."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for before in ('id="', 'href="#', "url(#"):
        body = body.replace(before, f"{before}{prefix}-")
    return body
