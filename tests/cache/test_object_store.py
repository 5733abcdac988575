"""Caches in object stores: the bytes of a local harvest, the batches of a local cache, whatever fails in between."""

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.stores import BUCKET, SECRETS, Fault, Proxy, s3_server, times
from thresher.cache import loading
from thresher.cache.batches import Batches
from thresher.cache.errors import UserError
from thresher.cache.place import place_at
from thresher.cache.reader import CacheReader, find_complete
from thresher.cache.remote import bucket as buckets
from thresher.cache.remote import leases
from thresher.cache.remote.place import ObjectPlace
from thresher.cache.verify import faults


@pytest.fixture(scope="session")
def server() -> Iterator[Proxy]:
    with s3_server() as proxy:
        yield proxy


@pytest.fixture
def s3(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The server as the environment's S3, without faults."""
    server.reset()
    for name, value in {**SECRETS, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(buckets, "_buckets", {})
    monkeypatch.setattr(buckets, "patience", lambda: buckets.Patience(20, 20, 10, 0.01, 0.1))
    return server


@pytest.fixture
def impatient(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures are given up within a second."""
    monkeypatch.setattr(buckets, "patience", lambda: buckets.Patience(0.9, 0.6, 0.4, 0.01, 0.1))


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> ObjectPlace:
    """A place of its own in memory."""
    found = place_at(f"memory://{request.node.name[:60]}/toy.zarr")
    assert isinstance(found, ObjectPlace)
    return found


@pytest.fixture(scope="session")
def small(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of one split and two sites, on disk."""
    path = tmp_path_factory.mktemp("small") / "toy.zarr"
    toy.fill_small(path)
    return path


@pytest.fixture(scope="session")
def on_s3(server: Proxy, small: Path) -> ObjectPlace:
    """The objects of `small`, in the server."""
    import http.client

    connection = http.client.HTTPConnection(*server.upstream)
    for file in small.rglob("*"):
        if file.is_file() and file.suffix != ".lock":
            connection.request("PUT", f"/{BUCKET}/small.zarr/{file.relative_to(small)}", file.read_bytes())
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
    found = place_at(f"s3://{BUCKET}/small.zarr")
    assert isinstance(found, ObjectPlace)
    return found


def objects(root: ObjectPlace) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in root.listing() if not name.endswith(".lock")}


def batches(reader: CacheReader, count: int = 12, **changes: Any) -> list[torch.Tensor]:
    """The first batches of a cache, site after site."""
    settings: dict[str, Any] = {"sites": list(reader.sites), "batch_rows": 240, "seed": 1, "group_chunks": 64}
    with reader:
        made = Batches(reader, **{**settings, **changes})
        return [x_BD for batch in islice(made, count) for x_BD in batch.acts.values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# What is written


@pytest.mark.parametrize("codec", ["int8z", "bf16-lz4"])
def test_every_object_is_the_file_of_a_local_harvest(
    codec: str,
    toy: ModuleType,
    memory: ObjectPlace,
    finished: Callable[..., Path],
    tree: Callable[[Path], dict[str, bytes]],
) -> None:
    toy.fill(memory, codec=codec)
    assert objects(memory) == tree(finished(codec=codec))
    assert not [name for name in memory.listing() if name.endswith(".lock")]
    assert faults(memory) == []
    assert find_complete(memory, toy.IDENTITY) is not None


def test_a_store_that_fails_now_and_then_gets_the_same_bytes(
    toy: ModuleType, s3: Proxy, small: Path, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    chance = random.Random(0)
    kinds = [
        Fault(status=500), Fault(status=503, code="SlowDown"), Fault(reset=True), Fault(lost=True),
        Fault(status=429, code="TooManyRequests"), Fault(status=409, code="ConditionalRequestConflict"),
    ]  # fmt: skip
    failed = []

    def decide(method: str, path: str, headers: Any) -> Fault:
        if chance.random() < 0.1 and len(failed) < 12:
            failed.append(kinds[len(failed) % len(kinds)])
            return failed[-1]
        return Fault()

    s3.decide = decide
    where = place_at(f"s3://{BUCKET}/shaky/toy.zarr")
    toy.fill_small(where)
    assert len(failed) >= len(kinds)
    s3.reset()
    assert isinstance(where, ObjectPlace)
    assert objects(where) == tree(small)


def test_a_large_object_goes_in_parts_and_arrives_whole(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.decide = times(1, Fault(status=500), "PUT", "partNumber")
    where = place_at(f"s3://{BUCKET}/large")
    assert isinstance(where, ObjectPlace)
    data = np.arange(buckets.PART_BYTES // 4 + 1000, dtype=np.int32)
    where.put([memoryview(data.view(np.uint8).data), memoryview(b"end")])
    assert sum("partNumber" in path for _, path, _ in s3.seen) >= 3
    assert where.read_bytes() == data.tobytes() + b"end"


@pytest.mark.parametrize("die_at", [3, 17, 24])
def test_killed_writers_are_succeeded_by_ones_that_end_in_the_same_bytes(
    die_at: int, s3: Proxy, victim: Any, small: Path, tree: Callable[[Path], dict[str, bytes]], toy: ModuleType
) -> None:
    where = place_at(f"s3://{BUCKET}/killed{die_at}/toy.zarr")
    assert isinstance(where, ObjectPlace)
    environment = {**SECRETS, "AWS_ENDPOINT_URL": s3.url}
    assert victim(where, die_at=die_at, environment=environment) == "killed"
    with pytest.raises(UserError, match=r"no cache at|shards are committed"):
        CacheReader.open(where)
    toy.fill_small(where)
    assert objects(where) == tree(small)


def test_racing_writers_make_one_cache(
    s3: Proxy, victim: Any, small: Path, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    where = place_at(f"s3://{BUCKET}/race/toy.zarr")
    assert isinstance(where, ObjectPlace)
    environment = {**SECRETS, "AWS_ENDPOINT_URL": s3.url}
    said = victim.together(where, *[{"environment": environment} for _ in range(3)])
    assert all(answer.isdigit() for answer in said), said
    assert objects(where) == tree(small)
    commits = [path for method, path, _ in s3.seen if method == "PUT" and "/commits/train." in path and "json" in path]
    assert len(commits) == len(set(commits)), "a shard was committed twice"


# Leases


def test_a_lease_is_one_holders_until_it_is_released(memory: ObjectPlace) -> None:
    lease = leases.take(memory / "a.lock")
    assert lease is not None
    assert lease.fresh
    assert leases.take(memory / "a.lock") is None
    lease.release()
    again = leases.take(memory / "a.lock")
    assert again is not None
    again.release()
    assert memory.listing() == {}


def test_a_lease_of_another_machine_is_taken_over_once_it_has_run_out(
    memory: ObjectPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SECONDS", 0.4)
    there = leases._this_process
    monkeypatch.setattr(leases, "_this_process", lambda: {**there(), "machine": "another"})
    lease = leases.take(memory / "a.lock")
    assert lease is not None
    monkeypatch.setattr(leases, "_this_process", there)
    time.sleep(0.6)
    lease.renew()
    assert leases.take(memory / "a.lock") is None, "it was moved on"
    lease._tag, tag = None, lease._tag  # its holder hangs, or is gone
    time.sleep(0.5)
    successor = leases.take(memory / "a.lock")
    assert successor is not None
    assert not successor.fresh
    lease._tag = tag
    lease.renew()
    assert not lease.held, "it notices"
    lease.release()
    assert leases.take(memory / "a.lock") is None, "and leaves its successor's alone"
    successor.release()


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(
    memory: ObjectPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = leases._this_process()
    with monkeypatch.context() as patch:
        patch.setattr(leases, "_this_process", lambda: {**here, "process": 1 << 22, "born": "1"})
        dead = leases.take(memory / "a.lock")
        assert dead is not None
    successor = leases.take(memory / "a.lock")
    assert successor is not None
    successor.release()
    dead.release()
    assert not [thread for thread in threading.enumerate() if thread.name == "thresher-leases"]


def test_a_create_whose_answer_was_lost_is_known_as_ones_own(s3: Proxy) -> None:
    where = place_at(f"s3://{BUCKET}/lost/record")
    assert isinstance(where, ObjectPlace)
    s3.decide = times(1, Fault(lost=True), "PUT")
    where.put([memoryview(b"mine")], exclusive=True)
    with pytest.raises(FileExistsError):
        where.put([memoryview(b"mine")], exclusive=True)


def test_a_store_without_conditional_writes_is_refused(toy: ModuleType, s3: Proxy) -> None:
    s3.decide = lambda method, path, headers: Fault(drop=("if-none-match",))
    with pytest.raises(UserError, match="overwrites objects that a conditional create"):
        toy.fill_small(place_at(f"s3://{BUCKET}/careless/toy.zarr"))


# What is read


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503, code="SlowDown"),
        Fault(reset=True),
        Fault(reset=True, after=40),
        Fault(cut=40),
        Fault(flip=11),
        Fault(delay=1.0),
    ],
    ids=["500", "slow-down", "reset", "reset-within", "cut", "flipped", "silent"],
)
def test_batches_are_those_of_the_disk_whatever_passes(
    fault: Fault, s3: Proxy, on_s3: ObjectPlace, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(CacheReader.open(small))
    if fault.delay:
        monkeypatch.setattr(buckets, "patience", lambda: buckets.Patience(20, 20, 0.5, 0.01, 0.1))
    reader = CacheReader.open(on_s3)
    s3.decide = times(1 if fault.flip else 2, fault, within="/train/L00.mlp_out/c.")
    assert same(batches(reader), expected)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(status=500), r"the store answered 500 \(InternalError\)\. Tried \d+ times in \d\.\d s"),
        (Fault(status=503, code="SlowDown"), r"the store answered 503 \(SlowDown\)\. Tried \d+ times"),
        (Fault(reset=True), r"the connection failed or broke off\. Tried \d+ times"),
        (Fault(delay=0.6), r"there was no answer in time\. Tried \d+ times"),
        (Fault(cut=40), r"the answer was cut short: 40 of [\d,]+ bytes came\. Tried 4 times"),
        (Fault(flip=11), r"chunk \d+ of shard \d of train/L00.mlp_out does not match its checksum\. Delete s3://"),
    ],
    ids=["500", "slow-down", "reset", "silent", "cut", "flipped"],
)
def test_what_does_not_pass_is_told_with_place_and_number_of_tries(
    fault: Fault, said: str, s3: Proxy, on_s3: ObjectPlace, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches(CacheReader.open(small), 1)  # what is compiled does not keep the server from answering in time
    monkeypatch.setenv("THRESHER_KEEP_GB", "0")
    reader = CacheReader.open(on_s3)
    for shard in range(reader.plan.splits["train"].shards):
        reader.chunk("train", "L00.mlp_out", shard * reader.plan.shard_rows // reader.chunk_rows)
    monkeypatch.setattr(buckets, "_buckets", {})
    if fault.flip is None:
        monkeypatch.setattr(buckets, "patience", lambda: buckets.Patience(0.9, 0.9, 0.4, 0.01, 0.1))
    s3.decide = times(10_000, fault, within="/train/L00.mlp_out/c.")
    with pytest.raises(UserError, match=said) as told:
        batches(reader)
    assert f"s3://{BUCKET}/small.zarr" in str(told.value)
    assert "?" not in str(told.value)


def test_ranks_and_resumed_runs_read_the_same_rows(s3: Proxy, on_s3: ObjectPlace, small: Path) -> None:
    for changes in ({"start": 240 * 13}, {"rank": 1, "world": 3}, {"dtype": torch.bfloat16}, {"group_chunks": 7}):
        assert same(batches(CacheReader.open(on_s3), **changes), batches(CacheReader.open(small), **changes))


def test_neighbours_come_by_one_request_and_later_epochs_by_none(s3: Proxy, on_s3: ObjectPlace) -> None:
    reader = CacheReader.open(on_s3)
    chunks = reader.rows("train") // reader.chunk_rows
    s3.reset()
    assert batches(reader, 20, batch_rows=400)
    ranges = [path for method, path, asked in s3.seen if asked and "/c." in path]
    files = len(reader.plan.sites) * reader.plan.splits["train"].shards
    assert len(ranges) <= 2 * files, "one for the index, one for all chunks of a file"
    assert chunks > 10 * reader.plan.splits["train"].shards


def test_kept_chunks_are_found_by_the_next_reader_and_fetched_again_when_damaged(
    s3: Proxy, on_s3: ObjectPlace, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THRESHER_KEEP_IN", str(tmp_path))
    expected = batches(CacheReader.open(small))

    def fetched() -> int:
        """Requests for chunks and indices."""
        reader = CacheReader.open(on_s3)
        s3.reset()
        assert same(batches(reader), expected)
        return sum(asked is not None and "/c." in path for _, path, asked in s3.seen)

    first, indices = fetched(), fetched()
    assert first > indices
    for file in tmp_path.glob("*/*"):
        file.write_bytes(file.read_bytes()[::-1])
    assert fetched() > indices
    assert fetched() == indices


def test_read_ahead_is_as_many_groups_as_its_bytes(on_s3: ObjectPlace, s3: Proxy) -> None:
    reader = CacheReader.open(on_s3)
    names = loading.array_names(reader, "train", list(reader.sites))
    group = sum(8 * reader.chunk_rows * reader.arrays("train")[name].row_bytes for name in names)
    for groups, expected in ((0.5, 1), (1, 1), (3.5, 3)):
        reader.reading = dataclasses.replace(reader.reading, read_ahead_mb=groups * group / 1e6)
        loader = loading.Loader(reader, "train", names, reader.order("train", 1, 8), "remote")
        (segment,) = loader.order.segments(0, 1)
        loader.group(segment, 0)
        assert len(loader._pending) == expected
        loader.close()
    reader.close()


def test_verify_names_the_chunk(on_s3: ObjectPlace, s3: Proxy, toy: ModuleType, memory: ObjectPlace) -> None:
    assert faults(on_s3) == []
    toy.fill_small(memory)
    name = "train/L00.mlp_out/c.1.0"
    data = bytearray((memory / name).read_bytes())
    data[3] ^= 1
    (memory / name).put([memoryview(data)])
    assert faults(memory) == [f"{name}: chunk 0 does not match its checksum"]
    (memory / "train/L00.mlp_out/c.0.0").unlink()
    assert f"{'train/L00.mlp_out/c.0.0'}: missing" in faults(memory)


def test_stock_zarr_opens_it(on_s3: ObjectPlace, s3: Proxy, small: Path) -> None:
    import zarr
    from zarr.storage import ObjectStore

    from thresher.cache import bfloat16

    bfloat16.register()
    store = ObjectStore(buckets.bucket("s3", BUCKET).store, read_only=True)
    found = zarr.open_group(store, path="small.zarr", mode="r")["train/L00.mlp_out"]
    expected = CacheReader.open(small).chunk("train", "L00.mlp_out", 2)
    rows = np.asarray(found[2 * len(expected) : 3 * len(expected)])
    assert np.array_equal(rows.view(np.uint16), expected)


# What is refused


def test_failures_that_are_the_users_are_told_at_once(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    where, elsewhere = place_at(f"s3://{BUCKET}/none.zarr"), place_at("s3://nobody/none.zarr")
    with pytest.raises(UserError, match="there is no bucket 'nobody'"):
        CacheReader.open(elsewhere)
    with pytest.raises(UserError, match=f"there is no cache at s3://{BUCKET}/none.zarr"):
        CacheReader.open(where)
    for status, code, said in [
        (403, "AccessDenied", r"access was denied \(the store answered 403 \(AccessDenied\)\)\. Check AWS_ACCESS"),
        (403, "SignatureDoesNotMatch", "access was denied"),
        (400, "ExpiredToken", "the credentials have expired"),
        (400, "AuthorizationHeaderMalformed", "the bucket is in another region"),
        (301, "PermanentRedirect", "the bucket is in another region or at another address"),
        (403, "RequestTimeTooSkewed", "the clock of this machine is wrong"),
    ]:
        s3.reset()
        s3.decide = times(9, Fault(status=status, code=code))
        with pytest.raises(UserError, match=said):
            where.read_bytes()
        assert len(s3.seen) == 1, "it does not help to ask again"


def test_without_credentials_it_says_which_variables_to_set(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://169.254.169.254.invalid")
    with pytest.raises(UserError, match=r"no credentials for it in the environment\. Set AWS_ACCESS_KEY_ID"):
        place_at(f"s3://{BUCKET}/none.zarr").exists()


def test_a_wrong_address_is_given_up_soon(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"the connection failed or broke off\. Tried \d+ times .* AWS_ENDPOINT_URL"):
        place_at(f"s3://{BUCKET}/none.zarr").exists()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text",
    ["s3://", "s3://bucket", "s3://bucket/", "s3://b/../x", "ftp://b/x", "file://host/x", "file:relative://x"],
)
def test_what_names_no_place_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="the cache's URI"):
        place_at(text)


def test_uris_and_paths_are_told_apart() -> None:
    assert place_at("caches/a.zarr") == Path("caches/a.zarr")
    assert place_at("file:///tmp/a%20b.zarr") == Path("/tmp/a b.zarr")
    assert str(place_at("gs://bucket//a/b.zarr/") / "train") == "gs://bucket/a/b.zarr/train"
    assert place_at("az://container/a").parent / "b.json" == place_at("az://container/b.json")
    assert place_at("s3://b/a/train.3.json").with_suffix(".lock").name == "train.3.lock"


def test_credentials_are_nowhere(
    s3: Proxy, impatient: None, on_s3: ObjectPlace, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    told = []
    for fault in (Fault(status=403, code="AccessDenied"), Fault(status=500), Fault(reset=True), Fault(delay=0.6)):
        s3.decide = times(10_000, fault)
        with pytest.raises(UserError) as error:
            CacheReader.open(on_s3)
        told += [str(error.value), repr(error.value.__cause__), str(on_s3), repr(on_s3), repr(on_s3.bucket)]
    for uri in ("s3://{AWS_ACCESS_KEY_ID}:{AWS_SECRET_ACCESS_KEY}@b/x", "az://b/x?sig={AWS_SECRET_ACCESS_KEY}"):
        with pytest.raises(UserError, match="more than a bucket and a prefix") as error:
            place_at(uri.format(**SECRETS))
        told.append(str(error.value))
    everything = "\n".join([*told, *capfd.readouterr(), caplog.text])
    assert not [name for name, secret in SECRETS.items() if secret in everything]
