"""Independent runs at the same time: a process of its own for each, with one thread.

For work that a single command spreads over the cores of one machine, such as the seeds of a demo.
Processes that a launcher starts are the matter of `shared_core.parallel`.
"""

import contextlib
import io
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from shared_core.errors import InputError

__all__ = ["cores", "run_beside"]

Job = TypeVar("Job")
Result = TypeVar("Result")
Told = Callable[..., None]


def cores() -> int:
    """Processors that this process may use.

    Examples:
        >>> cores() >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_beside(
    work: Callable[[Job, Told], Result], jobs: Sequence[Job], told: Told, *, alone: bool = False
) -> list[Result]:
    """What ``work(job, told)`` returns for every job, as many at a time as there are cores.

    Small networks gain nothing from a second thread, but from a second process.
    Everywhere a job has one thread, so that the numbers are the same however many run at a time.

    Args:
        work: A function of a module; what it takes and returns is pickled between processes.
        jobs: What it is called with.
        told: Called here with whatever a job tells, its place in `jobs` first.
        alone: One job after another, in this process, as a GPU wants it.

    Raises:
        InputError: If a job raised it.
        RuntimeError: If a job failed otherwise or its process died.

    Examples:
        >>> run_beside(lambda job, told: told("half") or 2 * job, [3], print)
        0 half
        [6]
    """
    if alone or len(jobs) < 2 or cores() < 2:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [
                work(job, lambda *what, place=place: told(place, *what))
                for place, job in enumerate(jobs)
            ]
        finally:
            torch.set_num_threads(threads)
    found: dict[int, Result] = {}
    for first in range(0, len(jobs), cores()):
        places = range(first, min(first + cores(), len(jobs)))
        found |= _wave(work, {place: jobs[place] for place in places}, told)
    return [found[place] for place in range(len(jobs))]


def _wave(work: Any, jobs: dict[int, Any], told: Told) -> dict[int, Any]:
    context = multiprocessing.get_context("spawn")
    found: dict[int, Any] = {}
    processes, open_ends = [], {}
    try:
        for place, job in jobs.items():
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, work, job), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            open_ends[mine] = place
        while open_ends:
            for end in wait(list(open_ends)):
                assert isinstance(end, Connection)
                place = open_ends[end]
                try:
                    kind, *what = end.recv()
                except EOFError:
                    raise RuntimeError(f"the process of run {place} died") from None
                if kind == "told":
                    told(place, *what)
                    continue
                del open_ends[end]
                if kind == "input":
                    raise InputError(what[0])
                if kind == "error":
                    raise RuntimeError(f"run {place} failed:\n{what[0]}")
                found[place] = what[0]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return found


def _child(end: Connection, work: Any, job: Any) -> None:
    torch.set_num_threads(1)
    # Bars of several processes would write over each other.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            end.send(("result", work(job, lambda *what: end.send(("told", *what)))))
        except InputError as error:
            end.send(("input", str(error)))
        except Exception:
            end.send(("error", traceback.format_exc()))
