"""Smaller: gates become constants, methods that do not help go, and all of it can be taken back."""
