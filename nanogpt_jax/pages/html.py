"""The shell of every page: one file that opens from the disk, asks nobody for anything, and runs only its own script.

A page is HTML with its style, its script and its data inside. Its Content-Security-Policy is `default-src 'none'`
plus the hashes of that style and script: a browser neither fetches anything nor runs what a text smuggled in. So no
element has a `style` or an `onclick` attribute; a script sets `element.style.x` instead.

    from nanogpt_jax.pages import html

    body = html.filled("<h1>{{title}}</h1> <p>{{text}}</p>", {"title": "My run", "text": "</script>"})
    html.page("My run", body, style=html.asset("mine.css"), script=html.asset("mine.js"), data={"loss": [3.2, 2.9]})

The script reads its data with `JSON.parse(document.getElementById("data").textContent)`.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SLOT = re.compile(r"\{\{\{(\w+)\}\}\}|\{\{(\w+)\}\}")


def page(title: str, body: str, *, style: str = "", script: str = "", data: Any = None, language: str = "en") -> str:
    """A whole page. `body` is HTML, its texts escaped; `style` comes after page.css; `data` is anything JSON takes."""
    style = f"\n{asset('page.css')}{style}"
    policy = f"default-src 'none'; style-src {_hashed(style)}; script-src {_hashed(script)}; base-uri 'none'"
    return f"""<!DOCTYPE html>
<html lang="{escape(language)}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="nanogpt-jax">
<title>{escape(title)}</title>
<style>{_inside("style", style)}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{as_json(data)}</script>
<script>{_inside("script", script)}</script>
</body>
</html>
"""


def escape(text: object) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(str(text))


def filled(template: str, texts: Mapping[str, object]) -> str:
    """`template` with each {{name}} replaced by that text, escaped, and each {{{name}}} by that HTML. KeyError."""
    return SLOT.sub(lambda slot: str(texts[slot[1]]) if slot[1] else escape(texts[slot[2]]), template)


def table(heads: list[str], rows: list[list[object]], caption: str) -> str:
    """A table whose first column names its rows. Texts are escaped."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    ]
    body = "\n".join(lines)
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    )


def as_json(value: Any) -> str:
    """JSON that can stand in a script element: no text in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # U+2028 and half characters are valid in JSON's strings, but not everywhere that a page may go
    text = re.sub("[\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.replace("<", "\\u003c")


def asset(name: str) -> str:
    """A file of this folder: a style, a script, a template."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _inside(element: str, text: str) -> str:
    assert not re.search(rf"</{element}|<!--|\r", text, re.I), f"what would end or change our own {element}"
    return text


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
