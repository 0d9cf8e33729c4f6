"""Which proposed tokens stay, and what comes after them: pure functions of tensors, of fixed shape and without host sync."""

from .draws import draw
from .greedy import greedy
from .match import match
from .ratio import ratio
from .tree import tree_greedy, tree_sample

__all__ = ["draw", "greedy", "match", "ratio", "tree_greedy", "tree_sample"]
