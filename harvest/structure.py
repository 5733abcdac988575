"""Which module of a Hugging Face model holds each tensor that transformer-lens names.

transformer-lens knows some 150 architectures: what their blocks, norms and MLPs are called, which run attention and MLP
in parallel, which put a norm after the MLP. Its bridge replaces modules by wrappers, though, and recomputes attention
so that patterns can be hooked: on the bundled model the wrappers alone take the forward pass to 1.5 times its time, and
reading through their hooks to 2.1. So the bridge is built around a copy of the model without weights (on the meta
device, some 0.1 s), asked which module lies behind each hook, and thrown away; the real model runs unwrapped, with
plain forward hooks on those modules. A model of our own (`NativeModel`) is asked itself; all that follows is the same.

Left out: tensors that exist only inside a module or only in the bridge's recomputation (attention patterns, the split
q, k and v, a norm's scale). Encoder-decoder models.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from thresher.cache.errors import UserError
from thresher.harvest.sites import TAPS, Point, SiteTable

# Tap: hook names inside a block, the first that is the input or output of a module counts. `hook_mlp_in` is not among
# them: transformer-lens means by it the residual stream before the norm.
HOOKS = {
    "resid_pre": ("hook_resid_pre",),
    "resid_mid": ("hook_resid_mid",),
    "mlp_in": ("mlp.hook_in", "mlp.in.hook_in"),
    "mlp_hidden": ("mlp.out.hook_in",),
    "mlp_out": ("hook_mlp_out",),
    "resid_post": ("hook_resid_post",),
}
SIDES: dict[str, Literal["in", "out"]] = {"hook_in": "in", "hook_out": "out"}
LOGITS_UNSEEN = "These are the logits, which recording never computes. Use ln_final.hook_out."


class Hooks(NamedTuple):
    """What can be hooked in one model, under transformer-lens's names."""

    n_layers: int
    seen: Mapping[str, tuple[str, Point]]
    """As `SiteTable.hooks`."""
    unseen: Mapping[str, str]
    """As `SiteTable.unseen`."""
    parallel: bool = False
    """As `Structure.parallel`."""


class NativeModel(nn.Module, ABC):
    """A causal language model of our own, or a toy, which says itself where its tensors are.

    Called with `input_ids` [B, T], it returns an object with `logits` [B, T, V]. Its `config` has `n_ctx`.
    """

    @abstractmethod
    def hooks(self) -> Hooks:
        """Hook names and their modules, the six taps' among them where the architecture has them."""

    @abstractmethod
    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens, with a `weight` of as many rows as there are token ids."""


class Structure(NamedTuple):
    """What is known of one model."""

    table: SiteTable
    parallel: bool
    """Attention and MLP read the same residual stream and are added together."""
    attn_out: Mapping[int, Point]
    """Per layer, what the block adds to the residual stream for its attention, where a module returns it."""
    norm_after_mlp: bool
    """`mlp_out` is taken behind a norm that follows the MLP, since that is what is added."""
    gated_mlp: bool
    """A neuron of the MLP is a product of two projections of its input, one of them behind the nonlinearity."""

    def mlp_output(self, layer: int) -> Point | None:
        """What the MLP's own module returns, before any norm that follows; None where no module is the MLP."""
        hook = self.table.hooks.get(f"blocks.{layer}.mlp.hook_out")
        return None if hook is None else hook[1]


def read_structure(model: nn.Module) -> Structure:
    """The structure of a causal language model; `model` itself stays as it is.

    Raises UserError for an architecture that is neither ours nor one that transformer-lens has an adapter for.
    """
    n_layers, seen, unseen, parallel = model.hooks() if isinstance(model, NativeModel) else _asked(model)
    architecture = type(model).__name__
    taps = {
        (layer, tap): seen[hook][1]
        for layer in range(n_layers)
        for tap in TAPS
        for hook in [f"blocks.{layer}.{name}" for name in HOOKS[tap] if f"blocks.{layer}.{name}" in seen][:1]
    }
    present = {tap for _, tap in taps}
    lacking = {tap: _reason(tap, architecture, parallel, unseen) for tap in TAPS if tap not in present}
    attn_out = {layer: seen[hook][1] for layer in range(n_layers) if (hook := f"blocks.{layer}.hook_attn_out") in seen}
    canonical_out = seen.get("blocks.0.hook_mlp_out", ("", None))[0]
    return Structure(
        SiteTable(n_layers, taps, lacking, seen, unseen),
        parallel,
        attn_out,
        canonical_out.endswith("ln2_post.hook_out"),
        "mlp_hidden" in present and any(hook.endswith(".mlp.gate.hook_out") for hook in (*seen, *unseen)),
    )


def _asked(model: nn.Module) -> Hooks:
    """What transformer-lens knows of a Hugging Face model."""
    architecture = type(model).__name__
    try:
        bridge, paths = _bridge(model, "meta")
    except NotImplementedError:  # adapters that split fused matrices need memory behind them, though not the values
        bridge, paths = _bridge(model, "cpu")
    except (ValueError, KeyError) as error:
        raise UserError(
            f"target.model is a {architecture}, which transformer-lens cannot map: {str(error).splitlines()[0][:200]} "
            "Expected a causal language model of an architecture that it supports, such as GPT-2, GPT-NeoX (Pythia), "
            "Llama, Gemma, Qwen or Mistral, or a LlamaSimpleMLP."
        ) from error
    return Hooks(len(bridge.blocks), *_points(bridge, paths), "Parallel" in type(bridge.blocks[0]).__name__)


def _bridge(model: nn.Module, device: str) -> tuple[Any, dict[int, str]]:
    """A bridge around a weightless copy, and the copy's module paths by id, taken before the bridge rearranged it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    with torch.device("meta"):
        copied = type(model)(copy.deepcopy(model.config))
    if device != "meta":
        copied = copied.to_empty(device=device)  # untouched pages of it take no memory
    paths = {id(module): path for path, module in copied.named_modules()}
    return build_bridge_from_module(copied, type(model).__name__, hf_config=copied.config), paths


def _points(bridge: Any, paths: Mapping[int, str]) -> tuple[dict[str, tuple[str, Point]], dict[str, str]]:
    """Hook names that are a side of a module of the model, and why the others are not."""
    seen: dict[str, tuple[str, Point]] = {}
    unseen: dict[str, str] = {}
    for hook, hook_point in bridge.hook_dict.items():
        canonical = str(hook_point.name)
        point = _point(bridge, canonical, paths)
        if canonical == "unembed.hook_out":
            unseen[hook] = LOGITS_UNSEEN
        elif point is None:
            unseen[hook] = (
                "transformer-lens has this hook, but the tensor is no input or output of a module of the Hugging Face "
                "model: it exists only inside one, or only in transformer-lens's own attention. Hooks that end in "
                "hook_in or hook_out, such as blocks.0.attn.hook_out, can be recorded."
            )
        else:
            seen[hook] = (canonical, point)
    return seen, unseen


def _point(bridge: Any, canonical: str, paths: Mapping[int, str]) -> Point | None:
    *owners, end = canonical.split(".")
    if end not in SIDES or not owners:
        return None
    chain = list(_components(bridge, owners))
    module = getattr(chain[-1], "original_component", None)
    # A component can stand for several modules without having one of its own (OPT's MLP): it then points at its parent.
    if len(chain) > 1 and getattr(chain[-2], "original_component", None) is module:
        return None
    path = paths.get(id(module))
    return None if path is None else Point(path, SIDES[end])


def _components(bridge: Any, names: list[str]) -> Iterator[Any]:
    here = bridge
    for name in names:
        here = here[int(name)] if name.isdigit() else getattr(here, name)
        yield here


def _reason(tap: str, architecture: str, parallel: bool, unseen: Mapping[str, str]) -> str:
    if tap == "resid_mid" and parallel:
        return (
            f"{architecture} adds attention and MLP to the residual stream in parallel, so there is no resid_mid. Use "
            "resid_pre for what the MLP's norm reads, or mlp_in for what the MLP reads."
        )
    if tap == "mlp_out" and "blocks.0.hook_mlp_out" in unseen:
        return (
            f"{architecture} scales the MLP's output inside the block before adding it, so no module returns it. Use "
            "blocks.*.mlp.hook_out for the output before that scale."
        )
    if tap == "mlp_hidden" and any(hook.endswith(".mlp.hook_router_scores") for hook in unseen):
        return (
            f"{architecture} sends each token to some of many experts, so no matrix multiplies the neurons of all "
            "tokens. Use mlp_in or mlp_out."
        )
    return f"transformer-lens finds no such tensor in {architecture}. Use another tap or a hook name."


def tap_faults(structure: Structure, taken: Mapping[Point, Tensor]) -> dict[tuple[int, str], str]:
    """Taps whose recorded tensors [1, T, D] are not what their names promise, and why.

    `mlp_in` must be what the MLP's first matrix multiplies. `mlp_out` must be the difference that the MLP makes to the
    residual stream: resid_post = resid_mid + mlp_out, or resid_pre + attention's output + mlp_out where both run in
    parallel. A tap of which some part was not recorded is left unchecked.
    """
    taps, hooks, faults = structure.table.taps, structure.table.hooks, {}
    for layer in range(structure.table.n_layers):
        read = taken.get(taps.get((layer, "mlp_in"), _NOWHERE))
        for first in ("in", "gate"):
            multiplied = taken.get(hooks.get(f"blocks.{layer}.mlp.{first}.hook_in", ("", _NOWHERE))[1])
            if read is None or multiplied is None or multiplied.shape != read.shape:
                continue
            if not torch.allclose(multiplied, read, rtol=1e-3, atol=1e-5):
                faults[layer, "mlp_in"] = "the MLP's first matrix multiplies something else than the MLP is given"
        before = [taps.get((layer, "resid_mid"), _NOWHERE)]
        if structure.parallel:
            before = [taps.get((layer, "resid_pre"), _NOWHERE), structure.attn_out.get(layer, _NOWHERE)]
        parts = [taps.get((layer, "resid_post"), _NOWHERE), taps.get((layer, "mlp_out"), _NOWHERE), *before]
        if all(part in taken for part in parts) and not _adds_up(*(taken[part] for part in parts)):
            for tap in ("resid_mid", "mlp_out"):
                faults[layer, tap] = "the residual stream before and after the MLP does not differ by what it returns"
    return faults


def hidden_faults(structure: Structure, model: nn.Module, taken: Mapping[Point, Tensor]) -> dict[tuple[int, str], str]:
    """As `tap_faults`, for `mlp_hidden`: the module that reads it must be a matrix (with a bias), and what it makes of
    the recorded tensor [1, T, D] must be the MLP's output, before a norm or scale that follows.

    That output is `mlp_out`, or what the MLP's module returns: BLOOM's adds the residual stream too, Gemma 2's is
    followed by a norm.
    """
    taps, faults = structure.table.taps, {}
    for layer in range(structure.table.n_layers):
        point = taps.get((layer, "mlp_hidden"), _NOWHERE)
        if point not in taken:
            continue
        hidden, matrix = taken[point], model.get_submodule(point.module)
        with torch.inference_mode():
            out, turned, both, none = (
                matrix(x) for x in (hidden, -hidden.flip(1), hidden - hidden.flip(1), 0 * hidden)
            )
        size = out.float().norm(dim=-1)
        if not _close(out + turned, both + none, size + size.flip(1)):
            faults[layer, "mlp_hidden"] = "what follows the MLP's neurons is no matrix"
        wholes = [taps.get((layer, "mlp_out"), _NOWHERE), structure.mlp_output(layer) or _NOWHERE]
        returned = [taken[whole] for whole in wholes if whole in taken]
        if returned and not any(_close(whole, out, size) for whole in returned):
            faults[layer, "mlp_hidden"] = "the MLP's last matrix times its neurons is not what the MLP returns"
    return faults


_NOWHERE = Point("", "in")


def _close(x: Tensor, y: Tensor, size: Tensor) -> bool:
    """Whether two tensors [1, T, D] are equal at every position, within the rounding of numbers of some size [1, T]."""
    tolerance = 1e-3 + 8 * torch.finfo(x.dtype).eps
    return x.shape == y.shape and bool(((x.float() - y.float()).norm(dim=-1) <= tolerance * size).all())


def _adds_up(whole: Tensor, added: Tensor, *rest: Tensor) -> bool:
    """Whether whole = added + the rest within rounding, at every position but the first, whose size hides errors."""
    eps = torch.finfo(whole.dtype).eps
    whole, added, *others = (x[:, 1:].float() for x in (whole, added, *rest))
    error = (whole - added - sum(others)).norm(dim=-1)
    return bool((error <= 0.05 * added.norm(dim=-1) + 4 * eps * whole.norm(dim=-1)).all())
