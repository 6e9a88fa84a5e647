import pytest
import torch

pytest_plugins = ["shared_core.testing"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
