"""How far long work is, on stderr: rich's bar where it is installed, a line a step where it is not,
and nothing where stderr is no terminal.
"""

import contextlib
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterator

Begin = Callable[[str], None]


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Begin]:
    """A function to call with what begins, `steps` times in all.

    Example:
        with progress(len(cases)) as begin:
            for case in cases:
                begin(case.name)
    """
    if not sys.stderr.isatty():
        yield lambda words: None
    elif importlib.util.find_spec("rich") is None:
        yield _lines(steps)
    else:
        with _bar(steps) as begin:
            yield begin


def _lines(steps: int) -> Begin:
    start, numbers = time.monotonic(), itertools.count(1)

    def begin(words: str) -> None:
        at = f"[{next(numbers)}/{steps}, {time.monotonic() - start:.0f} s]"
        print(f"{at} {words}", file=sys.stderr, flush=True)

    return begin


@contextlib.contextmanager
def _bar(steps: int) -> Iterator[Begin]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    bar = Progress(
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        console=Console(stderr=True),
        # A thread that draws would run beside what is timed.
        auto_refresh=False,
        transient=True,
        expand=True,
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        task, done = bar.add_task("", total=steps), itertools.count()
        yield lambda words: bar.update(task, completed=next(done), description=words, refresh=True)
