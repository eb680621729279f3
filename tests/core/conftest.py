"""One native thread: the models here are tiny, and workers of pytest-xdist must not fight over the cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_width(monkeypatch):
    """Tables are as wide as they like, whatever terminal or earlier test set ``COLUMNS``."""
    monkeypatch.delenv("COLUMNS", raising=False)
