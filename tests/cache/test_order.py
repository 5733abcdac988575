import numpy as np
import pytest

from thresher.cache.order import ReadOrder, Stream, key, mix, mix_array, perm, split_of


def test_keys_and_permutations_never_change() -> None:
    assert key(7, 3, 0) == 0x9C1B0B5B3E06CF11
    assert perm(10, 7, 3, 0).tolist() == [0, 2, 9, 6, 5, 3, 4, 1, 7, 8]
    assert perm(8, 7, 1).tolist() == [6, 1, 0, 3, 7, 2, 4, 5]
    assert perm(8, 7, 2, 5).tolist() == [6, 2, 7, 0, 4, 5, 3, 1]


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


@pytest.mark.parametrize("groups", [4, 5, 100])
def test_every_row_comes_once_an_epoch_whatever_the_batch(groups: int) -> None:
    order = ReadOrder(13, 16, 1, "train", groups)
    epochs = []
    for epoch in range(3):
        rows = np.concatenate([order.rows(epoch * 208 + q, min(60, 208 - q)) for q in range(0, 208, 60)])
        assert sorted(rows.tolist()) == list(range(208))
        epochs.append(rows.tolist())
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.rows(0, 624).tolist() == [row for epoch in epochs for row in epoch]


def test_any_position_is_reached_without_the_ones_before() -> None:
    order = ReadOrder(13, 16, 1, "train", 4)
    whole = order.rows(0, 700)
    for start in (1, 63, 64, 200, 207, 208, 417):
        assert ReadOrder(13, 16, 1, "train", 4).rows(start, 90).tolist() == whole[start : start + 90].tolist()


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
