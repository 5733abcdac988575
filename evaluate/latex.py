"""The tables as LaTeX for a paper: one `table` per protocol with a caption that says what its numbers rest on.

`results.tex` is made to be `\\input`; it needs the packages booktabs and amssymb (for the star), and any engine. Its
head shows the smallest document around it. Names are escaped, so they may hold any character that TeX gives a meaning.
"""

from collections.abc import Sequence

from thresher.evaluate.columns import STAR, Column, filled, interval_text, label, sites_label, star
from thresher.evaluate.results import Results, Row

SHOWN = ("chance", "l0", "delta", "kl", "agree", "fvu", "dead")
"""Columns of the tables: as many as a column of `article` is wide, beside names of some thirty letters."""
HEAD = r"""% Tables of an evaluation, to be \input. The smallest document around them:
%
%   \documentclass{article}
%   \usepackage{booktabs,amssymb}
%   \begin{document}\input{results}\end{document}
"""
SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "–": "--", "—": "---", "…": r"\ldots{}", "×": r"$\times$",
    "δ": r"$\delta$", "Σ": r"$\Sigma$", "‖": r"$\|$", STAR: r"$\bigstar$",
}  # fmt: skip
"""Characters that TeX reads as commands, and those of ours that plain fonts lack."""


def escaped(text: str) -> str:
    """Text that TeX prints as it is."""
    return "".join(SPECIAL.get(character, character) for character in text)


def tables(results: Results) -> str:
    """The whole file."""
    return "\n".join([HEAD, *(_table(results, protocol) for protocol in results.protocols)])


def _table(results: Results, protocol: str) -> str:
    columns = [column for column in filled(results.rows) if column.key in SHOWN]
    titles = ["", "replacement"]
    for column in columns:
        titles += [column.title, "95 %"] if column.key == "delta" else [column.title]
    rows = results.table(protocol)
    several = len({row.sites for row in rows if row.kind == "replacement"}) > 1
    body: list[str] = []
    previous: tuple[object, ...] | None = None
    for row in rows:
        section = (row.kind, row.sites if several else ())
        if section != previous and previous is not None and section[0] != previous[0]:
            body.append(r"\midrule")
        if several and section != previous and row.kind == "replacement":
            body.append(rf"\multicolumn{{{len(titles)}}}{{l}}{{\itshape {escaped(sites_label(row.sites))}}} \\")
        previous = section
        body.append(_line(row, columns, several))
    heads = " & ".join(escaped(title) for title in titles)
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering\scriptsize\setlength{\tabcolsep}{2.8pt}\setlength{\belowcaptionskip}{4pt}",
            rf"\caption{{{_caption(results, protocol)}}}",
            rf"\label{{tab:{''.join(c for c in protocol if c.isalnum())}}}",
            rf"\begin{{tabular}}{{@{{}}ll{'r' * (len(titles) - 2)}@{{}}}}",
            r"\toprule",
            rf"{heads} \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _line(row: Row, columns: Sequence[Column], several: bool) -> str:
    cells = [star(row), label(row, several)]
    for column in columns:
        cells.append(column.text(row))
        if column.key == "delta":
            cells.append("" if row.kind == "baseline" and row.name == "clean" else interval_text(row))
    return " & ".join(escaped(cell) for cell in cells) + r" \\"


def _caption(results: Results, protocol: str) -> str:
    """Target, protocol, text and masks: what the numbers of a table rest on."""
    facts, masks = results.protocols[protocol], results.masks
    target = str(results.provenance.get("target", {}).get("name", "the target"))
    unit = masks["unit"] + "s" * (facts["units"] != 1)
    few = " Few units: intervals are rough." if facts["few_units"] else ""
    text = (
        f"Replacements in {target} under the protocol {protocol}. {facts['definition']} Text: "
        f"{facts['scored_tokens']:,} held-out tokens in {facts['rows']:,} rows ({facts['units']:,} {unit}; "
        f"SHA-256 of the rows {str(masks.get('sha256', ''))[:12]}). Patched: {masks.get('patch_rule', '')}. Scored: "
        f"{masks.get('score_rule', '')}. Intervals: 95 %, paired bootstrap over {unit}.{few} {STAR}: Pareto front of δ "
        "against L0; P: share of resamples on it."
    )
    return escaped(text)
