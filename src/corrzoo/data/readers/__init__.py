"""Readers of the benchmarks' annotation files; importing them registers the datasets."""

from corrzoo.data.readers import ap10k, caltech, cub, pfpascal, pfwillow, spair  # noqa: F401
