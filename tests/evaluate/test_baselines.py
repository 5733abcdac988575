"""Neurons and affine maps against plain loops, least squares by numpy, and the model's own arithmetic."""

import math

import numpy as np
import pytest
import torch

from thresher.cache.contracts import Codes, Site
from thresher.cache.errors import UserError
from thresher.evaluate import baselines, splice
from thresher.evaluate.baselines import Affine, Neurons, Pair, neuron_sites, pairs
from thresher.evaluate.costs import AXES, neuron_costs
from thresher.evaluate.fitting import RIDGE, Moments, fit
from thresher.evaluate.masks import patch_mask
from thresher.evaluate.run import Replacement

HIDDEN = Site("L01.mlp_hidden", 1, "mlp_hidden", 6)
PAIR = Pair("L01.mlp_in", "L01.mlp_out")


def kept(x_ND: torch.Tensor, k: int) -> torch.Tensor:
    neurons = Neurons(HIDDEN._replace(width=x_ND.shape[1]), k)
    return neurons.decode(0, [neurons.encode(0, x_ND)])


def related(rows: int = 400, d_in: int = 5, d_out: int = 3, seed: int = 0):
    """Correlated u with an offset, and a v that is not quite affine in it; float64."""
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, d_in, generator=g).double() @ torch.randn(d_in, d_in, generator=g).double() + 3
    v = u @ torch.randn(d_in, d_out, generator=g).double() + u.square() * 0.1 @ torch.ones(d_in, d_out).double() - 7
    return u, v


def fitted(u: torch.Tensor, v: torch.Tensor, cuts: tuple[int, ...] = ()) -> Affine:
    moments = Moments()
    for part_u, part_v in zip(u.tensor_split(cuts), v.tensor_split(cuts), strict=True):
        moments.add(part_u, part_v)
    return moments.affine(PAIR)


def applied(affine: Affine, u: torch.Tensor) -> torch.Tensor:
    return affine.decode(0, [affine.encode(0, u)])


# --- neurons --------------------------------------------------------------------------------------------------------


def test_neurons_keep_the_largest_magnitudes_with_their_signs_and_the_lowest_index_among_equals() -> None:
    x = torch.tensor(
        [[1.0, -3.0, 2.0, 0.5, -2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 5.0, 0.0], [-1.0, 1.0, 1.0, 1.0, -1.0, 1.0]]
    )
    expected = torch.tensor([[0, -3.0, 2.0, 0, -2.0, 0], [0.0, 0.0, 0.0, 0.0, 5.0, 0.0], [-1.0, 1.0, 1.0, 0, 0, 0]])
    assert torch.equal(kept(x, 3), expected)
    codes = Neurons(HIDDEN, 3).encode(0, x)
    assert [sorted(row) for row in codes.latents.view(3, 3).tolist()] == [[1, 2, 4], [0, 1, 4], [0, 1, 2]]
    assert codes.offsets.tolist() == [0, 3, 6, 9]
    assert codes.width == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_neurons_equal_a_loop_however_rows_are_split(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[::3] = x[::3].round()  # with ties
    expected = torch.zeros_like(x)
    for n in range(40):
        for i in sorted(range(12), key=lambda i: (-abs(float(x[n, i])), i))[:4]:
            expected[n, i] = x[n, i]
    for elements in (1, 36, 1 << 24):
        monkeypatch.setattr(baselines, "CHUNK_ELEMENTS", elements)
        assert torch.equal(kept(x, 4), expected)
        assert kept(x, 4).dtype == dtype


def test_all_neurons_are_the_stream_itself_and_none_is_lost_to_nan() -> None:
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(kept(x, 6), x)
    x[3, 4] = math.nan
    assert kept(x, 1)[3].isnan().tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize("k", [0, 7, -1])
def test_a_k_that_the_mlp_does_not_have_is_refused(k: int) -> None:
    with pytest.raises(UserError, match=rf"top-{k} .*L01\.mlp_hidden.*from 1 to 6"):
        Neurons(HIDDEN, k)


def test_all_neurons_in_place_leave_the_model_as_it_is(kit) -> None:
    target, contexts = kit.TinyTarget(), kit.contexts()
    token, patch = torch.from_numpy(contexts.token_id).long(), torch.from_numpy(patch_mask(contexts))
    sites = target.sites([f"L{i:02d}.mlp_hidden" for i in range(3)])
    clean = target.logits(token)
    for k, equal in ((32, True), (8, False)):
        edits = splice.cascade_edits([Neurons(site, k) for site in sites], patch)
        assert torch.equal(target.logits(token, edits), clean) == equal


def clean_hidden_written_back(target, token, patch, k: int) -> tuple[dict, dict]:
    """Clean `mlp_hidden`, and `mlp_out` as recorded in the pass that gets the top k of it as constants."""
    layers = [f"L{i:02d}" for i in range(target.n_layers)]
    sites = target.sites([f"{layer}.mlp_hidden" for layer in layers])
    hidden = {name: splice.read_rows(x, splice.places(patch)) for name, x in target.record(token, sites).items()}
    neurons = [Neurons(site, k) for site in sites]
    values = splice.decode_all(neurons, splice.encode_clean(neurons, hidden))
    out: dict[str, torch.Tensor] = {}
    edits = splice.constant_edits(values, patch)
    edits |= splice.recording_edits([f"{layer}.mlp_out" for layer in layers], patch, out)
    target.logits(token, edits)
    return hidden, out


def test_clean_input_leaves_the_neurons_reconstruction_at_every_mlp_out_of_its_own_pass(kit) -> None:
    target, contexts = kit.TinyTarget(), kit.contexts()
    token, patch = torch.from_numpy(contexts.token_id).long(), torch.from_numpy(patch_mask(contexts))
    hidden, out = clean_hidden_written_back(target, token, patch, 5)
    for i in range(3):
        expected = kept(hidden[f"L{i:02d}.mlp_hidden"], 5) @ target.down[i]
        torch.testing.assert_close(out[f"L{i:02d}.mlp_out"], expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_so_it_is_in_the_bundled_model() -> None:
    from thresher.harvest.target import TargetConfig, load_target

    target = load_target(TargetConfig(model="bundled:books-128", device="cpu", dtype="float32"))
    token = (torch.arange(2 * 24) * 37 % target.n_vocab).view(2, 24)
    patch = torch.ones(2, 24, dtype=torch.bool)
    patch[:, 0] = False
    hidden, out = clean_hidden_written_back(target, token, patch, 16)
    assert hidden["L00.mlp_hidden"].shape == (46, 512)
    assert not target.gated_mlp
    for i, block in enumerate(target.model.transformer.h):
        expected = block.mlp.c_proj(kept(hidden[f"L{i:02d}.mlp_hidden"], 16))
        torch.testing.assert_close(out[f"L{i:02d}.mlp_out"], expected, rtol=1e-5, atol=1e-5)


# --- which sites, what cost -----------------------------------------------------------------------------------------


def test_neurons_stand_beside_replacements_of_mlp_outputs_alone(kit) -> None:
    target = kit.TinyTarget()
    assert neuron_sites(target.sites(["L00.mlp_out", "L02.mlp_out"])) == ["L00.mlp_hidden", "L02.mlp_hidden"]
    assert neuron_sites(target.sites(["L00.mlp_out", "L02.resid_post"])) is None
    assert neuron_sites(target.sites(["L00.mlp_in"])) is None
    assert neuron_sites([]) is None


def test_each_written_site_goes_with_the_read_site_of_its_layer(kit) -> None:
    def sites(tap: str, *layers: int) -> list[str]:
        return [f"L{i:02d}.{tap}" for i in layers]

    clt = kit.Base(sites("mlp_in", 0, 1, 2), sites("mlp_out", 0, 1, 2))
    own = [Pair(f"L{i:02d}.mlp_in", f"L{i:02d}.mlp_out") for i in range(3)]
    assert pairs([clt]) == own
    transcoders = [kit.Base(sites("mlp_in", i), sites("mlp_out", i)) for i in (2, 0)]
    assert pairs(transcoders) == [own[2], own[0]]
    assert pairs([*transcoders, clt]) == [own[2], own[0], own[1]]
    assert pairs([kit.Base(sites("mlp_out", 1), sites("mlp_out", 1))]) == []
    assert pairs([kit.Base(sites("resid_pre", 1), sites("mlp_out", 1))]) == [Pair("L01.resid_pre", "L01.mlp_out")]


def test_neurons_cost_what_is_worked_out_by_hand() -> None:
    widths = [(768, 768)] * 4
    plain, gated = (neuron_costs(16, widths, gated=g) for g in (False, True))
    assert plain == {"l0": 16, "active_per_mlp": 16, "active_parameters": 98_304}
    assert gated == {"l0": 16, "active_per_mlp": 16, "active_parameters": 147_456}
    assert tuple(plain) == AXES
    assert neuron_costs(2, [(3, 5), (4, 4)], gated=True)["active_parameters"] == 2 * (11 + 12)


# --- affine maps ----------------------------------------------------------------------------------------------------


def test_an_affine_relation_is_recovered() -> None:
    u, _ = related()
    weight, bias = (
        torch.randn(3, 5, generator=torch.Generator().manual_seed(5)).double(),
        torch.tensor([1.0, -2.0, 0.5]),
    )
    v = u @ weight.T + bias
    affine = fitted(u, v)
    torch.testing.assert_close(affine.weight_ED, weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(affine.bias_E, bias.double(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(applied(affine, u), v, rtol=1e-4, atol=1e-4)
    assert applied(affine, u.float()).dtype == torch.float32
    torch.testing.assert_close(applied(affine, u.float()).double(), v, rtol=1e-4, atol=1e-3)
    assert affine.n_parameters == 18


def test_the_affine_map_is_the_least_squares_of_numpy_with_a_ridge() -> None:
    u, v = (x.numpy() for x in related(rows=60))
    centred_u, centred_v = u - u.mean(0), v - v.mean(0)
    ridge = RIDGE * np.trace(centred_u.T @ centred_u / 60) / 5
    design = np.concatenate([centred_u, np.sqrt(60 * ridge) * np.eye(5)])
    weight = np.linalg.lstsq(design, np.concatenate([centred_v, np.zeros((5, 3))]), rcond=None)[0].T
    affine = fitted(torch.from_numpy(u), torch.from_numpy(v))
    np.testing.assert_allclose(affine.weight_ED, weight, rtol=1e-8)
    np.testing.assert_allclose(affine.bias_E, v.mean(0) - weight @ u.mean(0), rtol=1e-8)
    np.testing.assert_allclose(affine.means[PAIR.written], v.mean(0), rtol=1e-12)


@pytest.mark.parametrize("cuts", [(1,), (399,), (0, 100, 100, 250), tuple(range(1, 400))])
def test_the_affine_map_does_not_depend_on_how_rows_are_cut(cuts: tuple[int, ...]) -> None:
    u, v = related()
    whole, parts = fitted(u, v), fitted(u, v, cuts)
    torch.testing.assert_close(parts.weight_ED, whole.weight_ED, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts.bias_E, whole.bias_E, rtol=1e-9, atol=1e-9)


def test_the_affine_map_does_not_change_when_every_row_comes_twice_and_follows_a_scale_of_u() -> None:
    u, v = related()
    once, twice, scaled = fitted(u, v), fitted(u.repeat(2, 1), v.repeat(2, 1)), fitted(1000 * u, v)
    torch.testing.assert_close(twice.weight_ED, once.weight_ED, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled.weight_ED, once.weight_ED / 1000, rtol=1e-9, atol=1e-12)


def test_what_never_varies_explains_nothing() -> None:
    _, v = related()
    affine = fitted(torch.ones(400, 5), v)
    assert torch.equal(affine.weight_ED, torch.zeros(3, 5).double())
    torch.testing.assert_close(affine.bias_E, v.mean(0))
    fewer_rows_than_entries = fitted(torch.eye(5)[:2], v[:2])
    torch.testing.assert_close(applied(fewer_rows_than_entries, torch.eye(5)[:2].double()), v[:2], rtol=1e-4, atol=1e-4)


# --- fitting --------------------------------------------------------------------------------------------------------


def rows_of(target, contexts, site: str) -> torch.Tensor:
    x = target.record(torch.from_numpy(contexts.token_id).long(), target.sites([site]))[site]
    return x[torch.from_numpy(patch_mask(contexts))]


def test_fit_is_one_pass_over_the_patched_positions(kit) -> None:
    target, contexts = kit.TinyTarget(), kit.contexts(rows=9)
    pair = Pair("L01.mlp_in", "L02.mlp_out")
    found = fit(target, contexts, [pair], ["L00.resid_post", "L01.mlp_in"], tokens=0, batch_contexts=2)
    assert target.passes == 5
    u, v = rows_of(target, contexts, pair.read), rows_of(target, contexts, pair.written)
    torch.testing.assert_close(found.affine[pair].weight_ED, fitted(u, v).weight_ED, rtol=1e-7, atol=1e-9)
    norms = rows_of(target, contexts, "L00.resid_post").norm(dim=1).numpy()
    assert list(found.outlier_norm) == ["L00.resid_post", "L01.mlp_in"]
    assert found.outlier_norm["L00.resid_post"] == pytest.approx(np.quantile(norms, 0.999), rel=1e-6)
    assert found.facts["tokens"] == len(u)


def test_fit_gives_the_same_bits_twice_and_the_same_numbers_in_other_batches(kit) -> None:
    target, contexts = kit.TinyTarget(), kit.contexts(rows=9)
    first, second, other = (fit(target, contexts, [PAIR], ["L01.mlp_out"], batch_contexts=b) for b in (2, 2, 5))
    assert torch.equal(first.affine[PAIR].weight_ED, second.affine[PAIR].weight_ED)
    torch.testing.assert_close(other.affine[PAIR].weight_ED, first.affine[PAIR].weight_ED, rtol=1e-9, atol=1e-9)
    assert first.facts == second.facts == other.facts
    assert first.outlier_norm == pytest.approx(other.outlier_norm, rel=1e-6)


def test_fit_samples_rows_evenly_and_about_as_many_tokens_as_asked(kit) -> None:
    target, contexts = kit.TinyTarget(), kit.contexts(rows=30)
    per_row = patch_mask(contexts).sum(axis=1)
    found = fit(target, contexts, [PAIR], [], tokens=50)
    assert abs(found.facts["tokens"] - 50) <= per_row.max()
    every_sixth = type(contexts)(*(array[::6] for array in contexts))
    assert found.facts == fit(target, every_sixth, [PAIR], [], tokens=0).facts
    assert fit(target, contexts, [], []).affine == {}


def test_unpatched_positions_change_nothing(kit) -> None:
    target, contexts = kit.TinyTarget(), kit.contexts()
    padded = contexts.keep == 0
    changed = contexts._replace(token_id=np.where(padded, 5, contexts.token_id).astype(np.int32))
    assert (changed.token_id != contexts.token_id).any()
    one, two = (fit(target, c, [PAIR], ["L02.resid_post"]) for c in (contexts, changed))
    assert torch.equal(one.affine[PAIR].weight_ED, two.affine[PAIR].weight_ED)
    assert one.outlier_norm == two.outlier_norm


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_site(kit, value: float) -> None:
    target = kit.TinyTarget()
    target.down[1][3, 2] = value
    assert fit(target, kit.contexts(), [Pair("L00.mlp_in", "L00.mlp_out")], ["L01.mlp_in"]).facts
    with pytest.raises(UserError, match=r"tiny-3.*L01\.mlp_out.*not finite"):
        fit(target, kit.contexts(), [PAIR], [])


def test_contexts_without_a_patched_position_are_refused(kit) -> None:
    contexts = kit.contexts()
    with pytest.raises(UserError, match=r"training contexts .* no position that is patched"):
        fit(kit.TinyTarget(), contexts._replace(keep=np.zeros_like(contexts.keep)), [PAIR], [])


def test_an_affine_map_is_judged_like_any_dictionary(kit, scan) -> None:
    target, contexts = kit.TinyTarget(), kit.contexts(rows=12)
    own = [Pair(f"L{i:02d}.mlp_in", f"L{i:02d}.mlp_out") for i in range(3)]
    affine = fit(target, contexts, own, [], tokens=0).affine
    results = scan([Replacement("affine", tuple(affine.values()), {})], target, contexts, tokens=0)
    for protocol in splice.PROTOCOLS:
        metrics = results.find("affine", protocol).metrics
        assert 0 < metrics["delta"] < results.find("mean", protocol).metrics["delta"]
        assert 0 < metrics["fvu"] < 1
    u, v = rows_of(target, contexts, own[0].read).double(), rows_of(target, contexts, own[0].written)
    design = np.concatenate([u.numpy(), np.ones((len(u), 1))], axis=1)
    best = ((design @ np.linalg.lstsq(design, v.numpy(), rcond=None)[0] - v.numpy()) ** 2).sum()
    fvu = best / ((v - v.mean(0)) ** 2).sum()
    at_first = applied(affine[own[0]], u) - v
    assert float(at_first.square().sum() / (v - v.mean(0)).square().sum()) == pytest.approx(float(fvu), rel=1e-4)


def test_codes_of_an_affine_map_are_its_rows() -> None:
    u, v = related(rows=4)
    codes: Codes = fitted(u, v).encode(0, u)
    assert torch.equal(codes.dense(), u)
    assert codes.tokens == 4
