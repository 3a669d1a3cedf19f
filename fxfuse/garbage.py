"""When garbage is not collected."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_later() -> Iterator[None]:
    """No garbage is collected inside, by any thread: a look through all objects of a process that
    holds a model takes 0.2 to 0.3 s, and little of what the passes make is garbage.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
