"""The written forms: nothing lost in JSON, nothing too wide, nothing fetched, nothing unescaped."""

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from tests.evaluate.sweep import sweep
from thresher.cache.errors import UserError
from thresher.evaluate.columns import chance_text, count, label, sites_label
from thresher.evaluate.costs import AXES
from thresher.evaluate.headline import headline
from thresher.evaluate.metrics import SUMS
from thresher.evaluate.report import print_table, write_report
from thresher.evaluate.results import Row, from_json, to_json
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


@pytest.mark.parametrize("made", ["run", "made up"])
@pytest.mark.parametrize(("width", "terminal"), [(100, True), (80, True), (160, True), (80, False)])
def test_tables_fit_and_keep_the_essentials(results, made, width, terminal):
    results = results if made == "run" else sweep(many=True)
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
    expected = {"delta_l0", "fvu_l0", "fvu_sites", "delta_sites", "delta_positions", "write_norms"}
    assert {p.stem for p in paths.plots} == expected
    for path in (paths.json, paths.csv, paths.markdown, paths.latex, paths.html, paths.segments, *paths.plots):
        assert path.stat().st_size > 500
    for path in paths.plots:
        assert path.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml"}[path.suffix])
    assert not list((tmp_path / "out").glob("*.part"))
    lines = list(csv.DictReader(paths.csv.open()))
    assert len(lines) == len(results.rows)
    row = results.find("sae", "cascade")
    line = next(line for line in lines if line["name"] == "sae" and line["protocol"] == "cascade")
    assert float(line["delta"]) == row.metrics["delta"]
    assert float(line["delta_high"]) == row.intervals["delta"].high
    assert line["fact_kind"] == "sae"


@pytest.mark.usefixtures("no_pictures")
def test_csv_gives_the_chance_of_the_front_by_cost(tmp_path):
    made = sweep(protocols=("cascade",))
    lines = list(csv.DictReader(write_report(made, tmp_path).csv.open()))
    for line in lines:
        row = made.find(line["name"], "cascade")
        if row.kind == "replacement":
            assert {axis: float(line[f"chance_{axis}"]) for axis in AXES} == row.chance
        else:
            assert line["chance_l0"] == ""


@pytest.mark.usefixtures("no_pictures")
def test_segments_add_up_to_the_table(results, tmp_path):
    paths = write_report(results, tmp_path)
    with np.load(paths.segments, allow_pickle=False) as arrays:
        tokens = arrays["tokens"].sum()
        clean, patched = arrays["arm/clean"].sum(0), arrays["arm/cascade|transcoder-0.3"].sum(0)
    found = results.find("transcoder-0.3", "cascade").metrics
    assert tokens == results.masks["scored_tokens"]
    assert (patched - clean)[SUMS.index("nll")] / tokens == pytest.approx(found["delta"], abs=1e-12)
    assert patched[SUMS.index("agree")] / tokens == pytest.approx(found["agree"])


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
    assert [chance_text(v) for v in (0, 0.001, 0.5, 0.999, 1)] == ["0%", "<1%", "50%", ">99%", "100%"]


def test_rows_are_called_what_they_are():
    made = sweep(protocols=("cascade",))
    called = {label(row) for row in made.rows if row.kind == "baseline"}
    assert called == {"clean", "zero ablation", "mean ablation", "affine"} | {f"neurons k={k}" for k in (8, 16, 32, 64)}
    assert label(made.find("zero", "cascade"), several=True) == "zero ablation (mlp_out L0–3)"
    replaced = made.rows[0]._replace(name="zero")  # a run may be called like a baseline
    assert label(replaced, several=True) == "zero"
