"""Ranks that share the latents of a dictionary take the step of one process: every weight, moment, threshold, counter
and number of the log, for every rule, topology, loss and update rule, with AuxK at work.

Ranks are threads here, which meet at a barrier; what they hold is in float64.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.groups import Meeting, ThreadGroup, latent_meshes, side_by_side
from tests.train.conftest import ROWS, inputs, plans_for
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.train.dictionary.holding import holding_of
from thresher.train.exchange import Share
from thresher.train.fit import Fit
from thresher.train.kernels import firing, padded
from thresher.train.mesh import Mesh
from thresher.train.plan import RunPlan
from thresher.train.state import Checkpoint
from thresher.train.views import Inputs

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

LATENTS = 50
"""Which neither two, three nor four ranks share evenly."""
RULES: dict[str, dict[str, Any]] = {
    "relu": {"firing": "relu", "sparsity": 3e-2},
    "topk": {"firing": "topk", "k": 3},
    "batchtopk": {"firing": "batchtopk", "k": 2.5},
    "jumprelu": {"firing": "jumprelu", "sparsity": 3e-2, "preact": 1e-2},
    "target": {"firing": "jumprelu", "penalty": "target_l0", "k": 3, "sparsity": 0.5},
    "tanh": {"firing": "jumprelu", "penalty": "tanh", "sparsity": 3e-2},
    "groupmax": {"firing": "groupmax", "k": 10},
    "gated": {"firing": "gated", "sparsity": 3e-2},
    "global": {"firing": "global", "k": 3},
}
KINDS: dict[str, dict[str, Any]] = {
    "sae": {"kind": "sae", "pre_bias": True, "layers": (1,)},
    "transcoder": {"kind": "transcoder", "skip": True, "layers": (1,)},
    "clt": {"kind": "clt"},
    "crosscoder": {"kind": "crosscoder"},
}
FURTHER: dict[str, dict[str, Any]] = {
    "prefixes": {**KINDS["sae"], **RULES["batchtopk"], "prefixes": (0.1, 0.5, 1.0)},
    "two codes": {**KINDS["transcoder"], **RULES["topk"], "multi_topk": 0.125},
    "joint pool": {"kind": "clt", "firing": "batchtopk", "k": 2.5, "pool": "joint", "rank_by": "norm", "k_anneal": 9},
    "ranked": {"kind": "clt", "firing": "topk", "k": 3, "rank_by": "norm"},
    "joint aux": {"kind": "clt", "firing": "topk", "k": 3, "aux_scope": "all"},
    "aux unscaled": {"kind": "clt", "firing": "batchtopk", "k": 3, "aux_divisor": "target", "aux_scale": False},
    "power": {**KINDS["sae"], "firing": "relu", "sparsity": 3e-2, "penalty": "lp", "p_start": 1, "p_updates": 2},
    "l1 rows": {"kind": "clt", "firing": "relu", "sparsity": 3e-2, "penalty_norm": "l1", "decoder": "free"},
    "below zero": {"kind": "clt", **RULES["jumprelu"], "preact_form": "zero", "preact_on": "all"},
    "unit targets": {"kind": "clt", **RULES["topk"], "decoder": "unit_per_target"},
    "norms summed": {"kind": "crosscoder", **RULES["relu"], "norm": "sum", "decoder": "free"},
    "resampled": {**KINDS["sae"], **RULES["relu"], "resample": 2, "aux": 0.0},
    "per token": {"kind": "sae", **RULES["topk"], "normalise": "per_token", "layers": (1,)},
}  # fmt: skip


def plan_for(cache: CacheReader, settings: Mapping[str, Any], **training: Any) -> RunPlan:
    (plan,) = plans_for(cache, "p", {"batch_rows": ROWS, **training}, **({"n_latents": LATENTS} | settings))
    return plan


def begun(cache: CacheReader, plan: RunPlan, dead: int) -> Checkpoint:
    """Fresh weights in float64, every so many-th latent dead."""
    fit = Fit(plan, cache, torch.device("cpu"))
    fit.start(cache)
    fit.coder.double()
    for source in range(len(fit.coder.inputs)):
        fit.coder.encoder(source).tokens_since_fired[::dead] = 5000
    return fit.checkpoint()


def taken_up(cache: CacheReader, plan: RunPlan, at: Checkpoint, mesh: Mesh | None = None) -> Fit:
    """A rank's part of it."""
    fit = Fit(plan, cache, torch.device("cpu"), mesh=mesh)
    fit.coder.double()
    of = fit.rows_of or (lambda name, dimensions: None)
    rows = {name: of(name, tensor.dim()) or ... for name, tensor in at.tensors.items()}
    fit.load(at._replace(tensors={name: tensor[rows[name]].clone() for name, tensor in at.tensors.items()}))
    return fit


def stepped(cache: CacheReader, fit: Fit, steps: int) -> Fit:
    """Steps on all rows of a batch, or on every so-manieth where other ranks have the others."""
    group = fit.mesh.data
    places = torch.arange(group.index, ROWS, group.size)
    share = None if group.alone else Share(places, ROWS, -(-ROWS // group.size))
    for step in range(steps):
        whole = inputs(cache, fit, step * ROWS)
        own = whole if share is None else Inputs([x[places] for x in whole.xs], [y[places] for y in whole.ys])
        assert fit.step(own, ROWS, share).item() > 0
    return fit


def joined(parts: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """The tensors of all ranks; those that every rank has must have the same bits."""
    whole = {}
    for name, first in parts[0].tensors.items():
        if name in parts[0].whole:
            whole[name] = torch.cat([part.tensors[name] for part in parts])
            assert whole[name].shape == parts[0].whole[name]
        else:
            assert all(torch.equal(p.tensors[name], first) or bool(first.isnan().all()) for p in parts), name
            whole[name] = first
    return whole


def assert_same(cache: CacheReader, plan: RunPlan, ranks: int, dead: int = 3, steps: int = 2, data: int = 1) -> None:
    at = begun(cache, plan, dead)
    one = stepped(cache, taken_up(cache, plan, at), steps)
    left, numbers = one.checkpoint(), one.metrics()

    def work(mesh: Mesh) -> tuple[Checkpoint, dict[str, Any]]:
        fit = stepped(cache, taken_up(cache, plan, at, mesh), steps)
        return fit.checkpoint(), fit.metrics()

    found = side_by_side(work, latent_meshes(ranks, data))
    for first in range(ranks, len(found), ranks):  # of other rows, with the same bits
        for (own, _), (other, _) in zip(found, found[first:], strict=False):
            assert all(torch.equal(own.tensors[n].nan_to_num(), t.nan_to_num()) for n, t in other.tensors.items())
    right = joined([part for part, _ in found[:ranks]])
    assert right.keys() == left.tensors.keys()
    for name, tensor in left.tensors.items():
        if name.endswith("_extra_state"):  # how much room selections get, which is each rank's own matter
            continue
        torch.testing.assert_close(right[name], tensor, rtol=1e-8, atol=1e-11, equal_nan=True, msg=name)
    for _, told in found:
        assert told == pytest.approx(numbers, rel=1e-8)
    assert plan.spec.aux == 0 or numbers["aux"] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_three_ranks_take_the_steps_of_one(cache: CacheReader, rule: str, kind: str) -> None:
    assert_same(cache, plan_for(cache, {**RULES[rule], **KINDS[kind]}), 3)


@pytest.mark.parametrize("name", FURTHER)
def test_what_else_a_recipe_may_ask_for_comes_to_the_same(cache: CacheReader, name: str) -> None:
    settings = FURTHER[name] | ({"decoder": "free"} if "rank_by" in FURTHER[name] else {})
    assert_same(cache, plan_for(cache, settings), 3, steps=3)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rule", ["topk", "batchtopk", "jumprelu"])
def test_other_numbers_of_ranks_take_them_too(cache: CacheReader, rule: str, ranks: int) -> None:
    assert_same(cache, plan_for(cache, {**KINDS["clt"], **RULES[rule]}), ranks)


@pytest.mark.parametrize("optimiser", ["adamw", "signum", "muon"])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_every_update_rule_moves_rows_as_in_one_process(cache: CacheReader, optimiser: str, kernels: str) -> None:
    settings = {**KINDS["clt"], **RULES["topk"], "decoder": "unit", "skip": True}
    assert_same(cache, plan_for(cache, settings, optimiser=optimiser, kernels=kernels), 3)


def test_library_calls_measure_the_same_norm(cache: CacheReader, monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.train.updates.adam import Adam

    monkeypatch.setattr(Adam, "own", ())
    assert_same(cache, plan_for(cache, {**KINDS["sae"], **RULES["topk"]}), 3)


@pytest.mark.parametrize(("rule", "kind"), [("topk", "sae"), ("batchtopk", "clt"), ("relu", "clt"), ("global", "sae")])
def test_plain_formulas_come_to_the_same(cache: CacheReader, rule: str, kind: str) -> None:
    assert_same(cache, plan_for(cache, {**KINDS[kind], **RULES[rule]}, kernels="plain"), 3)


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "target", "relu"])
def test_a_batch_in_parts_comes_to_the_same(cache: CacheReader, rule: str) -> None:
    assert_same(cache, plan_for(cache, {**KINDS["clt"], **RULES[rule]}, micro_rows=70), 3)


def test_a_rank_without_dead_latents_takes_part(cache: CacheReader) -> None:
    assert_same(cache, plan_for(cache, {**KINDS["sae"], **RULES["topk"], "aux_k": 1}), 4, dead=LATENTS - 1)


@pytest.mark.parametrize(
    "settings",
    [
        {**KINDS["sae"], **RULES["topk"], "aux_k": 2},
        {**KINDS["sae"], **RULES["global"]},
        {**KINDS["clt"], **RULES["target"]},
        FURTHER["joint pool"] | {"decoder": "free"},
        FURTHER["power"],
        FURTHER["resampled"],
    ],
    ids=["topk", "global", "target", "joint pool", "power", "resampled"],
)
def test_rows_and_latents_may_both_be_shared(cache: CacheReader, settings: dict[str, Any]) -> None:
    assert_same(cache, plan_for(cache, settings), 2, data=2, steps=3)


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "relu", "jumprelu"])
def test_selections_of_fixed_capacity_come_to_the_same(
    cache: CacheReader, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firing, "fixed_capacity", lambda a, kernels: padded)  # as on a device
    assert_same(cache, plan_for(cache, {**KINDS["clt"], **RULES[rule]}), 3, steps=2)


COLLECTIVES = {"relu": 2, "jumprelu": 2, "groupmax": 2, "gated": 2, "topk": 3, "batchtopk": 3}
"""In a step: the sum of reconstructions, what is told after the backward passes, and candidates where a rule counts."""


@pytest.mark.parametrize("kind", ["sae", "clt"])
@pytest.mark.parametrize("rule", COLLECTIVES)
def test_a_step_sums_once_forward_and_once_after_its_backward_passes(cache: CacheReader, rule: str, kind: str) -> None:
    plan = plan_for(cache, {**KINDS[kind], **RULES[rule], "aux_k": LATENTS})
    at = begun(cache, plan, 3)

    def work(mesh: Mesh) -> list[int]:
        fit = taken_up(cache, plan, at, mesh)
        assert isinstance(mesh.latents, ThreadGroup)
        before = len(mesh.latents.sizes)
        stepped(cache, fit, 1)
        return mesh.latents.sizes[before:]

    for sizes in side_by_side(work, latent_meshes(2)):
        assert len(sizes) == COLLECTIVES[rule]
        outputs = ROWS * len(plan.spec.writes) * plan.spec.d_out
        assert outputs * 2 <= sizes[-2] < outputs * 2 + 10 + (rule == "gated") * outputs  # ŷ and AuxK's ê, and scalars
        assert sizes[-1] < 100  # b_dec's gradient and numbers
        if len(sizes) == 3:
            assert sizes[0] <= ROWS * (1 + len(plan.spec.reads) * 7)  # float64 scores as int32, entries by row, places


def test_more_dead_latents_than_auxk_wakes_cost_one_exchange(cache: CacheReader) -> None:
    plan = plan_for(cache, {**KINDS["sae"], **RULES["relu"], "aux_k": 2})
    at = begun(cache, plan, 3)

    def work(mesh: Mesh) -> int:
        fit = taken_up(cache, plan, at, mesh)
        before = mesh.latents.collectives
        stepped(cache, fit, 1)
        return mesh.latents.collectives - before

    assert side_by_side(work, latent_meshes(2)) == [3, 3]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"kind": "molt", "n_latents": None, "transforms": 4, "ranks": (8, 4, 2), "sparsity": 0.1},
            "dictionary.kind is 'molt'",
        ),
        ({"firing": "groupmax", "k": 10, "k_anneal": 5, "k_start": 25}, "k_anneal is 5"),
        ({"firing": "groupmax", "k": 2}, "only 2 groups"),
        ({"n_latents": 2, "firing": "topk", "k": 1}, "only 2 latents"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(
    cache: CacheReader, settings: dict[str, Any], told: str
) -> None:
    plan = plan_for(cache, {"kind": "transcoder", "layers": (1,), **settings})
    with pytest.raises(UserError, match=told):
        holding_of(plan.spec, ThreadGroup(Meeting(3), 0))
