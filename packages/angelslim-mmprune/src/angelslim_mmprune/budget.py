"""How many tokens stay: exact, and known before any model runs."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from pydantic import Field, field_validator, model_validator

from angelslim_core.errors import UsageError
from angelslim_core.passes import PassConfig

Scope = Literal["prompt", "image", "frame"]


class Budget(PassConfig):
    """Options that say how many tokens a strategy keeps. One of `keep_ratio` and `keep_tokens` may be given."""

    keep_ratio: float | None = Field(None, gt=0, le=1, description="share of the tokens that stays; .25 if neither it nor keep_tokens is given")
    keep_tokens: int | None = Field(
        None, ge=1, le=2**20, description="tokens that stay, of each prompt, or of each image, frame or clip where that is the scope"
    )
    budget_scope: Scope = Field("prompt", description="what the budget is of: prompt; image (or clip): its share of the prompt's; frame: of a video's")
    compat: Literal["keep", "drop"] = Field("keep", description="drop: round as published code does, which counts what goes")

    @field_validator("keep_ratio", "keep_tokens", mode="before")
    @classmethod
    def _no_bool(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("is no number")
        return value

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if self.keep_ratio is not None and self.keep_tokens is not None:
            raise ValueError("keep_ratio and keep_tokens contradict each other; give one")
        return self

    def count(self, tokens: int) -> int:
        """Of so many tokens.

        Raises:
            UsageError: more are to be kept than there are.
        """
        if self.keep_tokens is not None:
            if self.keep_tokens > tokens:
                raise UsageError(800, "keep_tokens", f"{self.keep_tokens} of {tokens} tokens", "ask for fewer, or for a keep_ratio")
            return self.keep_tokens
        return keep_count(tokens, 0.25 if self.keep_ratio is None else self.keep_ratio, self.compat)


def keep_count(tokens: int, keep_ratio: float, compat: Literal["keep", "drop"] = "keep") -> int:
    """round(tokens * keep_ratio), halves to even, of the decimal number that was written; at least 1 where there are tokens.

    Args:
        compat: "drop" rounds tokens * (1 - (1 - keep_ratio)) in floats, as code that counts what goes does.
    """
    if compat == "drop":
        drop = float(Fraction(1) - Fraction(repr(keep_ratio)))
        exact: float | Fraction = tokens * (1 - drop)
    else:
        exact = Fraction(repr(keep_ratio)) * tokens
    return min(tokens, max(1, round(exact))) if tokens else 0


def split(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` shared out by sizes: largest remainder, ties to the first; no share is above its size.

    Raises:
        UsageError: the sizes do not hold so many.
    """
    whole = sum(sizes)
    if total > whole:
        raise UsageError(803, "keep_tokens", f"{total} of {whole} tokens", "ask for fewer, or for a keep_ratio")
    if not whole:
        return [0] * len(sizes)
    shares = [total * size // whole for size in sizes]
    rest = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % whole), i))
    for i in rest[: total - sum(shares)]:
        shares[i] += 1
    return shares
