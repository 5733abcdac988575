"""A block of pre-activations made in tiles gives the selection of the block, entry for entry."""

import pytest
import torch
from torch import Tensor

from tests.train.test_losses import LATENTS, RULES, N, batch, make
from thresher.train.kernels import padded, tiles
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.padded import Padded

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def lists(values: Tensor, latents: Tensor, rows: Tensor) -> dict[tuple[int, int], float]:
    return dict(zip(zip(rows.tolist(), latents.tolist(), strict=True), values.tolist(), strict=True))


@pytest.mark.parametrize("forced", ["auto", "plain"])
@pytest.mark.parametrize("rule", RULES)
def test_training_selects_in_tiles_what_it_selects_in_one_block(
    rule: str, forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    coder = make("sae", **RULES[rule])
    coder.use(Kernels(forced))  # type: ignore[arg-type]
    (x, *_), _ = batch(coder)
    x = x.round()  # so that values tie
    one = coder.encoder(0).choose(x, coder.bias(0))
    monkeypatch.setitem(tiles.LIMIT_BYTES, "cpu", 7 * LATENTS * 8)
    many = coder.encoder(0).choose(x, coder.bias(0))
    torch.testing.assert_close(many.values, one.values)
    assert (many.selection is None) == (one.selection is None)
    if one.selection is not None and many.selection is not None:
        assert torch.equal(many.selection.offsets, one.selection.offsets)
        assert torch.equal(many.selection.latents, one.selection.latents)
    assert (many.silent is None) == (one.silent is None)
    if one.silent is not None and many.silent is not None:
        torch.testing.assert_close(many.silent.values, one.silent.values)
        assert torch.equal(many.silent.selection.latents, one.silent.selection.latents)
        assert torch.equal(many.silent.selection.offsets, one.silent.selection.offsets)


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "relu"])
def test_serving_gives_the_same_codes_in_tiles(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coder = make("sae", **RULES[rule])
    (x, *_), _ = batch(coder)
    one = coder.encode(0, x)
    monkeypatch.setitem(tiles.LIMIT_BYTES, "cpu", 7 * LATENTS * 8)
    many = coder.encode(0, x)
    left, right = (lists(codes.values, codes.latents, codes.rows()) for codes in (one, many))
    assert right == pytest.approx(left)
    assert coder.encode(0, x[:0]).tokens == 0


@pytest.mark.parametrize("count", [1, 30, 95])
def test_selections_of_fixed_capacity_join_likewise(count: int) -> None:
    a = torch.randn(N, LATENTS, generator=torch.Generator().manual_seed(0)).mul(2).round()
    parts = []
    for tile in a.split(7):
        selection = padded.batch_topk(tile, min(count, tile.numel()))
        parts.append((selection, selection.take(tile)))
    selection, values = tiles.joined(parts, count)
    expected = padded.batch_topk(a, count)
    assert isinstance(selection, Padded)
    assert torch.equal(selection.offsets, expected.offsets)
    assert torch.equal(selection.positions[selection.real], expected.positions[expected.real])
    assert torch.equal(values, expected.take(a)[: values.shape[0]])


def test_a_tile_holds_at_least_a_row() -> None:
    assert tiles.tile_rows(1 << 40, 4, torch.device("cpu")) == 1
    assert tiles.tile_rows(6144, 4, torch.device("cpu")) > 1024
