"""What topologies are before they are trained: sizes, norms, initial weights, and what makes no sense."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.conftest import plans_for
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.train.config import TrainConfig
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.drawing import geometric_median
from thresher.train.dictionary.molt import Molt, equivalent_latents
from thresher.train.dictionary.spec import DictionaryConfig, DictionarySpec
from thresher.train.dictionary.topologies import build, topology
from thresher.train.fit import Fit
from thresher.train.plan import plan_runs


def test_a_molts_norms_need_no_square_product_and_have_no_gradient_at_zero() -> None:
    coder = molt(d_in=7, d_out=5)
    with torch.no_grad():
        coder.U[1][0] = 0.0
    norms = coder.decoder_norm(0)
    whole = torch.cat([torch.einsum("cre,crd->ced", U, V) for U, V in zip(coder.U, coder.V, strict=True)])
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(whole))
    weights = torch.arange(1.0, 1.0 + len(norms), dtype=torch.float64)
    (norms @ weights).backward()
    found = [weight.grad for weight in (*coder.U, *coder.V)]
    expected = torch.autograd.grad(whole.square().sum((1, 2)).add(1e-300).sqrt() @ weights, (*coder.U, *coder.V))
    for left, right in zip(found, expected, strict=True):
        assert left is not None
        torch.testing.assert_close(left, right.nan_to_num())
    assert equivalent_latents(coder.spec) == 3 * 4 + 6 * 2
    assert coder.latent_costs(0).tolist() == [7 + 4 * 12.0] * 3 + [7 + 2 * 12.0] * 6


def molt(**settings: Any) -> Molt:
    base: dict[str, Any] = {"kind": "molt", "reads": ("r",), "writes": ("w",), "layers": (0,), "unit_norm": False}
    base |= {"transforms": 3, "ranks": (4, 2), "n_latents": 9, "sparsity": 0.1}
    coder = build(DictionarySpec(**(base | settings))).double()
    assert isinstance(coder, Molt)
    with torch.no_grad():
        for i, weight in enumerate((*coder.U, *coder.V)):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    return coder


def sized(kind: str, layers: int, latents: int, width: int = 768, **settings: Any) -> Coder:
    joint = topology(kind).joint
    names = tuple(f"s{i}" for i in range(layers if joint else 1))
    writes = names if topology(kind).own_site else tuple(f"w{name}" for name in names)
    base = {
        "kind": kind, "reads": names, "writes": writes, "layers": tuple(range(len(names))),
        "d_in": topology(kind).width(width, len(names)), "d_out": width, "n_latents": latents, "unit_norm": False,
        "firing": "topk", "k": 16,
    }  # fmt: skip
    with torch.device("meta"):
        return build(DictionarySpec(**(base | settings)))


@pytest.mark.parametrize(
    ("kind", "layers", "latents", "settings", "expected"),
    [
        ("transcoder", 1, 4096, {}, 25_185_280 // 4),
        ("clt", 4, 4096, {}, 44_059_648),
        ("clt", 12, 6144, {}, 424_756_224),
        ("transcoder", 1, 4096, {"skip": True}, 25_185_280 // 4 + 768**2),
        ("clt", 4, 4096, {"skip": True}, 44_059_648 + 4 * 768**2),
        ("crosscoder", 4, 4096, {}, 4096 * (4 * 768 + 1 + 4 * 768) + 4 * 768),
        ("molt", 1, 31, {"transforms": 1, "firing": "relu", "k": None, "sparsity": 1.0}, 31 * 769 + 2560 * 1536 + 768),
    ],
)
def test_they_have_as_many_parameters_as_the_formulas_say(
    kind: str, layers: int, latents: int, settings: dict[str, Any], expected: int
) -> None:
    assert sized(kind, layers, latents, **settings).n_parameters == expected


def test_what_latents_and_skip_connections_bring_into_play() -> None:
    clt = sized("clt", 4, 64, skip=True)
    assert [float(clt.latent_costs(s)[0]) for s in range(4)] == [768 * (1 + 4 - s) for s in range(4)]
    assert clt.fixed_cost == 4 * 768**2
    crosscoder = sized("crosscoder", 4, 64)
    assert (float(crosscoder.latent_costs(0)[0]), crosscoder.fixed_cost) == (8 * 768, 0)
    assert (crosscoder.causal, clt.causal) == (False, True)
    assert crosscoder.inputs == (crosscoder.writes,)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kind": "sae", "skip": True}, "skip is True for kind = 'sae'.*'clt' or 'transcoder'"),
    ({"kind": "crosscoder", "skip": True}, "one input for each output"),
    ({"kind": "crosscoder", "pre_bias": True}, "pre_bias"),
    (
        {"kind": "crosscoder", "norm": "sum", "decoder": "unit", "firing": "relu", "k": None, "sparsity": 0.1},
        "norm is 'sum' with decoder = 'unit'",
    ),
    ({"kind": "clt", "norm": "sum"}, "norm is 'sum' for kind = 'clt'"),
    ({"kind": "transcoder", "decoder": "unit_per_target"}, "decoder is 'unit_per_target'"),
    ({"kind": "transcoder", "ranks": (4,)}, "only a MoLT"),
    ({"kind": "clt", "init_encoder": "tied"}, "'tied' needs one decoder row"),
    ({"kind": "molt", "init_decoder": "tied"}, "init_decoder is 'tied' with kind = 'molt'"),
    ({"kind": "sae", "init_decoder": "tied"}, "at least one of them"),
    ({"kind": "transcoder", "decoder": "unit", "init_decoder": "zero"}, "zero rows"),
    ({"kind": "molt", "transforms": 2}, "told twice"),
    ({"kind": "molt", "n_latents": None}, "exactly one of n_latents and expansion"),
    ({"kind": "molt", "n_latents": None, "transforms": 2, "ranks": (4, 2), "multiples": (1,)}, "as many multiples"),
    ({"kind": "molt", "n_latents": None, "transforms": 2, "ranks": (40,)}, "at most rank 16"),
    ({"kind": "molt", "n_latents": None, "transforms": 2, "decoder": "unit"}, "in place of decoder rows"),
    ({"kind": "molt", "n_latents": None, "transforms": 2, "prefixes": (0.5, 1)}, "prefixes of them nest nothing"),
    ({"kind": "molt", "n_latents": None, "transforms": 2, "penalty_norm": "l1"}, "penalty_norm is 'l1' with kind"),
    ({"kind": "crosscoder", "normalise": "per_token"}, "'per_token' for kind = 'crosscoder'"),
    ({"kind": "crosscoder", "normalise": "per_token_in"}, "'scale' or 'per_dim'"),
    ({"kind": "molt", "firing": "groupmax", "n_latents": None, "transforms": 2}, "compete across ranks"),
    ({"kind": "clan"}, "expected one of clt, crosscoder, decomposition, molt, sae, transcoder. Did you mean 'clt'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(
    cache: CacheReader, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plans_for(cache, "x", **{"firing": "topk", "k": 2, **settings})


def test_a_crosscoder_of_sites_of_different_width_is_refused(cache: CacheReader) -> None:
    sites = {
        name: site._replace(width=16 + 8 * site.layer) for name, site in cache.sites.items() if site.tap == "mlp_out"
    }
    config = DictionaryConfig(kind="crosscoder", n_latents=8, firing="topk", k=2)
    with pytest.raises(UserError, match="different widths"):
        plan_runs("x", config, TrainConfig(), sites, {})


def test_n_latents_of_a_molt_asks_for_equivalent_ones(cache: CacheReader) -> None:
    (plan, *_) = plans_for(cache, "m", kind="molt", ranks=(8, 4, 2), sparsity=0.1, n_latents=100)
    assert (plan.spec.transforms, plan.spec.n_latents) == (4, 4 * (1 + 2 + 4))  # 24 for N = 1
    assert equivalent_latents(plan.spec) == 96


def test_auto_is_each_topologys_own_rule() -> None:
    assert DictionaryConfig(n_latents=8, k=2).firing == "batchtopk"
    assert DictionaryConfig(kind="molt", transforms=1, sparsity=0.1).firing == "jumprelu"


@pytest.mark.parametrize(
    ("settings", "enc", "dec"),
    [
        ({"init_encoder": "kaiming", "init_decoder": "tied", "decoder": "unit"}, (6 / 64) ** 0.5, None),
        ({"init_encoder": "latents"}, 64**-0.5, 0.0),
        ({"init_decoder": "uniform"}, 16**-0.5, 16**-0.5),
    ],
)
def test_weights_start_as_named(cache: CacheReader, settings: dict[str, Any], enc: float, dec: float | None) -> None:
    (plan, *_) = plans_for(cache, "x", kind="transcoder", firing="topk", k=2, init_b_enc="zero", **settings)
    fit = Fit(plan, cache, torch.device("cpu"))
    fit.start(cache)
    W_enc, W_dec = fit.coder.encoder(0).W_enc, fit.coder.W_dec[0][:, 0]
    assert 0.95 * enc < float(W_enc.detach().abs().max()) <= enc
    assert not fit.coder.encoder(0).b_enc.any()
    if dec is None:
        torch.testing.assert_close(W_dec, torch.nn.functional.normalize(W_enc))
    else:
        assert 0.95 * dec <= float(W_dec.detach().abs().max()) <= dec


def test_a_clts_decoder_tied_to_its_encoder_writes_the_same_row_to_every_target(cache: CacheReader) -> None:
    (plan,) = plans_for(cache, "x", kind="clt", firing="topk", k=2, init_decoder="tied")
    fit = Fit(plan, cache, torch.device("cpu"))
    fit.start(cache)
    for target in range(2):
        torch.testing.assert_close(fit.coder.W_dec[0][:, target], fit.coder.encoder(0).W_enc)


def test_tied_weights_need_equal_widths() -> None:
    with pytest.raises(UserError, match="expected the same width"):
        sized("transcoder", 1, 64, init_decoder="tied", writes=("w",), d_out=5)


@pytest.mark.parametrize("start", ["mean", "sample_mean", "median", "zero"])
def test_decoder_biases_start_as_named(cache: CacheReader, start: str) -> None:
    (plan, *_) = plans_for(cache, "x", kind="transcoder", firing="topk", k=2, normalise="none", init_b_dec=start)
    fit = Fit(plan, cache, torch.device("cpu"))
    fit.start(cache)
    y = cache.gather("train", "L00.mlp_out", cache.sample("train", 1024)).double()
    expected: dict[str, Tensor] = {
        "mean": fit.writes[0].mean, "sample_mean": y.mean(0), "median": geometric_median(y), "zero": torch.zeros(16)
    }  # fmt: skip
    torch.testing.assert_close(fit.coder.b_dec[0].double(), expected[start].double(), rtol=1e-5, atol=1e-6)


def test_the_geometric_median_is_where_distances_sum_to_the_least_and_one_outlier_hardly_moves_it() -> None:
    rng = torch.Generator().manual_seed(1)
    y = torch.randn(201, 3, generator=rng, dtype=torch.float64)
    y[0] = 1e4
    point = geometric_median(y, tolerance=1e-12)
    assert float(point.norm()) < 0.3 < float(y.mean(0).norm())
    total = (y - point).norm(dim=1).sum()
    for away in torch.randn(20, 3, generator=rng, dtype=torch.float64) * 0.1:
        assert (y - point - away).norm(dim=1).sum() > total
