"""The version, which results state. A checkout that is not installed has no package metadata."""

__version__ = "0.1.0"
