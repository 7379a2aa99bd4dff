"""Synthetic pairs, rendered on the fly; importing them registers the datasets."""

from corrzoo.data.synthetic import pairs, warps  # noqa: F401
