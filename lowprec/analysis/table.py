"""Tables that read well in a terminal and are Markdown too."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns; the first `left` ones to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    line = lambda cells: "| " + " | ".join(cells) + " |"
    align = lambda cell, i: cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    body = [line([align(cell, i) for i, cell in enumerate(row)]) for row in (header, *rows)]
    return "\n".join([body[0], line(rule), *body[1:]])
