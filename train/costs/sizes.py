"""What a dictionary keeps, to the byte: parameters, gradients, the optimiser's state, and the files it becomes.

Counted on the dictionary itself, built on the meta device, whose tensors have shapes and no memory. So nothing here
repeats what a topology, a firing rule or an update rule knows.

Of a tensor that has a row for every latent each rank of a latent-sharded dictionary owns its share; the rest
(b_dec, the skip connection, means) is on all of them.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.train.config import TrainConfig
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build
from thresher.train.files import deployed_tensors
from thresher.train.optim import Optimiser


class Share(NamedTuple):
    """A quantity in two parts."""

    latents: int
    """What belongs to latents, and is divided among the ranks that share them."""
    whole: int
    """What each of those ranks has."""

    def of(self, ranks: int) -> int:
        """What one of so many ranks has."""
        return -(-self.latents // ranks) + self.whole


class Sizes(NamedTuple):
    """One dictionary; bytes unless it says otherwise."""

    parameters: int
    """Trained numbers."""
    weights: Share
    """Parameters in float32; gradients take as much."""
    moments: Share
    """The update rule's state."""
    buffers: Share
    """What is kept and not trained: counters, running thresholds, means."""
    low: Share
    """Copies of encoders in bfloat16, on a GPU."""
    fold: int
    """Temporary float64 numbers while matrices are folded into raw units, at the end of training: those alive at
    once."""
    folded: int
    """The same, all that are made of the largest matrices."""
    sheet: int
    """Bytes of the largest matrix that Muon orthogonalises at once."""
    checkpoint: int
    """The file of one checkpoint; two are kept."""
    run: int
    """weights.safetensors."""


def sizes_of(spec: DictionarySpec, train: TrainConfig) -> Sizes:
    """Count one dictionary."""
    with torch.device("meta"):
        coder = build(spec)
        served = build(spec, deployed=True)
    parameters = dict(coder.named_parameters())
    kept = {name: tensor for name, tensor in coder.state_dict().items() if name not in parameters}
    moments = _moments(coder, train)
    saved = {f"model.{name}": tensor for name, tensor in coder.state_dict().items()}
    saved |= {f"optimiser.{name}": tensor for name, tensor in moments.items()}
    names = list(parameters)
    owners = {key: names[int(key.split(".")[0])] for key in moments}
    matrices = [p for p in parameters.values() if p.dim() > 1]
    encoders = {name: p for name, p in parameters.items() if name.endswith("W_enc")}
    return Sizes(
        parameters=coder.n_parameters,
        weights=_share(parameters, spec),
        moments=_share(moments, spec, owners),
        buffers=_share(kept, spec),
        low=_share({name: p.to(torch.bfloat16) for name, p in encoders.items()}, spec),
        **_fold(coder),
        sheet=max(4 * p.numel() // (p.shape[1] if p.dim() > 2 else 1) for p in matrices),
        checkpoint=safetensors_bytes(saved),
        run=safetensors_bytes(deployed_tensors(served)) if not coder.decomposes else safetensors_bytes(parameters),
    )


def _fold(coder: Coder) -> dict[str, int]:
    """An encoder and its product with a scale; or the last encoder, a decoder, its product and quotient (fold.py)."""
    read = max(encoder.numel() for name, encoder in coder.named_parameters() if name.endswith("W_enc"))
    written = max((decoder.numel() for decoder in coder.W_dec), default=0)
    return {"fold": 8 * max(2 * read, read + 2 * written), "folded": 8 * (2 * read + 3 * written)}


def _moments(coder: Coder, train: TrainConfig) -> dict[str, Tensor]:
    """The update rule's state of every parameter, by its position and key, as a checkpoint has it."""
    if coder.decomposes:  # torch's own AdamW on what is trained (component_optim.py)
        trained = [p for p in coder.parameters() if p.requires_grad]
        step = torch.zeros((), device="meta")
        return {
            f"{index}.{key}": step if key == "step" else p
            for index, p in enumerate(trained)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    optimiser = Optimiser(coder, train)
    optimiser.rule.begin()
    return optimiser.moments()


def _share(tensors: Mapping[str, Tensor], spec: DictionarySpec, owners: Mapping[str, str] | None = None) -> Share:
    """Bytes; `owners`: the parameter whose name decides, by tensor."""
    latents = whole = 0
    for name, tensor in tensors.items():
        if tensor.dim() and tensor.shape[0] == spec.n_latents and _by_latent((owners or {}).get(name, name)):
            latents += tensor.nbytes
        else:
            whole += tensor.nbytes
    return Share(latents, whole)


def _by_latent(name: str) -> bool:
    return name.startswith(("encoders.", "W_dec."))


_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls a dtype, in the order in which it lays them out."""


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the file that safetensors makes of them: a length, a header padded to 8 bytes, and the numbers."""
    order = list(_NAMES)
    header, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
