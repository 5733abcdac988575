"""Settings of a decomposition's components, gates and losses, as part of the recipe's [dictionary] table.

What a decomposition does not take is refused here too: it has no decoder rows, no reconstruction loss and no training
space, so most settings of the other topologies would have no effect.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thresher.cache.errors import UserError

if TYPE_CHECKING:
    from thresher.train.config import TrainConfig

Activation = Literal["gelu_tanh", "gelu", "relu", "silu"]


@dataclass(frozen=True, kw_only=True)
class Components:
    """Settings that only a decomposition has."""

    components: tuple[int, ...] | None = None
    """decomposition: number C of components of the MLP's first and of its second matrix."""
    gate_width: int = 1024
    """decomposition: hidden width of the network that gives a layer's gates."""
    gate_threshold: float = 0.0
    """decomposition: a component is active where its gate exceeds this; 0 ≤ value < 1. Training does not depend on
    it."""
    mlp_width: int | None = None
    """decomposition: neurons of the target's MLPs; four times the width of the site read when not given."""
    mlp_activation: Activation = "gelu_tanh"
    """decomposition: nonlinearity of the target's MLPs."""
    faithfulness: float = 1e6
    """decomposition: coefficient of the mean squared entry of what the components leave of the matrices."""
    faithfulness_warmup: int = 400
    """decomposition: AdamW steps at 1e-3 on that loss alone, before the first step of the run."""
    minimality_beta: float = 0.1
    """decomposition: weight β of the logarithmic part of the minimality loss, whose coefficient is `sparsity`."""
    minimality_p: tuple[float, ...] = (2.0, 0.4)
    """decomposition: exponent of gates in the minimality loss, in the first step and after the last; a straight line
    between them."""
    subset: float = 0.5
    """decomposition: coefficient of the stochastic-subset loss, the KL divergence under random masks."""


FIELDS = tuple(field.name for field in dataclasses.fields(Components))

_TAKEN = {"kind", "reads", "writes", "layers", "firing", "sparsity", "penalty", "dead_after", *FIELDS}
_OFF: dict[str, tuple[object, ...]] = {"normalise": ("scale", "none"), "aux": (0.03125, 0.0)}
"""Of the settings that mean nothing to a decomposition, values that do not ask for anything either."""


def check_components(config: Any) -> None:
    """Raise UserError for a [dictionary] table that makes no sense for a decomposition."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _TAKEN and value not in _OFF.get(field.name, (field.default,)):
            raise UserError(
                f"dictionary.{field.name} is {value!r} for kind = 'decomposition', to which it means nothing: its "
                "components are of the target's own matrices, chosen by gates, trained on raw activations through the "
                "model. Remove it."
            )
    if config.firing != "gate":
        raise UserError(
            f"dictionary.firing is {config.firing!r} for kind = 'decomposition', whose components are chosen by gates. "
            "Remove it, or set firing = 'gate'."
        )
    check_values(config)


def check_values(settings: Components) -> None:
    """Raise UserError for values out of range."""
    numbers = settings.components or ()
    if len(numbers) != 2 or min(numbers) < 1:
        raise UserError(
            f"dictionary.components is {settings.components and list(settings.components)} for kind = 'decomposition'; "
            "expected two numbers from 1 on: components of the MLP's first and of its second matrix."
        )
    for name in ("gate_width", "mlp_width"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"dictionary.{name} is {value}; expected 1 or more.")
    for name in ("faithfulness", "faithfulness_warmup", "minimality_beta"):
        if getattr(settings, name) < 0:
            raise UserError(f"dictionary.{name} is {getattr(settings, name)}; expected 0 or more.")
    if not settings.subset > 0:
        raise UserError(
            f"dictionary.subset is {settings.subset:g}; expected more than 0: nothing else keeps the model's "
            "predictions, and all gates would close."
        )
    if not 0 <= settings.gate_threshold < 1:
        raise UserError(f"dictionary.gate_threshold is {settings.gate_threshold:g}; expected 0 ≤ value < 1.")
    if len(settings.minimality_p) != 2 or min(settings.minimality_p) <= 0:
        raise UserError(
            f"dictionary.minimality_p is {list(settings.minimality_p)}; expected two numbers above 0, of the first "
            "step and of the last."
        )


def check_training(train: "TrainConfig") -> None:
    """Raise UserError for a [train] table under which a decomposition cannot be trained."""
    reasons = {
        "objective": (("kl",), "it is trained through the model, on the KL divergence under random masks"),
        "mode": (("cascade",), "all matrices are masked in one pass, on the stream as it then is"),
        "local_weight": ((0.0,), "it has no reconstruction loss at a site"),
        "optimiser": (("adam", "adamw"), "the clipping of components alone is written for these"),
        "dtype": (("auto", "float32"), "its products are float32"),
        "micro_rows": ((None,), "the minimality loss takes means over the whole batch; take a smaller batch_rows"),
        "init_from": ((None,), "it begins from the target's matrices"),
    }
    for name, (fine, why) in reasons.items():
        value = getattr(train, name)
        if value not in fine:
            expected = " or ".join("none" if each is None else repr(each) for each in fine)
            raise UserError(
                f"train.{name} is {value!r} with dictionary.kind = 'decomposition'; expected {expected}: {why}."
            )
