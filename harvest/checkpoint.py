"""Where a model's files are, and what makes them these and no others.

A model is `bundled:NAME`, a directory, a file of weights with its config.json beside it (for models of our own), or a
name on the hub. A hub model that lies complete in the local
hub cache is taken from there without asking the network, so a second run works offline and at once; give `revision`
to get another one.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

from thresher.cache.errors import UserError
from thresher.cache.records import fingerprint, nearest
from thresher.harvest.hub import check_on_hub

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
)


WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin")


def bundled(name: str, suffix: str, field: str) -> Path:
    """The path of `bundled:<name>` in the package; `suffix` is "" for a directory or the file's extension."""
    root = Path(str(resources.files("thresher.harvest"))) / "bundled"
    path = root / (name.removeprefix("bundled:") + suffix)
    known = [
        f"bundled:{entry.name.removesuffix(suffix)}"
        for entry in sorted(root.iterdir())
        if (entry.suffix == suffix if suffix else entry.is_dir())
    ]
    if f"bundled:{path.name.removesuffix(suffix)}" not in known:
        raise UserError(f"{field} is {name!r}.{nearest(name, known)} Bundled with Thresher: {', '.join(known)}.")
    return path


def bundled_model(name: str = "books-128") -> Path:
    """The directory of a model that travels with Thresher, for whatever loads Hugging Face directories."""
    return bundled(f"bundled:{name}", "", "name")


def locate(model: str, revision: str | None) -> Path:
    """The directory of a model's files, downloaded first when it is a hub name that is not here yet; or the file of
    weights that `model` names, of a model of our own.

    Raises UserError for a directory that is missing or no model, and for a hub name that cannot be had.
    """
    if model.startswith("bundled:"):
        return bundled(model, "", "target.model")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"target.model is the directory {model!r}, which has no config.json; expected a Hugging Face model "
                "directory (config.json, weights, tokenizer files). Save one there with save_pretrained, or give "
                "another directory or a hub name."
            )
        return path
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES and is_simple_mlp(path.parent):
        return path
    if path.exists() or looks_like_path(model):
        raise UserError(
            f"target.model is {model!r}, which is {'a file' if path.exists() else 'not there'}; expected a model "
            "directory, the file of weights of a LlamaSimpleMLP with its config.json beside it, a name on the hub such "
            "as 'gpt2', or 'bundled:books-128'. Check the path."
        )
    return _from_hub(model, revision)


def folder_of(path: Path) -> Path:
    """Where config.json and the tokenizer of a located model are."""
    return path.parent if path.is_file() else path


def is_simple_mlp(folder: Path) -> bool:
    """Whether a directory's config.json describes a LlamaSimpleMLP, as `architecture` or `model_type`."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "LlamaSimpleMLP" in (config.get("architecture"), config.get("model_type"))


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a path: hub names are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/")


def _from_hub(name: str, revision: str | None) -> Path:
    import transformers.utils  # noqa: F401 - first, or huggingface_hub 2.4 prints a failed import of its own
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if (path / "config.json").is_file() and tokenizer_files(path) and weight_files(path):
            return path
    except (LocalEntryNotFoundError, UserError, ValueError):
        pass  # not here, or not all of it
    files = check_on_hub("model", name, revision, "target.model")
    wanted = _needed(files)
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def _needed(files: Iterable[str]) -> list[str]:
    """The files at the top of a hub repository that a model is loaded from; safetensors before pickles."""
    top = [file for file in files if "/" not in file]
    shards = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
    weights = [file for file in top if shards.fullmatch(file)]
    if not weights:
        weights = [file for file in top if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", file)]
    return weights + [file for file in top if file.endswith((".json", ".model", ".txt"))]


def weight_files(path: Path) -> list[Path]:
    """The weight files of a located model, by name. Raises UserError when there are none, or a listed one misses.

    Under a name that is not Hugging Face's, a LlamaSimpleMLP's directory may hold one file of weights.
    """
    if path.is_file():
        return [path]
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (path / index).is_file():
            listed = sorted(set(json.loads((path / index).read_text())["weight_map"].values()))
            missing = [name for name in listed if not (path / name).is_file()]
            if missing:
                raise UserError(
                    f"target.model: {path} lists {len(listed)} weight files in {index}, and {', '.join(missing[:3])} "
                    f"{'is' if len(missing) == 1 else 'are'} missing. Copy or download the model again."
                )
            return [path / name for name in listed]
        if (path / single).is_file():
            return [path / single]
    others = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES) if is_simple_mlp(path) else []
    if len(others) == 1:
        return others
    if others:
        names = ", ".join(file.name for file in others[:4])
        raise UserError(
            f"target.model: {path} holds {len(others)} files of weights ({names}); expected one. Give the file itself "
            "as target.model."
        )
    raise UserError(
        f"target.model: {path} has no weights; expected model.safetensors (or shards with their index, or "
        "pytorch_model.bin). Save the model there with save_pretrained, or give another directory or a hub name."
    )


def tokenizer_files(path: Path) -> list[Path]:
    """The tokenizer's files of a located model, [] for one without. Settings alone make no tokenizer."""
    folder = folder_of(path)
    there = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    settings = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    return there if any(file.name not in settings for file in there) else []


def digests(files: Iterable[Path]) -> Mapping[str, str]:
    """SHA-256 of each file, by name."""
    return {file.name: _sha256(file) for file in files}


def digest(files: Iterable[Path]) -> str:
    """One SHA-256 over the names and SHA-256s of files."""
    return fingerprint(dict(digests(files)))


def _sha256(file: Path) -> str:
    # The hub's cache stores large files under their SHA-256 and links to them, so a big model need not be read again.
    stored = file.resolve()
    if stored.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", stored.name):
        return stored.name
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def commit_of(path: Path) -> str | None:
    """The hub commit of a directory in the hub's cache, else None."""
    return path.name if path.parent.name == "snapshots" else None
