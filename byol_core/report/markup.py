"""Pieces of HTML: the frame of a page, tables, and numbers as a person reads them."""

import html
from collections.abc import Sequence
from pathlib import Path

STYLE = Path(__file__).with_name("style.css")


def document(title: str, kind: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    body = "".join(f"<section>{f'<h2>{heading}</h2>' if heading else ''}{content}</section>"
                   for heading, content in sections if content)
    name = html.escape(title)
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{name} - {kind}</title><style>{STYLE.read_text()}</style></head><body><main>"
            f'<header><p class="kind">{kind}</p><h1>{name}</h1></header>{body}{footer}</main></body></html>'
            "\n")


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), kinds: str = "") -> str:
    """Cells are HTML already. kinds: a letter per column, n for numbers, w for text to be broken anywhere."""
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f'<{tag} class="{kind}">{cell}</{tag}>' if (kind := kinds[place:place + 1]) else
                                f"<{tag}>{cell}</{tag}>" for place, cell in enumerate(cells)) + "</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(row(cells, "td") for cells in rows)}</tbody></table></div>'


def details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"


def named(title: str, meaning: str) -> str:
    return f"{title}<small>{meaning}</small>"


def plain(value: object, digits: int = 6) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item, digits) for item in value)
    return f"{float(f'{value:.{digits}g}'):.6g}" if isinstance(value, float) else str(value)


def percent(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, (int, float)) else ""


def count(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, (int, float)) else ""


def duration(seconds: object) -> str:
    if not isinstance(seconds, (int, float)):
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    return f"{whole // 3600} h {whole // 60 % 60} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"
