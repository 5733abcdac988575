"""A batch in parts gives the step of the whole batch: for every rule and topology, with AuxK and penalties at work."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.conftest import KINDS, ROWS, inputs, plans_for
from thresher.cache.reader import CacheReader
from thresher.train.dictionary.encoder import Chosen
from thresher.train.dictionary.pools import cut
from thresher.train.fit import Fit
from thresher.train.kernels import firing, padded
from thresher.train.kernels.firing import plain_batch_topk, select_batch_topk
from thresher.train.parts import split, survey, wanted

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

RULES: dict[str, dict[str, Any]] = {
    "relu": {"firing": "relu", "sparsity": 3e-2},
    "topk": {"firing": "topk", "k": 3},
    "batchtopk": {"firing": "batchtopk", "k": 2.5},
    "jumprelu": {"firing": "jumprelu", "sparsity": 3e-2, "preact": 1e-2},
    "jumprelu target": {"firing": "jumprelu", "penalty": "target_l0", "k": 3, "sparsity": 0.5},
    "jumprelu tanh": {"firing": "jumprelu", "penalty": "tanh", "sparsity": 3e-2},
    "batchtopk joint": {"firing": "batchtopk", "k": 2.5, "pool": "joint", "rank_by": "norm", "k_anneal": 5},
    "groupmax": {"firing": "groupmax", "k": 4},
    "gated": {"firing": "gated", "sparsity": 3e-2},
    "global": {"firing": "global", "k": 3},
}


def fit(cache: CacheReader, kind: str, rule: str, micro_rows: int | None, kernels: str = "auto") -> Fit:
    """A third of the way into nothing: fresh weights in float64, every fifth latent dead."""
    settings = {key: value for key, value in RULES[rule].items() if kind == "clt" or key != "pool"}
    if "rank_by" in settings:
        settings["decoder"] = "free"  # else there is nothing to rank by
    (plan, *_) = plans_for(
        cache, "p", {"micro_rows": micro_rows, "kernels": kernels}, kind=kind, pre_bias=kind == "sae", **settings
    )
    made = Fit(plan, cache, torch.device("cpu"))
    made.start(cache)
    made.coder.double()
    for source in range(len(plan.spec.reads)):
        made.coder.encoder(source).tokens_since_fired[::5] = 5000
    return made


def state(of: Fit) -> dict[str, Tensor]:
    return of.checkpoint().tensors


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_make_the_step_of_the_whole_batch(cache: CacheReader, kind: str, rule: str) -> None:
    whole, parts = fit(cache, kind, rule, None), fit(cache, kind, rule, 70)
    for first in (0, ROWS, 2 * ROWS):
        assert whole.step(inputs(cache, whole, first), ROWS).item() > 0
        parts.step(inputs(cache, parts, first), ROWS)
    left, right = state(whole), state(parts)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=1e-9, atol=1e-12, equal_nan=True, msg=name)
    a, b = whole.metrics(), parts.metrics()
    assert a["aux"] > 0
    assert (a["penalty"] > 0) == (rule.split()[0] in ("relu", "jumprelu", "gated"))
    assert b == pytest.approx(a, rel=1e-9)
    assert (parts.done, parts.position) == (whole.done, whole.position) == (3, 3 * ROWS)


@pytest.mark.parametrize("kernels", ["plain", "fast"])
@pytest.mark.parametrize("rule", ["topk", "batchtopk", "batchtopk joint", "groupmax", "global"])
def test_selections_in_parts_are_those_of_the_whole_batch(cache: CacheReader, rule: str, kernels: str) -> None:
    made = fit(cache, "clt", rule, 64, kernels)
    made.coder.float()
    xs = [x.float() for x in inputs(cache, made).xs]
    ys = [y.float() for y in inputs(cache, made).ys]
    with torch.no_grad():
        whole = made.coder(xs)
    known = survey(made.coder, split(xs, 64), split(ys, 64), wanted(made.coder, ROWS, True), ROWS)
    in_parts = [made.coder(part, chosen) for part, chosen in zip(split(xs, 64), known.chosen, strict=True)]
    for source, one in enumerate(whole.fired):
        assert one.selection is not None
        pieces = [out.fired[source] for out in in_parts]
        for offset, piece in zip(range(0, ROWS, 64), pieces, strict=True):
            assert piece.selection is not None
            first, last = (int(one.selection.offsets[n]) for n in (offset, min(offset + 64, ROWS)))
            assert torch.equal(piece.selection.latents, one.selection.latents[first:last])
            assert torch.equal(piece.selection.rows + offset, one.selection.rows[first:last])
            torch.testing.assert_close(piece.z, one.z[first:last])


def test_a_step_that_nothing_couples_takes_no_survey(cache: CacheReader) -> None:
    made = fit(cache, "sae", "topk", 64)
    made.coder.encoder(0).tokens_since_fired.zero_()
    xs, ys = inputs(cache, made)
    known = survey(made.coder, split(xs, 64), split(ys, 64), wanted(made.coder, ROWS, True), ROWS)
    assert known.chosen == [[None]] * 4
    assert (known.whole.tokens, known.whole.l0, known.whole.residual) == (ROWS, None, None)


@pytest.mark.parametrize("count", [0, 1, 37, 90, 91, 400])
def test_the_cut_over_parts_is_exact_with_ties_to_the_lower_position(count: int) -> None:
    rng = torch.Generator().manual_seed(count)
    a_NF = torch.randint(-6, 5, (30, 12), generator=rng).float()  # many ties, about half positive
    parts = []
    for part in a_NF.split([11, 1, 18]):
        best = select_batch_topk(part, min(count, part.numel()))
        parts.append(Chosen(best, best.take(part)))
    kept = torch.zeros_like(a_NF)
    first = 0
    for chosen in cut(parts, count):
        assert chosen.selection is not None
        kept[chosen.selection.rows + first, chosen.selection.latents] = chosen.values
        first += chosen.selection.tokens
    assert torch.equal(kept, a_NF * plain_batch_topk(a_NF, count))


def test_a_batch_that_is_no_larger_than_a_part_is_taken_whole(cache: CacheReader) -> None:
    whole, parts = fit(cache, "clt", "batchtopk", None), fit(cache, "clt", "batchtopk", ROWS)
    for made in (whole, parts):
        made.step(inputs(cache, made), ROWS)
    left, right = state(whole), state(parts)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("rule", ["batchtopk", "batchtopk joint", "topk", "jumprelu", "relu", "gated", "global"])
def test_parts_with_selections_of_fixed_capacity_make_the_same_step(
    cache: CacheReader, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = fit(cache, "sae", rule, None), fit(cache, "sae", rule, 70)
    whole.step(inputs(cache, whole), ROWS)
    monkeypatch.setattr(firing, "fixed_capacity", lambda a, kernels: padded)  # as on a device
    parts.step(inputs(cache, parts), ROWS)
    left, right = state(whole), state(parts)
    for name, tensor in left.items():
        if "room" not in name:
            torch.testing.assert_close(right[name], tensor, rtol=1e-9, atol=1e-12, equal_nan=True, msg=name)


def test_a_step_whose_selection_lacked_room_is_left_out_and_no_failure(
    cache: CacheReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fit(cache, "sae", "relu", None)
    monkeypatch.setattr(firing, "fixed_capacity", lambda a, kernels: padded)
    room = made.coder.encoder(0).rule.room
    room.peak = 1e-3  # room for 65 entries, where about 200 · 32 are positive
    real, moved = padded.above, []

    def above(a_NF: Tensor, floor: Any, capacity: int) -> Any:
        return real(a_NF, floor, capacity if moved else 65)

    monkeypatch.setattr(padded, "above", above)
    before = {name: tensor.clone() for name, tensor in made.coder.named_parameters()}
    counters = made.coder.encoder(0).tokens_since_fired.clone()
    assert made.step(inputs(cache, made), ROWS).item() == 0.0
    assert torch.equal(made.coder.encoder(0).tokens_since_fired, counters)  # nothing was learned from these tokens
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.coder.named_parameters())
    moved.append(True)
    room.peak = 64.0
    assert made.step(inputs(cache, made), ROWS).item() > 0.0
    assert not torch.equal(made.coder.encoder(0).W_enc, before["encoders.0.W_enc"])
    numbers = made.metrics()
    assert (numbers["left_out"], numbers["step"]) == (0.5, 2)
    assert np.isfinite(numbers["gradient_norm"])
