"""Edits that put an arm in place of the model's own values, under each protocol.

- `cascade`: one pass in which every encoder reads the stream as the earlier replacements left it. A cross-layer
  transcoder keeps the codes of its earlier layers as they arose on that stream.
- `clean_input`: reconstructions of the clean pass, all written at once as constants.
- `single_site`: one of those constants at a time; everything else is the model's own.

Only positions in the patch mask P are encoded or written; elsewhere the live value stays, in every arm. Encoding and
decoding are the dictionary's own: nothing here knows a weight or a firing rule. How rows are read and written, and
who reads what in a cascade: cache/patching.py, which training end to end shares.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from thresher.cache import patching
from thresher.cache.contracts import Codes, Dictionary, Edit, side_by_side
from thresher.cache.patching import places, positions, read_rows, write_rows

Protocol = Literal["cascade", "clean_input", "single_site"]
PROTOCOLS: tuple[Protocol, ...] = ("cascade", "clean_input", "single_site")

Observer = Callable[[int, int, Codes], None]
"""Told of codes as they arise: index of the dictionary, index of its source, codes of the patched positions."""


def recording_edits(sites: Sequence[str], patch_BT: Tensor, into: dict[str, Tensor]) -> dict[str, Edit]:
    """Edits that change nothing and keep each site's patched positions in `into`, [N, D]."""
    return patching.recording_edits(sites, places(patch_BT), into)


def constant_edits(values: Mapping[str, Tensor], patch_BT: Tensor) -> dict[str, Edit]:
    """Edits that write given values ([N, D] rows, or one [D] for all) at the patched positions."""
    return patching.constant_edits(values, positions(patch_BT))


def identity_edits(sites: Sequence[str], patch_BT: Tensor) -> dict[str, Edit]:
    """Edits that write each site's own live value through the same path as every other arm: must equal clean."""

    places_N = places(patch_BT)

    def edit(x_BTD: Tensor) -> Tensor:
        return write_rows(x_BTD, places_N, read_rows(x_BTD, places_N))

    return dict.fromkeys(sites, edit)


def encode_clean(dictionaries: Sequence[Dictionary], clean: Mapping[str, Tensor]) -> list[list[Codes]]:
    """Codes by dictionary and source of the clean values [N, D] by site."""
    return [[d.encode(s, side_by_side(clean, sites)) for s, sites in enumerate(d.inputs)] for d in dictionaries]


def decode_all(dictionaries: Sequence[Dictionary], codes: Sequence[Sequence[Codes]]) -> dict[str, Tensor]:
    """Reconstructions [N, E] by written site."""
    out = {}
    for dictionary, own in zip(dictionaries, codes, strict=True):
        for j, site in enumerate(dictionary.writes):
            out[site] = dictionary.decode(j, [own[s] for s in dictionary.sources(j)])
    return out


class Settled(NamedTuple):
    """What a cascade has in common with the clean pass: all that comes before its first write."""

    codes: dict[tuple[int, int], Codes]
    """By dictionary and source."""
    values: dict[str, Tensor]
    """[N, E] reconstructions by written site."""


NOTHING = Settled({}, {})


def settled(
    dictionaries: Sequence[Dictionary],
    order: Sequence[str],
    codes: Sequence[Sequence[Codes]],
    yhats: Mapping[str, Tensor],
) -> Settled:
    """Of codes and reconstructions of the clean pass, those that a cascade would find again; `order`: of the sites."""
    rank = {site: at for at, site in enumerate(order)}
    first = min(rank[site] for site in writes(dictionaries))
    known = {
        (i, s): codes[i][s]
        for i, d in enumerate(dictionaries)
        for s, sites in enumerate(d.inputs)
        if all(rank[site] < first or (rank[site] == first and site in d.writes) for site in sites)
    }
    values = {
        site: yhats[site]
        for i, d in enumerate(dictionaries)
        for j, site in enumerate(d.writes)
        if all((i, s) in known for s in d.sources(j))
    }
    return Settled(known, values)


def cascade_edits(
    dictionaries: Sequence[Dictionary],
    patch_BT: Tensor,
    *,
    errors: Mapping[str, Tensor] | None = None,
    observe: Observer | None = None,
    known: Settled = NOTHING,
) -> dict[str, Edit]:
    """Edits for one pass of the cascade; good for one call of `Target.logits`.

    `errors` [N, E] by written site, the clean value minus its reconstruction, is added to what is written: with every
    error in place the patched model is the clean one. What is `known` is not computed again.
    """
    codes: dict[tuple[int, int], Codes] = dict(known.codes)
    if observe is not None:
        for (i, source), found in known.codes.items():
            observe(i, source, found)

    def encode(i: int, source: int, x_ND: Tensor) -> None:
        codes[i, source] = dictionaries[i].encode(source, x_ND)
        if observe is not None:
            observe(i, source, codes[i, source])

    def decode(i: int, destination: int) -> Tensor:
        d, site = dictionaries[i], dictionaries[i].writes[destination]
        yhat_NE = known.values.get(site)
        if yhat_NE is None:
            yhat_NE = d.decode(destination, [codes[i, s] for s in d.sources(destination)])
        return yhat_NE if errors is None else yhat_NE + errors[site]

    unknown = [
        [() if (i, s) in known.codes else sites for s, sites in enumerate(d.inputs)] for i, d in enumerate(dictionaries)
    ]
    return patching.stream_edits(unknown, [d.writes for d in dictionaries], positions(patch_BT), encode, decode)


def reads(dictionaries: Sequence[Dictionary]) -> tuple[str, ...]:
    """Sites read, each once, in order of appearance."""
    return tuple(dict.fromkeys(site for d in dictionaries for site in d.reads))


def writes(dictionaries: Sequence[Dictionary]) -> tuple[str, ...]:
    """Sites written, in order of appearance."""
    return tuple(site for d in dictionaries for site in d.writes)
