"""`rollflow serve` as a user has it: the command in a process, its page in a real browser, and its end by a signal."""

import os
import re
import signal
import subprocess
import sys
import urllib.request

import browser as chromium
import pytest

LINE = re.compile(r"serving shapes at (http://127\.0\.0\.1:\d+)\n")
TOLD = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
DASH = "\N{EN DASH}"  # of a figure that there is not yet
PROMPT = "two red circles and three green triangles"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The process, its address, and the file with what it logs."""
    journal, log = tmp_path_factory.mktemp("journal"), tmp_path_factory.mktemp("log") / "log"
    words = ["serve", "--port", "0", "--max-nfe", "400", "--journal", str(journal), "--log-level", "debug"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}  # as in most shells
    with log.open("w") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "rollflow", *words], stdout=subprocess.PIPE, stderr=told, text=True, env=environment
        )
    line = process.stdout.readline()
    assert LINE.fullmatch(line), line
    yield process, LINE.fullmatch(line)[1], log
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium.browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


def cards(state):
    return f"document.querySelectorAll('.card[data-state={state}]').length"


def test_there_are_no_slots_to_show_before_the_first_search(browser, server):
    browser.open(f"{server[1]}/", 1280, False)
    browser.until("document.getElementById('workers').textContent === '1 of 1'")
    assert browser.run("document.getElementById('free').textContent") == DASH


def test_a_person_types_a_prompt_and_watches_images_get_better(browser, server):
    browser.open(f"{server[1]}/", 1280, False)
    browser.until("document.getElementById('method').options.length")
    assert browser.run("document.getElementById('locked').offsetParent") is None
    browser.type("#prompt", PROMPT)
    browser.run("document.getElementById('nfe').value = 400")
    browser.click("#go")
    browser.until("document.querySelector('.card img:not([hidden])')?.naturalWidth")
    assert browser.run("document.querySelector('.card h2').textContent") == PROMPT
    browser.until("document.querySelector('.card .curve path.best')?.getAttribute('d').includes('H')")
    browser.until("Number(document.querySelector('.spent').textContent) > 20")
    browser.until("performance.getEntriesByType('resource').filter(one => one.name.endsWith('/image')).length > 1")
    browser.until("document.querySelector('.card img').naturalWidth === 64")  # it may just be replaced
    first = browser.run("document.querySelector('.card progress').value")
    browser.until(f"{cards('done')} || document.querySelector('.card progress').value > {first}")
    browser.until("document.getElementById('rate').textContent > 0")
    browser.until(f"document.getElementById('free').textContent !== '{DASH}'")
    browser.click(".card .accept")
    browser.until(f"{cards('accepted')} || {cards('done')}")
    reward = browser.until("document.querySelector('.card .reward').textContent")
    assert float(reward) <= 0  # a count of faults
    assert browser.run("document.querySelector('.card .save').download").endswith(".png")
    assert browser.run("document.querySelector('.card .cancel').disabled")
    assert browser.told(*TOLD) == []


def test_cancel_ends_a_search(browser, server):
    browser.open(f"{server[1]}/", 390, True)
    browser.until("document.getElementById('method').options.length")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.type("#prompt", PROMPT)
    browser.run("document.getElementById('nfe').value = 400; document.getElementById('n').value = 2")
    browser.click("#go")
    browser.until("document.querySelectorAll('.card').length === 2")
    browser.click(".card .cancel")
    browser.until(f"{cards('cancelled')} === 1")
    assert browser.run("[...document.querySelectorAll('.card .seed')].map(one => one.textContent)") == ["0", "1"]
    browser.click(".card:last-child .cancel")
    browser.until(f"{cards('cancelled')} === 2")
    assert browser.told(*TOLD) == []


def test_the_page_tells_what_is_wrong(browser, server):
    browser.open(f"{server[1]}/", 1280, False)
    browser.until("document.getElementById('method').options.length")
    browser.type("#prompt", PROMPT)
    browser.run("document.getElementById('reward').value = 'cuont'")
    browser.click("#go")
    assert "'count'" in browser.until("document.getElementById('error').textContent")
    assert browser.run("document.querySelectorAll('.card').length") == 0


def test_the_documentation_needs_nothing_from_elsewhere(browser, server):
    browser.open(f"{server[1]}/docs", 1000, False)
    browser.until("document.querySelectorAll('.endpoint').length > 8")
    text = browser.run("document.body.textContent")
    assert "/v1/images/generations" in text and "stop_at" in text
    assert "executed_nfe" in text and "image_generation.completed" in text and "undefined" not in text
    assert browser.run("document.getElementById('Search').textContent.includes('queued | running | done')")
    assert browser.run("[...document.querySelectorAll('.endpoint a')].every(one => document.querySelector(one.hash))")
    asked = [event["request"]["url"] for event in browser.told("Network.requestWillBeSent")]
    assert all(url.startswith((server[1], "data:")) for url in asked)
    assert browser.told(*TOLD) == []


def test_a_signal_ends_it_when_what_was_asked_for_is_done(server):
    process, url, log = server
    body = b'{"prompt": "two red circles", "nfe": 60}'
    asked = urllib.request.Request(f"{url}/v1/searches", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert answer.status == 202
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0 and process.stdout.read() == ""
    lines = [re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (.*)", one) for one in log.read_text().splitlines()]
    assert all(lines)
    told = [one[1] for one in lines]
    assert told[:2] == [
        "INFO the journal: searches that go on: 0; that are ended, as their clients have gone: 0",
        "INFO the worker 0 (local) is ready",
    ]
    assert any(re.fullmatch(r"DEBUG POST /v1/searches 202 [\d.]+ ms req_\w+", one) for one in told)
    assert any(re.match(r"INFO draining: searches that run: \d; that wait: \d; they have 30 s", one) for one in told)
    assert told[-1] == "INFO closed: searches that are left in the journal: 0" and PROMPT not in log.read_text()
