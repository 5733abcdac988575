"""The two matrices of an MLP: that they make its output, and what is refused."""

from collections.abc import Callable

import pytest
import torch

from tests.harvest.conftest import MODELS
from thresher.cache.errors import UserError
from thresher.harvest.target import TransformerTarget

Make = Callable[[str], TransformerTarget]
TAKEN = {"gpt2": "gelu_tanh", "gpt_neox": "gelu", "simple_mlp": "gelu_tanh"}


@pytest.mark.parametrize("name", TAKEN)
def test_the_matrices_make_the_mlps_output_of_its_input(name: str, tiny_target: Make) -> None:
    target = tiny_target(name)
    tokens = torch.arange(3, 27).view(2, 12)
    seen = target.record(tokens, target.sites(["mlp_in", "mlp_out"]))
    for layer in range(2):
        found = target.mlp_matrices(layer)
        assert found.activation == TAKEN[name]
        approximate = "tanh" if found.activation == "gelu_tanh" else "none"
        hidden = seen[f"L0{layer}.mlp_in"] @ found.first.T + found.first_bias
        out = torch.nn.functional.gelu(hidden, approximate=approximate) @ found.second.T + found.second_bias
        torch.testing.assert_close(out, seen[f"L0{layer}.mlp_out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama", "it is gated"),
        ("gemma2", "it is gated"),
        ("opt", "no modules hold"),
        ("bloom", "it is not two matrices"),
    ],
)
def test_any_other_mlp_is_refused_with_the_reason(name: str, why: str, tiny_target: Make) -> None:
    assert name in MODELS
    with pytest.raises(UserError, match=why):
        tiny_target(name).mlp_matrices(0)
