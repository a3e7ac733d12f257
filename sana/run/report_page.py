"""The frame of a report: style, script and page, with nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("report.css")
SCRIPT = Path(__file__).with_name("report.js")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, header: str, verdict: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """The whole document.

    Args:
        title: plain text.
        header: HTML above the links to the sections.
        verdict: HTML between the links and the sections.
        sections: (anchor, title as plain text, HTML); those with empty HTML are left out.
        footer: plain text.
    """
    sections = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections)
    body = "".join(
        f'<section id="{anchor}" aria-label="{escape(name)}"><h2>{escape(name)}</h2>{html}</section>'
        for anchor, name, html in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE.read_text()}</style></head><body><main><header>{header}'
        f'<nav aria-label="Sections">{links}</nav></header>{verdict}{body}<footer>{escape(footer)}</footer></main>'
        f"<script>{SCRIPT.read_text()}</script></body></html>\n"
    )
