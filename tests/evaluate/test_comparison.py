"""Rows against each other: chances by brute force, who may be compared with whom, families, seeds."""

import numpy as np
import pytest

from thresher.evaluate.comparison import Group, groups, hypervolumes, mark_chances, mark_fronts, matched, points
from thresher.evaluate.costs import AXES
from thresher.evaluate.pareto import Point, fronts
from thresher.evaluate.passes import CLEAN, patched_label
from thresher.evaluate.results import DEFINITIONS, Row, Segments
from thresher.evaluate.run import Replacement
from thresher.evaluate.seeds import METRICS, seed_spreads
from thresher.evaluate.statistics import draws
from thresher.evaluate.verdict import Draw, Judge

SITE, RESAMPLES = "L00.mlp_out", 200


def row(name, delta, cost, kind="replacement", family="A", protocol="cascade", sites=(SITE,), **facts):
    metrics = {"delta": delta, "kl": None, "fvu": 0.5}
    costs = dict.fromkeys(AXES, float(cost))
    return Row(name, kind, family, protocol, (SITE,), sites, metrics, {}, costs, {}, (), (), facts, {}, {}, ())


def measured(kit, nll_PU, active_PU, tokens_U, families="A"):
    """Rows and groups of P made-up replacements on U documents; the clean model has loss 1 per token throughout."""
    sets = [Replacement(f"r{p}", (kit.Random(["L00.mlp_in"], [SITE]),), {}) for p in range(len(nll_PU))]
    units = np.arange(len(tokens_U))
    arms = {CLEAN: np.stack([tokens_U, *np.zeros((3, len(units)))], axis=1)}
    for replacement, nll_U in zip(sets, nll_PU, strict=True):
        arms[patched_label("cascade", replacement.name)] = np.stack([nll_U, *np.zeros((3, len(units)))], axis=1)
    l0 = {replacement.name: active_U for replacement, active_U in zip(sets, active_PU, strict=True)}
    judge = Judge(Segments(units, units, tokens_U, tokens_U, arms, l0), "cascade", True, Draw(RESAMPLES, 4))
    rows = [
        row(
            r.name,
            (nll_U - tokens_U).sum() / tokens_U.sum(),
            active_U.sum() / tokens_U.sum(),
            family=families[i % len(families)],
        )
        for i, (r, nll_U, active_U) in enumerate(zip(sets, nll_PU, active_PU, strict=True))
    ]
    return rows, groups(sets, rows, {"cascade": judge})


def random_points(kit, seed=0, many=6, units=15, families="A"):
    rng = np.random.default_rng(seed)
    tokens_U = rng.integers(20, 60, size=units)
    nll_PU = tokens_U * (1 + rng.uniform(0.2, 0.6, size=(many, units)))
    active_PU = tokens_U * rng.integers(5, 40, size=(many, units))
    return tokens_U, nll_PU, active_PU, measured(kit, nll_PU, active_PU, tokens_U, families)


# --- chances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_chances_equal_fronts_of_every_resample_one_by_one(kit, seed):
    tokens_U, nll_PU, active_PU, (rows, found) = random_points(kit, seed)
    mark_chances(found)
    counts = np.zeros(len(rows))
    for weight_U in draws(len(tokens_U), RESAMPLES, 4):
        total = (weight_U * tokens_U).sum()
        counts += fronts(
            [
                Point("", "", (weight_U * active_U).sum() / total, (weight_U * nll_U).sum() / total)
                for nll_U, active_U in zip(nll_PU, active_PU, strict=True)
            ]
        ).on
    assert {0, RESAMPLES} != set(counts)
    for own, count in zip(rows, counts, strict=True):
        assert own.chance == pytest.approx(dict.fromkeys(AXES, count / RESAMPLES))


def test_costs_are_resampled_with_the_losses(kit):
    """Always worse in loss, the second is on the front exactly when the two cheap texts come without the dear one."""
    tokens_U = np.full(3, 10)
    rows, found = measured(
        kit, np.outer([1.1, 1.2], tokens_U), np.array([[10, 10, 10], [30, 8, 8]]) * tokens_U, tokens_U
    )
    mark_chances(found)
    assert rows[0].chance["l0"] == 1
    assert rows[1].chance["l0"] == (draws(3, RESAMPLES, 4)[:, 0] == 0).mean()
    assert 0.1 < rows[1].chance["l0"] < 0.5


def test_a_point_better_on_every_text_is_always_on_the_front_and_the_other_never(kit):
    """However much the texts differ: all rows share the weights of a resample."""
    rng = np.random.default_rng(2)
    tokens_U = rng.integers(5, 90, size=20)
    nll_U = tokens_U * rng.uniform(1, 9, size=20)
    active_U = 16 * tokens_U
    rows, found = measured(kit, [nll_U, nll_U + 0.001 * tokens_U], [active_U, active_U], tokens_U)
    mark_chances(found)
    assert [own.chance["l0"] for own in rows] == [1, 0]


@pytest.mark.parametrize("many", range(3, 9))
def test_duplicates_share_their_chance(kit, many):
    """A matrix product rounds equal columns differently, depending on where they stand among how many."""
    tokens_U, nll_PU, active_PU, _ = random_points(kit, 1, many, units=40)
    twice = [np.concatenate([values, values[::-1]]) for values in (nll_PU, active_PU)]
    rows, found = measured(kit, *twice, tokens_U)
    mark_chances(found)
    assert [own.chance for own in rows[:many]] == [own.chance for own in rows[: many - 1 : -1]]
    assert max(own.chance["l0"] for own in rows) > 0.5


def test_points_of_a_point_estimate_are_those_of_its_resamples(kit):
    """Values and resamples come by different paths; the mean resample is close to the value."""
    _, _, _, (rows, (group,)) = random_points(kit, units=400)
    np.testing.assert_allclose(group.sampled_loss.mean(axis=0), group.loss(), rtol=0.01)
    np.testing.assert_allclose(group.sampled_cost("l0").mean(axis=0), group.cost("l0"), rtol=0.01)
    assert group.rows == tuple(rows)


# --- who may be compared --------------------------------------------------------------------------------------------


def test_protocols_sites_and_baselines_stay_out_of_each_others_fronts():
    rows = [
        row("a", 0.5, 16),
        row("b", 0.4, 8, protocol="clean_input"),
        row("c", 0.4, 8, sites=("L01.mlp_out",)),
        row("neurons", 0.1, 4, kind="baseline"),
        row("worse", 0.6, 16),
    ]
    assert mark_fronts(rows, ("target", "text")) == []
    assert [own.front.get("l0") for own in rows] == [True, True, True, None, False]
    assert not rows[3].front


def test_undefined_losses_are_listed_and_leave_the_front_alone():
    rows = [row("nan", None, 1), row("a", 0.5, 16)]
    assert mark_fronts(rows, ()) == [f"nan, cascade, {axis}" for axis in AXES]
    assert [own.front["l0"] for own in rows] == [False, True]


def test_a_group_is_target_text_masks_protocol_sites_axis_and_loss():
    (one,) = points([row("a", 0.5, 16)], ("target", "text", "masks"), "l0")
    assert one.group == ("target", "text", "masks", "cascade", (SITE,), "l0", "delta")
    (other,) = points([row("a", 0.5, 16)], ("target", "text", "masks"), "l0", "fvu")
    assert other.group != one.group
    assert other.loss == 0.5
    with pytest.raises(ValueError, match="delta, kl, fvu"):
        points([], (), "l0", "acc")


@pytest.fixture(scope="module")
def results(kit, scan):
    """Families A of two k and three seeds, and B of two k in between; one more of A at another site."""

    class TopK(kit.Random):
        def __init__(self, k, seed, site):
            super().__init__([f"L0{site}.mlp_in"], [f"L0{site}.mlp_out"], seed=seed)
            self.k = k

        def encode(self, source, x_ND):
            z_NF = self.pre(source, x_ND) + 1e-9
            return kit.codes_of(z_NF * (z_NF >= z_NF.topk(self.k, dim=1).values[:, -1:]))

    def of(family, k, seed=0, site=0):
        name = f"{family}-{k}-{seed}-{site}"
        facts = {"family": family, "seed": seed, "runs": [name], "git_commit": name, "sparsity": f"k={k}"}
        return Replacement(name, (TopK(k, seed, site),), facts)

    sets = [of("A", k, seed) for k in (2, 6) for seed in range(3)] + [of("B", k) for k in (3, 4)] + [of("A", 2, site=1)]
    return scan(sets, kit.TinyTarget(), kit.contexts(rows=30))


def test_every_replacement_has_a_chance_and_no_baseline(results):
    for own in results.rows:
        assert own.chance.keys() == (set(AXES) if own.kind == "replacement" else set())
        assert all(0 <= value <= 1 for value in own.chance.values())
    alone = results.find("A-2-0-1", "cascade")
    assert set(alone.chance.values()) == {1}
    for protocol in results.protocols:  # some point is on the front of every resample
        assert sum(r.chance.get("l0", 0) for r in results.table(protocol) if r.sites == (SITE,)) >= 1


# --- hypervolumes ---------------------------------------------------------------------------------------------------


def test_hypervolume_says_what_it_is_measured_against(results):
    keys = [(e["protocol"], tuple(e["sites"]), e["family"], e["axis"]) for e in results.hypervolumes]
    assert len(set(keys)) == len(keys) == 3 * 3 * 3  # protocols, axes, families by sites
    for entry in results.hypervolumes:
        group = [r for r in results.table(entry["protocol"]) if list(r.sites) == entry["sites"]]
        costs = [r.cost[entry["axis"]] for r in group if r.kind == "replacement"]
        (bar,) = [r.metrics["delta"] for r in group if r.kind == "baseline" and r.name == "mean"]
        assert entry["reference"] == {"cost": 2 * max(costs), "loss": bar}
        assert entry["value"] >= 0
        assert entry["low"] <= entry["high"]


def test_hypervolume_by_hand_through_the_group():
    names = [("A", 1, 8), ("A", 0.1, 16), ("A", 0.1, 32), ("B", 1, 16)]
    rows = [row(f"r{i}", delta, cost, family=family) for i, (family, delta, cost) in enumerate(names)]
    sampled = np.array([[1, 0.1, 0.1, 1], [0.1, 0.1, 0.1, 1]])
    group = Group("cascade", (SITE,), tuple(rows), sampled, np.ones((2, 4)))
    zero, mean = row("zero", 20.0, 0, kind="baseline"), row("mean", 10.0, 0, kind="baseline")
    a, b = [e for e in hypervolumes([group], [*rows, zero, mean]) if e["axis"] == "l0"]
    assert (a["family"], a["reference"]) == ("A", {"cost": 64, "loss": 10})
    assert a["value"] == pytest.approx(5)
    assert (a["low"], a["high"]) == pytest.approx(tuple(np.percentile([5, 6], [2.5, 97.5])))
    assert b["value"] == pytest.approx(2)
    assert hypervolumes([group], [*rows, zero])[0]["reference"]["loss"] == 20
    assert hypervolumes([group], rows) == ()


# --- matched values -------------------------------------------------------------------------------------------------


def test_matched_values_by_hand_through_the_group():
    pairs = [("A", 0.4, 8), ("A", 0.2, 32), ("B", 0.25, 16), ("C", 0.1, 64)]
    rows = [row(f"r{i}", delta, cost, family=family) for i, (family, delta, cost) in enumerate(pairs)]
    sampled = np.array([[0.4, 0.2, 0.25, 0.1], [0.4, 0.4, 0.35, 0.1]])
    found = matched([Group("cascade", (SITE,), tuple(rows), sampled, np.ones((2, 4)))])
    (equal_cost,) = [e for e in found if e["axis"] == "l0" and e["at"] == "cost"]
    assert equal_cost["where"] == 16
    b, a, c = equal_cost["values"]
    assert (b["family"], b["value"], b["difference"]) == ("B", 0.25, None)
    assert (a["family"], a["value"], a["difference"]) == ("A", pytest.approx(0.3), pytest.approx(0.05))
    assert (a["low"], a["high"]) == pytest.approx(tuple(np.percentile([0.3, 0.4], [2.5, 97.5])))
    assert a["difference_low"] == pytest.approx(a["difference_high"]) == pytest.approx(0.05)  # paired
    assert c == dict.fromkeys(a) | {"family": "C"}
    (equal_loss,) = [e for e in found if e["axis"] == "l0" and e["at"] == "loss"]
    assert equal_loss["where"] == 0.25
    assert equal_loss["values"][1]["value"] == pytest.approx(2 ** (3 + 2 * 0.75))
    assert equal_loss["values"][1]["reached"] == 0.5  # in the second resample the curve is flat at .4


def test_a_matched_interval_at_a_measured_point_is_that_points_own(kit):
    """With a cost that does not vary, the line through a point is the point, in every resample."""
    rng = np.random.default_rng(5)
    tokens_U = rng.integers(5, 90, size=40)
    nll_PU = tokens_U * rng.uniform(1, 2, size=(4, 40))
    active_PU = np.outer([8, 32, 16, 16], tokens_U)
    _, (group,) = measured(kit, nll_PU, active_PU, tokens_U, "AABC")
    (found,) = [e for e in matched([group]) if e["axis"] == "l0" and e["at"] == "cost"]
    assert found["where"] == 16
    (b,) = [value for value in found["values"] if value["family"] == "B"]
    assert (b["low"], b["high"]) == tuple(np.percentile(group.sampled_loss[:, 2], [2.5, 97.5]))
    assert b["reached"] == 1


def test_seeds_spread_around_the_first_one_whose_interval_is_given(results):
    entries = [e for e in results.matched if e["at"] == "cost" and e["protocol"] == "cascade"]
    assert {e["axis"] for e in entries} == set(AXES)
    for entry in entries:
        found = {value["family"]: value for value in entry["values"]}
        assert found["A"]["lowest"] < found["A"]["highest"]
        assert found["A"]["lowest"] <= found["A"]["value"] <= found["A"]["highest"]
        assert found["B"]["lowest"] is found["B"]["highest"] is None
        assert all(value["low"] <= value["value"] <= value["high"] for value in entry["values"])
        first, second = entry["values"]
        assert second["difference"] == second["value"] - first["value"] >= 0
    last = [e for e in entries if e["axis"] == "l0"][-1]
    ends = [results.find(f"A-{k}-0-0", "cascade") for k in (2, 6)]
    expected = np.interp(
        np.log2(last["where"]), [np.log2(r.cost["l0"]) for r in ends], [r.metrics["delta"] for r in ends]
    )
    assert {v["family"]: v["value"] for v in last["values"]}["A"] == pytest.approx(expected)


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_seeds_are_lowest_and_highest_of_runs_that_differ_in_nothing_else(results):
    assert len(results.seeds) == 2 * 3  # settings, protocols
    for entry in results.seeds:
        members = [results.find(name, entry["protocol"]) for name in entry["names"]]
        assert [r.facts["seed"] for r in members] == entry["seeds"] == [0, 1, 2]
        assert len({r.facts["sparsity"] for r in members}) == 1
        for key in ("delta", "fvu", "l0", "kl"):
            values = [r.metrics[key] for r in members]
            assert entry[key] == [min(values), max(values)]
            assert entry[key][0] < entry[key][1]


def test_runs_that_differ_in_more_than_the_seed_or_not_in_it_are_no_seeds():
    same = [row("a", 0.1, 8, seed=0, k=8), row("b", 0.2, 8, seed=0, k=8)]
    other = [row("a", 0.1, 8, seed=0, k=8), row("b", 0.2, 8, seed=1, k=16), row("c", 0.2, 8, protocol="x", seed=2, k=8)]
    unknown = [row("a", 0.1, 8), row("b", 0.2, 8)]
    assert seed_spreads(same) == seed_spreads(other) == seed_spreads(unknown) == ()
    (found,) = seed_spreads([*same, row("c", 0.5, 8, seed=1, k=8, runs=["x"], label="l", git_commit="g")])
    assert found["delta"] == [0.1, 0.5]
    assert "kl" not in found  # undefined in these rows


def test_metrics_of_seeds_are_defined_metrics():
    assert set(METRICS) <= set(DEFINITIONS)
