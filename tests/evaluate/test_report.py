"""The written forms: nothing lost in JSON, nothing too wide, nothing fetched, nothing unescaped."""

import csv
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from thresher.cache.errors import UserError
from thresher.evaluate.columns import COLUMNS, count, sites_label
from thresher.evaluate.headline import headline
from thresher.evaluate.metrics import SUMS
from thresher.evaluate.page import render
from thresher.evaluate.report import print_table, write_report
from thresher.evaluate.results import DEFINITIONS, Row, from_json, to_json
from thresher.evaluate.run import Replacement
from thresher.evaluate.splice import PROTOCOLS

INS, OUTS = [f"L{i:02d}.mlp_in" for i in range(3)], [f"L{i:02d}.mlp_out" for i in range(3)]
NASTY = "<script>alert('x')</script>|run"


@pytest.fixture(scope="module")
def results(kit, scan):
    def facts(kind, **more):
        return {"kind": kind, "firing": "topk", "runs": ["a/b"], "seed": 0, **more}

    transcoders = [
        Replacement(
            f"transcoder-{scale}",
            tuple(kit.Random([a], [b], seed=i, scale=scale) for i, (a, b) in enumerate(zip(INS, OUTS, strict=True))),
            facts("transcoder"),
        )
        for scale in (0.1, 0.3)
    ]
    sae = Replacement("sae", tuple(kit.Identity([b], [b]) for b in OUTS), facts("sae"))
    clt = Replacement(NASTY, (kit.Random(INS, OUTS, seed=9),), facts("clt"))
    stream = Replacement("stream", (kit.Random(["L00.resid_post"], ["L00.resid_post"]),), facts("sae"))
    return scan([*transcoders, sae, clt, stream], kit.TinyTarget(), kit.contexts())


def printed(results, width, terminal=True):
    console = Console(width=width, force_terminal=terminal, color_system=None, file=io.StringIO())
    print_table(results, console)
    return console.file.getvalue()


def test_json_comes_back_whole(results):
    raw = json.loads(json.dumps(to_json(results), allow_nan=False))
    back = from_json(raw)
    assert back._replace(segments=results.segments) == results
    assert json.loads(json.dumps(to_json(back))) == raw


def test_json_says_what_every_number_rests_on(results):
    raw = to_json(results)
    assert {"rows", "masks", "protocols", "provenance", "definitions", "checks"} <= raw.keys()
    assert {"patch_rule", "score_rule", "scored_tokens", "patched_tokens", "excluded_share", "sha256"} <= raw[
        "masks"
    ].keys()
    assert raw["provenance"]["target"]["name"] == "tiny-3"
    assert raw["provenance"]["dtype"] == "float64"
    assert raw["provenance"]["test"] is True
    assert raw["provenance"]["evaluate"]["resamples"] == 200
    assert all(facts["scored_tokens"] and facts["definition"] for facts in raw["protocols"].values())
    assert all(row["protocol"] in PROTOCOLS for row in raw["rows"])


def test_other_or_newer_json_is_refused():
    with pytest.raises(UserError, match="Give a results"):
        from_json({"format": "something"})
    with pytest.raises(UserError, match="Update"):
        from_json({"format": "thresher.results", "version": 99})


@pytest.mark.parametrize(("width", "terminal"), [(100, True), (80, True), (160, True), (80, False)])
def test_tables_fit_and_keep_the_essentials(results, width, terminal):
    text = printed(results, width, terminal)
    lines = text.splitlines()
    assert max(map(len, lines)) <= (min(width, 100) if terminal else 100)
    assert "…" not in text
    assert "★" in text
    for protocol in PROTOCOLS:
        assert protocol in text
    for word in ("L0", "δ", "95 %", "zero ablation", "mean ablation", "clean"):
        assert word in text


def test_table_is_sorted_by_family_then_l0_with_baselines_last(results):
    rows = results.table("cascade")
    kinds = [row.kind for row in rows]
    assert kinds == sorted(kinds, reverse=True)
    replacements = [row for row in rows if row.kind == "replacement"]
    keys = [(row.sites, row.family, row.cost["l0"]) for row in replacements]
    assert keys == sorted(keys)


def test_fronts_never_mix_protocols_or_sites(results):
    for protocol in PROTOCOLS:
        for sites in {row.sites for row in results.rows if row.kind == "replacement"}:
            group = [row for row in results.table(protocol) if row.kind == "replacement" and row.sites == sites]
            best = min(row.metrics["delta"] for row in group)
            on = [row for row in group if row.front["l0"]]
            assert any(row.metrics["delta"] == best for row in on)
            for row in group:
                beaten = any(
                    o.cost["l0"] <= row.cost["l0"]
                    and o.metrics["delta"] <= row.metrics["delta"]
                    and (o.cost["l0"], o.metrics["delta"]) != (row.cost["l0"], row.metrics["delta"])
                    for o in group
                )
                assert row.front["l0"] == (not beaten)


def test_report_writes_every_form(results, tmp_path):
    paths = write_report(results, tmp_path / "out")
    assert {p.name for p in paths.plots} == {"delta_l0.png", "fvu_l0.png", "fvu_sites.png", "delta_sites.png"}
    for path in (paths.json, paths.csv, paths.markdown, paths.html, paths.segments, *paths.plots):
        assert path.stat().st_size > 500
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths.plots)
    assert not list((tmp_path / "out").glob("*.part"))
    lines = list(csv.DictReader(paths.csv.open()))
    assert len(lines) == len(results.rows)
    row = results.find("sae", "cascade")
    line = next(line for line in lines if line["name"] == "sae" and line["protocol"] == "cascade")
    assert float(line["delta"]) == row.metrics["delta"]
    assert float(line["delta_high"]) == row.intervals["delta"].high
    assert line["fact_kind"] == "sae"


def test_segments_add_up_to_the_table(results, tmp_path):
    paths = write_report(results, tmp_path)
    with np.load(paths.segments, allow_pickle=False) as arrays:
        tokens = arrays["tokens"].sum()
        clean, patched = arrays["arm/clean"].sum(0), arrays["arm/cascade|transcoder-0.3"].sum(0)
    found = results.find("transcoder-0.3", "cascade").metrics
    assert tokens == results.masks["scored_tokens"]
    assert (patched - clean)[SUMS.index("nll")] / tokens == pytest.approx(found["delta"], abs=1e-12)
    assert patched[SUMS.index("agree")] / tokens == pytest.approx(found["agree"])


class Page(HTMLParser):
    """Tags, their nesting, and every reference that a browser would follow."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "action", "data")]
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_fetches_nothing(results):
    text = render(results)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert "@import" not in text
    assert "url(" not in text
    assert text.count("http") == text.count('xmlns="http://www.w3.org/2000/svg"')
    assert "[[" not in text.split("<script>")[0]
    assert page.tags.count("table") == len(PROTOCOLS)


def test_page_escapes_names(results):
    text = render(results)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_page_has_every_column_defined_and_every_replacement_drawn(results):
    text = render(results)
    for column in COLUMNS:
        assert column.key in DEFINITIONS
        assert f">{column.title.replace('>', '&gt;')}<" in text
    assert text.count('data-row="transcoder-0.3"') >= 2 * len(PROTOCOLS) + 3  # points, table rows, site strips


def test_report_of_read_back_results_equals_the_first(results):
    assert render(from_json(json.loads(json.dumps(to_json(results))))) == render(results)


# --- headline -------------------------------------------------------------------------------------------------------


def row(name, family, l0, delta, fvu=0.5, dead=0.0):
    metrics = {"delta": delta, "fvu": fvu, "dead": dead}
    source = {"tokens": 1000.0}
    costs = {"l0": l0}
    rest = ({}, (), (source,), {}, {}, {}, ())
    return Row(name, "replacement", family, "cascade", ("x",), ("y",), metrics, {}, costs, *rest)


def test_headline_says_who_is_best_at_what(results):
    rows = [
        row("sparse", "A", 8, 0.5, fvu=0.4, dead=0.2),
        row("good", "A", 32, 0.2, fvu=0.3, dead=0.1),
        row("close", "B", 9, 0.6, fvu=0.1, dead=0.0),
    ]
    found = {line.title: line for line in headline(results._replace(rows=tuple(rows), pairs=()))}
    assert found["Lowest δ"].name == "good"
    assert found["Best where sparsest"].name == "sparse"
    assert found["Lowest FVU"].name == "close"
    assert found["Fewest dead latents"].name == "close"
    assert "0.5000" in found["Best where sparsest"].text


def test_headline_names_who_fails_to_beat_ablation(results):
    found = [line for line in headline(results) if line.title.startswith("Against ablation")]
    bars = {r.sites: [] for r in results.rows if r.kind == "replacement"}
    for baseline in results.rows:
        if baseline.kind == "baseline" and baseline.name != "clean" and baseline.protocol == "cascade":
            bars[baseline.sites].append(baseline.metrics["delta"])
    worse = [
        r.name for r in results.table("cascade") if r.kind == "replacement" and r.metrics["delta"] >= min(bars[r.sites])
    ]
    assert worse
    for name in worse:
        assert any(name in line.text and "do not beat" in line.text for line in found)


def test_labels():
    assert sites_label(["L00.mlp_out", "L01.mlp_out"]) == "mlp_out L0–1"
    assert sites_label(["L03.mlp_out"]) == "mlp_out L3"
    assert sites_label(["L00.mlp_out", "L02.mlp_out"]) == "mlp_out L0,2"
    assert sites_label(["blocks.0.attn.hook_out"]) == "blocks.0.attn.hook_out"
    assert [count(v) for v in (512, 12_288, 4_194_304)] == ["512", "12.3k", "4.19M"]
