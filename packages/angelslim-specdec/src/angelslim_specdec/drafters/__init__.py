"""What proposes tokens, one file each."""

from .base import Drafter
from .ngram import Ngram
from .suffix import Suffix

# without weights, by name
DRAFTERS: dict[str, type[Drafter]] = {"ngram": Ngram, "suffix": Suffix}
