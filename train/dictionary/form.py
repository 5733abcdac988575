"""What a topology is before it computes anything: what it reads and writes, which settings it takes, what it refuses.

Recipes are checked against these facts without a dictionary being built. coder.py adds weights, encoding and decoding;
a topology's own class overrides what differs there or here.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from thresher.train.config import TrainConfig
from thresher.train.dictionary import drawing
from thresher.train.dictionary.spec import DictionaryConfig, DictionarySpec, check_one_size, latents_asked


class Form(nn.Module):
    """One source, one destination."""

    causal: ClassVar[bool] = True
    """Whether the model reaches all that a destination is computed from before that destination."""
    joint: ClassVar[bool] = False
    """Whether one dictionary takes all matched sites; otherwise there is one for each match."""
    own_site: ClassVar[bool] = False
    """Whether it reconstructs what it reads."""
    raw_codes: ClassVar[bool] = False
    """Whether codes fold to raw units where normalisation is one factor (fold.py)."""
    by_rows: ClassVar[bool] = True
    """Whether what a latent writes is a row of W_dec, the same for every token."""
    unit_rows: ClassVar[bool] = False
    """Whether `decoder = "auto"` keeps rows at norm 1."""
    admits: ClassVar[frozenset[str]] = frozenset()
    """Of the settings that only some topologies take (special.py), those that this one does."""
    firing: ClassVar[str] = "batchtopk"
    """The firing rule of `firing = "auto"`."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Firing rules that make no sense here, with the reason."""
    decomposes: ClassVar[bool] = False
    """Whether it is made of the target's matrices, and trained by train/endtoend/decomposed.py."""
    shareable: ClassVar[bool] = False
    """Whether several processes may hold its latents in shares (holding.py): what it writes is a sum over latents."""
    starts: ClassVar[tuple[str, str]] = ("width", "zero")
    """Initial encoder and decoder of `"auto"` (drawing.py)."""

    spec: DictionarySpec
    """What was asked for, with everything resolved."""
    label: str
    """The run's name."""

    # How sites become sources and destinations, and what a recipe may ask for.

    @classmethod
    def inputs_of(cls, reads: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """By source, the sites that it reads, of all that are read."""
        return tuple((site,) for site in reads)

    @classmethod
    def width(cls, site: int, sites: int) -> int:
        """D of a source, from the width of the sites read and their number."""
        return site

    @classmethod
    def check(cls, config: DictionaryConfig) -> None:
        """Raise UserError for a recipe's table that makes no sense here."""
        check_one_size(config)

    @classmethod
    def check_spec(cls, spec: DictionarySpec) -> None:
        """The same with widths and sites known."""
        drawing.resolved(spec, cls.starts)

    @classmethod
    def check_training(cls, train: TrainConfig) -> None:
        """Raise UserError for a recipe's [train] table under which it cannot be trained."""

    @classmethod
    def sizes(cls, config: DictionaryConfig, width: int) -> dict[str, object]:
        """`n_latents`, and whatever else of a spec follows from a recipe's table and the width of a site read."""
        return {"n_latents": latents_asked(config, width)}

    @classmethod
    def work(cls, spec: DictionarySpec) -> int:
        """Multiply-adds of the largest product, per token."""
        return spec.d_in * spec.n_latents

    def written(self, source: int) -> range:
        """Indices of the destinations that a source writes."""
        return range(1)

    def sources(self, destination: int) -> range:
        """Indices of the sources that write to a destination."""
        return range(1)

    def explained(self, source: int) -> range:
        """Indices of the destinations whose residual AuxK lets a source's dead latents explain: its own."""
        return range(source, source + 1)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.label

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the sites read."""
        return self.spec.reads

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """By source, the sites that it reads."""
        return self.inputs_of(self.spec.reads)

    @property
    def writes(self) -> tuple[str, ...]:
        """Site names of the destinations."""
        return self.spec.writes

    @property
    def n_latents(self) -> int:
        """F, per source."""
        return self.spec.n_latents

    @property
    def n_parameters(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())
