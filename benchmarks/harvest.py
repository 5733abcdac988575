"""How much of the bare forward pass's speed is left when its activations are harvested.

The yardstick is the body of the same Hugging Face model (no logits) on the same contexts in batches of the same shape,
under inference mode, nothing kept. Against it stands a whole harvest: recording all layers, encoding, measuring,
checksums, files with fsync, and the manifest. Both run alternately, each in a process of its own since a harvest sets
how its process takes memory, with a timing of the disk (bytes of the same cache, written and flushed at the rate that
it sustains). Each harvest is held against the lesser of the two; the median of the ratios is reported, with the spread.

    python benchmarks/harvest.py                                   # bundled model, CPU, about a minute
    python benchmarks/harvest.py --model gpt2-small                # random weights in GPT-2 small's shape
    python benchmarks/harvest.py --model llama-1b --device cuda    # and in that of a Llama with a billion parameters
"""

import argparse
import copy
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from thresher.cache.devices import resolve_device
from thresher.cache.estimate import disk_rates
from thresher.cache.layout import CODECS, Contexts
from thresher.cache.process import prepare_process
from thresher.harvest.checkpoint import locate
from thresher.harvest.corpus import Corpus, DataConfig, read_corpus
from thresher.harvest.fill import default_batch
from thresher.harvest.pretrained import fuse_gelu
from thresher.harvest.run import HarvestConfig, harvest_corpus
from thresher.harvest.target import (
    TargetConfig,
    TransformerTarget,
    load_target,
    load_tokenizer,
    resolve_dtype,
)

DISK_BYTES = 512 << 20
"""Written to time the disk."""


def bundled(device: str, dtype: str, tokens: int) -> tuple[TransformerTarget, Corpus, Any]:
    """The bundled model and text, and the same model as Hugging Face loads it."""
    from transformers import AutoModelForCausalLM

    target = TargetConfig(device=device, dtype=dtype)  # type: ignore[arg-type]
    model = load_target(target)
    bare = AutoModelForCausalLM.from_pretrained(
        locate(target.model, None), dtype=model.dtype, attn_implementation="sdpa"
    )
    data = DataConfig(test_fraction=0.0, max_tokens=tokens)
    corpus = read_corpus(data, load_tokenizer(target), model.n_ctx, model.n_vocab, Console(quiet=True))
    return model, corpus, bare.to(model.device).eval()


def gpt2_small(device: str, dtype: str, tokens: int) -> tuple[TransformerTarget, Corpus, Any]:
    """GPT-2 small's shape with random weights, on random tokens: speed does not depend on either."""
    from transformers import GPT2Config

    return _random("gpt2-small", GPT2Config(), device, dtype, tokens)


def _random(name: str, shape: Any, device: str, dtype: str, tokens: int) -> tuple[TransformerTarget, Corpus, Any]:
    """A model of a shape with random weights, random tokens in contexts of 1024, and the same model as loaded."""
    from transformers import AutoModelForCausalLM

    where = resolve_device(device, "--device")
    generator = np.random.default_rng(0)
    token_id = generator.integers(0, shape.vocab_size, size=(max(1, tokens // 1024), 1024), dtype=np.int32)
    keep = np.ones(token_id.shape, np.uint8)
    keep[:, 0] = 2
    document_id = np.broadcast_to(np.arange(len(token_id), dtype=np.int32)[:, None], token_id.shape).copy()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")
    model = model.to(where, resolve_dtype(dtype, where)).eval()
    target = TransformerTarget(fuse_gelu(copy.deepcopy(model)), name=name)
    return target, Corpus({"train": Contexts(token_id, document_id, keep)}, {}), model


def billion(device: str, dtype: str, tokens: int) -> tuple[TransformerTarget, Corpus, Any]:
    """A Llama of about a billion parameters (the shape of Llama 3.2 1B) with random weights, on random tokens."""
    from transformers import LlamaConfig

    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return _random("llama-1b", shape, device, dtype, tokens)


class Case(NamedTuple):
    """A model to harvest, and the share of the yardstick's rate that is wanted."""

    make: Callable[[str, str, int], tuple[TransformerTarget, Corpus, Any]]
    bar: float


MODELS = {"bundled": Case(bundled, 0.85), "gpt2-small": Case(gpt2_small, 0.93), "llama-1b": Case(billion, 0.93)}


def bare_seconds(body: Any, token_id: np.ndarray, batch: int) -> float:
    """One pass of a model's body over all contexts."""
    started = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(token_id), batch):
            tokens = torch.from_numpy(token_id[first : first + batch].astype(np.int64)).to(body.device)
            body(input_ids=tokens, use_cache=False)
    if body.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def serve_bare(options: argparse.Namespace, orders: Connection) -> None:
    """In a process of its own: the seconds of one pass over all contexts, in the batches asked for; 0 ends it."""
    _, corpus, hugging_face = MODELS[options.model].make(options.device, options.dtype, options.tokens)
    while batch := orders.recv():
        orders.send(bare_seconds(hugging_face.base_model, corpus.splits["train"].token_id, batch))


def harvest_rate(model: TransformerTarget, corpus: Corpus, config: HarvestConfig, folder: Path, name: str) -> float:
    """Tokens per second of one harvest into a fresh directory."""
    sites = model.sites(config.sites)
    quiet = Console(quiet=True)
    return harvest_corpus(model, corpus, sites, config, {"run": name}, path=folder / name, console=quiet).tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="bundled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--codec", choices=CODECS, default="int8z")
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--batch", type=int, help="contexts per pass (default: what harvest chooses)")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--folder", help="where caches are written and removed again (default: the temporary folder)")
    options = parser.parse_args()

    processes = multiprocessing.get_context("spawn")
    orders, theirs = processes.Pipe()
    processes.Process(target=serve_bare, args=(options, theirs), daemon=True).start()
    theirs.close()
    prepare_process()  # huge pages, as the command line has them; the bare body is as anybody would run it
    case = MODELS[options.model]
    model, corpus, _ = case.make(options.device, options.dtype, options.tokens)
    token_id = corpus.splits["train"].token_id
    sites = model.sites(("mlp_in", "mlp_out"))
    batch = options.batch or default_batch(model, sites, token_id.shape[1])
    config = HarvestConfig(codec=options.codec, batch_contexts=batch)
    bare, disk, rates = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for pair in range(options.pairs + 1):
            orders.send(batch)
            seconds = orders.recv()
            rate = harvest_rate(model, corpus, config, Path(folder), str(pair))
            written = sum(file.stat().st_size for file in (Path(folder) / str(pair)).rglob("*") if file.is_file())
            bytes_per_second = disk_rates(Path(folder), DISK_BYTES).write
            shutil.rmtree(Path(folder) / str(pair))
            if pair:  # the first pair warms up
                bare.append(token_id.size / seconds)
                disk.append(bytes_per_second * token_id.size / written)
                rates.append(rate)
    orders.send(0)
    ratios = [rate / min(yards) for rate, *yards in zip(rates, bare, disk, strict=True)]

    where = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    table = Table(title=f"Harvest, {options.model}, {where}, {model.dtype}, torch {torch.__version__}")
    for column in ("", "median", "lowest", "highest"):
        table.add_column(column, justify="right" if column else "left")
    for label, values, form in (
        ("bare body, tokens/s", bare, "{:,.0f}"),
        ("what the disk sustains, tokens/s", disk, "{:,.0f}"),
        ("harvest, tokens/s", rates, "{:,.0f}"),
        ("harvest / lesser of both", ratios, "{:.3f}"),
    ):
        table.add_row(label, *(form.format(pick(values)) for pick in (statistics.median, min, max)))
    console = Console()
    console.print(table)
    console.print(
        f"{token_id.size:,} tokens in batches of {batch} × {token_id.shape[1]}, {len(sites)} sites, {options.codec}, "
        f"{options.pairs} pairs; Python {platform.python_version()}."
    )
    met = statistics.median(ratios) >= case.bar
    console.print(f"Bar {case.bar}: {'met' if met else 'missed'} with a median of {statistics.median(ratios):.3f}.")


if __name__ == "__main__":
    main()
