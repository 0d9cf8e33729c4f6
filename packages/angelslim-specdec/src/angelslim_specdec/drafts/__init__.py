"""Draft models, one file each."""

from .base import Draft
from .dflare import DFlare
from .dflash import DFlash
from .dfly import DFly
from .dspark import DSpark
from .eagle3 import Eagle3
from .mtp import MTP

DRAFTS: tuple[type[Draft], ...] = (Eagle3, DFlash, DFlare, DFly, DSpark, MTP)
