"""A causal language model as `Target`: name its tensors, record them, run it with some replaced.

The model is one of Hugging Face's or one of our own (simple_mlp.py).

Tensors are taken and replaced by forward hooks on the model's own modules, which cost about 2 % of a forward pass;
where they sit is known from transformer-lens (structure.py). A recorded tensor is the model's own, not a copy. The
pass is cut off by an exception as soon as the last wanted tensor has been seen, so neither later layers nor logits are
computed.

Before a tap is used it is checked on a few tokens: what `mlp_out` adds to the residual stream must be what the block
adds, and `mlp_in` and `mlp_hidden` must be what the MLP's first and last matrix multiply. A model that fails is refused
rather than guessed.

Contexts are run without an attention mask: full ones need none under a causal model, and padding on the right is
behind every real token. A model may be spread over devices (spreading.py) or processes (company.py). Left out: left
padding, encoder-decoder models.
"""

import copy
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from thresher.cache.contracts import Edit, MLPMatrices, Overwriting, Site, Truths
from thresher.cache.devices import resolve_device
from thresher.cache.errors import UserError
from thresher.cache.roster import Roster
from thresher.cache.world import from_environment
from thresher.harvest import company, spreading
from thresher.harvest.checkpoint import (
    commit_of,
    digest,
    folder_of,
    is_simple_mlp,
    locate,
    tokenizer_files,
    weight_files,
)
from thresher.harvest.hooking import Keep, PassEnded, Visit, attached, batched, editing, limited, taking
from thresher.harvest.matrices import read_matrices
from thresher.harvest.pretrained import fuse_gelu, load_pretrained, quiet
from thresher.harvest.simple_mlp_files import load_simple_mlp
from thresher.harvest.sites import TAPS, Located, Point, resolve
from thresher.harvest.structure import NativeModel, Structure, hidden_faults, read_structure, tap_faults
from thresher.harvest.toy_stack import ToyStack, is_toy, load_toy, truths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TOKENS = 8
"""Length of the pass that measures widths and checks taps."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Which model, and how it is run: the table [target] of a recipe."""

    model: str = "bundled:books-128"
    """A name on the Hugging Face hub, a Hugging Face model directory, bundled:books-128; or a LlamaSimpleMLP: its
    directory, or its file of weights (.safetensors, .pt, .bin) with config.json beside it; or a toy model: its
    directory, bundled:toy-mlp, …"""

    revision: str | None = None
    """Branch, tag or commit on the hub; left out: what the local hub cache has, else the hub's main branch."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and activations; auto: bfloat16 on a GPU that supports it, else float32."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU if there is one."""

    device_map: str | dict[str, str | int] = spreading.WHOLE
    """For a model larger than one GPU. auto, balanced, balanced_low_0, sequential: over all GPUs that there are, and
    the CPU's memory behind them, as transformers divides it; or a table of modules and where they lie: a GPU's number,
    cpu or disk. none: all of it on `device`."""

    tensor_parallel: bool = False
    """For a model larger than one GPU, under torchrun: all processes of the job hold it together, each its part of
    every matrix, as transformers divides it. For `harvest` alone; one process holds all of it."""

    def __post_init__(self) -> None:
        spreading.check_map(self.device_map)
        if self.tensor_parallel and self.device_map != spreading.WHOLE:
            raise UserError(
                "target.tensor_parallel and target.device_map are both set: a target is spread over processes or over "
                "the devices of one. Leave one of them out."
            )
        if not self.model:
            raise UserError("target.model is empty; expected a hub name, a directory, or bundled:books-128.")


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` to bfloat16 where the GPU computes in it, else float32."""
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def model_identity(config: TargetConfig) -> dict[str, object]:
    """What makes a target this one and no other, from its files alone: nothing is loaded into a model."""
    path = locate(config.model, config.revision)
    dtype = resolve_dtype(config.dtype, resolve_device(config.device, "target.device"))
    tokenizer = tokenizer_files(path)
    local = Path(config.model).expanduser()
    return {
        "model": local.resolve().name if local.exists() else config.model,
        "revision": commit_of(path) or config.revision,
        "config": digest([folder_of(path) / "config.json"]),
        "weights": digest(weight_files(path)),
        "tokenizer": digest(tokenizer) if tokenizer else None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def load_tokenizer(config: TargetConfig) -> "PreTrainedTokenizerBase | None":
    """The model's tokenizer, None when it has no tokenizer files (tokenised data needs none)."""
    path = locate(config.model, config.revision)
    if not tokenizer_files(path):
        return None
    from transformers import AutoTokenizer

    try:
        with quiet():  # it reads config.json too, and wonders about an architecture that is ours
            return AutoTokenizer.from_pretrained(folder_of(path))
    except Exception as error:
        raise UserError(
            f"target.model: the tokenizer of {config.model!r} cannot be loaded ({type(error).__name__}: "
            f"{str(error)[:200]}). Check the tokenizer files in {path}."
        ) from error


@contextmanager
def held(config: TargetConfig, roster: Roster) -> "Iterator[TransformerTarget]":
    """The loaded target of a job, which its ranks hold together where `tensor_parallel` says so.

    Where it is not their own (`follows`), ranks have to `follow` the one who leads, who dismisses them at the end.
    """
    with company.gathered(roster, config.tensor_parallel, resolve_device(config.device, "target.device")) as holders:
        target = load_target(config, holders)
        try:
            yield target
        finally:
            if holders is not None and holders.leads and roster.fault is None:
                holders.tell(None)


def load_target(config: TargetConfig, holders: company.Company | None = None) -> "TransformerTarget":
    """Load the model onto its device, or each of its `holders`' part. Raises UserError for one that is missing,
    unreachable or of no use here."""
    device = resolve_device(config.device, "target.device")
    dtype = resolve_dtype(config.dtype, device)
    if config.tensor_parallel and holders is None and not from_environment().alone:
        raise UserError(
            "target.tensor_parallel is set, and only `harvest` lets several processes hold one target. Run one "
            "process, or leave it out; target.device_map spreads a target over the GPUs of one process."
        )
    identity = model_identity(config)
    path = locate(config.model, config.revision)
    model: Any
    if is_toy(folder_of(path)) or is_simple_mlp(folder_of(path)):
        kind = "toy model" if is_toy(folder_of(path)) else "LlamaSimpleMLP"
        if config.device_map != spreading.WHOLE or holders is not None:
            which = "tensor_parallel" if holders is not None else "device_map"
            raise UserError(
                f"target.{which} is set, and {config.model!r} is a {kind}, which is loaded whole. Leave it out."
            )
    if is_toy(folder_of(path)):
        model = load_toy(folder_of(path)).to(dtype)
    elif is_simple_mlp(folder_of(path)):
        model = load_simple_mlp(folder_of(path), weight_files(path)).to(dtype)
    else:
        with quiet():
            spread = spreading.settings(config.device_map)
            divided = {} if holders is None else company.settings()
            model = fuse_gelu(load_pretrained(path, dtype, config.model, **spread, **divided))
            if spread:
                weakref.finalize(model, shutil.rmtree, spread["offload_folder"], ignore_errors=True)
    placed = config.device_map != spreading.WHOLE or holders is not None
    model = model if placed else model.to(device)
    return TransformerTarget(model, name=config.model, identity=identity, holders=holders)


class TransformerTarget:
    """`contracts.Target` over a causal language model, Hugging Face's or a `NativeModel`, frozen and in evaluation
    mode."""

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        identity: Mapping[str, object] | None = None,
        holders: company.Company | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        """It keeps its own modules."""
        self.holders = holders
        """The processes that hold it together; None: it is this one's."""
        self.spread = spreading.is_spread(model) or holders is not None
        """Whether it lies on several devices; what is recorded comes together on the first of them."""
        self.name = name
        self.identity: Mapping[str, object] = dict(identity or {"model": name})
        with quiet():
            self.structure: Structure = read_structure(model)
        self.n_layers = self.structure.table.n_layers
        self.n_ctx = _n_ctx(model.config)
        self.n_vocab = int(model.get_input_embeddings().weight.shape[0])
        self._options = {} if isinstance(model, NativeModel) else {"use_cache": False}
        self._located: dict[str, Located] = {}
        self._shapes: dict[Point, tuple[int, ...]] = {}
        self._faults: dict[tuple[int, str], str] = {}
        self._divided: set[Point] = set()

    @property
    def device(self) -> torch.device:
        """Where the weights are; of a model that is spread, where its inputs go."""
        return spreading.first_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, hence of the activations."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def gated_mlp(self) -> bool:
        """As `contracts.Target.gated_mlp`."""
        return self.structure.gated_mlp

    def mlp_matrices(self, layer: int) -> MLPMatrices:
        """As `contracts.Target.mlp_matrices`."""
        if self.spread:
            raise UserError("target.device_map is set, and an MLP that is decomposed must lie whole on one device.")
        return read_matrices(self.model, self.structure, layer)

    def sites(self, patterns: Sequence[str], layers: Sequence[int] | None = None) -> tuple[Site, ...]:
        """As `contracts.Target.sites`."""
        located = resolve(self.structure.table, patterns, layers)
        if not self._shapes:
            self._probe()
        for each in located:
            self._check(each)
            self._located[each.name] = each
        order = {point: i for i, point in enumerate(self._shapes)}
        return tuple(
            each.site(self._shapes[each.point][2]) for each in sorted(located, key=lambda each: order[each.point])
        )

    def truths(self, sites: Sequence[Site]) -> Truths | None:
        """As `contracts.Target.truths`."""
        if not isinstance(self.model, ToyStack):
            return None
        with torch.inference_mode():
            return truths(self.model, {site.name: self._point(site.name) for site in sites})

    def describe(self, sites: Sequence[Site]) -> dict[str, str]:
        """Where each site sits, for the record: `transformer.h.5.mlp, input`."""
        out = {}
        for site in sites:
            point = self._point(site.name)
            behind = " (after the norm that follows the MLP)"
            out[site.name] = f"{point.module}, {point.side}put"
            out[site.name] += behind if site.tap == "mlp_out" and self.structure.norm_after_mlp else ""
        return out

    def record(self, tokens: Tensor, sites: Sequence[Site], keep: Keep | None = None) -> dict[str, Tensor]:
        """As `contracts.Target.record`. The tensors are the model's own unless `keep` copies them, made under inference
        mode: use them before the next pass, and clone them before autograd is to see them."""
        if self.holders is not None and not self.follows:
            self.holders.tell(company.Pass(tokens.cpu(), [site.name for site in sites]))
        points = {site.name: self._point(site.name) for site in sites}
        wanted = list(dict.fromkeys(points.values()))
        taken: dict[Point, Tensor] = {}
        shape = tuple(tokens.shape)
        visits = [(point, taking(taken, point, shape, last_of=len(wanted), keep=keep)) for point in wanted]
        with torch.inference_mode(), attached(self.model, visits), suppress(PassEnded):
            self._run(tokens)
        return {name: taken[point].to(self.device) for name, point in points.items()}

    @property
    def follows(self) -> bool:
        """Whether another process decides which passes are made."""
        return self.holders is not None and not self.holders.leads

    def follow(self) -> None:
        """Make the passes of the one who leads, until it is at its end."""
        assert self.holders is not None, "a target of this process's own"
        with self.holders.roster.interrupts():  # they reach the one who leads too, who says when it is over
            while (told := self.holders.hear()) is not None:
                self.record(told.tokens, self.sites(told.sites))

    def logits(self, tokens: Tensor, edits: Mapping[str, Edit] | None = None) -> Tensor:
        """As `contracts.Target.logits`. An edit of `resid_mid` changes both what the second norm reads and what the
        MLP's output is added to."""
        assert self.holders is None, "only records are made together"
        edits = edits or {}
        with (
            limited(self.model, self._overwritten(edits)),
            attached(self.model, self._visits(edits, tuple(tokens.shape))),
        ):
            return self._run(tokens).logits

    def _overwritten(self, edits: Mapping[str, Edit]) -> dict[str, Tensor]:
        """MLPs whose output is overwritten and that nobody looks into: the positions they still must compute."""
        if self.spread:
            return {}
        points = {name: self._point(name) for name in edits}
        return {
            points[name].module: edit.elsewhere
            for name, edit in edits.items()
            if isinstance(edit, Overwriting)
            and self._located[name].tap == "mlp_out"
            and points[name] == self.structure.mlp_output(self._located[name].layer)
            and not any(other.module.startswith(f"{points[name].module}.") for other in points.values())
        }

    def replica(self) -> "TransformerTarget":
        """The same model with modules of its own and the weights shared, for passes in another thread."""
        assert not self.spread, "its passes move the weights that they would share"
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model, shared)
        return twin

    def _run(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens.to(self.device), **self._options)

    def _point(self, name: str) -> Point:
        if name not in self._located:
            self.sites([name])
        if name not in self._located:
            raise UserError(f"{name!r} is no site name of {self.name}; expected one such as L00.mlp_out, no pattern.")
        return self._located[name].point

    def _visits(self, edits: Mapping[str, Edit], shape: tuple[int, ...]) -> list[tuple[Point, Visit]]:
        """Edits in forward order, which for one side of one module is the order of the taps.

        The residual stream has no module of its own in the middle of a block: what replaces `resid_mid` is also given
        to the block's output, as itself plus the MLP's output after all edits of that.
        """
        points = {name: self._point(name) for name in edits}
        ranks = {tap: rank for rank, tap in enumerate(TAPS)}
        ordered = sorted(edits, key=lambda name: ranks.get(self._located[name].tap, len(ranks)))
        visits: list[tuple[Point, Visit]] = []
        sums: list[tuple[Point, Visit]] = []
        lasts: list[tuple[Point, Visit]] = []
        for name in ordered:
            located, edit = self._located[name], edits[name]
            if self.spread:
                edit = _brought(edit, self.device)
            if located.tap == "resid_mid":
                taps = self.structure.table.taps
                if (located.layer, "mlp_out") not in taps:
                    why = self.structure.table.lacking["mlp_out"]
                    raise UserError(f"{name} cannot be replaced in {self.name}, only recorded: {why}")
                kept: list[Tensor] = []
                edit = _keeping(edit, kept)
                sums.append((taps[located.layer, "mlp_out"], _summing(kept, shape)))
                sums.append((taps[located.layer, "resid_post"], _replacing(kept)))
            visit = (points[name], editing(edit, shape, name))
            (lasts if located.tap == "resid_post" else visits).append(visit)
        return visits + sums + lasts

    def _probe(self) -> None:
        """Run a few tokens once, to learn every point's shape and their order, and to check the taps."""
        points = {point for _, point in self.structure.table.hooks.values()}
        tokens = (torch.arange(PROBE_TOKENS) * 7 + 1).remainder(self.n_vocab)[None]
        taken: dict[Point, Tensor] = {}
        visits = [(point, taking(taken, point, tuple(tokens.shape))) for point in points]
        with torch.inference_mode(), attached(self.model, visits):
            self._run(tokens)
        self._shapes = {point: tuple(x.shape) for point, x in taken.items()}
        together = {point: x.to(self.device) for point, x in taken.items()}
        self._faults = tap_faults(self.structure, together)
        if self.holders is None:
            self._faults |= hidden_faults(self.structure, self.model, taken)
        else:
            self._divided = self.holders.divided(together)

    def _check(self, located: Located) -> None:
        shape = self._shapes.get(located.point)
        stem = f"harvest.sites asks for {located.name!r}, which lies at {located.point.module} "
        stem += f"({located.point.side}put) in {type(self.model).__name__}"
        if shape is None or shape[:2] != (1, PROBE_TOKENS) or len(shape) != 3:
            got = "the model never runs that module" if shape is None else f"the tensor there has shape {list(shape)}"
            raise UserError(f"{stem}. Expected one vector per token, but {got}. Choose another site.")
        if located.point in self._divided:
            raise UserError(
                f"{stem}. Under target.tensor_parallel every process has only a part of that tensor. Choose a tap of "
                "the residual stream, mlp_in or mlp_out, or spread the target by target.device_map."
            )
        if (located.layer, located.tap) in self._faults:
            raise UserError(
                f"{stem}. On trial tokens {self._faults[located.layer, located.tap]}, so it is refused rather than "
                "guessed. Choose another tap, or name the tensor that you mean by its hook, such as "
                "blocks.*.mlp.hook_out."
            )


def _brought(edit: Edit, device: torch.device) -> Edit:
    """The edit of a tensor that may lie elsewhere, on this device."""
    return lambda x: edit(x.to(device))


def _keeping(edit: Edit, kept: list[Tensor]) -> Edit:
    """The edit, with its result put into `kept`."""

    def keep(x: Tensor) -> Tensor | None:
        new = edit(x)
        if new is not None:
            kept.append(new)
        return new

    return keep


def _summing(kept: list[Tensor], shape: tuple[int, ...]) -> Visit:
    """Add what passes by to the kept residual stream, in the model's own order and precision."""

    def visit(x: Tensor) -> None:
        if kept:
            kept.append(kept.pop().to(x) + batched(x, shape))

    return visit


def _replacing(kept: list[Tensor]) -> Visit:
    """Put the kept sum in the place of the block's output."""

    def visit(x: Tensor) -> Tensor | None:
        return kept.pop().to(x.device).view(x.shape) if kept else None

    return visit


def _n_ctx(config: Any) -> int:
    """Longest context of a model; where positions are unlimited (ALiBi), what it was trained on, else 2048."""
    for key in ("n_ctx", "max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048
