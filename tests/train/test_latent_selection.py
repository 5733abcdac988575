"""What ranks keep of their own latents together is what one process keeps of all, of equal values too."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.groups import latent_meshes, side_by_side
from thresher.train.dictionary.encoder import Chosen
from thresher.train.dictionary.holding import Holding
from thresher.train.dictionary.offers import best_of_tokens, cut_latents, in_rectangle, rectangle, some
from thresher.train.kernels import firing, padded
from thresher.train.kernels.firing import plain_batch_topk
from thresher.train.kernels.sparse import Selection
from thresher.train.mesh import Group, Mesh

BOUNDS = (0, 2, 9, 14)
"""Latents of three ranks, of which the first has fewer than are kept."""


def block(seed: int) -> Tensor:
    """[30, 14] with many equal values, about half of them positive."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 5, (30, BOUNDS[-1]), generator=rng).double()


def spans() -> list[slice]:
    return [slice(first, stop) for first, stop in itertools.pairwise(BOUNDS)]


def dense(selection: Selection, values: Tensor) -> Tensor:
    """[N, F] the entries in their places; padding nowhere."""
    out = torch.full((selection.tokens, selection.width), torch.nan, dtype=values.dtype)
    real = selection.real if isinstance(selection, padded.Padded) else slice(None)
    out[selection.rows[real], selection.latents[real]] = values[real]
    return out


def plain_topk(a_NF: Tensor, k: int) -> Tensor:
    """[N, F] bool, equal values to the lower latent."""
    best = torch.sort(a_NF, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(a_NF, dtype=torch.bool).scatter_(1, best, True)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("k", [1, 4, 14])
def test_of_every_token_the_largest_stay_and_of_equal_ones_the_lower_latents(k: int, fixed: bool) -> None:
    a_NF, offers, own = block(k), [], []
    for span in spans():
        part, width = a_NF[:, span].contiguous(), span.stop - span.start
        if fixed:
            kept = _padded(plain_topk(part, min(k, width)))
        else:
            kept = firing.compress(plain_topk(part, min(k, width)))
        own.append((kept, kept.take(part)))
        offers.append(rectangle(*own[-1], min(k, 7)))
    keep = best_of_tokens(torch.stack(offers), k)
    found = [dense(*some(*one, in_rectangle(one[0], mine))) for one, mine in zip(own, keep, strict=True)]
    expected = torch.where(plain_topk(a_NF, k), a_NF, torch.nan)
    assert torch.equal(torch.cat(found, 1).nan_to_num(99), expected.nan_to_num(99))


def _padded(mask_NF: Tensor) -> padded.Padded:
    return padded.Padded(torch.nonzero(mask_NF.view(-1)).view(-1), mask_NF.shape[0], mask_NF.shape[1])


def test_what_is_no_number_is_kept() -> None:
    values = torch.tensor([[[torch.nan, 1.0]], [[5.0, 4.0]]])
    assert best_of_tokens(values, 1)[0, 0, 0]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("count", [0, 1, 37, 90, 91, 400])
def test_of_a_batch_the_largest_stay_and_of_equal_ones_the_lower_positions(count: int, fixed: bool) -> None:
    a_NF = block(count)
    sides = {"inputs": ("x",), "spec": SimpleNamespace(pool="layer"), "b_dec": torch.zeros(1, 1, dtype=torch.float64)}

    def work(mesh: Mesh) -> Tensor:
        mine = Holding(group=mesh.latents, bounds=BOUNDS)
        own = a_NF[:, mine.first : mine.stop].contiguous()
        coder: Any = SimpleNamespace(**sides, holding=mine, n_latents=mine.size)
        parts = []
        for part in own.split([11, 1, 18]):  # a batch in parts
            room = min(count, part.numel())
            best = padded.batch_topk(part, room) if fixed else firing.select_batch_topk(part, room)
            parts.append(Chosen(best, best.take(part)))
        (kept,) = cut_latents(coder, mine, 30, [parts], count)
        return torch.cat([dense(one.selection, one.values) for one in kept if one.selection is not None])

    found = torch.cat(side_by_side(work, latent_meshes(3)), 1)
    assert torch.equal(found.nan_to_num(0.0), a_NF * plain_batch_topk(a_NF, count))


def test_shares_are_even_but_for_whole_groups() -> None:
    mine = Holding(group=Group(1, 3), bounds=BOUNDS)
    assert (mine.first, mine.stop, mine.size, mine.width, mine.widest) == (2, 9, 7, 14, 7)
    assert mine.ends((1, 5, 14)) == [0, 3, 7]
