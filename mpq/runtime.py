"""The machine that the work runs on: device, processes, memory, requests to stop."""

import ctypes
import logging
import os
import platform
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mpq.errors import MpqError

_log = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """Returns the device that "auto", "cpu", "cuda" or "cuda:N" names.

    Under torchrun, "auto" and "cuda" give each process a CUDA device of its own.

    Raises:
        MpqError: Another name, or a CUDA device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if not re.fullmatch(r"cpu|cuda:[0-9]{1,4}", name):
        raise MpqError(f"--device: expected auto, cpu or cuda[:N], got {name!r}")
    if name != "cpu":
        if int(name.removeprefix("cuda:")) >= torch.cuda.device_count():
            raise MpqError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are here; use --device cpu")
        torch.backends.cudnn.allow_tf32 = False  # its 10-bit products would drown small divergences
    return torch.device(name)


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch add up in one order for a while, whatever the number of threads is: that of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> bool:
    """Has the C library keep freed memory for the next step of a training; returns whether it does.

    glibc gives large blocks back to the system at once, which then has to clear their pages anew in each step: a tenth
    of the time of a step on two cores. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    library = ctypes.CDLL(None)
    # older ones take 32 MB at most
    is_set = any(library.mallopt(mmap_threshold, size) for size in (2**30, 2**25))
    return is_set and bool(library.mallopt(trim_threshold, 2**31 - 1))


@dataclass(frozen=True)
class Processes:
    """The processes that share the work.

    Attributes:
        rank: This one's number, from 0.
        count: The number of processes.
        device: The device on which they exchange tensors.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replaces a tensor by its sum over all processes."""
        if self.count > 1:
            moved = tensor.to(self.device)
            torch.distributed.all_reduce(moved)
            tensor.copy_(moved)


@contextmanager
def processes(device: torch.device | None = None) -> Iterator[Processes]:
    """Yields the processes that `torchrun` started, or the one that there is without it.

    Args:
        device: The device on which tensors are exchanged: over NCCL between CUDA devices, else over gloo.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # other launchers set RANK and WORLD_SIZE for their own ends
        yield Processes()
        return
    where = device or torch.device("cpu")
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.distributed.init_process_group("nccl", device_id=where)
    else:
        torch.distributed.init_process_group("gloo")
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), where)
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turns torch's failures to get memory within the block into an error that names the work.

    Raises:
        MpqError: The block ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        known = ("not enough memory", "can't allocate memory", "out of memory")
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in known):
            raise
        raise MpqError(f"{what}: not enough memory; cut long recordings into shorter ones") from error


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGINT or SIGTERM came; a second SIGINT interrupts at once."""
    asked = False

    def ask(number: int, _: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        _log.warning("the state is saved after this update")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
