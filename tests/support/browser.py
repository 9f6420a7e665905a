"""A real browser for tests: headless Chromium, without a network of its own."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement


FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1440,1000"),
)
PATIENCE = 60  # seconds


def programs() -> tuple[str, str] | None:
    """Where the browser and its driver are."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def browser(profile: Path) -> Iterator["Page"]:
    """A browser with a new, empty profile."""
    os.environ["SE_AVOID_STATS"] = "true"
    binary, driver = programs()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Page(chrome)
    finally:
        chrome.quit()


class Page:
    """What a user does with a page, and sees of it."""

    def __init__(self, chrome: webdriver.Chrome):
        self.chrome = chrome

    def visit(self, file: Path, fragment: str = "") -> None:
        self.chrome.get("about:blank")  # the same file with another fragment would not be loaded again
        self.chrome.get(file.as_uri() + fragment)
        self.wait(lambda: self.run("return 'ready' in document.documentElement.dataset"))

    def run(self, code: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(code, *arguments)

    def wait(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"not so within {PATIENCE} s; the browser's log: {self.complaints()}"
            time.sleep(0.02)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0])?.textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("return Array.from(document.querySelectorAll(arguments[0]), e => e.textContent)", selector)

    def press(self, keys: str) -> None:
        ActionChains(self.chrome).send_keys(keys).perform()

    def escape(self) -> None:
        self.press(Keys.ESCAPE)

    def point_at(self, element: WebElement) -> None:
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.chrome).move_to_element(element).perform()

    def drag(self, element: WebElement, start: float, end: float) -> None:
        """Across an element, from one share of its width to another."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        width = element.size["width"]
        actions = ActionChains(self.chrome).move_to_element_with_offset(element, round((start - 0.5) * width), 0)
        actions.click_and_hold().move_by_offset(round((end - start) * width), 0).release().perform()

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.chrome.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since this was last called, without what the page's policy stopped."""
        messages = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]
        sent = {m["params"]["requestId"]: m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        for message in messages:
            if message["method"] == "Network.loadingFailed" and message["params"].get("blockedReason") == "csp":
                sent.pop(message["params"]["requestId"], None)
        return [parameters["request"]["url"] for parameters in sent.values()]
