"""Forward hooks that read or replace one side of a module.

A module's input is its first tensor argument (by keyword `hidden_states` when nothing is positional); its output is
what it returns, or the first tensor of a returned tuple. Some models flatten contexts around their MLP: such a
[B·T, D] tensor is shown as [B, T, D] and put back as it was.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thresher.cache.contracts import Edit
from thresher.harvest.sites import Point

Visit = Callable[[Tensor], Tensor | None]
"""Gets the tensor as the model has it; what it returns takes the tensor's place, None leaves it."""


Keep = Callable[[Point, Tensor], Tensor]
"""Gets what is recorded at a point, and gives what is to stay of it."""


class PassEnded(Exception):  # noqa: N818 - no error: everything wanted has been seen
    """Cuts a forward pass short."""


@contextmanager
def attached(model: nn.Module, visits: Iterable[tuple[Point, Visit]]) -> Iterator[None]:
    """Visit points during the block. Visits of one side of one module run in the order given."""
    handles: list[RemovableHandle] = []
    try:
        handles += [_attach(model, point, visit) for point, visit in visits]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(model: nn.Module, point: Point, visit: Visit) -> RemovableHandle:
    module = model.get_submodule(point.module)
    if point.side == "in":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            position, key = _first(args, kwargs)
            if key is not None:
                new = visit(kwargs[key])
                return None if new is None else (args, {**kwargs, key: new})
            new = visit(args[position])
            return None if new is None else ((*args[:position], new, *args[position + 1 :]), kwargs)

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return visit(output)
        new = visit(output[0])
        return None if new is None else (new, *output[1:])

    return module.register_forward_hook(after)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, str | None]:
    """Where the first tensor is: (its position, None), or (0, its keyword)."""
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor):
            return position, None
    keys = ["hidden_states", *kwargs]
    return 0, next(key for key in keys if isinstance(kwargs.get(key), Tensor))


def batched(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B, T, D] of a tensor that may come as [B·T, D]; anything else as it is."""
    return x.view(*shape, -1) if x.dim() == 2 and x.shape[0] == shape[0] * shape[1] else x


def taking(
    taken: dict[Point, Tensor], point: Point, shape: tuple[int, ...], last_of: int = 0, keep: Keep | None = None
) -> Visit:
    """Put the tensor, or what `keep` makes of it, into `taken`; end the pass with the `last_of`th (0: never)."""

    def visit(x: Tensor) -> None:
        x = batched(x, shape)
        taken[point] = x if keep is None else keep(point, x)
        if len(taken) == last_of:
            raise PassEnded

    return visit


@contextmanager
def limited(model: nn.Module, names: Mapping[str, Tensor]) -> Iterator[None]:
    """Let modules that work on every token alone, by name, compute only some positions [M] of the flattened [B, T]; the
    others are zero.

    A module that is called with more than one tensor, or returns anything else, computes all.
    """
    modules = [(model.get_submodule(name), rows_M) for name, rows_M in names.items()]
    before = [(module, module.__dict__.get("forward")) for module, _ in modules]
    try:
        for module, rows_M in modules:
            module.forward = _limited(module.forward, rows_M)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _limited(forward: Callable[..., Any], rows_M: Tensor) -> Callable[..., Any]:
    some_M = rows_M if len(rows_M) else rows_M.new_zeros(1)  # to learn the output's width and format

    def limited_forward(*args: Any, **kwargs: Any) -> Any:
        inputs = [*args, *kwargs.values()]
        if len(inputs) > 1 or not isinstance(inputs[0], Tensor):
            return forward(*args, **kwargs)
        (x,) = inputs
        rows_MD = x.flatten(0, -2).index_select(0, some_M)
        given = rows_MD if x.dim() == 2 else rows_MD[None]
        found = forward(given) if args else forward(**dict.fromkeys(kwargs, given))
        if not isinstance(found, Tensor):
            return forward(*args, **kwargs)
        out = found.new_zeros(*x.shape[:-1], found.shape[-1])
        out.view(-1, out.shape[-1]).index_copy_(0, some_M, found.view(-1, out.shape[-1]))
        return out

    return limited_forward


def editing(edit: Edit, shape: tuple[int, ...], where: str) -> Visit:
    """Show the tensor as [B, T, D] to `edit` and put its result back in the model's own shape."""

    def visit(x: Tensor) -> Tensor | None:
        new = edit(batched(x, shape))
        if new is None:
            return None
        assert new.numel() == x.numel(), f"an edit of {where} returned {list(new.shape)} for {list(x.shape)}"
        return new.view(x.shape).to(x)

    return visit
