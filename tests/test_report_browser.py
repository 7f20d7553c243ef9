"""The report in a real browser: light, dark and on a phone, without a network."""

import browser as chromium
import pytest
import synthetic
from PIL import Image

from rollflow.profile.report import page as report
from rollflow.profile.report import svg

FORMS = {"light": (1100, False), "dark": (1100, True), "phone": (390, False)}
TOLD = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
SCENARIOS = [{"name": "forward 0.5x", "seconds": 0.2, "speedup": 1.3, "nfe_per_second": 900.0, "p95": 0.2}]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium.browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports of a busy recording with images, and of one in which nothing ran."""
    folder = tmp_path_factory.mktemp("report")
    recording = synthetic.busy(requests=30, device=True, frames=5)
    Image.new("RGB", (48, 32), "teal").save(folder / "one.webp")
    look = {"request": 1, "seconds": synthetic.BEGIN + 0.2, "file": "one.webp", "final": False}
    recording.about["looks"] = [{**look, "nfe": nfe, "reward": -nfe / 7} for nfe in range(1, 30)]
    return {
        "busy": report.save(recording, folder / "busy.html", folder, SCENARIOS, 2.0),
        "empty": report.save(synthetic.empty(lanes=2), folder / "empty.html"),
    }


# Texts of pictures that are cut off or lie on one another; texts that are small; things that are wider than the page.
LAYOUT = """(() => {
  const found = [], texts = [];
  for (const svg of document.querySelectorAll(".chart svg")) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const boxes = [...svg.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect()]);
    boxes.forEach(([words, box], place) => {
      if (Math.max(frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom) > 1)
        found.push(`cut off: ${words}`);
      for (const [others, other] of boxes.slice(place + 1)) {
        const across = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const along = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (across > 1 && along > 3) found.push(`on one another: ${words}, ${others}`);
      }
    });
    const scale = frame.width / svg.viewBox.baseVal.width;
    for (const one of svg.querySelectorAll("text")) texts.push(scale * parseFloat(getComputedStyle(one).fontSize));
  }
  for (const one of document.querySelectorAll("main *:not(svg *)"))
    if (one.textContent.trim() && one.offsetParent) texts.push(parseFloat(getComputedStyle(one).fontSize));
  return {found, smallest: Math.min(...texts), width: [document.documentElement.scrollWidth, innerWidth],
          kinds: [...document.querySelectorAll(".chart svg")].filter(one => one.getBoundingClientRect().width)
                 .map(one => one.getAttribute("class"))};
})()"""


@pytest.mark.parametrize("name", ["busy", "empty"])
@pytest.mark.parametrize("form", FORMS)
def test_pages_are_whole_readable_and_alone(browser, pages, name, form, tmp_path):
    width, dark = FORMS[form]
    browser.open(pages[name].as_uri(), width, dark)
    layout = browser.run(LAYOUT)
    assert layout["found"] == []
    assert layout["smallest"] >= 12
    assert layout["width"][0] <= layout["width"][1] == width
    assert {*layout["kinds"]} <= {"narrow" if form == "phone" else "wide"}
    assert (len(layout["kinds"]) >= 6) == (name == "busy")
    assert browser.told(*TOLD) == []
    asked = [event["request"]["url"] for event in browser.told("Network.requestWillBeSent")]
    assert all(url == pages[name].as_uri() or url.startswith("data:") for url in asked)
    page = svg.COLORS["page"][dark]
    assert browser.run("getComputedStyle(document.body).backgroundColor") == _rgb(page)
    (tmp_path / "page.png").write_bytes(browser.picture())
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size[0] == width and picture.convert("RGB").getpixel((2, 2)) == tuple(bytes.fromhex(page[1:]))


def test_the_button_changes_the_theme_and_nothing_remembers_it(browser, pages):
    browser.open(pages["busy"].as_uri(), 1100, True)
    bar = "getComputedStyle(document.querySelector('svg.wide path[style*=\"--forward\"]')).fill"
    light, dark = svg.COLORS["forward"]
    assert browser.run(bar) == _rgb(dark)
    browser.run("document.getElementById('theme').click()")
    assert browser.run(bar) == _rgb(light)
    browser.run("document.getElementById('theme').click()")
    assert browser.run(bar) == _rgb(dark)
    browser.run("document.getElementById('theme').click()")
    browser.open(pages["busy"].as_uri(), 1100, True)
    assert browser.run(bar) == _rgb(dark) and browser.run("document.cookie") == ""
    assert browser.told(*TOLD) == []


def test_images_are_shown(browser, pages):
    browser.open(pages["busy"].as_uri(), 390, False)
    sizes = browser.run("[...document.images].map(one => one.naturalWidth)")
    assert sizes == [48] * report.EACH


def _rgb(color):
    return f"rgb({', '.join(str(part) for part in bytes.fromhex(color[1:]))})"
