"""Worker processes with a time limit and a memory limit for every piece of work."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["run_all"]

Work = Callable[[str], Any]

# A worker is exchanged after this many names: torch.fx keeps the source of every graph that it has compiled.
_LIFETIME = 400


def run_all(
    work: Work,
    names: Sequence[str],
    failed: Callable[[str, str, float], Any],
    *,
    jobs: int = 1,
    timeout: float = 120.0,
    memory: float = 8.0,
) -> Iterator[Any]:
    """Do ``work(name)`` for every name in other processes, and give each result as soon as it is there.

    Importing torch and timm takes seconds, so a process is kept until it overruns a limit. Then it is ended
    and another one takes its place; no name is tried twice.

    Args:
        work: A function of a module, so that a process can import it.
        names: What to work on.
        failed: Makes a result out of a name, a reason and the seconds that it took.
        jobs: Number of processes.
        timeout: Seconds for one name.
        memory: GiB that one process may allocate.
    """
    waiting = deque(names)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker(work, memory))
            for worker in workers:
                if worker.name is None and waiting:
                    worker.start(waiting.popleft())
            ready = wait([worker.pipe for worker in workers], timeout=1.0)
            for worker in list(workers):
                if worker.pipe in ready or worker.seconds > timeout:
                    yield worker.result(failed, timeout)
                if worker.finished or (worker.name is None and not waiting):
                    workers.remove(worker)
                    worker.end()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """One process, and the name that it works on."""

    def __init__(self, work: Work, memory: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, work, memory), daemon=True)
        self.process.start()
        other.close()
        self.name: str | None = None
        self.started = 0.0
        self.done = 0
        self.finished = False

    def start(self, name: str) -> None:
        """Give it a name to work on."""
        self.name, self.started = name, time.monotonic()
        with contextlib.suppress(OSError):  # it has died meanwhile: result() says so
            self.pipe.send(name)

    @property
    def seconds(self) -> float:
        """For how long it has been working."""
        return time.monotonic() - self.started if self.name else 0.0

    def result(self, failed: Callable[[str, str, float], Any], timeout: float) -> Any:
        """What came of the name; the worker is finished if it overran a limit or died."""
        name, seconds = self.name or "", self.seconds
        self.name, self.done = None, self.done + 1
        self.finished = self.done >= _LIFETIME
        if not self.pipe.poll():
            self.finished = True
            return failed(name, f"it took longer than {timeout:g} s", seconds)
        try:
            ok, value = self.pipe.recv()
        except EOFError:
            self.finished = True
            self.process.join(5)
            return failed(name, f"the process ended with status {self.process.exitcode}", seconds)
        self.finished = self.finished or not ok
        return value if ok else failed(name, value, seconds)

    def end(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, work: Work, memory: float) -> None:
    """Work on one name after the other until the pipe is closed."""
    _limit_memory(memory)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            name = pipe.recv()
            try:
                answer = True, work(name)
            except MemoryError:
                answer = False, f"it needs more than {memory:g} GiB of memory"
            gc.collect()  # every graph is a class, and classes are cycles
            gc.freeze()  # what is imported by now stays: no collection looks at it again
            pipe.send(answer)


def _limit_memory(memory: float) -> None:
    """Let allocations beyond the limit fail, where the system can do that."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30), resource.RLIM_INFINITY))
