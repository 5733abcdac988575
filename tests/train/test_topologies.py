"""Skip connections, crosscoders and mixtures of linear transforms: against dense formulas, folded, saved, resumed."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.train import tiny
from tests.train.conftest import plans_for, stop_at
from tests.train.test_device import as_on_device
from tests.train.test_exact import assert_same_end
from tests.train.test_padded import ReadingBack
from tests.train.topologies import FIRING, TOPOLOGIES, leaves, objective
from thresher.cache.contracts import Dictionary, side_by_side
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.train.dictionary import topologies
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.fold import deploy
from thresher.train.dictionary.topologies import register
from thresher.train.dictionary.unfold import unfold
from thresher.train.endtoend.admission import check_group
from thresher.train.endtoend.contexts import Text
from thresher.train.endtoend.group import group
from thresher.train.files import load_run
from thresher.train.fit import Fit, sites_of
from thresher.train.kernels import firing as firing_kernels
from thresher.train.kernels import padded
from thresher.train.kernels.choice import Kernels
from thresher.train.losses import losses
from thresher.train.plan import RunPlan
from thresher.train.run import train
from thresher.train.views import Inputs, Views

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

ROWS = 96


def plans(cache: CacheReader, name: str, firing: str = "topk", **settings: Any) -> list[RunPlan]:
    train_settings = {"batch_rows": ROWS, "steps": 8, **settings.pop("train", {})}
    label = name.replace(" ", "-").replace(",", "")
    given = {"aux_k": 4, **TOPOLOGIES[name], **FIRING[firing], **settings}
    if "sparsity" not in given:  # nothing weighs with norms then, and the setting is refused
        given.pop("norm", None)
    return plans_for(cache, label, train_settings, **given)


def randomised(cache: CacheReader, plan: RunPlan) -> Fit:
    """In float64, with weights of no special form, as far as the decoder's constraint allows; a third of the latents
    is dead."""
    fit = Fit(plan, cache, torch.device("cpu"))
    fit.start(cache)
    coder, rng = fit.coder.double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            if "log_theta" not in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        for source in range(len(coder.inputs)):
            coder.constrain(source)
            coder.encoder(source).tokens_since_fired[::3] = plan.spec.dead_after
    return fit


def batch(cache: CacheReader, fit: Fit, step: int = 0) -> Inputs:
    rows = np.arange(step * ROWS, (step + 1) * ROWS)
    inputs = fit.inputs(Views({site: cache.gather("train", site, rows) for site in sites_of([fit])}))
    return Inputs([x.double() for x in inputs.xs], [y.double() for y in inputs.ys])


@pytest.mark.parametrize("kernels", ["plain", "fast"])
@pytest.mark.parametrize("firing", FIRING)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_loss_and_all_gradients_are_those_of_the_dense_formulas(
    cache: CacheReader, name: str, firing: str, kernels: Any
) -> None:
    fit = randomised(cache, plans(cache, name, firing)[0])
    coder, inputs, spec = fit.coder, batch(cache, fit), fit.plan.spec
    coder.use(Kernels(kernels))
    variances = [space.total_variance for space in fit.writes]
    found = losses(coder, coder(inputs.xs), inputs.xs, inputs.ys, variances, 1.0)
    found.total.backward()
    assert coder.sinks is not None
    coder.sinks.settle(whole=True)
    p = leaves(coder.state_dict())
    dead = [coder.encoder(source).dead(spec.dead_after) for source in range(len(coder.inputs))]
    settings = {**TOPOLOGIES[name], **FIRING[firing]}
    expected = objective(p, settings, inputs.xs, inputs.ys, variances, dead, spec.resolved_aux_k)
    expected.backward()
    torch.testing.assert_close(found.total.detach(), expected.detach())
    for key, parameter in coder.named_parameters():
        wanted = p[key].grad
        assert wanted is not None, key
        assert wanted.any(), key
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_steps_agree_whatever_the_kernels_and_the_parts(cache: CacheReader, name: str) -> None:
    ways: list[dict[str, Any]] = [{"kernels": "plain"}, {"kernels": "fast"}, {"micro_rows": 40}]
    ends = []
    for way in ways:
        fit = randomised(cache, plans(cache, name, "batchtopk", train=way)[0])
        for step in range(4):
            assert bool(fit.step(batch(cache, fit, step), ROWS).isfinite())
        ends.append(fit.coder.state_dict())
    for other in ends[1:]:
        for key, value in ends[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-7, atol=1e-9, msg=key)


SPACES = [(name, space) for name in TOPOLOGIES for space in ("none", "scale", "per_dim")]
SPACES += [(name, "per_token_in") for name in TOPOLOGIES if "crosscoder" not in name]  # which is refused it


@pytest.mark.parametrize(("name", "normalise"), SPACES)
def test_folded_equals_unfolded(cache: CacheReader, name: str, normalise: str) -> None:
    fit = randomised(cache, plans(cache, name, "jumprelu tanh", normalise=normalise)[0])
    rows = np.arange(ROWS)
    raw = {site: cache.gather("train", site, rows).double() for site in sites_of([fit])}
    space = batch(cache, fit)
    folded = deploy(fit.coder, fit.reads, fit.writes, dtype=torch.float64)
    codes = [folded.encode(s, side_by_side(raw, sites)) for s, sites in enumerate(folded.inputs)]
    done = fit.coder(space.xs)
    for j, site in enumerate(fit.writes):
        found = folded.decode(j, [codes[s] for s in folded.sources(j)])
        expected = done.y[:, j].detach() * site.scale + site.shift
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalise", ["scale", "per_dim"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_training_goes_on_from_the_folded_dictionary_where_it_was(
    cache: CacheReader, name: str, normalise: str
) -> None:
    """Unfolded into the space it came from, weights are those it had; into another, it is the same map."""
    fit = randomised(cache, plans(cache, name, "jumprelu tanh", normalise="per_dim")[0])
    folded = deploy(fit.coder, fit.reads, fit.writes, dtype=torch.float64)
    other = Fit(plans(cache, name, "jumprelu tanh", normalise=normalise, decoder="free")[0], cache, torch.device("cpu"))
    other.start(cache)
    unfold(folded, other.coder.double(), other.reads, other.writes)
    if normalise == "per_dim":
        for key, value in fit.coder.state_dict().items():
            if any(part in key for part in ("W_enc", "W_dec", "W_skip", "b_", "U.", "V.", "centre")):
                torch.testing.assert_close(other.coder.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)
    again = deploy(other.coder, other.reads, other.writes, dtype=torch.float64)
    rows = np.arange(ROWS)
    raw = {site: cache.gather("train", site, rows).double() for site in sites_of([fit])}
    for j in range(len(folded.writes)):
        found, expected = (
            coder.decode(j, [coder.encode(s, side_by_side(raw, coder.inputs[s])) for s in coder.sources(j)])
            for coder in (again, folded)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_runs_resume_load_and_hold_out_as_they_were_trained(
    cache: CacheReader, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 26, "checkpoint_every": 9, "decay": "linear", "lr": 1e-3}
    every = [p for name in TOPOLOGIES for p in plans(cache, name, "batchtopk", train=settings, dead_after=500)]
    whole = train(every, cache, out=tmp_path / "a", device="cpu", console=console)
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        with pytest.raises(Interrupted):
            train(every, cache, out=tmp_path / "b", device="cpu", console=console)
    train(every, cache, out=tmp_path / "b", device="cpu", console=console, resume=True)
    assert_same_end(every, tmp_path / "a", tmp_path / "b")
    rows = np.arange(cache.rows("validation"))
    for result in whole:
        dictionary: Dictionary = load_run(result.path).dictionary
        acts = {site: cache.gather("validation", site, rows) for site in (*dictionary.reads, *dictionary.writes)}
        codes = [dictionary.encode(s, side_by_side(acts, sites)) for s, sites in enumerate(dictionary.inputs)]
        for j, site in enumerate(dictionary.writes):
            y, guess = acts[site], dictionary.decode(j, [codes[s] for s in dictionary.sources(j)])
            fvu = float((y - guess).square().sum() / (y - dictionary.means[site]).square().sum())
            assert fvu == pytest.approx(result.metrics["held_out"]["fvu"][j], rel=0.05)
        assert len(result.metrics["held_out"]["l0"]) == len(dictionary.inputs)
    final = {result.name: result.metrics["final"] for result in whole}
    assert {"fvu.L00.mlp_out", "fvu.L01.mlp_out"} <= final["crosscoder"].keys()
    assert {"fvu.L00", "l0.L01"} <= final["skip-clt"].keys()


@pytest.mark.parametrize("name", ["skip transcoder", "crosscoder", "molt"])
def test_they_learn(cache: CacheReader, tmp_path: Path, console: Console, name: str) -> None:
    """Better than the mean and, with a skip connection or transforms, than what codes of rows alone would reach."""
    (plan,) = plans(cache, name, "batchtopk", train={"steps": 200, "batch_rows": 256}, normalise="per_dim", k=3)
    (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    assert max(result.metrics["held_out"]["fvu"]) < 0.65


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "signum", "muon"])
def test_unit_rows_per_target_stay_so_whatever_the_optimiser_and_the_kernels(
    cache: CacheReader, optimiser: str
) -> None:
    ends = []
    for kernels in ("plain", "fast"):
        train_settings = {"optimiser": optimiser, "kernels": kernels}
        fit = randomised(cache, plans(cache, "clt of unit targets", "topk", train=train_settings)[0])
        for step in range(3):
            fit.step(batch(cache, fit, step), ROWS)
        with fit.optimiser.averaged():
            for source, weight in enumerate(fit.coder.W_dec):
                norms = weight.norm(dim=2)
                torch.testing.assert_close(norms, torch.ones_like(norms))
                joint = torch.full((64,), (2 - source) ** 0.5, dtype=torch.float64)
                torch.testing.assert_close(fit.coder.decoder_norm(source), joint)
            ends.append({key: value.clone() for key, value in fit.coder.state_dict().items()})
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-7, atol=1e-9, msg=key)


def test_a_topology_of_ones_own_trains_and_loads(
    cache: CacheReader, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topologies, "_TOPOLOGIES", dict(topologies.known_topologies()))

    @register("halved")
    class Halved(Coder):
        """A transcoder that writes half of what its rows say."""

        def add(self, y_NSE: Tensor, source: int, part: Any, x_ND: Tensor) -> Tensor:
            return super().add(y_NSE, source, part._replace(z=part.z / 2), x_ND)

    with pytest.raises(UserError, match="already registered"):

        @register("halved")
        class Other(Coder):
            pass

    (plan, *_) = plans_for(cache, "h", {"steps": 5}, kind="halved", firing="topk", k=2, init_decoder="uniform")
    (result,) = train([plan], cache, out=tmp_path, device="cpu", console=console)
    assert isinstance(load_run(result.path).dictionary, Halved)


@pytest.mark.parametrize("firing", ["batchtopk", "jumprelu tanh"])
@pytest.mark.parametrize("name", ["skip clt", "crosscoder", "molt"])
def test_on_a_device_that_must_not_be_asked_gradients_are_the_plain_ones(
    cache: CacheReader, name: str, firing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU tensors told that they lie there; selections and dead latents come with padding."""
    found = []
    for way in ("plain", "auto"):
        fit = randomised(cache, plans(cache, name, firing)[0])
        inputs, coder = batch(cache, fit), fit.coder
        coder.use(Kernels(way))  # type: ignore[arg-type]
        if way == "auto":
            monkeypatch.setattr(padded, "must_not_ask", lambda tensor: True)
            monkeypatch.setattr(firing_kernels, "fixed_capacity", lambda a_NF, kernels: padded)
            as_on_device(coder)
        with ReadingBack() if way == "auto" else nullcontext():
            out = coder(inputs.xs)
            terms = losses(coder, out, inputs.xs, inputs.ys, [space.total_variance for space in fit.writes], 1.0)
            terms.total.backward()
        assert coder.sinks is not None
        coder.sinks.settle(whole=True)
        assert float(terms.aux) > 0
        found.append({key: parameter.grad for key, parameter in coder.named_parameters()})
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["skip clt", "skip transcoder", "molt"])
def test_source_by_source_is_the_pass_of_all(cache: CacheReader, name: str) -> None:
    """As end-to-end training under cascade goes, where a later source reads what an earlier one wrote."""
    fit = randomised(cache, plans(cache, name)[0])
    coder, inputs = fit.coder, batch(cache, fit)
    y_NSE = coder.begin(ROWS)
    for source, x_ND in enumerate(inputs.xs):
        fired = coder.fire(source, x_ND)
        y_NSE = coder.add(coder.skip(y_NSE, source, x_ND), source, fired, x_ND)
    torch.testing.assert_close(y_NSE, coder(inputs.xs).y)


@pytest.mark.parametrize("mode", ["cascade", "clean_input", "single_site"])
@pytest.mark.parametrize("name", ["skip clt", "molt", "crosscoder"])
def test_gradients_through_the_model_are_those_of_small_moves(name: str, mode: str) -> None:
    """The loss with a parameter moved along a random direction, against its gradient."""
    target = tiny.gpt2(torch.float64)
    settings = {**TOPOLOGIES[name], "layers": None, "writes": "mlp_out", "aux": 0.0, "firing": "relu", "sparsity": 1e-9}
    made = tiny.plans_for(target, "g", {"local_weight": 0.0, "mode": mode}, **settings)
    if name == "crosscoder" and mode == "cascade":
        with pytest.raises(UserError, match="cannot run along in a pass"):
            check_group(made)
        return
    fits, rng = [Fit(plan, tiny.Statistics(), torch.device("cpu")) for plan in made], torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for fit in fits for p in fit.coder.double().parameters()):
            parameter.copy_(tiny.randomised(parameter, rng, 0.3))
    text = Text(tiny.contexts(6), 3, torch.device("cpu"))
    found: list[dict[str, Tensor]] = []
    values: list[float] = []

    def conclude(self: Fit, got: Any, finite: Tensor, parts: Any, consumed: int, ratios: Any) -> Tensor:
        found.append({key: p.grad.clone() for key, p in self.coder.named_parameters() if p.grad is not None})
        values.append(float(ratios["kl"][0] / ratios["kl"][1]) if "kl" in ratios else float("nan"))
        self.forget_gradients()
        return torch.zeros(())

    together = group(fits, target, text, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "conclude", conclude)
        together.step()
        first, gradient = fits[0], found[0]
        for key in ("W_skip", "U.0", "V.0", "W_dec.0", "encoders.0.W_enc"):
            if key not in gradient:
                continue
            parameter = dict(first.coder.named_parameters())[key]
            move = torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * 1e-5
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter += sign * move
                values.clear()
                together.step()
                ends.append(values[0])
                with torch.no_grad():
                    parameter -= sign * move
            slope = float((gradient[key] * move).sum())
            slope /= len(first.coder.writes) if mode == "single_site" else 1  # what is told is the mean over sites
            assert (ends[0] - ends[1]) / 2 == pytest.approx(slope, rel=2e-4), key
