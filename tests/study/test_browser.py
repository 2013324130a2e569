"""Both studies in a real browser (Chromium): on a phone and on a desk, light and dark, with a reload in the middle.

SELFEVO_SCREENSHOTS names a folder in which the pages are kept to be looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from selfevo.study.answer import Request

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
REPLY = (
    "It sounds as if this has been going on for a while, and as if you had carried most of it alone. What would help "
    "you most when you come home this evening?"
)
SAYS = "My sister and I have not spoken since the funeral. I do not know who should call first."


class Writer:
    """A responder that writes until it is told to be done, so that it can be seen writing."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def respond(self, name: str, requests: Sequence[Request], on_reply: Callable[[int, str], None]) -> None:
        self.done.wait(60)
        for index, request in enumerate(requests):
            on_reply(index, REPLY[: 80 + 40 * (request.key % 3)])


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("there is no Chromium with its driver here (Debian: chromium, chromium-driver)")
    options = Options()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


class Visitor:
    """A participant in front of the browser."""

    def __init__(self, driver: webdriver.Chrome, address: str, width: int, scheme: str, name: str) -> None:
        self.driver, self.width, self.name, self.shots = driver, width, f"{name}-{width}-{scheme}", 0
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        driver.get("about:blank")  # nothing of an earlier page is logged from here on
        for log in ("performance", "browser"):
            driver.get_log(log)
        driver.get(address)

    def find(self, css: str) -> Any:
        """The element, once there is one."""
        return WebDriverWait(self.driver, 60).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, css))[0]

    def click(self, css: str) -> None:
        """Clicks what a finger could: the middle of the element has to be in sight, with nothing over it."""
        element = self.find(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def look(self, what: str) -> None:
        """What has to be so on every page; keeps a picture of it."""
        run = self.driver.execute_script
        assert run("return document.documentElement.scrollWidth") <= self.width, f"{what}: wider than the screen"
        header = run("return document.querySelector('header').getBoundingClientRect().toJSON()")
        assert header["top"] == 0, f"{what}: notice and help are out of sight"
        assert header["height"] < 150, f"{what}: the header takes {header['height']} pixels"
        unnamed = run(
            "return [...document.querySelectorAll('input:not([type=hidden]), textarea, button, progress')]"
            ".filter(e => !(e.labels && e.labels.length) && !e.textContent.trim()).map(e => e.outerHTML)"
        )
        assert unnamed == [], f"{what}: a screen reader has no name for these"
        small = run(
            "return [...document.querySelectorAll('button, .button, .scale label')]"
            ".filter(e => e.getBoundingClientRect().height < 40).map(e => e.outerHTML)"
        )
        assert small == [], f"{what}: too small for a finger"
        folder = os.environ.get("SELFEVO_SCREENSHOTS")
        if folder:
            self.shots += 1
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{self.name}-{self.shots:02}-{what}.png"))

    def say(self, text: str, writer: Writer) -> None:
        """Says something, and waits until the program is seen writing."""
        writer.done.clear()
        self.find("#text").send_keys(text)
        self.look("say")
        self.click("form[action='/say'] button")
        self.find(".writing")
        self.look("writing")


def check_requests(driver: webdriver.Chrome, address: str) -> None:
    """No request went elsewhere, and the browser found nothing against the content security policy, or else."""
    asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = {a["params"]["request"]["url"] for a in asked if a["method"] == "Network.requestWillBeSent"}
    assert address in urls
    assert not [url for url in urls if not url.startswith((address, "data:"))]
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_pointwise_conversation(site: Callable[..., Any], browser: webdriver.Chrome, width: int, scheme: str) -> None:
    writer = Writer()
    place = site(writer.respond)
    address = f"http://127.0.0.1:{place.port}/"
    visitor = Visitor(browser, address, width, scheme, "pointwise")
    visitor.look("consent")
    visitor.click("#consent")
    visitor.click("form[action='/begin'] button")
    visitor.find("#text")
    visitor.look("begin")
    visitor.say(SAYS, writer)
    browser.refresh()  # while the program writes
    visitor.find(".writing")
    writer.done.set()
    visitor.find("#log li.program")
    visitor.find("#text").send_keys("half a th")
    browser.get(address)  # came back to the first page
    assert visitor.find("#text").get_property("value") == "half a th"
    visitor.find("#text").clear()
    assert len(browser.find_elements(By.CSS_SELECTOR, "#log li")) == 2
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    visitor.say("I think I should.\n" if width < 500 else "I think I should.", writer)
    writer.done.set()
    visitor.find("#log li:nth-child(4)")
    visitor.look("answered")
    visitor.click("form[action='/end'] button")
    aspects = place.store.settings.aspects
    for number, aspect in enumerate(aspects):
        visitor.click(f"input[name='score {aspect}'][value='{1 + number % 5}']")
    visitor.look("rate")
    visitor.find("#comment").send_keys("It <b>listened</b>.")
    visitor.click("form[action='/rate'] button")
    assert visitor.find("main h1:not(.quiet)").text == "Thank you"  # the pages before it have a quiet one
    visitor.look("thanks")
    browser.get(f"{address}leave")
    visitor.look("leave")
    (session,) = place.store.sessions()
    assert session.state == "finished"
    assert [turn.text for turn in session.turns] == [SAYS, "I think I should."]
    assert session.scores == {aspect: 1 + number % 5 for number, aspect in enumerate(aspects)}
    assert session.comment == "It <b>listened</b>."
    check_requests(browser, address)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_pairwise_conversation(site: Callable[..., Any], browser: webdriver.Chrome, width: int, scheme: str) -> None:
    writer = Writer()
    place = site(writer.respond, mode="pairwise", scenarios=("A friend has moved away, and you miss talking to her.",))
    address = f"http://127.0.0.1:{place.port}/"
    visitor = Visitor(browser, address, width, scheme, "pairwise")
    visitor.click("#consent")
    visitor.click("form[action='/begin'] button")
    visitor.find("#text")
    visitor.look("begin")
    visitor.say(SAYS, writer)
    writer.done.set()
    visitor.find("form[action='/vote']")
    assert "better" in browser.switch_to.active_element.text  # a screen reader hears what is to be done
    visitor.look("vote")
    first, second = (a.rect for a in browser.find_elements(By.CSS_SELECTOR, "article"))
    assert (first["y"] == second["y"]) == (width == 1280)  # side by side on a desk, one below the other on a phone
    browser.refresh()
    visitor.click("button[value='tie']")
    visitor.find("form[action='/keep']")
    visitor.look("keep")
    visitor.click("form[action='/keep'] button[value='B']")
    visitor.say("I think I should.", writer)
    writer.done.set()
    visitor.find("form[action='/vote'] button[value='A']").send_keys(Keys.ENTER)  # by the keyboard
    visitor.click("form[action='/end'] button")
    visitor.find("#comment").send_keys("B was better at first.")
    visitor.look("comment")
    visitor.click("form[action='/rate'] button")
    assert visitor.find("main h1:not(.quiet)").text == "Thank you"  # the pages before it have a quiet one
    (session,) = place.store.sessions()
    assert session.state == "finished"
    assert [(turn.choice, turn.kept) for turn in session.turns] == [("tie", "B"), ("A", "A")]
    check_requests(browser, address)
