import functools
import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest_plugins = ["shared_core.testing"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def warm_processes() -> Iterator[Any]:
    """Processes forked from one that has the libraries: to import them takes each 13 s of its own.

    The context for `multiprocessing`; `shared_core.testing.run_gloo` uses it as well.
    """
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(
        [
            "bridge_garden.trainer",
            "transformers.models.auto",
            "transformers.models.llama.modeling_llama",
            "shared_core.testing",
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        start = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
        patch.setattr(torch.multiprocessing, "spawn", start)
        yield fork
