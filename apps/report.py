"""A report: one HTML page that needs nothing else, written whole or not at all."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.figure import Figure

from apps.output import format_value
from moecore.files import write_atomic

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass
class Section:
    """A heading and what stands under it, as HTML."""

    title: str
    parts: list[str] = field(default_factory=list)

    def text(self, words: str) -> Section:
        """A paragraph."""
        self.parts.append(f"<p>{escape(words)}</p>")
        return self

    def figure(self, figure: Figure, caption: str, photo: bool = False) -> Section:
        """A chart (vectors), or with `photo` one that holds images (pixels)."""
        data = io.BytesIO()
        kind = "png" if photo else "svg"
        figure.savefig(data, format=kind, dpi=140, bbox_inches="tight")
        mime = "image/png" if photo else "image/svg+xml"
        source = f"data:{mime};base64,{base64.b64encode(data.getvalue()).decode()}"
        return self._image(source, caption)

    def animation(self, gif: bytes, caption: str) -> Section:
        """Moving pictures: a whole GIF file."""
        return self._image(f"data:image/gif;base64,{base64.b64encode(gif).decode()}", caption)

    def _image(self, source: str, caption: str) -> Section:
        self.parts.append(
            f'<figure><img src="{source}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
        )
        return self

    def table(self, rows: Sequence[Mapping[str, Any]]) -> Section:
        """Rows of equal columns; numbers to the right."""
        if rows:
            head = "".join(f"<th>{escape(str(column))}</th>" for column in rows[0])
            body = "".join("<tr>" + "".join(_cell(value) for value in row.values()) + "</tr>" for row in rows)
            self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        return self


def _cell(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"<td{' class=number' if number else ''}>{escape(format_value(value))}</td>"


@dataclass
class Page:
    """Title, key figures, sections."""

    title: str
    subtitle: str
    key_figures: Mapping[str, str]
    sections: list[Section] = field(default_factory=list)

    def section(self, title: str) -> Section:
        """Start a section."""
        self.sections.append(Section(title))
        return self.sections[-1]

    def write(self, path: str | Path) -> Path:
        """Render to a file."""
        template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
        return write_atomic(path, template.render(page=self))
