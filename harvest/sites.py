"""Names of the target's tensors, resolved to the modules that hold them.

A site is asked for in four ways: by tap (`mlp_in`, in all layers or in chosen ones), by full name (`L05.mlp_in`,
`L0[0-3].mlp_in`), by the hook name that transformer-lens gives it (`blocks.5.attn.hook_out`,
`blocks.[0-3].hook_mlp_out`), or by the module whose output it is, as transformer-lens or Hugging Face calls it
(`blocks.[0-3].mlp`, `transformer.h.*.attn`, `h.*.attn`). In a pattern, `*` stays within one dotted part, so
`blocks.*.hook_out` means the blocks' own outputs and not those of everything inside them. A name that is another word
for a tap gives the tap's site; a site knows all its names.

Pure: everything here works on a `SiteTable`, which harvest/structure.py fills for one model.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.sites import fits, is_glob, near_misses

TAPS = {
    "resid_pre": "residual stream entering the block",
    "resid_mid": "residual stream after the attention's addition, before the second norm",
    "mlp_in": "what the first matrix of the MLP multiplies: after the second norm with its gain and bias",
    "mlp_hidden": "what the last matrix of the MLP multiplies: its neurons after the nonlinearity and after any gate",
    "mlp_out": "what the block adds to the residual stream for its MLP",
    "resid_post": "residual stream leaving the block",
}
"""The taps in forward order, and what each one is."""


class Point(NamedTuple):
    """Where a tensor can be seen and replaced: at one side of one module of the Hugging Face model."""

    module: str
    """Dotted path in the Hugging Face model, such as `transformer.h.5.mlp`."""
    side: Literal["in", "out"]
    """Its first tensor argument, or the first tensor that it returns."""


class SiteTable(NamedTuple):
    """All that can be named in one model."""

    n_layers: int
    taps: Mapping[tuple[int, str], Point]
    """(layer, tap) to its point, for the taps that this architecture has."""
    lacking: Mapping[str, str]
    """Tap that the architecture lacks: why, and what to use instead (one or two sentences)."""
    hooks: Mapping[str, tuple[str, Point]]
    """transformer-lens hook name, aliases included: its canonical name and point."""
    unseen: Mapping[str, str]
    """Hook names that exist but are no input or output of a module: why they cannot be taken."""


class Located(NamedTuple):
    """A resolved name, its width not known yet."""

    name: str
    layer: int
    tap: str
    point: Point
    aliases: tuple[str, ...] = ()
    """Other names of it."""

    def site(self, width: int) -> Site:
        """The public description of it."""
        return Site(self.name, self.layer, self.tap, width, self.aliases)


def site_name(layer: int, tap: str) -> str:
    """`L05.mlp_in`."""
    return f"L{layer:02d}.{tap}"


def resolve(table: SiteTable, patterns: Sequence[str], layers: Sequence[int] | None = None) -> tuple[Located, ...]:
    """Every tensor that any pattern names, each once, by layer and then by tap; hook names follow the taps.

    `layers` restricts bare taps. Raises UserError for a pattern without a match, a tap that the architecture lacks, a
    layer that the model does not have, and an empty list.
    """
    if not patterns:
        raise UserError("sites is empty; expected at least one of " + ", ".join(TAPS) + ", or a hook name.")
    _check_layers(table, layers)
    found: dict[str, Located] = {}
    names = spellings(table)
    for pattern in patterns:
        matches = _tap(table, pattern, layers) if pattern in TAPS else _match(table, names, pattern)
        found.update((match.name, match) for match in matches)
    by_point: dict[Point, list[str]] = {}
    for name, (_, point) in names.items():
        by_point.setdefault(point, []).append(name)
    every = (each._replace(aliases=_others(each, by_point.get(each.point, ()))) for each in found.values())
    return tuple(sorted(every, key=_place))


def spellings(table: SiteTable) -> dict[str, tuple[str, Point]]:
    """Every name of a hook point, and of a module for its output: its canonical name and point.

    A Hugging Face module goes by its path, with the model's own prefix (`transformer.`) or without.
    """
    out = dict(table.hooks)
    for canonical, point in dict.fromkeys(table.hooks.values()):
        if point.side == "out":
            modules = [canonical.removesuffix(".hook_out"), point.module, point.module.partition(".")[2]]
            for name in filter(None, modules):
                out.setdefault(name, (canonical, point))
    return out


def _others(located: Located, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name != located.name)


def _place(located: Located) -> tuple[float, int, str]:
    layer = float("inf") if located.layer < 0 else located.layer
    return layer, list(TAPS).index(located.tap) if located.tap in TAPS else len(TAPS), located.name


def _check_layers(table: SiteTable, layers: Sequence[int] | None) -> None:
    if layers is None:
        return
    wrong = [layer for layer in layers if not 0 <= layer < table.n_layers]
    if wrong or not layers:
        raise UserError(
            f"harvest.layers is {list(layers)}; expected numbers from 0 to {table.n_layers - 1}, since the model has "
            f"{table.n_layers} layers. Remove {wrong if wrong else 'the empty list'}, or leave `layers` out for all."
        )


def _tap(table: SiteTable, tap: str, layers: Sequence[int] | None) -> list[Located]:
    if tap in table.lacking:
        raise UserError(f"harvest.sites asks for {tap!r} ({TAPS[tap]}). {table.lacking[tap]}")
    wanted = range(table.n_layers) if layers is None else sorted(set(layers))
    without = [layer for layer in wanted if (layer, tap) not in table.taps]
    if without:
        having = [layer for layer in range(table.n_layers) if (layer, tap) in table.taps]
        raise UserError(
            f"harvest.sites asks for {tap!r}, which layers {without} of this model lack. Set harvest.layers = {having}."
        )
    return [Located(site_name(layer, tap), layer, tap, table.taps[layer, tap]) for layer in wanted]


def _match(table: SiteTable, names: Mapping[str, tuple[str, Point]], pattern: str) -> list[Located]:
    by_name = {site_name(layer, tap): (layer, tap) for layer, tap in table.taps}
    matches = [Located(name, *by_name[name], table.taps[by_name[name]]) for name in by_name if fits(name, pattern)]
    tap_at = {point: key for key, point in table.taps.items()}
    wanted = names if is_glob(pattern) else filter(names.__contains__, [pattern])
    for name in wanted:
        canonical, point = names[name]
        if not fits(name, pattern):
            continue
        if point in tap_at:
            layer, tap = tap_at[point]
            matches.append(Located(site_name(layer, tap), layer, tap, point))
        else:
            matches.append(Located(canonical, *_split(canonical), point))
    if not matches:
        raise UserError(_nothing(table, pattern, [*by_name, *names]))
    return matches


def _split(hook: str) -> tuple[int, str]:
    """(layer, rest) of `blocks.5.attn.hook_out`; layer -1 outside the blocks."""
    inside = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    return (int(inside[1]), inside[2]) if inside else (-1, hook)


def _nothing(table: SiteTable, pattern: str, names: Sequence[str]) -> str:
    """Why a pattern matched nothing."""
    stem = f"harvest.sites asks for {pattern!r}"
    for hook, reason in table.unseen.items():
        if fits(hook, pattern):
            return f"{stem}. {reason}"
    full = re.fullmatch(r"L([\d*?\[\]!-]+)\.(\w+)", pattern)
    if full and full[2] in table.lacking:
        return f"{stem}. {table.lacking[full[2]]}"
    numbered = re.fullmatch(r"(?:L|blocks\.)(\d+)\..+", pattern)
    if numbered and int(numbered[1]) >= table.n_layers:
        return (
            f"{stem}, and the model has {table.n_layers} layers, numbered from 0 to {table.n_layers - 1}. Name a layer "
            "that exists."
        )
    taps = [tap for tap in TAPS if tap not in table.lacking]
    return (
        f"{stem}, which matches no tap and no hook of this model.{near_misses(pattern, [*taps, *names])} "
        f"Known taps: {', '.join(taps)}; also full names such as {site_name(0, taps[0])}, transformer-lens hook names "
        "such as blocks.0.attn.hook_out, modules such as blocks.0.attn, and patterns of them, in which * stays within "
        "one dotted part."
    )
