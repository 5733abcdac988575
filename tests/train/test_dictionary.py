"""Initial weights, folding, normalisation, and what a deployed dictionary promises."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.stats import SiteStats
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.fold import deploy
from thresher.train.dictionary.initial import generator, initialise
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build
from thresher.train.normalise import Affine, affine

N, D, E, F = 50, 6, 5, 20


def spec(kind: str = "transcoder", **settings: Any) -> DictionarySpec:
    layers = 3 if kind == "clt" else 1
    base: dict[str, Any] = {
        "kind": kind,
        "reads": tuple(f"r{i}" for i in range(layers)),
        "writes": ("r0",) if kind == "sae" else tuple(f"w{i}" for i in range(layers)),
        "layers": tuple(range(layers)),
        "d_in": D,
        "d_out": D if kind == "sae" else E,
        "n_latents": F,
        "unit_norm": kind == "sae",
        "firing": "topk",
        "k": 3,
    }
    return DictionarySpec(**(base | settings))


def stats(width: int, seed: int) -> tuple[Tensor, SiteStats]:
    """Rows with a mean and very different spreads, and their statistics."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(400, width, generator=rng, dtype=torch.float64) * torch.logspace(-1, 1, width) + torch.arange(width)
    norms = x.norm(dim=1)
    variance = x.var(0, unbiased=False)
    return x, SiteStats(
        400,
        x.mean(0).numpy(),
        variance.numpy(),
        float(norms.mean()),
        float((norms**2).mean()),
        float(variance.sum()),
    )


def fresh(settings: DictionarySpec) -> tuple[Coder, list[Tensor], list[Affine], list[Affine]]:
    """A dictionary at its start in its training space, and raw rows of its sources."""
    raw = [stats(D, 10 + i) for i in range(len(settings.reads))]
    targets = raw if settings.kind == "sae" else [stats(settings.d_out, 20 + i) for i in range(len(settings.writes))]
    reads = [affine(settings.normalise, s, "r") for _, s in raw]
    writes = [affine(settings.normalise, s, "w") for _, s in targets]
    coder = build(settings)
    initialise(coder, 0, reads, writes, [space.apply(x).float() for (x, _), space in zip(raw, reads, strict=True)])
    return coder, [x[:N] for x, _ in raw], reads, writes


def trained(settings: DictionarySpec) -> tuple[Coder, list[Tensor], list[Affine], list[Affine]]:
    """A dictionary in its training space with weights of no special form, and raw rows of its sources."""
    coder, raw, reads, writes = fresh(settings)
    coder.double()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
        for source in range(len(reads)):
            rule = coder.encoder(source).rule
            if settings.firing in ("batchtopk", "global"):
                rule.threshold.fill_(0.7)
    return coder, raw, reads, writes


RULES: list[dict[str, Any]] = [
    {"firing": "relu", "k": None, "sparsity": 1.0},
    {"firing": "topk"},
    {"firing": "batchtopk"},
    {"firing": "jumprelu", "k": None, "sparsity": 1.0},
    {"firing": "groupmax", "k": 4, "rank_by": "norm"},
    {"firing": "topk", "rank_by": "norm"},
    {"firing": "batchtopk", "rank_by": "norm"},
    {"firing": "gated", "k": None, "sparsity": 1.0},
    {"firing": "global"},
]


@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
@pytest.mark.parametrize("mode", ["none", "scale", "per_dim"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule['firing']} {rule.get('rank_by', '')}".strip())
def test_folded_weights_on_raw_rows_equal_training_weights_on_normalised_rows(
    kind: str, mode: str, rule: dict[str, Any]
) -> None:
    coder, raw, reads, writes = trained(spec(kind, normalise=mode, pre_bias=kind == "sae", **rule))
    folded = deploy(coder, reads, writes, dtype=torch.float64)
    codes = [coder.encode(i, space.apply(x)) for i, (x, space) in enumerate(zip(raw, reads, strict=True))]
    raw_codes = [folded.encode(i, x) for i, x in enumerate(raw)]
    for plain, deployed in zip(codes, raw_codes, strict=True):
        assert torch.equal((plain.dense() > 0), (deployed.dense() > 0))
        assert (plain.values > 0).any()
    for j, space in enumerate(writes):
        expected = coder.decode(j, [codes[i] for i in coder.sources(j)]) * space.scale + space.shift
        got = folded.decode(j, [raw_codes[i] for i in folded.sources(j)])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_folding_leaves_the_trained_module_as_it_was_and_keeps_an_saes_unit_rows() -> None:
    coder, _, reads, writes = trained(spec("sae", normalise="scale"))
    with torch.no_grad():
        coder.W_dec[0].div_(coder.decoder_norm(0)[:, None, None])
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    folded = deploy(coder, reads, writes)
    for name, value in coder.state_dict().items():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(folded.decoder_norm(0), torch.ones(F))


def test_normalised_rows_have_the_statistics_each_mode_promises() -> None:
    x, of_site = stats(D, 3)
    scaled = affine("scale", of_site, "s")
    assert scaled.apply(x).norm(dim=1).mean().item() == pytest.approx(D**0.5)
    centred = affine("per_dim", of_site, "s")
    torch.testing.assert_close(centred.apply(x).mean(0), torch.zeros(D, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(centred.apply(x).var(0, unbiased=False), torch.ones(D, dtype=torch.float64))
    for space in (scaled, centred, affine("none", of_site, "s")):
        rows = space.apply(x)
        assert space.total_variance == pytest.approx(float(rows.var(0, unbiased=False).sum()))
        torch.testing.assert_close(space.mean, rows.mean(0), atol=1e-12, rtol=1e-9)


def test_a_dimension_that_hardly_moves_is_not_blown_up() -> None:
    _, of_site = stats(D, 3)
    of_site.variance[0] = 1e-20
    sigma = np.sqrt(of_site.variance)
    assert float(affine("per_dim", of_site, "s").scale[0]) == pytest.approx(1e-2 * float(np.sort(sigma)[(D - 1) // 2]))


def test_a_site_that_never_varies_is_refused() -> None:
    _, of_site = stats(D, 3)
    with pytest.raises(UserError, match="same value on every cached row"):
        affine("none", of_site._replace(variance=np.zeros(D)), "L00.mlp_out")


def test_saes_start_tied_with_unit_rows_and_transcoders_at_the_mean() -> None:
    sae, _, _, writes = fresh(spec("sae", pre_bias=True))
    torch.testing.assert_close(sae.decoder_norm(0), torch.ones(F))
    torch.testing.assert_close(sae.encoder(0).W_enc, sae.W_dec[0][:, 0])
    torch.testing.assert_close(sae.b_dec[0], writes[0].mean.float())
    transcoder, raw, reads, writes = fresh(spec("transcoder", normalise="none"))
    guess = transcoder.decode(0, [transcoder.encode(0, raw[0].float())])
    torch.testing.assert_close(guess, writes[0].mean.float().expand(N, E))
    at_mean = transcoder.encoder(0).preactivations(reads[0].mean.float()[None], transcoder.encoder(0).b_enc)
    assert at_mean.abs().max().item() < 1e-4


def test_a_clts_unit_norm_is_over_all_its_targets_together() -> None:
    coder, *_ = fresh(spec("clt", unit_norm=True))
    for source in range(3):
        assert coder.W_dec[source].shape == (F, 3 - source, E)
        torch.testing.assert_close(coder.W_dec[source].flatten(1).norm(dim=1), torch.ones(F))


def test_jumprelus_threshold_and_window_are_in_units_of_the_initial_spread() -> None:
    coder, *_ = fresh(spec("sae", firing="jumprelu", k=None, sparsity=1.0, theta=1.5, bandwidth=0.25, normalise="none"))
    a = coder.encoder(0).preactivations(stats(D, 10)[0].float(), coder.bias(0))
    deviation = float(a.var(0).mean().sqrt())
    rule = coder.encoder(0).rule
    torch.testing.assert_close(rule.theta(), torch.full((F,), 1.5 * deviation))
    assert rule.window.item() == pytest.approx(0.25 * deviation)


def test_layers_start_different_and_construction_leaves_global_randomness_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    coder, *_ = fresh(spec("clt"))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(coder.encoder(0).W_enc, coder.encoder(1).W_enc)
    same = [torch.rand(4, generator=generator(*key)) for key in ((0, "sae", "a"), (0, "sae", "a"), (1, "sae", "a"))]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_inference_decides_every_token_on_its_own() -> None:
    for rule in RULES:
        coder, raw, reads, writes = trained(spec("transcoder", **rule))
        folded = deploy(coder, reads, writes, dtype=torch.float64)
        whole = folded.encode(0, raw[0]).dense()
        parts = torch.cat([folded.encode(0, raw[0][i : i + 1]).dense() for i in range(N)])
        torch.testing.assert_close(whole, parts)


def test_a_clts_destination_hears_its_own_and_earlier_layers() -> None:
    coder, raw, *_ = trained(spec("clt"))
    assert [list(coder.sources(j)) for j in range(3)] == [[0], [0, 1], [0, 1, 2]]
    codes = [coder.encode(i, x) for i, x in enumerate(raw)]
    by_hand = coder.b_dec[2] + sum(codes[i].dense() @ coder.W_dec[i][:, 2 - i] for i in range(3))
    torch.testing.assert_close(coder.decode(2, codes), by_hand)


def test_parameters_are_counted_as_the_reference_table_says() -> None:
    clt = build(
        DictionarySpec(
            **{
                **spec("clt").__dict__,
                "reads": ("a",) * 4,
                "writes": ("b",) * 4,
                "layers": (0, 1, 2, 3),
                "d_in": 8,
                "d_out": 8,
                "n_latents": 16,
            }
        )
    )
    assert clt.n_parameters == 4 * 16 * (8 + 1) + 10 * 16 * 8 + 4 * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"firing": "batchtopk", "k": None}, "k is missing"),
        ({"firing": "topk", "k": 2.5}, "whole number"),
        ({"firing": "relu", "k": None}, "nothing would make its codes sparse"),
        ({"firing": "relu", "sparsity": 0.1}, "sets its sparsity by a penalty"),
        ({"firing": "topk", "sparsity": 0.1}, "Remove sparsity"),
        ({"firing": "topk", "penalty": "l0"}, "expected no penalty"),
        ({"firing": "relu", "k": None, "penalty": "tanh", "sparsity": 1.0}, "expected one of l1"),
        ({"firing": "jumprelu", "k": None, "penalty": "target_l0", "sparsity": 1.0}, "needs the L0 to aim at"),
        ({"firing": "topk", "k": 21}, "only 20 latents"),
        ({"pre_bias": True}, "same site"),
        ({"preact": 1.0}, "jumprelu"),
        ({"threshold_decay": 1.0}, "threshold_decay"),
        ({"dead_after": 0}, "dead_after"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_the_reason(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec("transcoder", **settings)
