"""`thresher estimate`: what it prints and writes, and that bytes of a cache, the page and the script are as it says."""

import importlib.util
import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.documents import document
from tests.pages import check_command
from tests.program import environment, thresher
from thresher.cache.errors import UserError
from thresher.commands.estimate import Wanted, budget
from thresher.commands.harvest import harvest_recipe
from thresher.commands.wiring import read_recipe
from thresher.harvest import target
from thresher.harvest.checkpoint import bundled
from thresher.harvest.shapes import KNOWN

ROOT = Path(__file__).parent.parent


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither network nor model."""

    def refused(*_: object, **__: object) -> NoReturn:
        raise AssertionError("an estimate needs neither model nor network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(target, "load_target", refused)


@pytest.mark.usefixtures("offline")
def test_an_estimate_is_told_to_people_and_scripts(tmp_path: Path) -> None:
    done = thresher(tmp_path, "estimate", "llama1b-clt", "--gpus", "8", "--json", sets=())
    assert done.returncode == 0, done.stderr
    found = document("estimate", done.stdout)
    assert found["parameters"] == 32768 * 2048 * (16 + 136) + 16 * (32768 + 2048)
    assert {tuple(way[key] for key in ("groups", "data", "latents")) for way in found["layouts"]} == {
        (1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8),
    }  # fmt: skip
    chosen = next(way for way in found["layouts"] if way["latents"] == found["chosen"]["latents"])
    assert chosen["fits"]
    assert chosen["memory"]["total"] >= chosen["memory"]["step"]
    assert f"latents = {chosen['latents']} in the recipe" in done.stderr
    assert "Assumed:" in done.stderr


@pytest.mark.usefixtures("offline")
def test_what_is_given_counts_and_too_little_memory_is_said(tmp_path: Path) -> None:
    words = ("estimate", "llama1b-clt", "--gpus", "2", "--memory-gb", "16", "--tokens", "2000000", "--tflops", "100")
    done = thresher(tmp_path, *words, sets=())
    assert done.returncode == 0, done.stderr
    assert "Nothing fits" in done.stdout
    assert "GPUs would do" in done.stdout
    assert "100 TFLOP/s" in done.stdout


def test_this_machine_can_be_measured(tmp_path: Path) -> None:
    done = thresher(tmp_path, "estimate", "books-demo", "--measure", "--tokens", "100000", sets=())
    assert done.returncode == 0, done.stderr
    assert "this machine (cpu)" in done.stdout
    assert "measured here" in done.stdout


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["target.model=some/model", "reference.layers=2"], "both or neither"),
        (["harvest.sites=['blocks.0.attn.hook_out']"], "names more than taps"),
        (["data.source=some/text"], "--tokens"),
    ],
)
def test_what_cannot_be_known_is_refused(sets: list[str], words: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[reference]\n[data]\nsource = "some/text"\n[dictionary]\nn_latents = 64\nk = 4\n')
    with pytest.raises(UserError, match=words):
        budget(read_recipe(str(recipe), sets), Wanted())
    with pytest.raises(UserError, match="neither layers nor width are known"):
        budget(read_recipe(str(recipe), ["target.model=some/model", "data.max_tokens=1000"]), Wanted())
    with pytest.raises(UserError, match=r"Known: B200, H200.*--measure"):
        budget(read_recipe("gpt2-small", []), Wanted(gpu="H1000"))


def test_bytes_of_a_cache_are_those_on_the_disk(tmp_path: Path) -> None:
    sets = ["data.max_tokens=24000", "data.context=64", "data.test_fraction=0.3", "data.validation_fraction=0.3"]
    recipe = read_recipe("books-demo", [*sets, "harvest.layers=[0, 1]"])
    said = budget(recipe, Wanted()).cache["int8z"]
    harvest_recipe(recipe, tmp_path / "cache.zarr")
    files = [path for path in (tmp_path / "cache.zarr").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.name.startswith("c.")) == said
    assert sum(path.stat().st_size for path in files) == pytest.approx(said, rel=0.01), "and its documents"


def test_shapes_of_targets_are_their_own() -> None:
    config = json.loads((bundled("bundled:books-128", "", "target.model") / "config.json").read_text())
    shape = KNOWN["bundled:books-128"]
    told = shape.layers, shape.width, shape.heads, shape.context
    assert told == tuple(config[key] for key in ("n_layer", "n_embd", "n_head", "n_positions"))
    bodies: dict[str, Any] = {name: each.layers * each.block_parameters / 1e6 for name, each in KNOWN.items()}
    assert bodies["openai-community/gpt2"] == pytest.approx(84.9, abs=0.1)
    assert bodies["meta-llama/Llama-3.2-1B"] == pytest.approx(973, abs=1)
    assert bodies["google/gemma-2-2b"] == pytest.approx(2024, abs=1)


@pytest.mark.usefixtures("offline")
def test_the_cost_table_of_the_page_is_what_the_calculator_says() -> None:
    spec = importlib.util.spec_from_file_location("costs", ROOT / "docs/scaling/costs.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert script.table() in page, "docs/scaling.md is not up to date: put what docs/scaling/costs.py prints into it"


def test_the_script_for_several_gpus_says_what_it_would_do(tmp_path: Path) -> None:
    """Every way and both scalings, in commands whose options exist."""
    script, settings = ROOT / "benchmarks/scale.sh", {"DEVICE": "cpu", "COUNTS": "1 2 4", "PYTHON": sys.executable}
    done = subprocess.run([script, "--dry-run"], env=environment() | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    sweeps = [words for words in lines if words[1].endswith("benchmarks/scale.py")]
    assert [words[words.index("--processes") + 1] for words in sweeps] == ["2", "4"]
    trained = [words for words in lines if "train" in words]
    assert len(trained) == 2 * 2 * 3 * 2 + 1, "ways, scalings, numbers of processes, lengths; and one to warm up"
    for words in trained:
        check_command(["thresher", *words[words.index("train") :]])
    for key in ("parallel.data=4", "parallel.latents=4", "train.batch_rows=4096", "dictionary.n_latents=8192"):
        assert any(key in words for words in trained), key
    assert subprocess.run([script, "--slow"], capture_output=True).returncode == 2
    bash = subprocess.run(["bash", "-n", script], capture_output=True)
    assert bash.returncode == 0
