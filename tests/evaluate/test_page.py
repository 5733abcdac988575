"""The page without a browser: whole markup, nothing fetched, nothing unescaped, every number from the results."""

import json
import math
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from tests.evaluate.sweep import sweep
from thresher.evaluate import scales, svg
from thresher.evaluate.columns import COLUMNS, MEANING, count
from thresher.evaluate.costs import AXES
from thresher.evaluate.page import render
from thresher.evaluate.palette import CARD_DARK, CARD_LIGHT, HUES
from thresher.evaluate.results import PROTOCOLS, Results, from_json, to_json
from thresher.evaluate.views import keys, panel, site_sets

NASTY = "</script><script>alert('x')</script>|[[title]]"
ALWAYS = {"costs", "words", "origin"}


@pytest.fixture(scope="module")
def results() -> Results:
    return sweep()


@pytest.fixture(scope="module")
def text(results: Results) -> str:
    return render(results)


class Page(HTMLParser):
    """Tags, their nesting, ids, and every reference that a browser would follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "action", "data", "srcset")]
        self.ids += [value or "" for key, value in attrs if key == "id"]


def bare(results: Results) -> Results:
    """As an evaluation leaves them that fills none of the optional fields."""
    rows = [
        row._replace(
            facts={key: value for key, value in row.facts.items() if key not in ("k", "curves")},
            positions={},
            chance={},
            write_norms=(),
            per_site=tuple({k: v for k, v in site.items() if k not in ("slices", "compat")} for site in row.per_site),
        )
        for row in results.rows
        if row.kind == "replacement" or row.name in ("clean", "zero", "mean")
    ]
    return results._replace(rows=tuple(rows), seeds=(), hypervolumes=(), matched=(), notes=())


def data(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize("made", [sweep, lambda: bare(sweep()), lambda: sweep(protocols=("clean_input",))])
def test_page_is_well_formed_and_fetches_nothing(made) -> None:
    text = render(made())
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert [link for link in page.links if not link.startswith("#")] == []
    assert set(re.findall(r"url\((.*?)\)", text)) == {"#inside"}
    assert "@import" not in text
    assert "://" not in text
    assert not re.search(r"\[\[\w+\]\]", text)
    assert page.tags.count("script") == 2


def test_sections_appear_when_there_is_something_in_them(results: Results, text: str) -> None:
    more = {"matched", "curves", "sites", "positions", "latents", "writes", "training", "others"}
    assert set(re.findall(r'<section id="(\w+)">', text)) == ALWAYS | more
    left = set(re.findall(r'<section id="(\w+)">', render(bare(results))))
    assert left == ALWAYS | {"curves", "sites", "latents"}
    alone = bare(results)._replace(rows=tuple(row for row in bare(results).rows if row.name in ("stream_16", "clean")))
    assert set(re.findall(r'<section id="(\w+)">', render(alone))) == ALWAYS | {"sites", "latents"}


def test_page_escapes_names_and_a_name_like_a_gap_stays_a_name(results: Results) -> None:
    rows = [row._replace(name=NASTY, family=NASTY) if row.name == "stream_16" else row for row in results.rows]
    text = render(results._replace(rows=tuple(rows), notes=(NASTY,)))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert Page(text).open == []
    assert NASTY.lower() in [row["find"].split(" resid_post")[0][: len(NASTY)] for row in data(text)["rows"].values()]
    assert "[[title]]" in unescape(text)


def test_every_column_is_explained_and_every_replacement_drawn_in_every_part(results: Results, text: str) -> None:
    for column in COLUMNS:
        assert column.key in MEANING
        assert f">{column.title.replace('>', '&gt;')}<" in text
    known = keys(results)
    for section in ("costs", "curves", "sites", "positions", "latents", "training"):
        body = text.split(f'<section id="{section}">')[1].split("</section>")[0]
        for row in results.rows:
            if row.kind == "replacement":
                assert f'data-row="{known[row.kind, row.name, row.sites]}"' in body, (section, row.name)


def test_page_of_read_back_results_equals_the_first(results: Results, text: str) -> None:
    assert render(from_json(json.loads(json.dumps(to_json(results))))) == text


def test_a_large_sweep_stays_a_small_file() -> None:
    assert len(render(sweep(many=True)).encode()) < 3_000_000  # 27 replacements under three protocols


# --- what is drawn --------------------------------------------------------------------------------------------------


def test_panels_hold_the_numbers_of_the_results(results: Results, text: str) -> None:
    panels, known = data(text)["panels"], keys(results)
    for protocol in PROTOCOLS:
        for i, sites in enumerate(site_sets(results)):
            dots = {dot["row"]: dot for dot in panels[f"{protocol}-{i}"]["dots"]}
            rows = [row for row in results.table(protocol) if row.kind == "replacement" and row.sites == sites]
            assert len(dots) == len(rows)
            for row in rows:
                dot = dots[known["replacement", row.name, row.sites]]
                assert dot["x"] == pytest.approx(row.cost, rel=1e-5)
                assert dot["y"]["delta"] == pytest.approx(row.metrics["delta"], rel=1e-5)
                assert dot["span"]["kl"] == pytest.approx(list(row.intervals["kl"] or ()), rel=1e-5)
                for axis in AXES:
                    assert (dot["row"] in panels[f"{protocol}-{i}"]["fronts"][axis]["delta"]) == row.front[axis]


def test_fronts_of_other_losses_hold_whom_nobody_beats(results: Results) -> None:
    one = panel(results, "cascade", site_sets(results)[0])
    for axis in AXES:
        for key in ("kl", "fvu"):
            points = {dot.row: (dot.x[axis], dot.y[key]) for dot in one.dots}
            free = {
                row
                for row, (x, y) in points.items()
                if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
            }
            assert set(one.fronts[axis][key]) == free


def test_baselines_are_lines_trails_or_words_at_the_edge(results: Results) -> None:
    one = panel(results, "cascade", site_sets(results)[0])
    assert [dot.trace for dot in one.trails] == ["neurons"] * 4
    log = one.y["delta"]["log"]
    assert log.bars == [(0.62, "affine")]
    assert log.above == "zero ablation 5.42, mean ablation 5.39"
    assert [name for _, name in log.flat] == ["zero ablation", "mean ablation", "affine"]
    drawn = svg.scatter(one, "l0", "delta", True)
    assert drawn.count('class="bar"') == 1
    assert drawn.count('class="trail"') == 1
    assert f">↑ {log.above}<" in drawn
    agree = one.y["agree"]["linear"]
    assert "zero ablation" in agree.below
    assert "log" not in one.y["agree"]  # more is better: no log axis


def test_names_of_close_baselines_do_not_overlap(results: Results) -> None:
    rows = [
        row._replace(metrics=row.metrics | {"delta": 0.3 + 0.001 * i})
        if row.name in ("zero", "mean", "affine") and row.kind == "baseline"
        else row
        for i, row in enumerate(results.rows)
    ]
    log = panel(results._replace(rows=tuple(rows)), "cascade", site_sets(results)[0]).y["delta"]["log"]
    assert len(log.bars) == 3
    assert [name for _, name in log.bars if name] == ["affine, mean ablation, zero ablation"]


def test_the_reach_of_seeds_covers_their_points(results: Results) -> None:
    one = panel(results, "cascade", site_sets(results)[0])
    (seeds,) = one.seeds
    values = [dot.y["delta"] for dot in one.dots if dot.row in seeds.rows]
    assert len(values) == 3
    assert seeds.reach["delta"] == (min(values), max(values))
    assert 'class="seeds' in svg.scatter(one, "l0", "delta", True)


def test_undefined_numbers_are_left_out_and_nothing_breaks(results: Results) -> None:
    rows = [
        row._replace(metrics=row.metrics | {"delta": None, "fvu": None}, intervals={"delta": None})
        if row.name.startswith("clt")
        else row
        for row in results.rows
    ]
    holed = results._replace(rows=tuple(rows))
    one = panel(holed, "cascade", site_sets(results)[0])
    assert sum("delta" in dot.y for dot in one.dots) == sum("delta" not in dot.y for dot in one.dots) + 8
    text = render(holed)
    assert Page(text).open == []
    assert "NaN" not in text.split("<script>")[0]
    assert "None" not in text.split('id="origin"')[0]


def test_negative_losses_stand_at_the_foot_of_a_log_axis() -> None:
    scale = scales.logarithmic([-0.01, 0.1])
    assert scale.low <= scales.FLOOR
    assert scale.share(-0.01) == scale.share(scale.low) == 0
    assert 0.9 < scale.share(0.1) < 1


def test_histogram_bars_stand_for_their_shares_and_the_dead_stand_apart() -> None:
    drawn = svg.histogram([-2.0, -1.0, 0.0], [0.6, 0.3], 0.1, 0.6, 0, "x")
    bars = [float(h) for h in re.findall(r'class="density"[^>]* height="([\d.]+)"', drawn)]
    (dead,) = [float(h) for h in re.findall(r'class="deadbin"[^>]* height="([\d.]+)"', drawn)]
    assert bars[0] / bars[1] == pytest.approx(2, rel=0.01)
    assert bars[1] / dead == pytest.approx(3, rel=0.02)
    assert "deadbin" not in svg.histogram([-2.0, -1.0, 0.0], [0.6, 0.4], 0.0, 0.6, 0, "x")
    assert re.findall(r">([\d.]+%)</text>", drawn) == ["1%", "10%", "100%"]


def test_write_map_gives_every_share_and_leaves_unwritten_blank(results: Results, text: str) -> None:
    body = text.split('<section id="writes">')[1].split("</section>")[0]
    maps = re.findall(r'<table class="heat">(.*?)</table>', body)
    assert len(maps) == 3
    assert maps[0].count('class="none"') == 6
    share = results.find("clt-batchtopk-1024-k8", "cascade").write_norms[0]["share"]
    cells = re.findall(r"%\">([\d.]+)</td>", maps[0])
    assert cells == [f"{100 * value:.1f}" for line in share for value in line if value is not None]
    sums = [float(v) for v in re.findall(r"<td>([\d.]+)</td>", maps[0])]
    assert sum(sums) == pytest.approx(100, abs=0.2)


def test_matched_tables_say_na_outside_a_range(text: str) -> None:
    body = text.split('<section id="matched">')[1].split("</section>")[0]
    assert body.count("<table>") == len(PROTOCOLS) * len(AXES) * 3
    assert "n/a" in body
    assert "0.1500 [0.1425, 0.1575]" in body  # CLT at equal L0 under cascade
    assert '0.1800 [0.1710, 0.1890]<br><span class="soft">+0.0300 [0.0200, 0.0600]</span>' in body


def test_other_tools_numbers_are_folded_away_and_said_not_to_rank(text: str) -> None:
    body = text.split('<section id="others">')[1].split("</section>")[0]
    assert body.count("<details>") == 2  # closed
    assert "never enter a ranking" in body
    assert "ev_legacy_token" in body
    assert ">FVU first<" in body


# --- axes and colours -----------------------------------------------------------------------------------------------


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0.02, 0.9), (0.1, 0.4), (3e-4, 20.0), (5.0, 7.0)):
        ticks = scales.log_ticks(low, high)
        assert ticks == sorted(ticks)
        assert all(low <= tick <= high for tick in ticks)
        assert 1 < len(ticks) < 14
    assert scales.powers_of_two(6.4, 70) == [8, 16, 32, 64]
    large = scales.cost([20_000, 90_000], count).ticks
    assert large == ((20_000, "20k"), (50_000, "50k"), (100_000, "100k"))
    names = ["L00.mlp_out"] * 40
    assert len(scales.categories(names, 480).ticks) < 8


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_family_is_seen_on_its_card_and_told_apart_by_shape() -> None:
    for one in HUES:
        for colour, card in ((one.light, CARD_LIGHT), (one.dark, CARD_DARK)):
            high, low = sorted((luminance(colour), luminance(card)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, card)
    assert len({one.marker for one in HUES}) == len({tuple(shape) for shape in svg.SHAPES}) == len(HUES)
    areas = [
        abs(sum(a * d - b * c for (a, b), (c, d) in zip(shape, [*shape[1:], shape[0]], strict=True))) / 2
        for shape in svg.SHAPES
    ]
    assert max(areas) / min(areas) < 1.9  # no family is drawn much larger than another
    assert all(math.isfinite(area) for area in areas)
