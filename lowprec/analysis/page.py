"""Pages of HTML that need nothing but themselves: no script, no network, pictures inside."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowprec.training.run_directory import written_whole

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } td.left, th.left { text-align: left }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto } img { max-width: 100% }
.flag { border-left: 4px solid #c33; background: #fdf1f1; padding: .3rem .8rem; margin: .4rem 0 }
.note { color: #666 }
"""


@dataclass(frozen=True)
class Page:
    """A page in the making; each method gives the page with one thing more.

    Args:
      title: of the page.
      body: the HTML so far.
    """

    title: str
    body: tuple[str, ...] = ()

    def _with(self, more: str) -> "Page":
        return Page(self.title, (*self.body, more))

    def heading(self, text: str) -> "Page":
        return self._with(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> "Page":
        """A paragraph; kind "flag" for what is wrong, "note" for what is aside."""
        marked = f' class="{kind}"' if kind else ""
        return self._with(f"<p{marked}>{html.escape(text)}</p>")

    def code(self, text: str) -> "Page":
        return self._with(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> "Page":
        """A table, the first `left` columns to the left."""
        cell = lambda tag, text, at: f"<{tag}{' class="left"' if at < left else ''}>{html.escape(str(text))}</{tag}>"
        line = lambda tag, row: f"<tr>{''.join(cell(tag, text, at) for at, text in enumerate(row))}</tr>"
        return self._with(f"<table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>")

    def picture(self, png: bytes, caption: str) -> "Page":
        """A PNG, inside of the page."""
        data = base64.b64encode(png).decode()
        return self._with(f'<p><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"></p>')

    def write(self, path: Path) -> None:
        """Writes the file whole: readers see the old or the new one; makes its directory."""
        path.parent.mkdir(parents=True, exist_ok=True)
        title, body = html.escape(self.title), "\n".join(self.body)
        text = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
        )
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
