"""What a reader of an HTML page finds in it: tables, figures, commands; through Chromium if there
is one here."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """A page's content.

    tables: of each table its rows, of each row the text of its cells.
    captions: what stands over each figure.
    svgs: the text of each <svg>, in words.
    images: the `src` of each picture.
    commands: what can be copied.
    text: everything that is shown.
    """

    def __init__(self, html: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.svgs: list[list[str]] = []
        self.images: list[str] = []
        self.commands: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._classes: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found: dict[str, Any] = dict(attrs)
        if tag == "img":
            self.images.append(found["src"])
        if tag not in VOID:
            self._open.append(tag)
            self._classes.append(found.get("class") or "")
        match tag:
            case "table":
                self.tables.append([])
            case "tr":
                self.tables[-1].append([])
            case "td" | "th":
                self.tables[-1][-1].append("")
            case "figcaption":
                self.captions.append("")
            case "svg":
                self.svgs.append([])
            case "pre" if "command" in self._classes:
                self.commands.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open:
            self._classes.pop()
            if self._open.pop() == tag:
                break

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self._open):
            return
        self.text += data
        innermost = self._open[-1] if self._open else ""
        if innermost in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif innermost == "figcaption":
            self.captions[-1] += data
        elif innermost == "pre" and "command" in self._classes:
            self.commands[-1] += data
        elif "svg" in self._open and data.strip():
            self.svgs[-1].append(data.strip())

    def row(self, first: str) -> list[str]:
        """The other cells of the only row that begins with `first`."""
        (found,) = (row[1:] for table in self.tables for row in table if row and row[0] == first)
        return found


def open_page(path: Path) -> Page:
    """The page as a browser shows it; it loads nothing else and has no error."""
    html = path.read_text()
    assert "http://" not in html
    assert "https://" not in html
    if CHROMIUM is None or find_spec("playwright") is None:
        return Page(html)
    from playwright.sync_api import sync_playwright

    troubles: list[Any] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        shown = browser.new_page()
        shown.on("pageerror", lambda error: troubles.append(error))
        shown.on("console", lambda m: troubles.append(m.text) if m.type == "error" else None)
        shown.on("requestfailed", lambda request: troubles.append(request))
        shown.goto(path.resolve().as_uri())
        content = shown.content()
        browser.close()
    assert not troubles
    return Page(content)
