"""Where and how the work runs: memory, devices, requests to stop."""

import signal
import subprocess
import sys

import pytest
import torch

from mpq.errors import MpqError
from mpq.runtime import choose_device, memory_for, processes, stop_requests


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA error: an illegal memory access was encountered", False),
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("CUDA out of memory. Tried to allocate 2 GiB", True),
    ],
)
def test_only_want_of_memory_is_called_that(message: str, is_memory: bool) -> None:
    with pytest.raises(MpqError if is_memory else RuntimeError), memory_for("a batch"):
        raise RuntimeError(message)


def test_freed_memory_is_kept_once_it_is_asked_for() -> None:
    """In a process of its own: 256 MB that were freed are given back at first, and then still the process's."""
    code = (
        "import os, platform, torch\nfrom mpq.runtime import keep_freed_memory\n"
        "def held():\n    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "def is_kept():\n    before = held()\n    large = torch.ones(2**26)\n    assert held() - before > 2**27\n"
        "    del large\n    return held() - before > 2**27\n"
        "assert not is_kept()\n"
        "is_asked = keep_freed_memory()\n"
        "assert is_asked == (platform.libc_ver()[0] == 'glibc')\n"
        "assert is_kept() == is_asked"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name, words in (("gpu", "expected auto, cpu or cuda"), ("cuda", "cuda:0: 0 CUDA devices are here")):
        with pytest.raises(MpqError, match=words):
            choose_device(name)


def test_the_first_request_to_stop_is_noted_and_the_second_interrupts(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_requests() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped() and caplog.messages == ["the state is saved after this update"]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_process_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with processes() as workers:
        assert (workers.rank, workers.count) == (0, 1)
        sums = torch.ones(2)
        workers.add_up(sums)
        assert sums.tolist() == [1, 1]
