"""llamascopium (OpenMOSS): `SparseDictionary.from_pretrained`, `save_pretrained`, with its own normalisation calls."""

from pathlib import Path

import torch
from common import LATENTS, LAYERS, WIDTH, K, inputs, keep, main, weights
from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
from llamascopium.models.sparse_dictionary import SparseDictionary
from torch import Tensor

HOOK_IN, HOOK_OUT = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
SAE = {"hook_point_in": HOOK_OUT, "hook_point_out": HOOK_OUT}
TRANSCODER = {"hook_point_in": HOOK_IN, "hook_point_out": HOOK_OUT}
RAW = {"norm_activation": "inference", "sparsity_include_decoder_norm": False}
VARIANTS = {
    "sae-relu": (SAE, RAW),
    "sae-jumprelu": (SAE, {"act_fn": "jumprelu", **RAW}),
    "sae-jumprelu-norms": (SAE, {"act_fn": "jumprelu"}),
    "sae-topk": (SAE, {"act_fn": "topk", "top_k": K, **RAW}),
    "sae-topk-norms": (SAE, {"act_fn": "topk", "top_k": K}),
    "sae-no-bias": (SAE, {"use_decoder_bias": False}),
    "transcoder-jumprelu-norms": (TRANSCODER, {"act_fn": "jumprelu"}),
}
CLTS = {
    "clt-relu": RAW,
    "clt-jumprelu-norms": {"act_fn": "jumprelu"},
    "clt-topk-norms": {"act_fn": "topk", "top_k": K},
}
NORMS = {HOOK_IN: 3.0, HOOK_OUT: 7.0}


def load(directory: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Code, in the scale of training, and output in raw activations. The dictionary computes in its own dtype."""
    made = SparseDictionary.from_pretrained(str(directory), dtype=x.dtype).to(x.dtype)
    hooks_in, hooks_out = made.cfg.hooks_in, made.cfg.hooks_out
    rows = dict(zip(hooks_in, x if x.ndim == 3 else x[None], strict=True))
    scaled = made.normalize_activations(rows)
    with torch.no_grad():
        read, _, _ = made.prepare_input(scaled)
        code = made.encode(read)
        written = made.decode(code)
        if x.ndim == 2:
            return code, written / made.compute_norm_factor(written, hooks_out[0])
        outputs = [written[i] / made.compute_norm_factor(written[i], hook) for i, hook in enumerate(hooks_out)]
        return code.transpose(0, 1), torch.stack(outputs)


def make(root: Path) -> None:
    """Directories written by `save_pretrained` and `save_hyperparameters`."""
    for seed, (variant, (hooks, settings)) in enumerate(VARIANTS.items()):
        config = SAEConfig(d_model=WIDTH, expansion_factor=LATENTS / WIDTH, **hooks, **settings)
        _save(root, variant, SparseAutoEncoder(config), seed, inputs()[0])
    for seed, (variant, settings) in enumerate(CLTS.items()):
        layers = range(LAYERS)
        config = CLTConfig(
            d_model=WIDTH,
            expansion_factor=LATENTS / WIDTH,
            hook_points_in=[f"blocks.{i}.hook_resid_mid" for i in layers],
            hook_points_out=[f"blocks.{i}.hook_mlp_out" for i in layers],
            **settings,
        )
        _save(root, variant, CrossLayerTranscoder(config), 20 + seed, inputs())


def _save(root: Path, variant: str, made: SparseDictionary, seed: int, x: Tensor) -> None:
    state = {}
    for index, (name, value) in enumerate(made.state_dict().items()):
        [drawn] = weights(100 * seed + index, ("values", tuple(value.shape))).values()
        if name.endswith("log_jumprelu_threshold"):
            drawn = (0.2 + 0.3 * drawn.abs()).log()
        elif name == "b_E":
            drawn = -drawn.abs()
        state[name] = drawn
    made.load_state_dict(state)
    hooks = dict.fromkeys(made.cfg.associated_hook_points)
    made.set_dataset_average_activation_norm({hook: NORMS.get(hook, 2.0 + i) for i, hook in enumerate(hooks)})
    made.save_pretrained(root / variant)
    made.cfg.save_hyperparameters(root / variant)
    keep(root, variant, load, x)


if __name__ == "__main__":
    main("llamascopium", load, make)
