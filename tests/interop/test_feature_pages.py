"""The pages that circuit-tracer's viewer fetches show the tokens that fire, read as the viewer reads them."""

import gzip
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from tests.documents import document
from tests.interop.conftest import LATENTS, LAYERS, TAPS, Made, finished
from tests.program import thresher
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.cache.reader import CacheReader
from thresher.cache.writer import CacheWriter
from thresher.commands.interop import export as command
from thresher.interop import circuit_tracer, feature_pages
from thresher.interop.canonical import Canonical
from thresher.interop.export import exported
from thresher.interop.formats import Exported
from thresher.train.files import load_run

CONTEXT, HELD_OUT = 40, 6


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """A cache whose token ids say where they stand: 1000 · context + position. The last context is padded."""
    path = tmp_path_factory.mktemp("pages") / "cache.zarr"
    rng = torch.Generator().manual_seed(4)
    sites = [Site(f"L{i:02d}.{tap}", i, tap, TAPS[tap]) for i in range(LAYERS) for tap in ("mlp_in", "mlp_out")]
    packed = {"train": contexts(8), "validation": contexts(HELD_OUT)}
    with CacheWriter.open(
        path, identity={"model": "toy"}, sites=sites, contexts=packed, codec="bf16", seed=0, fvu_gate=1.0
    ) as writer:
        for split, index in writer.pending():
            shard = writer.shard(split, index)
            shard.add({s.name: torch.randn(len(shard.contexts), CONTEXT, s.width, generator=rng) for s in sites})
            shard.commit()
        writer.finalize()
    return CacheReader.open(path)


def contexts(count: int) -> Contexts:
    keep = np.ones((count, CONTEXT), np.uint8)
    keep[:, 0] = 2
    keep[-1, CONTEXT - 10 :] = 0
    ids = (1000 * np.arange(count)[:, None] + np.arange(CONTEXT)).astype(np.int32)
    return Contexts(ids, np.where(keep > 0, np.arange(count)[:, None], -1).astype(np.int32), keep)


def fetched(folder: Path, layer: int, latent: int) -> dict[str, Any]:
    """A latent's page by its byte range."""
    index = json.loads(gzip.decompress((folder / "features" / "index.json.gz").read_bytes()))
    offsets = index[layer]["offsets"]
    assert len(offsets) == LATENTS + 1
    data = (folder / "features" / index[layer]["filename"]).read_bytes()
    assert offsets[-1] == len(data)
    some = data[offsets[latent] : offsets[latent + 1]]
    (length,) = struct.unpack("<I", some[:4])
    page: dict[str, Any] = json.loads(zlib.decompress(some[4 : 4 + length]))
    return page


def by_token(told: CacheReader, site: str) -> dict[int, Tensor]:
    """Held-out activations by token id."""
    ids = told.provenance("validation").token_id
    rows = told.gather("validation", site, np.arange(len(ids))).double()
    return dict(zip(ids.tolist(), rows, strict=True))


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_pages_show_the_tokens_that_fire(
    kind: str, made: Made, facts: Mapping[str, Any], told: CacheReader, tmp_path: Path
) -> None:
    dictionary = made("clt", "threshold")
    parts = [dictionary]
    if kind == "plt":
        one = made("transcoder", "threshold")
        parts = [
            one._replace(reads=(f"L0{i}.mlp_in",), writes=(f"L0{i}.mlp_out",), layers=(i,), sources=(source,))
            for i, source in enumerate(s._replace(W_dec=s.W_dec[:, :1]) for s in dictionary.sources)
        ]
    circuit_tracer.write(tmp_path, [Exported(each, facts) for each in parts])
    written = feature_pages.add_pages(tmp_path, told, lambda token: f"<{token}>")
    assert [file.name for file in written] == ["layer_0.bin", "layer_1.bin", "layer_2.bin", "index.json.gz"]
    for layer, latent in ((0, 0), (1, 17), (2, LATENTS - 1)):
        x, part = by_token(told, f"L0{layer}.mlp_in"), dictionary.sources[layer]
        assert part.threshold is not None
        pre = {token: float(row @ part.W_enc[latent] + part.b_enc[latent]) for token, row in x.items()}
        z = {token: value * (value > float(part.threshold[latent])) for token, value in pre.items()}
        page = fetched(tmp_path, layer, latent)
        firing = sorted((value for value in z.values() if value > 0), reverse=True)
        assert page["index"] == latent
        assert page["activation_frequency"] == pytest.approx(len(firing) / len(z))
        assert page["act_max"] == pytest.approx(firing[0], rel=1e-3)
        assert page["act_min"] == pytest.approx(firing[-1], rel=1e-3)
        assert sum(page["histogram"]) == len(firing)
        assert len(page["quantile_values"]) == 100
        top, *quarters = page["examples_quantiles"]
        peaks = [example["tokens_acts_list"][example["train_token_ind"]] for example in top["examples"]]
        assert peaks == pytest.approx(firing[:10], rel=1e-3)
        assert len(quarters) == 4
        for example in (each for group in page["examples_quantiles"] for each in group["examples"]):
            ids = [int(word[1:-1]) for word in example["tokens"]]
            assert ids == list(range(ids[0], ids[0] + len(ids))), "one context, in order"
            assert example["tokens_acts_list"] == pytest.approx([z.get(token, 0.0) for token in ids], rel=1e-3)
            assert max(ids) // 1000 < HELD_OUT - 1 or max(ids) % 1000 < CONTEXT - 10, "no padding"


def test_fewer_tokens_are_whole_contexts_and_silent_latents_have_pages_too(
    made: Made, facts: Mapping[str, Any], told: CacheReader, tmp_path: Path
) -> None:
    dictionary = made("clt", "threshold")
    first = dictionary.sources[0]
    silent = first._replace(threshold=torch.full((LATENTS,), 1e9, dtype=torch.float64))
    circuit_tracer.write(tmp_path, [Exported(dictionary._replace(sources=(silent, *dictionary.sources[1:])), facts)])
    feature_pages.add_pages(tmp_path, told, str, rows=100)
    page = fetched(tmp_path, 0, 3)
    assert (page["activation_frequency"], page["act_max"], page["quantile_values"]) == (0.0, 0.0, [])
    assert all(group["examples"] == [] for group in page["examples_quantiles"])
    ids = {
        int(word)
        for latent in range(LATENTS)
        for group in fetched(tmp_path, 1, latent)["examples_quantiles"]
        for example in group["examples"]
        for word in example["tokens"]
    }
    assert {token // 1000 for token in ids} == {0, 1}, "two contexts have 78 tokens, three 117"


def test_the_cache_has_to_be_the_targets(
    made: Made, facts: Mapping[str, Any], told: CacheReader, tmp_path: Path
) -> None:
    circuit_tracer.write(tmp_path, [Exported(made("clt", "threshold"), facts)])
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"feature_input_hook": "ln2.hook_normalized"}))
    with pytest.raises(UserError, match=r"blocks\.0\.ln2\.hook_normalized.*not in the cache"):
        feature_pages.add_pages(tmp_path, told, str)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"model_kind": "transcoder_set"}))
    with pytest.raises(UserError, match="neither layer_0"):
        feature_pages.add_pages(tmp_path, told, str)
    assert not (tmp_path / "features").exists()


def test_pages_that_were_stopped_leave_those_before_them_and_nothing_else(
    made: Made, facts: Mapping[str, Any], told: CacheReader, tmp_path: Path
) -> None:
    circuit_tracer.write(tmp_path, [Exported(made("clt", "threshold"), facts)])
    counts: list[tuple[int, int]] = []
    before = {file.name: file.read_bytes() for file in feature_pages.add_pages(tmp_path, told, str)}
    files = {file.name for file in tmp_path.iterdir()}

    def stop(done: int, of: int) -> None:
        counts.append((done, of))
        if done > LATENTS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        feature_pages.add_pages(tmp_path, told, lambda token: "other", advance=stop)
    assert counts == [(done + 1, 3 * LATENTS) for done in range(LATENTS + 1)]
    assert {file.name for file in tmp_path.iterdir()} == files
    assert {file.name: file.read_bytes() for file in (tmp_path / "features").iterdir()} == before


def run_of(place: Path, dictionary: Canonical, told: CacheReader, facts: Mapping[str, Any], **cache: Any) -> Path:
    """A run directory of the cache `told`, `cache` said otherwise."""
    run = finished(place, dictionary, facts)
    config = json.loads((run / "config.json").read_text())
    config["recipe"] = {"target": {"model": "bundled:books-128"}}
    config["cache"] |= {"path": str(told.path), "fingerprint": told.fingerprint, **cache}
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_the_command_shows_runs_on_their_own_cache_in_their_targets_words(
    made: Made, facts: Mapping[str, Any], told: CacheReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    monkeypatch.setattr("thresher.harvest.target.load_tokenizer", lambda config: tokenizer)
    run = run_of(tmp_path / "run", made("clt", "threshold"), told, facts)
    words = ("export", str(run), "--to", "circuit-tracer", "--out", "out", "--pages", "--json")
    done = thresher(tmp_path, *words, sets=())
    assert done.returncode == 0, done.stderr
    answer = document("export", done.stdout)
    assert (answer["pages"], answer["left_out"]) == (["out/features"], [])
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    circuit_tracer.write(by_hand, [exported(run, load_run(run))])
    feature_pages.add_pages(by_hand, told, lambda token: f"<{token}>")
    names = sorted(file.name for file in (by_hand / "features").iterdir())
    assert sorted(file.name for file in (tmp_path / "out" / "features").iterdir()) == names
    for latent in (0, 17):
        assert fetched(tmp_path / "out", 1, latent) == fetched(by_hand, 1, latent)


def test_what_pages_cannot_be_made_of_is_said_before_anything_is_exported(
    made: Made, facts: Mapping[str, Any], told: CacheReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictionary, out = made("clt", "threshold"), tmp_path / "out"
    run = run_of(tmp_path / "run", dictionary, told, facts)
    with pytest.raises(UserError, match="no effect with --to saelens"):
        command([run], "saelens", out, pages=True)
    gone = run_of(tmp_path / "gone", dictionary, told, facts, path=str(tmp_path / "none.zarr"))
    with pytest.raises(UserError, match=r"--pages needs the cache .*none\.zarr does not exist"):
        command([gone], "circuit-tracer", out, pages=True)
    with pytest.raises(UserError, match=r"--hook ln2\.hook_normalized is blocks\.0\.ln2\.hook_normalized"):
        command([run], "circuit-tracer", out, pages=True, hook="ln2.hook_normalized")
    monkeypatch.setattr("thresher.harvest.target.load_tokenizer", lambda config: None)
    with pytest.raises(UserError, match="bundled:books-128 has no tokenizer files"):
        command([run], "circuit-tracer", out, pages=True)
    assert not out.exists()
