"""SAELens: `SAE.load_from_disk`, `SAE.save_model`."""

from pathlib import Path

import torch
from common import LATENTS, WIDTH, K, edit, inputs, keep, main, weights
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

OUT = 12
ENCODER, DECODER = ("W_enc", (WIDTH, LATENTS)), ("W_dec", (LATENTS, WIDTH))
B_ENC, B_DEC, THRESHOLD = ("b_enc", (LATENTS,)), ("b_dec", (WIDTH,)), ("threshold", (LATENTS,))
SAE_KEYS = (ENCODER, B_ENC, DECODER, B_DEC)
TRANSCODER_KEYS = (ENCODER, B_ENC, ("W_dec", (LATENTS, OUT)), ("b_dec", (OUT,)))
SKIP = ("W_skip", (OUT, WIDTH))
GATED_KEYS = (ENCODER, DECODER, B_DEC, ("b_gate", (LATENTS,)), ("b_mag", (LATENTS,)), ("r_mag", (LATENTS,)))
METADATA = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.1.hook_resid_post",
    "context_size": 64,
    "prepend_bos": True,
}
PLAIN = {"apply_b_dec_to_input": False}
VARIANTS = {
    "standard": ("standard", SAE_KEYS, PLAIN),
    "standard-b_dec": ("standard", SAE_KEYS, {"apply_b_dec_to_input": True}),
    "standard-bf16": ("standard", SAE_KEYS, {**PLAIN, "dtype": "bfloat16"}),
    "jumprelu": ("jumprelu", (*SAE_KEYS, THRESHOLD), PLAIN),
    "jumprelu-b_dec": ("jumprelu", (*SAE_KEYS, THRESHOLD), {"apply_b_dec_to_input": True}),
    "gated": ("gated", GATED_KEYS, PLAIN),
    "topk": ("topk", SAE_KEYS, {**PLAIN, "k": K}),
    "topk-rescale": ("topk", SAE_KEYS, {**PLAIN, "k": K, "rescale_acts_by_decoder_norm": True}),
    "transcoder": ("transcoder", TRANSCODER_KEYS, {**PLAIN, "d_out": OUT}),
    "jumprelu_transcoder": ("jumprelu_transcoder", (*TRANSCODER_KEYS, THRESHOLD), {**PLAIN, "d_out": OUT}),
    "skip_transcoder": ("skip_transcoder", (*TRANSCODER_KEYS, SKIP), {**PLAIN, "d_out": OUT}),
    "jumprelu_skip_transcoder": (
        "jumprelu_skip_transcoder",
        (*TRANSCODER_KEYS, THRESHOLD, SKIP),
        {**PLAIN, "d_out": OUT},
    ),
}


def load(directory: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output of the object that SAELens makes of a directory."""
    sae = SAE.load_from_disk(directory, device="cpu").to(dtype=x_ND.dtype)
    with torch.no_grad():
        return sae.encode(x_ND), sae(x_ND)


def make(root: Path) -> None:
    """Directories written by `save_model`; two more lack the version, as those of releases before 6 did."""
    for seed, (variant, (architecture, shapes, settings)) in enumerate(VARIANTS.items()):
        sae_class, config_class = get_sae_class(architecture)
        metadata = SAEMetadata(**METADATA, hook_name_out="blocks.1.hook_mlp_out")
        sae = sae_class(config_class(d_in=WIDTH, d_sae=LATENTS, metadata=metadata, **settings))
        sae.load_state_dict(weights(seed, *shapes))
        sae.save_model(root / variant)
        keep(root, variant, load, inputs()[0])
    for variant, extra in {
        "pre6-standard": {"activation_fn_str": "relu", "architecture": "standard"},
        "pre6-topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    }.items():
        shape = {"d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32", "normalize_activations": False}
        of = get_sae_class("standard")
        sae = of[0](of[1](d_in=WIDTH, d_sae=LATENTS))
        sae.load_state_dict(weights(50 + len(extra), *SAE_KEYS))
        sae.save_model(root / variant)
        edit(root / variant / "cfg.json", lambda _, own=shape | METADATA | extra: own | {"hook_layer": 1})
        keep(root, variant, load, inputs()[0])


if __name__ == "__main__":
    main("sae-lens", load, make)
