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


def test_layers_with_a_k_each_are_one_set() -> None:
    plans = plan(k_by_layer=(3, 1, 2, 4))
    assert [(p.name, p.group, p.spec.k) for p in plans] == [
        (f"demo-L{layer:02d}", "demo", k) for layer, k in enumerate((3, 1, 2, 4))
    ]
    assert [p.spec.k for p in plan(k=None, k_by_layer=(3, 4), layers=(1, 3))] == [3, 4]
    assert [p.spec.k for p in plan(HOOKED, kind="sae", writes="L0[01].mlp*", k_by_layer=(3, 4))] == [3, 3, 4, 4]


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


def hooked(layer: int, tap: str, *aliases: str) -> Site:
    return Site(f"L{layer:02d}.{tap}", layer, tap, 8, aliases)


HOOKED = {
    site.name: site
    for layer in range(12)
    for site in (
        hooked(layer, "mlp_in", f"blocks.{layer}.mlp.hook_in"),
        hooked(layer, "mlp_out", f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.mlp", f"h.{layer}.mlp"),
        hooked(layer, "resid_post", f"blocks.{layer}.hook_resid_post", f"blocks.{layer}", f"h.{layer}"),
        Site(f"blocks.{layer}.attn.hook_out", layer, "attn.hook_out", 8, (f"blocks.{layer}.hook_attn_out",)),
    )
}
EMBED = Site("embed.hook_out", -1, "embed.hook_out", 8, ("embed", "hook_embed"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.*.hook_resid_post", [f"demo-L{layer:02d}" for layer in range(12)]),
        ("blocks.[0-3].mlp*", [f"demo-L{layer:02d}" for layer in range(4)]),
        ("blocks.[13].hook_attn_out", ["demo-L01", "demo-L03"]),
        ("blocks.1[01].attn.hook_out", ["demo-L10", "demo-L11"]),
        ("h.?.mlp", [f"demo-L{layer:02d}" for layer in range(10)]),
        ("blocks.11", ["demo-L11"]),
        ("embed", ["demo-embed_hook_out"]),
        ("blocks.2.*hook*", ["demo-L02-mlp_out", "demo-L02-resid_post", "demo-L02-attn_hook_out"]),
    ],
)
def test_every_name_of_a_site_is_understood_and_every_match_is_a_dictionary(pattern: str, names: list[str]) -> None:
    plans = plan(HOOKED | {EMBED.name: EMBED}, kind="sae", writes=pattern)
    assert sorted(p.name for p in plans) == sorted(names)
    assert all(p.spec.reads == p.spec.writes for p in plans)


def test_several_taps_make_a_set_each_and_all_names_differ() -> None:
    plans = plan(HOOKED | {EMBED.name: EMBED}, kind="sae", writes="*")
    assert len({p.name for p in plans}) == len(plans) == 37
    assert {p.group for p in plans} == {"demo-mlp_in", "demo-mlp_out", "demo-resid_post", "demo-embed_hook_out"}
    assert [p.name for p in plans if p.group == "demo-resid_post"][:2] == ["demo-L00-resid_post", "demo-L01-resid_post"]


def test_transcoders_pair_globs_by_layer() -> None:
    plans = plan(HOOKED, reads="blocks.[0-2].mlp.hook_in", writes="h.[0-2].mlp")
    assert [(p.name, p.spec.reads, p.spec.writes) for p in plans] == [
        (f"demo-L{i:02d}", (f"L{i:02d}.mlp_in",), (f"L{i:02d}.mlp_out",)) for i in range(3)
    ]
    both = plan(HOOKED, reads="L0[0-1].[mr]*", writes="blocks.[01].hook_attn_out")
    assert {p.group for p in both} == {"demo-mlp_in", "demo-mlp_out", "demo-resid_post"}


def test_a_spec_survives_json() -> None:
    spec = plan(kind="clt")[0].spec
    assert from_dict(DictionarySpec, to_dict(spec), "dictionary") == spec


@pytest.mark.parametrize(
    ("sites", "settings", "message"),
    [
        (SITES, {"reads": "mlp_inn"}, "matches no site of the cache. Did you mean 'mlp_in'"),
        (SITES, {"layers": (2, 7)}, r"layers \[7\]"),
        (HOOKED, {"reads": "blocks.*.hook_atn_out"}, r"Did you mean 'blocks\.\*\.hook_attn_out'"),
        (HOOKED, {"reads": "blocks.3.hook_resid_pst"}, r"Did you mean 'blocks\.3\.hook_resid_post'"),
        (HOOKED, {"reads": "L*.mlp_inn"}, r"Did you mean 'L\*\.mlp_in'"),
        ({k: v for k, v in SITES.items() if k != "L03.mlp_out"}, {}, r"layers \[3\] lack one side"),
        (SITES, {"writes": "L0*.*"}, "several sites of one layer"),
        (SITES | {"L03.mlp_in": Site("L03.mlp_in", 3, "mlp_in", 9)}, {"kind": "clt"}, "different widths"),
        (SITES, {"k_by_layer": (1, 2)}, "of which there are 4"),
        (SITES, {"k_by_layer": ()}, "of which there are 0"),
        (SITES, {"k_by_layer": (1, 2, 3, 4), "kind": "clt"}, "one dictionary of all layers"),
        (SITES, {"k_by_layer": (1, 2, 3, 0)}, "dictionary.k is 0"),
        (SITES, {"k_by_layer": (1, 2, 3, 4), "firing": "relu", "sparsity": 1.0}, "sets its sparsity by a penalty"),
        (SITES, {"n_latents": None}, "exactly one of n_latents and expansion"),
        (SITES, {"kind": "sae", "reads": "mlp_in", "writes": "mlp_out"}, "reconstructs what it reads"),
    ],
)
def test_recipes_that_do_not_fit_the_cache_say_what_would(
    sites: dict[str, Site], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(sites, **settings)
