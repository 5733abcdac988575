"""A cache of several parts reads as one: sites joined, segments of text in a row."""

import fcntl
import gc
import json
import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from thresher.cache import bfloat16, sealing
from thresher.cache.arrays import read_plain, write_plain
from thresher.cache.batches import Batches
from thresher.cache.errors import UserError
from thresher.cache.index import read_index, strike
from thresher.cache.layout import Contexts, calibration_array
from thresher.cache.plan import Extends
from thresher.cache.prune import Policy, remove, survey
from thresher.cache.reader import CacheReader, find_complete
from thresher.cache.summary import summary
from thresher.cache.verify import faults, in_the_making

HARVEST = {"sites": ["mlp_in", "mlp_out"], "layers": [0], "taps": "t"}
IDENTITY: dict[str, Any] = {"data": "one", "harvest": HARVEST}
MORE: dict[str, Any] = {"data": "one", "harvest": {**HARVEST, "sites": ["mlp_in", "mlp_out", "blocks.1.x"]}}
OTHER: dict[str, Any] = {"data": "two", "harvest": {**HARVEST, "sites": ["L00.mlp_in", "L00.mlp_out"], "layers": None}}
CODECS = ["int8z", "bf16-lz4"]


class Build:
    """Caches of parts, made of the toy's sites and two texts."""

    def __init__(self, toy: ModuleType, codec: str) -> None:
        self.toy, self.codec = toy, codec
        self.texts = {
            "one": toy.CONTEXTS,
            "two": {
                "train": toy.toy_contexts(60, 7),
                "test": toy.toy_contexts(15, 8),
                "validation": toy.toy_contexts(3, 9),
            },
        }

    def fill(self, path: Path, text: str, sites: slice, identity: Any, extends: Extends | None = None) -> str:
        """Write one part; its fingerprint."""
        toy, contexts = self.toy, self.texts[text]
        before, toy.CONTEXTS = toy.CONTEXTS, contexts
        try:
            changes = {"sites": toy.SITES[sites], "contexts": contexts, "codec": self.codec, "store": "all"}
            with toy.open_writer(path, identity=identity, extends=extends, **changes) as writer:
                while (claimed := writer.claim()) is not None:
                    shard = writer.shard(*claimed)
                    acts = toy.activations(shard.split, shard.contexts)
                    shard.add({site.name: acts[site.name] for site in toy.SITES[sites]})
                    shard.commit()
                writer.finalize()
                return str(writer.plan.fingerprint)
        finally:
            toy.CONTEXTS = before

    def original(self, reader: CacheReader, split: str, site: str) -> torch.Tensor:
        """[N, d] activations that the rows of a joined cache were made from, by their provenance."""
        p, first = reader.provenance(split), len(self.texts["one"][split].token_id)
        out = torch.empty(len(p.context), reader.sites[site].width)
        for text, shift in (("one", 0), ("two", first)):
            mine = np.flatnonzero((p.context >= first) == (text == "two"))
            before, self.toy.CONTEXTS = self.toy.CONTEXTS, self.texts[text]
            acts = self.toy.activations(split, p.context[mine] - shift)[site]
            self.toy.CONTEXTS = before
            out[mine] = acts[torch.arange(len(mine)), torch.from_numpy(p.position[mine]).long()]
        return out


@pytest.fixture(scope="module", params=CODECS)
def built(
    request: pytest.FixtureRequest, toy: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Build, Path]:
    """Text one at two sites, a third site for it, then text two, and the third site for that."""
    build, path = Build(toy, request.param), tmp_path_factory.mktemp("parts") / "c.zarr"
    base = build.fill(path, "one", slice(2), IDENTITY)
    build.fill(path / "parts" / "01-sites", "one", slice(2, 3), MORE, Extends("sites", base))
    tokens = build.fill(path / "parts" / "02-tokens", "two", slice(2), OTHER, Extends("tokens", base))
    build.fill(path / "parts" / "03-sites", "two", slice(2, 3), OTHER, Extends("sites", tokens))
    return build, path


def drop(path: Path, *names: str) -> None:
    """Remove parts for good."""
    strike(path, names)
    for name in names:
        shutil.rmtree(path / "parts" / name)


def raising(kind: type[BaseException]) -> Callable[..., None]:
    def fail(*arguments: object, **named: object) -> None:
        raise kind

    return fail


@pytest.fixture
def own(built: tuple[Build, Path], tmp_path: Path) -> Path:
    shutil.copytree(built[1], tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


def test_more_sites_are_as_if_they_had_been_there(built: tuple[Build, Path], own: Path, tmp_path: Path) -> None:
    build, _ = built
    drop(own, "02-tokens", "03-sites")
    build.fill(tmp_path / "whole", "one", slice(3), MORE)
    joined, whole = CacheReader.open(own), CacheReader.open(tmp_path / "whole")
    assert list(joined.sites) == list(whole.sites) == [site.name for site in build.toy.SITES]
    settings: dict[str, Any] = {"sites": list(whole.sites), "batch_rows": 100, "seed": 1, "group_chunks": 5}
    for a, b in zip(islice(Batches(joined, **settings), 40), islice(Batches(whole, **settings), 40), strict=True):
        assert all(torch.equal(a.acts[name], b.acts[name]) for name in whole.sites)
    for name in whole.sites:
        assert all(np.array_equal(a, b) for a, b in zip(joined.statistics(name), whole.statistics(name), strict=True))
    assert joined.fingerprint == CacheReader.open(own).segments[0].base.fingerprint


def test_more_text_follows_in_one_order(built: tuple[Build, Path]) -> None:
    build, path = built
    reader = CacheReader.open(path)
    assert list(reader.sites) == [site.name for site in build.toy.SITES]
    for split in ("train", "test", "validation"):
        parts = [segment.base.rows(split) for segment in reader.segments]
        assert reader.rows(split) == sum(parts)
        p, contexts = reader.provenance(split), reader.contexts(split)
        places = p.context.astype(np.int64) * 32 + p.position
        assert len(set(places.tolist())) == len(places) == reader.rows(split)
        assert np.array_equal(p.token_id, contexts.token_id[p.context, p.position])
        assert np.array_equal(p.document_id, contexts.document_id[p.context, p.position])
        assert np.array_equal(p.keep, contexts.keep[p.context, p.position])
        documents = [set(p.document_id[: parts[0]].tolist()), set(p.document_id[parts[0] :].tolist())]
        assert not documents[0] & documents[1]
        for site in build.toy.SITES:
            x, back = build.original(reader, split, site.name), reader.gather(split, site.name, np.arange(sum(parts)))
            if build.codec == "int8z" and len(x):
                kept = p.keep == 1
                error = (back - x)[kept].double().square().sum()
                assert error < 2e-3 * (x[kept] - x[kept].mean(0)).double().square().sum()
            else:
                assert torch.equal(back, x.to(torch.bfloat16).float())


def test_batches_run_through_all_segments(built: tuple[Build, Path]) -> None:
    _, path = built
    reader = CacheReader.open(path)
    n = reader.rows("train")
    batches = Batches(reader, sites=list(reader.sites), batch_rows=100, seed=1, group_chunks=8, special=True, end=n)
    seen = []
    for batch in batches:
        rows = batches.order.rows(batch.start, 100)
        seen.append(rows)
        for name in reader.sites:
            assert torch.equal(batch.acts[name], reader.gather("train", name, rows))
    rows = np.concatenate(seen)
    assert len(np.unique(rows)) == len(rows) == n // 100 * 100
    first = reader.segments[0].base.rows("train")
    assert abs((rows[:1000] < first).mean() - first / n) < 0.1, "segments are shuffled into one another"


def test_statistics_are_those_of_all_kept_rows(built: tuple[Build, Path]) -> None:
    build, path = built
    reader = CacheReader.open(path)
    kept = reader.provenance("train").keep == 1
    for site in build.toy.SITES:
        x, got = build.original(reader, "train", site.name)[kept].double(), reader.statistics(site.name)
        assert got.count == len(x)
        np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.variance, x.var(0, unbiased=False), rtol=1e-5)
        np.testing.assert_allclose(got.mean_norm, x.norm(dim=1).mean(), rtol=1e-6)
        np.testing.assert_allclose(got.total_variance, got.variance.sum(), rtol=1e-12)


def test_stock_zarr_and_tensorstore_read_every_part(built: tuple[Build, Path]) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    bfloat16.register()
    _, path = built
    reader = CacheReader.open(path)
    for part in reader.parts():
        root: Any = zarr.open_group(str(part.path), mode="r")
        for split in part.plan.splits:
            for name in part.specs[split]:
                chunks = [part.chunk(split, name, c) for c in range(part.rows(split) // part.plan.chunk_rows)]
                ours = b"".join(chunk.tobytes() for chunk in chunks)
                assert root[f"{split}/{name}"][:].tobytes() == ours
                folder = {"driver": "file", "path": str(part.path / split / name)}
                array = tensorstore.open({"driver": "zarr3", "kvstore": folder}, read=True).result()
                assert array.read().result().tobytes() == ours


def test_a_part_in_the_making_does_not_count_and_is_named(own: Path) -> None:
    strike(own, ["03-sites"])
    (own / "parts" / "03-sites" / "MANIFEST.json").unlink()
    (own / "parts" / "04-tokens").mkdir()
    reader = CacheReader.open(own)
    assert list(reader.sites) == ["L00.mlp_in", "L00.mlp_out"], "the third site is not there for all text"
    assert len(reader.segments) == 2
    assert reader.incomplete == ["parts/03-sites", "parts/04-tokens"]
    strike(own, ["02-tokens"])
    (own / "parts" / "02-tokens" / "MANIFEST.json").unlink()
    reader = CacheReader.open(own)
    assert len(reader.sites) == 3
    assert len(reader.segments) == 1
    assert summary(reader)["incomplete"] == ["parts/02-tokens", "parts/03-sites", "parts/04-tokens"]
    assert reader.verify() == []
    assert in_the_making(own) == reader.incomplete


@pytest.mark.parametrize("name", ["", "MANIFEST.json", "zarr.json", "train/zarr.json", "stats", "train/L00.mlp_in"])
def test_what_is_lost_of_a_finished_part_is_refused_and_named(name: str, own: Path) -> None:
    lost = own / "parts" / "02-tokens" / name
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    found = faults(own)
    assert found
    assert all("parts/02-tokens" in line for line in found)
    if name != "train/zarr.json":  # at which only verify and zarr look
        with pytest.raises(UserError, match="parts/02-tokens"):
            CacheReader.open(own).statistics("L00.mlp_in")


def test_a_manifest_of_another_part_is_refused(own: Path) -> None:
    shutil.copy(own / "parts/03-sites/MANIFEST.json", own / "parts/02-tokens/MANIFEST.json")
    with pytest.raises(UserError, match=r"lists parts/02-tokens as finished, but .* is not the one.*--extend"):
        CacheReader.open(own)
    assert any("SHA-256 differs" in line for line in faults(own))


def test_every_flipped_bit_and_the_loss_of_the_index_are_found(own: Path) -> None:
    index = own / "parts" / "INDEX.json"
    data = index.read_bytes()
    for at in range(0, len(data), 7):
        index.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(UserError, match=r"INDEX\.json is damaged"):
            CacheReader.open(own)
    assert [line for line in faults(own) if line.startswith("parts/INDEX.json")] == faults(own)
    index.unlink()
    with pytest.raises(UserError, match=r"INDEX\.json is missing"):
        CacheReader.open(own)
    assert any(line.startswith("parts/INDEX.json") for line in faults(own))


def test_killed_between_manifest_and_index_the_same_again_mends_it(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    build, path = Build(toy, "int8z"), tmp_path / "c"
    extends = Extends("sites", build.fill(path, "one", slice(2), IDENTITY))
    with monkeypatch.context() as patch:
        patch.setattr(sealing, "enter", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build.fill(path / "parts" / "01-sites", "one", slice(2, 3), MORE, extends)
    assert (path / "parts" / "01-sites" / "MANIFEST.json").exists()
    reader = CacheReader.open(path)
    assert (len(reader.sites), reader.incomplete) == (2, ["parts/01-sites"])
    assert reader.verify() == []
    before = tree(path / "parts" / "01-sites")
    build.fill(path / "parts" / "01-sites", "one", slice(2, 3), MORE, extends)
    reader = CacheReader.open(path)
    assert (len(reader.sites), reader.incomplete) == (3, [])
    assert tree(path / "parts" / "01-sites") == before


def test_pruning_a_part_takes_it_off_the_index_first(own: Path) -> None:
    for file in (own / "parts" / "03-sites").rglob("*.json"):
        file.unlink()
    assert not any(f.name.startswith("parts/03") for f in remove(own, Policy(), named=False).files), "it may be mended"
    base = survey(own)
    assert base.parts[3].listed
    for part in ("", "parts/01-sites", "parts/02-tokens"):  # used just now
        (own / part / "MANIFEST.json").touch()
    for file in (own / "parts" / "03-sites").rglob("*"):
        os.utime(file, (1, 1))
    remove(own, Policy(older_than=1), named=False)
    assert not (own / "parts" / "03-sites").exists()
    assert "03-sites" not in read_index(own)
    assert len(CacheReader.open(own).segments) == 2


def flip_calibration(path: Path, site: Any, *, sound: bool) -> None:
    """Flip a bit of a stored μ, in a file whose own checksum holds (`sound`) or does not."""
    spec, folder = calibration_array(site), path / "calibration" / site.name
    values = read_plain(folder, spec).copy()
    values.reshape(-1).view(np.uint8)[2] ^= 1
    if sound:
        write_plain(folder, spec, values)
    else:
        data = bytearray((folder / spec.file_name(0)).read_bytes())
        data[2] ^= 1
        (folder / spec.file_name(0)).write_bytes(data)


@pytest.mark.parametrize(("sound", "said"), [(True, "is not the one that shard 0 of "), (False, "is damaged")])
def test_no_extension_inherits_a_calibration_other_than_the_one_rows_were_stored_with(
    sound: bool, said: str, toy: ModuleType, tmp_path: Path
) -> None:
    build, path = Build(toy, "int8z"), tmp_path / "c"
    extends = Extends("tokens", build.fill(path, "one", slice(2), IDENTITY))
    shutil.copytree(path / "calibration", tmp_path / "calibration")
    flip_calibration(path, toy.SITES[1], sound=sound)
    with pytest.raises(UserError, match=rf"{path}/calibration\S* {said}.*Restore"):
        build.fill(path / "parts" / "01-tokens", "two", slice(2), OTHER, extends)
    assert not (path / "parts" / "01-tokens").exists(), "nothing was planned"
    shutil.copytree(tmp_path / "calibration", path / "calibration", dirs_exist_ok=True)
    build.fill(path / "parts" / "01-tokens", "two", slice(2), OTHER, extends)
    assert CacheReader.open(path).verify() == []


def test_segments_of_several_calibrations_are_refused(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the base was removed and harvested anew on another device, under an extension of the old one."""
    build, path, other, acts = Build(toy, "int8z"), tmp_path / "c", tmp_path / "other", toy.activations
    extends = Extends("tokens", build.fill(path, "one", slice(2), IDENTITY))
    build.fill(path / "parts" / "01-tokens", "two", slice(2), OTHER, extends)
    monkeypatch.setattr(toy, "activations", lambda *which: {name: 1.01 * x for name, x in acts(*which).items()})
    build.fill(other, "one", slice(2), IDENTITY)
    shutil.copytree(path / "parts", other / "parts")
    reader = CacheReader.open(other)
    with pytest.raises(UserError, match=r"01-tokens.*'L00\.mlp_in'.*other calibration.*other.* Restore"):
        reader.gather("train", "L00.mlp_in", np.arange(2))
    (fault,) = faults(other)
    assert "'L00.mlp_in' with another calibration" in fault, "though each part is sound by itself"


def test_a_segment_may_lack_a_split(toy: ModuleType, tmp_path: Path) -> None:
    build, path = Build(toy, "int8z"), tmp_path / "c"
    whole = build.texts["two"]
    build.texts["two"] = {"train": whole["train"]}
    build.texts["three"] = {**whole, "train": toy.toy_contexts(60, 17)}
    extends = Extends("tokens", build.fill(path, "one", slice(2), IDENTITY))
    build.fill(path / "parts" / "01-tokens", "two", slice(2), OTHER, extends)
    build.fill(path / "parts" / "02-tokens", "three", slice(2), {**OTHER, "data": "three"}, extends)
    reader = CacheReader.open(path)
    assert reader.verify() == []
    for split in ("train", "test", "validation"):
        p, contexts = reader.provenance(split), reader.contexts(split)
        held = [segment.base.plan.splits.get(split) for segment in reader.segments]
        assert reader.rows(split) == sum(sizes.rows for sizes in held if sizes) == len(p.context)
        assert len(contexts.keep) == sum(sizes.contexts for sizes in held if sizes)
        assert np.array_equal(p.token_id, contexts.token_id[p.context, p.position])
        assert np.array_equal(p.document_id, contexts.document_id[p.context, p.position])
    rows = np.arange(reader.rows("test"))
    inner = reader.segments[2].base
    assert np.array_equal(
        reader.chunk("test", "L00.mlp_in", len(rows) // reader.chunk_rows - 1),
        inner.chunk("test", "L00.mlp_in", inner.rows("test") // reader.chunk_rows - 1),
    )


def test_a_part_of_another_cache_is_refused(own: Path, built: tuple[Build, Path], tmp_path: Path) -> None:
    build, _ = built
    build.fill(tmp_path / "other", "one", slice(2), {**IDENTITY, "data": "three"})
    shutil.copytree(own / "parts", tmp_path / "other" / "parts")
    with pytest.raises(UserError, match=r"0[12]-(sites|tokens) extends another cache"):
        CacheReader.open(tmp_path / "other")


def test_the_cache_serves_every_recipe_that_asks_for_less(built: tuple[Build, Path]) -> None:
    _, path = built
    for served in (
        IDENTITY,
        MORE,
        OTHER,
        {**IDENTITY, "harvest": {**HARVEST, "sites": ["mlp_out"]}},
        {**IDENTITY, "harvest": {**HARVEST, "sites": ["L00.mlp_out"], "layers": None}},
        {**OTHER, "harvest": {**HARVEST, "sites": ["blocks.1.x"], "layers": None}},
        CacheReader.open(path).identity,
    ):
        CacheReader.open(path, identity=served)
        assert find_complete(path, served) is not None
    for refused, why in (
        ({**IDENTITY, "data": "three"}, "data: expected 'three', got 'one'"),
        ({**IDENTITY, "harvest": {**HARVEST, "taps": "u"}}, r"harvest\.taps: expected 'u', got 't'"),
        ({**IDENTITY, "harvest": {**HARVEST, "sites": ["resid_pre"]}}, r"'resid_pre' at layers \[0\] is not among"),
        ({**IDENTITY, "harvest": {**HARVEST, "layers": [0, 1]}}, r"'mlp_in' at layers \[0, 1\] is not among"),
        ({**IDENTITY, "harvest": {**HARVEST, "layers": None}}, "'mlp_in' is not among"),
    ):
        assert find_complete(path, refused) is None
        with pytest.raises(UserError, match=why):
            CacheReader.open(path, identity=refused)


def test_identity_and_fingerprint_change_with_the_rows_alone(own: Path) -> None:
    both = CacheReader.open(own)
    assert both.identity["segments"] == [OTHER]
    drop(own, "02-tokens", "03-sites")
    one = CacheReader.open(own)
    assert one.identity == IDENTITY
    drop(own, "01-sites")
    base = CacheReader.open(own)
    assert base.fingerprint == one.fingerprint != both.fingerprint
    with pytest.raises(UserError, match="segments"):
        CacheReader.open(own, identity=both.identity)


@pytest.mark.parametrize("name", ["parts/02-tokens/train/L00.mlp_in/c.0.0", "parts/01-sites/commits/test.0.json"])
def test_verify_reads_all_parts(name: str, own: Path) -> None:
    data = bytearray((own / name).read_bytes())
    data[40] ^= 2
    (own / name).write_bytes(data)
    assert [line for line in faults(own) if line.startswith(name)]


def test_the_summary_names_parts_and_sums_sites(built: tuple[Build, Path]) -> None:
    build, path = built
    facts = summary(CacheReader.open(path))
    assert json.loads(json.dumps(facts)) == facts
    assert [part["name"] for part in facts["parts"]] == [
        "base",
        "parts/01-sites",
        "parts/02-tokens",
        "parts/03-sites",
    ]
    for site in build.toy.SITES:
        files = (f for f in path.rglob(f"{site.name}*/c.*") if "stats" not in f.parts and "calibration" not in f.parts)
        assert facts["sites"][site.name]["bytes"] == sum(file.stat().st_size for file in files)
    locks = sum(file.stat().st_size for file in path.rglob("*.lock"))
    records = sum(file.stat().st_size for file in path.rglob("*.json") if file.parent.name == "commits")
    manifests = sum(file.stat().st_size for name in ("MANIFEST.json", "INDEX.json") for file in path.rglob(name))
    everything = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert facts["bytes"] == everything - locks - records - manifests


def test_the_summary_tells_each_text_and_the_documents_that_were_read_of_it(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, path, opened = Build(toy, "int8z"), tmp_path / "c", toy.open_writer

    def text(name: str, skip: int) -> dict[str, Any]:
        return {"data": {"source": name, "skip_documents": skip, "max_tokens": None}, "harvest": HARVEST}

    def add(folder: str, identity: Any, read: int, extends: Extends | None) -> str:
        facts = {"corpus": {"documents_read": read}}
        monkeypatch.setattr(toy, "open_writer", lambda path, **named: opened(path, facts=facts, **named))
        return build.fill(path / folder, "two" if extends else "one", slice(1), identity, extends)

    extends = Extends("tokens", add("", text("a", 0), 7, None))
    add("parts/01-tokens", text("a", 7), 12, extends)
    add("parts/02-tokens", text("b", 0), 3, extends)
    texts = summary(CacheReader.open(path))["texts"]
    assert texts == [{"source": "a", "documents": 12}, {"source": "b", "documents": 3}]


def test_an_open_reader_is_seen_and_a_closed_one_is_not(finished: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(finished(), path)
    (path / "read.lock").touch()
    descriptor = os.open(path / "read.lock", os.O_RDONLY)

    def free() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return True

    with CacheReader.open(path), CacheReader.open(path):
        assert not free()
    assert free()
    reader = CacheReader.open(path)
    assert not free()
    del reader
    gc.collect()
    assert free()
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="being pruned"):
        CacheReader.open(path)
    os.close(descriptor)
    (path / "read.lock").unlink()
    CacheReader.open(path).close()


def test_pruning_takes_every_part_and_leaves_nothing(own: Path) -> None:
    found = survey(own)
    assert [part.state for part in found.parts] == ["complete"] * len(found.parts)
    assert len(found.parts) > 2
    assert found.strangers == ()
    remove(own, Policy(), named=True)
    assert not own.exists()


def test_documents_of_contexts_keep_their_padding(built: tuple[Build, Path]) -> None:
    build, path = built
    contexts: Contexts = CacheReader.open(path).contexts("train")
    assert ((contexts.document_id == -1) == (contexts.keep == 0)).all()
    assert len(contexts.keep) == sum(len(text["train"].keep) for text in build.texts.values())
