"""Draft models, one file each."""

from .base import Draft

DRAFTS: tuple[type[Draft], ...] = ()
