"""The pictures for papers: the same bytes for the same results, in the page's colours, and none without its data."""

from pathlib import Path

import pytest

from tests.evaluate.sweep import sweep
from thresher.evaluate.page import render
from thresher.evaluate.palette import hue
from thresher.evaluate.plots import write_plots
from thresher.evaluate.results import Results
from thresher.evaluate.views import families


@pytest.fixture(scope="module")
def made() -> Results:
    return sweep(protocols=("cascade",))


@pytest.fixture(scope="module")
def pictures(made: Results, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_plots(made, tmp_path_factory.mktemp("pictures"))


def test_pictures_of_equal_results_are_equal_to_the_byte(pictures: tuple[Path, ...], tmp_path: Path) -> None:
    first, again = pictures, write_plots(sweep(protocols=("cascade",)), tmp_path)
    assert {p.name for p in first} == {
        f"{name}.{end}"
        for name in ("delta_l0", "fvu_l0", "fvu_sites", "delta_positions", "write_norms")
        for end in ("png", "svg")
    }
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
        if one.suffix == ".svg":
            assert "<text" not in one.read_text()  # drawn as paths: the same with any fonts


def test_pictures_have_the_colours_of_the_page(made: Results, pictures: tuple[Path, ...]) -> None:
    drawn = {path.name: path.read_text() for path in pictures if path.suffix == ".svg"}
    for index, _ in enumerate(families(made)):
        assert hue(index).light in drawn["delta_l0.svg"]
        assert f"--c{index}: light-dark({hue(index).light}" in render(made)


def test_pictures_without_their_data_are_left_out(made: Results, tmp_path: Path) -> None:
    rows = [row._replace(positions={}, write_norms=(), metrics=row.metrics | {"fvu": None}) for row in made.rows]
    drawn = {path.stem for path in write_plots(made._replace(rows=tuple(rows)), tmp_path)}
    assert drawn == {"delta_l0", "fvu_sites"}
