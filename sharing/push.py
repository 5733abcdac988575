"""Push: finished runs into a repository on the hub, with a model card made from their numbers.

Everything is read, checked and hashed before the hub is asked for anything, and all that is pushed is one commit on
top of the one that was looked at: it appears whole or not at all, and never over what somebody else pushed meanwhile.
Runs that the repository holds already are left as they are; another run of the same name is refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from thresher.cache.errors import UserError
from thresher.sharing.card import Contents, render
from thresher.sharing.directories import RESULTS, SharedRun, cache_fingerprint, shared_cache, shared_report, shared_runs
from thresher.sharing.evaluated import Evaluation, check_evaluates, read_results
from thresher.sharing.facts import facts
from thresher.sharing.hub import Hub, Remote, writing_token
from thresher.sharing.index import CACHE, CARD, INDEX, REPORT, RUNS, Files, Index
from thresher.train.files import CONFIG, WEIGHTS


class Pushed(NamedTuple):
    """What a push did."""

    address: str
    """Of the commit, or of the repository when nothing was new."""
    new: tuple[str, ...]
    """Names of runs that the repository did not have."""
    held: tuple[str, ...]
    """Names of runs that it had, equal to the bit."""
    notes: tuple[str, ...]


class Given(NamedTuple):
    """What is to be pushed, checked."""

    runs: Sequence[SharedRun]
    report: Path | None
    report_files: Files
    cache: Path | None
    cache_files: Files


def push(
    places: Sequence[Path],
    repo: str,
    *,
    report: Path | None = None,
    cache: Path | None = None,
    license: str | None = None,
    revision: str | None = None,
    private: bool = False,
    checkpoints: bool = False,
) -> Pushed:
    """Push the runs that `places` mean (a run, a folder of runs, the stem of a set's names) to `owner/name`.

    `report`: the directory of an evaluation of them. `cache`: the cache they were trained from, of which manifest and
    statistics are shared. `license`: as the hub spells it, for example apache-2.0. The repository, and the branch
    `revision`, are made where they are missing; `private` holds for a new one.
    Raises UserError, with nothing pushed, for all that does not fit.
    """
    given = _given(places, report, cache, checkpoints)
    hub = Hub(repo, revision, token=writing_token())
    remote = _opened(hub, private)
    index = _index(hub, remote)
    new, held = _sorted_out(given.runs, index, repo)
    merged = Index(
        runs={**index.runs, **{run.name: run.files for run in new}},
        report=given.report_files or index.report,
        cache=given.cache_files or index.cache,
        license=license or index.license,
        card=index.card,
    )
    files = _uploads(given, new, merged, index)
    merged, notes = _with_card(hub, remote, given, merged, files)
    if merged == index:
        return Pushed(f"{repo} at {remote.commit[:12]}", (), tuple(held), notes)
    gone = [f"{REPORT}/{path}" for path in index.report if path not in merged.report]
    gone += [f"{CACHE}/{path}" for path in index.cache if path not in merged.cache]
    files[INDEX] = merged.to_json()
    names = [run.name for run in new]
    message = f"Add {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "Renew card and report"
    return Pushed(hub.commit(files, gone, message, onto=remote.commit), tuple(names), tuple(held), notes)


def _given(places: Sequence[Path], report: Path | None, cache: Path | None, checkpoints: bool) -> Given:
    """All that is on the disk, checked."""
    runs = shared_runs(places, checkpoints=checkpoints)
    report_files = {} if report is None else shared_report(report)
    if report is not None:
        evaluation = read_results((report / RESULTS).read_bytes(), str(report / RESULTS))
        check_evaluates(evaluation, {run.name: run.config for run in runs}, report)
    cache_files = {} if cache is None else shared_cache(cache)
    if cache is not None:
        expected = cache_fingerprint(cache)
        for run in runs:
            trained_on = (run.config.get("cache") or {}).get("fingerprint")
            if trained_on != expected:
                raise UserError(
                    f"--cache {cache} has fingerprint {expected[:12]}…, and {run.name} was trained from "
                    f"{str(trained_on)[:12]}…. Give the cache it was trained from, or leave --cache out."
                )
    return Given(runs, report, report_files, cache, cache_files)


def _opened(hub: Hub, private: bool) -> Remote:
    """The repository, made where there was none."""
    whole = Hub(hub.repo, None, token=writing_token())
    found = whole.look()
    if found is None:
        return hub.create(private=private)
    if private and not found.private:
        raise UserError(
            f"--private: {hub.repo} exists and is public, and a push does not change that. Make it private on the hub "
            "first, or push to another name."
        )
    if hub.revision is None:
        return found
    hub.branch()
    there = hub.look()
    assert there is not None, "the repository was there a moment ago"
    return there


def _index(hub: Hub, remote: Remote) -> Index:
    text = hub.read(remote.commit, INDEX)
    return Index() if text is None else Index.from_json(text, hub.repo)


def _sorted_out(runs: Sequence[SharedRun], index: Index, repo: str) -> tuple[list[SharedRun], list[str]]:
    """Runs that the repository lacks, and names of those it has. Raises UserError for another run of the same name."""
    new: list[SharedRun] = []
    held: list[str] = []
    for run in runs:
        there = index.runs.get(run.name)
        if there is None:
            new.append(run)
        elif all(there[name] == run.files[name] for name in (CONFIG, WEIGHTS)):
            held.append(run.name)
        else:
            what = WEIGHTS if there[WEIGHTS] != run.files[WEIGHTS] else CONFIG
            raise UserError(
                f"{repo} holds another run called {run.name}: its {what} differs. Rename the directory, push to "
                "another repository or --revision, or delete the run there first."
            )
    return new, held


def _uploads(given: Given, new: Sequence[SharedRun], merged: Index, index: Index) -> dict[str, Path | bytes]:
    """What has to go there, by its path in the repository."""
    files: dict[str, Path | bytes] = {
        f"{RUNS}/{run.name}/{path}": run.path / path for run in new for path in merged.runs[run.name]
    }
    for folder, place, own, held in (
        (REPORT, given.report, given.report_files, index.report),
        (CACHE, given.cache, given.cache_files, index.cache),
    ):
        if place is not None:
            files |= {f"{folder}/{path}": place / path for path in own if held.get(path) != own[path]}
    return files


def _with_card(
    hub: Hub, remote: Remote, given: Given, merged: Index, files: dict[str, Path | bytes]
) -> tuple[Index, tuple[str, ...]]:
    """The index with the card's hash, the card added to `files`; a card that people edited is left alone."""
    there = hub.read(remote.commit, CARD)
    notes: tuple[str, ...] = ()
    if there is not None and hashlib.sha256(there).hexdigest() != merged.card:
        notes = (
            f"{CARD} of {hub.repo} is not as a push made it, and is left as it is. Delete it there to have it made "
            "anew.",
        )
        return merged, notes
    text = render(_contents(hub, remote, given, merged)).encode()
    if text != there:
        files[CARD] = text
    return Index(**{**vars(merged), "card": hashlib.sha256(text).hexdigest()}), notes


def _contents(hub: Hub, remote: Remote, given: Given, merged: Index) -> Contents:
    """What the card is made of: runs that are pushed and those that are there, and the report that will be."""
    own = {run.name: run.config for run in given.runs}
    paths = [f"{RUNS}/{name}/{CONFIG}" for name in merged.runs if name not in own]
    folder = hub.fetch(remote.commit, paths) if paths else None
    configs: dict[str, Mapping[str, Any]] = {}
    for name in sorted(merged.runs):
        configs[name] = own.get(name) or json.loads((_in(folder) / RUNS / name / CONFIG).read_bytes())
    return Contents(
        repo=hub.repo,
        runs=configs,
        facts=[facts(name, config, merged.runs[name][WEIGHTS].sha256) for name, config in configs.items()],
        evaluation=_evaluation(hub, remote, given, merged),
        report_files=frozenset(merged.report),
        cache_shared=bool(merged.cache),
        license=merged.license,
    )


def _in(folder: Path | None) -> Path:
    assert folder is not None, "fetched for every run that is not given"
    return folder


def _evaluation(hub: Hub, remote: Remote, given: Given, merged: Index) -> Evaluation | None:
    if not merged.report:
        return None
    if given.report is not None:
        return read_results((given.report / RESULTS).read_bytes(), str(given.report))
    text = hub.read(remote.commit, f"{REPORT}/{RESULTS}")
    return None if text is None else read_results(text, f"{REPORT}/{RESULTS} of {hub.repo}")
