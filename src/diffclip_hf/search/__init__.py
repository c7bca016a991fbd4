"""Searching pictures by text or by picture; `python -m diffclip_hf.search` is its command."""

from .index import ImageIndex, Match


__all__ = ["ImageIndex", "Match"]
