"""A user's own module, by path: what it registers (firing rules, topologies) then exists like what is built in."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from thresher.cache.errors import UserError


def import_plugin(path: Path) -> ModuleType:
    """Import a Python file, once however often it is named.

    Raises UserError when there is no such file, when it is no Python file, and when importing it fails.
    """
    file = path.resolve()
    if not file.is_file() or file.suffix != ".py":
        what = "is no Python file (*.py)" if file.exists() else "does not exist"
        raise UserError(f"--plugin {path} {what}. Give the module that registers your rule or topology.")
    name = f"thresher_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and inspect look a class's module up there
    try:
        spec.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        place = _line(error, file)
        raise UserError(
            f"--plugin {path} cannot be imported: {type(error).__name__}: {error}{place}. Mend the module; `python "
            f"{path}` shows more."
        ) from error
    return module


def _line(error: Exception, file: Path) -> str:
    """` (line 3)`: the last line of the file that the error passed through."""
    number, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            number = trace.tb_lineno
        trace = trace.tb_next
    return "" if number is None else f" (line {number})"
