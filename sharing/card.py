"""The model card: README.md of a repository of runs, made from their numbers.

A pure function of what the repository holds. It states only what was measured: L0 and FVU on held-out rows at the end
of training, and where an evaluation is there its table, protocol by protocol. Its head is the hub's metadata, with the
evaluation as a model-index.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from thresher.cache.records import flattened
from thresher.sharing.evaluated import Evaluation, Row
from thresher.sharing.facts import Facts, hub_name, short
from thresher.sharing.index import REPORT, RUNS

_PLOTS = ("delta_l0", "fvu_l0")
_MEASURES = (("fvu", "FVU"), ("l0", "L0"), ("delta", "δ cross-entropy"))
_LOAD = """## Load

```bash
thresher pull {repo} {name}
```

```python
import thresher

dictionary = thresher.load("{place}")
codes = dictionary.encode(activations)
reconstruction = dictionary(activations)
```

`thresher pull {repo}` without a name fetches every run. Only safetensors and JSON are read, and the weights are held \
against their SHA-256."""


class Contents(NamedTuple):
    """What a card is made of."""

    repo: str
    """`owner/name`."""
    runs: Mapping[str, Mapping[str, Any]]
    """config.json by name."""
    facts: Sequence[Facts]
    """Of the same runs, in the order of the tables."""
    evaluation: Evaluation | None
    report_files: frozenset[str]
    """Paths inside `report/`."""
    cache_shared: bool
    license: str | None


def render(contents: Contents) -> str:
    """README.md."""
    names = list(dict.fromkeys(short(fact.model) for fact in contents.facts))
    kinds = list(dict.fromkeys(fact.kind for fact in contents.facts))
    count = len(contents.facts)
    parts = [
        f"---\n{metadata(contents)}\n---\n",
        f"# {contents.repo.split('/')[-1]}\n",
        f"{count} sparse {'dictionary' if count == 1 else 'dictionaries'} ({', '.join(kinds)}) of "
        f"{' and '.join(names)}, trained with Thresher.\n",
        _runs_table(contents.facts),
    ]
    if contents.evaluation is not None:
        parts.append(_evaluation(contents.evaluation, {fact.name for fact in contents.facts}, contents.report_files))
    name = contents.facts[0].name
    place = f"{RUNS}/{contents.repo.split('/')[-1]}/{name}"
    parts.append(_LOAD.format(repo=contents.repo, name=name, place=place) + "\n")
    parts.append(_recipes(contents.runs))
    parts.append(_provenance(contents))
    return "\n".join(parts)


def metadata(contents: Contents) -> str:
    """The card's YAML: what the hub searches by, and the evaluation as a model-index."""
    from huggingface_hub import ModelCardData

    tags = ["interpretability", "sparse-dictionary"]
    tags += [tag for tag in dict.fromkeys(fact.kind for fact in contents.facts) if tag not in tags]
    tags += [tag for tag in dict.fromkeys(fact.firing for fact in contents.facts) if tag not in tags]
    models = _distinct(hub_name(fact.model) for fact in contents.facts)
    results = [] if contents.evaluation is None else _results(contents)
    card = ModelCardData(
        license=contents.license,
        library_name="thresher",
        tags=tags,
        base_model=models[0] if len(models) == 1 else models or None,
        datasets=_distinct(hub_name(fact.data) for fact in contents.facts) or None,
        model_name=contents.repo.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml()).rstrip()


def _results(contents: Contents) -> list[Any]:
    """FVU, L0 and δ of every evaluated dictionary of the repository, under every protocol."""
    from huggingface_hub import EvalResult

    assert contents.evaluation is not None
    known = {fact.name: fact for fact in contents.facts}
    found = []
    said: set[str] = set()
    for row in _own_rows(contents.evaluation, set(known)):
        source = next(known[name].data for name in row.runs if name in known)
        for key, label in _MEASURES:
            value = row.metric(key)
            name = f"{label}, {row.name}" + (f", {row.protocol}" if key == "delta" else "")  # the others are on clean
            if value is not None and name not in said:
                said.add(name)
                found.append(
                    EvalResult(
                        task_type="sparse-dictionary",
                        task_name="Sparse dictionary",
                        dataset_type=hub_name(source) or "text",
                        dataset_name=short(source),
                        dataset_split=_split(contents.evaluation),
                        metric_type=key,
                        metric_name=name,
                        metric_value=value,
                    )
                )
    return found


def _own_rows(evaluation: Evaluation, names: set[str]) -> list[Row]:
    """Rows whose runs are all in the repository."""
    return [row for row in evaluation.replacements if row.runs and set(row.runs) <= names]


def _split(evaluation: Evaluation) -> str | None:
    words = str(evaluation.provenance.get("contexts", "")).split()
    return words[1] if words[:1] == ["split"] and len(words) > 1 else None


def _runs_table(every: Sequence[Facts]) -> str:
    lines = [
        "## Dictionaries\n",
        "| run | kind | firing | k | reads | writes | latents | L0 | FVU | dead |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for fact in every:
        cells = [f"`{fact.name}`", fact.kind, fact.firing, _number(fact.k), _sites(fact.reads), _sites(fact.writes)]
        cells += [_number(fact.n_latents), _number(fact.l0), _number(fact.fvu), _share(fact.dead)]
        lines.append(f"| {' | '.join(cells)} |")
    where = " and ".join(dict.fromkeys(fact.measured_on for fact in every))
    lines.append(
        f"\nL0 (active latents per token and source) and FVU (fraction of variance unexplained) are means on {where}; "
        "dead is the share of latents that had been silent at the end of training.\n"
    )
    return "\n".join(lines)


def _evaluation(evaluation: Evaluation, names: set[str], files: frozenset[str]) -> str:
    masks = evaluation.masks
    lines = [
        "## Evaluation\n",
        f"Reconstructions are written into the model; what that does to its predictions is measured on "
        f"{_number(masks.get('scored_tokens'))} scored tokens of {_number(masks.get('documents'))} documents. δ is "
        "patched minus clean cross-entropy in nats, with its 95 % interval; 0 is perfect.\n",
    ]
    rows = _own_rows(evaluation, names)
    for protocol in dict.fromkeys(row.protocol for row in rows):
        lines.append(f"**{protocol}**: {evaluation.protocols.get(protocol, {}).get('definition', '')}\n")
        lines += ["| dictionary | L0 | FVU | δ | interval | KL | dead |", "|---|---|---|---|---|---|---|"]
        for row in (row for row in rows if row.protocol == protocol):
            cells = [f"`{row.name}`", *(_number(row.metric(key)) for key in ("l0", "fvu", "delta"))]
            cells.append("" if row.interval is None else f"{_number(row.interval[0])} to {_number(row.interval[1])}")
            cells += [_number(row.metric("kl")), _share(row.metric("dead"))]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [f"![{stem}]({REPORT}/plots/{stem}.png)\n" for stem in _PLOTS if f"plots/{stem}.png" in files]
    kept = f"[{REPORT}/results.json]({REPORT}/results.json) has every number, with its definition."
    return "\n".join(lines) + f"\n{kept}\n"


def _recipes(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """What all runs were told, as a recipe file, and what each was told besides."""
    flat = {name: dict(flattened(config["recipe"])) for name, config in configs.items() if config.get("recipe")}
    if not flat:
        return ""
    first = next(iter(flat.values()))
    common = {key for key in first if all(key in keys and keys[key] == first[key] for keys in flat.values())}
    varied = list(dict.fromkeys(key for keys in flat.values() for key in keys if key not in common))
    lines = ["## Recipe\n"]
    if varied:
        lines += [f"| run | {' | '.join(varied)} |", "|---" * (len(varied) + 1) + "|"]
        lines += [
            f"| `{name}` | {' | '.join(_toml(keys[key]) if key in keys else '' for key in varied)} |"
            for name, keys in flat.items()
        ]
        lines.append("")
    lines.append("<details><summary>As a recipe file, every default written out</summary>\n")
    lines += ["```toml", recipe_toml({key: value for key, value in first.items() if key in common}), "```\n"]
    return "\n".join([*lines, "</details>\n"])


def recipe_toml(flat: Mapping[str, Any]) -> str:
    """`{table.key: value}` as TOML; keys without a value are left out, which is what they mean."""
    tables: dict[str, list[str]] = {}
    for dotted, value in flat.items():
        table, _, key = dotted.rpartition(".")
        lines = tables.setdefault(table, [])
        if value is not None:
            lines.append(f"{key} = {_toml(value)}")
    return "\n\n".join("\n".join([f"[{table}]", *lines]) for table, lines in tables.items())


def _toml(value: Any) -> str:
    """A scalar or a list of them; JSON's spelling is TOML's too, infinities apart, which no recipe has."""
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _provenance(contents: Contents) -> str:
    facts = contents.facts
    lines = ["## Provenance\n"]
    for made in _distinct(
        ", ".join(f"{name} {number}" for name, number in (config.get("versions") or {}).items())
        for config in contents.runs.values()
    ):
        lines.append(f"- Trained under {made}.")
    lines += [f"- {line}." for line in _distinct(_made_from("Model", fact.model, fact.model_hashes) for fact in facts)]
    lines += [f"- {line}." for line in _distinct(_made_from("Text", fact.data, fact.data_hashes) for fact in facts)]
    where = " Its manifest and statistics are in `cache/`." if contents.cache_shared else ""
    for print_ in _distinct(fact.cache for fact in facts):
        lines.append(f"- Cache of activations: fingerprint `{print_}`.{where}")
    lines += ["\n| run | SHA-256 of the weights |", "|---|---|"]
    lines += [f"| `{fact.name}` | `{fact.weights}` |" for fact in facts]
    return "\n".join(lines) + "\n"


def _made_from(what: str, name: str | None, hashes: Sequence[tuple[str, str]]) -> str | None:
    return (
        None if name is None else ", ".join([f"{what}: {short(name)}", *(f"{key} `{value}`" for key, value in hashes)])
    )


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _sites(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} … {names[-1]} ({len(names)})"


def _number(value: float | int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
