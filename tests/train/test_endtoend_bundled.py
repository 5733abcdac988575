"""Training through the bundled language model: dictionaries that were trained locally come to predict better."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.train.test_endtoend_gradients import MODES
from thresher.cache.reader import CacheReader
from thresher.commands.evaluate import evaluate_recipe
from thresher.commands.train import train_recipe
from thresher.commands.wiring import read_recipe
from thresher.harvest.corpus import DataConfig
from thresher.harvest.run import HarvestConfig, harvest
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.endtoend.group import Group
from thresher.train.endtoend.setting import Setting
from thresher.train.files import read_config
from thresher.train.fit import Fit
from thresher.train.plan import RunPlan, plan_runs
from thresher.train.run import train
from thresher.train.state import Checkpoint, load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
DICTIONARY = DictionaryConfig(kind="transcoder", firing="batchtopk", k=8, n_latents=256)


@pytest.fixture(scope="module")
def target() -> TransformerTarget:
    return load_target(TargetConfig(device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    data = DataConfig(context=64, max_tokens=20_000, test_fraction=0.2)
    path = tmp_path_factory.mktemp("caches") / "cache"
    harvest(TargetConfig(device="cpu"), data, HarvestConfig(codec="bf16"), path=path, console=Console(quiet=True))
    return CacheReader.open(path)


def plans(cache: CacheReader, label: str, **settings: Any) -> list[RunPlan]:
    base: dict[str, Any] = {"batch_rows": 512, "lr": 1e-3, "warmup": 5, "decay": "none"}
    return plan_runs(label, DICTIONARY, TrainConfig(**(base | settings)), cache.sites, {})


@pytest.fixture(scope="module")
def local(cache: CacheReader, tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """All four layers, trained on the reconstruction error alone."""
    out = tmp_path_factory.mktemp("local")
    results = train(plans(cache, "local", steps=100), cache, out=out, device="cpu", console=Console(quiet=True))
    found = [load_checkpoint(result.path) for result in results]
    return [one for one in found if one is not None]


def joint(target: TransformerTarget, cache: CacheReader, local: list[Checkpoint], mode: str, steps: int) -> Group:
    """A group that starts from the local dictionaries."""
    fits = [
        Fit(p, cache, torch.device("cpu"), total=steps)
        for p in plans(cache, "joint", objective="kl", mode=mode, steps=steps)
    ]
    for fit, start in zip(fits, local, strict=True):
        weights = {name: tensor.clone() for name, tensor in start.tensors.items() if name.startswith("model.")}
        fit.load(Checkpoint(0, 0, weights))
    return Setting(target, cache, torch.device("cpu")).group(fits)


def divergence(group: Group, first: int, last: int) -> float:
    """Mean KL over steps `first` to `last`, which are taken."""
    while group.fits[0].done < first:
        group.step()
    group.fits[0].metrics()
    while group.fits[0].done < last:
        group.step()
    return float(group.fits[0].metrics()["kl"])


@pytest.mark.parametrize("mode", [MODES[0], *(pytest.param(mode, marks=pytest.mark.long) for mode in MODES[1:])])
def test_training_through_the_model_goes_below_the_local_start(
    target: TransformerTarget, cache: CacheReader, local: list[Checkpoint], mode: str
) -> None:
    group = joint(target, cache, local, mode, 16)
    before, after = divergence(group, 0, 2), divergence(group, 14, 16)
    assert after < 0.85 * before
    assert all(p.grad is None and not p.requires_grad for p in target.model.parameters())


RECIPE = """
data = {context = 64, max_tokens = 20000, test_fraction = 0.2}
harvest = {codec = "bf16"}
dictionary = {kind = "transcoder", firing = "topk", k = 8, n_latents = 64, layers = [0, 1]}
train = {batch_rows = 512, steps = 3, log_every = 1, objective = "kl", calibrate_rows = 500, heldout_rows = 500}
evaluate = {tokens = 300, resamples = 100, protocols = ["cascade"], training_tokens = 0, neurons = []}
target = {device = "cpu", dtype = "float32"}
"""


@pytest.mark.usefixtures("no_pictures")
def test_a_recipe_trains_through_the_model_and_is_judged_under_a_name_that_says_so(
    cache: CacheReader, tmp_path: Path
) -> None:
    file, runs = tmp_path / "own.toml", tmp_path / "runs"
    file.write_text(RECIPE)
    recipe = read_recipe(str(file), [])
    results = train_recipe(recipe, cache.path, runs, resume=False, device="cpu", wandb="disabled")
    label = "transcoder-topk-kl-cascade"
    assert [result.name for result in results] == [f"{label}-L00", f"{label}-L01"]
    settings = read_config(results[0].path)["training"]
    assert (settings["settings"]["objective"], settings["settings"]["mode"]) == ("kl", "cascade")
    assert settings["together"] == [result.name for result in results]
    judged = evaluate_recipe(recipe, cache.path, runs, tmp_path / "report")
    assert label in {row.name for row in judged.rows}
