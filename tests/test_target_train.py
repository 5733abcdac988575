"""The recipes that make a target, and the way from text over a model of our own to judged dictionaries."""

import json
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.documents import document
from thresher.cache.errors import UserError
from thresher.commands.evaluate import evaluate_recipe
from thresher.commands.harvest import harvest_recipe
from thresher.commands.options import out
from thresher.commands.target import target_train
from thresher.commands.train import train_recipe
from thresher.commands.wiring import plans_of, read_recipe
from thresher.evaluate import report
from thresher.harvest.checkpoint import bundled
from thresher.harvest.pretraining.models import fresh_model
from thresher.harvest.simple_mlp import LlamaSimpleMLP
from thresher.harvest.target import TargetConfig, load_tokenizer
from thresher.recipes.reading import ASIDE

SMALL = (
    *("pretrain.n_vocab=400", "pretrain.tokenizer=train", "pretrain.width=32", "pretrain.context=64"),
    *("pretrain.steps=30", "pretrain.warmup=5", "pretrain.batch_contexts=16", "pretrain.lr=1e-2"),
    *("data.test_fraction=0.2", "data.validation_fraction=0.15", "dictionary.expansion=4", "dictionary.k=8"),
    *("train.batch_rows=512", "train.epochs=2", "train.lr=1e-2", "train.log_every=2"),
    *("evaluate.tokens=1500", "evaluate.resamples=100", "evaluate.training_tokens=2000", "evaluate.neurons=[32]"),
)


def test_a_target_is_trained_harvested_explained_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(out, "quiet", True)
    monkeypatch.setattr(report, "write_report", lambda results, folder: SimpleNamespace(_asdict=dict))  # has its tests
    lines = (Path(str(resources.files("thresher.harvest"))) / "bundled" / "books.jsonl").read_text().splitlines()
    passages = [json.loads(line)["text"][:1500] for line in lines[::5]]
    Path("text.jsonl").write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    sets = [*SMALL, "data.source=text.jsonl"]
    target_train("target-books-lsm", sets, as_json=True)
    assert document("target train", capsys.readouterr().out)["reused"] is False
    recipe = read_recipe("target-books-lsm", sets)
    made = json.loads(Path("targets/books-lsm/pretraining.json").read_text())["result"]
    assert made["validation_ce"] < 5.5 < torch.tensor(400.0).log()
    harvested = harvest_recipe(recipe, None)
    assert harvested.rows["train"] > 10_000
    runs = train_recipe(recipe, None, None, resume=False, device="cpu", wandb="disabled")
    assert [run.status for run in runs] == ["trained", "trained"]
    results = evaluate_recipe(recipe, None, None, None)
    assert all(check["passed"] for check in results.checks)
    rows = {row.name: row for row in results.rows if row.protocol == "cascade"}
    [ours] = [row.metrics for row in rows.values() if row.kind == "replacement"]
    assert abs(ours["delta"]) < rows["zero"].metrics["delta"] / 3
    assert ours["fvu"] < 0.5
    assert ours["l0"] == pytest.approx(8, rel=0.3)
    stored = json.loads(next(Path("runs/target-books-lsm").glob("*/config.json")).read_text())
    assert stored["cache"]["identity"]["target"]["model"] == "books-lsm"


def test_the_gpt2_recipe_has_the_shape_and_the_tokenizer_of_the_bundled_model() -> None:
    settings = read_recipe("target-books-gpt2", []).tables["pretrain"]
    tokenizer: Any = load_tokenizer(TargetConfig())
    model: Any = fresh_model(settings, tokenizer)
    folder = bundled("bundled:books-128", "", "target.model")
    theirs = load_file(folder / "model.safetensors")
    ours = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: x.shape for name, x in theirs.items()}
    stored = json.loads((folder / "config.json").read_text())
    here = model.config.to_dict()
    chance = ("architectures", "dtype", "transformers_version", "pad_token_id")
    assert {key: here[key] for key in stored if key not in chance} == {
        key: value for key, value in stored.items() if key not in chance
    }
    assert (settings.n_vocab, settings.tokenizer, settings.weights) == (len(tokenizer), "train", "bfloat16")


def test_the_four_layer_recipe_is_the_published_model() -> None:
    recipe = read_recipe("target-lsm4", [])
    settings, data = recipe.tables["pretrain"], recipe.tables["data"]
    with torch.device("meta"):
        model = fresh_model(settings, range(50_277))  # type: ignore[arg-type]
    assert isinstance(model, LlamaSimpleMLP)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 66.9
    assert settings.batch_contexts * settings.context * settings.steps == 1024 * 512 * 100_000
    assert (data.packing, data.bos, data.separator, data.streaming) == ("document", False, "none", True)


def test_a_recipe_that_makes_a_target_alone_has_no_dictionary_and_says_so() -> None:
    recipe = read_recipe("target-lsm4", [])
    assert recipe.variants == ()
    with pytest.raises(UserError, match=r"makes a target and no dictionary.*thresher target train target-lsm4"):
        plans_of(recipe, {})
    with pytest.raises(UserError, match=r"no table \[pretrain\]"):
        target_train("books-demo")


def test_runs_store_the_table_of_the_target_only_where_the_recipe_has_it() -> None:
    assert ASIDE == ("pretrain",)
    [variant] = read_recipe("target-books-lsm", []).variants
    assert variant.resolved["pretrain"]["n_kv_heads"] == 2
    assert "pretrain" not in read_recipe("books-demo", []).variants[0].resolved
