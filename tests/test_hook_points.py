"""Hook names and globs from end to end on the bundled model: harvest, train, evaluate."""

from pathlib import Path

import pytest

from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.commands.evaluate import evaluate_recipe
from thresher.commands.harvest import harvest_recipe
from thresher.commands.train import train_recipe
from thresher.commands.wiring import plans_of, read_recipe

RECIPE = """
[target]
model = "bundled:books-128"
[data]
source = "bundled:books"
context = 128
max_tokens = 24000
test_fraction = 0.25
validation_fraction = 0.15
[harvest]
sites = ["blocks.[0-1].hook_resid_post", "h.[0-1].attn", "blocks.1.mlp*", "blocks.1.mlp.hook_in"]
[dictionary]
kind = "sae"
firing = "topk"
k = 4
n_latents = 64
[train]
steps = 3
batch_rows = 256
[evaluate]
tokens = 500
resamples = 100
protocols = ["cascade"]
[[sweep]]
name = "resid"
dictionary.writes = "blocks.*.hook_resid_post"
[[sweep]]
name = "attn"
dictionary.writes = "blocks.*.hook_attn_out"
[[sweep]]
name = "all-of-1"
dictionary.writes = "blocks.1.*hook*_out"
[[sweep]]
name = "plt"
dictionary.kind = "transcoder"
dictionary.reads = "blocks.*.mlp.hook_in"
dictionary.writes = "transformer.h.[01].mlp"
"""


@pytest.mark.long
def test_globs_of_hooks_and_modules_hold_from_harvest_to_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "hooks.toml"
    file.write_text(RECIPE)
    recipe = read_recipe(str(file), ["harvest.codec=bf16"])
    cache, runs = tmp_path / "cache.zarr", tmp_path / "runs"
    harvest_recipe(recipe, cache)
    with CacheReader.open(cache) as reader:
        assert set(reader.sites) == {
            "L00.resid_post", "L01.resid_post", "blocks.0.attn.hook_out", "blocks.1.attn.hook_out", "L01.mlp_in",
            "L01.mlp_out",
        }  # fmt: skip
        names = reader.sites["blocks.0.attn.hook_out"].aliases
        assert {"blocks.0.hook_attn_out", "blocks.0.attn", "transformer.h.0.attn", "h.0.attn"} <= set(names)
    trained = train_recipe(recipe, cache, runs, resume=False, device="cpu", wandb="disabled")
    assert [result.name for result in trained] == [
        "resid-L00", "resid-L01", "attn-L00", "attn-L01", "all-of-1-L01-mlp_out", "all-of-1-L01-resid_post",
        "all-of-1-L01-attn_hook_out", "plt-L01",
    ]  # fmt: skip
    results = evaluate_recipe(recipe, cache, runs, tmp_path / "report")
    names = {row.name for row in results.rows if row.kind == "replacement"}
    assert names == {"resid", "attn", "plt", "all-of-1-mlp_out", "all-of-1-resid_post", "all-of-1-attn_hook_out"}
    with pytest.raises(UserError, match=r"Did you mean 'blocks\.\*\.hook_attn_out'"):
        plans_of(read_recipe(str(file), ["dictionary.writes=blocks.*.hook_atn_out"]), reader.sites)
