"""The report in a real browser: it sorts, filters, switches and links, breaks nothing and fetches nothing.

Skipped where no Chromium, Chrome or Edge is installed, since no Python package brings one; everything of the page that
can be checked without is in test_page.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evaluate.browser import Browser, executable
from tests.evaluate.sweep import sweep
from thresher.evaluate.page import render
from thresher.evaluate.results import Results
from thresher.evaluate.views import keys

PROGRAM = executable()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium, Chrome or Edge is installed")
BROKEN = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


@pytest.fixture(scope="module")
def results() -> Results:
    return sweep()


@pytest.fixture(scope="module")
def file(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(results), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    opened = Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def page(browser: Browser, file: Path) -> Iterator[Browser]:
    """The freshly opened report; whatever a test does to it must not break it."""
    browser.open(file)
    yield browser
    browser.js("1")  # whatever was still on its way has arrived
    assert {name: browser.named(name) for name in BROKEN} == {name: [] for name in BROKEN}


def column(page: Browser, key: str) -> list[float | None]:
    """Sort values of a column of the visible table from the top, of the replacements that the filter leaves."""
    found = page.js(
        "(() => { const t = [...document.querySelectorAll('table.results')].find(t => t.getClientRects().length); const"
        f" i = [...t.tHead.rows[0].cells].findIndex(c => c.dataset.key === '{key}'); return [...t.tBodies[0].rows]"
        ".filter(r => r.className !== 'baseline' && r.getClientRects().length).map(r => r.cells[i].dataset.value); })()"
    )
    return [float(value) if value else None for value in found]


def visible(page: Browser, selector: str) -> int:
    return int(page.js(f"[...document.querySelectorAll(`{selector}`)].filter(e => e.getClientRects().length).length"))


def text(page: Browser, selector: str) -> str:
    """Text of the first visible element of that kind."""
    return str(
        page.js(f"[...document.querySelectorAll(`{selector}`)].find(e => e.getClientRects().length).textContent")
    )


def key_of(results: Results, name: str) -> str:
    return next(short for (_, own, _), short in keys(results).items() if own == name)


def numbers(drawing: str) -> list[float]:
    """Every coordinate of a drawing, in order."""
    places = re.findall(r' (?:d|x|y|cx|cy)="([^"]*)"', drawing)
    return [float(number) for place in places for number in re.findall(r"-?\d+(?:\.\d+)?", place)]


def words(drawing: str) -> list[str]:
    """Labels, links and classes of a drawing, in order."""
    return re.findall(r'(?:>|data-rows?="|class="|href="|data-tip=")([^<"]+)', drawing)


def test_opening_fetches_the_file_alone(page: Browser, file: Path) -> None:
    assert [request["request"]["url"] for request in page.named("Network.requestWillBeSent")] == [file.as_uri()]
    assert page.js("performance.getEntriesByType('resource').length") == 0
    assert page.js("document.body.classList.contains('still')") is False


def test_script_draws_what_the_server_drew(page: Browser, file: Path) -> None:
    shown = page.js("[...document.querySelectorAll('.plot .drawing')].map(e => e.innerHTML)")
    served = re.findall(r'<div class="drawing">(.*?)</div>', file.read_text(encoding="utf-8"), re.DOTALL)
    assert len(served) == len(shown) > 0
    for before, after in zip(served, shown, strict=True):
        assert len(numbers(before)) > 30
        assert numbers(after) == pytest.approx(numbers(before), abs=0.11)  # a tenth may round either way
        assert words(after) == words(before)


def test_clicking_a_heading_sorts_and_clicking_again_turns_round(page: Browser) -> None:
    heading = "table.results th[data-key=delta]"
    page.click(heading)
    rising = column(page, "delta")
    assert rising == sorted(rising, key=lambda value: value or 0.0)
    page.js("[...document.querySelectorAll('table.results th[data-key=delta]')][0].focus()")
    page.press("Enter")
    assert column(page, "delta") == rising[::-1]
    classes = page.js("[...document.querySelector('table.results').tBodies[0].rows].map(row => row.className)")
    assert classes == sorted(classes)  # baselines stay at the foot


def test_words_hide_rows_points_and_curves(page: Browser, results: Results) -> None:
    hidden, kept = key_of(results, "sae-topk-1024-k8"), key_of(results, "clt-batchtopk-1024-k8")
    assert visible(page, f"[data-row={hidden}]") == visible(page, f"[data-row={kept}]") - 1  # the map of write norms
    page.write("#filter", "CLT k8")
    assert visible(page, f"[data-row={hidden}]") == 0
    assert visible(page, f".results tr[data-row={kept}]") == visible(page, f".drawing .mark[data-row={kept}]") / 2 == 1
    assert len(column(page, "delta")) == 1
    assert text(page, "#shown") == "1 of 15 shown"
    page.js("document.querySelector('#filter').select()")
    page.write("#filter", " ")
    assert visible(page, f".results tr[data-row={hidden}]") == 1


def test_chips_hide_families_and_baselines(page: Browser, results: Results) -> None:
    before = len(column(page, "delta"))
    page.click(".chip[data-family='SAE TopK']")
    assert len(column(page, "delta")) == before - 4
    assert visible(page, f".mark[data-row={key_of(results, 'sae-topk-1024-k8')}]") == 0
    page.click(".chip[data-family='SAE TopK']")
    assert len(column(page, "delta")) == before
    assert visible(page, ".trail") > 0
    page.click(".chip[data-family=baseline]")
    assert visible(page, ".trail") == visible(page, ".bar") == visible(page, "tr.baseline") == 0


def test_tabs_switch_every_part_to_one_protocol(page: Browser, results: Results) -> None:
    for protocol in ("single_site", "clean_input", "cascade"):
        page.click(f"[data-tab={protocol}]")
        assert column(page, "delta") == [
            pytest.approx(row.metrics["delta"], rel=1e-5)
            for row in results.table(protocol)
            if row.kind == "replacement"
        ]
        shown = page.js("[...document.querySelectorAll('[data-protocol]:not([hidden])')].map(e => e.dataset.protocol)")
        assert set(shown) == {protocol}
        assert visible(page, "[data-tab][aria-pressed=true]") == 1


def test_cost_axis_moves_points_stars_and_tables(page: Browser, results: Results) -> None:
    before = page.js("document.querySelector('.plot .drawing').innerHTML")
    page.choose("#byaxis", "active_parameters")
    after = page.js("document.querySelector('.plot .drawing').innerHTML")
    assert "Active parameters per token" in words(after)
    assert numbers(after) != numbers(before)
    stars = page.js(
        "Object.fromEntries([...document.querySelectorAll('[data-protocol=cascade] table.results tbody tr')]"
        ".map(row => [row.dataset.row, row.cells[0].textContent]))"
    )
    rows = [row for row in results.table("cascade") if row.kind == "replacement"]
    assert {row.front["l0"] for row in rows} == {True, False}
    assert {row.name: stars[key_of(results, row.name)] == "★" for row in rows} == {
        row.name: row.front["active_parameters"] for row in rows
    }
    assert visible(page, "[data-axis=active_parameters]") > 0
    assert visible(page, "[data-axis=l0]") == 0


def test_height_and_log_are_chosen_per_plot(page: Browser) -> None:
    other = page.js("document.querySelectorAll('.plot .drawing')[1].innerHTML")
    page.click(".plot .log")
    assert page.js("document.querySelector('.plot .log').checked") is False
    page.choose(".plot .measure", "agree")
    assert page.js("document.querySelector('.plot .log').disabled") is True
    assert "Agreement with the clean model" in words(page.js("document.querySelector('.plot .drawing').innerHTML"))
    assert text(page, ".plot .what") == "agreement against L0"
    assert page.js("document.querySelectorAll('.plot .drawing')[1].innerHTML") == other


def test_pointing_links_point_and_row_both_ways(page: Browser, results: Results) -> None:
    own = key_of(results, "clt-batchtopk-1024-k16")
    page.point(f".mark[data-row={own}]")
    assert page.js(f"document.querySelector('tr[data-row={own}]').classList.contains('hot')") is True
    assert page.js("[...document.querySelectorAll('tr.hot')].every(row => row.dataset.row === '" + own + "')") is True
    tip = text(page, "#tip")
    assert "clt-batchtopk-1024-k16" in tip
    assert "δ 0.1" in tip
    page.point("h1")
    assert visible(page, "#tip") == visible(page, ".hot") == 0
    page.point(f"tr[data-row={own}] td.name")
    assert page.js(f"document.querySelector('.mark[data-row={own}]').classList.contains('hot')") is True
    page.click(f"tr[data-row={own}] td.name")
    page.point("h1")
    page.choose("#byaxis", "active_per_mlp")  # drawn anew, still marked
    assert visible(page, f".mark.pinned[data-row={own}]") == 2


def test_sites_narrow_plots_and_rows(page: Browser, results: Results) -> None:
    page.choose("#bysites", "1")
    assert [len(column(page, "delta")), visible(page, ".plot")] == [1, 2]
    assert visible(page, f".results tr[data-row={key_of(results, 'stream_16')}]") == 1


def test_dark_by_the_system_and_by_the_button(page: Browser) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.js(ground)
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = page.js(ground)
    page.click("#theme")
    again = page.js(ground)
    page.send("Emulation.setEmulatedMedia", features=[])
    assert light == again != dark


def test_printing_shows_every_protocol_and_fold_and_puts_them_back(page: Browser) -> None:
    state = "[...document.querySelectorAll('[data-protocol], details')].map(e => [e.hidden, e.open])"
    before = page.js(state)
    page.js("dispatchEvent(new Event('beforeprint'))")
    assert page.js("[...document.querySelectorAll('details')].every(fold => fold.open)") is True
    assert visible(page, "table.results") == 3
    page.js("dispatchEvent(new Event('afterprint'))")
    assert page.js(state) == before
    assert len(page.send("Page.printToPDF")["data"]) > 100_000
    assert page.js(state) == before
