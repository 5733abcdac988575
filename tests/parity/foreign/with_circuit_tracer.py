"""circuit-tracer: an absolute path through `load_transcoder_from_hub`, in the dtype of the rows (its own default for
CLTs is bfloat16)."""

from pathlib import Path

import torch
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from common import LATENTS, LAYERS, WIDTH, inputs, keep, main, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
PLT_KEYS = (
    ("W_enc", (LATENTS, WIDTH)),
    ("W_dec", (LATENTS, WIDTH)),
    ("b_enc", (LATENTS,)),
    ("b_dec", (WIDTH,)),
)
PLT = {
    "plt-relu": (),
    "plt-jumprelu": (("threshold", (LATENTS,)),),
    "plt-relu-skip": (("W_skip", (WIDTH, WIDTH)),),
    "plt-jumprelu-skip": (("threshold", (LATENTS,)), ("W_skip", (WIDTH, WIDTH))),
    "plt-jumprelu-negative": (("threshold", (LATENTS,)),),
}
CPU = torch.device("cpu")


def load(directory: Path, x_LND: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and outputs, by layer. `decode` of a CLT leaves out trailing rows that fire nothing (0.5.0): they read
    nothing, so what they write is what a row between firing ones gets, b_dec."""
    made, _ = load_transcoder_from_hub(
        str(directory), device=CPU, dtype=x_LND.dtype, lazy_encoder=False, lazy_decoder=False
    )
    with torch.no_grad():
        code_LNM = made.encode(x_LND)
        if isinstance(made, CrossLayerTranscoder):
            decoded_LnE = made.decode(code_LNM)
            missing = x_LND.shape[1] - decoded_LnE.shape[1]
            assert missing == 0 or not code_LNM[:, -missing:].any(), "only rows that fire nothing are left out"
            return code_LNM, torch.cat([decoded_LnE, made.b_dec[:, None].expand(-1, missing, -1)], dim=1)
        return code_LNM, made.decode(code_LNM, x_LND)


def make(root: Path) -> None:
    """Sets and CLTs written by `to_safetensors`, with the config.yaml that its reader asks for."""
    for seed, (variant, further) in enumerate(PLT.items()):
        layers = {i: _transcoder(i, weights(10 * seed + i, *PLT_KEYS, *further)) for i in range(LAYERS)}
        if variant.endswith("negative"):
            for layer in layers.values():
                layer.activation_function.threshold.data.mul_(-1)
        TranscoderSet(layers, *HOOKS.values()).to_safetensors(str(root / variant))
        _config(root / variant, "transcoder_set")
        keep(root, variant, load, inputs())
    for seed, (variant, activation) in enumerate({"clt-relu": "relu", "clt-jumprelu": "jump_relu"}.items()):
        made = CrossLayerTranscoder(
            LAYERS, LATENTS, WIDTH, activation, lazy_decoder=False, device=CPU, dtype=torch.float32, **HOOKS
        )
        shapes = [(name.split(".")[-1], tuple(value.shape)) for name, value in made.state_dict().items()]
        values = [weights(100 + 10 * seed + i, shape) for i, shape in enumerate(shapes)]
        state = {name: next(iter(v.values())) for name, v in zip(made.state_dict(), values, strict=True)}
        state["b_enc"] = -state["b_enc"].abs()
        made.load_state_dict(state)
        made.to_safetensors(str(root / variant))
        _config(root / variant, "cross_layer_transcoder")
        keep(root, variant, load, inputs())
    _old(root)


def _old(root: Path) -> None:
    """Of June 2025: decoders transposed, which no later reader takes. The outputs are those of plt-relu."""
    target = root / "plt-relu-old"
    target.mkdir(exist_ok=True)
    for i in range(LAYERS):
        tensors = load_file(root / "plt-relu" / f"layer_{i}.safetensors")
        tensors["W_dec"] = tensors["W_dec"].T.contiguous()
        save_file(tensors, target / f"layer_{i}.safetensors")
    _config(target, "transcoder_set")
    (root / "plt-relu-old.outputs.safetensors").write_bytes((root / "plt-relu.outputs.safetensors").read_bytes())


def _transcoder(layer: int, tensors: dict[str, Tensor]) -> SingleLayerTranscoder:
    threshold = tensors.pop("threshold", None)
    activation = torch.nn.functional.relu if threshold is None else JumpReLU(threshold, 0.1)
    made = SingleLayerTranscoder(
        WIDTH, LATENTS, activation, layer, skip_connection="W_skip" in tensors, device=CPU, dtype=torch.float32
    )
    made.load_state_dict(tensors | ({} if threshold is None else {"activation_function.threshold": threshold}))
    return made


def _config(folder: Path, kind: str) -> None:
    config = {"model_name": "google/gemma-2-2b", "model_kind": kind, "scan": "test", **HOOKS}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


if __name__ == "__main__":
    main("circuit-tracer", load, make)
