"""Whether what is evaluated is causal: changing a token changes nothing before it, and nothing in another row.

A next-token loss means nothing if the prediction saw the token. The model itself is tried, and the model with every
replacement in place, since a rule that couples the tokens of a batch (a top-k over all of them) leaks just so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.cache.contracts import Dictionary, Edit, Target
from thresher.cache.errors import UserError
from thresher.evaluate import splice
from thresher.evaluate.checks import Replacement
from thresher.evaluate.masks import Scored

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
"""Largest change of a logit that counts as none, relative to the spread of the logits. A threshold code that rounding
puts on the other side of its threshold moves them by a little; formats shorter than float32 get four times as much."""


class Causality(NamedTuple):
    """What was tried."""

    position: int
    """Where a token of the first row was changed."""
    largest: float
    """Largest change of a logit before it or in the other row, relative to the logits' standard deviation."""


def check_causality(target: Target, replacements: Sequence[Replacement], scored: Scored) -> Causality | None:
    """Try the model, bare and with each replacement under cascade; None for text of one position.

    A replacement that cannot run along is tried with its reconstructions of clean values in place.

    Raises UserError naming who is not causal.
    """
    real = (scored.patch | (scored.outside > 0)).sum(axis=1)
    row = int(real.argmax())
    position = int(real[row]) // 2
    if position < 1:
        return None
    rows = [row, (row + 1) % len(real)]
    patch_BT = torch.from_numpy(scored.patch[rows]).to(target.device)
    before_BT = torch.from_numpy(scored.token_id[rows]).to(target.device)
    after_BT = before_BT.clone()
    after_BT[0, position] = (after_BT[0, position] + 1) % target.n_vocab
    largest = 0.0
    tried: list[tuple[str, Callable[[Tensor], Mapping[str, Edit] | None]]] = [("The target itself", lambda _: None)]
    for replacement in replacements:

        def edits(tokens: Tensor, dictionaries: Sequence[Dictionary] = replacement.dictionaries) -> Mapping[str, Edit]:
            if all(dictionary.causal for dictionary in dictionaries):
                return splice.cascade_edits(dictionaries, patch_BT)
            clean: dict[str, Tensor] = {}
            target.logits(tokens, splice.recording_edits(splice.reads(dictionaries), patch_BT, clean))
            codes = splice.encode_clean(dictionaries, clean)
            return splice.constant_edits(splice.decode_all(dictionaries, codes), patch_BT)

        tried.append((f"The model with the replacement {replacement.name!r} in place", edits))
    with torch.inference_mode():
        for who, make in tried:
            first, second = (target.logits(tokens, make(tokens)) for tokens in (before_BT, after_BT))
            change = _change(first, second, position)
            if change > TOLERANCE.get(target.dtype, 4 * TOLERANCE[torch.float32]):  # NaN is told by the passes
                raise UserError(
                    f"{who} is not causal: another token at position {position} of one row changes logits before it, "
                    f"or in another row, by {change:.2e} of their standard deviation. A loss of such predictions means "
                    "nothing. Expected: every token decides its own latents from its own activation (for batch-level "
                    "top-k: a frozen threshold), and a decoder-only model."
                )
            largest = max(largest, change)
    return Causality(position, largest)


def _change(before_BTV: Tensor, after_BTV: Tensor, position: int) -> float:
    spread = before_BTV.double().std().clamp_min(1e-12)
    earlier = (before_BTV[0, :position] - after_BTV[0, :position]).abs().max()
    other = (before_BTV[1] - after_BTV[1]).abs().max()
    return float(torch.maximum(earlier, other).double() / spread)
