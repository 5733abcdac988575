"""Which runs of zoo.toml go to which tool, and by which script of which environment they are read there."""

from typing import NamedTuple


class Variant(NamedTuple):
    """A set of runs on its way to a tool."""

    environment: str
    script: str
    to: str
    """Format of the export; empty: the script takes the run directory itself."""
    runs: str
    """Group of runs: the name of its block in zoo.toml."""
    reads_as: str
    """What it is there."""


def _saelens(environment: str) -> list[Variant]:
    forms = {
        "sae-relu": "standard",
        "sae-gated": "jumprelu",
        "sae-topk": "topk",
        "sae-topk-norm": "topk",
        "sae-batchtopk": "jumprelu",
        "sae-jumprelu": "jumprelu",
        "sae-global": "jumprelu",
        "sae-matryoshka": "jumprelu",
        "transcoder-relu": "transcoder",
        "transcoder-jumprelu": "jumprelu_transcoder",
        "transcoder-batchtopk": "jumprelu_transcoder",
        "transcoder-gated": "jumprelu_transcoder",
        "transcoder-wide": "jumprelu_transcoder",
        "skip-relu": "skip_transcoder",
    }
    if environment == "saelens":  # 6.18.0 has none with a threshold and a skip connection
        forms |= {"skip-jumprelu": "jumprelu_skip_transcoder", "skip-wide": "jumprelu_skip_transcoder"}
    return [Variant(environment, "with_saelens.py", "saelens", runs, form) for runs, form in forms.items()]


def _others() -> list[Variant]:
    tools = {
        ("circuit-tracer", "with_circuit_tracer.py", "circuit-tracer"): {
            "transcoder-relu": "PLT, ReLU",
            "transcoder-jumprelu": "PLT, JumpReLU",
            "transcoder-batchtopk": "PLT, JumpReLU",
            "skip-relu": "PLT, ReLU, skip",
            "skip-jumprelu": "PLT, JumpReLU, skip",
            "clt-relu": "CLT, ReLU",
            "clt-jumprelu": "CLT, JumpReLU",
            "clt-batchtopk": "CLT, JumpReLU",
            "clt-matryoshka": "CLT, JumpReLU",
        },
        ("dictionary-learning", "with_dictionary_learning.py", "dictionary-learning"): {
            "sae-relu": "AutoEncoderNew",
            "sae-gated": "JumpReluAutoEncoder",
            "sae-topk": "AutoEncoderTopK",
            "sae-topk-norm": "AutoEncoderTopK",
            "sae-batchtopk": "BatchTopKSAE",
            "sae-jumprelu": "JumpReluAutoEncoder",
            "sae-matryoshka": "BatchTopKSAE",
        },
        ("sparsify", "with_sparsify.py", "sparsify"): {
            "sae-topk": "topk",
            "sae-topk-norm": "topk",
            "sae-groupmax": "groupmax",
            "transcoder-topk": "topk, transcode",
            "transcoder-groupmax": "groupmax, transcode",
            "skip-topk": "topk, transcode, skip",
        },
    }
    return [Variant(*tool, runs, form) for tool, rows in tools.items() for runs, form in rows.items()]


def _objects() -> list[Variant]:
    """Objects made of run directories in Python, without files in between."""
    saes = {
        "sae-relu": "standard",
        "sae-gated": "jumprelu",
        "sae-topk": "topk",
        "sae-batchtopk": "jumprelu",
        "sae-jumprelu": "jumprelu",
        "sae-matryoshka": "jumprelu",
    }
    bench = [Variant("saelens", "with_saebench.py", "", runs, form) for runs, form in saes.items()]
    lens = saes | {"skip-jumprelu": "jumprelu_skip_transcoder"}
    return bench + [Variant("saelens", "with_saelens_object.py", "", runs, form) for runs, form in lens.items()]


VARIANTS = [*_saelens("saelens"), *_saelens("saelens-618"), *_others(), *_objects()]
