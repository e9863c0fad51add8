"""A table that compares networks, as wide as the console allows; no word of it is ever broken."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bmrs.text_table import table_lines


@dataclass(frozen=True)
class Row:
    """One quantity of all networks.

    Attributes:
        label: what it is.
        cells: one for each column; a cell is a mean, and a standard deviation where seeds differ, or nothing.
    """

    label: str
    cells: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """Rows that belong together, below a title of their own or none."""

    rows: Sequence[Row]
    title: str = ""


def spread(values: Sequence[float], form: Callable[[float], str]) -> tuple[str, ...]:
    """Return the mean of several seeds' values as text, and their standard deviation where they differ."""
    mean = form(statistics.mean(values))
    return (mean,) if len(set(values)) == 1 else (mean, f"± {form(statistics.stdev(values))}")


def show_table(console: Console, title: str, columns: Sequence[str], sections: Sequence[Section]) -> None:
    """Print a table; where the console is too narrow for a column each, one block for each column.

    Args:
        console: where it is printed.
        title: the line above it.
        columns: headings; a line break in one is a space in the heading of a block.
        sections: the rows, whose cells are those of the columns.
    """
    console.print(Text(title, style="italic"))
    # Several seeds' standard deviations go below the means where they do not fit beside them.
    for between, pad_edge in itertools.product((" ", "\n"), (True, False)):
        table = _table(columns, sections, between, pad_edge)
        if console.measure(table, options=console.options.update(width=10**4)).maximum <= console.width:
            console.print(table)
            return
    for position, column in enumerate(columns):
        console.print(Text(column.replace("\n", " "), style="bold"), soft_wrap=True)
        lines = []
        for section in sections:
            lines += [(f"  {section.title}", "")] if section.title else []
            lines += [
                (f"  {row.label}", " ".join(cell)) for row in section.rows if (cell := row.cells[position])
            ]
        for line in table_lines(lines, left=0):
            console.print(Text(line), soft_wrap=True)


def _table(columns: Sequence[str], sections: Sequence[Section], between: str, pad_edge: bool) -> Table:
    table = Table(pad_edge=pad_edge)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for section in sections:
        if section.title:
            table.add_row(section.title)
        for row in section.rows:
            table.add_row(row.label, *(between.join(cell) for cell in row.cells))
        table.add_section()
    return table
