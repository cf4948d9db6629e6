"""Progress on stderr: a bar with the time left, or one JSON object per line."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator

Report = Callable[[int, int, str], None]


@contextlib.contextmanager
def progress(title: str, style: str = "auto") -> Iterator[Report]:
    """Yield a function of (done, total, what); `style` is auto, json or off."""
    if style == "json":
        yield _json_lines(title)
    elif style == "off" or (style == "auto" and not sys.stderr.isatty()):
        yield lambda done, total, what: None
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[what]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, what="")

            def report(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, what=what[-30:])

            yield report


def _json_lines(title: str) -> Report:
    begin = time.monotonic()
    last = -1.0

    def report(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic() - begin
        if now - last < 0.1 and done < total:
            return
        last = now
        left = now / done * (total - done) if done else None
        line = {"job": title, "done": done, "total": total, "what": what}
        line |= {"seconds": round(now, 3), "seconds_left": left and round(left, 3)}
        print(json.dumps(line), file=sys.stderr, flush=True)

    return report
