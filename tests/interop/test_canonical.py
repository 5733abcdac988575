"""The canonical form says what our own modules compute, and every fold leaves it saying so."""

import pytest
import torch
from torch import Tensor

from tests.interop.conftest import LATENTS, Made
from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical, codes, decoded, from_coder, to_coder
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.rules import Deployed
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build

FORMS = [("sae", "relu"), ("sae", "threshold"), ("sae", "topk"), ("sae", "groupmax"), ("transcoder", "threshold"),
         ("clt", "threshold"), ("clt", "topk")]  # fmt: skip


def outputs(dictionary: Canonical, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    xs = [x + s for s in range(len(dictionary.sources))]
    z = [codes(dictionary, s, rows) for s, rows in enumerate(xs)]
    return z, decoded(dictionary, z, xs)


def of_module(coder: Coder, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    some = [coder.encode(s, x + s) for s in range(len(coder.inputs))]
    written = [coder.decode(j, [some[s] for s in coder.sources(j)]) for j in range(len(coder.writes))]
    return [part.dense() for part in some], written


def close(a: list[Tensor], b: list[Tensor], rtol: float = 1e-12) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right.to(left.dtype), rtol=rtol, atol=rtol * float(left.abs().max()))


@pytest.mark.parametrize(("kind", "firing"), FORMS)
@pytest.mark.parametrize("skip", [False, True])
def test_a_module_computes_what_its_canonical_form_says(kind, firing, skip: bool, made: Made, rows: Tensor) -> None:
    if kind == "sae" and skip:
        skip = False
    dictionary = made(kind, firing, skip=skip)
    coder = to_coder(dictionary).double()
    for part, (again, before) in enumerate(zip(from_coder(coder).sources, dictionary.sources, strict=True)):
        torch.testing.assert_close(again.W_enc, before.W_enc.float().double(), msg=f"source {part}")
    z, y = outputs(from_coder(coder), rows)
    ours_z, ours_y = of_module(coder, rows)
    close(z, ours_z)
    close(y, ours_y)
    assert (z[0] > 0).any(), "codes that never fire prove nothing"


@pytest.mark.parametrize("firing", ["topk", "groupmax"])
def test_ranking_by_norm_moves_into_the_encoder(firing: str, rows: Tensor) -> None:
    spec = DictionarySpec(
        kind="transcoder", reads=("L00.mlp_in",), writes=("L00.mlp_out",), layers=(0,), d_in=16, d_out=16,
        n_latents=LATENTS, unit_norm=False, firing=firing, k=4, rank_by="norm",
    )  # fmt: skip
    coder = build(spec, "ranked", deployed=True).double().requires_grad_(False)
    rng = torch.Generator().manual_seed(1)
    encoder = coder.encoder(0)
    for tensor in (encoder.W_enc, encoder.b_enc, coder.W_dec[0], coder.b_dec):
        tensor.copy_(torch.randn(tensor.shape, generator=rng))
    encoder.norms.copy_(torch.rand(LATENTS, generator=rng) * 3 + 0.1)
    z, y = outputs(from_coder(coder), rows)
    ours_z, ours_y = of_module(coder, rows)
    close([z[0] / encoder.norms], ours_z)
    close(y, ours_y)
    plain = from_coder(coder)._replace(sources=(from_coder(to_coder(from_coder(coder))).sources[0],))
    assert not torch.equal(codes(plain, 0, rows) > 0, torch.zeros(64, LATENTS, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["sae", "clt"])
def test_a_latent_that_never_fires_stays_silent_with_finite_numbers(kind, made: Made, rows: Tensor) -> None:
    """Folding a decoder row of norm 0 into a threshold leaves an infinite one, which every reader takes for damage."""
    coder = to_coder(made(kind, "threshold")).double()
    rule = coder.encoder(0).rule
    assert isinstance(rule, Deployed)
    assert bool((coder.encode(0, rows).dense()[:, 5] > 0).any())
    rule.threshold[5] = torch.inf
    dictionary = from_coder(coder)
    for part in dictionary.sources:
        assert all(bool(tensor.isfinite().all()) for tensor in part if tensor is not None)
    for folded in (dictionary, folds.unit_rows(dictionary), folds.for_subtracting_reader(dictionary)):
        assert not codes(folded, 0, rows)[:, 5].any()
    z, y = outputs(dictionary, rows)
    ours_z, ours_y = of_module(coder, rows)
    close(z, ours_z)
    close(y, ours_y)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
def test_folds_equal_what_they_stand_for(kind, made: Made, rows: Tensor) -> None:
    dictionary = made(kind, "threshold", skip=kind == "transcoder")
    count = len(dictionary.sources)
    rng = torch.Generator().manual_seed(2)
    mu = [torch.randn(16, generator=rng, dtype=torch.float64) for _ in range(count)]
    sigma = [torch.rand(16, generator=rng, dtype=torch.float64) + 0.5 for _ in range(count)]
    xs = [rows + s for s in range(count)]

    def run(of: Canonical, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z = [codes(of, s, x) for s, x in enumerate(inputs)]
        return z, decoded(of, z, inputs)

    inside = [(x - m) / d for x, m, d in zip(xs, mu, sigma, strict=True)]
    z, y = run(dictionary, inside)
    close(z, run(folds.standardised_input(dictionary, mu, sigma), xs)[0])
    close(y, run(folds.standardised_input(dictionary, mu, sigma), xs)[1])
    both = folds.standardised_output(folds.standardised_input(dictionary, mu, sigma), mu, sigma)
    close([one * d + m for one, m, d in zip(y, mu, sigma, strict=True)], run(both, xs)[1])
    bare = dictionary._replace(W_skip=None)
    close(run(bare, [x - m for x, m in zip(xs, mu, strict=True)])[0], run(folds.subtracted(bare, mu), xs)[0])
    b = list(bare.b_dec)
    close(run(bare, xs)[0], run(folds.for_subtracting_reader(bare), [x - p for x, p in zip(xs, b, strict=True)])[0])
    unit = folds.unit_rows(dictionary)
    close(run(dictionary, xs)[1], run(unit, xs)[1])
    for part in unit.sources:
        close([part.W_dec.flatten(1).norm(dim=1)], [torch.ones(LATENTS, dtype=torch.float64)])


def test_a_gate_is_a_threshold(rows: Tensor) -> None:
    rng = torch.Generator().manual_seed(4)
    W, b_gate, r, b_mag = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((48, 16), (48,), (48,), (48,)))
    a = rows @ W.T
    gated = torch.relu(a * r.exp() + b_mag) * (a + b_gate > 0)
    W_enc, b_enc, theta = folds.from_gate(W, b_gate, r, b_mag)
    pre = rows @ W_enc.T + b_enc
    close([gated], [torch.relu(pre) * (pre > theta)])
    assert 0 < int((theta > 0).sum()) < theta.shape[0], "both sides of the clamp"


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"kind": "crosscoder"}, "crosscoder"), ({"normalise": "per_token"}, "normalises every token")],
)
def test_what_has_no_canonical_form_is_refused_with_a_route(settings: dict, words: str) -> None:
    base = {"kind": "sae", "reads": ("a",), "writes": ("a",), "layers": (0,), "d_in": 8, "d_out": 8, "n_latents": 16}
    spec = DictionarySpec(**(base | {"firing": "topk", "k": 2, "unit_norm": False} | settings))
    with pytest.raises(UserError, match=words):
        from_coder(build(spec, "x", deployed=True))
