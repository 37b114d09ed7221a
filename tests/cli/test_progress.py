"""What a long measurement is doing: on a terminal, and in a file."""

import io

from rich.console import Console

from mdiq.cli.progress import shown_bar, shown_progress


def test_without_a_terminal_each_step_is_a_line() -> None:
    file = io.StringIO()
    with shown_progress(Console(file=file, width=20)) as progress:
        progress("few: a ring of 2 nodes starts [1/3]")
        progress("few: one user")
    assert file.getvalue() == "few: a ring of 2 nodes starts [1/3]\nfew: one user\n"


def test_without_a_terminal_a_bar_is_a_line_for_each_step() -> None:
    file = io.StringIO()
    with shown_bar(Console(file=file)) as progress:
        for done in range(3):
            progress("int8: loads", done, 3)
        progress("int8: reads", 0, 9)
    assert file.getvalue() == "int8: loads\nint8: reads\n"


def test_on_a_terminal_the_line_changes() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with shown_progress(console) as progress:
        progress("few: one user")
    with shown_bar(console) as bar:
        bar("loads", 1, 2)
    assert "loads" in file.getvalue() and "\x1b[" in file.getvalue()
