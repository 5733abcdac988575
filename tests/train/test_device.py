"""A step as a device takes it that must not be asked: nothing is read back, and the result is the plain one.

Here on CPU tensors, told that they lie on such a device; tests/train/test_triton.py has the kernels.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.train.conftest import plans_for
from tests.train.test_losses import LATENTS, RULES, auxk_term, batch, make
from tests.train.test_padded import ReadingBack, known
from tests.train.test_parts import ROWS, fit, inputs
from thresher.cache.reader import CacheReader
from thresher.train import auxk
from thresher.train.config import TrainConfig
from thresher.train.dictionary.coder import Coder
from thresher.train.fit import Fit
from thresher.train.kernels import firing, padded, sparse, tiles
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.padded import Forecast, Lagged
from thresher.train.kernels.silent import dead_first
from thresher.train.losses import losses
from thresher.train.optim import Optimiser
from thresher.train.penalties import preactivation_loss

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are treated as a device's."""
    monkeypatch.setattr(padded, "must_not_ask", lambda tensor: True)
    monkeypatch.setattr(firing, "fixed_capacity", lambda a_NF, kernels: padded)


def as_on_device(coder: Coder, dead: int | None = None) -> Coder:
    """With the first `dead` latents of each source dead (None: as they are), and that foreseen."""
    known(coder, 8.0)
    for source in range(len(coder.inputs)):
        encoder = coder.encoder(source)
        if dead is not None:
            encoder.tokens_since_fired.zero_()[:dead] = 100
        assert encoder.forecast is not None
        encoder.forecast.recount(encoder.tokens_since_fired)
    return coder


def gradients(out: Tensor, coder: Coder) -> list[Tensor]:
    return list(torch.autograd.grad(out, list(coder.parameters()), allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("kind", ["sae", "clt"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("low", [False, True])
def test_no_part_of_a_step_reads_back(rule: str, kind: str, low: bool, device: None) -> None:
    coder = as_on_device(make(kind, pre_bias=kind == "sae", **RULES[rule]))
    coder.gather()
    for source in range(len(coder.inputs)):
        coder.encoder(source).matmul_dtype = torch.bfloat16 if low else None
    xs, ys = batch(coder)
    aux = []
    with ReadingBack():
        for _ in range(Lagged.LAG - 1):  # then a count arrives, which waits for a step that is long done
            out = coder(xs)
            terms = losses(coder, out, xs, ys, [2.0] * len(ys), 1.0)
            terms.total.backward()
            aux.append(terms.aux)
            for source, fired in enumerate(out.fired):
                encoder = coder.encoder(source)
                encoder.advance([encoder.tally(fired)], terms.total.isnan())
    assert float(aux[0]) > 0


def test_a_step_runs_where_there_are_no_numbers_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing, "fixed_capacity", lambda a_NF, kernels: padded)
    monkeypatch.setattr(sparse, "dots", lambda left_ND, right_FD, selection: left_ND.new_empty(selection.latents.shape))
    for rule, kind in (("topk", "clt"), ("batchtopk", "sae"), ("jumprelu preact", "clt"), ("relu", "transcoder")):
        coder = as_on_device(make(kind, **RULES[rule]).float()).to("meta")
        for source in range(len(coder.inputs)):
            coder.encoder(source).matmul_dtype = torch.bfloat16
        xs, ys = ([tensor.float().to("meta") for tensor in tensors] for tensors in batch(coder))
        out = coder(xs)
        assert all(fired.silent is not None for fired in out.fired)
        losses(coder, out, xs, ys, [2.0] * len(ys), 1.0).total.backward()
        assert all(parameter.grad is not None for parameter in coder.parameters())


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("aux_k", [2, 5, 16])
@pytest.mark.parametrize("dead", [0, 1, 8, LATENTS])
@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
def test_auxk_of_fixed_capacity_equals_the_plain_term_with_all_gradients(
    kind: str, dead: int, aux_k: int, tiled: bool, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for forced in ("plain", "auto"):
        coder = make(kind, pre_bias=kind == "sae", aux_k=aux_k, **RULES["topk"])
        coder.use(Kernels(forced))  # type: ignore[arg-type]
        as_on_device(coder, dead)
        for source in range(len(coder.inputs)):  # five more are about to be dead, so there is padding
            coder.encoder(source).tokens_since_fired[-5:].clamp_min_(99)
        if kind == "clt":
            coder.encoder(1).tokens_since_fired.clamp_max_(99)  # a source without dead latents
        as_on_device(coder)
        xs, ys = batch(coder)
        if tiled:
            monkeypatch.setitem(tiles.LIMIT_BYTES, "cpu", 7 * LATENTS * 8)
        out = coder(xs)
        assert all(fired.silent is None or fired.silent.number is not None for fired in out.fired)
        term = auxk_term(coder, xs, ys, out)
        results.append([term.detach(), *(gradients(term, coder) if term.requires_grad else [])])
    plain, fixed = results
    assert bool(plain[0] > 0) == (dead > 0)
    torch.testing.assert_close(fixed[0], plain[0])
    for got, expected in zip(fixed[1:], plain[1:] or [torch.zeros_like(g) for g in fixed[1:]], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize("kind", ["sae", "clt"])
def test_parts_of_fixed_capacity_give_the_step_of_the_whole(
    cache: CacheReader, kind: str, rule: str, device: None
) -> None:
    made = [fit(cache, kind, rule, rows) for rows in (None, 70)]
    for one in made:
        as_on_device(one.coder)
        for _ in range(2):
            assert float(one.step(inputs(cache, one), ROWS)) > 0
    logs = [one.metrics() for one in made]
    assert logs[0]["aux"] > 0
    assert logs[1]["aux"] == pytest.approx(logs[0]["aux"])
    for (name, left), (_, right) in zip(*(one.coder.named_parameters() for one in made), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-7, atol=1e-10, msg=name)
    for source in range(len(made[0].coder.reads)):
        counters = [one.coder.encoder(source).tokens_since_fired for one in made]
        assert torch.equal(*counters)


@pytest.mark.parametrize("number", [True, False])
def test_dense_products_in_tiles_of_tokens_equal_those_in_one(number: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if number:
        monkeypatch.setattr(padded, "must_not_ask", lambda tensor: True)
    coder = as_on_device(make("sae", **RULES["topk"]))
    xs, ys = batch(coder)
    silent = coder(xs).fired[0].silent
    assert silent is not None
    W_dec_FE, b_dec_D = coder.W_dec[0][:, 0].detach(), coder.b_dec[0].detach()
    scale = torch.tensor(0.7).double()
    for low in (None, torch.bfloat16):
        results = []
        for limit in (1 << 20, 7 * silent.selection.width * 8):
            monkeypatch.setitem(tiles.LIMIT_BYTES, "cpu", limit)
            products = auxk._Dense(silent, W_dec_FE, low)
            assert (len(list(products.tiles())) > 1) == (limit < 1 << 20)
            total = products.error(ys[0])
            results.append([total, products.error_NE, *products.gradients(xs[0], b_dec_D, scale)[:3]])
        for many, one in zip(*results, strict=True):
            torch.testing.assert_close(many, one, **({} if low is None else {"rtol": 2e-2, "atol": 2e-2}))


@pytest.mark.parametrize("where", ["dead", "all"])
def test_the_preactivation_loss_of_fixed_capacity_equals_the_one_of_a_cpu(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(padded, "must_not_ask", lambda tensor: True)
        coder = as_on_device(make("clt", firing="jumprelu", sparsity=0.02, preact=0.1, preact_on=where))
        xs, _ = batch(coder)
        term = preactivation_loss(coder, 1, xs[1])
        found.append([term.detach(), *gradients(term, coder)])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


@given(seed=st.integers(0, 10**6), length=st.integers(0, 40))
def test_the_list_of_dead_latents_names_each_latent_once_and_the_dead_ones_first(seed: int, length: int) -> None:
    dead_F = torch.rand(40, generator=torch.Generator().manual_seed(seed)) < 0.3
    found = dead_first(dead_F, 40)
    expected = torch.nonzero(dead_F).view(-1)
    assert found.latents[: len(expected)].tolist() == expected.tolist()
    assert sorted(found.latents.tolist()) == list(range(40))
    assert int(found.real().sum()) == int(found.number) == len(expected)  # type: ignore[arg-type]
    assert torch.equal(dead_first(dead_F, length).latents, found.latents[:length])


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    dead_after=st.integers(1, 400),
    sizes=st.lists(st.sampled_from([0, 1, 20, 30, 500]), min_size=1, max_size=30),
)
def test_a_forecast_is_never_too_low_and_goes_on_from_its_state(seed: int, dead_after: int, sizes: list[int]) -> None:
    """Latents fire seldom, some steps are left out, batches grow and shrink."""
    rng = torch.Generator().manual_seed(seed)
    often = torch.rand(50, generator=rng) ** 3
    silent, made, asked = torch.zeros(50, dtype=torch.int64), Forecast(dead_after), padded.must_not_ask
    padded.must_not_ask = lambda tensor: True
    try:
        for step, tokens in enumerate(sizes):
            if step % 3 == 2:
                again = Forecast(dead_after)
                again.load_state_dict(made.state_dict())
                made = again
            most = made.most(silent, tokens)
            assert int((silent >= dead_after).sum()) <= most <= 50
            if torch.rand((), generator=rng) > 0.1:
                silent += tokens
                silent[torch.rand(50, generator=rng) < often] = 0
            made.advance(silent, tokens)
    finally:
        padded.must_not_ask = asked


def test_a_forecast_is_close_and_zero_while_none_can_be_dead(device: None) -> None:
    silent, made = torch.zeros(50, dtype=torch.int64), Forecast(1000)
    made.recount(silent)
    assert made.capacity(silent, 10) == 0
    bounds = []
    for _ in range(120):
        silent += 10
        silent[3:] = 0
        made.advance(silent, 10)
        bounds.append(made.most(silent, 10))
    dead_at = 100  # steps; known up to twice the lag before
    assert bounds[: dead_at - 1 - 2 * Lagged.LAG] == [0] * (dead_at - 1 - 2 * Lagged.LAG)
    assert bounds[dead_at - 1 :] == [3] * (120 - dead_at + 1)


def test_without_a_forecast_there_is_room_for_all_until_a_count_arrives(device: None) -> None:
    silent, made = torch.zeros(50, dtype=torch.int64), Forecast(1000)
    silent[:7] = 1000
    assert [made.most(silent, 10) for _ in range(Lagged.LAG + 2)] == [50] * (Lagged.LAG - 1) + [7] * 3


def test_training_on_a_cpu_leaves_no_forecast_behind() -> None:
    made = Forecast(100)
    made.recount(torch.zeros(5, dtype=torch.int64))
    assert made.known
    made.advance(torch.full((5,), 90), 90)
    assert not made.known


def test_a_load_looks_once_so_that_no_step_has_to(device: None) -> None:
    coder = make("clt", **RULES["topk"])
    again = make("clt", **RULES["topk"])
    again.load_state_dict(coder.state_dict())
    for source in range(3):
        forecast = again.encoder(source).forecast
        assert forecast is not None
        assert forecast.known
        assert forecast.most(again.encoder(source).tokens_since_fired, 1) == LATENTS // 3


@pytest.mark.parametrize("rule", ["topk", "jumprelu l0"])
def test_a_step_that_is_left_out_leaves_the_counters(rule: str) -> None:
    coder = make("sae", **RULES[rule])
    encoder, (xs, _) = coder.encoder(0), batch(coder)
    before = encoder.tokens_since_fired.clone()
    tally = encoder.tally(coder(xs).fired[0])
    active = encoder.advance([tally], torch.tensor(True))
    assert torch.equal(encoder.tokens_since_fired, before)
    assert torch.equal(encoder.advance([tally], torch.tensor(False)), active)
    after = encoder.tokens_since_fired.clone()
    encoder.tokens_since_fired.copy_(before)
    encoder.advance([tally])
    assert torch.equal(encoder.tokens_since_fired, after)
    assert not torch.equal(after, before)


def test_the_plain_way_reaches_the_rules_and_the_tally(device: None) -> None:
    for rule in RULES:
        coder = make("sae", **RULES[rule])
        coder.use(Kernels("plain"))
        encoder = coder.encoder(0)
        assert encoder.rule.kernels is coder.kernels
        xs, ys = batch(coder)
        losses(coder, coder(xs), xs, ys, [2.0], 1.0).total.backward()
        used = coder.kernels.used
        assert {"select", "encoder gradient", "decode", "auxk"} <= set(used)
        assert all(names == ["plain"] for names in used.values())


# The copy of the encoder in bfloat16.


def assert_current(coder: Coder) -> None:
    for source in range(len(coder.inputs)):
        encoder = coder.encoder(source)
        assert torch.equal(encoder.low_weight(), encoder.W_enc.bfloat16())


def low(coder: Coder) -> Coder:
    for source in range(len(coder.inputs)):
        coder.encoder(source).matmul_dtype = torch.bfloat16
    return coder


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_the_copy_is_the_encoder_after_steps_writes_and_loads(kernels: str) -> None:
    coder = low(make("clt", unit_norm=True, **RULES["topk"]).float())
    coder.use(Kernels(kernels))  # type: ignore[arg-type]
    optimiser = Optimiser(coder, TrainConfig())
    xs, ys = ([tensor.float() for tensor in tensors] for tensors in batch(coder))
    copies = []
    for _ in range(3):
        terms = losses(coder, coder(xs), xs, ys, [1.0] * 3, 1.0)
        terms.total.backward()
        optimiser.step(0.1, terms.total.detach().isfinite())
        assert_current(coder)
        copies.append(coder.encoder(0).low_weight().clone())
    assert not torch.equal(copies[0], copies[1])
    saved = {name: tensor.clone() for name, tensor in coder.state_dict().items()}
    assert not any("low" in name for name in saved)
    with torch.no_grad():
        coder.encoder(0).W_enc.mul_(2.0)
    assert_current(coder)
    coder.load_state_dict(saved)
    assert_current(coder)
    assert torch.equal(coder.encoder(0).low_weight(), copies[-1])
    coder.double().float()
    assert_current(coder)


def test_the_copy_is_made_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    coder = low(make("sae", **RULES["topk"]).float())
    xs, ys = ([tensor.float() for tensor in tensors] for tensors in batch(coder))
    optimiser, encoder, made = Optimiser(coder, TrainConfig()), coder.encoder(0), []
    monkeypatch.setitem(tiles.LIMIT_BYTES, "cpu", 7 * LATENTS * 4)  # six tiles
    for _ in range(3):
        before = None if encoder.low is None else encoder.low._version
        terms = losses(coder, coder(xs), xs, ys, [1.0], 1.0)
        terms.total.backward()
        optimiser.step(0.1, terms.total.detach().isfinite())
        assert encoder.low is not None
        made.append(before is None or encoder.low._version - before)
    assert made == [True, 1, 1]


def test_runs_in_bfloat16_start_go_on_and_end_with_the_copy_of_their_weights(cache: CacheReader) -> None:
    (plan, *_) = plans_for(cache, "b", {"dtype": "bfloat16"}, kind="clt", firing="topk", k=3)
    first, second = (Fit(plan, cache, torch.device("cpu")) for _ in range(2))
    first.start(cache)
    assert_current(first.coder)
    second.load(first.checkpoint())
    assert_current(second.coder)
    served = first.deployed()
    assert served.encoder(0).low is None
    assert_current(low(served))
    first.release()
    assert all(first.coder.encoder(source).low.numel() == 0 for source in range(2))  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "jumprelu l0"])
def test_a_block_in_bfloat16_is_compared_and_kept_in_float32(rule: str, device: None) -> None:
    coder = as_on_device(low(make("sae", aux=0.0, **RULES[rule]).float()))
    (x_ND, *_), encoder = batch(coder)[0], coder.encoder(0)
    with torch.no_grad():
        encoder.b_enc.sub_(7.0)  # few enough are above a threshold that a selection pays
    known(coder, 0.1)
    x_ND, bias_F = x_ND.float(), coder.bias(0)
    block = torch.addmm(bias_F.bfloat16(), x_ND.bfloat16(), encoder.W_enc.bfloat16().T)
    found = encoder.choose(x_ND, bias_F)
    expected = encoder.rule.select(block)
    assert expected is not None
    assert found.selection is not None
    assert torch.equal(found.selection.latents, expected.latents)
    assert found.values.dtype == torch.float32
    assert torch.equal(found.values, expected.take(block).float())


def test_settings_of_these_tests_leave_latents_dead() -> None:
    made: dict[str, Any] = RULES["topk"]
    assert int(make("sae", **made).encoder(0).dead(100).sum()) == LATENTS // 3
