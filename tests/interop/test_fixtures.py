"""What we make of files that other packages wrote is what those packages computed of them.

The stored outputs are held to the formats' equations by test_equations.py; here, to our readers and the canonical form.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.interop.test_equations import CASES, FIXTURES, OUTPUTS
from thresher.interop import formats
from thresher.interop.canonical import codes, decoded

FORMS = {
    "saelens": "saelens",
    "circuit_tracer": "circuit-tracer",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "sparsify",
    "gemma_scope": "npz",
    "openmoss": "openmoss",
}


def place(tool: str, variant: str) -> Path:
    """What a user would name: the directory of the weights, of Gemma Scope's files the file."""
    folder = FIXTURES / tool / variant
    if tool == "gemma_scope":
        files = sorted(folder.rglob("params*"))
        return files[0] if len(files) == 1 else files[0].parent
    inner = [path.parent for name in ("sae.safetensors", "ae.pt") for path in folder.rglob(name)]
    return inner[0] if inner else folder


def largest(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def scales(ours: Tensor, theirs: Tensor) -> Tensor:
    """[S, 1, F] ours over theirs of a latent, where it is largest: OpenMOSS ranks by a · n and returns a, we return
    what was ranked."""
    best = theirs.abs().argmax(1, keepdim=True)
    top = theirs.gather(1, best)
    return torch.where(top != 0, ours.gather(1, best) / torch.where(top != 0, top, 1.0), 1.0)


@pytest.mark.parametrize(("tool", "variant"), CASES)
def test_what_is_imported_computes_what_the_library_did(tool: str, variant: str) -> None:
    stored = load_file(FIXTURES / tool / f"{variant}{OUTPUTS}")
    x, code, output = ((t if t.ndim == 3 else t[None]).double() for t in (stored[n] for n in ("x", "code", "output")))
    read = formats.load(FORMS[tool]).read
    assert read is not None
    found = read(place(tool, variant))
    first = 0
    for foreign in found:
        reading = foreign.readings[0]
        mine = slice(first, first + len(reading.dictionary.sources))
        rows = list(x[mine])
        theirs, written = reading.forward(rows)
        given = code[mine] * scales(torch.stack(theirs), code[mine]) if variant.endswith("topk-norms") else code[mine]
        assert largest(torch.stack(theirs), given) < 1e-6, "the reader's own equation, code"
        assert largest(torch.stack(written), output[mine]) < 1e-6, "the reader's own equation, output"
        first = mine.stop
        if "negative thresholds raised to 0" in reading.label:
            continue  # our form has no negative codes; the import says so, and measures what it changes
        z = [codes(reading.dictionary, s, row) for s, row in enumerate(rows)]
        assert largest(torch.stack(decoded(reading.dictionary, z, rows)), output[mine]) < 1e-6, "canonical output"
        assert torch.equal((torch.stack(z) > 0).sum(2), (code[mine] != 0).sum(2)), "canonical L0"
    assert first == len(x), "every layer is there"
