"""The longest test first: beside it, other workers do all the rest; last, they would wait for it."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable, and the same in every worker."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")
