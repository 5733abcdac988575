"""The whole evaluation against plain float64 loops over tokens: no edit, mask tensor or streaming sum in common."""

import math

import numpy as np
import pytest
import torch

from thresher.cache.layout import Contexts
from thresher.evaluate.run import Replacement
from thresher.evaluate.splice import PROTOCOLS

LAYERS = (0, 1)
INS, OUTS = [f"L{i:02d}.mlp_in" for i in LAYERS], [f"L{i:02d}.mlp_out" for i in LAYERS]
MEANS = {site: torch.linspace(-1, 1, 8) * (i + 1) for i, site in enumerate(OUTS)}


def reconstruct(d, x_by_layer, j):
    """ŷ_j of one token from the inputs of layers 0..j, by matrix products."""
    out = torch.zeros(8, dtype=torch.float64)
    for s in d.sources(j):
        x = x_by_layer[s]
        z = torch.clamp(x @ d.enc[s] + d.bias[s], min=0)
        out = out + z @ d.dec[s, j]
    return out


def forward(target, tokens, replace):
    """Logits [T, V] of one row; `replace(layer, position, inputs, own)` gives the MLP output at a position."""
    x = target.embed[tokens] + target.position[: len(tokens)]
    inputs = {t: {} for t in range(len(tokens))}
    for layer in LAYERS:
        x = x + target.attention(layer, x[None])[0]
        normed = target.norm(x)
        outs = []
        for t in range(len(tokens)):
            inputs[t][layer] = normed[t]
            own = target.mlp(layer, normed[t])
            outs.append(replace(layer, t, inputs[t], own))
        x = x + torch.stack(outs)
    return target.norm(x) @ target.unembed, inputs


def keep_own(layer, t, inputs, own):
    return own


def arms(target, tokens, patched, d, protocol):
    """Logits of the patched, zero and mean arm of one row, as lists over the passes of the protocol."""
    _, clean = forward(target, tokens, keep_own)
    groups = [[layer] for layer in LAYERS] if protocol == "single_site" else [list(LAYERS)]
    out = []
    for group in groups:

        def value(kind, group=group):
            def replace(layer, t, inputs, own):
                if layer not in group or not patched[t]:
                    return own
                if kind == "zero":
                    return torch.zeros_like(own)
                if kind == "mean":
                    return MEANS[OUTS[layer]].double()
                return reconstruct(d, inputs if protocol == "cascade" else clean[t], layer)

            return replace

        out.append({kind: forward(target, tokens, value(kind))[0] for kind in ("patched", "zero", "mean")})
    return out


def by_loops(target, contexts, d, protocol):
    totals = dict.fromkeys(("n", "clean", "patched", "zero", "mean", "kl", "correct", "correct_clean", "agree"), 0.0)
    for row in range(len(contexts.token_id)):
        length = int((contexts.keep[row] > 0).sum())
        tokens = torch.from_numpy(contexts.token_id[row][:length]).long()
        patched = [t > 0 and contexts.keep[row, t] == 1 for t in range(length)]
        clean_TV = forward(target, tokens, keep_own)[0].log_softmax(-1)
        passes = arms(target, tokens, patched, d, protocol)
        for t in range(length - 1):
            if not patched[t] or contexts.document_id[row, t] != contexts.document_id[row, t + 1]:
                continue
            target_id, p = int(tokens[t + 1]), clean_TV[t]
            totals["n"] += 1
            totals["clean"] -= float(p[target_id])
            totals["correct_clean"] += int(p.argmax()) == target_id
            for one in passes:
                q = one["patched"].log_softmax(-1)[t]
                for kind in ("patched", "zero", "mean"):
                    totals[kind] -= float(one[kind].log_softmax(-1)[t][target_id]) / len(passes)
                pairs = zip(p.tolist(), q.tolist(), strict=True)
                totals["kl"] += sum(math.exp(a) * (a - b) for a, b in pairs) / len(passes)
                totals["correct"] += (int(q.argmax()) == target_id) / len(passes)
                totals["agree"] += (int(q.argmax()) == int(p.argmax())) / len(passes)
    n = totals.pop("n")
    mean = {key: value / n for key, value in totals.items()}
    return n, {
        "ce": mean["patched"],
        "ce_clean": mean["clean"],
        "ce_zero": mean["zero"],
        "ce_mean": mean["mean"],
        "delta": mean["patched"] - mean["clean"],
        "kl": mean["kl"],
        "acc": mean["correct"],
        "acc_clean": mean["correct_clean"],
        "acc_drop": mean["correct_clean"] - mean["correct"],
        "agree": mean["agree"],
        "recovered_zero": (mean["zero"] - mean["patched"]) / (mean["zero"] - mean["clean"]),
        "recovered_mean": (mean["mean"] - mean["patched"]) / (mean["mean"] - mean["clean"]),
    }


@pytest.fixture(scope="module")
def two_layers(kit):
    """A two-layer target and text with special tokens in the middle of rows."""
    contexts = kit.contexts(rows=5, n_layers=2)
    keep = contexts.keep.copy()
    keep[1, 5] = keep[2, 8] = 2
    return kit.TinyTarget(n_layers=2), Contexts(contexts.token_id, contexts.document_id, keep)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("topology", ["clt", "transcoders"])
@torch.no_grad()
def test_evaluation_equals_loops_over_tokens(kit, scan, two_layers, protocol, topology):
    target, contexts = two_layers
    if topology == "clt":
        reference = kit.Random(INS, OUTS, seed=4, means=MEANS)
        dictionaries = (reference,)
    else:
        dictionaries = tuple(
            kit.Random([a], [b], seed=i, means={b: MEANS[b]}) for i, (a, b) in enumerate(zip(INS, OUTS, strict=True))
        )
        reference = kit.Base(INS, OUTS)
        reference.sources = lambda j: range(j, j + 1)
        reference.enc, reference.bias = ([getattr(d, key)[0] for d in dictionaries] for key in ("enc", "bias"))
        reference.dec = {(j, j): d.dec[0, 0] for j, d in enumerate(dictionaries)}
    results = scan([Replacement("x", dictionaries, {})], target, contexts, protocols=(protocol,))
    n, expected = by_loops(target, contexts, reference, protocol)
    found = results.find("x", protocol).metrics
    assert results.masks["scored_tokens"] == n
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-10)


def test_protocols_differ_when_errors_travel(kit, scan, two_layers):
    """Else the comparison above could not tell one from another."""
    target, contexts = two_layers
    results = scan([Replacement("x", (kit.Random(INS, OUTS, seed=4, means=MEANS),), {})], target, contexts)
    deltas = [results.find("x", protocol).metrics["delta"] for protocol in PROTOCOLS]
    assert min(abs(a - b) for i, a in enumerate(deltas) for b in deltas[:i]) > 1e-3


@torch.no_grad()
def test_reconstruction_and_codes_equal_whole_arrays(kit, scan, two_layers):
    """FVU, L0 and alive share from all clean activations at once."""
    target, contexts = two_layers
    d = kit.Random(INS, OUTS, seed=4)
    found = scan([Replacement("x", (d,), {})], target, contexts, protocols=("cascade",)).find("x", "cascade")
    sites = target.sites([*INS, *OUTS])
    acts = target.record(torch.from_numpy(contexts.token_id).long(), sites)
    mask = torch.from_numpy((contexts.keep == 1) & (np.arange(12) > 0))
    x, y = [acts[s][mask] for s in INS], [acts[s][mask] for s in OUTS]
    z = [d.pre(i, x[i]) for i in LAYERS]
    yhat = [sum(z[s] @ d.dec[s, j] for s in range(j + 1)) for j in LAYERS]
    fvu = [float((a - b).square().sum() / (a - a.mean(0)).square().sum()) for a, b in zip(y, yhat, strict=True)]
    assert [site["fvu"] for site in found.per_site] == pytest.approx(fvu, abs=1e-12)
    assert found.metrics["fvu"] == pytest.approx(np.mean(fvu), abs=1e-12)
    l0 = [float((one > 0).sum(1).double().mean()) for one in z]
    assert [source["l0"] for source in found.sources] == pytest.approx(l0)
    assert found.cost["active_per_mlp"] == pytest.approx((l0[0] + l0[0] + l0[1]) / 2)
    assert found.metrics["alive"] == pytest.approx(np.mean([float((one > 0).any(0).double().mean()) for one in z]))


def test_l0_of_the_patched_stream_is_its_own(kit, scan, two_layers):
    target, contexts = two_layers
    found = scan([Replacement("x", (kit.Random(INS, OUTS, seed=4),), {})], target, contexts, protocols=("cascade",))
    metrics = found.find("x", "cascade").metrics
    assert metrics["l0_patched"] != metrics["l0"]
    assert metrics["l0_patched"] == pytest.approx(metrics["l0"], rel=0.3)


def test_a_reader_of_a_patched_site_sees_the_patch(kit, scan, two_layers):
    """resid_post of layer 0 is zeroed by one dictionary; another reads it there and passes on what it read."""
    target, contexts = two_layers

    class Relay(kit.Base):
        def decode(self, destination, codes):
            return self.value(codes[0])

    class Direct(kit.Base):
        def decode(self, destination, codes):
            return torch.zeros(codes[0].tokens, 8, dtype=torch.float64)

    zero = kit.Constant("L00.resid_post", torch.zeros(8))
    relay = Replacement("relay", (zero, Relay(["L00.resid_post"], ["L01.mlp_out"])), {})
    direct = Replacement("direct", (zero, Direct(["L00.resid_post"], ["L01.mlp_out"])), {})
    results = scan([relay, direct], target, contexts)
    deltas = {(n, p): results.find(n, p).metrics["delta"] for n in ("relay", "direct") for p in PROTOCOLS}
    assert deltas["relay", "cascade"] == deltas["direct", "cascade"]
    assert deltas["relay", "clean_input"] != deltas["direct", "clean_input"]
