"""A report, taken apart: its elements, texts and addresses, and what is plotted."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects texts, addresses and scripts."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.texts = []
        self.addresses = []
        self.elements = []
        self.handlers = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


def page_of(path):
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def plots_of(path):
    """What the page's script is given to plot."""
    found = re.search(r'<script type="application/json" id="plots">(.*?)</script>', path.read_text(encoding="utf-8"))
    return json.loads(found[1])
