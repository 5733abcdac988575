"""The hub, without a network: asked once, answered in one paragraph, not asked at all for what is here."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub import errors as hub_errors
from rich.console import Console

from thresher.cache.errors import UserError
from thresher.harvest.checkpoint import _needed, locate
from thresher.harvest.corpus import DataConfig, read_corpus
from thresher.harvest.hub import DEADLINE_S
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target, model_identity

Make = Callable[[str], TransformerTarget]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An empty hub cache, and a hub that raises the first entry of the list; further entries are the names asked."""
    calls: list[Any] = [OSError("Name or service not known")]

    def ask(self: Any, name: str, *, revision: str | None = None, timeout: float | None = None) -> Any:
        assert timeout == DEADLINE_S
        calls.append(name)
        raise calls[0]

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hf_api.HfApi, "model_info", ask)
    monkeypatch.setattr(hf_api.HfApi, "dataset_info", ask)
    return calls


def test_a_hub_that_does_not_answer_is_asked_once(asked: list[Any], tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match=r"target\.model is 'owner/name'.*cannot be reached.*Check the network"
    ) as caught:
        load_target(TargetConfig(model="owner/name"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"data\.source is 'owner/text'.*as a dataset on the hub"):
        read_corpus(DataConfig(source="owner/text"), tokenizer, 256, 4096, Console(quiet=True))
    assert asked[1:] == ["owner/name", "owner/text"]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (hub_errors.RepositoryNotFoundError, "none of that name"),
        (hub_errors.RevisionNotFoundError, "not at the revision 'v9'"),
        (hub_errors.GatedRepoError, "gated.*hf auth login"),
    ],
)
def test_what_the_hub_answers_is_told(kind: type[Exception], says: str, asked: list[Any]) -> None:
    asked[0] = kind.__new__(kind, "no")  # their constructors want an HTTP response
    with pytest.raises(UserError, match=says):
        model_identity(TargetConfig(model="owner/name", revision="v9"))


def test_offline_mode_is_told(asked: list[Any]) -> None:
    asked[0] = hub_errors.OfflineModeIsEnabled("offline")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load_target(TargetConfig(model="owner/name"))


def test_a_downloaded_model_is_not_asked_for(asked: list[Any], tmp_path: Path, tiny_target: Make) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "hub" / "models--owner--name"
    snapshot = root / "snapshots" / commit
    tiny_target("gpt2").model.save_pretrained(snapshot)
    (snapshot / "vocab.json").write_text("{}")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    # As the hub stores large files: under their digest, with a link.
    weights = snapshot / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    plain = model_identity(TargetConfig(model="owner/name"))
    (root / "blobs").mkdir()
    weights.rename(root / "blobs" / digest)
    weights.symlink_to(root / "blobs" / digest)
    found = model_identity(TargetConfig(model="owner/name"))
    assert found == plain
    assert (found["model"], found["revision"]) == ("owner/name", commit)
    assert locate("owner/name", commit) == snapshot
    assert asked[1:] == []
    weights.unlink()
    with pytest.raises(UserError, match="cannot be reached"):
        locate("owner/name", None)


def test_only_what_a_model_is_loaded_from_is_downloaded() -> None:
    files = ["config.json", "README.md", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "merges.txt"]
    assert _needed(files) == ["model.safetensors", "config.json", "merges.txt"]
    sharded = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "consolidated.safetensors",
    ]
    assert _needed(sharded) == ["model-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json"]
    assert _needed(["config.json", "pytorch_model.bin", "tf_model.h5"]) == ["pytorch_model.bin", "config.json"]
