"""The directory of a part before its first shard: whose it is, and what it is going to hold.

`planning` gives the right to decide that. `lay_out` then publishes the packed tokens and, last and exclusively, the
plan in the root's attributes, so that a directory without a root is nothing yet. A directory that has one is gone on
with if it has this very plan (`check_same`), and refused otherwise.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from thresher.cache.arrays import write_sharded
from thresher.cache.commit import PARTS, ROOT
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts, group_json
from thresher.cache.locks import CREATE, Lock, hold
from thresher.cache.place import Place, walk
from thresher.cache.plan import Plan, context_array
from thresher.cache.publish import write_json
from thresher.cache.records import differences


def planning(path: Place, notify: Callable[[str], None] = lambda line: None) -> Lock:
    """The right to decide what the part at `path` is going to be. Raises UserError when it is not ours to fill."""
    _refuse_foreign(path)
    return hold(path / CREATE, lambda: notify(f"waiting for another process that is planning or finishing {path}"))


def forget_plan(path: Place, create: Lock) -> None:
    """Free the lock that `planning` gave, leaving no empty directory behind when nothing was planned."""
    if isinstance(path, Path) and create.fresh and [file.name for file in path.iterdir()] == [CREATE]:
        create.remove()
        with contextlib.suppress(OSError):  # another process may be waiting there by now
            path.rmdir()
    create.release()


def check_same(path: Place, wanted: Plan, stored: Plan) -> None:
    """Raise UserError when the directory was planned otherwise."""
    lines = differences(wanted.identity, stored.identity) or differences(wanted.to_json(), stored.to_json())
    if lines:
        raise UserError(
            f"{path} holds another cache: {'; '.join(lines)} ('expected' is this recipe's). Choose "
            f"another place with --cache PATH, or remove that directory if it is no longer wanted."
        )


def lay_out(path: Place, plan: Plan, contexts: Mapping[str, Contexts], facts: Mapping[str, Any]) -> None:
    """Publish the packed tokens and then the plan with its facts."""
    discard(leftovers(path))
    for split, packed in contexts.items():
        for name, spec in plan.context_arrays(split).items():
            write_sharded(path / split / "contexts" / name, spec, context_array(packed, name))
    attributes = {"thresher": {**plan.to_json(), "facts": json.loads(json.dumps(dict(facts)))}}
    write_json(path / ROOT, group_json(attributes), exclusive=True)


def leftovers(path: Place) -> Iterator[Place]:
    """Temporary files of the part at `path`; those below parts/ are of others, which may be at work."""
    if isinstance(path, Path):  # objects appear whole
        yield from (file for file in walk(path, skip=PARTS) if file.name.endswith(".tmp"))


def discard(files: Iterable[Place]) -> None:
    """Remove files that nobody needs any more."""
    for file in list(files):
        file.unlink(missing_ok=True)


def _refuse_foreign(path: Place) -> None:
    """Raise UserError for a file, or a directory with content that is no cache of ours."""
    if path.is_dir() and any(path.iterdir()) and not (path / ROOT).exists() and not (path / CREATE).exists():
        raise UserError(
            f"{path} is not empty and not a cache: expected a new or empty directory, or a cache to go on with. "
            f"Choose another place with --cache PATH."
        )
    if isinstance(path, Path) and path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; expected a directory for the cache. Choose another with --cache PATH.")
