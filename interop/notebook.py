"""A trained dictionary in a notebook: dense codes from any shape of activations, hooks for a transformer-lens model.

    sae = thresher.load("runs/mine/sae-topk-k32-L08")
    _, acts = bridge.run_with_cache("The captain looked at the sea.")
    z = sae.encode(acts)                                   # [1, T, F]
    logits = bridge.run_with_hooks(tokens, fwd_hooks=sae.hooks())

Codes come from the dictionary's one `encode`; only their form differs. A dictionary that reads one site takes a tensor
or a mapping of activations; one that reads several takes a mapping, or tensors in the order of its sources. A mapping
may have transformer-lens's hook names (an `ActivationCache`) or our site names (`Target.record`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from thresher.cache.contracts import Codes
from thresher.cache.errors import UserError
from thresher.interop.hooks import hook_name
from thresher.train.dictionary.coder import Coder
from thresher.train.files import load_run

T = TypeVar("T")
Hook = Callable[..., Tensor | None]


class Acts(Protocol):
    """Activations [..., width] by name."""

    def __getitem__(self, name: str, /) -> Tensor: ...


class Loaded(nn.Module):
    """A finished run, acting on raw activations [..., D] of any leading shape, without gradient."""

    def __init__(self, dictionary: Coder, config: dict[str, Any]) -> None:
        super().__init__()
        self.dictionary = dictionary
        self.config = config
        """config.json of the run: recipe, cache, versions, what training came to."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.dictionary.name

    @property
    def n_latents(self) -> int:
        """F, per source."""
        return self.dictionary.n_latents

    @property
    def hooks_in(self) -> tuple[tuple[str, ...], ...]:
        """By source, transformer-lens's names of the sites that it reads."""
        return tuple(tuple(hook_name(site) for site in sites) for sites in self.dictionary.inputs)

    @property
    def hooks_out(self) -> tuple[str, ...]:
        """By destination, transformer-lens's name of the site that it writes."""
        return tuple(hook_name(site) for site in self.dictionary.writes)

    @property
    def hook_in(self) -> str:
        """The one site read. Raises UserError where there are several."""
        return self._only([name for names in self.hooks_in for name in names], "reads", "hooks_in")

    @property
    def hook_out(self) -> str:
        """The one site written. Raises UserError where there are several."""
        return self._only(self.hooks_out, "writes", "hooks_out")

    def encode(self, x: Tensor | Sequence[Tensor] | Acts) -> Tensor:
        """[..., F] dense codes. Raises UserError where there are several sources: `encode_all`."""
        return self._only(self.encode_all(x), "reads", "encode_all")

    def encode_all(self, x: Tensor | Sequence[Tensor] | Acts) -> tuple[Tensor, ...]:
        """[..., F] dense codes by source."""
        xs = self._inputs(x)
        return tuple(codes.dense().unflatten(0, one.shape[:-1]) for codes, one in zip(self._codes(xs), xs, strict=True))

    def codes(self, x: Tensor | Sequence[Tensor] | Acts) -> tuple[Codes, ...]:
        """Sparse codes by source, leading dimensions flattened: the form for wide dictionaries."""
        return self._codes(self._inputs(x))

    def decode(self, z: Tensor, x: Tensor | Sequence[Tensor] | Acts | None = None) -> Tensor:
        """[..., E] reconstruction in raw units from dense codes; `x` as in `decode_all`.

        Raises UserError where there are several sources or destinations: `decode_all`.
        """
        return self._only(tuple(self.decode_all([z], x).values()), "writes", "decode_all")

    def decode_all(self, z: Sequence[Tensor], x: Tensor | Sequence[Tensor] | Acts | None = None) -> dict[str, Tensor]:
        """[..., E] reconstructions in raw units by hook name, from dense codes by source.

        `x`: what was encoded; needed where more than the codes goes into a reconstruction (a skip connection, a
        mixture of linear transforms, per-token normalisation). Raises UserError where it is and was not given.
        """
        if len(z) != len(self.dictionary.inputs):
            raise UserError(
                f"{self.name} has {len(self.dictionary.inputs)} sources and was given codes of {len(z)}. Give what "
                "encode_all returns."
            )
        given = [sparse(one.flatten(0, -2)) for one in z]
        if x is not None:
            base = self.codes(x)
        else:
            self._check_free_of_inputs()
            base = tuple(given)
        parts = [own._replace(frame=of.frame, x=of.x) for own, of in zip(given, base, strict=True)]
        return self._written(parts, z[0].shape[:-1])

    def forward(self, x: Tensor | Sequence[Tensor] | Acts) -> Tensor:
        """[..., E] reconstruction. Raises UserError where there are several destinations: `forward_all`."""
        return self._only(tuple(self.forward_all(x).values()), "writes", "forward_all")

    def forward_all(self, x: Tensor | Sequence[Tensor] | Acts) -> dict[str, Tensor]:
        """[..., E] reconstructions by hook name."""
        xs = self._inputs(x)
        return self._written(self._codes(xs), xs[0].shape[:-1])

    if TYPE_CHECKING:  # nn.Module's own says nothing of what comes out

        def __call__(self, x: Tensor | Sequence[Tensor] | Acts) -> Tensor: ...

    def hooks(self) -> list[tuple[str, Hook]]:
        """`fwd_hooks` for transformer-lens that put the reconstructions in the place of what the dictionary writes.

        Each is made from what the dictionary reads in that same pass. Raises UserError for a dictionary that reads
        later sites than it writes, which cannot run along.
        """
        if not self.dictionary.causal:
            raise UserError(
                f"{self.name} is a {self.dictionary.spec.kind}: it reads sites behind those it writes, so it cannot "
                "run along in a forward pass. Use its `forward` on cached activations."
            )
        seen: dict[int, Codes] = {}

        def read(source: int) -> Hook:
            def hook(tensor: Tensor, **_: object) -> None:
                seen[source] = self._encoded(source, tensor)

            return hook

        def write(destination: int) -> Hook:
            def hook(tensor: Tensor, **_: object) -> Tensor:
                parts = [seen[source] for source in self.dictionary.sources(destination)]
                return self.dictionary.decode(destination, parts).view_as(tensor).to(tensor)

            return hook

        reads = [(names[0], read(source)) for source, names in enumerate(self.hooks_in)]
        return [*reads, *((name, write(j)) for j, name in enumerate(self.hooks_out))]

    def _inputs(self, x: Tensor | Sequence[Tensor] | Acts) -> list[Tensor]:
        """[..., D] by source. Raises UserError for other sites or widths than it reads."""
        inputs = self.dictionary.inputs
        if isinstance(x, Tensor):
            xs = [x]
        elif isinstance(x, (list, tuple)):
            xs = list(x)
        else:
            xs = [torch.cat([_taken(x, site, self.name) for site in sites], dim=-1) for sites in inputs]  # type: ignore[arg-type]
        if len(xs) != len(inputs):
            raise UserError(
                f"{self.name} reads {len(inputs)} sites and was given {len(xs)} tensors. Give a mapping of "
                f"activations, or one tensor for each of {', '.join(self.dictionary.reads)}."
            )
        width = self.dictionary.spec.d_in
        for one in xs:
            if one.shape[-1] != width:
                raise UserError(
                    f"{self.name} reads activations of width {width}, got shape {list(one.shape)}. Give activations "
                    f"of {', '.join(self.dictionary.reads)}."
                )
        return xs

    def _codes(self, xs: Sequence[Tensor]) -> tuple[Codes, ...]:
        return tuple(self._encoded(source, x) for source, x in enumerate(xs))

    @torch.no_grad()
    def _encoded(self, source: int, x: Tensor) -> Codes:
        """Codes of activations of any shape, dtype and device, on the dictionary's own."""
        return self.dictionary.encode(source, x.flatten(0, -2).to(self.dictionary.b_dec))

    def _written(self, parts: Sequence[Codes], shape: torch.Size) -> dict[str, Tensor]:
        coder = self.dictionary
        return {
            name: coder.decode(j, [parts[s] for s in coder.sources(j)]).unflatten(0, shape)
            for j, name in enumerate(self.hooks_out)
        }

    def _check_free_of_inputs(self) -> None:
        coder = self.dictionary
        if coder.W_skip is not None or not coder.by_rows or coder.spec.normalise == "per_token":
            raise UserError(
                f"decode of {self.name} needs the activations that were encoded, since they go into its reconstruction "
                "beside the codes. Pass them as decode(z, x), or call forward(x)."
            )

    def _only(self, found: Sequence[T], verb: str, plural: str) -> T:
        if len(found) > 1:
            raise UserError(f"{self.name} {verb} {len(found)} sites. Use {plural}.")
        return found[0]


def load(run: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """A finished run directory as a module. Raises UserError for a directory that is none, is unfinished or damaged."""
    found = load_run(Path(run), device)
    return Loaded(found.dictionary, found.config)


def sparse(z_NF: Tensor) -> Codes:
    """The entries > 0 of dense codes."""
    rows, latents = torch.nonzero(z_NF > 0, as_tuple=True)
    counts = torch.bincount(rows, minlength=z_NF.shape[0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(z_NF[rows, latents], latents, offsets, z_NF.shape[1])


def _taken(acts: Acts, site: str, name: str) -> Tensor:
    for key in (site, hook_name(site)):
        try:
            return acts[key]
        except (KeyError, ValueError):
            continue
    raise UserError(
        f"{name} reads {site}, which is not among the activations given, neither by that name nor as "
        f"{hook_name(site)}. Record that site too."
    )
