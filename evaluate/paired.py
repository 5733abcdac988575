"""Two separate evaluations of one text, compared document by document without running the model again.

`documents.npz` beside each results.json holds the sums that this needs. Only the same text in the same target can be
paired: one public target scores 2.83 nats on some batches and 2.71 on others, which is more than any two dictionaries
differ by. So whatever shows that the texts differ is refused: rows, documents, token counts, and the loss of the
untouched model on every segment, which no other text would share.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from thresher.cache.errors import UserError
from thresher.evaluate.passes import CLEAN
from thresher.evaluate.results import Segments
from thresher.evaluate.statistics import Interval
from thresher.evaluate.verdict import Draw, Judge

SAME_CLEAN = 1e-3
"""Nats per token by which clean losses of a segment may differ: rounding on other hardware, no other text."""


class Difference(NamedTuple):
    """δ of b minus δ of a."""

    value: float
    interval: Interval


def segments_from(arrays: Mapping[str, np.ndarray]) -> Segments:
    """Read `Segments` back from the arrays of a documents.npz. Raises UserError for arrays of something else."""
    plain = ("row", "document", "tokens", "tokens_single")
    missing = [key for key in (*plain, f"arm/{CLEAN}") if key not in arrays]
    if missing:
        raise UserError(
            f"Expected the arrays of a documents.npz, which {', '.join(missing)} would be among; got "
            f"{', '.join(arrays) or 'none'}. Give the file that lies beside a results.json."
        )
    parts = {
        kind: {key.removeprefix(f"{kind}/"): arrays[key] for key in arrays if key.startswith(f"{kind}/")}
        for kind in ("arm", "l0")
    }
    row, document, tokens, tokens_single = (arrays[key] for key in plain)
    return Segments(row, document, tokens, tokens_single, parts["arm"], parts["l0"])


def paired_difference(
    a: Segments, b: Segments, arm_a: Sequence[str], arm_b: Sequence[str], protocol: str, draw: Draw
) -> Difference:
    """δ of an arm of b minus δ of an arm of a, each above its own clean pass, with its paired bootstrap interval.

    An arm is given by its labels (`passes.patched_label`): one, or under single_site one per written site. Raises
    UserError when the two were not scored on the same text in the same target, and for arms that were not run.
    """
    check_same_text(a, b, protocol)
    by_document = bool((a.document >= 0).all())
    first, second = (Judge(segments, protocol, by_document, draw) for segments in (a, b))
    excess = [_above_clean(judge, labels) for judge, labels in ((first, arm_a), (second, arm_b))]
    return Difference(*first.difference(*excess))


def _above_clean(judge: Judge, labels: Sequence[str]) -> np.ndarray:
    arm, clean = judge.arm(labels), judge.arm([CLEAN])
    if arm is None or clean is None:
        known = ", ".join(judge.segments.arms)
        raise UserError(f"The arms {', '.join(labels)} were not all run; expected some of {known}.")
    return arm - clean


def check_same_text(a: Segments, b: Segments, protocol: str) -> None:
    """Raise UserError unless both were scored on the same segments, under `protocol`, in the same target."""
    tokens = "tokens_single" if protocol == "single_site" else "tokens"
    remedy = "Their difference would be one of texts: evaluate both in one call, or on the same split and settings."
    for field in ("row", "document", tokens):
        one, other = getattr(a, field), getattr(b, field)
        if one.shape != other.shape:
            raise UserError(
                f"The evaluations were not scored on the same text: {field} has {len(one)} segments in the first and "
                f"{len(other)} in the second. {remedy}"
            )
        if (one != other).any():
            g = int((one != other).argmax())
            raise UserError(
                f"The evaluations were not scored on the same text: {field} of segment {g} is {one[g]} in the first "
                f"and {other[g]} in the second. {remedy}"
            )
    if not getattr(a, tokens).any():
        raise UserError(f"Nothing was scored under {protocol} in these evaluations. Compare another protocol.")
    gap = np.abs(a.arms[CLEAN][:, 0] - b.arms[CLEAN][:, 0]) / np.maximum(a.tokens, 1)
    if not gap.max() <= SAME_CLEAN:
        g = int(gap.argmax())
        raise UserError(
            f"The evaluations are not of the same text or target: the untouched model's loss on segment {g} differs by "
            f"{gap[g]:.4f} nats per token; expected at most {SAME_CLEAN:g}. {remedy}"
        )
