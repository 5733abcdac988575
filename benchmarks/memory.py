"""Whether a harvest takes the memory that it says it will.

A model in GPT-2 small's shape with few layers and random weights is harvested in a process of its own, on a CPU. What
the formula (`cache.plan.estimate_memory`, which harvest prints) says is set against the growth of the process's peak
resident memory over what it had with the model loaded.

    python benchmarks/memory.py                  # three codecs, about three minutes
    python benchmarks/memory.py --rows 600000 --codec bf16
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BAR = 0.10
CASES = (("int8z", 240_000), ("bf16", 240_000), ("bf16-lz4", 240_000))
CONTEXT = 256


def measure(codec: str, rows: int, layers: int, batch: int, folder: str) -> dict[str, float]:
    """Bytes said and bytes taken, in this process."""
    import numpy as np
    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM, GPT2Config

    from thresher.cache.layout import Contexts
    from thresher.harvest import fill
    from thresher.harvest.corpus import Corpus
    from thresher.harvest.run import HarvestConfig, harvest_corpus
    from thresher.harvest.target import TransformerTarget

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=layers, n_positions=CONTEXT)).eval()
    target = TransformerTarget(model, name="gpt2-shape")
    sites = target.sites(("mlp_in", "mlp_out", "resid_pre", "resid_post"))
    generator = np.random.default_rng(0)
    token_id = generator.integers(0, 50257, size=(rows // (CONTEXT - 1), CONTEXT), dtype=np.int32)
    keep = np.ones(token_id.shape, np.uint8)
    keep[:, 0] = 2
    document_id = np.repeat(np.arange(len(token_id), dtype=np.int32)[:, None], CONTEXT, axis=1)
    corpus = Corpus({"train": Contexts(token_id, document_id, keep)}, {})
    said: list[int] = []
    estimate = fill.memory_needed

    def noted(*arguments: object) -> int:
        said.append(estimate(*arguments))  # type: ignore[arg-type]
        return said[-1]

    fill.memory_needed = noted  # type: ignore[assignment]
    held = 9 * token_id.size  # the contexts are in memory already, and the formula counts them
    Path("/proc/self/clear_refs").write_text("5")  # peak := what is resident now
    before = _status("VmRSS")
    config = HarvestConfig(codec=codec, fvu_gate=1.0, batch_contexts=batch)  # type: ignore[arg-type]
    harvest_corpus(target, corpus, sites, config, {}, path=Path(folder) / "c", console=Console(quiet=True))
    return {"said": said[0], "taken": _status("VmHWM") - before + held}


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec")
    parser.add_argument("--rows", type=int, default=240_000)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=6, help="contexts of 256 tokens per pass")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options.codec, options.rows, options.layers, options.batch, options.inside)))
        return
    cases = [(options.codec, options.rows)] if options.codec else list(CASES)
    worst = 0.0
    for codec, rows in cases:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--inside", folder, "--codec", codec, "--rows", str(rows)]
            command += ["--layers", str(options.layers), "--batch", str(options.batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        got = json.loads(done.stdout.splitlines()[-1])
        off = got["said"] / got["taken"] - 1
        worst = max(worst, abs(off))
        said, taken = (f"{got[key] / 1e6:,.0f} MB" for key in ("said", "taken"))
        print(f"{codec:9} {rows:9,} rows: said {said}, taken {taken}, {off:+.1%}")
    print(f"worst {worst:.1%} (bar {BAR:.0%})")
    sys.exit(worst > BAR)


if __name__ == "__main__":
    main()
