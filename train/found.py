"""Finding run directories below folders, by their config.json."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from thresher.cache.errors import UserError
from thresher.cache.prune import Run
from thresher.train.files import CONFIG, read_config


def run_directories(folders: Sequence[Path]) -> list[Path]:
    """The run directories among `folders` and directly inside them, sorted by name."""
    found: list[Path] = []
    for folder in folders:
        below = sorted(config.parent for config in folder.glob(f"*/{CONFIG}"))
        inside = [folder] if (folder / CONFIG).is_file() else below
        if not inside:
            raise UserError(f"{folder} is no run directory and holds none: expected {CONFIG} in it or one level below.")
        found += inside
    return found


def trained_from(folders: Iterable[Path]) -> list[Run]:
    """Every run directory up to two levels below the folders, with the cache that it names."""
    found: dict[Path, Run] = {}
    for config in (file for folder in folders for depth in ("", "*/", "*/*/") for file in folder.glob(depth + CONFIG)):
        try:
            stored = read_config(config.parent)["cache"]
        except (UserError, KeyError):
            continue  # no run of ours, or one that says nothing of a cache
        found[config.parent.resolve()] = Run(config.parent, Path(stored["path"]), stored["fingerprint"])
    return list(found.values())
