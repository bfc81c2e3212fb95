"""Words of strangers, for a terminal and for a page: control characters are not shown, and on a page all is escaped."""

from __future__ import annotations

from html import escape


def plain(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else "�" for c in text)


def shown(text: str) -> str:
    """The same for a page."""
    return escape(plain(text))


def page(title: str, style: str, body: str) -> str:
    """A page of HTML that loads nothing."""
    return (
        f'<!doctype html>\n<html lang="und"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{style}</style></head><body>\n{body}\n</body></html>\n"
    )
