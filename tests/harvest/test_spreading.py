"""A target whose modules lie in several places has the values of one that lies in one."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.harvest.conftest import tiny
from thresher.cache.errors import UserError
from thresher.cache.records import from_dict
from thresher.commands.wiring import target_on
from thresher.harvest.passes import Passes, workers_for
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target
from thresher.recipes.reading import Recipe

SPREAD: dict[str, str | int] = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
SITES = ["resid_pre", "resid_mid", "mlp_in", "mlp_hidden", "mlp_out", "resid_post"]
TOKENS = (torch.arange(32) * 7 + 3).remainder(64).view(2, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[TransformerTarget, TransformerTarget]:
    """Whole and spread."""
    whole = TargetConfig(model=str(folder), device="cpu", dtype="float32")
    return load_target(whole), load_target(dataclasses.replace(whole, device_map=SPREAD))


def test_what_is_recorded_is_equal_bit_for_bit(pair: tuple[TransformerTarget, TransformerTarget]) -> None:
    whole, spread = pair
    assert (whole.spread, spread.spread) == (False, True)
    assert spread.device == torch.device("cpu")
    assert spread.identity == whole.identity
    sites = spread.sites(SITES)
    assert sites == whole.sites(SITES)
    expected, found = whole.record(TOKENS, sites), spread.record(TOKENS, sites)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    early = spread.sites(["mlp_in"], [0])
    assert torch.equal(spread.record(TOKENS, early)["L00.mlp_in"], expected["L00.mlp_in"])


def test_edits_reach_the_logits_alike(pair: tuple[TransformerTarget, TransformerTarget]) -> None:
    edits = {"L00.mlp_out": lambda x: 2 * x, "L01.resid_mid": lambda x: x + 1.0, "L01.mlp_in": lambda x: -x}
    (plain, edited), found = ([target.logits(TOKENS), target.logits(TOKENS, edits)] for target in pair)
    assert torch.equal(found[0], plain)
    assert torch.equal(found[1], edited)
    assert not torch.equal(plain, edited)


def test_passes_run_one_at_a_time(pair: tuple[TransformerTarget, TransformerTarget]) -> None:
    _, spread = pair
    assert workers_for(spread) == 1
    with Passes(spread, spread.sites(["mlp_out"])) as passes:
        assert passes.workers == 1
        assert not passes._workers


def test_maps_are_checked(folder: Path) -> None:
    with pytest.raises(UserError, match=r"device_map is 'all'; expected one of none, auto, .*or a table"):
        TargetConfig(device_map="all")
    with pytest.raises(UserError, match="device_map is empty"):
        TargetConfig(device_map={})
    assert from_dict(TargetConfig, {"device_map": {"lm_head": 1}}, "target").device_map == {"lm_head": 1}
    with pytest.raises(UserError, match="expected string"):
        from_dict(TargetConfig, {"device_map": {"lm_head": [1]}}, "target")


def test_what_needs_the_model_whole_refuses(pair: tuple[TransformerTarget, TransformerTarget]) -> None:
    with pytest.raises(UserError, match="must lie whole on one device"):
        pair[1].mlp_matrices(0)
    recipe = Recipe("r", "", {"target": TargetConfig(device_map="auto")}, (), frozenset())
    with pytest.raises(UserError, match="training through the language model needs it whole"):
        target_on(recipe, "cpu")
