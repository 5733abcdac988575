"""Made-up results of a sweep with every field filled, for tests of what is drawn and written. No model is run.

Numbers follow simple laws (loss falls with k and with size, a protocol scales it), so that charts look like real ones.
"""

import math
from typing import Any

from thresher.evaluate.columns import FRONT_AXIS
from thresher.evaluate.costs import AXES
from thresher.evaluate.pareto import Point, fronts
from thresher.evaluate.results import PROTOCOLS, Results, Row
from thresher.evaluate.statistics import Interval

WIDTH, LAYERS, TOKENS = 128, 4, 48_000
SCALE = {"cascade": 1.0, "clean_input": 0.85, "single_site": 0.25}
OUTS = tuple(f"L{i:02d}.mlp_out" for i in range(LAYERS))
INS = tuple(f"L{i:02d}.mlp_in" for i in range(LAYERS))
STREAM = ("L03.resid_post",)
QUALITY = {"transcoder BatchTopK": 1.0, "transcoder TopK": 1.1, "SAE TopK": 0.9, "CLT BatchTopK": 0.75}

Setting = tuple[str, str, int, int, int, tuple[str, ...]]
"""Name, family, k, latents per source, seed, written sites."""


def settings(many: bool) -> list[Setting]:
    out: list[Setting] = []
    for family in QUALITY:
        kind, firing = family.lower().split()
        for latents in (1024, 4096) if many else (1024,):
            for k in (8, 16, 32):
                out.append((f"{kind}-{firing}-{latents}-k{k}", family, k, latents, 0, OUTS))
    for seed in (1, 2):
        out.append((f"transcoder-topk-1024-k16-s{seed}", "transcoder TopK", 16, 1024, seed, OUTS))
    out.append(("stream_16", "SAE TopK", 16, 1024, 0, STREAM))
    return out


def sweep(many: bool = False, protocols: tuple[str, ...] = tuple(PROTOCOLS)) -> Results:
    """15 replacements, or 27, under the protocols, with baselines, seeds, matched values and every picture's data."""
    rows = [_row(one, protocol) for protocol in protocols for one in settings(many)]
    _mark(rows)
    for protocol in protocols:
        rows += _baselines(protocol)
    facts = {"scored_tokens": TOKENS, "rows": 188, "units": 39, "few_units": False}
    return Results(
        provenance={"target": {"name": "bundled:books-128"}, "dtype": "torch.float32", "versions": {"torch": "2.13"}},
        masks={
            "patch_rule": "keep = 1 except the first real position of a row",
            "score_rule": "source t is patched, t + 1 is real, both in one document",
            "scored_tokens": TOKENS,
            "excluded_share": 0.0047,
            "unit": "document",
            "sha256": "e1551a03629f979036d11f8aa3678a43acdb0226e27a328d412e64ae686f33c1",
        },
        protocols={protocol: {"definition": PROTOCOLS[protocol], **facts} for protocol in protocols},
        rows=tuple(rows),
        pairs=(),
        checks=({"name": "identity", "delta": 0.0, "kl": 0.0, "agree": 1.0, "passed": True},),
        seeds=tuple(_seeds(rows, protocol) for protocol in protocols),
        hypervolumes=tuple(_hypervolume(p, axis, f) for p in protocols for axis in AXES for f in QUALITY),
        matched=tuple(_matched(p, axis, at) for p in protocols for axis in AXES for at in ("cost", "loss")),
        excluded=(),
        notes=("Synthetic: no model was run.",),
        segments=None,
    )


def _wobble(text: str) -> float:
    """A few percent up or down, by the name alone."""
    return 1 + 0.05 * math.sin(sum(map(ord, text)))


def _row(one: Setting, protocol: str) -> Row:
    name, family, k, latents, seed, sites = one
    clt, stream = family.startswith("CLT"), sites == STREAM
    l0 = k * _wobble(name[::-1])
    delta = SCALE[protocol] * QUALITY[family] * 1.1 * k**-0.6 * (1024 / latents) ** 0.2 * _wobble(name)
    fvu = 0.3 * QUALITY[family] * k**-0.35 * (1024 / latents) ** 0.15 * _wobble(name)
    dead = 0.002 * latents / k / 100
    sources = sites if stream or family.startswith("SAE") else INS
    cost = {
        "l0": l0,
        "active_per_mlp": l0 * (2.5 if clt else 1),
        "active_parameters": l0 * len(sources) * WIDTH * (3.5 if clt else 2),
    }
    metrics = {
        "ce": 4.07 + delta, "ce_clean": 4.07, "delta": delta, "ppl_ratio": math.exp(delta), "kl": 1.15 * delta,
        "agree": 1 - delta, "acc_drop": delta / 8, "recovered_zero": 1 - delta / 5.4, "recovered_mean": 1 - delta / 5.3,
        "fvu": fvu, "dead": dead, "dense_10": 0.001, "n_latents": float(latents * len(sources)),
        "n_parameters": float(latents * len(sources) * 2 * WIDTH), "l0_median": l0,
        **cost,
    }  # fmt: skip
    if protocol == "cascade":
        metrics["l0_patched"] = 1.04 * l0
    spread = {"delta": 0.06, "kl": 0.06, "ppl_ratio": 0.01, "agree": 0.01, "acc_drop": 0.1, "recovered_zero": 0.004}
    return Row(
        name=name,
        kind="replacement",
        family=family,
        protocol=protocol,
        reads=tuple(sources),
        sites=sites,
        metrics=metrics,
        intervals={key: Interval(metrics[key] * (1 - s), metrics[key] * (1 + s)) for key, s in spread.items()},
        cost=cost,
        front={},
        per_site=tuple(_site(site, i, fvu, delta, protocol) for i, site in enumerate(sites)),
        sources=tuple(_source(site, i, l0, dead, latents) for i, site in enumerate(sources)),
        facts={
            "kind": family.split()[0].lower(),
            "k": k,
            "sparsity": f"k = {k}",
            "n_latents": latents,
            "seed": seed,
            "curves": _curves(fvu, l0, dead),
            "runs": [f"runs/{name}"],
        },
        positions=_positions(delta, l0),
        chance={},
        write_norms=(_write_norms(name),) if clt else (),
    )


def _site(site: str, i: int, fvu: float, delta: float, protocol: str) -> dict[str, Any]:
    own = {"fvu": fvu * (0.5 + 0.35 * i), "cosine": 1 - fvu / 2}
    out: dict[str, Any] = {"site": site, **own, "slices": {}, "compat": {}}
    for name, factor in (("all", 1.3), ("first", 4.0), ("typical", 0.97)):
        out["slices"][name] = {"fvu": own["fvu"] * factor, "cosine": own["cosine"] / factor**0.1}
    out["compat"] = {"ev_legacy_token": 1 - 1.1 * fvu, "fve_centred": 1 - 0.95 * fvu, "batch": 2048}
    if protocol == "single_site":
        out["delta"] = delta * (2.2, 0.15, 0.4, 1.1)[i]
    return out


def _source(site: str, i: int, l0: float, dead: float, latents: int) -> dict[str, Any]:
    steps = math.ceil(4 * math.log10(TOKENS))
    edges = [step / 4 for step in range(-steps, 1)]
    centre = math.log10(l0 / latents) - 0.4
    weight = [math.exp(-((edge + 0.125 - centre) ** 2) / 0.5) for edge in edges[:-1]]
    alive = latents * (1 - dead)
    counts = [float(round(alive * w / sum(weight))) for w in weight]
    density = {"log10_edges": edges, "latents": counts, "dead": [max(0.0, latents - sum(counts))]}
    numbers = {"l0": l0 * (1 + 0.05 * i), "l0_median": l0, "dead": dead * i, "tokens": float(TOKENS)}
    return {"dictionary": f"d{i}", "site": site, "n_latents": float(latents), "density": density, **numbers}


def _curves(fvu: float, l0: float, dead: float) -> dict[str, list[float]]:
    rows = [float(2048 * step) for step in range(1, 480, 2)]
    fall = [1 + 3 * math.exp(-row / 90_000) for row in rows]
    return {
        "rows": rows,
        "fvu": [fvu * f for f in fall],
        "l0": [l0 * (0.8 + 0.2 / f) for f in fall],
        "dead": [dead * (f - 0.9) for f in fall],
    }


def _positions(delta: float, l0: float) -> dict[str, list[float | None]]:
    first = [1, 2, 4, 8, 16, 32, 64, 128]
    last = [1, 3, 7, 15, 31, 63, 127, 255]
    rise = [0.5 + 0.08 * i for i in range(8)]
    return {
        "first": [float(v) for v in first],
        "last": [float(v) for v in last],
        "tokens": [188.0 * (b - a + 1) for a, b in zip(first, last, strict=True)],
        "ce": [5.5 - 0.2 * i for i in range(8)],
        "delta": [delta * r for r in rise],
        "kl": [1.1 * delta * r for r in rise],
        "l0": [l0 * (1.2 - 0.03 * i) for i in range(8)],
    }


def _write_norms(name: str) -> dict[str, Any]:
    raw = [[2.0 ** -(j - i) if j >= i else None for j in range(LAYERS)] for i in range(LAYERS)]
    total = sum(value for line in raw for value in line if value is not None)
    share = [[value and value / total for value in line] for line in raw]
    return {"dictionary": name, "reads": list(INS), "writes": list(OUTS), "share": share}


def _mark(rows: list[Row]) -> None:
    for axis in AXES:
        points = [Point(r.name, (r.protocol, r.sites), r.cost[axis], r.metrics["delta"] or 0.0) for r in rows]
        for row, on in zip(rows, fronts(points).on, strict=True):
            row.front[axis] = on
            row.chance[axis] = 0.9 + 0.1 * math.sin(len(row.name)) if on else 0.02
    assert all(any(row.front[axis] for row in rows) for axis in AXES)
    assert FRONT_AXIS in AXES


def _baselines(protocol: str) -> list[Row]:
    def row(name: str, delta: float, cost: dict[str, float], sites: tuple[str, ...] = OUTS) -> Row:
        metrics: dict[str, float | None] = {
            "ce": 4.07 + delta, "delta": delta, "kl": 1.1 * delta, "agree": math.exp(-delta), "acc_drop": 0.04 * delta,
            "ppl_ratio": math.exp(delta), "recovered_zero": 1 - delta / 5.4, "recovered_mean": 1 - delta / 5.3, **cost,
        }  # fmt: skip
        spans: dict[str, Interval | None] = {"delta": Interval(0.98 * delta, 1.02 * delta)}
        return Row(name, "baseline", "baseline", protocol, (), sites, metrics, spans, cost, {}, (), (), {}, {}, {}, ())

    scale = SCALE[protocol]
    neurons = [
        row(
            f"neurons k={k}",
            scale * 4 * k**-0.45,
            {"l0": float(k), "active_per_mlp": float(k), "active_parameters": float(k * 2 * WIDTH * LAYERS)},
        )
        for k in (8, 16, 32, 64)
    ]
    ablations = [row("clean", 0.0, {}), row("zero", 5.42 * scale, {}), row("mean", 5.39 * scale, {})]
    return [*ablations, row("affine", 0.62 * scale, {}), *neurons, row("zero", 6.1 * scale, {}, STREAM)]


def _seeds(rows: list[Row], protocol: str) -> dict[str, Any]:
    names = ["transcoder-topk-1024-k16", "transcoder-topk-1024-k16-s1", "transcoder-topk-1024-k16-s2"]
    own = [row for row in rows if row.protocol == protocol and row.name in names]
    reach = {}
    for key in ("delta", "kl", "fvu", "dead"):
        values = [value for row in own if (value := row.metrics[key]) is not None]
        reach[key] = [min(values), max(values)]
    return {"protocol": protocol, "family": own[0].family, "names": names, **reach}


def _hypervolume(protocol: str, axis: str, family: str) -> dict[str, Any]:
    value = 3.2 / QUALITY[family]
    reference = {"cost": 64.0 if axis == "l0" else 160.0, "loss": 5.39}
    span = {"value": value, "low": value - 0.1, "high": value + 0.1, "reference": reference}
    return {"protocol": protocol, "sites": list(OUTS), "family": family, "axis": axis, **span}


def _matched(protocol: str, axis: str, at: str) -> dict[str, Any]:
    def value(family: str) -> dict[str, Any]:
        if family == "SAE TopK" and at == "loss":
            return {"family": family, "value": None, "low": None, "high": None}
        base = SCALE[protocol] * 0.2 * QUALITY[family] if at == "cost" else 20 * QUALITY[family]
        return {"family": family, "value": base, "low": 0.95 * base, "high": 1.05 * base}

    where = 16.0 if at == "cost" else 0.2
    values = sorted((value(family) for family in QUALITY), key=lambda v: v["value"] or math.inf)
    for one in values[1:]:
        behind = one["value"] and one["value"] - values[0]["value"]
        one |= {
            "difference": behind,
            "difference_low": behind and behind - 0.01,
            "difference_high": behind and 2 * behind,
        }
    return {"protocol": protocol, "sites": list(OUTS), "axis": axis, "at": at, "where": where, "values": values}
