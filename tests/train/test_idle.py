"""A setting that would have no effect is refused, with what it waits for."""

from typing import Any

import pytest

from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.train.config import TrainConfig
from thresher.train.dictionary.spec import DictionaryConfig
from thresher.train.plan import plan_runs

JUMP: dict[str, Any] = {"firing": "jumprelu", "sparsity": 0.1}
L1: dict[str, Any] = {"firing": "relu", "sparsity": 0.1}
COUNT: dict[str, Any] = {"firing": "topk", "k": 2}
PER_TARGET: dict[str, Any] = {"kind": "clt", "decoder": "unit_per_target"}
JOINT: dict[str, Any] = {"firing": "batchtopk", "pool": "joint"}

CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"theta": 1.0}, COUNT, JUMP, "firing = 'jumprelu'"),
    ({"bandwidth": 0.5}, L1, JUMP, "firing = 'jumprelu'"),
    ({"threshold_decay": 0.5}, COUNT, COUNT | {"firing": "batchtopk"}, "firing = 'batchtopk'"),
    ({"rank_by": "norm"}, COUNT | {"kind": "sae"}, COUNT | {"kind": "sae", "decoder": "free"}, "norms differ"),
    ({"rank_by": "norm"}, COUNT | {"kind": "clt", "decoder": "unit"}, COUNT | {"kind": "clt"}, "norms differ"),
    ({"rank_by": "norm"}, COUNT | PER_TARGET, COUNT | PER_TARGET | JOINT, "norms differ"),
    ({"k_start": 6.0}, COUNT, COUNT | {"k_anneal": 5}, "k_anneal above 0"),
    ({"tanh_scale": 2.0}, JUMP, JUMP | {"penalty": "tanh"}, "penalty = 'tanh'"),
    ({"p_end": 0.5}, L1, L1 | {"penalty": "lp"}, "penalty = 'lp'"),
    ({"p_start": 5}, JUMP, L1 | {"penalty": "lp"}, "penalty = 'lp'"),
    ({"penalty_warmup": 5}, COUNT, L1, "a sparsity penalty"),
    ({"penalty_warmup": "run"}, COUNT, JUMP, "a sparsity penalty"),
    ({"preact_on": "all"}, JUMP, JUMP | {"preact": 0.1}, "preact above 0"),
    ({"preact_form": "zero"}, JUMP, JUMP | {"preact": 0.1}, "preact above 0"),
    ({"penalty_norm": "l1"}, COUNT, L1, "weighs with norms"),
    ({"penalty_norm": "none"}, JUMP, JUMP | {"preact": 0.1}, "weighs with norms"),
    ({"penalty_norm": "none"}, JUMP | {"preact": 0.1, "preact_form": "zero"}, JUMP | {"penalty": "tanh"}, "weighs"),
]


@pytest.mark.parametrize(("setting", "idle", "used", "needs"), CASES, ids=lambda value: str(value))
def test_a_setting_without_effect_is_refused_and_one_with_is_not(
    setting: dict[str, Any], idle: dict[str, Any], used: dict[str, Any], needs: str
) -> None:
    ((field, _),) = setting.items()
    DictionaryConfig(n_latents=8, **used, **setting)
    DictionaryConfig(n_latents=8, **idle)
    with pytest.raises(UserError, match=f"dictionary.{field} is .* no effect .*{needs}"):
        DictionaryConfig(n_latents=8, **idle, **setting)


def test_auxk_that_is_turned_off_leaves_its_settings_be() -> None:
    assert DictionaryConfig(n_latents=8, **COUNT, aux=0.0, aux_k=4, aux_scale=False).aux_k == 4


SITES = {site.name: site for site in (Site("L00.mlp_in", 0, "mlp_in", 4), Site("L00.mlp_out", 0, "mlp_out", 4))}
KL: dict[str, Any] = {"objective": "kl"}


@pytest.mark.parametrize("unit", ["mse", "sum"])
@pytest.mark.parametrize(
    ("settings", "train"),
    [(COUNT, KL), (COUNT | {"aux": 0.0, "aux_divisor": "none"}, KL), (L1, {"objective": "ce", "mode": "clean_input"})],
)
def test_a_unit_in_which_nothing_is_measured_is_refused(
    settings: dict[str, Any], train: dict[str, Any], unit: Any
) -> None:
    idle = DictionaryConfig(n_latents=8, loss=unit, **settings)
    plan_runs("run", DictionaryConfig(n_latents=8, **settings), TrainConfig(**train), SITES, {})
    with pytest.raises(UserError, match=r"dictionary.loss is .* no effect .*local_weight above 0"):
        plan_runs("run", idle, TrainConfig(**train), SITES, {})


@pytest.mark.parametrize(
    ("settings", "train"),
    [
        (COUNT, {}),
        (COUNT, KL | {"local_weight": 0.1}),
        (COUNT | {"aux_divisor": "none"}, KL),
        ({"firing": "gated", "sparsity": 0.1}, KL),
    ],
)
def test_a_unit_in_which_something_is_measured_is_taken(settings: dict[str, Any], train: dict[str, Any]) -> None:
    assert plan_runs("run", DictionaryConfig(n_latents=8, loss="sum", **settings), TrainConfig(**train), SITES, {})
