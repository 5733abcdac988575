"""Names to tensors, on a hand-made table."""

import pytest

from thresher.cache.errors import UserError
from thresher.harvest.sites import TAPS, Point, SiteTable, resolve

TABLE = SiteTable(
    n_layers=12,
    taps={(layer, tap): Point(f"h.{layer}", "in") if tap == "resid_pre" else Point(f"h.{layer}.{tap}", "out")
          for layer in range(12) for tap in TAPS if tap != "resid_mid"},
    lacking={"resid_mid": "It has none. Use resid_pre."},
    hooks={f"blocks.{layer}.{hook}": (f"blocks.{layer}.{canonical}", point)
           for layer in range(12)
           for hook, canonical, point in (
               ("hook_mlp_out", "mlp.hook_out", Point(f"h.{layer}.mlp_out", "out")),
               ("mlp.hook_out", "mlp.hook_out", Point(f"h.{layer}.mlp_out", "out")),
               ("hook_attn_out", "attn.hook_out", Point(f"h.{layer}.attn", "out")),
               ("attn.hook_out", "attn.hook_out", Point(f"h.{layer}.attn", "out")),
           )} | {"embed.hook_out": ("embed.hook_out", Point("wte", "out"))},
    unseen={"blocks.0.attn.hook_pattern": "Not a side of a module."},
)  # fmt: skip


def names(*patterns: str, layers: list[int] | None = None) -> list[str]:
    return [located.name for located in resolve(TABLE, patterns, layers)]


def test_a_bare_tap_is_at_all_layers_or_the_chosen_ones() -> None:
    assert names("mlp_in") == [f"L{layer:02d}.mlp_in" for layer in range(12)]
    assert names("mlp_out", "mlp_in", layers=[10, 2]) == ["L02.mlp_in", "L02.mlp_out", "L10.mlp_in", "L10.mlp_out"]


def test_a_hook_name_for_a_tap_is_that_tap() -> None:
    assert names("blocks.[0-3].hook_mlp_out") == [f"L{layer:02d}.mlp_out" for layer in range(4)]
    assert names("blocks.5.mlp.hook_out", "L05.mlp_out", "mlp_out", layers=[5]) == ["L05.mlp_out"]


def test_other_hooks_take_their_canonical_name() -> None:
    assert names("blocks.5.hook_attn_out") == ["blocks.5.attn.hook_out"]
    [embed] = resolve(TABLE, ["embed.hook_out"])
    assert (embed.layer, embed.tap) == (-1, "embed.hook_out")
    [attn] = resolve(TABLE, ["blocks.11.attn.hook_out"])
    assert (attn.layer, attn.tap) == (11, "attn.hook_out")


def test_a_module_means_its_output_by_either_librarys_name() -> None:
    assert names("blocks.[0-3].mlp*") == names("h.[0-3].mlp_out") == [f"L{layer:02d}.mlp_out" for layer in range(4)]
    assert names("blocks.5.attn") == names("h.5.attn") == names("5.attn") == ["blocks.5.attn.hook_out"]
    assert names("embed") == names("wte") == ["embed.hook_out"]
    with pytest.raises(UserError, match=r"Did you mean 'blocks\.\*\.hook_attn_out'"):
        names("blocks.*.hook_atn_out")


def test_a_site_knows_its_other_names() -> None:
    [out] = resolve(TABLE, ["L03.mlp_out"])
    assert set(out.aliases) == {
        "blocks.3.hook_mlp_out", "blocks.3.mlp.hook_out", "blocks.3.mlp", "h.3.mlp_out", "3.mlp_out",
    }  # fmt: skip
    assert out.site(8).aliases == out.aliases
    for name in out.aliases:
        assert names(name) == ["L03.mlp_out"]


def test_a_star_stays_within_one_part() -> None:
    assert names("blocks.*.hook_attn_out") == names("blocks.*.attn.hook_out")
    assert len(names("L0[45].mlp_*")) == 6
    with pytest.raises(UserError, match="matches no tap"):
        names("blocks.*hook_attn_out")


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("mlp_inn", "Did you mean 'mlp_in'"),
        ("mlpout", "Did you mean 'mlp_out'"),
        ("blocks.3.hook_mlp_outt", r"Did you mean 'blocks\.3\.hook_mlp_out'"),
        ("L12.mlp_in", "12 layers, numbered from 0 to 11"),
        ("blocks.99.hook_mlp_out", "12 layers, numbered from 0 to 11"),
        ("resid_mid", "It has none. Use resid_pre."),
        ("L03.resid_mid", "It has none. Use resid_pre."),
        ("blocks.0.attn.hook_pattern", "Not a side of a module."),
    ],
)
def test_a_name_without_a_match_says_what_was_near(pattern: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        names(pattern)
    assert "\n" not in str(caught.value)


def test_layers_must_exist() -> None:
    for layers in ([12], [-1], []):
        with pytest.raises(UserError, match="from 0 to 11"):
            names("mlp_in", layers=layers)
    with pytest.raises(UserError, match="sites is empty"):
        names()


def test_a_tap_that_only_some_layers_have_names_them() -> None:
    some = TABLE._replace(taps={key: point for key, point in TABLE.taps.items() if key != (7, "mlp_in")})
    with pytest.raises(UserError, match=r"layers \[7\] of this model lack"):
        resolve(some, ["mlp_in"])
    assert len(resolve(some, ["mlp_in"], [6, 8])) == 2
