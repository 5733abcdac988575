"""The recipe's [train] table."""

from dataclasses import dataclass
from typing import Literal

from thresher.cache.errors import UserError
from thresher.train.kernels.choice import Forced


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How dictionaries are trained; what they are is the [dictionary] table's matter."""

    objective: Literal["local", "kl", "ce"] = "local"
    """What is minimised. local: the reconstruction error at each site. kl, ce: through the language model, with the
    reconstructions patched in, the KL divergence from its clean predictions or the loss on the next token; whole
    contexts of the training split are taken, and the dictionaries of one label are trained together."""
    mode: Literal["cascade", "clean_input", "single_site"] = "cascade"
    """kl and ce: how reconstructions are patched in, as in the evaluation protocol of that name. cascade: encoders read
    the stream as earlier replacements left it; clean_input: clean activations, all sites written at once; single_site:
    clean activations, one pass per written site."""
    local_weight: float = 0.0
    """kl and ce: weight of the reconstruction loss (dictionary.loss), added to the loss of every dictionary."""
    clean_from: Literal["model", "cache"] = "model"
    """kl and ce: where clean activations come from. model: its own clean pass, exactly; cache: as stored, which spares
    ce the clean pass but reads scattered rows."""
    batch_rows: int = 4096
    """Cached rows per optimiser step; of objectives kl and ce, as many whole contexts as that many positions hold."""
    epochs: float | None = None
    """Passes over the cache's training rows; 1 when neither epochs, rows nor steps is given."""
    rows: int | None = None
    """Training rows to consume, in place of epochs."""
    steps: int | None = None
    """Optimiser steps, in place of epochs."""
    optimiser: Literal["adam", "adamw", "signum", "muon"] = "adam"
    """adam; adamw: with a decoupled decay of matrices; signum: schedule-free, signs of gradients, evaluated and saved
    weights are their average; muon: orthogonalised momentum for matrices (encoder, and decoder by destination), Adam
    for vectors."""
    lr: float | Literal["auto"] = "auto"
    """Learning rate. auto, F the latents per source: 2e-4 / √(F / 2¹⁴) for adam and adamw, 5e-3 / √(F / 2¹⁴) for
    signum, 2e-3 for muon."""
    momentum: float | None = None
    """signum: weight μ of the average in the point where gradients are taken; muon: decay of the momentum. 0.95 when
    not given; adam has beta1."""
    weight_decay: float | None = None
    """adamw and muon: share of the learning rate by which matrices shrink in a step; 0.01 and 0.1 when not given."""
    beta1: float = 0.9
    """First moment decay of Adam (also of muon's vectors). Published JumpReLU recipes use 0; at lr 2e-3 on one layer
    of the bundled model (one seed) 0.9 gave FVU 0.081 at L0 30 where 0 gave 0.095 at L0 44."""
    beta2: float = 0.999
    """Adam's second moment decay."""
    eps: float = 1e-8
    """Adam's ε."""
    warmup: int | Literal["auto"] = "auto"
    """Steps over which the learning rate rises linearly; auto: 100, and none for signum."""
    decay: Literal["auto", "none", "step", "tail", "linear", "cosine"] = "auto"
    """Learning rate towards the end. none: constant; step: a tenth from 80 % on; tail: linear to 0 over the last 20 %;
    linear: to 0 over the whole run; cosine: to a tenth over the whole run; auto: tail, and none for signum, whose
    average takes a decay's place."""
    clip: float | Literal["none"] = 1.0
    """Largest global gradient norm of a dictionary, after the decoder's projection; none: gradients are not clipped."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the encoder's matrix product; auto: bfloat16 on CUDA, float32 on CPU. All else is float32."""
    kernels: Forced = "auto"
    """Implementations of a step's operations. auto: the best for device, precision and shape; fast: the same, refused
    where a device's own kernels are not installed; plain: ordinary autograd on dense tensors, the specification, slow.
    Each sums in its own order, so their results differ in the last bits, and a run goes on only with its own."""
    micro_rows: int | None = None
    """Rows whose activations are in memory at once: a batch of more is taken in parts that add up to the same step,
    except for rounding. The whole batch when not given."""
    init_from: str | None = None
    """Fine-tuning: begin from finished runs of ours of the same kind, sites and sizes. A run directory, a folder of
    them, or the stem of their names (all but the layer); each dictionary takes the one with its sites. Random weights
    when not given."""
    seed: int = 0
    """Seed of initial weights and of the order of rows."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last two are kept."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl."""
    calibrate_rows: int = 1_000_000
    """Training rows over which the final threshold of batchtopk and global is set, or all if the cache has fewer."""
    heldout_rows: int = 100_000
    """Held-out rows for the final check of FVU and L0, or all if the cache has fewer."""

    def __post_init__(self) -> None:
        lengths = {name: getattr(self, name) for name in ("epochs", "rows", "steps")}
        given = {name: value for name, value in lengths.items() if value is not None}
        if len(given) > 1:
            raise UserError(f"[train] takes one of epochs, rows and steps; got {given}. Remove all but one.")
        positive = {"batch_rows", "checkpoint_every", "log_every", "calibrate_rows", "heldout_rows", "eps", *given}
        positive |= {name for name in ("clip", "micro_rows") if getattr(self, name) not in (None, "none")}
        if self.lr != "auto":
            positive.add("lr")
        for name in sorted(positive):
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; expected more than 0.")
        for name in ("beta1", "beta2", "momentum"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; expected 0 ≤ value < 1.")
        for name in ("warmup", "weight_decay"):
            if getattr(self, name) not in (None, "auto") and getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; expected 0 or more.")
        for name, users in (("momentum", ("signum", "muon")), ("weight_decay", ("adamw", "muon"))):
            if getattr(self, name) is not None and self.optimiser not in users:
                raise UserError(
                    f"train.{name} is {getattr(self, name)} with optimiser = {self.optimiser!r}, which has none. "
                    f"Remove it, or set train.optimiser to {' or '.join(users)}."
                )
        if self.local_weight < 0:
            raise UserError(f"train.local_weight is {self.local_weight:g}; expected 0 or more.")
        if self.objective == "local" and (
            self.local_weight > 0 or self.clean_from != "model" or self.mode != TrainConfig.mode
        ):
            raise UserError(
                f"train.mode = {self.mode!r}, train.local_weight = {self.local_weight:g} and train.clean_from = "
                f"{self.clean_from!r} belong to training through the language model, but train.objective is 'local'. "
                "Set objective = 'kl' or 'ce', or remove them."
            )
        for name in ("beta1", "beta2", "eps", "clip") if self.optimiser == "signum" else ():
            if getattr(self, name) not in (getattr(TrainConfig, name), "none"):
                raise UserError(
                    f"train.{name} is {getattr(self, name)} with optimiser = 'signum', which takes the signs of "
                    "gradients alone: neither their size nor their moments. Remove it, or choose another optimiser."
                )

    @property
    def resolved_momentum(self) -> float:
        """μ of signum and muon."""
        return 0.95 if self.momentum is None else self.momentum

    @property
    def resolved_clip(self) -> float | None:
        """Largest gradient norm; None: any."""
        return None if self.clip == "none" else self.clip

    @property
    def resolved_weight_decay(self) -> float:
        """Decoupled decay of matrices, by learning rate."""
        if self.weight_decay is None:
            return {"adamw": 0.01, "muon": 0.1}.get(self.optimiser, 0.0)
        return self.weight_decay

    @property
    def resolved_warmup(self) -> int:
        """Optimiser steps of rising rate."""
        if self.warmup == "auto":
            return 0 if self.optimiser == "signum" else 100
        return self.warmup

    @property
    def resolved_decay(self) -> str:
        """The fall of the rate."""
        if self.decay == "auto":
            return "none" if self.optimiser == "signum" else "tail"
        return self.decay

    @property
    def part_rows(self) -> int:
        """Rows that a step works on at a time."""
        return self.batch_rows if self.micro_rows is None else min(self.micro_rows, self.batch_rows)

    def total_steps(self, cached_rows: int, step_rows: int | None = None) -> int:
        """Optimiser steps for a cache with that many training rows; `step_rows`: if a step takes others than a batch's.

        Training through the language model counts all positions of contexts as rows.
        """
        if self.steps is not None:
            return self.steps
        rows = self.rows if self.rows is not None else (1.0 if self.epochs is None else self.epochs) * cached_rows
        return max(1, -int(-rows // (step_rows or self.batch_rows)))
