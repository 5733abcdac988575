"""A loaded run in a notebook: dense codes of any shape, and hooks beside a real transformer-lens model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import thresher
from tests.interop.conftest import LATENTS, LAYERS, Made, make
from thresher.cache.errors import UserError
from thresher.cache.records import to_dict
from thresher.harvest.checkpoint import bundled
from thresher.interop.canonical import Canonical, Source, codes, to_coder
from thresher.interop.notebook import Loaded
from thresher.train.files import save_run


def loaded(dictionary: Canonical) -> Loaded:
    return Loaded(to_coder(dictionary), {})


def test_codes_and_reconstructions_keep_the_leading_shape(made: Made, rows: Tensor) -> None:
    dictionary = made("sae", "threshold")
    sae, x = loaded(dictionary), rows.float().unflatten(0, (4, 16))
    z = sae.encode(x)
    assert z.shape == (4, 16, LATENTS)
    torch.testing.assert_close(z.flatten(0, 1), codes(dictionary, 0, rows).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(z), sae(x))
    torch.testing.assert_close(sae.encode({"L01.resid_post": x}), z)
    torch.testing.assert_close(sae.encode({"blocks.1.hook_resid_post": x}), z)
    assert (sae.hook_in, sae.hook_out) == ("blocks.1.hook_resid_post", "blocks.1.hook_resid_post")


def test_several_sites_come_as_a_mapping_or_in_order(made: Made, rows: Tensor) -> None:
    clt = loaded(made("clt", "threshold"))
    x = [rows.float() + s for s in range(LAYERS)]
    acts = {f"blocks.{s}.mlp.hook_in": one for s, one in enumerate(x)}
    z, y = clt.encode_all(acts), clt.forward_all(acts)
    assert [part.shape for part in z] == [(64, LATENTS)] * LAYERS
    assert list(y) == [f"blocks.{s}.hook_mlp_out" for s in range(LAYERS)]
    for name, again in clt.decode_all(z).items():
        torch.testing.assert_close(again, y[name])
        torch.testing.assert_close(clt.forward_all(x)[name], y[name])
    with pytest.raises(UserError, match="Use hooks_in"):
        _ = clt.hook_in
    for alone, plural in ((clt.encode, "encode_all"), (clt, "forward_all")):
        with pytest.raises(UserError, match=f"Use {plural}"):
            alone(acts)
    with pytest.raises(UserError, match="has 3 sources and was given codes of 1"):
        clt.decode(z[0])
    with pytest.raises(UserError, match=r"reads L01.mlp_in, which is not among"):
        clt.encode_all({"blocks.0.mlp.hook_in": x[0]})
    with pytest.raises(UserError, match="given 1 tensors"):
        clt(x[0])


def test_a_skip_connection_needs_its_input(made: Made, rows: Tensor) -> None:
    transcoder, x = loaded(made("transcoder", "topk", skip=True)), rows.float()
    z = transcoder.encode(x)
    with pytest.raises(UserError, match="needs the activations"):
        transcoder.decode(z)
    torch.testing.assert_close(transcoder.decode(z, x), transcoder(x))
    without = transcoder.decode(torch.zeros_like(z), x)
    assert not torch.allclose(without, transcoder(x))


def test_a_wrong_width_is_refused(made: Made) -> None:
    with pytest.raises(UserError, match=r"width 16, got shape \[2, 8\]"):
        loaded(made("sae", "topk")).encode(torch.zeros(2, 8))


def test_hooks_serve_a_model_of_another_dtype(made: Made, rows: Tensor) -> None:
    transcoder = loaded(made("transcoder", "threshold", skip=True))
    (_, read), (_, write) = transcoder.hooks()
    x = rows.bfloat16().unflatten(0, (4, 16))
    assert read(x, hook=None) is None
    patched = write(torch.zeros_like(x), hook=None)
    assert patched is not None
    assert patched.dtype == torch.bfloat16
    torch.testing.assert_close(patched, transcoder(x).bfloat16())


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return TransformerBridge.boot_transformers(str(bundled("bundled:books-128", "", "model")))


def perfect(kind: str, width: int) -> Canonical:
    """An SAE that reconstructs every input: each direction and its opposite, cut off below 0."""
    eye = torch.eye(width, dtype=torch.float64)
    both = torch.cat([eye, -eye])
    zeros = torch.zeros(2 * width, dtype=torch.float64)
    part = Source(both, zeros, zeros, both[:, None])
    return make(kind, "relu")._replace(sources=(part,), b_dec=(torch.zeros(width, dtype=torch.float64),))


def test_hooks_put_reconstructions_into_the_model(bridge: TransformerBridge, tmp_path: Path) -> None:
    save_run(
        tmp_path / "sae",
        to_coder(perfect("sae", 128)),
        {"name": "sae", "dictionary": _spec(perfect("sae", 128)), "training": {"finished": True}},
    )
    sae = thresher.load(tmp_path / "sae")
    tokens = bridge.to_tokens("The captain looked at the sea.")
    plain, acts = bridge.run_with_cache(tokens)
    torch.testing.assert_close(sae(acts), acts[sae.hook_in])
    torch.testing.assert_close(bridge.run_with_hooks(tokens, fwd_hooks=sae.hooks()), plain, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        sae.dictionary.b_dec[0, 0] += 9.0  # not the same for all dimensions: a norm would take that off
    assert not torch.allclose(bridge.run_with_hooks(tokens, fwd_hooks=sae.hooks()), plain, atol=1e-2)


def _spec(dictionary: Canonical) -> dict:
    return to_dict(to_coder(dictionary).spec)


def test_only_what_is_there_can_be_imported() -> None:
    assert thresher.load is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        getattr(thresher, "lo" + "de")
