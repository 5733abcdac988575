"""Toy MLPs as a target: layers of relu(x W_in) W_out on a residual stream, without biases, attention or norms.

    x ← x W_E;  for every layer  x ← x + relu(x W_in) W_out;  the output is x

A token is the number of an input row (`toy_inputs`), so a context is some rows that know nothing of each other, and
what comes out in the place of logits is the output vector: there is no vocabulary, and cross-entropy means nothing. An
optional label, relu(x) + x (σM)ᵀ of a layer's input, is a tensor of its own (`blocks.0.hook_label`) that no one reads.

Without biases the model is linear along a ray: `truths` follows both ends ±e_i of every input feature through it and
so knows exactly what a dictionary should find at every site.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from thresher.cache.contracts import Truths
from thresher.cache.errors import UserError
from thresher.cache.publish import publish
from thresher.cache.records import from_dict, to_dict
from thresher.harvest.sites import Point
from thresher.harvest.structure import Hooks, NativeModel
from thresher.harvest.toy_inputs import ROWS, ToyInputs, input_rows

ARCHITECTURE = "ToyStack"
N_CTX = 64


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Sizes and inputs of a toy model."""

    features: int
    """Width of an input row."""
    width: int
    """Of the residual stream; that of a row where there is no embedding."""
    n_layer: int
    neurons: int
    """Of a layer."""
    embedded: bool = False
    """Whether rows are multiplied by W_E first."""
    labelled: bool = False
    """Whether there is a label beside the first layer."""
    n_ctx: int = N_CTX
    """Rows of a context."""

    def __post_init__(self) -> None:
        for name in ("features", "width", "n_layer", "neurons", "n_ctx"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of a {ARCHITECTURE} is {getattr(self, name)}; expected at least 1.")
        if not self.embedded and self.width != self.features:
            raise UserError(
                f"width of a {ARCHITECTURE} is {self.width} with {self.features} features; expected the same without "
                "an embedding. Set embedded, with W_E in the weights."
            )


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor
    """[B, T, D]: the residual stream at the end."""


class InputRows(nn.Module):
    """Numbers to rows, times W_E where there is one."""

    def __init__(self, config: ToyConfig, inputs: ToyInputs) -> None:
        super().__init__()
        self.inputs, self.features = inputs, config.features
        shape = (config.features, config.width) if config.embedded else (1, config.width)
        self.embedding = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.embedded = config.embedded

    @property
    def weight(self) -> Tensor:
        """[rows, D]: as many rows as there are numbers, without their values."""
        return self.embedding[:1].expand(ROWS, -1)

    def forward(self, rows: Tensor) -> Tensor:
        """[B, T] to [B, T, D]."""
        return self.place(input_rows(self.inputs, rows, self.features).to(self.embedding.dtype))

    def place(self, x: Tensor) -> Tensor:
        """Rows of features in the stream."""
        return x @ self.embedding if self.embedded else x


class Matrix(nn.Module):
    """x W."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[…, rows] to […, columns]."""
        return x @ self.weight


class ToyMLP(nn.Module):
    """relu(x W_in) W_out."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.w_in = Matrix(config.width, config.neurons)
        self.w_out = Matrix(config.neurons, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        return self.w_out(torch.relu(self.w_in(x)))


class ToyLabel(nn.Module):
    """relu(x) + x (σM)ᵀ."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.zeros(width, width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        return torch.relu(x) + x @ self.mixing.T


class ToyBlock(nn.Module):
    """An MLP, added to the residual stream."""

    def __init__(self, config: ToyConfig, labelled: bool) -> None:
        super().__init__()
        self.label = ToyLabel(config.width) if labelled else None
        self.mlp = ToyMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        out = x + self.mlp(x)
        if self.label is not None:
            self.label(x)
        return out


class ToyStack(NativeModel):
    """The model; weights are zeros until they are set."""

    def __init__(self, config: ToyConfig, inputs: ToyInputs) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        self.rows = InputRows(config, inputs)
        self.h = nn.ModuleList(ToyBlock(config, config.labelled and layer == 0) for layer in range(config.n_layer))

    def forward(self, input_ids: Tensor) -> Output:
        """The output of rows [B, T], by number."""
        return Output(self.after(self.rows(input_ids)))

    def after(self, x: Tensor) -> Tensor:
        """The output of streams […, D]."""
        for block in self.h:
            x = block(x)
        return x

    def get_input_embeddings(self) -> nn.Module:
        """Where rows come from."""
        return self.rows

    def hooks(self) -> Hooks:
        """As `NativeModel.hooks`."""
        seen: dict[str, tuple[str, Point]] = {"hook_embed": ("hook_embed", Point("rows", "out"))}
        for layer in range(self.config.n_layer):
            here, block = f"blocks.{layer}.", f"h.{layer}"
            points = {
                "hook_resid_pre": Point(block, "in"),
                "mlp.hook_in": Point(f"{block}.mlp", "in"),
                "mlp.out.hook_in": Point(f"{block}.mlp.w_out", "in"),
                "mlp.hook_out": Point(f"{block}.mlp", "out"),
                "hook_mlp_out": Point(f"{block}.mlp", "out"),
                "hook_resid_post": Point(block, "out"),
            }
            if layer == 0 and self.config.labelled:
                points["hook_label"] = Point(f"{block}.label", "out")
            seen |= {f"{here}{name}": (f"{here}{name}", point) for name, point in points.items()}
        return Hooks(self.config.n_layer, seen, {})

    def probes(self) -> tuple[Tensor, Tensor]:
        """[T, D] streams that each hold one truth, and the streams that they differ from by it alone.

        ±e_i of every feature. Under `pairs`: a without b, b without a, and both, for features i and i + n/2.
        """
        features = self.config.features
        unit = torch.eye(features, dtype=self.rows.embedding.dtype, device=self.rows.embedding.device)
        base = torch.zeros_like(unit[:1])
        if self.inputs.mode != "pairs":
            return self.rows.place(torch.cat([unit, -unit])), self.rows.place(base)
        base = unit[-1:]
        half = (features - 1) // 2
        a, b = unit[:half], unit[half : 2 * half]
        return self.rows.place(torch.cat([a, b, a + b]) + base), self.rows.place(base)

    def present(self, rows_N: Tensor) -> Tensor:
        """[N, T] bool: which of `probes` each row holds."""
        x_ND = input_rows(self.inputs, rows_N.to(self.rows.embedding.device), self.config.features)
        if self.inputs.mode != "pairs":
            return torch.cat([x_ND > 0, x_ND < 0], dim=1)
        half = (self.config.features - 1) // 2
        a, b = x_ND[:, :half] > 0, x_ND[:, half : 2 * half] > 0
        return torch.cat([a & ~b, b & ~a, a & b], dim=1)


def truths(model: ToyStack, names: dict[str, Point]) -> Truths:
    """What every site holds of every truth, by following `probes` through the model."""
    seen: dict[Point, Tensor] = {}
    handles = []
    for point in set(names.values()):
        module = model.get_submodule(point.module)
        if point.side == "in":
            handles.append(
                module.register_forward_pre_hook(lambda _, args, point=point: seen.__setitem__(point, args[0]))
            )
        else:
            handles.append(module.register_forward_hook(lambda *args, point=point: seen.__setitem__(point, args[2])))
    probes_TD, base_1D = model.probes()
    sides = []
    for x in (probes_TD, base_1D):
        seen.clear()
        model.after(x)
        seen.setdefault(Point("rows", "out"), x)
        sides.append({name: seen[point].detach().double() for name, point in names.items()})
    for handle in handles:
        handle.remove()
    directions = {name: sides[0][name] - sides[1][name] for name in names}
    label = "features, by sign" if model.inputs.mode != "pairs" else "patterns of pairs"
    return Truths(label, directions, model.present)


def built(
    inputs: ToyInputs, w_in: Tensor, w_out: Tensor, embedding: Tensor | None = None, mixing: Tensor | None = None
) -> ToyStack:
    """A model of these weights: [L, D, H] and [L, H, D], W_E [features, D] and σM [D, D] where there are any."""
    layers, width, neurons = w_in.shape
    config = ToyConfig(
        features=width if embedding is None else embedding.shape[0],
        width=width,
        n_layer=layers,
        neurons=neurons,
        embedded=embedding is not None,
        labelled=mixing is not None,
    )
    model = ToyStack(config, inputs)
    tensors = {f"h.{layer}.mlp.w_in.weight": w_in[layer] for layer in range(layers)}
    tensors |= {f"h.{layer}.mlp.w_out.weight": w_out[layer] for layer in range(layers)}
    if embedding is not None:
        tensors["rows.embedding"] = embedding
    if mixing is not None:
        tensors["h.0.label.mixing"] = mixing
    model.load_state_dict(tensors, strict=False)
    return model


def is_toy(folder: Path) -> bool:
    """Whether a directory's config.json describes a toy model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("architecture") == ARCHITECTURE


def load_toy(folder: Path) -> ToyStack:
    """The model of a directory, float32 on the CPU. Raises UserError for tensors that are not its own."""
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    inputs = from_dict(ToyInputs, raw.pop("inputs", {}), f"{path}: inputs")
    raw.pop("architecture")
    raw.pop("about", None)
    model = ToyStack(from_dict(ToyConfig, raw, str(path)), inputs)
    stored, wanted = load_file(folder / "model.safetensors"), _tensors(model)
    if {key: tensor.shape for key, tensor in stored.items()} != {key: tensor.shape for key, tensor in wanted.items()}:
        raise UserError(
            f"target.model: {folder / 'model.safetensors'} does not hold the {ARCHITECTURE} of its config.json: got "
            f"{_shapes(stored)}; expected {_shapes(wanted)}. Write it again with `thresher toy target`."
        )
    model.load_state_dict(stored, strict=False)
    return model


def save_toy(model: ToyStack, folder: Path, about: str) -> None:
    """Write weights and then config.json, which makes the directory a model; `about` is a sentence for readers."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().float().contiguous() for key, tensor in _tensors(model).items()}
    publish(folder / "model.safetensors", [save(tensors, metadata={"format": "pt"})])
    document = {"architecture": ARCHITECTURE, "about": about, **to_dict(model.config), "inputs": to_dict(model.inputs)}
    publish(folder / "config.json", [json.dumps(document, indent=1).encode()])


def _tensors(model: ToyStack) -> dict[str, Tensor]:
    return {
        key: tensor
        for key, tensor in model.state_dict().items()
        if model.config.embedded or not key.startswith("rows.")
    }


def _shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(tensors.items()))
