"""Steps of training under every objective: in parts as in one piece, fast as plain, interrupted as not.

And what changes between steps: the annealed power, and latents that are resampled.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from tests.train.conftest import ROWS, inputs, plans_for, stop_at
from tests.train.test_exact import assert_same_end
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.train.anneal import WINDOW, Anneal
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.fit import Fit
from thresher.train.resample import resample
from thresher.train.run import train
from thresher.train.views import Inputs

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

TOPK: dict[str, Any] = {"firing": "topk", "k": 3}
RELU: dict[str, Any] = {"firing": "relu", "sparsity": 3e-2}
ALL = "all layers' auxk"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mse": TOPK | {"loss": "mse", "aux_divisor": "none"},
    "sum": {"firing": "batchtopk", "k": 2.5, "loss": "sum", "aux_divisor": "target", "aux_scale": False},
    ALL: TOPK | {"aux_scope": "all"},
    "multi": TOPK | {"multi_topk": 0.125},
    "prefixes": {"firing": "batchtopk", "k": 2.5, "prefixes": (9, 30, 64)},
    "dense prefixes": RELU | {"prefixes": (0.25, 1.0), "prefix_weights": (0.5, 1.0), "penalty_norm": "l1"},
    "below zero": {"firing": "jumprelu", "sparsity": 3e-2, "preact": 1e-2, "preact_on": "all", "preact_form": "zero"},
    "lp": RELU | {"penalty": "lp", "p_start": 2, "p_updates": 4},
    "resampled": RELU | {"resample": 2, "penalty_warmup": "run"},
}


def fit(cache: CacheReader, kind: str, objective: dict[str, Any], seed: int = 0, **train_settings: Any) -> Fit:
    """Fresh weights in float64, every fifth latent dead and unlikely to fire."""
    made_of = {"steps": 8, "batch_rows": ROWS, "seed": seed} | train_settings
    (plan, *_) = plans_for(cache, "o", made_of, kind=kind, pre_bias=kind == "sae", **objective)
    made = Fit(plan, cache, torch.device("cpu"))
    made.start(cache)
    made.coder.double()
    for source in range(len(plan.spec.reads)):
        encoder = made.coder.encoder(source)
        encoder.tokens_since_fired[::5] = 5000
        with torch.no_grad():
            encoder.b_enc[::5] -= 2.0
    return made


def stepped(cache: CacheReader, of: Fit, steps: int = 3) -> dict[str, Tensor]:
    """The state after some steps."""
    for step in range(steps):
        assert of.step(inputs(cache, of, step * ROWS), ROWS).item() > 0
    return {name: tensor.clone() for name, tensor in of.checkpoint().tensors.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=rtol, atol=rtol / 1e3, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("kind", "objective"),
    [*(("sae", name) for name in OBJECTIVES if name != ALL), *(("clt", name) for name in OBJECTIVES)],
)
def test_parts_and_plain_kernels_make_the_step_of_the_whole_batch(
    cache: CacheReader, kind: str, objective: str
) -> None:
    whole, *others = (
        fit(cache, kind, OBJECTIVES[objective], **settings)
        for settings in ({"kernels": "fast"}, {"kernels": "fast", "micro_rows": 70}, {"kernels": "plain"})
    )
    expected = stepped(cache, whole)
    for other in others:
        assert_same(expected, stepped(cache, other), 1e-8)
        assert other.metrics()["fvu"] > 0
    if "preact" in OBJECTIVES[objective] or "sparsity" in OBJECTIVES[objective]:
        assert whole.metrics()["penalty"] > 0


def test_resume_equals_uninterrupted_for_every_objective(
    cache: CacheReader, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 20, "checkpoint_every": 7, "log_every": 20}
    late = {"lp": {"p_start": 6, "p_updates": 4}, "resampled": {"resample": 6}}
    plans = [
        plan
        for name, objective in OBJECTIVES.items()
        for plan in plans_for(cache, re.sub(r"\W", "-", name), settings, kind="clt", **(objective | late.get(name, {})))
    ]
    train(plans, cache, out=tmp_path / "whole", device="cpu", console=console)
    with monkeypatch.context() as patch:
        stop_at(patch, 11)
        with pytest.raises(Interrupted, match="--resume"):
            train(plans, cache, out=tmp_path / "parts", device="cpu", console=console)
    train(plans, cache, out=tmp_path / "parts", device="cpu", resume=True, console=console)
    assert_same_end(plans, tmp_path / "whole", tmp_path / "parts")
    end = safetensors.torch.load_file(tmp_path / "whole/lp/checkpoints/step-00000020.safetensors")
    assert end["model.anneal.p"].item() == pytest.approx(0.2)
    assert 0 < end["model.anneal.factor"].item() != 1


# The annealed power.


def anneal(**settings: Any) -> Anneal:
    given = {"p_start": 20, "p_updates": 4, "p_end": 0.2, "p_offset": 0.5} | settings
    sizes: dict[str, Any] = {"kind": "sae", "reads": ("r",), "writes": ("r",), "layers": (0,), "d_in": 4, "d_out": 4}
    return Anneal(
        DictionarySpec(**sizes, n_latents=8, unit_norm=True, firing="relu", penalty="lp", sparsity=1.0, **given)
    ).double()


def test_the_exponent_falls_in_equal_steps_spread_over_the_rest_of_the_run() -> None:
    made, seen = anneal(), []
    assert made.steps(60) == [20, 30, 40, 50]
    for done in range(60):
        seen.append(made.p.item())
        made.advance(done, 60)
    for first, p in ((0, 1.0), (20, 0.8), (30, 0.6), (40, 0.4), (50, 0.2)):
        assert seen[first : first + 10] == pytest.approx([p] * 10)


def test_each_update_keeps_the_penalty_of_the_last_ten_steps() -> None:
    made, rng = anneal(), torch.Generator().manual_seed(0)
    batches = [torch.rand(50, generator=rng, dtype=torch.float64) * (1 + done) for done in range(60)]
    for done, u in enumerate(batches):
        assert made.listens(done, 60) == (done >= 20 - WINDOW and done < 50)
        if made.listens(done, 60):
            made.hear([u[:10]], 50)  # in parts, of which a step may have several
            made.hear([u[10:]], 50)
        before = [float(made.penalty(u)) for u in batches[done + 1 - WINDOW : done + 1]]
        made.advance(done, 60)
        if done + 1 in (20, 30, 40, 50):
            after = [float(made.penalty(u)) for u in batches[done + 1 - WINDOW : done + 1]]
            assert sum(after) == pytest.approx(sum(before))
    assert made.p.item() == pytest.approx(0.2)


def test_a_step_whose_update_was_left_out_is_not_measured() -> None:
    made, u = anneal(), torch.ones(4, dtype=torch.float64)
    made.hear([u * torch.inf], 4)
    made.advance(15, 60, torch.tensor(True))
    assert not made.sums.any()
    made.hear([u], 4)
    made.advance(16, 60, torch.tensor(False))
    assert made.sums.tolist() == pytest.approx([1.0, 1.5**0.8 - 0.5**0.8])


def test_the_power_penalty_begins_as_l1_and_its_gradient_at_zero_is_finite(cache: CacheReader) -> None:
    left, right = (
        fit(cache, "sae", RELU | penalty)
        for penalty in ({"penalty": "l1"}, {"penalty": "lp", "p_start": 4, "p_updates": 2})
    )
    a, b = stepped(cache, left), stepped(cache, right)
    torch.testing.assert_close(a["model.encoders.0.W_enc"], b["model.encoders.0.W_enc"])
    u = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    made = anneal()
    made.p.fill_(0.2)
    made.penalty(u).backward()
    assert u.grad is not None
    assert u.grad.tolist() == pytest.approx([0.2 * 0.5**-0.8] * 3)


def test_a_run_too_short_to_anneal_is_refused(cache: CacheReader) -> None:
    with pytest.raises(UserError, match="p_start is 15000 and p_updates is 10, but the run has 8 steps"):
        fit(cache, "sae", RELU | {"penalty": "lp"})


# Resampling.


def resampled(cache: CacheReader, kind: str, seed: int = 0) -> tuple[dict[str, Tensor], Fit, Inputs, Tensor]:
    """State after the step before, the fit after the step that resamples, its batch, and the latents resampled."""
    made = fit(cache, kind, RELU | {"resample": 2, "decoder": "free"}, seed=seed)
    with torch.no_grad():
        made.coder.encoder(0).b_enc[::5] -= 50.0  # silent whatever comes
    before = stepped(cache, made, 1)
    for state in made.optimiser.rule.state.values():
        state["exp_avg_sq"] += 0.1  # as if all had learned before
        state["exp_avg"] += 0.1
    given = inputs(cache, made, ROWS)
    made.step(given, ROWS)
    return before, made, given, torch.arange(0, 64, 5)


@pytest.mark.parametrize("kind", ["sae", "clt"])
def test_resampled_latents_start_anew_from_inputs_with_moments_of_zero(cache: CacheReader, kind: str) -> None:
    before, made, given, silent = resampled(cache, kind)
    coder, encoder = made.coder, made.coder.encoder(0)
    living = torch.ones(64, dtype=torch.bool).index_fill_(0, silent, False)
    x_ND = given.xs[0] - coder.b_dec[0].detach() if kind == "sae" else given.xs[0]
    cosines = normalize(encoder.W_enc.detach()[silent], dim=1) @ normalize(x_ND, dim=1).T
    tokens = cosines.argmax(1)
    torch.testing.assert_close(cosines.amax(1), torch.ones(len(silent), dtype=torch.float64))
    assert len(set(tokens.tolist())) == len(silent)  # without replacement
    norms = encoder.W_enc.detach().norm(dim=1)
    torch.testing.assert_close(norms[silent], 0.2 * norms[living].mean().expand(len(silent)))  # not of x's own length
    rows = coder.W_dec[0].detach().flatten(1)[silent]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(silent), dtype=torch.float64))
    if kind == "sae":
        torch.testing.assert_close(rows, normalize(x_ND, dim=1)[tokens])
    assert not encoder.b_enc[silent].any()
    assert not encoder.tokens_since_fired[silent].any()
    assert not torch.equal(before["model.encoders.0.W_enc"][silent], encoder.W_enc[silent])
    for parameter in (encoder.W_enc, encoder.b_enc, coder.W_dec[0]):
        for key in ("exp_avg", "exp_avg_sq"):
            moments = made.optimiser.rule.state[parameter][key]
            assert not moments[silent].any()
            assert moments[living].any()


def test_resampling_draws_by_seed_and_step_alone(cache: CacheReader) -> None:
    state = torch.random.get_rng_state()
    (_, one, _, silent), (_, same, _, _), (_, other, _, _) = (resampled(cache, "sae", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.coder.W_dec[0][silent], same.coder.W_dec[0][silent])
    assert not torch.equal(one.coder.W_dec[0][silent], other.coder.W_dec[0][silent])


def test_inputs_are_drawn_in_proportion_to_their_error(cache: CacheReader) -> None:
    made = fit(cache, "transcoder", RELU | {"resample": 2})
    coder, (xs, _) = made.coder, inputs(cache, made)
    encoder, counts = coder.encoder(0), torch.zeros(3)
    x_ND, y_NE = xs[0][:3], coder([xs[0][:3]]).y.detach()[:, 0].clone()
    y_NE[1, 0] += 1.0
    y_NE[2, 0] += 3.0
    weights = {name: tensor.clone() for name, tensor in coder.state_dict().items()}
    for step in range(120):
        coder.load_state_dict(weights)
        encoder.tokens_since_fired.zero_()[7] = 5000
        assert resample(coder, made.optimiser, [([x_ND], [y_NE])], 5000, 0, step) == 1
        sign = encoder.W_enc.detach()[7] @ normalize(x_ND, dim=1).T
        counts[sign.argmax()] += 1
        assert coder.W_dec[0].detach()[7, 0].tolist() == pytest.approx([1.0] + [0.0] * 15)  # where the token's error is
    assert counts[0] == 0
    assert counts[2] / 120 == pytest.approx(0.75, abs=0.12)


def test_latents_are_resampled_at_their_step_and_only_the_silent_ones(cache: CacheReader) -> None:
    made = fit(cache, "sae", RELU | {"resample": 4, "decoder": "free"}, steps=8)
    with torch.no_grad():
        made.coder.encoder(0).b_enc[3] -= 50.0
    made.coder.encoder(0).tokens_since_fired.zero_()
    seen = []
    for step in range(8):
        made.step(inputs(cache, made, step * ROWS), ROWS)
        seen.append(bool(made.coder.encoder(0).b_enc[3] == 0))
    assert seen[:4] == [False, False, False, True]
    assert not seen[7]  # nothing follows the last step
