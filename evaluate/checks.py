"""Whether a replacement can be put into a target at all, asked before the first forward pass.

The protocols of `cache/contracts.py` do not state the width that an encoder expects, so a row of zeros is sent through
each dictionary: what it refuses now it would refuse later, in the middle of a pass.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.cache.contracts import Codes, Dictionary, Site, Target
from thresher.cache.errors import UserError
from thresher.evaluate.masks import Scored


class Replacement(NamedTuple):
    """Dictionaries that are evaluated together, all in place at once, as one row of the table."""

    name: str
    dictionaries: tuple[Dictionary, ...]
    facts: dict[str, object]
    """What is known of them, JSON values: `kind`, `firing`, `sparsity`, `n_latents`, `seed`, `setting` (fingerprint of
    all but the seed), `rows` (training rows), `runs` (paths), `cache` (fingerprint), and whatever else belongs in the
    provenance. `family` overrides the label made of kind and firing."""
    content: str | None = None
    """Hash of the dictionaries' weights, by which sums of an earlier evaluation are found; None: they are not kept."""
    baseline: bool = False
    """Whether it is a yardstick: it has no code statistics and is on no front."""
    means: Mapping[str, Tensor] | None = None
    """Training means [E] by the sites that it stands for, in the order of the written ones: those of the dictionaries
    that a baseline stands beside. None: the dictionaries' own."""
    protocols: tuple[str, ...] | None = None
    """Protocols that it is run under, of those asked for: of a baseline, those of the dictionaries that it stands
    beside. None: all that its dictionaries allow."""

    @property
    def stands_for_others(self) -> bool:
        """Whether it writes other sites than those it stands for, as neurons do, which stand for their MLP's output."""
        written = [site for dictionary in self.dictionaries for site in dictionary.writes]
        return self.means is not None and list(self.means) != written


def resolve_sites(replacements: Sequence[Replacement], target: Target) -> dict[str, Site]:
    """Every site read or written, by name, in forward order. Raises UserError naming replacement and target."""
    owner: dict[str, tuple[Replacement, Dictionary]] = {}
    for replacement in replacements:
        for dictionary in replacement.dictionaries:
            for name in (*dictionary.reads, *dictionary.writes):
                owner.setdefault(name, (replacement, dictionary))
    for name, (replacement, dictionary) in owner.items():
        try:
            found = target.sites([name])
        except UserError as error:
            raise UserError(
                f"{_who(replacement, dictionary)} was trained on the site {name!r}, which the target {target.name!r} "
                f"does not have: {error} Evaluate it in the model it was trained on."
            ) from error
        if [site.name for site in found] != [name]:
            raise UserError(
                f"{_who(replacement, dictionary)} was trained on the site {name!r}; expected the target "
                f"{target.name!r} to have one site of that name, got {[site.name for site in found]}."
            )
    return {site.name: site for site in target.sites(list(owner))}


def check_replacements(replacements: Sequence[Replacement], target: Target) -> dict[str, Site]:
    """Refuse what cannot be evaluated; returns `resolve_sites`."""
    if not replacements:
        raise UserError("There is nothing to evaluate: expected at least one trained run, got none.")
    names = [replacement.name for replacement in replacements]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} replacements are called {name!r}; give each its own name.")
    for replacement in replacements:
        _check_writers(replacement)
    sites = resolve_sites(replacements, target)
    for replacement in replacements:
        for dictionary in replacement.dictionaries:
            if dictionary.causal:
                _check_order(replacement, dictionary, list(sites))
            _check_widths(replacement, dictionary, sites, target)
    return sites


def check_tokens(scored: Scored, target: Target) -> None:
    """Refuse rows longer than the target's context and token ids it does not have."""
    length, top = scored.token_id.shape[1], int(scored.token_id.max())
    if length > target.n_ctx:
        raise UserError(
            f"The held-out rows are {length} tokens long; the target {target.name!r} takes at most {target.n_ctx}. "
            "Pack the text into shorter contexts."
        )
    if top >= target.n_vocab or int(scored.token_id.min()) < 0:
        bad = top if top >= target.n_vocab else int(scored.token_id.min())
        row = int(scored.rows[(scored.token_id == bad).any(axis=1)][0])
        raise UserError(
            f"Held-out row {row} holds the token id {bad}; the target {target.name!r} has ids 0 to "
            f"{target.n_vocab - 1}. The text was tokenised for another model: tokenise it again for this one."
        )


def _check_writers(replacement: Replacement) -> None:
    writer: dict[str, str] = {}
    if not replacement.dictionaries:
        raise UserError(f"The replacement {replacement.name!r} holds no dictionary; expected at least one.")
    for dictionary in replacement.dictionaries:
        for site in dictionary.writes:
            if site in writer:
                raise UserError(
                    f"In {replacement.name!r} the site {site!r} is written twice, by {writer[site]!r} and "
                    f"{dictionary.name!r}; a replacement writes each site once. Evaluate the two apart."
                )
            writer[site] = dictionary.name


def _check_order(replacement: Replacement, dictionary: Dictionary, order: Sequence[str]) -> None:
    for j, destination in enumerate(dictionary.writes):
        for source in (site for s in dictionary.sources(j) for site in dictionary.inputs[s]):
            if order.index(source) > order.index(destination):
                raise UserError(
                    f"{_who(replacement, dictionary)} writes {destination!r} from {source!r}, which the model only "
                    "reaches later; a replacement must be computable in forward order. This dictionary can be studied "
                    "but not patched in."
                )


def _check_widths(replacement: Replacement, dictionary: Dictionary, sites: Mapping[str, Site], target: Target) -> None:
    dtype = torch.promote_types(target.dtype, torch.float32)
    codes: list[Codes] = []
    for s, names in enumerate(dictionary.inputs):
        width = sum(sites[name].width for name in names)
        zeros_1D = torch.zeros(1, width, dtype=dtype, device=target.device)
        try:
            codes.append(dictionary.encode(s, zeros_1D))
        except (RuntimeError, ValueError, IndexError) as error:
            where, why = " + ".join(names), str(error).splitlines()[0]
            raise UserError(
                f"{_who(replacement, dictionary)} cannot read the site {where!r} of the target {target.name!r}, which "
                f"is {width} wide on {target.device}: {why} Evaluate it in the model it was trained on."
            ) from error
    for j, name in enumerate(dictionary.writes):
        written: Tensor = dictionary.decode(j, [codes[s] for s in dictionary.sources(j)])
        mean_E = dictionary.means.get(name)
        widths = {"reconstruction": written.shape[-1], "training mean": 0 if mean_E is None else mean_E.shape[-1]}
        for what, width in widths.items():
            if width != sites[name].width:
                raise UserError(
                    f"{_who(replacement, dictionary)} has a {what} of width {width} for the site {name!r}; the target "
                    f"{target.name!r} has width {sites[name].width} there. Evaluate it in the model it was trained on."
                )


def _who(replacement: Replacement, dictionary: Dictionary) -> str:
    same = replacement.name == dictionary.name
    return f"The run {dictionary.name!r}" + ("" if same else f" (in {replacement.name!r})")
