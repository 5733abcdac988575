import numpy as np
import pytest

from thresher.cache import order as orders
from thresher.cache.order import ReadOrder, Stream, feistel, key, mix, mix_array, perm, split_of


def test_keys_and_permutations_never_change() -> None:
    assert key(7, 3, 0) == 0x9C1B0B5B3E06CF11
    assert perm(10, 7, 3, 0).tolist() == [0, 2, 9, 6, 5, 3, 4, 1, 7, 8]
    assert perm(8, 7, 1).tolist() == [6, 1, 0, 3, 7, 2, 4, 5]
    assert perm(8, 7, 2, 5).tolist() == [6, 2, 7, 0, 4, 5, 3, 1]
    assert feistel(10, np.arange(10), 7, 3, 0).tolist() == [9, 4, 3, 7, 1, 6, 8, 0, 2, 5]
    assert feistel(10**12, np.arange(3), 7, 3, 0).tolist() == [150049020086, 707559478315, 23909093721]


@pytest.mark.parametrize("n", [2, 3, 7, 64, 65, 1000, 4097])
def test_a_feistel_network_permutes(n: int) -> None:
    whole = feistel(n, np.arange(n), 5, n)
    assert sorted(whole.tolist()) == list(range(n))
    places = np.array([n - 1, 0, n // 2])
    assert feistel(n, places, 5, n).tolist() == whole[places].tolist()
    assert n < 64 or feistel(n, np.arange(n), 6, n).tolist() != whole.tolist()


def test_a_feistel_network_scatters_like_a_sort() -> None:
    """Neighbours are apart by n/3 on average, and a place tells nothing of its element."""
    n = 1 << 16
    whole = feistel(n, np.arange(n), 1)
    assert np.abs(np.diff(whole)).mean() == pytest.approx(n / 3, rel=0.02)
    assert abs(np.corrcoef(np.arange(n), whole)[0, 1]) < 0.02  # standard deviation 1/√n = .004
    assert (whole == np.arange(n)).sum() < 8  # a random permutation has 1 fixed point on average


def test_mix_of_arrays_equals_mix_of_integers() -> None:
    words = [0, 1, 2**63, 2**64 - 1, 123456789]
    assert mix_array(np.array(words, np.uint64)).tolist() == [mix(word) for word in words]


def test_splits_have_their_shares_and_stand_alone() -> None:
    named = [split_of(mix(i), 5, 0.1, 0.2) for i in range(20000)]
    assert named.count("test") / 20000 == pytest.approx(0.1, abs=0.01)
    assert named.count("validation") / 20000 == pytest.approx(0.2, abs=0.01)
    assert {split_of(i, 5, 0.0, 0.0) for i in range(100)} == {"train"}
    assert all(split_of(mix(i), 5, 0.1, 0.0) == "test" for i in range(20000) if named[i] == "test")


def test_shards_cover_the_stream_once() -> None:
    stored = np.random.default_rng(0).random((60, 16)) < 0.8
    rows = int(stored.sum()) // 8 * 8
    stream = Stream(stored, 3, "test", rows)
    plain = [(c, p) for c in stream.order for p in np.flatnonzero(stored[c])][:rows]
    seen: list[tuple[int, int]] = []
    for index in range(-(-rows // 64)):
        source = stream.shard(index, 64)
        assert len(set(source.contexts.tolist())) == len(source.contexts)
        assert set(range(len(source.contexts))) == set(source.context.tolist())
        seen += list(zip(source.contexts[source.context].tolist(), source.position.tolist(), strict=True))
    assert seen == plain


@pytest.fixture(params=["sorted", "feistel"])
def longest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permutations by sorting, or as those too long for it."""
    monkeypatch.setattr(orders, "LONGEST_SORTED", 1 << 23 if request.param == "sorted" else 1)


@pytest.mark.usefixtures("longest")
@pytest.mark.parametrize("window", [None, 6, 8, 12, 50])
@pytest.mark.parametrize("groups", [4, 5, 100])
def test_every_row_comes_once_an_epoch_whatever_the_batch(groups: int, window: int | None) -> None:
    order = ReadOrder(13, 16, 1, "train", groups, window)
    epochs = []
    for epoch in range(3):
        rows = np.concatenate([order.rows(epoch * 208 + q, min(60, 208 - q)) for q in range(0, 208, 60)])
        assert sorted(rows.tolist()) == list(range(208))
        epochs.append(rows.tolist())
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.rows(0, 624).tolist() == [row for epoch in epochs for row in epoch]


@pytest.mark.usefixtures("longest")
@pytest.mark.parametrize("window", [None, 1, 6])
def test_any_position_is_reached_without_the_ones_before(window: int | None) -> None:
    whole = ReadOrder(13, 16, 1, "train", 4, window).rows(0, 700)
    for start in (1, 63, 64, 96, 200, 207, 208, 417):
        order = ReadOrder(13, 16, 1, "train", 4, window)
        assert order.rows(start, 90).tolist() == whole[start : start + 90].tolist()


@pytest.mark.parametrize("window", [None, 6])
def test_segments_tell_groups_apart_and_cover_all_positions(window: int | None) -> None:
    order = ReadOrder(13, 16, 1, "train", 4, window)
    segments = [s for start in range(0, 416, 52) for s in order.segments(start, 52)]
    assert sum(s.length for s in segments) == 416
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for s in segments:
        groups.setdefault((s.epoch, s.group), []).append(tuple(s.chunks.tolist()))
    assert all(len(set(chunks)) == 1 for chunks in groups.values())
    assert list(groups) == sorted(groups)
    for epoch in range(2):
        met = [chunk for (e, _), chunks in groups.items() if e == epoch for chunk in chunks[0]]
        assert sorted(met) == list(range(13))
        assert met == order.chunks(epoch, 0, 13).tolist()
        assert met[3:9] == order.chunks(epoch, 3, 6).tolist()


@pytest.mark.usefixtures("longest")
def test_a_window_holds_its_own_chunks_and_no_others() -> None:
    order = ReadOrder(26, 16, 1, "train", 4, 12)
    for epoch in range(2):
        for window in range(3):
            first, last = 12 * window, min(12 * window + 12, 26)
            rows = order.rows((26 * epoch + first) * 16, (last - first) * 16)
            assert sorted(rows.tolist()) == list(range(first * 16, last * 16))
        assert (order.chunks(epoch, 0, 12) + 12).tolist() != order.chunks(epoch, 12, 12).tolist()
    assert order.chunks(0, 0, 12).tolist() != order.chunks(1, 0, 12).tolist()


def test_a_window_of_everything_is_no_window() -> None:
    assert (
        ReadOrder(13, 16, 1, "train", 4, 13).rows(0, 416).tolist()
        == ReadOrder(13, 16, 1, "train", 4).rows(0, 416).tolist()
    )


def test_an_order_of_a_trillion_rows_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def sort(*_: int) -> None:
        raise AssertionError("sorted")

    n = 10**9  # chunks
    order = ReadOrder(n, 1024, 1, "train", 64)
    whole = order.rows(n * 1024 - 3 * 65536, 131072)  # the group before the last two
    assert len(set(whole.tolist())) == 131072
    assert n * 512 < whole.max() < n * 1024
    assert order.rows(n * 1024 - 2 * 65536 - 10, 20).tolist() == whole[65536 - 10 :][:20].tolist()
    monkeypatch.setattr(orders, "perm", sort)
    assert len(set(order.chunks(3, n - 100, 100).tolist())) == 100


@pytest.mark.usefixtures("longest")
def test_ranks_that_divide_a_group_read_disjoint_chunks() -> None:
    order = ReadOrder(24, 16, 2, "train", 8, 16)
    for world in (2, 4, 8):
        for start in range(0, 24 * 16, 8 * 16):
            chunks = order.rows(start, 8 * 16) // 16
            assert sum(len(set(chunks[rank::world].tolist())) for rank in range(world)) == 8


def test_within_a_group_chunks_take_turns_and_epoch_0_reads_them_forward() -> None:
    order = ReadOrder(8, 16, 1, "train", 4)
    rows = order.rows(0, 64)
    assert all(len(set((rows[t : t + 4] // 16).tolist())) == 4 for t in range(0, 64, 4))
    assert (rows.reshape(16, 4) % 16).tolist() == [[a] * 4 for a in range(16)]
    later = order.rows(128, 64).reshape(16, 4) % 16
    assert all(sorted(column) == list(range(16)) for column in later.T.tolist())
    assert later.T.tolist()[0] != list(range(16))


def test_positions_are_uncorrelated_with_stored_rows() -> None:
    n = 512 * 64
    order = ReadOrder(512, 64, 9, "train", 64)
    correlation = np.corrcoef(np.arange(n), order.rows(0, n))[0, 1]
    assert abs(correlation) < 0.1  # 512 chunks in random order: standard deviation 1/√512 = .044


def test_a_batch_meets_hardly_more_of_its_own_context_than_a_perfect_shuffle() -> None:
    """Measured pairs of rows of one context in a batch against the exact form of the expectation."""
    m, k, chunk, shard, groups, batch = 512, 64, 64, 4096, 64, 1024
    n, b = m * k, batch // groups
    stored = np.ones((m, k), bool)
    pairs = []
    for seed in range(6):
        stream = Stream(stored, seed, "train", n)
        context = np.empty(n, np.int64)
        for index in range(n // shard):
            source = stream.shard(index, shard)
            inverse = perm(shard, seed, 2, 0, index)
            context[index * shard : (index + 1) * shard] = source.contexts[source.context][inverse]
        order = ReadOrder(n // chunk, chunk, seed, "train", groups)
        for start in range(0, n, batch):
            counts = np.bincount(context[order.rows(start, batch)])
            pairs.append((counts * (counts - 1) // 2).sum())
    chunks = n // chunk
    same_chunk = (b - 1) / (shard - 1)
    same_shard = (batch - b) * (shard / chunk - 1) / ((chunks - 1) * (shard - 1))
    expected = 0.5 * batch * (k - 1) * (same_chunk + same_shard)
    assert np.mean(pairs) == pytest.approx(expected, rel=0.02)
    perfect = 0.5 * batch * (batch - 1) * (k - 1) / (n - 1)
    assert np.mean(pairs) < 1.3 * perfect
