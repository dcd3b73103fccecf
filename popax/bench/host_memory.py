"""What this process has of the host's memory, as the kernel counts it (Linux)."""

import ctypes
from pathlib import Path

from popax.errors import ConfigError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
M_ARENA_MAX = -8


def resident_bytes() -> int:
    """Resident now: anonymous memory and the pages of files that are mapped."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that was resident since the process began, or since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Begin the peak anew at what is resident now; where the kernel does not allow it, the peak goes on."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return


def share_arenas(count: int = 2) -> bool:
    """Let threads allocate from so few arenas (glibc's, M_ARENA_MAX): what one of them frees, another can have. Threads
    that read rows of megabytes hold half a gigabyte of free blocks otherwise, and fault in new pages for each row.

    Call it before threads are started. Returns whether the C library took it.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, count))
    except (OSError, AttributeError):
        return False


def give_back() -> bool:
    """Return what is free to the kernel (glibc's malloc_trim): between phases, of which each would be a process of its
    own elsewhere. Returns whether the C library could."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False


def _status(key: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"{STATUS} cannot be read ({error}): memory is measured on Linux only") from error
    found = next(line.split() for line in lines if line.startswith(f"{key}:"))
    return int(found[1]) * 1024
