"""delphi's cache of latents: `HOOKPOINT/START_END.safetensors` and `HOOKPOINT/config.json`. Written only.

It holds no dictionary but what one does on a text: per range of latents `locations` [n, 3] = (context, position,
latent − START), `activations` [n] fp16, and all `tokens` [contexts, length] int64. So it is made by a pass of the
target over contexts. Entries go to a file per range as they come, and become the range's tensors at the end, when the
largest value and the empty ranges are known: memory holds one range.

What delphi takes for granted: a length that is a multiple of 32 (what is beyond is left out); at least one entry per
file (an empty range joins its neighbour); values within fp16 (larger ones are divided by a power of two, which
config.json names); nothing beside the hookpoints' directories. Positions that no dictionary is trained on (padding,
BOS, separators) have tokens and no entries. With no tokenizer given, delphi asks the hub for that of `model_name`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.numpy
import torch

from thresher.cache.contracts import Codes, Dictionary, side_by_side
from thresher.cache.errors import UserError
from thresher.cache.layout import KEPT, Contexts
from thresher.interop.formats import Coded, Format, Text
from thresher.interop.hooks import hook_name, port_of

EXAMPLE = 32
"""Tokens of an example of delphi's."""
SPLITS = 5
LEAST = 1e-5
"""Smaller activations are left out, as delphi does."""
CONFIG = "config.json"
_FP16_MAX = float(np.finfo(np.float16).max)
_ENTRY = np.dtype([("context", "<u4"), ("position", "<u4"), ("latent", "<u4"), ("value", "<f4")])


class Hookpoint(NamedTuple):
    """One source of a dictionary, under the name that delphi knows it by."""

    name: str
    """Directory: the module that it belongs to (`layers.5.mlp`), or its hook name."""
    dictionary: Dictionary
    source: int
    facts: Mapping[str, Any]


def write_latents(folder: Path, runs: Sequence[Coded], text: Text, splits: int = SPLITS) -> None:
    """Write what `runs` do on a text into an empty directory.

    Raises UserError for contexts shorter than 32 tokens, for two dictionaries of one module, and where nothing fires.
    """
    points = hookpoints(runs)
    contexts = _whole_examples(text.contexts)
    spools = [_Spool(folder / point.name, point.dictionary.n_latents, splits) for point in points]
    try:
        for first, places_N, found in _passes(points, contexts, text):
            for spool, codes in zip(spools, found, strict=True):
                spool.add(codes, first + places_N // contexts.token_id.shape[1], places_N % contexts.token_id.shape[1])
    finally:
        for spool in spools:
            spool.close()
    tokens = contexts.token_id.astype(np.int64)
    for point, spool in zip(points, spools, strict=True):
        files = spool.finish(tokens, point.name)
        config = _config(point.facts, tokens.shape, text, len(files), spool.divisor)
        (folder / point.name / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def hookpoints(runs: Sequence[Coded]) -> list[Hookpoint]:
    """All sources of all dictionaries. Raises UserError where two have one name."""
    points = [
        Hookpoint(_name(run.dictionary, source), run.dictionary, source, run.facts)
        for run in runs
        for source in range(len(run.dictionary.inputs))
    ]
    names = [point.name for point in points]
    twice = [point for point in points if names.count(point.name) > 1]
    if twice:
        who = ", ".join(dict.fromkeys(point.dictionary.name for point in twice))
        raise UserError(f"{who} all belong to {twice[0].name}, and a cache has one of each. Export them one by one.")
    return points


def _name(dictionary: Dictionary, source: int) -> str:
    """An SAE is called by the module whose output it reads, anything else by the one whose input it reads."""
    sites = dictionary.inputs[source]
    if len(sites) > 1:
        return dictionary.name
    port = port_of(sites[0])
    side = "output" if sites[0] in dictionary.writes else "input"
    return port.module if port is not None and port.side == side else hook_name(sites[0])


def _whole_examples(contexts: Contexts) -> Contexts:
    length = contexts.token_id.shape[1] // EXAMPLE * EXAMPLE
    if length == 0 or len(contexts.token_id) == 0:
        raise UserError(
            f"The text has {len(contexts.token_id)} contexts of {contexts.token_id.shape[1]} tokens; delphi shows "
            f"examples of {EXAMPLE}. Give text with contexts of {EXAMPLE} tokens or more (data.context)."
        )
    return Contexts(*(array[:, :length] for array in contexts))


@torch.no_grad()
def _passes(
    points: Sequence[Hookpoint], contexts: Contexts, text: Text
) -> Iterator[tuple[int, np.ndarray, list[Codes]]]:
    """Per batch: its first context, places [N] of the encoded positions in the flattened batch, codes by hookpoint."""
    names = dict.fromkeys(site for point in points for site in point.dictionary.inputs[point.source])
    sites = text.target.sites(list(names))
    for first in range(0, len(contexts.token_id), text.batch_contexts):
        some = slice(first, first + text.batch_contexts)
        token_BT = torch.from_numpy(contexts.token_id[some].astype(np.int64)).to(text.target.device)
        places_N = np.flatnonzero(contexts.keep[some] == KEPT)
        index_N = torch.from_numpy(places_N).to(text.target.device)
        recorded = text.target.record(token_BT, sites)
        rows = {site: x_BTD.flatten(0, 1).index_select(0, index_N).float() for site, x_BTD in recorded.items()}
        yield (
            first,
            places_N,
            [
                point.dictionary.encode(point.source, side_by_side(rows, point.dictionary.inputs[point.source]))
                for point in points
            ],
        )
        text.advance(len(token_BT))


class _Spool:
    """Entries of one hookpoint on their way, in a file per range of latents."""

    def __init__(self, folder: Path, n_latents: int, splits: int) -> None:
        folder.mkdir()
        self.folder = folder
        edges = np.unique(np.linspace(0, n_latents, splits + 1).astype(np.int64))
        self.starts, self.stops = edges[:-1], edges[1:]
        self.files: list[BinaryIO] = [self._path(index).open("wb") for index in range(len(self.starts))]
        self.counts = np.zeros(len(self.starts), dtype=np.int64)
        self.largest = 0.0

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.entries"

    @property
    def divisor(self) -> float:
        """A power of two by which activations are divided, so that fp16 can hold the largest; 1 where it can."""
        return 2.0 ** max(0, int(np.ceil(np.log2(self.largest / _FP16_MAX)))) if self.largest > _FP16_MAX else 1.0

    def add(self, codes: Codes, contexts_N: np.ndarray, positions_N: np.ndarray) -> None:
        """Take the codes of N positions, in their order and by latent."""
        rows, latents = codes.rows().cpu().numpy(), codes.latents.cpu().numpy()
        values = codes.values.float().cpu().numpy()
        order = np.lexsort((latents, rows))
        order = order[np.abs(values[order]) > LEAST]
        entries = np.empty(len(order), _ENTRY)
        rows, entries["latent"], entries["value"] = rows[order], latents[order], values[order]
        entries["context"], entries["position"] = contexts_N[rows], positions_N[rows]
        self.largest = max(self.largest, float(np.abs(entries["value"]).max(initial=0.0)))
        split = np.searchsorted(self.starts, entries["latent"], side="right") - 1
        for index, file in enumerate(self.files):
            mine = entries[split == index]
            self.counts[index] += len(mine)
            file.write(mine.tobytes())

    def close(self) -> None:
        """Write out what is buffered."""
        for file in self.files:
            file.close()

    def finish(self, tokens: np.ndarray, name: str) -> list[Path]:
        """Make safetensors of the entries, which are removed. Raises UserError where there are none."""
        full = np.flatnonzero(self.counts)
        if len(full) == 0:
            raise UserError(f"At {name} no latent fires anywhere on this text, and delphi reads no empty cache.")
        # every range reaches to the next that holds something, the first from 0 and the last to the end
        starts = [0, *self.starts[full[1:]].tolist()]
        stops = [*starts[1:], int(self.stops[-1])]
        written = []
        for index, start, stop in zip(full.tolist(), starts, stops, strict=True):
            entries = np.fromfile(self._path(index), _ENTRY)
            latents = entries["latent"] - np.uint32(start)
            small = int(max(latents.max(), entries["context"].max())) < 1 << 16
            locations = np.stack([entries["context"], entries["position"], latents], 1)
            file = self.folder / f"{start}_{stop - 1}.safetensors"
            arrays = {
                "locations": locations.astype(np.uint16 if small else np.uint32),
                "activations": (entries["value"] / np.float32(self.divisor)).astype(np.float16),
                "tokens": tokens,
            }
            safetensors.numpy.save_file(arrays, file)
            written.append(file)
        for index in range(len(self.files)):
            self._path(index).unlink()
        return written


def _config(facts: Mapping[str, Any], shape: tuple[int, ...], text: Text, files: int, divisor: float) -> dict[str, Any]:
    """What delphi's own run would have been configured with; our provenance and the divisor under `thresher`."""
    data = facts["data"]
    return {
        "dataset_repo": data["source"],
        "dataset_split": data["split"],
        "dataset_name": data["subset"] or "",
        "dataset_column": data["column"] or "text",
        "batch_size": text.batch_contexts,
        "cache_ctx_len": shape[1],
        "n_tokens": shape[0] * shape[1],
        "n_splits": files,
        "model_name": facts["target"]["model"],
        "thresher": {**facts, "contexts": text.source, "activations_divided_by": divisor},
    }


FORMAT = Format("delphi-cache", "delphi: activations of latents on a text", whole=True, write_codes=write_latents)
