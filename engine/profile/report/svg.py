"""matplotlib's figures as SVG inside of a page: text stays text, and colours are the page's, light or dark.

A figure is drawn with stand-ins for colours, one of `COLORS` each; in the SVG they are CSS variables, so that one
picture serves both themes. Nothing of pyplot is used.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Light and dark. Stages and parts of the lanes' time; row kinds; methods and the rest.
COLORS = {
    "ink": ("#1c1f24", "#e6e8eb"),
    "muted": ("#5c6470", "#a2abb8"),
    "rule": ("#dfe3e8", "#343a44"),
    "page": ("#ffffff", "#14171c"),
    "night": ("#14171c", "#14171c"),  # on what is bright in both
    "forward": ("#2f66b3", "#5b93e0"),
    "decode": ("#d9822b", "#e79a4b"),
    "propose": ("#58a6a6", "#6fbcbc"),
    "finish": ("#8ab87a", "#93c582"),
    "backward": ("#8a5fb0", "#a981cf"),
    "reward": ("#c4455a", "#e06a7d"),
    "host": ("#6b7480", "#8b95a3"),
    "queue": ("#a9b1bc", "#5f6875"),
    "chore": ("#9a7b4f", "#b89767"),
    "idle_rewards": ("#e9b3bc", "#7d3f4b"),
    "idle_loop": ("#c3c9d1", "#4e5763"),
    "idle_rows": ("#dde1e6", "#3b424d"),
    "idle_nothing": ("#eff1f4", "#262b33"),
    "outside": ("#d8d2c4", "#4a4538"),
    "committed": ("#33658a", "#5d97c2"),
    "guided": ("#8a5fb0", "#a981cf"),
    "refresh": ("#4a9a9a", "#6cbcbc"),
    "speculative": ("#e0a526", "#e9b949"),
    "padding": ("#c9ced6", "#4d5561"),
    "open": ("#8fb8a8", "#5f8d7c"),
    "image": ("#b5651d", "#d58b4a"),
    **{
        f"method{place}": pair
        for place, pair in enumerate(
            (
                ("#33658a", "#5d97c2"), ("#c2703d", "#dd915f"), ("#4f8a5b", "#72b380"), ("#8b4f80", "#b87bac"),
                ("#a8923a", "#c9b45c"), ("#4a9a9a", "#6cbcbc"), ("#b24a4a", "#d87272"), ("#6b7480", "#8b95a3"),
            )
        )
    },
}  # fmt: skip
_STAND_INS = {name: f"#fe{place:02x}{255 - place:02x}" for place, name in enumerate(COLORS)}
_LONG = re.compile(r"(\.\d\d)\d+")  # a hundredth of a pixel is enough
_USED = re.compile(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"")


def color(name: str) -> str:
    """What a figure is drawn with where it is to have one of `COLORS`."""
    return _STAND_INS[name]


def css_variables(dark: bool) -> str:
    """The colours as CSS variables."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLORS.items())


@contextmanager
def style(size: float) -> Iterator[None]:
    """How figures look that are made within it, with text of so many pixels."""
    import matplotlib

    ink, muted, rule = color("ink"), color("muted"), color("rule")
    look: dict[Any, Any] = {
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": size,
        "axes.titlesize": size, "axes.titlelocation": "left", "axes.titlecolor": ink, "axes.titleweight": "bold",
        "axes.labelsize": size, "xtick.labelsize": size, "ytick.labelsize": size,
        "text.color": ink, "axes.labelcolor": muted, "xtick.labelcolor": muted, "ytick.labelcolor": muted,
        "xtick.color": rule, "ytick.color": rule, "axes.edgecolor": rule, "grid.color": rule,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.linewidth": 1.0,
        "ytick.major.size": 0, "xtick.major.size": 3, "xtick.major.pad": 5,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "figure.dpi": 72, "svg.fonttype": "none", "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(look):
        yield


def text(figure: Any, name: str, kind: str, label: str) -> str:
    """A figure as the text of an SVG element, one unit of it a pixel.

    Args:
        figure: of matplotlib.
        name: its ids begin with this, so that they are no other picture's.
        kind: its class in the page.
        label: what it shows, in words, for those who cannot see it.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", dpi=72, metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    found = file.getvalue()
    found = found[found.index("<svg") :]
    width, height = (float(inches) * 72 for inches in figure.get_size_inches())
    found = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", found, flags=re.DOTALL)
    found = found.replace("xlink:href", "href")
    head = f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_attribute(label)}">'
    found = re.sub(r"<svg[^>]*>", lambda _: head, found, count=1)
    for variable, stand_in in _STAND_INS.items():
        found = found.replace(stand_in, f"var(--{variable})")
    found = re.sub(r"font-family: [^;\"]*;?|font: (?:([a-z0-9]+) )?([0-9.]+px) [^;\"]*", _font, found)
    used = {one or other for one, other in _USED.findall(found)}
    found = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", found)
    found = re.sub(r"url\(#|href=\"#", lambda m: f"{m[0]}{name}-", found)
    found = re.sub(r' (d|x|y)="[^"]+"', lambda m: _LONG.sub(r"\1", m[0]).replace("\n", ""), found)
    return re.sub(r"\n\s*", "\n", found).strip()


def _font(found: re.Match[str]) -> str:
    """The size and weight of a text, in the form of whatever version of matplotlib; the font is the page's."""
    return f"font-weight: {found[1] or 400}; font-size: {found[2]}" if found[2] else ""


def _attribute(words: str) -> str:
    return words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
