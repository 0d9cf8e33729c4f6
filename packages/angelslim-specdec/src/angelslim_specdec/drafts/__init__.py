"""Draft models, one file each."""

from .base import Draft
from .dflare import DFlare
from .dflash import DFlash
from .dfly import DFly
from .dspark import DSpark

DRAFTS: tuple[type[Draft], ...] = (DFlash, DFlare, DFly, DSpark)
