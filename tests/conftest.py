"""The longest test first: beside it, other workers do all the rest; last, they would wait for it.

And what tests of several rooms share.
"""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable, and the same in every worker."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without the files for papers, which take four seconds to draw and have tests of their own."""
    from thresher.evaluate import plots

    monkeypatch.setattr(plots, "write_plots", lambda results, folder: ())
