"""Fixtures, and what the laws have in common."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only get in each other's way

import pytest
import torch

from fits import backbone, make  # noqa: F401 - fixtures of every test of training
from zoo import ARCHS, Arch


@pytest.fixture(params=list(ARCHS))
def arch(request: pytest.FixtureRequest) -> Arch:
    return ARCHS[request.param]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
