"""Finished runs, a report about them in the real format, and a hub on loopback with an empty local cache."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from rich.console import Console

from tests.evaluate.sweep import sweep
from tests.sharing.hub_server import WRITER, HubServer, serving
from tests.train.conftest import make_cache, plans_for
from thresher.cache.reader import CacheReader
from thresher.evaluate.results import to_json
from thresher.train.files import read_config
from thresher.train.run import train

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)
"""One pixel."""


class House(NamedTuple):
    """What somebody has who has trained and evaluated."""

    cache: CacheReader
    runs: Path
    """`topk-L00`, `topk-L01`, `clt`."""
    report: Path
    """An evaluation of both."""


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    cache = make_cache(folder / "cache.zarr", contexts=24)
    steps = {"steps": 6, "log_every": 2, "batch_rows": 128, "checkpoint_every": 3}
    plans = plans_for(cache, "topk", steps, kind="sae", firing="topk", k=3)
    plans += plans_for(cache, "clt", steps, kind="clt", firing="topk", k=3)
    train(plans, cache, out=folder / "runs", device="cpu", console=Console(quiet=True))
    write_report(folder / "report", folder / "runs")
    return House(cache, folder / "runs", folder / "report")


def write_report(folder: Path, runs: Path) -> None:
    """A report as `thresher evaluate` writes it, of made-up numbers, about the runs of the house."""
    made_up = sweep()
    rows = []
    for row in made_up.rows:
        members = {"sae-topk-1024-k8": ["topk-L00", "topk-L01"], "clt-batchtopk-1024-k8": ["clt"]}.get(row.name)
        if row.kind == "baseline":
            rows.append(row)
        elif members is not None:
            config = read_config(runs / members[0])
            facts = {
                "kind": config["dictionary"]["kind"],
                "firing": config["dictionary"]["firing"],
                "seed": config["training"]["seed"],
                "training_rows": config["training"]["rows"],
                "runs": [str(runs / name) for name in members],
            }
            rows.append(row._replace(name=config["group"], facts=facts))
    provenance = {**made_up.provenance, "contexts": "split test of a cache"}
    (folder / "plots").mkdir(parents=True)
    text = json.dumps(to_json(made_up._replace(rows=tuple(rows), provenance=provenance)))
    (folder / "results.json").write_text(text)
    (folder / "report.html").write_text("<!doctype html><title>report</title><p>A report.")
    (folder / "results.csv").write_text("name\n")
    for stem in ("delta_l0", "fvu_l0", "delta_sites"):
        (folder / "plots" / f"{stem}.png").write_bytes(PNG)
    (folder / "sums").mkdir()
    (folder / "sums" / "big.npz").write_bytes(b"not shared")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that has nothing, a token that may write, and a client that does not wait between attempts."""
    with serving() as server:
        point_client_at(server.url, tmp_path / "hub-cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server


def point_client_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_DISABLE_XET would have done before the client was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


def everything_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by path."""
    files: list[Any] = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
