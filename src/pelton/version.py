"""The version of Pelton."""

__version__ = "0.1.0"
