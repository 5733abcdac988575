"""The weights of an MLP that is two matrices with a nonlinearity between them; any other is refused with the reason.

Which modules hold the matrices is what transformer-lens, or our own model, says; that they make the MLP's output is
tried out on random inputs and not taken for granted.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.cache.contracts import MLPMatrices
from thresher.cache.errors import UserError
from thresher.harvest.structure import Structure

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
_TRIED = 16  # random rows
_TOLERANCE = 1e-9


@torch.no_grad()
def read_matrices(model: nn.Module, structure: Structure, layer: int) -> MLPMatrices:
    """The MLP of a layer. Raises UserError for one that is gated, in parts that have no module, or anything else."""
    stem = f"The MLP of layer {layer} of this {type(model).__name__} cannot be decomposed"
    if structure.gated_mlp:
        raise UserError(f"{stem}: it is gated, a product of two projections. Use another target.")
    modules = [
        None if found is None else model.get_submodule(found[1].module)
        for part in ("in", "out")
        for found in [structure.table.hooks.get(f"blocks.{layer}.mlp.{part}.hook_in")]
    ]
    whole = structure.mlp_output(layer)
    pairs = [_matrix(module) for module in modules]
    if structure.norm_after_mlp:
        raise UserError(f"{stem}: a norm follows it before mlp_out. Use another target.")
    if whole is None or pairs[0] is None or pairs[1] is None:
        raise UserError(f"{stem}: no modules hold its two matrices. Expected linear layers; use another target.")
    (first_HD, first_H), (second_EH, second_E) = pairs[0], pairs[1]
    weights = [weight.double() for weight in (first_HD, first_H, second_EH, second_E)]
    mlp = copy.deepcopy(model.get_submodule(whole.module)).double()  # or rounding would hide which nonlinearity it is
    rng = torch.Generator().manual_seed(0)
    x_ND = torch.randn(_TRIED, first_HD.shape[1], generator=rng).to(weights[0])
    try:
        true_NE = mlp(x_ND[None])
    except TypeError:  # it takes more than its input, BLOOM's the residual stream
        true_NE = None
    for name, act in _ACTIVATIONS.items():
        made_NE = act(x_ND @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
        fits = isinstance(true_NE, Tensor) and true_NE.shape == (1, *made_NE.shape)
        if fits and float((true_NE[0] - made_NE).norm()) <= _TOLERANCE * float(made_NE.norm()):
            return MLPMatrices(first_HD, first_H, second_EH, second_E, name)
    raise UserError(
        f"{stem}: on random inputs it is not two matrices with one of {', '.join(_ACTIVATIONS)} between them. "
        "Use another target."
    )


def _matrix(module: Any) -> tuple[Tensor, Tensor] | None:
    """[out, in] and bias of a linear layer; GPT-2's has the weight the other way round."""
    if isinstance(module, nn.Linear):
        weight = module.weight.detach()
    elif type(module).__name__ == "Conv1D":
        weight = module.weight.detach().T
    else:
        return None
    return weight, weight.new_zeros(weight.shape[0]) if module.bias is None else module.bias.detach()
