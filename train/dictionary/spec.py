"""What a dictionary is: the recipe's [dictionary] table, and the concrete shape it takes on given sites.

`DictionaryConfig` is what a user writes; sites are patterns there and sizes may be relative. `DictionarySpec` is the
same with everything resolved, as stored in a run's config.json: the module is built from it alone. A combination that
would silently mean something else than it says is refused here, with the reason.
"""

import dataclasses
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, cast

from thresher.cache.errors import UserError
from thresher.train.dictionary import rules
from thresher.train.dictionary.components import Components
from thresher.train.dictionary.idle import refuse_idle
from thresher.train.dictionary.layerwise import of_layers
from thresher.train.dictionary.objective import Objective, check_objective, check_prefix_ends, prefix_ends
from thresher.train.dictionary.special import check_topology
from thresher.train.dictionary.topologies import topology
from thresher.train.normalise import Mode

Penalty = Literal["l1", "l0", "target_l0", "tanh", "lp", "minimality"]


@dataclass(frozen=True, kw_only=True)
class _Settings(Objective, Components):
    """Settings that a recipe and a concrete dictionary share."""

    firing: str = "auto"
    """Firing rule, of those below or of a --plugin. topk: the k largest per token; groupmax: the largest of each of k
    groups of neighbours; batchtopk: k per token on average over the batch, and a frozen threshold afterwards; global:
    all above one threshold, driven to k per token; relu: every positive pre-activation, kept few by an L1 penalty;
    gated: a gate under an L1 penalty and a magnitude of its own; jumprelu: every pre-activation above a learned
    threshold; gate: a decomposition's gates. auto: batchtopk, for molt jumprelu, for decomposition gate."""
    k: float | None = None
    """Active latents per token for topk and groupmax (integer), batchtopk and global (may be fractional), per layer for
    a CLT; the target of the target_l0 penalty."""
    k_anneal: int = 0
    """Optimiser steps over which k comes down from k_start to k in a straight line; 0: it is k from the beginning."""
    k_start: float | Literal["auto"] = "auto"
    """k of the first step under k_anneal; auto: min(F, 10 · width of the site read)."""
    pool: Literal["layer", "joint"] = "layer"
    """batchtopk of a CLT: whether every layer keeps k per token of its own, or all layers k per token and layer
    together, as they need."""
    rank_by: Literal["activation", "norm"] = "activation"
    """topk, groupmax, batchtopk: whether latents compete by pre-activation a or by a · n, n the norm of their decoder
    row over all its targets. Codes are a either way. Not where rows keep norm 1."""
    pre_bias: bool = False
    """SAE only: subtract the decoder's bias from the input before encoding."""
    skip: bool = False
    """transcoder and clt: add a linear map of the layer's own input to each reconstruction, zero at first."""
    norm: Literal["joined", "sum"] = "joined"
    """crosscoder: norm n_f of a latent's row, that of the row over all sites or the sum of its sites' norms."""
    transforms: int | None = None
    """molt: number N of transforms of the first rank (times its multiple); or give n_latents or expansion."""
    ranks: tuple[int, ...] = (512, 256, 128, 64, 32)
    """molt: ranks of the transforms."""
    multiples: tuple[int, ...] | None = None
    """molt: how many times N transforms there are of each rank; 1, 2, 4, … when not given."""
    normalise: Mode = "scale"
    """Training space, from the cache's statistics: none, raw activations; scale, one factor per site that makes the
    mean norm √d; per_dim, every dimension centred and divided by its standard deviation. Saved weights act on raw
    activations anyway. per_token (SAE only): every row centred and divided by its own standard deviation, in training
    and whenever the dictionary is used; per_token_in (not SAE, crosscoder): what is read alone."""
    penalty: Penalty | None = None
    """Sparsity penalty: l1 (default) or lp for relu; l0 (default), target_l0 or tanh for jumprelu; minimality for
    gate."""
    sparsity: float = 0.0
    """Coefficient of the sparsity penalty, beside a reconstruction loss in the unit of `loss`."""
    tanh_scale: float = 1.0
    """Factor c in the tanh penalty Σ tanh(c · n_f · z_f), n_f the decoder row's norm."""
    penalty_warmup: int | Literal["run"] = 0
    """Optimiser steps over which the sparsity penalty rises linearly from 0; run: all of them."""
    preact: float = 0.0
    """jumprelu: coefficient, without warm-up, of the pre-activation loss, which pulls silent latents up to their θ."""
    preact_on: Literal["dead", "all"] = "dead"
    """Latents the pre-activation loss acts on; `all` costs a dense pass per step."""
    theta: float | None = None
    """jumprelu: initial threshold, in standard deviations of the initial pre-activations. Not given: for target_l0 the
    one that k of F normal variables exceed, else 1.5."""
    bandwidth: float = 0.25
    """jumprelu: width ε of the gradient window, in the same unit."""
    theta_unit: Literal["spread", "raw"] = "spread"
    """jumprelu: unit of theta and bandwidth: standard deviations of the initial pre-activations, or what a itself is
    measured in, as published recipes have it."""
    aux: float = 1 / 32
    """Coefficient of AuxK, which lets dead latents explain what is left of the target; 0 turns it off."""
    aux_k: int | None = None
    """Dead latents per token that AuxK uses; half the written width when not given."""
    dead_after: int = 1_000_000
    """Training tokens without firing after which a latent counts as dead."""
    threshold_decay: float = 0.99
    """batchtopk: decay per step of the running mean of the smallest kept value."""
    init_encoder: Literal["auto", "tied", "width", "latents", "kaiming"] = "auto"
    """Initial encoder. tied: the decoder's rows (auto for sae and crosscoder); width: uniform in ±1/√d_in (auto for
    transcoder and molt); latents: in ±1/√F (auto for clt); kaiming: in ±√(6/F)."""
    init_decoder: Literal["auto", "rows", "tied", "zero", "uniform"] = "auto"
    """Initial decoder. rows: random directions of norm 1 (auto for sae and crosscoder); tied: the encoder's rows, where
    widths match (a CLT's for every target); zero (auto for a transcoder with free rows); uniform: in
    ±1/√(layers · d_out) (auto otherwise)."""
    init_b_dec: Literal["mean", "sample_mean", "median", "zero"] = "mean"
    """Initial decoder bias: the destination's mean over the cache, its mean or geometric median over 1024 training
    rows, or 0."""
    init_b_enc: Literal["centred", "zero"] = "centred"
    """Initial encoder bias: such that the encoder sees centred inputs (0 with a pre-bias, which does that), or 0."""


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig(_Settings):
    """The [dictionary] table of a recipe."""

    kind: str = "transcoder"
    """sae: reconstructs the site it reads. transcoder: reads one site, reconstructs another of the same layer.
    clt: cross-layer transcoder over all matched layers; each layer's latents write to that layer and all later ones.
    crosscoder: one code that reads all matched sites at once and reconstructs them. molt: mixture of linear transforms,
    sparsely gated low-rank maps from one site to another. decomposition: components of the two matrices of each MLP,
    trained through the model. Or a topology of your own (--plugin)."""
    reads: str = ""
    """Site the encoder reads: a tap such as `mlp_in`, a site name, a hook name or a glob. Default: `mlp_in`; sae and
    crosscoder read what they write."""
    writes: str = ""
    """Site that is reconstructed; default `mlp_out`."""
    layers: tuple[int, ...] | None = None
    """Layers to use; all that the cache has when not given."""
    k_by_layer: tuple[float, ...] | None = None
    """Where every layer has a dictionary of its own: k of each, ascending by layer, in the place of k."""
    n_latents: int | None = None
    """Number of latents F, per layer for a CLT. Give this or `expansion`. molt: the equivalent number Σ_t r_t of its
    transforms' ranks, from which `transforms` follows."""
    expansion: float | None = None
    """Latents per dimension of the site read: F = expansion · width."""
    decoder: Literal["auto", "unit", "free", "unit_per_target"] = "auto"
    """unit: decoder rows keep norm 1 (over all their destinations together). free: no constraint. auto: unit for SAEs,
    free otherwise. unit_per_target (clt): every layer's part of a row keeps norm 1, so that a latent must write as much
    to each later layer; a fault of published CLTs, for comparison with them."""

    def __post_init__(self) -> None:
        cls = topology(self.kind)
        _settle_firing(self, cls.firing)
        if self.k_by_layer is not None:
            of_layers(self, len(self.k_by_layer))  # which checks the table of each
            return
        cls.check(self)
        if cls.own_site and self.reads and self.writes and self.reads != self.writes:
            raise UserError(
                f"dictionary.kind is {self.kind!r}, which reconstructs what it reads, but reads = {self.reads!r} and "
                f"writes = {self.writes!r}. Give one of them, or set kind = 'transcoder'."
            )
        rules.known(self.firing)
        check_settings(self, self.kind)
        refuse_idle(self)


@dataclass(frozen=True, kw_only=True)
class DictionarySpec(_Settings):
    """One dictionary with everything resolved."""

    kind: str
    """Topology."""
    reads: tuple[str, ...]
    """Names of the sites read, in forward order."""
    writes: tuple[str, ...]
    """Site names of the destinations, in forward order."""
    layers: tuple[int, ...]
    """Layer of each site read."""
    d_in: int
    """Width of every source: its site's, a crosscoder's sites' together."""
    d_out: int
    """Width of every destination."""
    n_latents: int
    """F, per source."""
    unit_norm: bool
    """Whether decoder rows keep norm 1 in training space."""
    unit_per_target: bool = False
    """Whether every destination's part of a decoder row keeps norm 1 instead."""

    def __post_init__(self) -> None:
        cls = topology(self.kind)
        _settle_firing(self, cls.firing)
        check_settings(self, self.kind)
        cls.check_spec(self)
        if self.k is not None and rules.facts(self.firing).by_count and self.k > self.n_latents:
            raise UserError(
                f"dictionary.k is {self.k:g} but the dictionary has only {self.n_latents} latents; lower k or raise "
                "n_latents."
            )
        check_prefix_ends(self, self.n_latents)
        rules.facts(self.firing).check_size(self)
        if self.k_anneal and self.k is not None and not self.k <= self.resolved_k_start <= self.n_latents:
            raise UserError(
                f"dictionary.k_start is {self.resolved_k_start:g}; expected a number from k = {self.k:g} to n_latents "
                f"= {self.n_latents}, since k comes down from there."
            )

    @property
    def prefix_ends(self) -> tuple[int, ...]:
        """Ends of Matryoshka's prefixes, the last F; () without."""
        return prefix_ends(self.prefixes, self.n_latents)

    def check_steps(self, total: int) -> None:
        """Raise UserError for a schedule that a run of so many steps would break off.

        It would end with another k than the dictionary is served with, or with another λ than the recipe names.
        """
        if self.k_anneal > total:
            raise UserError(
                f"dictionary.k_anneal is {self.k_anneal}, but the run has {total} steps, so it would end with "
                f"another k than k = {self.k:g}, under which the dictionary is used. Lower k_anneal or train longer."
            )
        if self.penalty_warmup != "run" and self.penalty_warmup > total:
            raise UserError(
                f"dictionary.penalty_warmup is {self.penalty_warmup}, but the run has {total} steps, so the penalty "
                f"would never weigh sparsity = {self.sparsity:g}. Lower penalty_warmup, set it to 'run' (all steps), "
                "or train longer."
            )

    @property
    def resolved_k_start(self) -> float:
        """k of the first step."""
        if not self.k_anneal and self.k is not None:
            return self.k
        if self.k_start == "auto":
            return float(max(self.k or 0, min(self.n_latents, 10 * self.d_in)))
        return float(self.k_start)

    @property
    def sparsity_label(self) -> str:
        """What sets the sparsity, for tables: `k=32` or `l0 0.002`."""
        penalty = self.resolved_penalty
        if self.k is not None:
            return f"L0*={self.k:g}" if penalty == "target_l0" else f"k={self.k:g}"
        if self.sparsity == 0:  # imported: what made it sparse is not known
            return self.firing
        return f"{penalty or self.firing} {self.sparsity:g}"

    @property
    def resolved_penalty(self) -> Penalty | None:
        """The penalty in force; None for rules that fix their sparsity by count."""
        default = next(iter(rules.facts(self.firing).penalties), None)
        return self.penalty or cast("Penalty | None", default)

    @property
    def resolved_theta(self) -> float:
        """JumpReLU's initial threshold, in standard deviations."""
        if self.theta is not None:
            return self.theta
        if self.resolved_penalty == "target_l0" and self.k is not None and self.k < self.n_latents / 2:
            return max(0.1, NormalDist().inv_cdf(1 - self.k / self.n_latents))
        return 1.5

    @property
    def row_work(self) -> int:
        """Multiply-adds per token of the largest product."""
        return topology(self.kind).work(self)

    @property
    def resolved_aux_k(self) -> int:
        """Dead latents per token in AuxK."""
        return self.aux_k if self.aux_k is not None else max(1, self.d_out // 2)


def concrete(config: DictionaryConfig, **resolved: object) -> DictionarySpec:
    """The spec that carries `config`'s settings and the resolved names and widths."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(_Settings)}
    return DictionarySpec(**(shared | resolved))


def _settle_firing(settings: _Settings, auto: str) -> None:
    if settings.firing == "auto":
        object.__setattr__(settings, "firing", auto)  # frozen, but not yet seen by anyone


def check_one_size(config: DictionaryConfig) -> None:
    """Raise UserError unless the number of latents is told in one way."""
    if (config.n_latents is None) == (config.expansion is None):
        raise UserError(
            "[dictionary] needs exactly one of n_latents and expansion: "
            f"got n_latents = {config.n_latents}, expansion = {config.expansion}. Remove one or add one."
        )
    if config.expansion is not None and config.expansion <= 0:
        raise UserError(f"dictionary.expansion is {config.expansion}; expected a number above 0.")


def latents_asked(config: DictionaryConfig, width: int) -> int:
    """The number of latents that a table asks for, for a site of a width."""
    return config.n_latents if config.n_latents is not None else round((config.expansion or 0) * width)


def check_settings(settings: _Settings, kind: str) -> None:
    """Raise UserError for values out of range and for combinations that make no sense."""
    if settings.firing in rules.names():  # else a saved dictionary of a rule that is not here, checked when trained
        _check_k(settings)
        _check_penalty(settings)
        rules.known(settings.firing).check(settings)
    check_objective(settings, kind)
    check_topology(settings, kind)
    _check_normalise(settings, kind)
    for name in ("sparsity", "preact", "aux", "penalty_warmup", "k_anneal"):
        if getattr(settings, name) != "run" and getattr(settings, name) < 0:
            raise UserError(f"dictionary.{name} is {getattr(settings, name)}; expected 0 or more.")
    for name in ("theta", "bandwidth", "dead_after", "tanh_scale"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise UserError(f"dictionary.{name} is {value}; expected more than 0.")
    if settings.aux_k is not None and settings.aux_k < 1:
        raise UserError(f"dictionary.aux_k is {settings.aux_k}; expected 1 or more. Set aux = 0 to turn AuxK off.")
    if not 0 <= settings.threshold_decay < 1:
        raise UserError(f"dictionary.threshold_decay is {settings.threshold_decay}; expected 0 ≤ value < 1.")


def _check_normalise(settings: _Settings, kind: str) -> None:
    cls = topology(kind)
    if settings.normalise == "per_token" and not (cls.own_site and not cls.joint):
        raise UserError(
            f"dictionary.normalise is 'per_token' for kind = {kind!r}: what is written would be in units of its own "
            "mean and spread on each token, which nobody knows where the dictionary is used. Set normalise = "
            "'per_token_in', which leaves what is written raw, or kind = 'sae'."
        )
    if settings.normalise == "per_token_in" and cls.own_site:
        other = "'scale' or 'per_dim'" if cls.joint else "'per_token'"
        raise UserError(
            f"dictionary.normalise is 'per_token_in' for kind = {kind!r}, which writes what it reads. Set normalise = "
            f"{other}."
        )


def _check_k(settings: _Settings) -> None:
    rule = rules.known(settings.firing)
    if rule.by_count and settings.k is None:
        raise UserError(f"dictionary.k is missing: firing = {settings.firing!r} needs the active latents per token.")
    if settings.k is not None and settings.k <= 0:
        raise UserError(f"dictionary.k is {settings.k:g}; expected more than 0.")
    if rule.whole_k and settings.k is not None and settings.k != int(settings.k):
        raise UserError(
            f"dictionary.k is {settings.k:g} with firing = {settings.firing!r}, which takes a whole number per token. "
            "Round it, or use firing = 'batchtopk', where k is a mean."
        )
    if not rule.by_count and settings.k is not None and settings.penalty != "target_l0":
        raise UserError(
            f"dictionary.k is {settings.k:g}, but firing = {settings.firing!r} sets its sparsity by a penalty. Remove "
            "k and set sparsity, or use penalty = 'target_l0' (jumprelu)."
        )


def _check_penalty(settings: _Settings) -> None:
    admitted = rules.known(settings.firing).penalties
    if settings.penalty is not None and settings.penalty not in admitted:
        wants = f"one of {', '.join(admitted)}" if admitted else "no penalty, since k fixes the sparsity"
        raise UserError(
            f"dictionary.penalty is {settings.penalty!r} with firing = {settings.firing!r}; expected {wants}."
        )
    if settings.penalty == "target_l0" and settings.k is None:
        raise UserError("dictionary.k is missing: penalty = 'target_l0' needs the L0 to aim at.")
    if admitted and settings.sparsity == 0:
        raise UserError(
            f"dictionary.sparsity is 0 with firing = {settings.firing!r}: nothing would make its codes sparse. Set it "
            "above 0, for example 1e-3."
        )
    if not admitted and settings.sparsity > 0:
        raise UserError(
            f"dictionary.sparsity is {settings.sparsity:g} with firing = {settings.firing!r}, whose sparsity k fixes. "
            "Remove sparsity."
        )
