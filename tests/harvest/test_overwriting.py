"""What an edit overwrites whatever it was need not be computed: the same logits, by fewer products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harvest.conftest import MODELS
from thresher.cache.contracts import Edit, Overwriting
from thresher.harvest.hooking import limited
from thresher.harvest.target import TransformerTarget

Make = Callable[[str], TransformerTarget]
TOKENS = torch.arange(3, 3 + 2 * 12).view(2, 12)
PATCHED = torch.ones(2, 12, dtype=torch.bool).index_fill(1, torch.tensor([0, 7]), False)


def writing(value_D: Tensor) -> Edit:
    return lambda x_BTD: torch.where(PATCHED[..., None], value_D.to(x_BTD), x_BTD)


def elsewhere(patch_BT: Tensor) -> Tensor:
    return (~patch_BT).flatten().nonzero()[:, 0]


def rows_multiplied(target: TransformerTarget, run: Callable[[], Any]) -> int:
    """Tokens that went through the linear layers of all MLPs in one pass."""
    seen = [0]
    modules = [
        module
        for layer in range(target.n_layers)
        if (point := target.structure.mlp_output(layer)) is not None
        for name, module in target.model.get_submodule(point.module).named_modules()
        if "Linear" in type(module).__name__ or "Conv1D" in type(module).__name__
    ]
    hooks = [
        m.register_forward_hook(lambda m, a, o: seen.__setitem__(0, seen[0] + a[0][..., 0].numel())) for m in modules
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", MODELS)
def test_leaving_out_what_is_overwritten_changes_no_logit(name: str, tiny_target: Make) -> None:
    target = tiny_target(name)
    if "mlp_out" in target.structure.table.lacking:
        pytest.skip("no site to overwrite")
    values = torch.randn(target.n_layers, 64, generator=torch.Generator().manual_seed(0))
    sites = target.sites(["mlp_out"])
    whole = {site.name: writing(values[site.layer, : site.width]) for site in sites}
    sparing = {name: Overwriting(edit, elsewhere(PATCHED)) for name, edit in whole.items()}
    before = [dict(module.__dict__) for module in target.model.modules()]
    with torch.no_grad():
        torch.testing.assert_close(target.logits(TOKENS, sparing), target.logits(TOKENS, whole), rtol=1e-5, atol=1e-5)
    assert [dict(module.__dict__).keys() for module in target.model.modules()] == [each.keys() for each in before]


@pytest.mark.parametrize("patched", [PATCHED, torch.ones_like(PATCHED)])
def test_an_mlp_computes_only_the_positions_that_are_kept(patched: Tensor, tiny_target: Make) -> None:
    target = tiny_target("gpt2")
    (site,) = target.sites(["L01.mlp_out"])
    edit = writing(torch.zeros(site.width))
    all_rows = rows_multiplied(target, lambda: target.logits(TOKENS, {site.name: edit}))
    some = rows_multiplied(target, lambda: target.logits(TOKENS, {site.name: Overwriting(edit, elsewhere(patched))}))
    kept = max(1, int((~patched).sum()))
    matrices = all_rows // (target.n_layers * TOKENS.numel())
    assert all_rows - some == matrices * (TOKENS.numel() - kept)


def test_an_mlp_that_somebody_looks_into_computes_all(tiny_target: Make) -> None:
    target = tiny_target("gpt2")
    sites = target.sites(["L01.mlp_hidden", "L01.mlp_out"])
    seen: list[Tensor] = []
    edits: dict[str, Edit] = {
        sites[0].name: lambda x: seen.append(x.clone()),
        sites[1].name: Overwriting(writing(torch.zeros(sites[1].width)), elsewhere(PATCHED)),
    }
    with torch.no_grad():
        target.logits(TOKENS, edits)
    assert torch.equal(seen[0], target.record(TOKENS, sites[:1])[sites[0].name])


def test_modules_are_whole_again_after_an_error(tiny_target: Make) -> None:
    target = tiny_target("gpt2")
    (site,) = target.sites(["L00.mlp_out"])
    clean = target.logits(TOKENS)

    def fail(x_BTD: Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        target.logits(TOKENS, {site.name: Overwriting(fail, elsewhere(PATCHED))})
    assert torch.equal(target.logits(TOKENS), clean)


class Two(nn.Module):
    """Needs all its rows: a second argument, or an output that is no tensor."""

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Any:
        return (x, x.sum()) if beside is None else x + beside


@pytest.mark.parametrize("arguments", [1, 2])
def test_a_module_of_another_form_computes_all(arguments: int) -> None:
    holder = nn.ModuleDict({"mlp": Two()})
    x = torch.randn(2, 3, 4)
    with limited(holder, {"mlp": torch.tensor([1])}):
        out = holder["mlp"](*[x] * arguments)
    whole = Two()(*[x] * arguments)
    assert torch.equal(out if arguments == 2 else out[0], whole if arguments == 2 else whole[0])
    assert arguments == 2 or torch.equal(out[1], whole[1])
