"""The memory of a process that lives long."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

RARELY = 5_000, 20, 50  # what a request or a run makes goes when it ends, without a search


@contextmanager
def built() -> Iterator[None]:
    """What is imported and made in here stays until the process ends, so nobody looks for garbage in it.

    Neither now (a sixth of the time from `up` to ready) nor later, when a search through all that lives would hold a
    request up.  What the C library still holds of the building goes back to the machine.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*RARELY)
        gc.enable()
        with suppress(OSError, AttributeError):  # glibc's; another C library does as it does
            ctypes.CDLL(None).malloc_trim(0)
