"""What a long measurement is doing, on stderr: a line that changes on a terminal, else a line for each step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def shown_progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Yield what shows the text of a step."""
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
        return
    yield lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def shown_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what shows a step, how much of it is done, and how much it is."""
    if console.is_terminal:
        with Progress(console=console, transient=True) as bars:
            task = bars.add_task("starting", total=None)
            yield lambda doing, done, total: bars.update(task, description=doing, completed=done, total=total)
        return
    told = ""

    def tell(doing: str, done: int, total: int) -> None:
        nonlocal told
        if doing != told:
            console.print(doing, markup=False, highlight=False, soft_wrap=True)
            told = doing

    yield tell
