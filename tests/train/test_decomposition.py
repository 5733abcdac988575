"""Parameter decomposition from end to end: runs that learn and go on, what they cost, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import tiny
from tests.train.test_endtoend_run import same, stop_at
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.evaluate.costs import costs
from thresher.train.dictionary.decomposition import Decomposition
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.dictionary.topologies import build
from thresher.train.files import load_run
from thresher.train.metrics import curves
from thresher.train.optim import rate_factor
from thresher.train.run import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
SETTINGS: dict[str, Any] = {
    "kind": "decomposition", "n_latents": None, "aux_k": None, "components": (12, 14), "gate_width": 6,
    "sparsity": 1e-3, "faithfulness": 20.0, "faithfulness_warmup": 30,
}  # fmt: skip
D, H = tiny.WIDTH, 4 * tiny.WIDTH


# Runs.


def test_resume_equals_uninterrupted(go: Any, tmp_path: Path, tiny_target: Any, monkeypatch: Any) -> None:
    plans = tiny.plans_for(tiny_target, "g", {"optimiser": "adamw", "decay": "cosine"}, **SETTINGS)
    whole = go(plans, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted, match=r"stopped at step 7 .*--resume"):
            go(plans, tmp_path / "parts")
    same(whole, go(plans, tmp_path / "parts", resume=True))


def test_a_run_learns_and_is_saved_as_it_was_trained(
    go: Any, tmp_path: Path, tiny_target: Any, tiny_cache: Any
) -> None:
    settings = {"steps": 80, "lr": 3e-3, "log_every": 20, "warmup": 0, "clip": 0.01}
    easy = {"faithfulness_warmup": 0, "components": (40, 40), "subset": 5.0, "sparsity": 1e-4}
    plans = tiny.plans_for(tiny_target, "g", settings, **SETTINGS | easy)
    results = go(plans, tmp_path)
    for result in results:
        found = curves(result.path)
        assert found["faithfulness"][-1] < 0.5 * found["faithfulness"][0]
        assert found["kl"][-1] < 0.5 * found["kl"][0]
        held = result.metrics["held_out"]
        assert len(held["l0"]) == 2
        assert held["trained_l0"] == [result.metrics["final"][f"l0.S{s}"] for s in range(2)]
    warm = tiny.plans_for(tiny_target, "warm", {"steps": 1}, **SETTINGS | {"components": (40, 40)})
    first = go(warm, tmp_path / "warm")[0].metrics["final"]["faithfulness"]
    cold = tiny.plans_for(
        tiny_target, "cold", {"steps": 1}, **SETTINGS | {"components": (40, 40), "faithfulness_warmup": 0}
    )
    assert first < 0.9 * go(cold, tmp_path / "cold")[0].metrics["final"]["faithfulness"]


def test_a_saved_decomposition_costs_what_its_components_weigh(go: Any, tmp_path: Path, tiny_target: Any) -> None:
    results = go(tiny.plans_for(tiny_target, "g", {"steps": 3}, **SETTINGS), tmp_path)
    dictionaries = [load_run(result.path).dictionary for result in results]
    one = dictionaries[0]
    assert one.inputs == (("L00.mlp_in",), ("L00.mlp_in",))
    assert [one.latent_costs(s).tolist() for s in range(2)] == [[D + H] * 12, [H + D] * 14]
    assert one.n_parameters == 26 * (D + H) + 6 * (D + 1) + 26 * (6 + 1)
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(0))
    codes = [one.encode(s, x) for s in range(2)]
    assert isinstance(one, Decomposition)
    for s, gamma in enumerate(one.gammas(x)):
        assert torch.equal(codes[s].dense(), (gamma > 0).float())
    torch.testing.assert_close(one.decode(0, codes), one.chosen(x, [part.dense() for part in codes]))
    l0, used = [[3.0, 5.0], [1.0, 7.0]], [[3.0 * (D + H), 5.0 * (D + H)], [1.0 * (D + H), 7.0 * (D + H)]]
    assert costs(dictionaries, l0, used) == {"l0": 4.0, "active_per_mlp": 8.0, "active_parameters": 16.0 * (D + H)}


def test_a_higher_threshold_keeps_fewer_components(tiny_target: Any) -> None:
    made = []
    for limit in (0.0, 0.5):
        spec = tiny.plans_for(tiny_target, "g", **SETTINGS | {"gate_threshold": limit})[0].spec
        module = build(spec)
        assert isinstance(module, Decomposition)
        module.begin_weights(torch.Generator().manual_seed(0))
        made.append(module.encode(0, torch.randn(50, D, generator=torch.Generator().manual_seed(1))).l0().sum())
    assert 0 < made[1] < made[0]


# What is refused.


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"k": 4}, "dictionary.k is 4"),
        ({"skip": True}, "dictionary.skip is True"),
        ({"normalise": "per_dim"}, "dictionary.normalise"),
        ({"n_latents": 8}, "dictionary.n_latents is 8"),
        ({"components": None}, "dictionary.components is None"),
        ({"components": (3,)}, "components of the MLP's first"),
        ({"firing": "topk"}, "firing is 'topk'"),
        ({"sparsity": 0.0}, "nothing would make its codes sparse"),
        ({"subset": 0.0}, "all gates would close"),
        ({"gate_threshold": 1.0}, "gate_threshold"),
        ({"minimality_p": (2.0,)}, "minimality_p"),
        ({"penalty_warmup": 4}, "penalty_warmup"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, Any], match: str) -> None:
    base = {key: value for key, value in SETTINGS.items() if key != "aux_k"}
    with pytest.raises(UserError, match=match):
        DictionaryConfig(**base | given)


@pytest.mark.parametrize("given", [{"reads": "mlp_out"}, {"writes": "mlp_in"}])
def test_it_stands_for_an_mlp_and_nothing_else(given: dict[str, str], tiny_target: Any) -> None:
    with pytest.raises(UserError, match=f"dictionary.{next(iter(given))} resolves to .*the MLP as a whole"):
        tiny.plans_for(tiny_target, "g", **SETTINGS | given)


def test_others_refuse_what_is_a_decompositions_own() -> None:
    for given in ({"components": (2, 3)}, {"gate_width": 7}, {"faithfulness": 1.0}, {"minimality_p": (1.0, 1.0)}):
        with pytest.raises(UserError, match="only a decomposition"):
            DictionaryConfig(kind="transcoder", k=2, n_latents=8, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"objective": "local"}, {"objective": "ce"}, {"mode": "clean_input"}, {"micro_rows": 20}, {"optimiser": "muon"},
        {"local_weight": 0.1}, {"init_from": "runs/x"}, {"dtype": "bfloat16"},
    ],
)  # fmt: skip
def test_it_is_trained_in_one_way_alone(given: dict[str, Any], tiny_target: Any) -> None:
    with pytest.raises(UserError, match=f"train.{next(iter(given))} is .*decomposition"):
        tiny.plans_for(tiny_target, "g", given, **SETTINGS)


def test_a_target_with_another_mlp_is_refused(go: Any, tmp_path: Path, tiny_target: Any) -> None:
    for given, match in (({"mlp_width": 30}, "mlp_width = 32"), ({"mlp_activation": "relu"}, "'gelu_tanh'")):
        with pytest.raises(UserError, match=match):
            go(tiny.plans_for(tiny_target, "g", **SETTINGS | given), tmp_path / match)


def test_the_cosine_ends_at_a_tenth() -> None:
    config = TrainConfig(warmup=0, decay="cosine")
    assert [rate_factor(config, step, 100) for step in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])
