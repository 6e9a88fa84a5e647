"""Runs at the same time: results in order, what is told, and every way to fail."""

import multiprocessing
import os
import signal
from typing import Any

import pytest
import torch

from shared_core import workers
from shared_core.errors import InputError


def work(job: Any, told: Any) -> Any:
    told(job, torch.get_num_threads())
    if job == "bad":
        raise InputError("give something else")
    if job == "broken":
        raise ZeroDivisionError
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return (job, os.getpid(), float(torch.ones(2).sum()))


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 2)


@pytest.mark.usefixtures("two_cores")
def test_processes_of_their_own() -> None:
    said: list[Any] = []
    found = workers.run_beside(work, ["a", "b"], lambda *what: said.append(what))
    assert [(job, total) for job, _, total in found] == [("a", 2.0), ("b", 2.0)]
    assert len({pid for _, pid, _ in found} | {os.getpid()}) == 3
    assert sorted(said) == [(0, "a", 1), (1, "b", 1)]
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("two_cores")
@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX matter")
def test_what_fails_is_said_and_nothing_stays_behind() -> None:
    with pytest.raises(RuntimeError, match="process of run 0 died"):
        workers.run_beside(work, ["killed", "a"], lambda *what: None)
    assert multiprocessing.active_children() == []
    mine, theirs = multiprocessing.Pipe(duplex=False)
    threads = torch.get_num_threads()
    for job in ("bad", "broken"):
        workers._child(theirs, work, job)
    torch.set_num_threads(threads)
    said = [mine.recv() for _ in range(4)]
    assert said[1] == ("input", "give something else")
    assert said[3][0] == "error"
    assert "ZeroDivisionError" in said[3][1]


def test_alone_it_stays_in_this_process() -> None:
    threads, said = torch.get_num_threads(), []
    found = workers.run_beside(work, ["a", "b"], lambda *what: said.append(what), alone=True)
    assert {pid for _, pid, _ in found} == {os.getpid()}
    assert said == [(0, "a", 1), (1, "b", 1)]
    with pytest.raises(ZeroDivisionError):
        workers.run_beside(work, ["broken"], lambda *what: None)
    assert torch.get_num_threads() == threads
