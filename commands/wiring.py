"""What a recipe becomes: checked tables, a cache's path, a source to train from, plans, a model, text to judge on."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thresher.cache.errors import UserError
from thresher.cache.place import Place, local, place_at
from thresher.commands.options import out
from thresher.commands.tables import known_tables

if TYPE_CHECKING:
    from thresher.cache.contracts import Site
    from thresher.cache.reader import CacheReader
    from thresher.cache.windows import WindowedSource
    from thresher.harvest.corpus import Corpus, DataConfig
    from thresher.harvest.target import TransformerTarget
    from thresher.harvest.texts import Texts
    from thresher.recipes.reading import Recipe
    from thresher.train.plan import RunPlan


def read_recipe(name: str, assignments: Sequence[str] | None) -> "Recipe":
    from thresher.recipes.reading import read

    return read(name, assignments or [], known_tables())


def default_cache(recipe: "Recipe") -> Place:
    """`$THRESHER_CACHE/NAME-FINGERPRINT.zarr`: the name is for people, the fingerprint decides."""
    from thresher.cache.records import fingerprint

    name = f"{recipe.name}-{fingerprint(identity_of(recipe.tables))[:12]}.zarr"
    return place_at(f"{os.environ.get('THRESHER_CACHE', 'caches')}/{name}")


def identity_of(tables: Mapping[str, Any]) -> dict[str, Any]:
    from thresher.harvest.run import identity

    return identity(tables["target"], tables["data"], tables["harvest"])


def plans_of(recipe: "Recipe", sites: "Mapping[str, Site]") -> "list[RunPlan]":
    from thresher.train.plan import plan_runs

    if not recipe.variants:
        raise UserError(
            f"The recipe {recipe.name} makes a target and no dictionary: it has no table [dictionary]. Add one, or run "
            f"`thresher target train {recipe.name}`."
        )
    return [
        plan
        for variant in recipe.variants
        for plan in plan_runs(
            variant.label, variant.tables["dictionary"], variant.tables["train"], sites, variant.resolved
        )
    ]


def open_source(recipe: "Recipe", cache: Place | None, live: bool) -> "CacheReader | WindowedSource":
    """What the recipe trains from; close it."""
    from thresher.cache.ring import open_ring
    from thresher.harvest.live import live_source

    path = cache or default_cache(recipe)
    target, data, settings = (recipe.tables[table] for table in ("target", "data", "harvest"))
    if live:
        return live_source(target, data, settings, path=path, console=out)
    if settings.window_gb is None:
        return open_cache(recipe, cache)
    return open_ring(
        local(path, "Training from a ring (harvest.window_gb)"),
        identity_of(recipe.tables),
        lambda line: out.print(line, highlight=False),
    )


def open_cache(recipe: "Recipe", cache: Place | None) -> "CacheReader":
    from thresher.cache.reader import CacheReader

    path = cache or default_cache(recipe)
    if not path.is_dir():
        raise UserError(f"There is no cache at {path}. Fill it first: thresher harvest {recipe.name}.")
    reader = CacheReader.open(path, identity=identity_of(recipe.tables))
    if reader.incomplete:
        names = ", ".join(reader.incomplete)
        out.print(f"Note: {names} of {path} is in the making and does not count.", highlight=False, soft_wrap=True)
    return reader


def target_on(recipe: "Recipe", device: str) -> "TransformerTarget":
    """The recipe's language model where training takes place."""
    import dataclasses

    from thresher.harvest.target import load_target

    if recipe.tables["target"].device_map != "none":
        raise UserError(
            "target.device_map is set, and training through the language model needs it whole on the device of the "
            "training. Leave target.device_map out (--set target.device_map=none), or set train.objective = 'local'."
        )
    return load_target(dataclasses.replace(recipe.tables["target"], device=device))


def texts_for(
    config: Mapping[str, Any],
    tables: Mapping[str, Any],
    cache: Place | None,
    target: "TransformerTarget",
    own: "DataConfig | None",
) -> "Texts":
    """What runs are judged on: `own` text, or what the first of them, of this config.json, holds out."""
    from thresher.harvest.corpus import read_corpus
    from thresher.harvest.target import load_tokenizer
    from thresher.harvest.texts import held_out, own_text

    def read(data: "DataConfig") -> "Corpus":
        return read_corpus(data, load_tokenizer(tables["target"]), target.n_ctx, target.n_vocab, out)

    if own is not None:
        return own_text(config, tables["data"], own, cache, read)
    return held_out(config, tables["data"], tables["evaluate"].split, cache, read)
