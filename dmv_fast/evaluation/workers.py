"""Work handed out one item at a time: to processes of this machine, or to a Ray cluster.

A worker that dies is replaced and its item begun again, at most ATTEMPTS times; what an item raises is that
item's failure and no other's. Results come back to the caller, who is the only one to write files.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import Any, TypeVar

Item = TypeVar("Item")
Tick = Callable[[], object]
Work = Callable[[Any, Tick], Any]
"""work(item, tick) -> result. It calls tick after each frame. It must pickle, and be cheap to pickle."""

ATTEMPTS = 3
TICK_SECONDS = 0.2  # between two messages about frames done
CONNECT_SECONDS = 10
# Read when a process starts: N workers of one thread each use N cores.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerDied(RuntimeError):
    """The process that worked on an item ended, each time it was tried."""


@dataclass(frozen=True)
class Failure:
    """What came of an item instead of a result."""

    error: Exception


def hand_out(
    work: Work, items: Iterable[Item], *, jobs: int = 1, ray: str | None = None, gpu: bool = False,
    on_frames: Callable[[int], object] = lambda count: None,
) -> Generator[tuple[Item, Any], None, None]:  # fmt: skip
    """Each item with its result, or with a Failure, as they end; the first items are begun first.

    Args:
        work: run by each worker, which has one thread.
        jobs: processes of this machine. They are spawned: a script must guard its start with
            `if __name__ == "__main__"`.
        ray: address of a Ray cluster, "auto", or "local" (one of this machine); jobs has then no meaning, the
            cluster's cores have. dmv_fast must be installed on its machines.
        gpu: each Ray worker gets a GPU of its own.
        on_frames: told how many frames more are done; fewer than 0 when a dead worker's are taken back.

    The end of the generator, also an early one, is the end of the workers.

    Raises:
        ValueError: jobs < 1. ImportError: ray is not installed. ConnectionError: no Ray at that address.
        RuntimeError: the processes cannot even start.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be at least 1")
    items = list(items)
    if ray is not None:
        return _on_ray(work, items, ray, gpu, on_frames)
    return _on_processes(work, items, min(jobs, len(items)), on_frames)


def one_thread() -> None:
    """Make this process compute with one thread, whatever it has loaded already."""
    import cv2

    cv2.setNumThreads(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))  # for what is loaded later


def _attempt(work: Work, item: Any, tick: Tick) -> Any:
    try:
        return work(item, tick)
    except Exception as error:
        return Failure(_portable(error))


def _portable(error: Exception) -> Exception:
    """The error itself, or one that says the same, where it does not survive pickling."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


# ---- processes of this machine -------------------------------------------------------------------------


@dataclass
class _Worker:
    process: Any
    channel: connection.Connection
    item: tuple[int, Any] | None = None
    """(how often it has been tried, the item)."""
    frames: int = 0
    ready: bool = False


def _on_processes(
    work: Work, items: list[Any], jobs: int, on_frames: Callable[[int], object]
) -> Generator[tuple[Any, Any], None, None]:
    waiting = deque((0, item) for item in items)
    workers: list[_Worker] = []
    stillborn = 0
    try:
        while waiting or any(worker.item for worker in workers):
            idle = sum(worker.item is None for worker in workers)
            while len(workers) < jobs and idle < len(waiting):
                workers.append(_start(work))
                idle += 1
            for worker in workers:
                if worker.item is None and waiting:
                    _give(worker, waiting.popleft())
            ready = connection.wait([worker.channel for worker in workers])
            for worker in [worker for worker in workers if worker.channel in ready]:
                try:
                    message = worker.channel.recv()
                except (EOFError, OSError):  # it died, perhaps amid a message
                    workers.remove(worker)
                    stillborn = 0 if worker.ready else stillborn + 1
                    on_frames(-worker.frames)
                    yield from _bury(worker, waiting, stillborn)
                    continue
                worker.ready = True
                if isinstance(message, int):
                    worker.frames += message
                    on_frames(message)
                    continue
                assert worker.item is not None
                (_, item), worker.item, worker.frames = worker.item, None, 0
                yield item, message[0]
    finally:
        for worker in workers:
            worker.process.terminate()  # it holds nothing that could be lost
        for worker in workers:
            worker.process.join()
            worker.channel.close()


def _start(work: Work) -> _Worker:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    with _environment_of_workers():
        process.start()
    theirs.close()  # so that the end of the process is the end of the channel
    return _Worker(process, ours)


def _give(worker: _Worker, item: tuple[int, Any]) -> None:
    worker.item = item
    try:
        worker.channel.send(item[1])
    except OSError:
        pass  # it has died; the channel's end says so in a moment


def _bury(worker: _Worker, waiting: deque, stillborn: int) -> Iterator[tuple[Any, Failure]]:
    """Put a dead worker's item back in front, or give it up."""
    worker.channel.close()
    worker.process.join()
    code = worker.process.exitcode
    if stillborn == ATTEMPTS:
        raise RuntimeError(f"worker processes end as they start (exit code {code}); the reason stands above")
    if worker.item is None:
        return
    tried, item = worker.item
    if tried + 1 < ATTEMPTS:
        waiting.appendleft((tried + 1, item))
    else:
        message = f"its worker process died {ATTEMPTS} times (exit code {code}; out of memory?)"
        yield item, Failure(WorkerDied(message))


@contextmanager
def _environment_of_workers() -> Iterator[None]:
    """One thread each; and Ctrl-C, which reaches the whole group, is left to the parent from the start."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(work: Work, channel: connection.Connection) -> None:
    """A worker process: items in; numbers of frames and (result,) out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    one_thread()
    ticker = _Ticker(channel)
    try:
        channel.send(0)
        while True:
            item = channel.recv()
            result = _attempt(work, item, ticker)
            ticker.flush()
            channel.send((result,))
    except (EOFError, OSError):
        return  # the parent has gone


class _Ticker:
    """Counts frames and tells the parent now and then; a parent that has gone ends the process."""

    def __init__(self, channel: connection.Connection):
        self._channel, self._count, self._told = channel, 0, time.monotonic()

    def __call__(self) -> None:
        self._count += 1
        if time.monotonic() - self._told >= TICK_SECONDS:
            self.flush()

    def flush(self) -> None:
        try:
            self._channel.send(self._count)
        except OSError:
            raise SystemExit from None  # not an Exception: the work at hand does not catch it
        self._count, self._told = 0, time.monotonic()


# ---- a Ray cluster -------------------------------------------------------------------------------------


def _on_ray(
    work: Work, items: list[Any], address: str, gpu: bool, on_frames: Callable[[int], object]
) -> Generator[tuple[Any, Any], None, None]:
    with _connected(address) as ray:
        if gpu and not ray.cluster_resources().get("GPU"):
            raise ValueError(f"the Ray cluster at {address} has no GPU; name another device")
        # A task for an item: Ray itself begins it again, on another worker, when one dies.
        task = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=ATTEMPTS - 1)(_task)
        shared = ray.put(work)
        waiting = {task.remote(shared, item): item for item in items}
        try:
            while waiting:
                ended, _ = ray.wait(list(waiting), num_returns=1)
                for reference in ended:
                    item = waiting.pop(reference)
                    try:
                        result, frames = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        yield item, Failure(_of_ray(ray, error))
                    else:
                        on_frames(frames)
                        yield item, result
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)


def _task(work: Work, item: Any) -> tuple[Any, int]:
    one_thread()
    frames = 0

    def tick() -> None:
        nonlocal frames
        frames += 1

    result = _attempt(work, item, tick)
    return result, frames


def _of_ray(ray: Any, error: Exception) -> Exception:
    if isinstance(error, ray.exceptions.RayTaskError):  # not of the work itself, which `_attempt` catches
        lines = str(error).strip().splitlines()
        return RuntimeError(f"a Ray worker cannot run it: {lines[-1].strip()}")
    return WorkerDied(f"its Ray worker died {ATTEMPTS} times ({str(error).strip().splitlines()[0]})")


def _check_address(address: str) -> None:
    """Ray itself would try an address without a cluster for more than five minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"ray is {address!r}; it must be HOST:PORT, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        message = f"no Ray answers at {address} ({error}); `ray start --head` starts one"
        raise ConnectionError(message) from None


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module ray, connected; a connection that was there before is used, and left open."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ImportError('--ray needs Ray: pip install "dmv-fast[ray]"') from None
    if ray.is_initialized():
        yield ray
        return
    _check_address(address)
    dashboard = False if address == "local" else None  # None is Ray's default
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=dashboard)
    try:
        yield ray
    finally:
        ray.shutdown()
