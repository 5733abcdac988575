"""`cache info`, `verify`, `estimate` and `prune` as a user meets them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.documents import document
from thresher import cli
from thresher.cache.errors import UserError
from thresher.cache.index import strike
from thresher.commands.options import out

SETS = ("data.max_tokens=24000", "data.context=128", "data.test_fraction=0.25", "data.validation_fraction=0.15")


def thresher(folder: Path, *arguments: str, sets: tuple[str, ...] = ()) -> str:
    """What `thresher ARGUMENTS --set …` prints in `folder`, in this process, where importing PyTorch costs nothing.

    With --json its document is checked, and what it says to people returned.
    """
    extra = [part for item in sets for part in ("--set", item)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("THRESHER_CACHE", raising=False)
        patch.setattr(out, "width", 100)
        done = CliRunner().invoke(cli.app, [*arguments, *extra], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    if "--json" in arguments:
        document(" ".join(arguments[:2]), done.stdout)
        return done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished cache in `caches`."""
    folder = tmp_path_factory.mktemp("house")
    thresher(folder, "harvest", "books-demo", sets=SETS)
    return folder


@pytest.fixture
def folder(house: Path, tmp_path: Path) -> Path:
    shutil.copytree(house / "caches", tmp_path / "caches")
    return tmp_path


def the_cache(folder: Path) -> Path:
    (cache,) = (folder / "caches").iterdir()
    return cache


def test_an_estimate_fits_the_screen_and_leaves_nothing(tmp_path: Path) -> None:
    text = thresher(tmp_path, "cache", "estimate", "books-demo", "--json", sets=SETS)
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"mlp_out, 128 wide, each of 4 +\d", text)
    assert re.search(r"all, with tokens and statistics +\d", text)
    assert "int8z (recipe's)" in text
    assert "21 dictionaries from 1 stream of batches: 3." in text
    assert "Caching pays: 3." in " ".join(text.split())
    assert list(tmp_path.iterdir()) == []


def test_one_pass_over_a_small_model_is_cheaper_live(tmp_path: Path) -> None:
    sets = (*SETS, "train.epochs=1")
    text = thresher(tmp_path, "cache", "estimate", "books-demo", "--tokens", "30000", sets=sets)
    assert "Live activations are cheaper" in text
    assert "from --tokens" in text


def test_streams_that_differ_in_seed_are_passes_of_their_own(tmp_path: Path) -> None:
    recipe = tmp_path / "seeds.toml"
    recipe.write_text(
        '[target]\nmodel = "bundled:books-128"\n[data]\nsource = "bundled:books"\ncontext = 128\ntest_fraction = 0.2\n'
        '[dictionary]\nkind = "sae"\nfiring = "topk"\nk = 8\nexpansion = 2\n[train]\nbatch_rows = 1024\n'
        "[[sweep]]\ntrain.seed = [0, 1, 2]\n[[sweep]]\nname = 'short'\ntrain.steps = [2]\n"
    )
    text = thresher(tmp_path, "cache", "estimate", "seeds.toml", "--tokens", "50000")
    assert "16 dictionaries from 3 streams of batches: 3." in text


@pytest.fixture(scope="module")
def extended(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose cache has a further segment of text, behind the documents that `cache info` counts."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(house / "caches", folder / "caches")
    cache, first = the_cache(folder), to_skip(folder)
    extend = ("harvest", "books-demo", "--cache", str(cache), "--extend")
    with pytest.raises(UserError, match=rf"data\.skip_documents to {first} "):
        thresher(folder, *extend, sets=(*SETS, f"data.skip_documents={first - 1}"))
    thresher(folder, *extend, sets=(*SETS, f"data.skip_documents={first}"))
    return folder


def to_skip(folder: Path) -> int:
    """The value of data.skip_documents that `cache info` advises."""
    (number,) = re.findall(r"data\.skip_documents = (\d+)", thresher(folder, "cache", "info", str(the_cache(folder))))
    return int(number)


def test_info_counts_the_documents_that_a_further_segment_has_to_skip(house: Path, extended: Path) -> None:
    text = thresher(extended, "cache", "info", str(the_cache(extended)), "--json")
    assert f"text bundled:books, read up to document {to_skip(extended):,}; to go on behind it" in text
    assert to_skip(extended) > to_skip(house) > 0
    assert "not complete" not in text


def test_a_part_in_the_making_is_named_by_all_who_look_at_the_cache(
    house: Path, extended: Path, tmp_path: Path
) -> None:
    shutil.copytree(extended / "caches", tmp_path / "caches")
    cache = the_cache(tmp_path)
    strike(cache, ["01-tokens"])
    (cache / "parts/01-tokens/MANIFEST.json").unlink()
    assert "not complete parts/01-tokens\n" in thresher(tmp_path, "cache", "info", str(cache))
    assert to_skip(tmp_path) == to_skip(house)
    verified = thresher(tmp_path, "cache", "verify", str(cache), "--json")
    assert "parts/01-tokens is in the making: it was not read, and does not count.\n" in verified
    assert "is whole: every checksum holds" in verified
    few = ("train.epochs=0.05", "train.batch_rows=256", "train.calibrate_rows=256", "dictionary.expansion=1")
    trained = thresher(tmp_path, "train", "books-demo", sets=(*SETS, *few))
    assert trained.startswith(f"Note: parts/01-tokens of caches/{cache.name} is in the making and does not count.\n")
    assert "Note:" not in thresher(house, "train", "books-demo", "--runs", str(tmp_path / "runs2"), sets=(*SETS, *few))


def test_prune_tells_and_asks_before_it_removes(folder: Path) -> None:
    cache = the_cache(folder)
    (cache / "train" / "c.0.0.0123456789ab.tmp").write_bytes(b"dead")
    (cache / "notes.txt").write_text("mine")
    told = thresher(folder, "cache", "prune", "--json")
    assert "complete" in told
    assert "leftovers: 1 file" in told
    assert f"not ours, left alone: caches/{cache.name}/notes.txt" in told
    assert "4 bytes would be freed in caches. Add --yes" in told
    assert (cache / "train" / "c.0.0.0123456789ab.tmp").exists()
    assert "4 bytes freed in caches." in thresher(folder, "cache", "prune", "--yes")
    assert not (cache / "train" / "c.0.0.0123456789ab.tmp").exists()
    (cache / "notes.txt").unlink()
    assert "is whole" in thresher(folder, "cache", "verify", str(cache))


def test_prune_keeps_what_a_run_was_trained_from_until_told(folder: Path) -> None:
    cache = the_cache(folder)
    attributes = json.loads((cache / "zarr.json").read_text())["attributes"]["thresher"]
    run = folder / "runs" / "recipe" / "a"
    run.mkdir(parents=True)
    config = {"format": "thresher-run", "version": 1, "name": "a", "training": {"finished": False}}
    config["cache"] = {"path": str(cache), "fingerprint": attributes["fingerprint"]}
    (run / "config.json").write_text(json.dumps(config))
    kept = thresher(folder, "cache", "prune", str(cache), "--yes")
    assert "1 run trained from it (--used)" in kept
    assert cache.exists()
    assert " freed in " in thresher(folder, "cache", "prune", str(cache), "--yes", "--used")
    assert not cache.exists()


def test_prune_removes_what_is_old(folder: Path) -> None:
    cache = the_cache(folder)
    then = time.time() - 40 * 86400
    for file in cache.rglob("*"):
        os.utime(file, (then, then))
    assert "last used 40 days ago" in thresher(folder, "cache", "prune")
    thresher(folder, "cache", "prune", "--older-than", "41", "--yes")
    assert cache.exists()
    thresher(folder, "cache", "prune", "--older-than", "39", "--yes")
    assert not cache.exists()


def test_prune_of_what_is_not_there(tmp_path: Path) -> None:
    assert "0 bytes would be freed in caches." in thresher(tmp_path, "cache", "prune")
    with pytest.raises(UserError, match="nowhere is no directory"):
        thresher(tmp_path, "cache", "prune", "nowhere")


def test_a_terminated_harvest_says_so_and_goes_on_to_the_same_bytes(house: Path, tmp_path: Path) -> None:
    extra = [part for item in SETS for part in ("--set", item)]
    command = [sys.executable, "-m", "thresher", "harvest", "books-demo", "--cache", "c", *extra]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        first = tmp_path / "c" / "commits" / "train.0.json"
        while not first.exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        told = process.communicate()[0]
    assert process.returncode == 130, told
    assert "run the same harvest again" in " ".join(told.split())
    kept = {file: file.read_bytes() for file in (tmp_path / "c" / "train").rglob("c.0*")}
    assert first.exists()
    assert not (tmp_path / "c" / "MANIFEST.json").exists()
    assert "Harvested" in thresher(tmp_path, "harvest", "books-demo", "--cache", "c", sets=SETS)
    whole = the_cache(house)
    assert all(file.read_bytes() == data for file, data in kept.items())
    for file in (file for file in whole.rglob("*") if file.is_file() and file.suffix != ".lock"):
        assert (tmp_path / "c" / file.relative_to(whole)).read_bytes() == file.read_bytes(), file.name
