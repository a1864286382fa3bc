"""Building blocks of a page that is one file: style, script, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from megatron_tst.common.text_table import Table
from megatron_tst.report.drawing import Plot

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --page: #ffffff; --line: #d1d9e0;
  --panel: #f6f8fa; --mark: #fff3c4; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9aa4af; --page: #14171b;
  --line: #343b43; --panel: #1c2127; --mark: #4a3d12; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 80rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; }
h3 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .5rem 0; }
p, ul, figure, pre { max-width: 58rem; }
.dim, figcaption { color: var(--dim); font-size: .92rem; }
a { color: inherit; }
.bad { color: var(--bad); font-weight: 600; }
.verdict { border-left: 4px solid #d9601a; background: var(--panel); padding: .9rem 1.1rem;
  margin: 1.4rem 0; font-size: 1.05rem; max-width: 58rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .34rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.differs td { background: var(--mark); }
tr.differs td:first-child { padding-left: .4rem; }
figure { margin: 0 0 1.8rem; }
svg { display: block; width: 100%; min-width: 32rem; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.value { fill: transparent; }
.value:hover { stroke: currentColor; stroke-width: 1.2; }
.tip { position: fixed; z-index: 1; pointer-events: none; max-width: 20rem; padding: .3rem .6rem;
  border-radius: 4px; background: var(--ink); color: var(--page); font-size: .85rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
pre { background: var(--panel); padding: .8rem 1rem; font-size: .82rem; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 4px; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } svg { min-width: 0; } }
"""

# Without it the browser's own tooltips show the same titles.
_SCRIPT = """
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
const place = (event) => {
  const width = tip.offsetWidth, height = tip.offsetHeight;
  const right = Math.max(4, Math.min(event.clientX + 12, innerWidth - width - 4));
  const above = event.clientY - height - 12;
  tip.style.left = right + "px";
  tip.style.top = (above < 4 ? event.clientY + 16 : above) + "px";
};
for (const target of document.querySelectorAll(".value")) {
  const title = target.querySelector("title"), text = title.textContent;
  title.remove();
  target.addEventListener("pointerenter", (event) => {
    tip.textContent = text;
    tip.hidden = false;
    place(event);
  });
  target.addEventListener("pointermove", place);
  target.addEventListener("pointerleave", () => { tip.hidden = true; });
}
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page that refers to nothing outside of itself."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def table(content: Table) -> str:
    """A table of text, which scrolls in itself where it is too wide."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in content.header)
    body = []
    for i, row in enumerate(content.rows):
        mark = ' class="differs"' if content.marked and content.marked[i] else ""
        body.append(f"<tr{mark}>{''.join(map(_cell, row))}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    mark = ' class="bad"' if "diverged" in text else ""
    return f"<td{mark}>{escape(text)}</td>"


def figure(plot: Plot) -> str:
    """A plot with its caption."""
    return (
        f'<figure><div class="wide">{plot.svg}</div><figcaption><b>{escape(plot.title)}.</b> '
        f"{escape(plot.caption)}</figcaption></figure>"
    )


def verdict_box(sentences: Sequence[str]) -> str:
    """The outcome, its first sentence in bold."""
    headline, *others = map(escape, sentences)
    paragraphs = "".join(f"<p>{sentence}</p>" for sentence in others)
    return f'<div class="verdict"><p><b>{headline}</b></p>{paragraphs}</div>'


def bullets(items: Iterable[str]) -> str:
    """A list of text."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def note(text: str) -> str:
    """A paragraph of small print."""
    return f'<p class="dim">{escape(text)}</p>'


def link(text: str, address: str) -> str:
    """A paragraph that leads to another page; it loads nothing."""
    return f'<p class="dim"><a href="{escape(address)}">{escape(text)}</a></p>'


def folded(summary: str, content: str) -> str:
    """Content that is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"
