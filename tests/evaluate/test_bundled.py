"""Evaluation of real dictionaries in the bundled language model, on its held-out text."""

import pytest
import torch
from rich.console import Console

from thresher.evaluate.report import print_table, write_report
from thresher.evaluate.run import EvaluateConfig, Replacement, evaluate
from thresher.evaluate.splice import PROTOCOLS
from thresher.harvest.corpus import DataConfig, read_corpus
from thresher.harvest.target import TargetConfig, load_target, load_tokenizer
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.dictionary.topologies import build
from thresher.train.plan import plan_runs

OUTS = [f"L{i:02d}.mlp_out" for i in range(4)]


@pytest.fixture(scope="module")
def bundled():
    config = TargetConfig(device="cpu", dtype="float32")
    target = load_target(config)
    data = DataConfig(max_tokens=12_000, test_fraction=0.3)
    corpus = read_corpus(data, load_tokenizer(config), target.n_ctx, target.n_vocab, Console(quiet=True))
    return target, corpus.splits["test"]


@torch.no_grad()
def trained_by_chance(target, kind):
    """Dictionaries of the train room with random weights: the real `encode` and `decode`."""
    config = DictionaryConfig(kind=kind, writes="mlp_out", firing="topk", k=8, n_latents=64)
    sites = {site.name: site for site in target.sites(("mlp_in", "mlp_out"))}
    generator = torch.Generator().manual_seed(0)
    out = []
    for plan in plan_runs(kind, config, TrainConfig(), sites, {}):
        coder = build(plan.spec, plan.name, deployed=True)
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        out.append(coder.requires_grad_(False))
    return Replacement(kind, tuple(out), {"kind": kind, "firing": "topk"})


@pytest.mark.usefixtures("no_pictures")
def test_bundled_model_loses_nothing_to_identity_and_what_its_readme_says_to_zeros(kit, bundled, tmp_path):
    """The README's losses (clean 4.2, all MLPs zeroed 9.2, one at a time 5.7 on average) on other rows of that text."""
    target, contexts = bundled
    means = {site: torch.zeros(128) for site in OUTS}
    identity = Replacement(
        "identity", tuple(kit.Identity([s], [s], d=128, means={s: means[s]}) for s in OUTS), {"kind": "sae"}
    )
    sets = [identity, *(trained_by_chance(target, kind) for kind in ("sae", "transcoder", "clt"))]
    config = EvaluateConfig(tokens=1500, resamples=100, batch_contexts=4)
    results = evaluate(sets, target, contexts, config, console=Console(quiet=True), provenance={})
    for protocol in PROTOCOLS:
        found = results.find("identity", protocol).metrics
        assert max(abs(found["delta"]), abs(found["kl"]), found["fvu"]) <= 1e-6
        assert found["agree"] == 1
        for kind in ("sae", "transcoder", "clt"):
            assert results.find(kind, protocol).metrics["delta"] > 0.05
    assert results.find("clean", "cascade").metrics["ce"] == pytest.approx(4.2, abs=0.4)
    assert results.find("zero", "cascade").metrics["ce"] == pytest.approx(9.2, abs=0.6)
    assert results.find("zero", "single_site").metrics["ce"] == pytest.approx(5.7, abs=0.6)
    assert results.find("sae", "cascade").cost["l0"] == pytest.approx(8, abs=0.5)
    assert all(check["passed"] for check in results.checks)
    write_report(results, tmp_path)
    print_table(results, Console(quiet=True))
