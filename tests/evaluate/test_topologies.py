"""Dictionaries with skip connections, of transforms, and over several sites: the protocols' laws hold for them too.

Real dictionaries of thresher.train with random weights, in a tiny random model in float64.
"""

import pytest
import torch

from thresher.cache.contracts import side_by_side
from thresher.cache.errors import UserError
from thresher.evaluate import splice
from thresher.evaluate.page import render
from thresher.evaluate.run import Replacement
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build, topology

INS = tuple(f"L{i:02d}.mlp_in" for i in range(3))
OUTS = tuple(f"L{i:02d}.mlp_out" for i in range(3))
CAUSAL = {
    "skip transcoder": {"kind": "transcoder", "skip": True},
    "skip clt": {"kind": "clt", "skip": True},
    "molt": {"kind": "molt", "transforms": 2, "ranks": (4, 2), "n_latents": 6},
}


def dictionary(kind, reads, writes, seed=0, **settings):
    """A dictionary as it is loaded from a run, with random weights; about half its latents fire."""
    base = {
        "reads": reads, "writes": writes, "layers": tuple(range(len(reads))),
        "d_in": topology(kind).width(8, len(reads)), "d_out": 8,
        "n_latents": 16, "unit_norm": False, "firing": "relu", "sparsity": 1.0,
    }  # fmt: skip
    coder = build(DictionarySpec(kind=kind, **(base | settings)), f"{kind}-{writes[0]}", deployed=True).double()
    rng = torch.Generator().manual_seed(seed)
    for parameter in coder.requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * 0.3)
    if kind == "molt":
        coder.centre.fill_(0.2)
    return coder


def replacement(name):
    settings = dict(CAUSAL[name])
    kind = settings.pop("kind")
    pairs = [(INS, OUTS)] if topology(kind).joint else [((a,), (b,)) for a, b in zip(INS, OUTS, strict=True)]
    facts = {"kind": kind, "firing": "relu", **({"skip": True} if "skip" in settings else {})}
    return Replacement(name, tuple(dictionary(kind, *pair, seed=i, **settings) for i, pair in enumerate(pairs)), facts)


def crosscoder(sites=OUTS, name="crosscoder"):
    return Replacement(name, (dictionary("crosscoder", sites, sites),), {"kind": "crosscoder", "firing": "relu"})


def exact_crosscoder():
    """x̂_s = relu(x_s) − relu(−x_s) at every site."""
    found = crosscoder(name="exact")
    (coder,) = found.dictionaries
    wide = coder.spec.d_in
    coder = dictionary("crosscoder", OUTS, OUTS, n_latents=2 * wide)
    eye = torch.eye(wide, dtype=torch.float64)
    coder.encoder(0).W_enc.copy_(torch.cat([eye, -eye]))
    coder.encoder(0).b_enc.zero_()
    coder.W_dec[0].copy_(torch.cat([eye, -eye]).view(2 * wide, 3, 8))
    coder.b_dec.zero_()
    return found._replace(dictionaries=(coder,))


def test_adding_the_errors_back_equals_clean(kit, scan):
    sets = [replacement(name) for name in CAUSAL]
    results = scan(sets, kit.TinyTarget(), kit.contexts(), protocols=("cascade",), arms=("error_added",))
    assert [check["name"] for check in results.checks] == [f"error_added: {name}" for name in CAUSAL]
    for check in results.checks:
        assert max(abs(check["delta"]), abs(check["kl"])) < 1e-12
    assert all(results.find(name, "cascade").metrics["kl"] > 0.01 for name in CAUSAL)
    assert results.find("skip clt", "cascade").family == "skip CLT ReLU"


@pytest.mark.parametrize("name", ["skip transcoder", "molt"])
def test_protocols_agree_on_a_single_site(kit, scan, name):
    one = replacement(name)
    one = one._replace(dictionaries=one.dictionaries[1:2])
    results = scan([one], kit.TinyTarget(), kit.contexts())
    first, *others = (results.find(name, protocol).metrics["delta"] for protocol in splice.PROTOCOLS)
    assert others == pytest.approx([first, first], abs=1e-12)


def test_a_skip_connection_alone_is_the_affine_map_it_holds(kit):
    coder = dictionary("transcoder", INS[:1], OUTS[:1], skip=True)
    coder.encoder(0).b_enc.fill_(-1e3)
    x_ND = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes = coder.encode(0, x_ND)
    assert int(codes.l0().sum()) == 0
    torch.testing.assert_close(coder.decode(0, [codes]), x_ND @ coder.W_skip[0].T + coder.b_dec[0])


def test_an_exact_crosscoder_equals_clean_wherever_it_can_be_judged(kit, scan):
    results = scan([exact_crosscoder()], kit.TinyTarget(), kit.contexts(), arms=("zero", "mean", "error_added"))
    assert {row.protocol for row in results.rows} == set(results.protocols) == {"clean_input", "single_site"}
    for protocol in ("clean_input", "single_site"):
        found = results.find("exact", protocol).metrics
        assert max(abs(found["delta"]), abs(found["kl"]), found["fvu"]) < 1e-12
        assert found["recovered_zero"] == found["recovered_mean"] == 1
    assert results.checks == ()


def test_a_crosscoder_is_left_out_of_cascade_alone_and_the_report_says_why(kit, scan):
    sets = [crosscoder(), Replacement("sae", tuple(dictionary("sae", (s,), (s,)) for s in OUTS), {"kind": "sae"})]
    results = scan(sets, kit.TinyTarget(), kit.contexts(), neurons=(2,))
    by_protocol = {p: {row.name for row in results.rows if row.protocol == p} for p in splice.PROTOCOLS}
    assert "crosscoder" not in by_protocol["cascade"]
    assert {"sae", "zero", "neurons k=2"} <= by_protocol["cascade"]
    assert by_protocol["clean_input"] >= {"crosscoder", "sae"} <= by_protocol["single_site"]
    (note,) = (note for note in results.notes if "crosscoder" in note)
    assert "cannot run along in a forward pass: it is left out of cascade" in note
    drawn = render(results)
    assert "all sites" in drawn
    assert "cannot run along in a forward pass" in drawn


def test_baselines_beside_a_crosscoder_are_judged_where_it_is(kit, scan):
    sets = [crosscoder(OUTS[:2]), Replacement("sae", (dictionary("sae", OUTS[2:], OUTS[2:]),), {"kind": "sae"})]
    results = scan(sets, kit.TinyTarget(), kit.contexts(), neurons=(2,))
    rows = {(row.name, row.sites) for row in results.rows if row.protocol == "cascade"}
    assert rows == {(name, OUTS[2:]) for name in ("sae", "clean", "zero", "mean", "neurons k=2")}


def test_cascade_alone_refuses_a_crosscoder(kit, scan):
    with pytest.raises(UserError, match=r"protocols is \['cascade'\].*'crosscoder' reads sites.*Add clean_input"):
        scan([crosscoder()], kit.TinyTarget(), kit.contexts(), protocols=("cascade",))


def test_costs_count_what_each_latent_and_every_token_uses(kit, scan):
    target, contexts = kit.TinyTarget(), kit.contexts()
    sets = [*(replacement(name) for name in CAUSAL), crosscoder()]
    results = scan(sets, target, contexts, protocols=("clean_input",))
    patched = torch.from_numpy(contexts.keep == 1)
    sites = target.sites([*INS, *OUTS])
    acts = {k: v[patched] for k, v in target.record(torch.from_numpy(contexts.token_id).long(), sites).items()}
    for one in sets:
        expected = 0.0
        for coder in one.dictionaries:
            for s, names in enumerate(coder.inputs):
                fires_F = (coder.encode(s, side_by_side(acts, names)).dense() > 0).double().mean(0)
                weights = {"molt": [8 + 4 * 16] * 2 + [8 + 2 * 16] * 4}.get(one.name)
                weights = weights or [8 * {"skip transcoder": 2, "skip clt": 4 - s, "crosscoder": 6}[one.name]] * 16
                expected += float(fires_F @ torch.tensor(weights, dtype=torch.float64))
            expected += 64 * len(coder.writes) * ("skip" in one.name)
        assert results.find(one.name, "clean_input").cost["active_parameters"] == pytest.approx(expected)


def test_the_map_of_write_norms_has_one_line_for_a_crosscoders_one_source(kit, scan):
    results = scan([crosscoder()], kit.TinyTarget(), kit.contexts(), protocols=("clean_input",))
    (found,) = results.find("crosscoder", "clean_input").write_norms
    (coder,) = crosscoder().dictionaries
    squares = coder.W_dec[0].square().sum((0, 2))
    assert (found["reads"], found["writes"]) == (["all sites"], list(OUTS))
    assert found["share"] == [pytest.approx((squares / squares.sum()).tolist())]


def test_a_source_of_several_earlier_sites_runs_along_in_a_cascade(kit, scan):
    """Two sites read and the later one written is causal; the source waits for both."""

    class Backward(kit.Base):
        def encode(self, source, x_ND):
            return kit.codes_of(torch.cat([x_ND.relu(), (-x_ND).relu()], dim=1))

        def decode(self, destination, codes):
            z_NF = codes[0].dense()
            both_N2 = z_NF[:, :16] - z_NF[:, 16:]
            return both_N2[:, :8] + both_N2[:, 8:]

    coder = Backward([INS[0], INS[1]], [OUTS[1]])
    coder.inputs, coder.sources, coder.n_latents = ((INS[0], INS[1]),), lambda j: range(1), 32
    results = scan([Replacement("x", (coder,), {})], kit.TinyTarget(), kit.contexts(), arms=("error_added",))
    first, *others = (results.find("x", protocol).metrics["delta"] for protocol in splice.PROTOCOLS)
    assert others == pytest.approx([first, first], abs=1e-12)
    assert results.checks[0]["passed"]
