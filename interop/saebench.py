"""A run as an object that SAEBench evaluates, which knows no files of its own but takes any module of this shape:

    encode, decode, forward on [B, d] or [B, T, d]
    W_enc [d, M], b_enc [M], W_dec [M, d], b_dec [d]; dtype, device, cfg

It expects decoder rows of norm 1, so norms go into the codes (folds.unit_rows). Of a dictionary that counts (topk,
groupmax) that would choose other latents where norms differ: such a one has to become one of thresholds first. Where
SAEBench is installed the object is one of its `BaseSAE`; elsewhere it has the same fields. SAEs only.
"""

import dataclasses
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thresher.cache.errors import UserError
from thresher.interop import folds
from thresher.interop.canonical import Canonical
from thresher.interop.export import exported
from thresher.interop.formats import Exported
from thresher.interop.hooks import hook_name
from thresher.train.files import load_run

TOLERANCE = 1e-5
"""Within which norms count as 1 in float32, as SAEBench checks them."""
_ARCHITECTURES = {"relu": "standard", "threshold": "jumprelu", "topk": "topk", "groupmax": "groupmax"}


def to_saebench(run: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The SAE of a run directory as a module for SAEBench, on raw activations.

    Raises UserError for anything but an SAE, and for one that counts and has rows of different norms.
    """
    item = exported(Path(run), load_run(Path(run)))
    return build(item, device, dtype)


def build(item: Exported, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module of a dictionary in canonical form."""
    dictionary = _unit(item.dictionary)
    base = _base()

    class ThresherSAE(_Coding, base):  # type: ignore[misc,valid-type]  # which base is known when asked for
        """An SAE of Thresher's."""

    made = ThresherSAE(
        d_in=dictionary.d_in,
        d_sae=dictionary.n_latents,
        model_name=item.facts["target"]["model"],
        hook_layer=dictionary.layers[0],
        device=torch.device(device),
        dtype=dtype,
        hook_name=hook_name(dictionary.reads[0]),
    )
    made.take(dictionary)
    _describe(made.cfg, item, dictionary)
    made.cfg.device = str(torch.device(device))
    moved: nn.Module = made.to(device=torch.device(device), dtype=dtype)
    return moved.requires_grad_(False)


def _unit(dictionary: Canonical) -> Canonical:
    """With rows of norm 1. Raises UserError where that is impossible."""
    name = dictionary.name
    if dictionary.kind != "sae":
        raise UserError(
            f"{name} is a {dictionary.kind}, and SAEBench evaluates SAEs alone: what reads one site and writes another "
            "does not reconstruct. Use `thresher evaluate`, or --to saelens or circuit-tracer for other tools."
        )
    [part] = dictionary.sources
    norms_F = part.W_dec.flatten(1).norm(dim=1)
    written_F = norms_F[norms_F > 0]
    counts = dictionary.firing in ("topk", "groupmax")
    if counts and len(written_F) and float(written_F.max() / written_F.min()) > 1 + TOLERANCE:
        raise UserError(
            f"{name} has decoder rows of norm {float(written_F.min()):.4g} to {float(written_F.max()):.4g}; SAEBench "
            f"expects 1, and scaled {dictionary.firing} codes would choose other latents. Give it thresholds "
            "(`thresher export --to npz --thresholds`, then `thresher import --from npz`) and take that run; or train "
            "with decoder = 'unit'."
        )
    return folds.unit_rows(dictionary)


class _Coding:
    """What the module computes, whatever its base."""

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: Tensor
    firing: str
    k: int | None

    def take(self, dictionary: Canonical) -> None:
        """Have the weights of a dictionary."""
        [part] = dictionary.sources
        self.W_enc = nn.Parameter(part.W_enc.T.float().contiguous())
        self.b_enc = nn.Parameter(part.b_enc.float())
        self.W_dec = nn.Parameter(part.W_dec[:, 0].float().contiguous())
        self.b_dec = nn.Parameter(dictionary.b_dec[0].float())
        theta_F = torch.zeros_like(part.b_enc) if part.threshold is None else part.threshold
        self.register_buffer("threshold", theta_F.float())  # type: ignore[attr-defined]  # nn.Module's
        self.firing, self.k = dictionary.firing, dictionary.k

    def encode(self, x: Tensor) -> Tensor:
        """[…, M] codes of raw activations […, d]."""
        pre = x @ self.W_enc + self.b_enc
        z = torch.relu(pre)
        if self.k is None:
            return z * (pre > self.threshold)
        if self.firing == "topk":
            best = z.topk(self.k, dim=-1)
            return torch.zeros_like(z).scatter(-1, best.indices, best.values)
        grouped = z.unflatten(-1, (self.k, -1))
        largest = grouped.max(-1, keepdim=True)
        return torch.zeros_like(grouped).scatter(-1, largest.indices, largest.values).flatten(-2)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """[…, d] from codes […, M]."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """[…, d] reconstructions of raw activations."""
        return self.decode(self.encode(x))


@dataclass
class Config:
    """The fields that SAEBench reads of `cfg`, with its defaults."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool | None = None
    finetuning_scaling_factor: bool | None = None
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = ""
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)


class _Base(nn.Module):
    """What SAEBench's `BaseSAE` gives its subclasses, where it is not installed."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        model_name: str,
        hook_layer: int,
        device: torch.device,
        dtype: torch.dtype,
        hook_name: str | None = None,
    ) -> None:
        super().__init__()
        self.device, self.dtype = device, dtype
        where = hook_name or f"blocks.{hook_layer}.hook_resid_post"
        self.cfg = Config(model_name, d_in, d_sae, hook_layer, where, dtype=str(dtype).removeprefix("torch."))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As any module; `device` and `dtype` follow the weights."""
        moved = super().to(*args, **kwargs)
        weight = next(moved.parameters())
        moved.device, moved.dtype = weight.device, weight.dtype
        return moved


def _base() -> type[nn.Module]:
    """SAEBench's base class where it is installed, else ours."""
    try:
        found: type[nn.Module] = importlib.import_module("sae_bench.custom_saes.base_sae").BaseSAE
    except ImportError:
        return _Base
    return found


def _describe(cfg: Any, item: Exported, dictionary: Canonical) -> None:
    """Say in `cfg` what is known of the run."""
    data = item.facts["data"]
    cfg.architecture = _ARCHITECTURES[dictionary.firing]
    cfg.apply_b_dec_to_input = False
    cfg.finetuning_scaling_factor = False
    cfg.activation_fn_str = dictionary.firing if dictionary.k is not None else "relu"
    cfg.activation_fn_kwargs = {} if dictionary.k is None else {"k": dictionary.k}
    cfg.context_size = data["context"]
    cfg.prepend_bos = bool(data["bos"])
    cfg.dataset_path = data["source"]
    cfg.training_tokens = item.facts["training_rows"] or -100_000
