"""Measuring a model by the paper's protocols; `python -m diffclip_hf.evaluate` is its command."""
