"""A cache that is extended equals one harvested at once; killed in the middle, the base stays good."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from thresher.cache.arrays import read_plain
from thresher.cache.errors import UserError
from thresher.cache.index import strike
from thresher.cache.place import place_at
from thresher.cache.reader import CacheReader, find_complete
from thresher.cache.remote.place import ObjectPlace
from thresher.cache.stats import unpack
from thresher.cache.stored import parts
from thresher.harvest import extend as extend_module
from thresher.harvest import run
from thresher.harvest.corpus import DataConfig
from thresher.harvest.run import HarvestConfig, harvest, identity
from thresher.harvest.target import TargetConfig

TARGET = TargetConfig(device="cpu", dtype="float32")
DATA = DataConfig(context=64, max_documents=40, test_fraction=0.2, source="bundled:books")
MORE = dataclasses.replace(DATA, skip_documents=40, max_documents=30)
BASE = HarvestConfig(layers=(0,), sites=("mlp_out",), batch_contexts=16)
ALL = HarvestConfig(layers=(0, 2), sites=("mlp_in", "mlp_out"), batch_contexts=16)
QUIET = Console(quiet=True)


def files(path: Path, below: str = "") -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted((path / below).rglob("*"))
        if file.is_file() and file.suffix != ".lock"
    }


def make(path: Path, config: HarvestConfig, data: DataConfig = DATA, **named: Any) -> Path:
    return harvest(TARGET, data, config, path=path, console=QUIET, **named).path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("caches") / "whole", ALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One site, then all sites, then more text."""
    path = make(tmp_path_factory.mktemp("caches") / "extended", BASE)
    before = files(path)
    make(path, ALL, extend=True)
    make(path, ALL, MORE, extend=True)
    after = files(path)
    assert {name: after[name] for name in before} == before, "the base was rewritten"
    return path


def test_an_object_store_is_extended_to_the_same_bytes(extended: Path) -> None:
    place = place_at("memory://extended/cache")
    for config, data, further in ((BASE, DATA, False), (ALL, DATA, True), (ALL, MORE, True)):
        harvest(TARGET, data, config, path=place, console=QUIET, extend=further)
    assert isinstance(place, ObjectPlace)
    assert {name: (place / name).read_bytes() for name in place.listing()} == files(extended)
    assert CacheReader.open(place).verify() == []


def test_added_sites_equal_those_of_one_harvest_bit_by_bit(whole: Path, extended: Path) -> None:
    base, added = parts(extended)[:2]
    assert added.path.name == "01-sites"
    assert [site.name for site in added.plan.sites] == ["L00.mlp_in", "L02.mlp_in", "L02.mlp_out"]
    assert not (added.path / "train" / "token_id").exists()
    plan = parts(whole)[0].plan
    for part in (base, added):
        for site in part.plan.sites:
            for folder in ("train/{}", "train/{}.scale", "test/{}", "test/{}.scale", "calibration/{}", "stats/{}"):
                name = folder.format(site.name)
                assert files(part.path / name) == files(whole / name), name
        for split, sizes in plan.splits.items():
            for index in range(sizes.shards):
                read = (read_plain(p / split / "moments", q.moments_array(split), index)[0] for p, q in
                        ((part.path, part.plan), (whole, plan)))  # fmt: skip
                mine, theirs = (
                    [unpack(q.sites, mask) for mask in packed]
                    for packed, q in zip(read, (part.plan, plan), strict=True)
                )
                for site in part.plan.sites:
                    for mask in range(2):
                        assert all(map(np.array_equal, mine[mask][site.name], theirs[mask][site.name]))


def test_added_text_is_a_segment_with_the_same_calibration(extended: Path) -> None:
    base, sites, text = parts(extended)
    assert text.path.name == "02-tokens"
    assert text.complete
    assert {site.name for site in text.plan.sites} == {"L00.mlp_in", "L00.mlp_out", "L02.mlp_in", "L02.mlp_out"}
    assert (text.plan.chunk_rows, text.plan.shard_rows) == (base.plan.chunk_rows, base.plan.shard_rows)
    for part in (base, sites):
        for site in part.plan.sites:
            name = f"calibration/{site.name}/c.0.0"
            assert (text.path / name).read_bytes() == (part.path / name).read_bytes()
    reader = CacheReader.open(extended)
    assert reader.rows("train") == sum(part.plan.splits["train"].rows for part in (base, text))
    assert reader.verify() == []


def test_sites_are_added_to_every_segment(extended: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "c", BASE)
    make(path, BASE, MORE, extend=True)
    make(path, ALL, extend=True)
    assert [part.path.name for part in parts(path)[1:]] == ["01-tokens", "02-sites", "03-sites"]
    for name in ("L00.mlp_in", "L02.mlp_out"):
        for split in ("train", "test"):
            one, other = (CacheReader.open(each) for each in (path, extended))
            rows = np.arange(one.rows(split))
            assert np.array_equal(one.gather(split, name, rows), other.gather(split, name, rows))
    assert CacheReader.open(path).verify() == []
    before = files(path)
    result = harvest(TARGET, DATA, ALL, path=path, console=QUIET, extend=True)
    assert result.reused
    assert files(path) == before


def test_an_extended_cache_serves_the_recipes_it_was_made_by(extended: Path) -> None:
    for data, config in ((DATA, BASE), (DATA, ALL), (MORE, ALL)):
        assert find_complete(extended, identity(TARGET, data, config)) is not None


@pytest.mark.parametrize(("config", "data"), [(ALL, DATA), (BASE, MORE)])
def test_killed_in_the_middle_the_base_stays_and_the_rerun_ends_in_the_same_bytes(
    config: HarvestConfig, data: DataConfig, tmp_path: Path
) -> None:
    whole, path = make(tmp_path / "whole", BASE), make(tmp_path / "c", BASE)
    base = files(path)
    make(whole, config, data, extend=True)
    program = (
        "import os, signal, pathlib; from rich.console import Console; from thresher.harvest.run import *\n"
        "from thresher.cache.writer import ShardWriter\n"
        "add = ShardWriter.add\n"
        "ShardWriter.add = lambda s, a: (add(s, a), s.index and os.kill(os.getpid(), signal.SIGKILL))\n"
        f"harvest({TARGET!r}, {data!r}, {config!r}, path=pathlib.Path({str(path)!r}), "
        "console=Console(quiet=True), extend=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    now = files(path)
    assert {name: now[name] for name in base} == base
    assert CacheReader.open(path).verify() == []
    assert list(CacheReader.open(path).sites) == ["L00.mlp_out"]
    other = dataclasses.replace(MORE, skip_documents=70, max_documents=5)
    with pytest.raises(UserError, match=r"is an extension that was not finished"):
        make(path, BASE, other, extend=True)
    make(path, config, data, extend=True)
    assert files(path) == files(whole)


@pytest.mark.parametrize(
    ("part", "config", "data", "extend"),
    [
        ("parts/01-sites", ALL, DATA, True),
        ("parts/02-tokens", ALL, MORE, True),
        ("", ALL, DATA, True),
        ("", BASE, DATA, True),
        ("", BASE, DATA, False),
    ],
)
def test_a_damaged_shard_is_written_anew_as_the_message_says(
    part: str, config: HarvestConfig, data: DataConfig, extend: bool, extended: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    shutil.copytree(extended, path)
    before, reader = files(path), CacheReader.open(path)
    own = next(p for p in reader.parts() if p.path == path / part)
    file = own.path / "test" / next(iter(own.sites)) / "c.0.0"
    content = bytearray(file.read_bytes())
    content[40] ^= 2
    file.write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum") as raised:
        own.chunk("test", next(iter(own.sites)), 0)
    reader.close()
    told = re.search(
        r"Delete (\S+) and (\S+), then run `thresher harvest RECIPE --cache (\S+) --extend`", str(raised.value)
    )
    assert told is not None
    assert told[3] == str(path)
    for name in told.groups()[:2]:
        Path(name).unlink()
    with pytest.raises(UserError, match=r"--extend`|incomplete"):
        CacheReader.open(path)
    make(path, config, data, extend=extend)
    assert files(path) == before
    assert CacheReader.open(path).verify() == []


@pytest.mark.parametrize(
    ("lost", "data"), [("02-tokens", MORE), ("01-sites", DATA), ("02-tokens/zarr.json", MORE), ("INDEX.json", MORE)]
)
def test_a_lost_part_is_written_anew_in_its_place(lost: str, data: DataConfig, extended: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(extended, path)
    before, gone = files(path), path / "parts" / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(UserError, match=lost):
        CacheReader.open(path)
    if lost != "INDEX.json":
        for other in (dataclasses.replace(MORE, skip_documents=70), *([DATA] if data is MORE else [])):
            with pytest.raises(UserError, match=f"{lost.split('/')[0]}.*--extend` with the recipe that added it"):
                make(path, ALL, other, extend=True)
    make(path, ALL, data, extend=True)
    if lost == "INDEX.json":
        with CacheReader.open(path) as reader:
            assert reader.incomplete == ["parts/01-sites"]
        make(path, ALL, DATA, extend=True)
    assert files(path) == before


def test_killed_before_it_was_listed_the_same_command_goes_on(
    extended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    shutil.copytree(extended, path)
    before = files(path)
    strike(path, ["02-tokens"])
    assert CacheReader.open(path).incomplete == ["parts/02-tokens"]
    monkeypatch.setattr(extend_module, "read_corpus", lambda *args, **named: pytest.fail("text was read"))
    make(path, ALL, MORE, extend=True)
    assert files(path) == before


def test_few_documents_may_leave_a_held_out_split_without_a_context(extended: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(extended, path)
    before = CacheReader.open(path)
    few = dataclasses.replace(MORE, skip_documents=70, max_documents=3)
    make(path, ALL, few, extend=True)
    after = CacheReader.open(path)
    assert "test" not in after.segments[2].base.plan.splits
    assert after.rows("train") > before.rows("train")
    assert after.rows("test") == before.rows("test")
    assert after.verify() == []
    with pytest.raises(UserError, match=r"train no full context.*Give more documents"):
        make(path, ALL, dataclasses.replace(few, skip_documents=73, max_tokens=20), extend=True)


def test_extending_is_suggested_only_where_it_can_be_done(extended: Path) -> None:
    more = dataclasses.replace(ALL, layers=(0, 1))
    with pytest.raises(UserError, match=r"expected \[0, 1\], got \[0\].* --extend`"):
        make(extended, more)
    for config, data in (
        (dataclasses.replace(more, codec="bf16"), DATA),
        (more, dataclasses.replace(DATA, separator="none")),
    ):
        with pytest.raises(UserError, match="holds another cache") as raised:
            make(extended, config, data)
        assert "--extend" not in str(raised.value)


def test_what_no_extension_bridges_is_refused_with_keys(extended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(extended)
    with monkeypatch.context() as patch:
        patch.setattr(extend_module, "held", lambda config, roster: pytest.fail("the model was loaded"))
        for data, config, says in (
            (DATA, dataclasses.replace(ALL, seed=1), r"harvest\.seed: expected 1, got 0"),
            (dataclasses.replace(DATA, separator="none"), ALL, r"data\.separator: expected 'none', got 'eos'"),
        ):
            with pytest.raises(UserError, match=says):
                make(extended, config, data, extend=True)
    with pytest.raises(UserError, match=r"skip_documents is 0.*documents 0 to 39 .*Set data.skip_documents to 40"):
        make(extended, ALL, dataclasses.replace(DATA, max_documents=90), extend=True)
    with pytest.raises(UserError, match=r"other text and for more sites at once \(L01\.mlp_in"):
        make(extended, dataclasses.replace(ALL, layers=(1,)), dataclasses.replace(MORE, max_documents=9), extend=True)
    assert files(extended) == before


def test_a_missing_or_unfinished_cache_is_not_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no cache"):
        make(tmp_path / "none", ALL, extend=True)
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(run, "fill_part", lambda *a, **k: pytest.fail("filled"))
    path = tmp_path / "c"
    path.mkdir()
    (path / "zarr.json").write_text(json.dumps({"attributes": {}}))
    with pytest.raises(UserError, match="not the root of a Thresher cache"):
        make(path, ALL, extend=True)
