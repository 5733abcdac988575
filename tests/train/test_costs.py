"""What training will take: counts are those of what is really built, written and kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.program import environment
from tests.train.conftest import FURTHER, RULES, plans_for
from tests.train.topologies import TOPOLOGIES
from thresher.cache.contracts import Site
from thresher.cache.hardware import gpu
from thresher.cache.reader import CacheReader
from thresher.commands.wiring import plans_of, read_recipe
from thresher.harvest.sites import TAPS
from thresher.recipes.checking import Shape
from thresher.recipes.checking import sites_of as sites_of_shape
from thresher.train.config import TrainConfig
from thresher.train.costs.layout import Layout, layouts, shares
from thresher.train.costs.memory import Assumed, Memory, memory
from thresher.train.costs.prospect import Job, counted, prospects, recommended, smallest
from thresher.train.costs.sizes import sizes_of
from thresher.train.costs.work import step, traffic
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.fit import Fit, sites_of
from thresher.train.plan import RunPlan, plan_runs
from thresher.train.state import save_checkpoint
from thresher.train.views import Views

ROOT = Path(__file__).parent.parent.parent

CASES: dict[str, dict[str, Any]] = {
    **{f"sae {rule}": {"kind": "sae", **settings} for rule, settings in RULES.items()},
    **{f"{kind} {rule}": {"kind": kind, **RULES[rule]} for kind, rule in (("transcoder", "topk"), ("clt", "jumprelu"))},
    **{f"{name}, again": dict(settings) for name, settings in FURTHER.items()},
    **{name: {"firing": "topk", "k": 3, **TOPOLOGIES[name]} for name in ("skip clt", "crosscoder", "molt")},
    "prefixes": {"kind": "sae", "firing": "batchtopk", "k": 3, "prefixes": (0.25, 1.0)},
}


def stepped(cache: CacheReader, plan: RunPlan) -> Fit:
    """A dictionary after its first step."""
    fit = Fit(plan, cache, torch.device("cpu"))
    fit.start(cache)
    acts = {site: cache.gather("train", site, torch.arange(256).numpy()).float() for site in sites_of([fit])}
    fit.step(fit.inputs(Views(acts)), 256)
    return fit


def total(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("case", "optimiser"), [(case, "adam") for case in CASES] + [("skip clt", o) for o in ("adamw", "signum", "muon")]
)
def test_what_is_counted_is_what_is_built_and_written(
    case: str, optimiser: str, cache: CacheReader, tmp_path: Path
) -> None:
    plan = plans_for(cache, "one", {"optimiser": optimiser}, **CASES[case])[0]
    found = sizes_of(plan.spec, plan.train)
    fit = stepped(cache, plan)
    coder, moments = fit.coder, fit.optimiser.moments()
    assert found.parameters == sum(p.numel() for p in coder.parameters())
    assert sum(found.weights) == total(coder.parameters())
    assert sum(found.moments) == total(moments.values())
    assert sum(found.buffers) == total(coder.state_dict().values()) - total(coder.parameters())
    save_checkpoint(tmp_path, fit.checkpoint())
    (file,) = (tmp_path / "checkpoints").glob("*.safetensors")
    assert found.checkpoint == file.stat().st_size


# --- layouts ----------------------------------------------------------------------------------------------------------


def recipe_plans(*assignments: str) -> tuple[RunPlan, ...]:
    """The plans of `gpt2-small` with one-layer transcoders and the CLT, nothing loaded."""
    recipe = read_recipe("gpt2-small", list(assignments))
    sites = sites_of_shape(Shape(12, 768), recipe.tables["harvest"].sites, None, tuple(TAPS))
    assert sites is not None
    return tuple(plans_of(recipe, sites))


def test_layouts_use_every_rank_and_divide_only_what_can_be_divided(cache: CacheReader) -> None:
    many = recipe_plans()
    for ranks in (1, 4, 8, 12):
        found = layouts(ranks, many)
        assert len(found) == len(set(found)) > 0
        assert all(way.ranks == ranks for way in found)
        assert all(way.latents in (1, 2, 3, 4, 6, 8, 12) for way in found), "divides 6144"
        assert all(4096 % way.data == 0 for way in found)
    one = plans_for(cache, "one", kind="clt", firing="topk", k=3)
    assert {way.groups for way in layouts(8, one)} == {1}, "a group without a dictionary would idle"
    molt = plans_for(cache, "one", **({"firing": "topk", "k": 3} | TOPOLOGIES["molt"]))
    assert {way.latents for way in layouts(4, molt)} == {1}, "its transforms are no rows"


def test_every_dictionary_is_in_one_share() -> None:
    many = recipe_plans()
    for groups in (1, 3, 8):
        found = shares(many, [100] * len(many), groups)
        assert sorted(plan.name for share in found for plan in share) == sorted(plan.name for plan in many)


# --- memory and time --------------------------------------------------------------------------------------------------

EXAMPLE: dict[str, Any] = {"kind": "clt", "n_latents": 24576, "k": 32, "firing": "topk", "aux": 0.0}
H200 = gpu("H200")


def example(**train: Any) -> RunPlan:
    """A CLT of twelve layers of 768, as the cost model is written for."""
    layers = tuple(range(12))
    sites = {f"L{i:02d}.{tap}": Site(f"L{i:02d}.{tap}", i, tap, 768) for i in layers for tap in ("mlp_in", "mlp_out")}
    config = TrainConfig(**({"batch_rows": 8192, "steps": 10} | train))
    return plan_runs("clt", DictionaryConfig(**EXAMPLE), config, sites, {})[0]


def test_a_clts_sizes_are_those_worked_out_by_hand() -> None:
    """M D (L + L(L + 1)/2) weights: 1.70 billion; with gradients and two moments 27 GB."""
    plan = example()
    found = sizes_of(plan.spec, plan.train)
    assert found.parameters == 24576 * 768 * (12 + 78) + 12 * (24576 + 768)
    assert 2 * sum(found.weights) + sum(found.moments) == pytest.approx(27.2e9, rel=0.01)
    half = found.weights.of(2)
    assert half == (sum(found.weights) + 12 * 768 * 4) / 2, "b_dec is on both"


def test_a_clts_times_and_traffic_are_those_worked_out_by_hand() -> None:
    """Encoders 4.7 ms at 790 TFLOP/s; reconstructions [12, 8192, 768], which a ring of 8 passes 1.75 times."""
    plan = example()
    sizes, whole, eight = sizes_of(plan.spec, plan.train), Layout(1, 1, 1), Layout(1, 1, 8)
    alone = step(plan, sizes, whole, H200, Assumed())
    assert alone.matmul == pytest.approx(4.7e-3, rel=0.01)
    assert alone.exchange == 0
    shared = step(plan, sizes, eight, H200, Assumed())
    assert shared.matmul == pytest.approx(alone.matmul / 8, rel=0.02)
    sent = traffic(plan, sizes, eight, Assumed())
    assert sent.reconstructions == int(1.75 * 4 * 12 * 8192 * 768)
    assert sent.candidates == 12 * 8192 * 32 * 4 * 7
    assert sent.gradients == 0
    both = traffic(plan, sizes, Layout(1, 4, 1), Assumed())
    assert both == (int(1.5 * sum(sizes.weights)), 0, 0)
    update = 34 * sizes.parameters / H200.bandwidth
    assert alone.memory > update, "gradients, moments and weights pass through memory"


def test_ranks_share_memory_as_they_share_work() -> None:
    plan = example()
    sizes = {plan.name: sizes_of(plan.spec, plan.train)}
    sites = {name: Site(name, 0, "mlp", 768) for name in (*plan.spec.reads, *plan.spec.writes)}

    def of(*layout: int) -> Memory:
        return memory([plan], sizes, sites, Layout(*layout), "cuda", assumed=Assumed())

    whole, data, latents = of(1, 1, 1), of(1, 4, 1), of(1, 1, 4)
    assert data.kept == whole.kept, "every rank has all weights"
    assert data.batch == data.reconstructions * whole.batch / whole.reconstructions == whole.batch / 4
    assert latents.kept == pytest.approx(whole.kept / 4, rel=1e-4)
    assert latents.batch == whole.batch, "every rank sees the same rows"
    assert latents.exchange > 0
    assert whole.total == max(whole.step, whole.ending) > whole.kept


def test_the_fastest_that_fits_is_chosen_and_the_simplest_of_equals() -> None:
    plan = example(steps=1000)
    sites = {name: Site(name, 0, "mlp", 768) for name in (*plan.spec.reads, *plan.spec.writes)}
    job = Job((plan,), (1000,), sites, "int8z", 10_000_000, counted([plan]))
    roomy = prospects(job, 8, H200, 50e9, Assumed())
    best = recommended(roomy)
    assert best is not None
    assert best.seconds <= 1.05 * min(each.seconds for each in roomy)
    tight = prospects(job, 2, H200._replace(memory=int(20e9)), 50e9, Assumed())
    assert [each.layout for each in tight if each.fits] == [Layout(1, 1, 2)]
    cramped = H200._replace(memory=int(8e9))
    assert recommended(prospects(job, 2, cramped, 50e9, Assumed())) is None
    wider = smallest(job, cramped, 50e9, Assumed())
    assert wider is not None
    assert wider.layout.latents > 2
    slow = prospects(job, 1, H200, 1e9, Assumed())[0]
    assert slow.bound == "reading"
    assert slow.seconds == pytest.approx(1000 * 8192 * 24 * 770 / 1e9)


@pytest.mark.parametrize("case", ["sae batchtopk", "transcoder topk", "clt jumprelu", "crosscoder", "joint, again"])
def test_what_a_training_keeps_is_what_is_said(case: str, cache: CacheReader) -> None:
    """Weights, gradients and moments, and the block that pre-activations are made in, to the byte."""
    plan = plans_for(cache, "one", **CASES[case])[0]
    fit = stepped(cache, plan)
    said = memory(
        [plan], {plan.name: sizes_of(plan.spec, plan.train)}, cache.sites, Layout(1, 1, 1), "cpu", assumed=Assumed()
    )
    sinks = fit.optimiser.parameters.sinks
    gathered = [(p, sink) for p in fit.coder.parameters() if (sink := sinks.find(p)) is not None]
    buffers = total(sink._buffer for _, sink in gathered)
    assert said.weights == total(fit.coder.parameters())
    assert said.gradients - buffers == said.weights - total(p for p, _ in gathered), "of biases autograd makes them"
    assert said.moments == total(fit.optimiser.moments().values())
    block = fit.coder.encoder(0).workspace._local.memory
    assert said.block in (block.nbytes, int(2.25 * block.nbytes)), "and a copy of it, partitioned"


@pytest.mark.long
def test_a_real_training_takes_the_memory_that_is_said() -> None:
    """A process of its own: a CLT whose AuxK has work, and one SAE, whose end takes more than its steps."""
    for case in ("CLT, AuxK on a tenth", "SAE TopK"):
        command = [
            sys.executable,
            "benchmarks/estimate.py",
            "--only",
            "memory",
            "--case",
            case,
            "--runs",
            "1",
            "--json",
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        (told,) = json.loads(done.stdout)
        assert told["said"] == pytest.approx(told["taken"], rel=0.2), case
