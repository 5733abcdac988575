"""The tables for papers: every row whole, every caption with what its numbers rest on, every character printed."""

import re

from tests.evaluate.sweep import sweep
from thresher.evaluate import latex
from thresher.evaluate.results import PROTOCOLS


def test_latex_rows_have_as_many_cells_as_the_table_columns() -> None:
    text = latex.tables(sweep())
    found = re.findall(r"\\begin\{tabular\}\{@\{\}(\w+)@\{\}\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(found) == len(PROTOCOLS)
    for columns, body in found:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) == 1 + 2 + 15 + 9  # head, two sets of sites, replacements, baselines
        for line in lines:
            span = re.match(r"\\multicolumn\{(\d+)\}", line)
            assert (int(span[1]) if span else line.count(" & ") + 1) == len(columns)
        assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 2, 1]


def test_latex_captions_say_what_the_numbers_rest_on() -> None:
    captions = re.findall(r"\\caption\{(.*)\}", latex.tables(sweep()))
    for protocol, caption in zip(PROTOCOLS, captions, strict=True):
        for words in (
            protocol.replace("_", r"\_"),
            "48,000",
            "39 documents",
            "e1551a03629f",
            "bootstrap",
            "Patched: keep",
        ):
            assert words in caption


def test_latex_escapes_every_character_that_tex_reads() -> None:
    nasty = "a_b%&$#{}~^\\<>|é"
    text = latex.escaped(nasty)
    assert text == (
        r"a\_b\%\&\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}\textless{}\textgreater{}\textbar{}é"
    )
    made = sweep(protocols=("cascade",))
    named = made._replace(rows=tuple(row._replace(name=nasty) if row.name == "stream_16" else row for row in made.rows))
    written = latex.tables(named)
    assert text in written
    assert nasty not in written
    bare = re.sub(r"\\[{}]", "", written)
    assert bare.count("{") == bare.count("}")
    assert not set(written) & set("δ★–Σ")
