"""What judging one more run costs, in plain forward passes of the same model.

The yardstick is `target.logits` of one batch with nothing patched. Against it stand, for random dictionaries of F = 8 d
latents of which 32 fire per token on all MLPs: a cascade pass (encode, decode, patch; codes before its first write are
those of the clean inputs, which every run encodes for its reconstruction metrics), the same pass scored against the
clean model, and everything a run needs for its first two protocols (clean-input encode, reconstruction and code
statistics, cascade and clean_input, both scored). Yardstick and candidate alternate; medians of the ratios of
neighbours are reported, with the spread, so that other load on the machine falls on both.

    python benchmarks/evaluate.py                                        # bundled model, CPU, about a minute
    python benchmarks/evaluate.py --model gpt2-small --device cuda       # random weights in GPT-2 small's shape
"""

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from thresher.cache.contracts import Dictionary, Site
from thresher.cache.devices import resolve_device
from thresher.cache.layout import Contexts
from thresher.cache.process import prepare_process
from thresher.evaluate import splice
from thresher.evaluate.arms import Plan
from thresher.evaluate.checks import Replacement
from thresher.evaluate.ledger import Ledger
from thresher.evaluate.masks import scored
from thresher.evaluate.passes import BatchRunner, Clean, rows_by_batch
from thresher.evaluate.tally import Tally
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target, resolve_dtype
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig, DictionarySpec
from thresher.train.dictionary.topologies import build
from thresher.train.plan import plan_runs

K, EXPANSION, BAR = 32, 8, 1.6
FAMILIES = {
    "transcoders": DictionaryConfig(kind="transcoder", firing="batchtopk", k=K, expansion=EXPANSION),
    "SAEs, TopK": DictionaryConfig(kind="sae", writes="mlp_out", firing="topk", k=K, expansion=EXPANSION),
    "CLT": DictionaryConfig(kind="clt", firing="batchtopk", k=K, expansion=EXPANSION),
}


def gpt2_small(device: str, dtype: str) -> TransformerTarget:
    """GPT-2 small's shape with random weights: speed does not depend on them."""
    from transformers import AutoModelForCausalLM, GPT2Config

    where = resolve_device(device, "--device")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(GPT2Config(), attn_implementation="sdpa")
    return TransformerTarget(model.to(where, resolve_dtype(dtype, where)).eval(), name="gpt2-small")


def bundled(device: str, dtype: str) -> TransformerTarget:
    """The bundled model."""
    return load_target(TargetConfig(device=device, dtype=dtype))  # type: ignore[arg-type]


MODELS = {"bundled": bundled, "gpt2-small": gpt2_small}


@torch.no_grad()
def random_dictionary(spec: DictionarySpec, acts: Mapping[str, Tensor], device: torch.device) -> Dictionary:
    """Deployed form with random weights, thresholds set so that K of its latents fire per token on `acts`."""
    generator = torch.Generator().manual_seed(0)
    out = build(spec, "-".join(spec.writes), deployed=True)
    for name, parameter in out.named_parameters():
        scale = 0.1 if "W_dec" in name else spec.d_in**-0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    out.to(device)
    for source, site in enumerate(spec.reads):
        encoder = out.encoder(source)
        a_NF = encoder.preactivations(acts[site], out.bias(source))
        if spec.firing == "batchtopk":
            encoder.rule.threshold.fill_(float(a_NF.flatten().kthvalue(a_NF.numel() - K * len(a_NF)).values))
    return out


def replacements(target: TransformerTarget, tokens_BT: Tensor) -> dict[str, Replacement]:
    """One replacement of all MLPs per family."""
    sites: dict[str, Site] = {site.name: site for site in target.sites(("mlp_in", "mlp_out"))}
    acts = {name: x.flatten(0, 1).float() for name, x in target.record(tokens_BT[:2], list(sites.values())).items()}
    out = {}
    for name, config in FAMILIES.items():
        plans = plan_runs(name, config, TrainConfig(), sites, {})
        dictionaries = tuple(random_dictionary(plan.spec, acts, target.device) for plan in plans)
        out[name] = Replacement(name, dictionaries, {})
    return out


def seconds(target: TransformerTarget, work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    if target.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratios(
    target: TransformerTarget, plain: Callable[[], object], work: Callable[[], object], pairs: int
) -> list[float]:
    """Cost of `work` in units of `plain`, both timed in turn; the first pair only warms up."""
    found = []
    for pair in range(pairs + 1):
        yard = seconds(target, plain)
        ratio = seconds(target, work) / yard
        if pair:
            found.append(ratio)
    return found


def main() -> None:
    if prepare_process():  # as the command line does, which has not loaded torch by then
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="bundled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--batch", type=int, default=8, help="contexts per pass")
    parser.add_argument("--length", type=int, help="tokens per context (default: the model's context, at most 512)")
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()

    target = MODELS[options.model](options.device, options.dtype)
    length = options.length or min(512, target.n_ctx)
    shape = (options.batch, length)
    token_id = np.random.default_rng(0).integers(0, target.n_vocab, size=shape).astype(np.int32)
    keep = np.ones(shape, np.uint8)
    keep[:, 0] = 2
    text = scored(Contexts(token_id, np.zeros(shape, np.int32), keep), 0)
    plan = Plan(("cascade", "clean_input"), (), options.batch, 1.0)
    batch = next(rows_by_batch(text, plan, target.device))

    table = Table(title=f"Evaluation, {options.model}, {target.device}, {target.dtype}, torch {torch.__version__}")
    for column in ("in plain forwards", "median", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "in plain forwards" else "right")
    with torch.inference_mode():
        for name, replacement in replacements(target, batch.token).items():
            tally, ledger = Tally(text, [replacement], target, plan, {}), Ledger(name)
            runner = BatchRunner(target, batch, tally, lambda: None)
            clean = runner.run_clean(
                (*splice.reads(replacement.dictionaries), *splice.writes(replacement.dictionaries)), None
            )

            def plain() -> None:
                target.logits(batch.token)

            _, known = runner.measure(ledger, replacement, clean)  # which every run needs, whatever its protocols

            def cascade(one: Replacement = replacement, known: splice.Settled = known) -> None:
                target.logits(batch.token, splice.cascade_edits(one.dictionaries, batch.patch, known=known))

            def judged(
                runner: BatchRunner = runner,
                ledger: Ledger = ledger,
                one: Replacement = replacement,
                known: splice.Settled = known,
            ) -> None:
                runner.cascade(ledger, one, known)

            def whole(
                runner: BatchRunner = runner,
                ledger: Ledger = ledger,
                one: Replacement = replacement,
                clean: Clean = clean,
            ) -> None:
                runner.run_replacement(ledger, one, clean)

            for what, work in (
                ("cascade", cascade),
                ("cascade, scored", judged),
                ("both protocols, all metrics", whole),
            ):
                found = ratios(target, plain, work, options.pairs)
                bar = f" (bar {BAR})" if what == "cascade, scored" else ""
                values = (f"{pick(found):.2f}" for pick in (statistics.median, min, max))
                table.add_row(f"{name}: {what}{bar}", *values)
            l0 = splice.encode_clean(replacement.dictionaries, clean.patched)[0][0].l0().float().mean()
            table.add_row(f"  mean L0 of the first source: {float(l0):.1f}", end_section=True)

    console = Console()
    console.print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if target.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    console.print(
        f"{options.batch} × {length} tokens, F = {EXPANSION} d, k = {K}, {options.pairs} pairs; "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, peak memory {peak:.1f} GB."
    )


if __name__ == "__main__":
    main()
