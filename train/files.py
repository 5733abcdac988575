"""A run directory: what a trained dictionary is on disk.

    config.json           what it is, of which cache, how it was trained, what came out
    weights.safetensors   float32, acting on raw activations; thresholds, dead counters and means included
    metrics.jsonl         one line per logging interval (train/metrics.py)
    checkpoints/          training state (train/state.py)
    profile/              traces of some steps, where they were asked for (train/profile.py)

Tensors of weights.safetensors, i counting sources and destinations: `W_enc.i` [F, D], `b_enc.i` [F], `W_dec.i`
[F, T, E] (T destinations written by source i, from its own on), `b_dec.i` [E], `mean.i` [E], `threshold.i` [F] (not
for topk and groupmax, which for `rank_by = "norm"` have `norm.i` [F]), `tokens_since_fired.i` [F] int64. A code is
pre · 1[pre > threshold], for topk the k largest of relu(pre), for groupmax the largest of each of k groups of
neighbours, chosen by pre · norm where there is a norm, with pre = W_enc x + b_enc.

With a skip connection `W_skip.i` [E, D] on the raw input of destination i's own source. A crosscoder has one source,
which reads its sites side by side (D = S·E, in the order of `reads`) and writes all of them (T = S). A MoLT has no
W_dec but, r counting ranks in the order of `ranks`, `V.r` [C, rank, D] and `U.r` [C, rank, E] of the C transforms of
that rank, and `centre.0` [D]: latent t, counted through the ranks, writes z_t U_tᵀ V_t (x − centre). A decomposition
has neither W_dec nor thresholds but `V.i`, `U.i`, `W_gate`, `b_gate` and `b_first` (dictionary/decomposition.py).

config.json says `finished: true` last, after the weights are on the disk: an unfinished directory is never loaded as
a dictionary. Only safetensors and JSON are read, so loading runs no foreign code.
"""

import hashlib
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.publish import explained, flush_directory, publish
from thresher.cache.records import from_dict
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.holding import Holding
from thresher.train.dictionary.rules import Deployed, names
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build
from thresher.train.streamed import Writers, publish_together, read_rows

FORMAT = "thresher-run"
VERSION = 1
CONFIG = "config.json"
WEIGHTS = "weights.safetensors"


class LoadedRun(NamedTuple):
    """A finished run, ready to be used."""

    dictionary: Coder
    """Acts on raw activations; implements cache.contracts.Dictionary."""
    config: dict[str, Any]
    """config.json."""


def save_run(path: Path, coder: Coder, config: Mapping[str, Any], by: Writers | None = None) -> None:
    """Write a deployed dictionary and then its config, each atomically.

    `by`: of ranks that share latents, which all call this (train/streamed.py).
    """
    assert coder.deployed, "only folded weights are saved as a run"
    if by is None:
        publish_tensors(path / WEIGHTS, deployed_tensors(coder))
        write_config(path, config)
        return
    publish_together(path / WEIGHTS, deployed_tensors(coder), whole_shapes(coder), by)
    by.together(path / CONFIG, lambda: write_config(path, config) if by.leads else None)


def whole_shapes(coder: Coder) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of weights.safetensors of which a share of the latents has rows."""
    with torch.device("meta"):
        whole = deployed_tensors(build(coder.spec, coder.label, deployed=True))
    own = deployed_tensors(coder)
    return {name: tuple(tensor.shape) for name, tensor in whole.items() if tensor.shape != own[name].shape}


def load_run(path: Path, device: str | torch.device = "cpu", holding: Holding | None = None) -> LoadedRun:
    """Load a finished run; `holding`: these of its latents alone.

    Raises UserError for a directory that is none, is unfinished, newer or damaged."""
    config = read_config(path)
    training = config.get("training", {})
    if not training.get("finished"):
        failed = training.get("failed")
        reason = f"it failed: {failed}" if failed else "training has not finished; go on with `thresher train --resume`"
        raise UserError(f"Run {path} cannot be loaded: {reason}")
    spec = from_dict(DictionarySpec, config["dictionary"], f"{path}: dictionary")
    coder = build(spec, str(config["name"]), deployed=True, holding=holding).requires_grad_(False)
    try:
        stored = _stored(path / WEIGHTS, coder)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"Run {path} has no readable {WEIGHTS} ({error}). Restore the file, or delete the directory and train it "
            "again."
        ) from error
    _fill(coder, stored, path)
    return LoadedRun(coder.to(device), config)


def _stored(file: Path, coder: Coder) -> dict[str, Tensor]:
    """The tensors of a file; of a share of the latents its rows of them."""
    holding = coder.holding
    if holding is None:
        return safetensors.torch.load_file(file)
    whole = whole_shapes(coder)
    return read_rows(file, lambda name, _: slice(holding.first, holding.stop) if name in whole else None)


def weights_hash(path: Path) -> str:
    """SHA-256 of a run's weights file."""
    with (path / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_weights(path: Path) -> None:
    """Raise UserError when the weights of a finished run are missing or cut short; reads the header only."""
    try:
        with safetensors.safe_open(path / WEIGHTS, framework="pt"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"Run {path} says it is finished, but its {WEIGHTS} cannot be read ({error}). Restore the file, or delete "
            "the directory to train it again."
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a run directory. Raises UserError when it is missing, foreign, newer or damaged."""
    file = path / CONFIG
    if not file.is_file():
        there = "there is no such directory" if not path.is_dir() else f"it holds no {CONFIG}"
        raise UserError(f"{path} is not a run directory: {there}. Give the directory that `thresher train` made.")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}). Restore it or train the run again.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(
            f"{file} is not the config of a Thresher run: expected format {FORMAT!r}, got "
            f"{config.get('format') if isinstance(config, dict) else type(config).__name__!r}. A dictionary of another "
            "tool becomes a run by `thresher import`."
        )
    if config.get("version") != VERSION:
        raise UserError(
            f"{file} has format version {config.get('version')!r}; this Thresher reads version {VERSION}. Update "
            "Thresher, or train the run again."
        )
    return config


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write config.json atomically, readable by people."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **config}, indent=2, allow_nan=False)
    publish(path / CONFIG, [text.encode() + b"\n"])


def publish_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that appears whole or not at all, straight from the tensors' memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(contiguous, temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.rename(path)
        flush_directory(path.parent)
    except OSError as error:
        size = sum(tensor.nbytes for tensor in contiguous.values())
        raise explained(error, path, size) from error
    finally:
        temporary.unlink(missing_ok=True)


def deployed_tensors(coder: Coder) -> dict[str, Tensor]:
    """The tensors of weights.safetensors, by name; views of the module's own."""
    tensors: dict[str, Tensor] = {}
    for source in range(len(coder.inputs)):
        encoder = coder.encoder(source)
        tensors[f"W_enc.{source}"] = encoder.W_enc.data
        tensors[f"b_enc.{source}"] = encoder.b_enc.data
        tensors[f"tokens_since_fired.{source}"] = encoder.tokens_since_fired
        if isinstance(encoder.rule, Deployed):
            tensors[f"threshold.{source}"] = encoder.rule.threshold
        elif encoder.norms is not None:
            tensors[f"norm.{source}"] = encoder.norms
    tensors |= coder.decoder_tensors()
    for destination in range(len(coder.writes)):
        tensors[f"b_dec.{destination}"] = coder.b_dec.data[destination]
        tensors[f"mean.{destination}"] = coder.mean[destination]
    return tensors


def _fill(coder: Coder, stored: Mapping[str, Tensor], path: Path) -> None:
    if coder.spec.firing not in names() and "threshold.0" not in stored:
        raise UserError(
            f"Run {path} was trained under the firing rule {coder.spec.firing!r}, which is not known here and has no "
            "form as a constant threshold. Give the file that defines it with --plugin FILE.py."
        )
    expected = deployed_tensors(coder)
    wrong = sorted(expected.keys() ^ stored.keys())
    wrong += [
        f"{name} {tuple(stored[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & stored.keys())
        if stored[name].shape != expected[name].shape
    ]
    if wrong:
        raise UserError(
            f"{path / WEIGHTS} does not fit the dictionary in {CONFIG}; missing, unknown or misshapen: "
            f"{', '.join(wrong[:6])}. The two files are not of the same run: restore them or train it again."
        )
    for name, tensor in expected.items():
        tensor.copy_(stored[name])


def versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("thresher", "torch", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def git_commit() -> str | None:
    """Commit of the checkout that Thresher runs from; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
