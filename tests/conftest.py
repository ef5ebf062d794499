"""What several files of tests ask for by name."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

# Before anything imports huggingface_hub: no test depends on what is there, or waits for it.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# They fork often, and a fork copies the page tables of whatever tests before it left in memory.
FIRST = ("test_io_atomic.py", "test_io_hostile.py", "test_load_refuses.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no garbage collection looks at it again."""
    gc.collect()
    gc.freeze()
