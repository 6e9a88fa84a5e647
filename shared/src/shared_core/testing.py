"""What every package's tests share, as a pytest plugin.

Put ``pytest_plugins = ["shared_core.testing"]`` in a ``conftest.py``. It brings an autouse guard
that refuses network connections, the fixtures `tenfold_data` and `run_cli`, and the helper
`run_gloo` for tests with several processes. Needs the extra ``shared-core[testing]``.
"""

import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# The libraries read these when they are imported, which is before any fixture runs.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", ""}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail any test that connects to anything but this machine."""
    connect = socket.socket.connect
    resolve = socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and str(address[0]) not in LOOPBACK:
            raise AssertionError(f"a test tried to reach the network: {address}")
        connect(self, address)

    def guarded_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and str(host) not in LOOPBACK | {socket.gethostname()}:
            raise AssertionError(f"a test tried to reach the network: {host}")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_resolve)


@pytest.fixture
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong arguments reach our own checks, as they do outside the tests."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def tenfold_data() -> Path:
    """The folder of real data named by ``TENFOLD_DATA``; skips the test where it is not set."""
    folder = os.environ.get("TENFOLD_DATA")
    if not folder:
        pytest.skip("needs real data: set TENFOLD_DATA to a folder that holds it")
    return Path(folder)


@dataclass(frozen=True)
class CliResult:
    """What a command printed and how it ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def run_cli(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CliResult]:
    """Call a package's ``main(argv)`` in this process, in an empty working folder.

    Use it as ``run_cli(main, "demo", "--quick")``.
    """
    monkeypatch.chdir(tmp_path)

    def call(main: Callable[[list[str]], int], *argv: object) -> CliResult:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return CliResult(code, out, err)

    return call


def examples(count: int, **options: Any) -> Any:
    """Settings for a property: so many examples, the same in every run.

    ``TENFOLD_FUZZ=20`` in the environment (the session ``nox -s fuzz``) makes it twenty times as
    many, and new ones in each run.

    Args:
        count: Examples of an ordinary run.
        options: More of ``hypothesis.settings``.

    Examples:
        >>> examples(30).max_examples
        30
    """
    from hypothesis import settings

    times = int(os.environ.get("TENFOLD_FUZZ", "1"))
    return settings(
        **{"deadline": None, "derandomize": times == 1, **options}, max_examples=times * count
    )


def _gloo_entry(
    rank: int, world: int, store: str, errors: str, target: Callable[..., None], args: Any
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        target(rank, world, *args)
        dist.barrier()
        Path(f"{errors}.{rank}.none").touch()
    except Exception:
        Path(f"{errors}.{rank}").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_gloo(target: Callable[..., None], folder: Path, *args: Any, world: int = 2) -> None:
    """Run ``target(rank, world, *args)`` in `world` gloo processes on the CPU.

    Args:
        target: A module-level function (it is sent to fresh processes).
        folder: A writable folder, normally pytest's ``tmp_path``.
        args: Further arguments, picklable.
        world: Number of processes.

    Raises:
        AssertionError: With every failing rank's traceback.
    """
    store, errors = folder / "gloo-store", folder / "gloo-errors"
    for old in folder.glob("gloo-errors.*"):
        old.unlink()
    try:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _gloo_entry, (world, str(store), str(errors), target, args), nprocs=world
        )
    except Exception as error:
        if len(list(folder.glob("gloo-errors.*.none"))) == world:
            return  # every rank passed; gloo may abort a process while it takes its threads down
        texts = [p.read_text() for p in sorted(folder.glob("gloo-errors.*"))]
        raise AssertionError("\n".join(texts) or str(error)) from error
    finally:
        store.unlink(missing_ok=True)
