"""Processes that hold one target together record what one process does."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.harvest.conftest import tiny
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.commands.harvest import harvest_recipe
from thresher.commands.wiring import read_recipe
from thresher.harvest.target import TargetConfig, load_target

RECIPE = """
[target]
model = "{model}"
device = "cpu"
dtype = "float32"
tensor_parallel = {shared}
[data]
source = "{tokens}"
column = "ids"
context = 16
bos = false
separator = "none"
[harvest]
sites = ["resid_pre", "mlp_in", "mlp_out", "resid_post"]
batch_contexts = 4
[dictionary]
expansion = 2
k = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny("llama").save_pretrained(path / "llama")
    texts = ((np.arange(96 * 16) * 7 + np.arange(96 * 16) // 16) % 60).reshape(96, 16).tolist()
    (path / "tokens.jsonl").write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in texts))
    return path


def test_a_target_held_by_two_processes_gives_the_cache_of_one(folder: Path) -> None:
    for shared in ("false", "true"):
        recipe = folder / f"{shared}.toml"
        recipe.write_text(RECIPE.format(model=folder / "llama", tokens=folder / "tokens.jsonl", shared=shared))
    harvest_recipe(read_recipe(str(folder / "false.toml"), []), folder / "false")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "thresher"]
    line += ["harvest", str(folder / "true.toml"), "--cache", str(folder / "true")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Harvested") == 1, "the one who leads speaks"
    alone, together = CacheReader.open(folder / "false"), CacheReader.open(folder / "true")
    assert together.verify() == []
    assert together.fingerprint == alone.fingerprint
    rows = np.arange(alone.rows("train"))
    for site in alone.sites:
        expected, found = (reader.gather("train", site, rows).float() for reader in (alone, together))
        assert (found - expected).norm() < 1e-2 * expected.norm(), site
        assert (found - expected).norm() > 0 or site == "L00.resid_pre", "sums of parts round otherwise"


@pytest.mark.long
def test_what_every_process_has_only_a_part_of_is_refused(folder: Path) -> None:
    recipe = folder / "part.toml"
    text = RECIPE.format(model=folder / "llama", tokens=folder / "tokens.jsonl", shared="true")
    recipe.write_text(text.replace('"resid_pre"', '"mlp_hidden"'))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "thresher"]
    line += ["harvest", str(recipe), "--cache", str(folder / "part")]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0
    assert "every process has only a part of that tensor" in " ".join(done.stderr.split())
    assert not (folder / "part" / "MANIFEST.json").exists()


def test_where_nobody_shares_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TargetConfig(model=str(folder / "llama"), device="cpu", tensor_parallel=True)
    assert load_target(config).holders is None, "one process holds all of it"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="only `harvest` lets several processes hold one target"):
        load_target(config)
    with pytest.raises(UserError, match=r"target\.tensor_parallel and target\.device_map are both set"):
        dataclasses.replace(config, device_map="auto")
