"""Progress of long jobs, on stderr: a bar with the time left, or a JSON line per report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[int, int, str], None]


@contextmanager
def telling(form: str, job: str) -> Iterator[Tell]:
    """Give a function that takes (done, total, what) and shows it.

    Parameters
    ----------
    form : {"bar", "json"}
        For a person, or for another program.
    job : str
        Name of the job.
    """
    if form == "json":
        start = time.perf_counter()

        def write(done: int, total: int, what: str) -> None:
            seconds = round(time.perf_counter() - start, 3)
            line = {"job": job, "done": done, "total": total, "what": what, "seconds": seconds}
            print(json.dumps(line), file=sys.stderr, flush=True)

        yield write
        return
    if form != "bar":
        raise ValueError(f"{job}: progress must be one of bar, json, got {form!r}")
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeLeft())
    console = Console(stderr=True)
    # Into a file, a bar that vanishes would leave an empty line.
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(job, total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total or None, description=what[:40])

        yield show
