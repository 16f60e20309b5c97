"""Programs run in the tests' own process, and what they print."""

import itertools

import pytest

import evaluate
from data.errors import InputError


def score_sets(*argv):
    """evaluate.main; returns the exit code."""
    return evaluate.main([*map(str, argv)])


def error_line(capsys, call, *argv):
    """The only line that call(*argv), a program with exit code 2, leaves on stderr."""
    capsys.readouterr()
    try:
        code = call(*argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and "Traceback" not in out + err
    # A progress bar is no error; it goes only to a terminal.
    (line,) = err.splitlines()
    assert line.startswith("error: ") or ": error: " in line
    return line


def input_error(call, *args, **kwargs):
    """The message, one line, of the InputError that `call` raises."""
    # Not pytest.raises: what it keeps would hold a loader's workers until garbage collection.
    try:
        call(*args, **kwargs)
    except InputError as error:
        line = str(error)
    else:
        pytest.fail("no InputError")
    assert "\n" not in line
    return line


def table(text):
    """Cells of the head, and of the rows, of the first Markdown table in `text`."""
    parts = itertools.groupby(text.splitlines(), key=lambda line: line.startswith("|"))
    lines = next(list(lines) for is_table, lines in parts if is_table)
    head, rule, *rows = [line.strip("|").split("|") for line in lines]
    assert not "".join(rule).replace("-", "").strip() and {len(row) for row in [rule, *rows]} <= {len(head)}
    head, *rows = [[cell.strip() for cell in row] for row in [head, *rows]]
    return head, rows
