"""What proposes tokens, one file each."""

from .base import Drafter

# without weights, by name
DRAFTERS: dict[str, type[Drafter]] = {}
