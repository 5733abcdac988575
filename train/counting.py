"""How many entries `k` per token come to."""

from fractions import Fraction


def entries(k: float, tokens: int) -> int:
    """⌊k · tokens⌋ of the decimal that a recipe says: .29 of 100 tokens is 29, where the product of floats is below it.

    A float's shortest decimal is the one that was written, if that had at most 15 digits.
    """
    return int(Fraction(repr(float(k))) * tokens)
