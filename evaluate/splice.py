"""Edits that put an arm in place of the model's own values, under each protocol.

- `cascade`: one pass in which every encoder reads the stream as the earlier replacements left it. A cross-layer
  transcoder keeps the codes of its earlier layers as they arose on that stream.
- `clean_input`: reconstructions of the clean pass, all written at once as constants.
- `single_site`: one of those constants at a time; everything else is the model's own.

Only positions in the patch mask P are encoded or written; elsewhere the live value stays, in every arm. Encoding and
decoding are the dictionary's own: nothing here knows a weight or a firing rule.

A site may be read by several dictionaries and written by one. The writer reads it as the model made it (an SAE reads
what it is about to overwrite); any other reader sees what was written, as the rest of the model does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from thresher.cache.contracts import Codes, Dictionary, Edit, Overwriting

Protocol = Literal["cascade", "clean_input", "single_site"]
PROTOCOLS: tuple[Protocol, ...] = ("cascade", "clean_input", "single_site")

Observer = Callable[[int, int, Codes], None]
"""Told of codes as they arise: index of the dictionary, index of its source, codes of the patched positions."""


def places(patch_BT: Tensor) -> Tensor:
    """[N] int64: the patched positions of the flattened batch, which a mask would be searched for at every site."""
    return patch_BT.flatten().nonzero()[:, 0]


def _overwriting(edit: Callable[[Tensor], Tensor | None], patch_BT: Tensor) -> Overwriting:
    """An edit that writes every patched position, whatever is there."""
    return Overwriting(edit, places(~patch_BT))


def read_rows(x_BTD: Tensor, places_N: Tensor) -> Tensor:
    """The patched positions as [N, D] in float32, or in the model's dtype where that is wider."""
    x_ND = x_BTD.flatten(0, 1).index_select(0, places_N)
    return x_ND.to(torch.promote_types(x_BTD.dtype, torch.float32))


def write_rows(x_BTD: Tensor, places_N: Tensor, value: Tensor) -> Tensor:
    """A copy of the live value with `value` ([N, D] or [D]) at the patched positions."""
    out_BTD = x_BTD.clone(memory_format=torch.contiguous_format)
    rows_ND = value.to(x_BTD.dtype).expand(places_N.shape[0], -1)
    out_BTD.view(-1, x_BTD.shape[-1]).index_copy_(0, places_N, rows_ND)
    return out_BTD


def recording_edits(sites: Sequence[str], patch_BT: Tensor, into: dict[str, Tensor]) -> dict[str, Edit]:
    """Edits that change nothing and keep each site's patched positions in `into`, [N, D]."""

    places_N = places(patch_BT)

    def recorder(site: str) -> Edit:
        def edit(x_BTD: Tensor) -> None:
            into[site] = read_rows(x_BTD, places_N)

        return edit

    return {site: recorder(site) for site in sites}


def constant_edits(values: Mapping[str, Tensor], patch_BT: Tensor) -> dict[str, Edit]:
    """Edits that write given values ([N, D] rows, or one [D] for all) at the patched positions."""

    places_N = places(patch_BT)

    def writer(value: Tensor) -> Edit:
        return _overwriting(lambda x_BTD: write_rows(x_BTD, places_N, value), patch_BT)

    return {site: writer(value) for site, value in values.items()}


def identity_edits(sites: Sequence[str], patch_BT: Tensor) -> dict[str, Edit]:
    """Edits that write each site's own live value through the same path as every other arm: must equal clean."""

    places_N = places(patch_BT)

    def edit(x_BTD: Tensor) -> Tensor:
        return write_rows(x_BTD, places_N, read_rows(x_BTD, places_N))

    return dict.fromkeys(sites, edit)


def encode_clean(dictionaries: Sequence[Dictionary], clean: Mapping[str, Tensor]) -> list[list[Codes]]:
    """Codes by dictionary and source of the clean values [N, D] by site."""
    return [[d.encode(s, clean[site]) for s, site in enumerate(d.reads)] for d in dictionaries]


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
        for s, site in enumerate(d.reads)
        if rank[site] < first or (rank[site] == first and site in d.writes)
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
    places_N = places(patch_BT)
    if observe is not None:
        for (i, source), found in known.codes.items():
            observe(i, source, found)

    def encode(i: int, source: int, x_ND: Tensor) -> None:
        codes[i, source] = dictionaries[i].encode(source, x_ND)
        if observe is not None:
            observe(i, source, codes[i, source])

    def decode(i: int, destination: int, site: str) -> Tensor:
        d, yhat_NE = dictionaries[i], known.values.get(site)
        if yhat_NE is None:
            yhat_NE = d.decode(destination, [codes[i, s] for s in d.sources(destination)])
        return yhat_NE if errors is None else yhat_NE + errors[site]

    def edit_of(site: str) -> Edit:
        readers = [
            (i, s)
            for i, d in enumerate(dictionaries)
            for s, name in enumerate(d.reads)
            if name == site and (i, s) not in known.codes
        ]
        writer = next(((i, j) for i, d in enumerate(dictionaries) for j, w in enumerate(d.writes) if w == site), None)

        def edit(x_BTD: Tensor) -> Tensor | None:
            own = [r for r in readers if writer is None or r[0] == writer[0]]
            if own:
                x_ND = read_rows(x_BTD, places_N)
                for i, s in own:
                    encode(i, s, x_ND)
            if writer is None:
                return None
            out_BTD = write_rows(x_BTD, places_N, decode(*writer, site))
            others = [r for r in readers if r[0] != writer[0]]
            if others:
                x_ND = read_rows(out_BTD, places_N)
                for i, s in others:
                    encode(i, s, x_ND)
            return out_BTD

        needs_live_value = writer is None or any(i == writer[0] for i, _ in readers)
        return edit if needs_live_value else _overwriting(edit, patch_BT)

    touched = dict.fromkeys(site for d in dictionaries for site in (*d.reads, *d.writes))
    return {site: edit_of(site) for site in touched}


def reads(dictionaries: Sequence[Dictionary]) -> tuple[str, ...]:
    """Sites read, each once, in order of appearance."""
    return tuple(dict.fromkeys(site for d in dictionaries for site in d.reads))


def writes(dictionaries: Sequence[Dictionary]) -> tuple[str, ...]:
    """Sites written, in order of appearance."""
    return tuple(site for d in dictionaries for site in d.writes)
