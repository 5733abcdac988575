"""The program on a cache in an object store: the same command lines, the same bits."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.program import thresher
from tests.stores import BUCKET, SECRETS, Proxy, s3_server

RECIPE = """
[target]
model = "bundled:books-128"

[data]
source = "bundled:books"
context = 64
max_tokens = 12000
test_fraction = 0.25

[harvest]
sites = ["mlp_out"]
layers = [1]

[dictionary]
kind = "sae"
firing = "topk"
k = 8
expansion = 2

[train]
batch_rows = 256
epochs = 1.5
log_every = 5

[evaluate]
tokens = 300
resamples = 100
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with s3_server() as proxy:
        yield proxy


@pytest.fixture
def folder(server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, and the server in the environment."""
    for name, value in {**SECRETS, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "mine.toml").write_text(RECIPE)
    return tmp_path


def ran(folder: Path, *line: str) -> str:
    done = thresher(folder, *line, sets=())
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_harvest_train_evaluate_and_verify_from_s3_as_from_the_disk(folder: Path) -> None:
    uri, told = f"s3://{BUCKET}/mine.zarr", ""
    for cache, runs in ((uri, "store"), ("disk.zarr", "disk")):
        told += ran(folder, "harvest", "mine.toml", "--cache", cache)
        told += ran(folder, "train", "mine.toml", "--cache", cache, "--runs", runs)
    for name in ("sae-topk-L01",):
        one, other = (folder / runs / name for runs in ("store", "disk"))
        assert (one / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
        config = json.loads((one / "config.json").read_text())
        assert config["cache"]["path"] == uri
    assert "Reading from the object store" in told
    assert "Reusing the cache" in ran(folder, "harvest", "mine.toml", "--cache", uri)
    told += ran(folder, "evaluate", "store", "--out", "report")  # finds the text by the runs' own URI
    assert f"of {uri}" in (folder / "report" / "results.json").read_text()
    told += ran(folder, "cache", "info", uri) + ran(folder, "cache", "verify", uri)
    assert "is whole: every checksum holds" in told
    written = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    for secret in SECRETS.values():
        assert secret not in told
        assert not any(secret.encode() in data for data in written)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (["cache", "prune", "s3://b/x.zarr"], "thresher cache prune needs a directory"),
        (["cache", "estimate", "mine.toml", "--cache", "s3://b/x.zarr"], "times the disk, needs a directory"),
        (["train", "mine.toml", "--cache", "s3://b/x", "--set", "harvest.window_gb=1"], "needs a directory"),
        (["harvest", "mine.toml", "--cache", "s3://b/x", "--set", "harvest.window_gb=1"], "needs a directory"),
        (["train", "mine.toml", "--cache", f"s3://{BUCKET}/nothing"], f"There is no cache at s3://{BUCKET}/nothing"),
        (["train", "mine.toml", "--cache", "s3://key:word@b/x"], "more than a bucket and a prefix"),
        (["cache", "info", "s3://nobody/x"], "there is no bucket 'nobody'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder: Path, line: list[str], why: str) -> None:
    done = thresher(folder, *line, sets=())
    assert done.returncode == 2
    assert why in " ".join(done.stderr.replace("│", " ").split())
    assert "key:word" not in done.stderr
