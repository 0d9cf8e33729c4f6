"""Words to build tasks from."""

from __future__ import annotations

from itertools import product
from random import Random


def _words(text: str, between: str | None = None) -> list[str]:
    return text.split(between)


ADJECTIVES = _words("""amber ancient bitter brave bright broken calm clever cold curious dark deep distant dusty eager early empty faint fierce flat
fresh gentle golden grand green grey hidden hollow honest humble icy lively lonely loud lucky mellow modest narrow noble odd pale patient
plain proud quick quiet rapid rough round rusty sharp shy silent silver simple slow smooth solid spare steep strange sturdy swift tall tame
tidy tiny vast warm weary wide wild wise young""")
NOUNS = _words("""anchor apple arrow barrel basket beacon bell bird blanket boat bottle branch bridge bucket button candle canyon castle chain
cherry clock cloud coin copper corner cottage desert drum eagle engine feather field forest fountain garden gate glove hammer harbor hill
island jacket kettle key ladder lamp lantern lemon letter market meadow mirror mountain needle ocean orchard paper pebble pencil pepper
pillow planet pocket river rocket saddle shadow ship spoon stone table temple tower tunnel valley violin wagon window winter""")
_VERBS = _words("crosses follows watches carries finds leaves meets guards paints remembers repairs passes")
_TIMES = _words(
    "in the morning,after the rain,before the winter,near the old road,without a sound,every other day,for a long while,at the end of the year", ","
)


def sentence(rng: Random) -> str:
    """A sentence about nothing."""
    first, second = (f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    return f"{first.capitalize()} {rng.choice(_VERBS)} {second} {rng.choice(_TIMES)}."


def names(rng: Random, count: int) -> list[str]:
    """Different names such as quiet-river; of three words where there are not enough of two."""
    if count <= len(ADJECTIVES) * len(NOUNS):
        return ["-".join(p) for p in rng.sample(list(product(ADJECTIVES, NOUNS)), count)]
    return ["-".join(p) for p in rng.sample(list(product(ADJECTIVES, ADJECTIVES, NOUNS)), count)]


def numbers(rng: Random, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(n) for n in rng.sample(range(10**6, 10**7), count)]


def coined(rng: Random, count: int, letters: int = 6, alphabet: str = "abcdefghijklmnopqrstuvwxyz") -> list[str]:
    """Different words that mean nothing."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(alphabet, k=letters))] = None
    return list(found)
