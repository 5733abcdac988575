"""Faults found in other implementations of sparse dictionaries; each test fails where the fault is.

Their order is that of the list in the methods reference; behind it come faults of losses that stand beside its tables.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.conftest import KINDS, plans_for
from tests.train.test_losses import LATENTS, RULES, N, auxk_term, batch, make
from thresher.cache.reader import CacheReader
from thresher.train.auxk import dead_latents
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.initial import initialise
from thresher.train.dictionary.topologies import build
from thresher.train.fit import Fit
from thresher.train.kernels.choice import Kernels
from thresher.train.losses import losses
from thresher.train.penalties import penalties
from thresher.train.views import Inputs, Views

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def fit(cache: CacheReader, kind: str, train: dict[str, Any] | None = None, **settings: Any) -> Fit:
    (plan, *_) = plans_for(cache, "f", train, kind=kind, **({"firing": "topk", "k": 3} | settings))
    made = Fit(plan, cache, torch.device("cpu"))
    made.start(cache)
    return made


def rows(cache: CacheReader, of: Fit, first: int = 0, count: int = 256) -> Inputs:
    index = np.arange(first, first + count)
    return of.inputs(Views({s: cache.gather("train", s, index) for s in (*of.plan.spec.reads, *of.plan.spec.writes)}))


def gradients(out: Tensor, coder: Coder) -> list[Tensor]:
    return list(torch.autograd.grad(out, list(coder.parameters()), allow_unused=True, materialize_grads=True))


# 1. A fused backward that drops a loss term's gradient to the encoder.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
def test_every_term_gives_every_weight_the_gradient_of_the_plain_form(kind: str, rule: str) -> None:
    found = []
    for forced in ("auto", "plain"):
        coder = make(kind, pre_bias=kind == "sae", **RULES[rule])
        coder.use(Kernels(forced))
        xs, ys = batch(coder)
        done = coder(xs)
        terms = losses(coder, done, xs, ys, [2.0] * len(ys), 1.0)
        aux = auxk_term(coder, xs, ys)
        found.append([terms.total.detach(), *gradients(terms.total, coder), *gradients(aux, coder)])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("forced", ["auto", "plain"])
def test_auxk_teaches_dead_encoder_rows(forced: Any) -> None:
    coder = make("transcoder", **RULES["topk"])
    coder.use(Kernels(forced))
    xs, ys = batch(coder)
    auxk_term(coder, xs, ys).backward()
    encoder = coder.encoder(0)
    assert encoder.W_enc.grad is not None
    assert bool((encoder.W_enc.grad[encoder.dead(100)].abs().sum(1) > 0).all())


# 2. A fused backward without the mask of the ReLU.


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "groupmax"])
def test_a_pick_that_is_not_positive_teaches_nothing(rule: str) -> None:
    coder = make("transcoder", firing=rule, k=LATENTS, aux=0.0)
    with torch.no_grad():
        coder.encoder(0).b_enc.sub_(100.0)
        coder.encoder(0).b_enc[5] += 200.0  # the only one that ever fires
    xs, ys = batch(coder)
    losses(coder, coder(xs), xs, ys, [1.0], 1.0).total.backward()
    for weight in (coder.encoder(0).W_enc, coder.encoder(0).b_enc, coder.W_dec[0]):
        assert weight.grad is not None
        taught = weight.grad.abs().reshape(LATENTS, -1).sum(1) > 0
        assert taught.nonzero().view(-1).tolist() == [5]


def test_a_pick_of_the_second_code_that_is_not_positive_teaches_nothing() -> None:
    coder = make("transcoder", firing="topk", k=2, multi_topk=1.0, aux=0.0)
    with torch.no_grad():
        coder.encoder(0).b_enc.sub_(100.0)
        coder.encoder(0).b_enc[[5, 6, 7]] += 200.0  # the third of them is in the second code alone
    xs, ys = batch(coder)
    losses(coder, coder(xs), xs, ys, [1.0], 1.0).total.backward()
    for weight in (coder.encoder(0).W_enc, coder.encoder(0).b_enc, coder.W_dec[0]):
        assert weight.grad is not None
        taught = weight.grad.abs().reshape(LATENTS, -1).sum(1) > 0
        assert taught.nonzero().view(-1).tolist() == [5, 6, 7]


# 3. An auxiliary code taking the place of the main one.


@pytest.mark.parametrize("forced", ["auto", "plain"])
def test_multi_topk_changes_neither_codes_nor_reconstruction_nor_counts(forced: Any) -> None:
    multi, single = (make("clt", firing="topk", k=3, multi_topk=factor) for factor in (1 / 8, 0.0))
    xs, _ = batch(multi)
    for coder in (multi, single):
        coder.use(Kernels(forced))
    left, right = multi(xs), single(xs)
    assert torch.equal(left.y, right.y)
    for source, (a, b) in enumerate(zip(left.fired, right.fired, strict=True)):
        assert a.selection is not None
        assert b.selection is not None
        assert a.wide is not None
        assert a.wide.selection.latents.shape[0] == 4 * a.selection.latents.shape[0]
        assert torch.equal(a.selection.latents, b.selection.latents)
        assert torch.equal(a.z, b.z)
        assert multi.encoder(source).observe(a) == single.encoder(source).observe(b) <= 3 * N
        counts = (coder.encoder(source).tokens_since_fired for coder in (multi, single))
        assert torch.equal(*counts)
        assert torch.equal(multi.encode(source, xs[source]).latents, single.encode(source, xs[source]).latents)


def test_multi_topk_patches_with_k_latents(cache: CacheReader) -> None:
    made = fit(cache, "transcoder", multi_topk=1 / 8)
    given = rows(cache, made)
    made.step(given, 256)
    assert made.metrics()["l0"] <= 3
    assert int(made.deployed().encode(0, given.xs[0]).offsets.diff().max()) <= 3


def test_auxk_changes_neither_codes_nor_reconstruction_nor_counts() -> None:
    with_aux, without = (make("clt", aux=aux, **RULES["topk"]) for aux in (1 / 32, 0.0))
    xs, ys = batch(with_aux)
    left, right = with_aux(xs), without(xs)
    losses(with_aux, left, xs, ys, [1.0] * 3, 1.0)
    assert torch.equal(left.y, right.y)
    for source, (a, b) in enumerate(zip(left.fired, right.fired, strict=True)):
        assert torch.equal(a.z, b.z)
        assert with_aux.encoder(source).observe(a) == without.encoder(source).observe(b)
        counts = (coder.encoder(source).tokens_since_fired for coder in (with_aux, without))
        assert torch.equal(*counts)


# 4. The decoder's bias in AuxK's reconstruction.


@pytest.mark.parametrize("forced", ["auto", "plain"])
def test_auxk_depends_on_the_residual_and_not_on_the_bias(forced: Any) -> None:
    coder = make("transcoder", **RULES["topk"])
    coder.use(Kernels(forced))
    xs, ys = batch(coder)
    before = auxk_term(coder, xs, ys)
    with torch.no_grad():
        coder.b_dec += 3.0
    torch.testing.assert_close(auxk_term(coder, xs, [y + 3.0 for y in ys]), before)


# 5. A residual through which AuxK reaches living latents.


@pytest.mark.parametrize("forced", ["auto", "plain"])
@pytest.mark.parametrize("kind", ["sae", "clt"])
def test_auxk_teaches_only_what_is_dead(kind: str, forced: Any) -> None:
    coder = make(kind, pre_bias=kind == "sae", **RULES["topk"])
    coder.use(Kernels(forced))
    xs, ys = batch(coder)
    auxk_term(coder, xs, ys).backward()
    assert coder.b_dec.grad is None
    for source in range(len(xs)):
        living = ~coder.encoder(source).dead(100)
        for weight in (coder.encoder(source).W_enc, coder.encoder(source).b_enc, coder.W_dec[source]):
            assert weight.grad is not None
            assert not bool(weight.grad[living].any())


# 6. Two notions of dead; counters that looking advances, or that are not saved.


def test_the_loss_and_the_log_mean_the_same_latents_by_dead(cache: CacheReader) -> None:
    made = fit(cache, "transcoder", dead_after=2000)
    encoder, given = made.coder.encoder(0), rows(cache, made)
    for count, dead in ((1999, 0), (2000, 7), (2001, 7)):
        encoder.tokens_since_fired.zero_()[:7] = count
        found = dead_latents(made.coder, 0, made.coder(given.xs))
        assert (0 if found is None else len(found.latents)) == dead
        assert made.dead_share().item() == dead / 64


def test_only_a_step_advances_counters_and_they_are_saved(cache: CacheReader) -> None:
    made = fit(cache, "transcoder", firing="batchtopk")
    given = rows(cache, made)
    made.step(given, 256)
    before = {name: value.clone() for name, value in made.coder.named_buffers()}
    made.coder(given.xs)
    made.metrics()
    made.dead_share()
    served = made.deployed()
    served.encode(0, given.xs[0])
    for name, value in made.coder.named_buffers():
        assert torch.equal(value, before[name]), name
    saved = made.checkpoint().tensors["model.encoders.0.tokens_since_fired"]
    assert saved.any()
    assert torch.equal(saved, before["encoders.0.tokens_since_fired"])
    made.step(given, 256)
    counts = made.coder.encoder(0).tokens_since_fired
    assert bool(((counts == 0) | (counts == before["encoders.0.tokens_since_fired"] + 256)).all())


# 7. Constructors that seed the global generator.


def test_building_and_starting_leave_the_global_generator_alone_and_layers_differ(cache: CacheReader) -> None:
    state = torch.random.get_rng_state()
    made = fit(cache, "clt")
    made.step(rows(cache, made), 256)
    assert torch.equal(torch.random.get_rng_state(), state)
    fresh = build(made.plan.spec)
    samples = [torch.ones(4, made.plan.spec.d_in)] * len(made.plan.spec.reads)
    initialise(fresh, made.plan.seed, made.reads, made.writes, samples)
    first, second = fresh.encoder(0).W_enc, fresh.encoder(1).W_enc
    assert not bool(torch.isclose(first, second).all(1).any())


# 8. Schedules and means that count parts of batches as steps.


def test_rates_steps_and_means_do_not_see_that_a_batch_came_in_parts(cache: CacheReader) -> None:
    log = []
    for parts in (None, 64):
        made = fit(cache, "transcoder", {"micro_rows": parts, "warmup": 4, "steps": 8})
        taken = []
        for step in range(6):
            made.step(rows(cache, made, 256 * step), 256)
            now = made.metrics()
            taken.append({key: now[key] for key in ("step", "rows", "lr", "fvu", "l0")})
        log.append((made.total, taken))
    (total, whole), (total_in_parts, in_parts) = log
    assert total == total_in_parts == 8
    assert [entry["step"] for entry in whole] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(whole, in_parts, strict=True):
        assert right == pytest.approx(left, rel=1e-4)


# 9. Selection that couples tokens when serving; dropped positions that compete in it.


@pytest.mark.parametrize(
    "rule", ["topk", "batchtopk", "jumprelu l0", "relu", "groupmax", "topk norm", "batchtopk norm", "gated", "global"]
)
def test_a_served_token_has_the_codes_it_has_alone(rule: str) -> None:
    coder = make("transcoder", **RULES[rule])
    xs, _ = batch(coder)
    coder.encoder(0).observe(coder(xs).fired[0])
    together = coder.encode(0, xs[0])
    for token in range(N):
        alone = coder.encode(0, xs[0][token : token + 1])
        entries = slice(int(together.offsets[token]), int(together.offsets[token + 1]))
        assert torch.equal(together.latents[entries], alone.latents)
        torch.testing.assert_close(together.values[entries], alone.values)


def test_positions_that_the_mask_drops_are_no_training_rows(cache: CacheReader) -> None:
    kept = 96 * 63  # of the 64 positions of every context the first is dropped
    assert kept - 64 < cache.rows("train") <= kept  # whole blocks of rows


# 10. Saved weights off the constraint they were trained under.


@pytest.mark.parametrize("kind", KINDS)
def test_saved_unit_rows_have_norm_one_after_any_step(cache: CacheReader, kind: str) -> None:
    made = fit(cache, kind, decoder="unit", normalise="none")
    if kind == "transcoder":  # it starts with rows of zero
        with torch.no_grad():
            made.coder.W_dec[0].normal_(generator=torch.Generator().manual_seed(0))
    for step in range(3):
        made.step(rows(cache, made, 256 * step), 256)
        for weight in made.deployed().W_dec:
            norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
            torch.testing.assert_close(norms, torch.ones(64))


# AuxK fed with raw pre-activations, through which negative dead latents learn too.


@pytest.mark.parametrize("forced", ["auto", "plain"])
def test_auxk_ignores_dead_latents_that_are_not_positive(forced: Any) -> None:
    coder = make("transcoder", **RULES["topk"])
    coder.use(Kernels(forced))
    encoder = coder.encoder(0)
    with torch.no_grad():
        encoder.b_enc[0] = -100.0  # dead, and below zero on every token
    xs, ys = batch(coder)
    auxk_term(coder, xs, ys).backward()
    for weight in (encoder.W_enc, encoder.b_enc, coder.W_dec[0]):
        assert weight.grad is not None
        assert not bool(weight.grad[0].any())
        assert bool(weight.grad[3].any())


# JumpReLU: gradient to pre-activations below the threshold; a step penalty that sees codes; τ without its chain factor.


@pytest.mark.parametrize("forced", ["auto", "plain"])
def test_pre_activations_between_zero_and_the_threshold_get_no_gradient(forced: Any) -> None:
    coder = make("transcoder", firing="jumprelu", sparsity=0.02, penalty="tanh", aux=0.0)
    coder.use(Kernels(forced))
    xs, ys = batch(coder)
    done = coder(xs)
    fired = done.fired[0]
    fired.a.retain_grad()
    losses(coder, done, xs, ys, [1.0], 1.0).total.backward()
    latents = slice(None) if fired.selection is None else fired.selection.latents
    below = (fired.a > 0) & (fired.a <= coder.encoder(0).rule.theta()[latents])
    assert fired.a.grad is not None
    assert bool(below.any())
    assert not bool(fired.a.grad[below].any())
    assert bool(fired.a.grad[fired.a > coder.encoder(0).rule.theta()[latents]].any())


@pytest.mark.parametrize("forced", ["auto", "plain"])
def test_the_step_penalty_pulls_log_thresholds_by_the_density_there(forced: Any) -> None:
    coder = make("transcoder", firing="jumprelu", sparsity=1.0, aux=0.0)
    coder.use(Kernels(forced))
    encoder, spread = coder.encoder(0), 0.5
    with torch.no_grad():
        encoder.W_enc.zero_()[:, 0] = 1.0  # every latent sees one normal variable
        encoder.b_enc.zero_()
        encoder.rule.log_theta.copy_(torch.linspace(-2.0, 0.5, LATENTS))
        encoder.rule.window.fill_(spread)
    x_ND = torch.zeros(4001, 6, dtype=torch.float64)
    x_ND[:, 0] = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(4001, dtype=torch.float64) + 0.5) / 4001)
    penalties(coder, coder([x_ND]).fired, [x_ND]).backward()
    theta = encoder.rule.theta().detach()
    normal = torch.distributions.Normal(0.0, 1.0)
    density = (normal.cdf(theta + spread / 2) - normal.cdf(theta - spread / 2)) / spread  # both halves of the window
    assert encoder.rule.log_theta.grad is not None
    torch.testing.assert_close(encoder.rule.log_theta.grad, -theta * density, rtol=0.02, atol=1e-3)
