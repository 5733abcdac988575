"""Pages that show what makes circuit-tracer's latents fire: contexts of the cache with the activations on them.

    features/index.json.gz   gzip of a list by layer of {filename, offsets}
    features/layer_{i}.bin   bytes offsets[f] to offsets[f + 1] belong to latent f: a length in 4 bytes, the lowest
                             first, and so many bytes of JSON under zlib

The tool's graph viewer fetches them by byte ranges from the hub repository that a graph's `scan` names, so they are of
use once the directory is pushed. Shown are the strongest tokens of whole held-out contexts, then some of each quarter
of the active ones. Left out: the logits that a latent promotes, which need the model; the viewer then shows none.
"""

import gzip
import itertools
import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.interop import circuit_tracer
from thresher.interop.canonical import Canonical, codes
from thresher.interop.hooks import site_of
from thresher.interop.readings import held_out_split

FOLDER, INDEX = "features", "index.json.gz"
ROWS = 1 << 16
"""Tokens looked at, where nobody says how many."""
TOP, INTERVALS, EACH = 10, 4, 5
"""Strongest examples; parts of equal size of the active tokens; examples of each."""
BEFORE, AFTER = 24, 8
"""Tokens shown to either side of the one that fires."""
BINS = 50
_PIECE = 128  # latents encoded together


class Text(NamedTuple):
    """Whole contexts and the rows that hold their activations."""

    rows: np.ndarray
    """[n] row numbers in the split, by context and position."""
    context: np.ndarray
    """[n], into `words` and `place`."""
    position: np.ndarray
    """[n]."""
    place: np.ndarray
    """[C, T] where a position stands among the n; -1 where nothing is stored (padding, special tokens)."""
    words: list[list[str]]
    """By context, without its padding."""


def add_pages(
    folder: Path,
    source: CacheReader,
    word: Callable[[int], str],
    rows: int = ROWS,
    advance: Callable[[int, int], object] = lambda done, of: None,
) -> list[Path]:
    """Write the pages of a directory of circuit-tracer, from about `rows` held-out tokens of its target's cache.

    They are there when all are written, and not before. `word`: the text of a token id; `advance` is told how many
    latents are done, and of how many. Raises UserError for a directory that is none, for sites and widths that the
    cache does not have, and for dictionaries that count their latents, whose codes no single latent knows.
    """
    found = [foreign.readings[0].dictionary for foreign in circuit_tracer.read(folder)]
    layers = [(each, s) for each in found for s in range(len(each.sources))]
    sites = [site_of(each.reads[s], source.sites.values(), "the hook read") for each, s in layers]
    for (each, _), site in zip(layers, sites, strict=True):
        if each.firing == "topk":
            raise UserError(f"{folder} holds TopK transcoders; expected thresholds. Export them with --thresholds.")
        if site.width != each.d_in:
            raise UserError(
                f"{folder} reads width {each.d_in}, but {site.name} has {site.width}: another model's cache."
            )
    split = held_out_split(source)
    text = text_of(source, split, word, rows)
    whole, done = sum(each.n_latents for each, _ in layers), itertools.count(1)
    index: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}.", dir=folder) as made:
        for layer, ((each, s), site) in enumerate(zip(layers, sites, strict=True)):
            x_nD = source.gather(split, site.name, text.rows)
            file = Path(made) / f"layer_{layer}.bin"
            offsets = _layer(file, each, s, x_nD, text, lambda: advance(next(done), whole))
            index.append({"filename": file.name, "offsets": offsets})
        (Path(made) / INDEX).write_bytes(gzip.compress(json.dumps(index).encode()))
        out = folder / FOLDER
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for entry in sorted(Path(made).iterdir(), key=lambda file: file.name == INDEX):
            entry.rename(out / entry.name)  # the index last: without it the viewer finds nothing
    return [out / entry["filename"] for entry in index] + [out / INDEX]


def text_of(source: CacheReader, split: str, word: Callable[[int], str], rows: int) -> Text:
    """The first contexts of a split that have up to `rows` stored tokens, one at least."""
    origin, packed = source.provenance(split), source.contexts(split)
    sizes = np.bincount(origin.context, minlength=len(packed.token_id))
    count = max(1, int(np.searchsorted(sizes.cumsum(), rows, side="right")))
    chosen = np.flatnonzero(origin.context < count)
    chosen = chosen[np.lexsort((origin.position[chosen], origin.context[chosen]))]
    context, position = origin.context[chosen], origin.position[chosen]
    place = np.full((count, packed.token_id.shape[1]), -1, np.int64)
    place[context, position] = np.arange(len(chosen))
    known: dict[int, str] = {}
    words = []
    for ids, keep in zip(packed.token_id[:count].tolist(), packed.keep[:count], strict=True):
        length = int(np.flatnonzero(keep).max(initial=-1)) + 1
        for token in ids[:length]:
            if token not in known:
                known[token] = word(token)
        words.append([known[token] for token in ids[:length]])
    return Text(chosen, context, position, place, words)


def _layer(
    file: Path, dictionary: Canonical, source: int, x_nD: Tensor, text: Text, advance: Callable[[], object]
) -> list[int]:
    """Write one layer's latents; where each begins, and where the last ends. `advance`: called after each."""
    offsets = [0]
    with file.open("wb") as handle:
        for latent, z_n in _by_latent(dictionary, source, x_nD):
            packed = zlib.compress(json.dumps(page(z_n, latent, file.stem, text), ensure_ascii=False).encode())
            offsets.append(offsets[-1] + handle.write(struct.pack("<I", len(packed)) + packed))
            advance()
    return offsets


def _by_latent(dictionary: Canonical, source: int, x_nD: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Codes [n] float32 of each latent."""
    part = dictionary.sources[source]
    for first in range(0, dictionary.n_latents, _PIECE):
        some = slice(first, first + _PIECE)
        theta = None if part.threshold is None else part.threshold[some]
        piece = part._replace(W_enc=part.W_enc[some], b_enc=part.b_enc[some], threshold=theta)
        z_fn = codes(dictionary._replace(sources=(piece,)), 0, x_nD).T.to(torch.float32).contiguous().numpy()
        yield from enumerate(z_fn, first)


def page(z_n: np.ndarray, latent: int, layer: str, text: Text) -> dict[str, Any]:
    """What the viewer shows of a latent with codes [n]."""
    active = np.flatnonzero(z_n > 0)
    order = active[np.argsort(-z_n[active], kind="stable")]
    groups = [("Top activations", order[:TOP])]
    for number, part in enumerate(np.array_split(order, INTERVALS)):
        picked = np.unique(np.linspace(0, max(0, len(part) - 1), EACH).astype(int))
        groups.append((f"Quarter {number + 1} of the active tokens", part[picked] if len(part) else part))
    values = z_n[active]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    return {
        "transcoder_id": layer,
        "index": latent,
        "examples_quantiles": [
            {"quantile_name": name, "examples": _examples(z_n, rows.tolist(), text)} for name, rows in groups
        ],
        "top_logits": [],
        "bottom_logits": [],
        "act_min": _short(low),
        "act_max": _short(high),
        "quantile_values": [_short(v) for v in np.quantile(values, np.arange(1, 101) / 100)] if len(values) else [],
        "histogram": np.histogram(values, bins=BINS, range=(low, high))[0].astype(float).tolist(),
        "activation_frequency": len(active) / max(1, len(z_n)),
    }


def _examples(z_n: np.ndarray, rows: Sequence[int], text: Text) -> list[dict[str, Any]]:
    """The surroundings of some tokens; a repeated one is marked, which the viewer pales."""
    seen: set[tuple[str, ...]] = set()
    out = []
    for row in rows:
        context, position = int(text.context[row]), int(text.position[row])
        words = text.words[context]
        first, last = max(0, position - BEFORE), min(len(words), position + AFTER + 1)
        places = text.place[context, first:last]
        shown = tuple(words[first:last])
        out.append(
            {
                "tokens": list(shown),
                "tokens_acts_list": [_short(v) for v in np.where(places >= 0, z_n[places], 0.0)],
                "train_token_ind": position - first,
                "is_repeated_datapoint": shown in seen,
            }
        )
        seen.add(shown)
    return out


def _short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
