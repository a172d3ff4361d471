"""Where things go: the blocks and sites of any backbone; an architecture is a row of data."""

from pelton.anatomy.blocks import Anatomy, Block, Place
from pelton.anatomy.find import find_anatomy
from pelton.anatomy.rows import ROWS, Row

__all__ = ["ROWS", "Anatomy", "Block", "Place", "Row", "find_anatomy"]
