"""Recipes meet the sites of a cache."""

from typing import Any

import pytest

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.records import from_dict, to_dict
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig, DictionarySpec
from thresher.train.plan import RunPlan, plan_runs

SITES = {
    site.name: site
    for layer in range(4)
    for site in (Site(f"L{layer:02d}.mlp_in", layer, "mlp_in", 8), Site(f"L{layer:02d}.mlp_out", layer, "mlp_out", 8))
}
HOOK = Site("blocks.2.attn.hook_out", 2, "attn.hook_out", 12)


def plan(sites: dict[str, Site] = SITES, **settings: Any) -> list[RunPlan]:
    config = DictionaryConfig(**({"n_latents": 16, "k": 2} | settings))
    return plan_runs("demo", config, TrainConfig(seed=5), sites, {"a": 1})


def test_one_plan_per_layer_named_after_it() -> None:
    plans = plan()
    assert [p.name for p in plans] == ["demo-L00", "demo-L01", "demo-L02", "demo-L03"]
    assert {p.group for p in plans} == {"demo"}
    assert plans[1].spec.reads == ("L01.mlp_in",)
    assert plans[1].spec.writes == ("L01.mlp_out",)
    assert plans[1].seed == 5
    assert plans[1].recipe == {"a": 1}


def test_one_plan_for_a_clt_over_all_layers() -> None:
    (only,) = plan(kind="clt", layers=(1, 3))
    assert only.name == only.group == "demo"
    assert only.spec.reads == ("L01.mlp_in", "L03.mlp_in")
    assert only.spec.layers == (1, 3)


def test_an_sae_reads_what_it_writes_and_has_unit_rows_by_default() -> None:
    plans = plan(kind="sae", reads="mlp_in", expansion=3.0, n_latents=None)
    assert all(p.spec.reads == p.spec.writes for p in plans)
    assert plans[0].spec.reads == ("L00.mlp_in",)
    assert plans[0].spec.n_latents == 24
    assert plans[0].spec.unit_norm
    assert not plan()[0].spec.unit_norm


def test_globs_and_hook_names_resolve() -> None:
    sites = SITES | {HOOK.name: HOOK}
    (only,) = plan(sites, kind="sae", writes="blocks.*.attn.hook_out")
    assert only.name == "demo-L02"
    assert only.spec.d_in == 12
    plans = plan(sites, kind="sae", writes="L0[0-1].*")
    assert [p.name for p in plans] == ["demo-L00-mlp_in", "demo-L00-mlp_out", "demo-L01-mlp_in", "demo-L01-mlp_out"]


def test_a_spec_survives_json() -> None:
    spec = plan(kind="clt")[0].spec
    assert from_dict(DictionarySpec, to_dict(spec), "dictionary") == spec


@pytest.mark.parametrize(
    ("sites", "settings", "message"),
    [
        (SITES, {"reads": "mlp_inn"}, "matches no site of the cache. Did you mean 'mlp_in'"),
        (SITES, {"layers": (2, 7)}, r"layers \[7\]"),
        ({k: v for k, v in SITES.items() if k != "L03.mlp_out"}, {}, r"layers \[3\] lack one side"),
        (SITES, {"writes": "L0*.*"}, "several sites of one layer"),
        (SITES | {"L03.mlp_in": Site("L03.mlp_in", 3, "mlp_in", 9)}, {"kind": "clt"}, "different widths"),
        (SITES, {"n_latents": None}, "exactly one of n_latents and expansion"),
        (SITES, {"kind": "sae", "reads": "mlp_in", "writes": "mlp_out"}, "reconstructs what it reads"),
    ],
)
def test_recipes_that_do_not_fit_the_cache_say_what_would(
    sites: dict[str, Site], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(sites, **settings)
