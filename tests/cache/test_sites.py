"""What patterns mean, and when a cache holds all that a recipe asks for."""

import pytest

from thresher.cache.contracts import Site
from thresher.cache.sites import matches, unmet

SITES = [Site(f"L{layer:02d}.{tap}", layer, tap, 8) for layer in range(4) for tap in ("mlp_in", "mlp_out")]
HOOK = Site("blocks.1.attn.hook_out", 1, "attn.hook_out", 8)


@pytest.mark.parametrize(
    ("pattern", "layers", "count"),
    [
        ("mlp_in", None, 4),
        ("mlp_in", [1, 3], 2),
        ("mlp_*", None, 8),
        ("mlp_*", [0], 2),
        ("L02.mlp_in", [0], 1),
        ("L0[1-2].mlp_out", None, 2),
        ("L*.*", None, 8),
        ("L*", None, 0),
        ("*", None, 8),
        ("attn.hook_out", None, 1),
        ("blocks.*.attn.hook_out", None, 1),
        ("blocks.*.hook_out", None, 0),
        ("resid_pre", None, 0),
    ],
)
def test_a_star_stays_within_a_dotted_part(pattern: str, layers: list[int] | None, count: int) -> None:
    assert sum(matches(pattern, site, layers) for site in [*SITES, HOOK]) == count


def test_a_site_answers_to_all_its_names() -> None:
    site = Site("L03.mlp_out", 3, "mlp_out", 8, ("blocks.3.hook_mlp_out", "blocks.3.mlp", "h.3.mlp"))
    for pattern in ("blocks.3.mlp", "h.*.mlp", "blocks.[0-3].mlp*", "blocks.?.hook_mlp_out", "L03.mlp_out", "mlp_out"):
        assert matches(pattern, site)
    for pattern in ("blocks.*", "blocks.4.mlp", "mlp", "blocks.*mlp"):
        assert not matches(pattern, site)
    made = [{"sites": ["mlp_out"], "layers": [3]}]
    assert unmet(["blocks.3.hook_mlp_out", "h.3.mlp"], None, [site], made) == []
    assert len(unmet(["blocks.4.hook_mlp_out", "blocks.*.hook_mlp_out"], None, [site], made)) == 2


@pytest.mark.parametrize(
    ("patterns", "layers", "made", "missing"),
    [
        (["mlp_in"], None, None, []),
        (["mlp_in"], None, [0, 1, 2, 3], ["mlp_in"]),  # the model may have more layers
        (["mlp_in"], [1, 2], [0, 1, 2, 3], []),
        (["mlp_in"], [2, 4], [0, 1, 2, 3], ["mlp_in"]),
        (["L01.mlp_in", "L03.mlp_out"], None, [0, 1, 2, 3], []),
        (["L04.mlp_in"], None, None, ["L04.mlp_in"]),
        (["L0[1-2].mlp_in"], None, [0, 1, 2, 3], []),
        (["L0[1-7].mlp_in"], None, [0, 1, 2, 3], ["L0[1-7].mlp_in"]),
        (["L0[1-7].mlp_in"], None, None, []),  # all there are
        (["L*.mlp_in"], None, None, []),
        (["L*.mlp_in"], None, [0, 1, 2, 3], ["L*.mlp_in"]),
        (["blocks.*.attn.hook_out"], None, None, ["blocks.*.attn.hook_out"]),
        (["resid_pre", "mlp_out"], None, None, ["resid_pre"]),
    ],
)
def test_a_cache_serves_what_it_surely_holds(
    patterns: list[str], layers: list[int] | None, made: list[int] | None, missing: list[str]
) -> None:
    lines = unmet(patterns, layers, [*SITES, HOOK], [{"sites": ["mlp_in", "mlp_out"], "layers": made}])
    assert len(lines) == len(missing)
    assert all(repr(pattern) in line for pattern, line in zip(missing, lines, strict=True))
    same = unmet(patterns, layers, [*SITES, HOOK], [{"sites": patterns, "layers": layers}])
    assert same == []
