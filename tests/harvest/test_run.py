"""The stage end to end on the bundled model and text: exact rows, reuse, resume, refusal."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.distributed import HashStore

from tests.ranks import on_ranks
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.progress import Bounds
from thresher.cache.reader import CacheReader
from thresher.cache.roster import Roster
from thresher.cache.world import World
from thresher.cache.writer import ShardWriter
from thresher.harvest import fill, run, settings, target
from thresher.harvest.corpus import DataConfig, read_corpus
from thresher.harvest.feeder import Feeder
from thresher.harvest.run import HarvestConfig, HarvestResult, harvest, identity
from thresher.harvest.target import TargetConfig, TransformerTarget

TARGET = TargetConfig(device="cpu", dtype="float32")
# Enough for two shards of train, which is what resuming needs, and for one.
DATA = DataConfig(context=64, max_tokens=26_000, test_fraction=0.2)
LITTLE = DataConfig(context=64, max_tokens=8_000, test_fraction=0.2)
CONFIG = HarvestConfig(layers=(0, 2), codec="bf16", batch_contexts=32)
QUIET = Console(quiet=True)
SETTINGS = f"target = {TARGET!r}\ndata = {DATA!r}\nconfig = {CONFIG!r}\n"


def files(path: Path) -> dict[str, bytes]:
    """Every file of a cache but the lock."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.name.endswith(".lock")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HarvestResult:
    return harvest(TARGET, DATA, CONFIG, path=tmp_path_factory.mktemp("caches") / "cache", console=QUIET)


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_the_recomputed_activations_rounded_to_bfloat16(
    split: str, made: HarvestResult, books: TransformerTarget
) -> None:
    reader = CacheReader.open(made.path)
    assert list(reader.sites) == ["L00.mlp_in", "L00.mlp_out", "L02.mlp_in", "L02.mlp_out"]
    origin = reader.provenance(split)
    rows = np.arange(0, reader.rows(split), 197)
    contexts = reader.contexts(split)
    recomputed = books.record(
        torch.from_numpy(contexts.token_id[origin.context[rows]].astype(np.int64)), list(reader.sites.values())
    )
    at = torch.from_numpy(origin.position[rows].astype(np.int64))
    for name, acts in recomputed.items():
        fresh = acts[torch.arange(len(rows)), at]
        stored = reader.gather(split, name, rows)
        # Another batch shape may round the last bit of float32 differently, which can tip a bfloat16 rounding.
        equal = stored == fresh.bfloat16().float()
        assert equal.float().mean() > 0.999
        torch.testing.assert_close(stored, fresh, rtol=2**-8, atol=1e-6)
    assert np.array_equal(origin.token_id[rows], contexts.token_id[origin.context[rows], origin.position[rows]])
    assert (origin.position[rows] > 0).all()
    assert (origin.keep[rows] == 1).all()


def test_int8z_rows_are_the_recomputed_activations_within_the_gate(tmp_path: Path, books: TransformerTarget) -> None:
    config = HarvestConfig(layers=(1,), sites=("mlp_out",))
    result = harvest(TARGET, LITTLE, config, path=tmp_path / "cache", console=QUIET)
    reader = CacheReader.open(result.path, identity=identity(TARGET, LITTLE, config))
    origin, rows = reader.provenance("test"), np.arange(0, reader.rows("test"), 11)
    tokens = torch.from_numpy(reader.contexts("test").token_id[origin.context[rows]].astype(np.int64))
    fresh = books.record(tokens, books.sites(["L01.mlp_out"]))["L01.mlp_out"]
    fresh = fresh[torch.arange(len(rows)), torch.from_numpy(origin.position[rows].astype(np.int64))]
    error = reader.gather("test", "L01.mlp_out", rows) - fresh
    assert error.square().sum() < 1e-3 * (fresh - fresh.mean(0)).square().sum()


def test_sites_of_several_widths_lie_in_one_cache(tmp_path: Path, books: TransformerTarget) -> None:
    config = HarvestConfig(layers=(1,), sites=("mlp_in", "mlp_hidden"), codec="bf16")
    reader = CacheReader.open(harvest(TARGET, LITTLE, config, path=tmp_path / "cache", console=QUIET).path)
    assert [(site.name, site.width) for site in reader.sites.values()] == [("L01.mlp_in", 128), ("L01.mlp_hidden", 512)]
    origin, rows = reader.provenance("test"), np.arange(0, reader.rows("test"), 11)
    tokens = torch.from_numpy(reader.contexts("test").token_id[origin.context[rows]].astype(np.int64))
    at = torch.from_numpy(origin.position[rows].astype(np.int64))
    for name, acts in books.record(tokens, list(reader.sites.values())).items():
        fresh = acts[torch.arange(len(rows)), at]
        torch.testing.assert_close(reader.gather("test", name, rows), fresh, rtol=2**-8, atol=1e-6)


def test_splits_share_no_document(made: HarvestResult) -> None:
    reader = CacheReader.open(made.path)
    train, test = (set(np.unique(reader.provenance(split).document_id)) for split in ("train", "test"))
    assert train
    assert test
    assert not train & test
    assert made.rows == {"train": reader.rows("train"), "test": reader.rows("test")}
    assert not made.reused
    assert made.tokens >= sum(made.rows.values())
    assert reader.facts["points"]["L02.mlp_in"] == "transformer.h.2.mlp, input"
    assert reader.facts["corpus"]["splits"]["train"]["documents"] == len(train)


def test_a_second_harvest_reuses_without_loading_anything(made: HarvestResult) -> None:
    before = files(made.path)
    program = (
        "import dataclasses, sys, pathlib; from rich.console import Console; from thresher.harvest.run import *\n"
        f"{SETTINGS}path = pathlib.Path({str(made.path)!r})\n"
        "config = dataclasses.replace(config, batch_contexts=None)\n"  # free to differ
        "result = harvest(target, data, config, path=path, console=Console())\n"
        "assert result.reused and result.tokens == 0 and result.seconds < 2, result\n"
        "assert not {'transformers', 'transformer_lens', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Reusing the cache" in done.stdout
    assert files(made.path) == before


def test_other_settings_at_the_same_place_are_refused_before_loading(
    made: HarvestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "held", lambda config, roster: pytest.fail("the model was loaded"))
    before = files(made.path)
    for data, config, says in (
        (DATA, HarvestConfig(layers=(0, 1), codec="bf16"), r"harvest\.layers: expected \[0, 1\], got \[0, 2\]"),
        (DATA, HarvestConfig(layers=(0, 2)), "codec: expected 'int8z', got 'bf16'"),
        (DataConfig(context=64, max_tokens=26_000, test_fraction=0.3), CONFIG, "data.test_fraction"),
    ):
        with pytest.raises(UserError, match=says):
            harvest(TARGET, data, config, path=made.path, console=QUIET)
    assert files(made.path) == before


def test_an_interrupted_harvest_goes_on_to_the_same_bytes(
    made: HarvestResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, calls = ShardWriter.add, []

    def add_then_interrupt(self: ShardWriter, acts: Any) -> None:
        add(self, acts)
        calls.append(self.index)
        if self.index == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ShardWriter, "add", add_then_interrupt)
    with pytest.raises(Interrupted, match=r"1 of \d+ shards are in .*run the same harvest again"):
        harvest(TARGET, DATA, CONFIG, path=tmp_path / "cache", console=QUIET)
    assert calls.count(1) == 1, "it stops after the pass that was running"
    with pytest.raises(UserError, match=r"incomplete: 1 of"):
        CacheReader.open(tmp_path / "cache")
    monkeypatch.setattr(ShardWriter, "add", add)
    result = harvest(TARGET, DATA, CONFIG, path=tmp_path / "cache", console=QUIET)
    assert 0 < result.tokens < made.tokens
    assert files(tmp_path / "cache") == files(made.path)
    assert CacheReader.open(tmp_path / "cache").verify() == []


def test_a_killed_harvest_goes_on_to_the_same_bytes(made: HarvestResult, tmp_path: Path) -> None:
    program = (
        "import os, signal, pathlib; from rich.console import Console; from thresher.harvest.run import *\n"
        "from thresher.cache.writer import ShardWriter\n"
        "add = ShardWriter.add\n"
        "ShardWriter.add = lambda s, a: (add(s, a), s.index and os.kill(os.getpid(), signal.SIGKILL))\n"
        f"{SETTINGS}path = pathlib.Path({str(tmp_path / 'cache')!r})\n"
        "harvest(target, data, config, path=path, console=Console(quiet=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="incomplete"):
        CacheReader.open(tmp_path / "cache")
    harvest(TARGET, DATA, CONFIG, path=tmp_path / "cache", console=QUIET)
    assert files(tmp_path / "cache") == files(made.path)


def test_feeding_in_a_thread_changes_no_byte(
    made: HarvestResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill, "Feeder", lambda device: Feeder(device, threaded=True))
    result = harvest(TARGET, DATA, CONFIG, path=tmp_path / "cache", console=QUIET)
    assert files(result.path) == files(made.path)


def test_a_fault_in_the_feeding_thread_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "Feeder", lambda device: Feeder(device, threaded=True))

    def fail(self: ShardWriter, acts: Any) -> None:
        raise UserError("no more")

    monkeypatch.setattr(ShardWriter, "add", fail)
    with pytest.raises(UserError, match="no more"):
        harvest(TARGET, LITTLE, CONFIG, path=tmp_path / "cache", console=QUIET)


def test_activations_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = TransformerTarget.record

    @torch.inference_mode()
    def poisoned(self: TransformerTarget, tokens: Any, sites: Any, keep: Any = None) -> Any:
        acts = record(self, tokens, sites, keep)
        bad = acts["L02.mlp_out"].clone()
        bad[0, 5, 7] = float("nan")
        return acts | {"L02.mlp_out": bad}

    monkeypatch.setattr(TransformerTarget, "record", poisoned)
    with pytest.raises(UserError, match=r"L02\.mlp_out.*context \d+.*position 5"):
        harvest(TARGET, LITTLE, CONFIG, path=tmp_path / "cache", console=QUIET)
    with pytest.raises(UserError, match="incomplete: 0 of"):
        CacheReader.open(tmp_path / "cache")


def test_too_little_disk_is_refused_before_the_first_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.cache.writer.free_bytes", lambda path: 1000)
    monkeypatch.setattr(TransformerTarget, "record", lambda *args, **named: pytest.fail("a pass was run"))
    with pytest.raises(UserError, match=r"not enough disk space.*1,000 are free"):
        harvest(TARGET, LITTLE, CONFIG, path=tmp_path / "cache", console=QUIET)


def test_progress_tells_rate_and_bytes(tmp_path: Path) -> None:
    console = Console(record=True, width=120, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    harvest(TARGET, LITTLE, HarvestConfig(layers=(3,), sites=("mlp_out",)), path=tmp_path / "cache", console=console)
    told = console.export_text()
    assert "to write" in told
    assert "tokens/s" in told


def test_identity_is_of_what_decides_the_bytes() -> None:
    base = identity(TARGET, DATA, CONFIG)
    same = HarvestConfig(layers=(2, 0), codec="bf16", batch_contexts=3, fvu_gate=0.5)
    assert identity(TARGET, DATA, same) == base
    for other in (
        identity(TargetConfig(device="cpu", dtype="bfloat16"), DATA, CONFIG),
        identity(TARGET, DataConfig(context=64), CONFIG),
        identity(TARGET, DATA, HarvestConfig(layers=(0, 2), codec="bf16", seed=1)),
    ):
        assert other != base


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"sites": ()}, "at least one"), ({"layers": ()}, "layer numbers"), ({"batch_contexts": 0}, "at least 1")],
)
def test_settings_are_checked_at_once(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        HarvestConfig(**changes)


def test_sites_that_the_model_lacks_are_refused_before_reading_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "read_corpus", lambda *args: pytest.fail("text was read"))
    with pytest.raises(UserError, match="Did you mean 'mlp_in'"):
        harvest(TARGET, DATA, HarvestConfig(sites=("mlp_inn",)), path=tmp_path / "cache", console=QUIET)
    assert not (tmp_path / "cache").exists()


def test_the_corpus_is_a_function_of_its_settings(tokenizer: Any) -> None:
    first, second = (read_corpus(DATA, tokenizer, 256, 4096, QUIET) for _ in range(2))
    for split in first.splits:
        assert all(map(np.array_equal, first.splits[split], second.splits[split]))


def test_resuming_needs_neither_text_nor_tokenizer(
    made: HarvestResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    shutil.copytree(made.path, path)
    (path / "MANIFEST.json").unlink()
    (path / "commits" / "train.1.json").unlink()
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["thresher"]["facts"]["versions"]["torch"] = "1.0"
    (path / "zarr.json").write_text(json.dumps(root))
    for name in ("read_corpus", "load_tokenizer"):
        monkeypatch.setattr(run, name, lambda *args: pytest.fail("text or tokenizer was asked for"))
    console = Console(record=True, width=200, file=io.StringIO())
    harvest(TARGET, DATA, CONFIG, path=path, console=console)
    told = " ".join(console.export_text().split())
    assert f"begun with other libraries: torch 1.0 then and {torch.__version__.split('+')[0]}" in told
    assert re.search(r"of which \d+ of \d+ shards are there already.*It needs about .* of memory", told, re.DOTALL)
    changed = {name for name, data in files(path).items() if files(made.path)[name] != data}
    assert changed <= {"zarr.json", "MANIFEST.json"}


def test_damaged_contexts_are_not_resumed_from(made: HarvestResult, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shutil.copytree(made.path, path)
    (path / "MANIFEST.json").unlink()
    file = path / "train" / "contexts" / "token_id" / "c.0.0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"train/contexts/token_id is damaged: the digest"):
        harvest(TARGET, DATA, CONFIG, path=path, console=QUIET)


def test_a_definition_that_changed_is_named_with_both_values(
    made: HarvestResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "TAPS_ID", "thresher-taps-2")
    with pytest.raises(UserError, match=r"software\.taps: expected 'thresher-taps-2', got 'thresher-taps-1'"):
        harvest(TARGET, DATA, CONFIG, path=made.path, console=QUIET)


def test_an_interrupt_does_not_hide_a_failed_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = ShardWriter.add

    def add_then_interrupt(self: ShardWriter, acts: Any) -> None:
        add(self, acts)
        if self.index == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ShardWriter, "add", add_then_interrupt)
    config = dataclasses.replace(CONFIG, codec="int8z", fvu_gate=1e-9)
    with pytest.raises(UserError, match=r"shard 0 of 'train'.*fvu_gate"):
        harvest(TARGET, DATA, config, path=tmp_path / "cache", console=QUIET)


def test_processes_of_torchrun_fill_one_cache_to_the_bytes_of_one(tmp_path: Path) -> None:
    recipe = tmp_path / "little.toml"
    recipe.write_text(
        '[target]\ndtype = "float32"\ndevice = "cpu"\n[data]\ncontext = 64\nmax_tokens = 26_000\ntest_fraction = 0.2\n'
        "[harvest]\nlayers = [0, 2]\nbatch_contexts = 32\n[dictionary]\nexpansion = 2\nk = 4\n"
    )
    single = [sys.executable, "-m", "thresher", "harvest", str(recipe), "--cache"]
    double = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *single[1:]]
    told = []
    for command, name in ((single, "one"), (double, "two")):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(tmp_path / name)], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert [text.count("Harvested") for text in told] == [1, 1], "the first process speaks"
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert CacheReader.open(tmp_path / "two").verify() == []


def test_the_echo_of_ctrl_c_does_not_cut_a_harvest_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes on what the terminal has sent to all."""
    roster = Roster(World(rank=0, size=2), HashStore())
    add = ShardWriter.add

    def add_and_interrupt_twice(self: ShardWriter, acts: Any) -> None:
        add(self, acts)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ShardWriter, "add", add_and_interrupt_twice)
    with pytest.raises(Interrupted, match="run the same harvest again to go on"):
        harvest(TARGET, LITTLE, CONFIG, path=tmp_path / "cache", console=QUIET, roster=roster)


def test_a_rank_that_hangs_ends_the_harvest_and_the_next_one_comes_to_the_same_bytes(
    made: HarvestResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, over, hanging = ShardWriter.commit, threading.Event(), threading.local()

    def commit_or_hang(self: ShardWriter) -> None:
        if getattr(hanging, "here", False):
            over.wait(60)
        commit(self)

    def share(roster: Roster) -> HarvestResult:
        hanging.here = roster.world.rank == 1
        try:
            return harvest(TARGET, DATA, CONFIG, path=tmp_path / "cache", console=QUIET, roster=roster)
        finally:
            if roster.world.rank == 0:
                over.set()

    load, one_at_a_time = target.load_target, threading.Lock()

    def load_apart(config: TargetConfig, holders: object) -> TransformerTarget:
        with one_at_a_time:  # transformers loads in one thread of a process
            return load(config)

    monkeypatch.setattr(target, "load_target", load_apart)
    monkeypatch.setattr(ShardWriter, "commit", commit_or_hang)
    speaks, hangs = on_ranks(2, share, bounds=Bounds(1.0, 60.0), end=lambda code: None, say=lambda text: None)
    assert isinstance(speaks, UserError)
    assert re.match(r"Rank 1 of 2 hangs: it has made no progress for \d s.*Stopped\. \d of \d shards", str(speaks))
    assert isinstance(hangs, (Interrupted, UserError))
    monkeypatch.setattr(ShardWriter, "commit", commit)
    harvest(TARGET, DATA, CONFIG, path=tmp_path / "cache", console=QUIET)
    assert files(tmp_path / "cache") == files(made.path)


INDEPENDENT = """
import os, signal, sys, time
from pathlib import Path
from rich.console import Console
from thresher.cache.world import from_environment
from thresher.cache.writer import ShardWriter
from tests.harvest.test_run import CONFIG, DATA, TARGET
from thresher.harvest.run import harvest

commit, world, dead = ShardWriter.commit, from_environment(), Path(sys.argv[1]).with_name("dead")

def together(self):  # each has a shard in its hands when one dies
    if sys.argv[2] == "die" and world.rank == world.size - 1 and not world.restarts:
        dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not dead.exists():
        time.sleep(0.01)
    commit(self)

ShardWriter.commit = together
harvest(TARGET, DATA, CONFIG, path=Path(sys.argv[1]), console=Console(width=200))
"""


def _independent(folder: Path, harm: str, *launch: str) -> subprocess.Popen[str]:
    """A job that harvests into `folder`/cache; with harm "die", its last process dies with its first shard full."""
    script = folder / "independent.py"
    script.write_text(INDEPENDENT)
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    line = [sys.executable, *launch, str(script), str(folder / "cache"), harm]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.long
def test_independent_jobs_fill_one_cache_though_one_dies_and_a_later_one_says_that_all_is_done(
    made: HarvestResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    dies, lives = _independent(tmp_path, "die"), _independent(tmp_path, "live")
    told, complained = lives.communicate(timeout=600)
    dies.communicate(timeout=600)
    assert (dies.returncode, lives.returncode) == (-signal.SIGKILL, 0), complained
    assert "Harvested" in told
    assert files(tmp_path / "cache") == files(made.path)
    said = io.StringIO()
    harvest(TARGET, DATA, CONFIG, path=tmp_path / "cache", console=Console(file=said, width=200))
    assert "Reusing the cache" in said.getvalue()


@pytest.mark.long
def test_torchrun_restarts_a_harvest_of_which_a_process_died_to_the_same_bytes(
    made: HarvestResult, tmp_path: Path
) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    job = _independent(tmp_path, "die", *launch)
    _, complained = job.communicate(timeout=600)
    assert job.returncode == 0, complained
    assert files(tmp_path / "cache") == files(made.path)
