"""Laws of training through the language model: scores, masks, parts, the order of contexts, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from tests.train import tiny
from tests.train.test_endtoend_gradients import MODES, fits, joined, planned
from thresher.cache.contracts import Edit
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.harvest.target import TransformerTarget
from thresher.recipes import reading
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.endtoend.clean import Cached, clean
from thresher.train.endtoend.contexts import Text
from thresher.train.endtoend.scores import Scored, plain_scores, scores
from thresher.train.endtoend.setting import Setting, together
from thresher.train.fit import Fit
from thresher.train.run import train

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target() -> TransformerTarget:
    return tiny.gpt2(torch.float64)


# Scores.


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_scores_and_their_gradient_are_those_of_autograd(objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.train.endtoend.scores._PIECE", 40)  # several pieces
    q, p = logits(3, 5, 13).requires_grad_(), logits(3, 5, 13, seed=1)
    places, following = torch.tensor([0, 1, 3, 6, 8, 12, 13]), torch.tensor([4, 12, 0, 0, 7, 1, 2])
    for clean_logits in (p, None) if objective == "ce" else (p,):
        fast, plain = (f(q, clean_logits, Scored(places, following, objective, 9)) for f in (scores, plain_scores))
        for a, b in zip(fast, plain, strict=True):
            assert (a is None) == (b is None)
            assert a is None or float(a.detach()) == pytest.approx(float(b.detach()), rel=1e-12)
        (g,), (want,) = (torch.autograd.grad(3 * one.loss, q) for one in (fast, plain))
        torch.testing.assert_close(g, want, rtol=1e-12, atol=1e-14)
        assert not g.flatten(0, 1)[[2, 4, 5, 7, 9, 10, 11, 14]].any()


def test_kl_is_per_scored_position_and_not_per_sequence() -> None:
    q, p = logits(2, 6, 11), logits(2, 6, 11, seed=1)
    every, following = torch.arange(12), torch.zeros(12, dtype=torch.int64)
    found = scores(q, p, Scored(every, following, "kl", 12)).loss
    trap = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert float(found) == pytest.approx(float(trap) / 6)
    more = Scored(torch.arange(24), following.repeat(2), "kl", 24)
    twice = scores(q.repeat(2, 1, 1), p.repeat(2, 1, 1), more).loss
    assert float(twice) == pytest.approx(float(found))


def test_hand_worked_scores() -> None:
    p, q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    found = scores(q, p, Scored(torch.tensor([0]), torch.tensor([1]), "kl", 1))
    assert found.kl is not None
    assert found.ce_clean is not None
    values = [float(x) for x in (found.loss, found.kl, found.ce, found.ce_clean)]
    assert values == pytest.approx([0.143841, 0.143841, 0.287682, 0.693147], abs=1e-6)


# The pass.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("objective", "normalise"), [("kl", "per_dim"), ("ce", "per_dim"), ("kl", "per_token")])
def test_dictionaries_without_error_cost_nothing(
    target: TransformerTarget, mode: str, objective: str, normalise: str
) -> None:
    settings = {"k": 2 * tiny.WIDTH, "normalise": normalise}
    made = fits(target, "sae", "topk", settings, mode=mode, objective=objective, steps=1, local_weight=0.0)
    eye = torch.eye(tiny.WIDTH, dtype=torch.float64)
    with torch.no_grad():
        for fit in made:
            fit.coder.b_dec.zero_()
            for weight in (fit.coder.encoder(0).W_enc, fit.coder.W_dec[0][:, 0]):
                weight.zero_()
                weight[: 2 * tiny.WIDTH] = torch.cat([eye, -eye])  # z = relu(x), relu(−x)
            fit.coder.encoder(0).b_enc.zero_()
            fit.coder.encoder(0).tokens_since_fired.zero_()
    joined(made, target, tiny.contexts(6)).step()
    for fit in made:
        numbers = fit.metrics()
        assert abs(numbers["kl"]) < 1e-12
        assert numbers["ce"] == pytest.approx(numbers["ce_clean"], rel=1e-12)
        assert numbers["fvu"] < 1e-20
        if objective == "kl":
            assert numbers["gradient_norm"] < 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_masked_positions_keep_the_models_own_output_and_the_model_learns_nothing(
    target: TransformerTarget, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, seen = tiny.contexts(6), []
    made = joined(fits(target, "clt", "batchtopk", mode=mode, batch_rows=60), target, text)
    real = type(target).logits

    def watched(self: Any, tokens: Tensor, edits: Any = None) -> Tensor:
        def watch(edit: Edit) -> Edit:
            def edited(x_BTD: Tensor) -> Tensor | None:
                new = edit(x_BTD)
                if new is not None:
                    seen.append((new.detach() != x_BTD.detach()).any(-1))
                return new

            return edited

        return real(self, tokens, {site: watch(edit) for site, edit in (edits or {}).items()})

    monkeypatch.setattr(type(target), "logits", watched)
    before = {name: p.clone() for name, p in target.model.named_parameters()}
    made.step()
    order = made.text.numbers(0, made.contexts)
    assert len(seen) == 2
    for changed_BT in seen:
        assert torch.equal(changed_BT, torch.from_numpy(text.keep[order] == 1))
    for name, parameter in target.model.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_dead_counters_count_the_trained_paths_tokens(target: TransformerTarget) -> None:
    made = joined(fits(target, "clt", "topk", mode="cascade", batch_rows=60), target, tiny.contexts(6))
    for _ in range(2):
        made.step()
    (fit,) = made.fits
    tokens = 2 * made.text.patch.sum()
    since = fit.coder.encoder(1).tokens_since_fired
    assert set((since % 4000).tolist()) >= {0}
    assert int(since.max()) <= 4000 + tokens
    assert ((since == 0) | (since == tokens // 2) | (since == tokens) | (since == 4000 + tokens)).all()
    assert 0 < fit.metrics()["l0"] <= 3
    assert fit.position == 2 * 60


# Parts.


@pytest.mark.parametrize(
    ("mode", "firing", "settings"),
    [
        ("cascade", "topk", {"aux": 0.0}),
        ("cascade", "topk", {"aux_divisor": "target"}),
        ("clean_input", "batchtopk", {}),
        ("single_site", "jumprelu", {}),
        ("clean_input", "jumprelu", {}),
    ],
)
def test_parts_make_the_step_of_the_whole(
    target: TransformerTarget, mode: str, firing: str, settings: dict[str, Any]
) -> None:
    state = []
    for micro_rows in (None, 20):
        train = {"mode": mode, "batch_rows": 60, "micro_rows": micro_rows, "lr": 1e-2}
        made = fits(target, "transcoder", firing, settings, **train)
        whole = joined(made, target, tiny.contexts(6))
        assert whole.part == (None if micro_rows is None else 2)
        for _ in range(2):
            whole.step()
        state.append([(fit.checkpoint().tensors, fit.metrics()) for fit in made])
    for (tensors, numbers), (others, other_numbers) in zip(*state, strict=True):
        for name, tensor in tensors.items():
            torch.testing.assert_close(others[name], tensor, rtol=1e-8, atol=1e-11, msg=name)
        assert other_numbers == pytest.approx(numbers, rel=1e-8)


@pytest.mark.parametrize(("firing", "why"), [("batchtopk", "selects over the whole batch"), ("topk", "AuxK divides")])
def test_a_cascade_in_parts_is_refused_where_it_would_be_another_step(
    target: TransformerTarget, firing: str, why: str
) -> None:
    plans = planned(target, "transcoder", firing, mode="cascade", batch_rows=60, micro_rows=20)
    with pytest.raises(UserError, match=f"micro_rows = 20.*{why}.*smaller batch_rows"):
        together(plans)
    together([plan._replace(train=replace(plan.train, micro_rows=60)) for plan in plans])


@pytest.mark.parametrize("setting", [{"prefixes": (0.5, 1.0)}, {"multi_topk": 0.125}])
def test_further_reconstructions_are_refused_through_the_model(
    target: TransformerTarget, setting: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=f"dictionary.{next(iter(setting))} .* only the main one is patched"):
        together(planned(target, "transcoder", "topk", setting))


def test_a_joint_pool_is_refused_where_layers_follow_one_another(target: TransformerTarget) -> None:
    joined(fits(target, "clt", "batchtopk", {"pool": "joint"}, mode="clean_input"), target, tiny.contexts(6)).step()
    with pytest.raises(UserError, match="pool of 'g' is 'joint', but in mode = 'cascade'"):
        together(planned(target, "clt", "batchtopk", {"pool": "joint"}, mode="cascade"))


# The order.


def test_contexts_come_once_an_epoch_in_an_order_that_any_place_can_be_entered_at() -> None:
    text = Text(tiny.contexts(9), 4, CPU)
    whole = text.numbers(0, 27)
    for epoch in whole.reshape(3, 9):
        assert sorted(epoch) == list(range(9))
    assert not np.array_equal(whole[:9], whole[9:18])
    for start in (0, 4, 8, 9, 16):
        assert np.array_equal(Text(tiny.contexts(9), 4, CPU).numbers(start, 11), whole[start : start + 11])
    assert not np.array_equal(Text(tiny.contexts(9), 5, CPU).numbers(0, 9), whole[:9])


def test_what_is_scored_is_the_next_real_token_of_the_same_document() -> None:
    contexts = tiny.contexts(4)
    text = Text(contexts, 0, CPU)
    step = text.step(0, 4)
    (part,) = step.parts
    token, document, keep = (array[part.contexts].reshape(-1) for array in contexts)
    for place, following in zip(part.scored.tolist(), part.following.tolist(), strict=True):
        assert keep[place] == 1
        assert keep[place + 1] > 0
        assert document[place] == document[place + 1]
        assert following == token[place + 1]
        assert (place + 1) % tiny.CONTEXT != 0
    assert part.patched.tolist() == np.flatnonzero(keep == 1).tolist()
    assert (step.patched, step.scored) == (len(part.patched), len(part.scored))


def test_text_without_a_scored_position_is_refused() -> None:
    contexts = tiny.contexts(4)
    contexts.keep[:, 1:] = 0
    with pytest.raises(UserError, match="no position that can be scored"):
        Text(contexts, 0, CPU)


# The cache.


def test_rows_of_the_cache_are_the_models_as_stored(tiny_target: TransformerTarget, tiny_cache: CacheReader) -> None:
    found = Cached(tiny_cache)
    assert found.known.sum() == (tiny_cache.provenance("train").keep == 1).sum()
    assert not found.known[tiny_cache.contexts("train").keep != 1].any()
    text = Text(tiny_cache.contexts("train"), 0, CPU, found.known)
    (part,) = text.step(0, 20).parts
    stored, exact = (clean(tiny_target, part, ["L01.mlp_in"], c, False).rows["L01.mlp_in"] for c in (found, None))
    assert torch.equal(stored, exact.bfloat16().float())
    logits = clean(tiny_target, part, ["L01.mlp_in"], None, True)
    assert torch.equal(logits.rows["L01.mlp_in"], exact)


@pytest.mark.parametrize(("mode", "objective"), [("cascade", "kl"), ("single_site", "ce"), ("clean_input", "ce")])
def test_clean_rows_from_the_cache_train_as_those_of_the_model(
    tiny_target: TransformerTarget, tiny_cache: CacheReader, tmp_path: Path, console: Console, mode: str, objective: str
) -> None:
    finals = []
    for origin in ("model", "cache"):
        settings = {"mode": mode, "objective": objective, "clean_from": origin, "steps": 3}
        settings |= {"batch_rows": 1200, "log_every": 3}  # all contexts
        plans = tiny.plans_for(tiny_target, origin, settings, kind="transcoder", firing="topk", k=3)
        results = train(plans, tiny_cache, out=tmp_path, device="cpu", console=console, target=tiny_target)
        finals.append([result.metrics["final"] for result in results])
    for model, cached in zip(*finals, strict=True):
        assert cached["ce"] == pytest.approx(model["ce"], rel=0.02)
        assert cached["fvu"] == pytest.approx(model["fvu"], rel=0.02)
        assert ("kl" in cached) == (objective == "kl")


def test_what_cannot_be_trained_so_is_refused_with_the_reason(
    tiny_target: TransformerTarget, tiny_cache: CacheReader, tmp_path: Path, console: Console
) -> None:
    plans = tiny.plans_for(tiny_target, "x", kind="transcoder", firing="topk", k=3)
    with pytest.raises(UserError, match="language model, which was not given"):
        train(plans, tiny_cache, out=tmp_path, device="cpu", console=console)
    with pytest.raises(UserError, match="belong to training through the language model"):
        TrainConfig(local_weight=0.5)
    with pytest.raises(UserError, match=r"train\.mode = 'single_site'"):
        TrainConfig(mode="single_site")
    changed = plans[1]._replace(train=TrainConfig(objective="kl", lr=1e-3))
    with pytest.raises(UserError, match="are trained together, so they must agree"):
        train([plans[0], changed], tiny_cache, out=tmp_path, device="cpu", console=console, target=tiny_target)
    twin = plans[0]._replace(name="twin")
    with pytest.raises(UserError, match="write to the same site"):
        train([plans[0], twin], tiny_cache, out=tmp_path / "twins", device="cpu", console=console, target=tiny_target)
    with pytest.raises(UserError, match="on cpu, but training is on meta"):
        Setting(tiny_target, tiny_cache, torch.device("meta"))

    class Live:
        identity: dict[str, Any] = {}  # noqa: RUF012

    with pytest.raises(UserError, match="which only a finished cache can give"):
        Cached(Live())  # type: ignore[arg-type]


# Names.


def label(name: str | None, varied: dict[str, Any], **settings: Any) -> str:
    tables = {"dictionary": DictionaryConfig(n_latents=8, k=2), "train": TrainConfig(**settings)}
    return reading._label(name, tables, varied)


def test_labels_say_how_a_dictionary_was_trained() -> None:
    assert label(None, {}) == "transcoder-batchtopk"
    assert label(None, {}, objective="kl", mode="clean_input") == "transcoder-batchtopk-kl-clean_input"
    varied = {"train.objective": "ce", "train.mode": "cascade", "dictionary.k": 4}
    assert label(None, varied, objective="ce") == "transcoder-batchtopk-ce-cascade-k4"
    assert label("wide", varied, objective="ce") == "wide-ce-cascade-k4"
    assert label("wide", {"train.objective": "local", "train.mode": "cascade"}) == "wide-local"


def test_local_training_needs_no_target(tiny_cache: CacheReader, tiny_target: TransformerTarget) -> None:
    (plan, _) = tiny.plans_for(tiny_target, "x", {"objective": "local"}, kind="transcoder", firing="topk", k=3)
    assert Fit(plan, tiny_cache, CPU).total == 12
