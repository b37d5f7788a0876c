"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whichever ran before it in the same process."""
    torch.manual_seed(0)
