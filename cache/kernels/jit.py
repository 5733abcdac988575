"""How loops over rows are compiled: for the processor at hand, when they are first called.

That takes a second or two, so the result is kept on disk, beside the source or in the user's cache directory
(`NUMBA_CACHE_DIR` names another). Where neither can be written to, every process compiles for itself.
"""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator for a function that needs no interpreter lock; `options` are Numba's."""
    options = {"nogil": True, "error_model": "numpy", **options}

    def compile_later(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # Numba found no directory to write to
            return njit(**options)(function)

    return compile_later
