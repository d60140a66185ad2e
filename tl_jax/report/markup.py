"""Small pieces of safe HTML. Everything that comes from a file goes through `escape`."""

import base64
import html
import io
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

# Characters that reorder what a reader sees: a class name could otherwise make a page say something else.
_REORDERING = set('\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')


def clean(text: object) -> str:
    """Text without control characters, lone surrogates or marks that reorder what stands beside them."""
    return ''.join(
        ' ' if c in '\n\t' else '\ufffd' if c in _REORDERING or unicodedata.category(c) in ('Cc', 'Cs') else c
        for c in str(text)
    )


def escape(text: object) -> str:
    """`clean`, then escaped for an element's text or a quoted attribute."""
    return html.escape(clean(text), quote=True)


def shorten(text: str, most: int) -> str:
    """At most `most` characters, an ellipsis for the rest."""
    return text if len(text) <= most else text[: most - 1] + '…'


def preformatted(text: str) -> str:
    """A <pre> block that keeps line ends."""
    return '<pre>' + '\n'.join(escape(line) for line in text.splitlines()) + '</pre>'


def section(title: str, *parts: str) -> str:
    """A headed section; empty parts vanish, and a section without parts is empty."""
    body = ''.join(part for part in parts if part)
    return f'<section><h2>{escape(title)}</h2>{body}</section>\n' if body else ''


def details(title: str, body: str) -> str:
    """A closed block that opens on a click, without a script."""
    return f'<details><summary>{escape(title)}</summary>{body}</details>\n'


def caption(text: str) -> str:
    """A quiet explanatory line."""
    return f'<p class="caption">{escape(text)}</p>'


def notes(lines: Iterable[str]) -> str:
    """A box of warnings, or nothing."""
    items = ''.join(f'<li>{escape(line)}</li>' for line in lines)
    return f'<ul class="notes">{items}</ul>\n' if items else ''


def columns(*parts: str) -> str:
    """Parts side by side where the window is wide enough; empty ones vanish."""
    return '<div class="columns">' + ''.join(f'<div>{part}</div>' for part in parts if part) + '</div>\n'


def stacked(*parts: str) -> str:
    """Parts one below the other."""
    return ''.join(parts)


def cards(figures: Iterable[tuple[str, str, str]]) -> str:
    """Key figures: (label, value, remark)."""
    items = ''.join(
        f'<div class="card"><span class="label">{escape(label)}</span>'
        f'<span class="value">{escape(value)}</span><span class="remark">{escape(remark)}</span></div>'
        for label, value, remark in figures
    )
    return f'<div class="cards">{items}</div>\n' if items else ''


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A definition list; pairs whose value is missing are left out."""
    rows = ''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in pairs if v not in (None, ''))
    return f'<dl>{rows}</dl>\n' if rows else ''


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are words and whose others are figures. Cells are HTML already."""
    cell = lambda tag, i, content: f'<{tag}{"" if i < texts else " class=n"}>{content}</{tag}>'
    top = ''.join(cell('th', i, escape(name)) for i, name in enumerate(head))
    body = ''.join('<tr>' + ''.join(cell('td', i, c) for i, c in enumerate(row)) + '</tr>' for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>\n'


def bar(share: float) -> str:
    """A share, 0 … 1, as the filled part of a track; nan is empty."""
    return f'<span class="track"><span style="width:{100 * np.nan_to_num(share):.0f}%"></span></span>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Keys to a plot: (colour, glyph, name)."""
    items = ''.join(
        f'<li><span style="color:{escape(color)}">{escape(glyph)}</span> {escape(shorten(name, 40))}</li>'
        for color, glyph, name in entries
    )
    return f'<ul class="legend">{items}</ul>\n'


def picture(pixels: UInt8[np.ndarray, 'height width channel'], alt: str, side: int = 160) -> str:
    """An <img> with the pixels inside: PNG as they are while small, a JPEG of at most `side` pixels otherwise."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    small = max(image.size) <= 64
    if not small:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    if small:
        image.save(buffer, 'png')
    else:
        image.save(buffer, 'jpeg', quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind, style = ('png', ' class="pixels"') if small else ('jpeg', '')
    return f'<img{style} alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'


def write_text(path: Path, text: str) -> Path:
    """Write a file so that a reader sees the old one or the new one, never a part. Returns `path`."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_text(text, encoding='utf-8', errors='replace')
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
