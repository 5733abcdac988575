"""Toy models to be harvested: those trained on the study's task, and those whose solution is known by construction.

`mlp` is the study's model; `stack` shares its task between the layers of a residual stream. `embed`, `chain` and `xor`
are written down. Inputs are drawn from the seed when a model is harvested, not here.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.records import nearest
from thresher.toy.inputs import Inputs, batches, stream
from thresher.toy.labels import Labels, label_rows
from thresher.toy.model import initial_weights
from thresher.toy.training import Fit, train

CHAIN_FEATURES, CHAIN_LAYERS, CHAIN_GAIN = 20, 4, 0.5
PAIRS = 8
EMBED_WIDTH = 50


class Stack(NamedTuple):
    """Layers on a residual stream."""

    w_in: Tensor
    """[L, D, H]."""
    w_out: Tensor
    """[L, H, D]."""
    mode: Literal["bernoulli", "single", "pairs"]
    p: float
    about: str
    embedding: Tensor | None = None
    """[features, D]."""
    mixing: Tensor | None = None
    """[D, D] σM of the label of the first layer."""


def trained_mlp(fit: Fit) -> Stack:
    """The study's model."""
    made = train([fit])[0]
    about = (
        f"{fit.neurons} ReLUs asked for {fit.inputs.features}: {fit.inputs.label} inputs, {fit.labels.kind} labels, "
        f"σ = {made.scale:g}, {fit.steps} steps, seed {fit.seed}"
    )
    mixing = made.scale * fit.matrix
    mode = fit.inputs.mode
    return Stack(made.weights.w_in, made.weights.w_out, mode, fit.inputs.rate, about, mixing=mixing)


def trained_stack(fit: Fit, layers: int) -> Stack:
    """Layers of equal size that together add the label to the stream, trained by autograd like the study's model."""
    if fit.neurons % layers:
        raise UserError(
            f"toy.neurons is {fit.neurons} for {layers} layers; expected a multiple, since they are divided equally."
        )
    features, matrix, scale = fit.inputs.features, fit.matrix, fit.labels.scale
    begun = initial_weights(features, fit.neurons, fit.seed)
    w_in = begun.w_in[0].unflatten(1, (layers, -1)).permute(1, 0, 2).clone().requires_grad_()
    w_out = begun.w_out[0].unflatten(0, (layers, -1)).clone().requires_grad_()
    optimiser = torch.optim.AdamW([w_in, w_out], lr=fit.lr, weight_decay=fit.weight_decay)
    rng = stream(fit.seed, "training")
    for step, batch in zip(range(fit.steps), batches(fit.inputs, fit.batch, rng), strict=False):
        optimiser.param_groups[0]["lr"] = fit.lr * 0.5 * (1 + math.cos(math.pi * step / fit.steps))
        x_RD = batch.x
        for layer in range(layers):
            x_RD = x_RD + (x_RD @ w_in[layer]).relu() @ w_out[layer]
        error_RD = x_RD - batch.x - label_rows(batch.x, matrix, scale)
        optimiser.zero_grad()
        (error_RD.square().sum() / (batch.rows * features)).backward()
        optimiser.step()
    about = (
        f"{layers} layers of {fit.neurons // layers} ReLUs on a residual stream, together asked for {features}: "
        f"{fit.inputs.label} inputs, σ = {scale:g}, {fit.steps} steps, seed {fit.seed}"
    )
    return Stack(w_in.detach(), w_out.detach(), fit.inputs.mode, fit.inputs.rate, about, mixing=scale * matrix)


def embedded(seed: int = 0, features: int = 100, width: int = EMBED_WIDTH) -> Stack:
    """x W_E with unit rows and fewer dimensions than features, behind it a neuron per feature that reads its row.

    What an SAE of the stream should find are the rows of W_E, with either sign.
    """
    rows = stream(seed, "mixing").standard_normal((features, width))
    embedding = torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    about = f"{features} features along random unit vectors of {width} dimensions; a neuron reads each of them"
    return Stack(embedding.T[None], embedding[None], "bernoulli", 0.01, about, embedding=embedding)


def chain(features: int = CHAIN_FEATURES, layers: int = CHAIN_LAYERS) -> Stack:
    """Every layer adds half of every positive feature to it again.

    A CLT needs one latent per feature, which writes to all layers; transcoders need one in each.
    """
    unit = torch.eye(features).expand(layers, -1, -1)
    about = f"{layers} layers that each add {CHAIN_GAIN} relu(x) of {features} features to the stream"
    return Stack(unit.clone(), CHAIN_GAIN * unit, "bernoulli", 0.1, about)


def xor(pairs: int = PAIRS) -> Stack:
    """Pairs of bits a, b: layer 0 computes a AND b = relu(a + b - 1), layer 1 a XOR b = relu(a + b - 2 (a AND b)).

    Rows are [a…, b…, 1]; the stream has room for both results behind them. A CLT may bypass layer 0's result, since
    relu(a - b) + relu(b - a) is XOR too.
    """
    features, width = 2 * pairs + 1, 4 * pairs + 1
    w_in, w_out = torch.zeros(2, width, pairs), torch.zeros(2, pairs, width)
    for i in range(pairs):
        a, b, one, conjunction, result = i, pairs + i, 2 * pairs, 2 * pairs + 1 + i, 3 * pairs + 1 + i
        w_in[:, [a, b], i] = 1
        w_in[0, one, i] = -1
        w_in[1, conjunction, i] = -2
        w_out[0, i, conjunction] = 1
        w_out[1, i, result] = 1
    about = f"AND in layer 0 and XOR in layer 1 of {pairs} pairs of bits"
    return Stack(w_in, w_out, "pairs", 0.3, about, embedding=torch.eye(features, width))


def _standard(seed: int, steps: int) -> Fit:
    return Fit(inputs=Inputs(p=0.01), labels=Labels(scale=0.02), steps=steps, seed=seed)


TARGETS: dict[str, Callable[[int, int], Stack]] = {
    "mlp": lambda seed, steps: trained_mlp(_standard(seed, steps)),
    "stack": lambda seed, steps: trained_stack(_standard(seed, steps), 2),
    "embed": lambda seed, steps: embedded(seed),
    "chain": lambda seed, steps: chain(),
    "xor": lambda seed, steps: xor(),
}
"""By name; called with a seed and a number of training steps, which those written down have no use for."""


def made(name: str, seed: int, steps: int) -> Stack:
    """The target of a name. Raises UserError for an unknown one."""
    if name not in TARGETS:
        raise UserError(
            f"There is no toy target {name!r}.{nearest(name, TARGETS)} Expected one of {', '.join(TARGETS)}."
        )
    return TARGETS[name](seed, steps)
