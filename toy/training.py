"""Training of many toy models in one call.

AdamW, cosine to 0 over all steps, squared error averaged over batch and outputs (toy.md §3). Models that agree in
inputs, batch, steps and seed see the same rows and begin from the same weights; they differ in their labels. Of them
everything is stacked: weights, gradients, AdamW's moments. A step is five batched products over a block of models that
fits the cache, then one fused update of all.

The gradient is written out (`gradients`): autograd would keep four tensors [K, R, D] that need not exist. Its plain
reference is `autograd_gradients`, and `inputs.batches(merge=False)` that of the merged rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted, StopFlag
from thresher.toy.inputs import Inputs, batches, stream
from thresher.toy.labels import Labels, label_rows, mixing_matrix
from thresher.toy.model import Weights, initial_weights, stacked

BLOCK_FLOATS = 1 << 18
"""Floats of one tensor [K, R, D] of a block: 1 MiB, so that what a step touches stays in a core's cache."""
TOLD_EVERY = 200
"""Steps between two calls of `told`."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What one model is trained on, and how."""

    inputs: Inputs
    labels: Labels
    neurons: int = 50
    """H."""
    steps: int = 10_000
    batch: int = 2048
    """Rows of a step."""
    lr: float = 3e-3
    weight_decay: float = 1e-2
    seed: int = 0
    """Of mixing matrix, inputs and weights."""
    weights_seed: int | None = None
    """Of the weights alone; left out: `seed`."""

    def __post_init__(self) -> None:
        for name in ("neurons", "steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"toy.{name} is {getattr(self, name)}; expected at least 1.")

    @property
    def matrix(self) -> Tensor:
        """M [D, D] of the labels."""
        return mixing_matrix(self.labels, self.inputs.features, self.neurons, self.seed)


class Trained(NamedTuple):
    """A trained model."""

    fit: Fit
    weights: Weights
    """One model."""
    scale: float
    """|σ| at the end: the learned one, or the given."""
    losses: Tensor
    """[T] loss of every step on its batch, not divided by p."""


class Task(NamedTuple):
    """The labels of K models."""

    mixing: Tensor
    """[U, D, D] the distinct matrices M."""
    which: tuple[int, ...]
    """Which of them each model has, in ascending order."""
    scale: Tensor
    """[K] σ."""

    def on(self, start: int, stop: int) -> "Task":
        """The models from start to stop."""
        return Task(self.mixing, self.which[start:stop], self.scale[start:stop])


class Gradients(NamedTuple):
    """Of the mean squared error."""

    w_in: Tensor
    """[K, D, H]."""
    w_out: Tensor
    """[K, H, D]."""
    scale: Tensor
    """[K], of σ through the labels."""
    loss: Tensor
    """[K]."""


def mixed_rows(task: Task, x_RD: Tensor) -> Tensor:
    """x Mᵀ, [U, R, D], of every distinct M; zeros where M is."""
    return x_RD @ task.mixing.mT


def gradients(weights: Weights, x_RD: Tensor, rows: int, task: Task, mixed_URD: Tensor) -> Gradients:
    """Loss and gradients of K models on rows that stand for `rows`; |σ| is in the label."""
    wanted_RD = -x_RD.clamp(min=0)
    error_KRD = torch.empty(weights.models, *x_RD.shape, dtype=x_RD.dtype)
    sigma_K = task.scale.abs()
    runs = _runs(task.which)
    for u, low, high in runs:
        torch.addcmul(wanted_RD, mixed_URD[u], -sigma_K[low:high, None, None], out=error_KRD[low:high])
    hidden_KRH = torch.matmul(x_RD, weights.w_in).clamp_(min=0)
    error_KRD.baddbmm_(hidden_KRH, weights.w_out)
    factor = 2 / (rows * x_RD.shape[1])
    out_KHD = torch.bmm(hidden_KRH.mT, error_KRD).mul_(factor)
    back_KRH = torch.bmm(error_KRD, weights.w_out.mT).mul_(hidden_KRH > 0)
    in_KDH = torch.matmul(x_RD.T, back_KRH).mul_(factor)
    flat_KA = error_KRD.flatten(1)
    slope_K = torch.cat([flat_KA[low:high] @ mixed_URD[u].flatten() for u, low, high in runs])
    loss_K = torch.linalg.vector_norm(flat_KA, dim=1).square_().mul_(factor / 2)
    return Gradients(in_KDH, out_KHD, -factor * task.scale.sign() * slope_K, loss_K)


def autograd_gradients(weights: Weights, x_RD: Tensor, rows: int, task: Task) -> Gradients:
    """What `gradients` must return, by autograd and one model at a time."""
    out: list[tuple[Tensor, ...]] = []
    for k, u in enumerate(task.which):
        w_in, w_out, scale = (
            part.detach().clone().requires_grad_() for part in (weights.w_in[k], weights.w_out[k], task.scale[k])
        )
        y_RD = x_RD.clamp(min=0) + scale.abs() * (x_RD @ task.mixing[u].T)
        loss = ((x_RD @ w_in).clamp(min=0) @ w_out - y_RD).square().sum() / (rows * x_RD.shape[1])
        out.append((*torch.autograd.grad(loss, (w_in, w_out, scale)), loss.detach()))
    return Gradients(*(torch.stack(parts) for parts in zip(*out, strict=True)))


def train(
    fits: Sequence[Fit],
    *,
    start: Weights | None = None,
    told: Callable[[int], None] | None = None,
    stop: StopFlag | None = None,
) -> list[Trained]:
    """Train models that share inputs, batch, steps, rates and seed, and differ in their labels.

    `start`: weights [K, …] to go on from. `told` is called with the number of steps since its last call. Raises
    UserError for fits that share no stream, Interrupted when `stop` is set.
    """
    first = fits[0]
    _check_shared(fits)
    task, order = _task(fits)
    began = start or stacked([initial_weights(first.inputs.features, first.neurons, _of_weights(fit)) for fit in fits])
    parameters = [
        began.w_in[order].clone(),
        began.w_out[order].clone(),
        task.scale.clone(),
    ]
    learned = torch.tensor([fits[k].labels.learn_scale for k in order])
    optimiser = torch.optim.AdamW(
        [torch.nn.Parameter(each) for each in (parameters if learned.any() else parameters[:2])],
        lr=first.lr,
        betas=(0.9, 0.999),
        weight_decay=first.weight_decay,
        fused=True,
    )
    tensors = optimiser.param_groups[0]["params"]
    weights = Weights(tensors[0].detach(), tensors[1].detach())
    scale_K = tensors[2].detach() if learned.any() else task.scale
    task = task._replace(scale=scale_K)
    fixed_K = scale_K.clone()
    history: list[Tensor] = []
    rng = stream(first.seed, "training")
    for step, batch in zip(range(first.steps), batches(first.inputs, first.batch, rng), strict=False):
        grads = _blockwise(weights, batch.x, batch.rows, task)
        for tensor, grad in zip(tensors, grads, strict=False):
            tensor.grad = grad
        optimiser.param_groups[0]["lr"] = first.lr * 0.5 * (1 + math.cos(math.pi * step / first.steps))
        optimiser.step()
        if learned.any() and not learned.all():
            scale_K[~learned] = fixed_K[~learned]
        history.append(grads.loss)
        if (step + 1) % TOLD_EVERY == 0 or step + 1 == first.steps:
            if told is not None:
                told(step % TOLD_EVERY + 1)
            if stop is not None and stop.requested and step + 1 < first.steps:
                raise Interrupted("stopped between two steps of training; models that were finished are kept")
    losses_KT = torch.stack(history, 1)
    out: dict[int, Trained] = {}
    for place, k in enumerate(order):
        kept = Weights(*(tensor.clone() for tensor in weights.part(place)))
        scale = float(scale_K[place].abs()) if fits[k].labels.learn_scale else abs(fits[k].labels.scale)
        out[k] = Trained(fits[k], kept, scale, losses_KT[place].clone())
    return [out[k] for k in range(len(fits))]


def loss_of(weights: Weights, x_RD: Tensor, mixing_DD: Tensor, scale: float) -> Tensor:
    """[K, R] squared error per row, averaged over outputs."""
    hidden_KRH = torch.matmul(x_RD, weights.w_in).clamp_(min=0)
    error_KRD = torch.baddbmm(label_rows(x_RD, mixing_DD, scale)[None], hidden_KRH, weights.w_out, beta=-1)
    return error_KRD.square().mean(2)


def _of_weights(fit: Fit) -> int:
    return fit.seed if fit.weights_seed is None else fit.weights_seed


def _blockwise(weights: Weights, x_RD: Tensor, rows: int, task: Task) -> Gradients:
    """`gradients` in blocks of models."""
    mixed_URD = mixed_rows(task, x_RD)
    size = max(1, BLOCK_FLOATS // x_RD.numel())
    if size >= weights.models:
        return gradients(weights, x_RD, rows, task, mixed_URD)
    parts = [
        gradients(weights.part(slice(low, low + size)), x_RD, rows, task.on(low, low + size), mixed_URD)
        for low in range(0, weights.models, size)
    ]
    return Gradients(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _runs(which_K: Sequence[int]) -> list[tuple[int, int, int]]:
    """(M, first model, one past the last) of neighbours that have the same M."""
    out: list[tuple[int, int, int]] = []
    for k, u in enumerate(which_K):
        if out and out[-1][0] == u:
            out[-1] = (u, out[-1][1], k + 1)
        else:
            out.append((u, k, k + 1))
    return out


def _task(fits: Sequence[Fit]) -> tuple[Task, list[int]]:
    """The labels, and the order of models in which those of one M are neighbours."""
    matrices: list[Tensor] = []
    which: list[int] = []
    for fit in fits:
        matrix = fit.matrix
        found = next((u for u, known in enumerate(matrices) if torch.equal(known, matrix)), len(matrices))
        if found == len(matrices):
            matrices.append(matrix)
        which.append(found)
    order = sorted(range(len(fits)), key=lambda k: which[k])
    scale_K = torch.tensor([fits[k].labels.scale for k in order])
    return Task(torch.stack(matrices), tuple(which[k] for k in order), scale_K), order


def _check_shared(fits: Sequence[Fit]) -> None:
    for fit in fits:
        for name in ("inputs", "neurons", "steps", "batch", "lr", "weight_decay", "seed"):
            if getattr(fit, name) != getattr(fits[0], name):
                raise UserError(
                    f"toy.{name} is {getattr(fits[0], name)!r} of one model and {getattr(fit, name)!r} of another that "
                    "is to be trained with it; expected the same, since they share their rows. Train them apart."
                )
