"""Ranks that share the rows of a batch make the step of one process: for every rule, objective and topology.

Ranks are threads here (tests/groups.py); tests/train/test_processes.py has real ones.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.groups import data_meshes, side_by_side
from tests.train.conftest import ROWS, inputs, plans_for
from tests.train.test_objective_steps import OBJECTIVES
from tests.train.test_parts import RULES
from thresher.cache.reader import CacheReader
from thresher.train.candidates import keep_own
from thresher.train.exchange import Share
from thresher.train.fit import Fit
from thresher.train.kernels import firing, padded
from thresher.train.kernels.firing import plain_batch_topk
from thresher.train.mesh import Mesh
from thresher.train.views import Inputs

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "sae": {"kind": "sae", "pre_bias": True},
    "skip transcoder": {"kind": "transcoder", "skip": True},
    "clt": {"kind": "clt"},
    "crosscoder": {"kind": "crosscoder", "reads": "mlp_out", "writes": "mlp_out"},
    "molt": {"kind": "molt", "n_latents": None, "transforms": 8, "ranks": (4, 2)},
}


def begun(cache: CacheReader, mesh: Mesh, settings: dict[str, Any], dtype: torch.dtype, **train: Any) -> Fit:
    """A dictionary of which every fifth latent is dead."""
    (plan, *_) = plans_for(cache, "d", {"steps": 8, "batch_rows": ROWS} | train, **settings)
    made = Fit(plan, cache, torch.device("cpu"), mesh=mesh)
    made.start(cache)
    if dtype == torch.float64:
        made.coder.double()
    for source in range(len(made.coder.inputs)):
        made.coder.encoder(source).tokens_since_fired[::5] = 5000
    return made


def own_step(cache: CacheReader, of: Fit, first: int, idle: bool = False) -> Tensor:
    """A step on what this rank has of a batch: every so-manieth row; `idle`: the last rank has none."""
    whole, group, dtype = inputs(cache, of, first), of.mesh.data, of.coder.b_dec.dtype
    workers = group.size - idle
    places = torch.arange(group.index, ROWS, workers) if group.index < workers else torch.empty(0, dtype=torch.int64)
    share = None if group.alone else Share(places, ROWS, -(-ROWS // workers))
    own = Inputs([x.to(dtype)[places] for x in whole.xs], [y.to(dtype)[places] for y in whole.ys])
    return of.step(own, ROWS, share)


def state(of: Fit) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.checkpoint().tensors.items()}


def stepped(
    cache: CacheReader,
    settings: dict[str, Any],
    steps: int = 2,
    dtype: torch.dtype = torch.float64,
    idle: bool = False,
    **train: Any,
) -> Callable[[Mesh], Fit]:
    def work(mesh: Mesh) -> Fit:
        made = begun(cache, mesh, settings, dtype, **train)
        for step in range(steps):
            assert own_step(cache, made, step * ROWS, idle and not mesh.data.alone).item() > 0
        return made

    return work


def assert_alike(fits: list[Fit]) -> None:
    """All ranks have the same bits, and the same numbers to report."""
    first, *others = [state(one) for one in fits]
    for other in others:
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            assert torch.equal(other[name].nan_to_num(), tensor.nan_to_num()), name
    numbers = [one.metrics() for one in fits]
    assert all(other == numbers[0] for other in numbers)


def assert_step_of_one(cache: CacheReader, settings: dict[str, Any], ranks: int, steps: int = 2, **train: Any) -> None:
    whole = stepped(cache, settings, steps, **train)(Mesh())
    fits = side_by_side(stepped(cache, settings, steps, **train), data_meshes(ranks))
    expected, found = state(whole), state(fits[0])
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-11, equal_nan=True, msg=name)
        if "tokens_since_fired" in name:
            assert torch.equal(found[name], tensor)
    told = whole.metrics()
    assert_alike(fits)
    assert fits[0].done == whole.done == steps
    assert told["fvu"] > 0


CASES = [
    *(("sae", rule) for rule in RULES if rule != "batchtopk joint"),
    *(("clt", rule) for rule in RULES),
    *(("skip transcoder", rule) for rule in ("batchtopk", "jumprelu target")),
    *(("crosscoder", rule) for rule in ("batchtopk", "relu")),
    *(("molt", rule) for rule in ("batchtopk", "jumprelu tanh")),
]


@pytest.mark.parametrize(("topology", "rule"), CASES)
def test_ranks_make_the_step_of_one_process(cache: CacheReader, topology: str, rule: str) -> None:
    settings = {"decoder": "free"} if "rank_by" in RULES[rule] else {}  # else there is nothing to rank by
    assert_step_of_one(cache, TOPOLOGIES[topology] | RULES[rule] | settings, 3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ranks_make_the_step_of_one_process_for_every_objective(cache: CacheReader, objective: str) -> None:
    steps = 4 if "resample" in OBJECTIVES[objective] or OBJECTIVES[objective].get("penalty") == "lp" else 2
    assert_step_of_one(cache, {"kind": "clt"} | OBJECTIVES[objective], 2, steps)


@pytest.mark.parametrize("optimiser", ["adamw", "signum", "muon"])
def test_ranks_make_the_update_of_one_process(cache: CacheReader, optimiser: str) -> None:
    assert_step_of_one(cache, {"kind": "transcoder"} | RULES["batchtopk"], 2, optimiser=optimiser)


@pytest.mark.parametrize("settings", [{"micro_rows": 30}, {"kernels": "plain"}], ids=str)
@pytest.mark.parametrize("rule", ["batchtopk joint", "jumprelu target"])
def test_a_rank_may_take_its_rows_in_parts_and_go_the_plain_way(
    cache: CacheReader, rule: str, settings: dict[str, Any]
) -> None:
    assert_step_of_one(cache, {"kind": "clt", "decoder": "free"} | RULES[rule], 3, **settings)


@pytest.mark.parametrize("rule", ["batchtopk joint", "jumprelu target", "global"])
def test_a_rank_without_rows_takes_part(cache: CacheReader, rule: str) -> None:
    assert_step_of_one(cache, {"kind": "clt", "decoder": "free"} | RULES[rule], 2, idle=True)


@pytest.mark.parametrize("rule", ["batchtopk", "topk", "relu"])
def test_selections_of_fixed_capacity_make_the_same_step(
    cache: CacheReader, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"kind": "sae"} | RULES[rule]
    whole = stepped(cache, settings)(Mesh())
    monkeypatch.setattr(firing, "fixed_capacity", lambda a, kernels: padded)  # as on a device
    fits = side_by_side(stepped(cache, settings), data_meshes(3))
    expected, found = state(whole), state(fits[0])
    for name in (name for name in expected if "room" not in name):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-11, equal_nan=True, msg=name)


def test_what_ranks_select_count_and_follow_has_the_bits_of_one_process(cache: CacheReader) -> None:
    settings = {"kind": "clt"} | RULES["batchtopk"]
    whole = stepped(cache, settings, 1, torch.float32)(Mesh())
    for size in (2, 4):
        fits = side_by_side(stepped(cache, settings, 1, torch.float32), data_meshes(size))
        assert_alike(fits)
        expected, found = state(whole), state(fits[0])
        for name, tensor in expected.items():
            if "tokens_since_fired" in name or "threshold" in name:
                assert torch.equal(found[name], tensor), name
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)  # Adam's first step


@pytest.mark.parametrize("count", [0, 1, 37, 90, 91, 400])
@pytest.mark.parametrize("sources", [1, 2])
def test_the_cut_over_ranks_is_exact_with_ties_to_the_lower_row(count: int, sources: int) -> None:
    rng, N, F, R = torch.Generator().manual_seed(count), 31, 12, 3
    a_SNF = torch.randint(-6, 5, (sources, N, F), generator=rng).float()  # many ties, about half positive
    expected = plain_batch_topk(a_SNF.view(sources * N, F), count).view(sources, N, F)
    most, capacity = -(-N // R), min(count, sources * -(-N // R) * F)
    scores_RC = torch.full((R, capacity), padded.PADDING)
    counts_RSm = torch.zeros(R, sources, most, dtype=torch.int64)
    places_Rm = torch.full((R, most), N)
    own_masks = []
    for rank in range(R):
        own = a_SNF[:, rank::R]
        best = plain_batch_topk(own.reshape(-1, F), count).view(own.shape)  # those that a rank tells of
        scores_RC[rank, : int(best.sum())] = own[best]
        counts_RSm[rank, :, : own.shape[1]] = best.sum(2)
        places_Rm[rank, : own.shape[1]] = torch.arange(rank, N, R)
        own_masks.append(best)
    kept = torch.zeros_like(expected)
    for rank, best in enumerate(own_masks):
        keep = keep_own(scores_RC, counts_RSm, places_Rm, rank, count)[: int(best.sum())]
        kept[:, rank::R] = torch.zeros_like(best).masked_scatter(best, keep)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize(
    ("settings", "rows", "alive"),
    [
        (RULES["topk"] | {"aux": 0.0}, 1, False),
        (RULES["relu"] | {"aux_divisor": "target"}, 1, False),
        (RULES["global"] | {"aux": 0.0}, 1, False),
        (RULES["batchtopk"] | {"aux_divisor": "target"}, 2, False),
        (RULES["batchtopk"], 2, True),
        (RULES["jumprelu target"] | {"aux": 0.0}, 2, False),
        (RULES["topk"], 2, False),
        (RULES["batchtopk"], 3, False),
    ],
    ids=["topk", "relu", "global", "cut", "cut, none dead", "target L0", "AuxK", "cut and AuxK"],
)
def test_a_step_takes_so_many_collectives(cache: CacheReader, settings: dict[str, Any], rows: int, alive: bool) -> None:
    def work(mesh: Mesh) -> int:
        made = begun(cache, mesh, {"kind": "clt"} | settings, torch.float32)
        for source in range(2 if alive else 0):
            made.coder.encoder(source).tokens_since_fired.zero_()
        made.coder.at(1)
        made.done = 1  # the first step of a threshold that is driven takes a cut
        own_step(cache, made, 0)
        assert mesh.everyone.collectives == 0
        return mesh.data.collectives

    assert side_by_side(work, data_meshes(2)) == [rows, rows]
