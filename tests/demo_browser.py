"""The web demo in a real Chromium, for its tests and for the README's picture.

python tests/demo_browser.py docs/web_demo.png
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait


ROOT = Path(__file__).parent.parent
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Seconds, to end what hangs; a page that works is not waited for.
PATIENCE = 600
LABELS = "pizza, rocket, dog face, bicycle, sunflower, snowman"


@contextlib.contextmanager
def served(command: list[str], folder: Path, **environment: str) -> Iterator[str]:
    """Run a command that serves the demo, and yield its address; its errors go to `server.log` in the folder."""
    given = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(folder / "uploads"), **environment}
    # As a server on the Hub is told where to listen, so these would be in the way.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "GRADIO" not in name}
    output, errors = folder / "server.out", folder / "server.log"
    with output.open("wb") as out, errors.open("wb") as log:
        process = subprocess.Popen(command, stdout=out, stderr=log, env=inherited | given, cwd=folder)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", output.read_text())):
            if process.poll() is not None:
                raise RuntimeError(f"The server ended: {errors.read_text()[-2000:]}")
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextlib.contextmanager
def chromium(width: int = 1200, height: int = 1000) -> Iterator[webdriver.Chrome]:
    """Start a headless Chromium that can reach this machine alone, with its console's and network's logs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "disable-quic",
            "disable-dev-shm-usage",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            "no-proxy-server",
            "hide-scrollbars",
            "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"user-data-dir={profile}",
            f"window-size={width},{height}",
        ):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


class DemoPage:
    """What a person does on the page, and sees."""

    def __init__(self, driver: webdriver.Chrome, url: str, ready: str = "#classify"):
        self.driver, self.url = driver, url
        driver.get(url)
        self.wait(lambda: self.find(ready))

    def wait(self, condition):
        return WebDriverWait(self.driver, PATIENCE, poll_frequency=0.1).until(
            lambda _: condition(), f"The page says: {self.driver.find_element(By.TAG_NAME, 'body').text}"
        )

    def find(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def read(self, selector: str, expression: str) -> list:
        """What an expression says of each `element`, in one go, since elements may be replaced any time."""
        script = f"return Array.from(document.querySelectorAll(arguments[0])).map(element => {expression})"
        return self.driver.execute_script(script, selector)

    def source(self, image: str) -> str | None:
        """Where a picture of the page is from, or None where there is none."""
        return next(iter(self.read(f"#{image} img", "element.src")), None)

    def upload(self, path: Path) -> None:
        self.find("#picture input[type=file]")[0].send_keys(str(path))

    def upload_and_see(self, path: Path) -> None:
        self.upload(path)
        self.wait(lambda: (self.source("picture") or "").endswith(path.name))

    def write(self, labels: str) -> None:
        self.find("#labels textarea")[0].send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, labels)

    def template(self, text: str) -> None:
        self.find("#template input")[0].send_keys(Keys.CONTROL, "a", Keys.NULL, text, Keys.TAB)

    def press(self) -> None:
        self.driver.execute_script("arguments[0].click()", self.find("#classify")[0])

    def press_and_add(self, text: str) -> None:
        """Start, write on before there can be an answer, and wait until there has been one."""
        script = """
            const [button, area, scores, text] = arguments;
            window.answered = false;
            const look = () => { window.answered ||= scores.querySelector("button.share") !== null; };
            new MutationObserver(look).observe(scores, {childList: true, subtree: true});
            button.click();
            area.value += text;
            area.dispatchEvent(new Event("input", {bubbles: true}));
        """
        parts = [self.find(selector)[0] for selector in ("#classify", "#labels textarea", "#scores")]
        self.driver.execute_script(script, *parts, text)
        self.wait(lambda: self.driver.execute_script("return window.answered"))

    def is_idle(self) -> bool:
        """Whether no answer is under way."""
        return not self.find("#scores [data-testid=status-tracker]:not(.hide)")

    def classify(self) -> dict[str, str]:
        self.press()
        self.wait(self.bars)
        return self.bars()

    def bars(self) -> dict[str, str]:
        """Label → percent as it's written, in the order shown."""
        parts = "[element.querySelector('span').firstChild, element.querySelector('b')].map(part => part.textContent)"
        return dict(self.read("#scores button.share", parts))

    def wait_until_empty(self) -> None:
        """Wait until neither bars nor a label nor an overlay is shown, and none is under way."""
        self.wait(lambda: self.is_idle() and not (self.bars() or self.chosen() or self.source("overlay")))

    def pick(self, menu: str, option: str) -> None:
        self.find(f"#{menu} input")[0].click()
        # A menu takes a press of the mouse, not a click; the chosen option has a tick.
        script = """
            const shown = Array.from(document.querySelectorAll("[role=option]"));
            const found = shown.find(element => element.textContent.replace("✓", "").trim() === arguments[0]);
            found?.dispatchEvent(new MouseEvent("mousedown", {bubbles: true}));
            return Boolean(found);
        """
        self.wait(lambda: self.driver.execute_script(script, option))

    def chosen(self) -> str:
        return self.read("#chosen input", "element.value")[0]

    def overlay(self, after: str | None = None) -> np.ndarray:
        """The overlay's pixels, once it is another than `after`."""
        self.wait(lambda: self.source("overlay") not in (None, after))
        with build_opener(ProxyHandler({})).open(self.source("overlay")) as response:
            return np.asarray(Image.open(BytesIO(response.read())))

    def message(self) -> str:
        """Wait for a message, return it and close it."""
        text = self.wait(lambda: " ".join(self.read("[data-testid=toast-text]", "element.textContent")))
        self.read("[data-testid=toast-close]", "element.click()")
        self.wait(lambda: not self.find("[data-testid=toast-text]"))
        return text

    def requests(self) -> list[str]:
        """The addresses that the page has asked for since this was last asked."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            entry["params"]["request"]["url"]
            for entry in entries
            if entry["method"] == "Network.requestWillBeSent"
            # Of the browser's own start page.
            and not entry["params"]["documentURL"].startswith("chrome")
        ]


def take_picture(path: Path) -> None:
    """Write the README's picture: the page after one of the embedded model's pictures was classified."""
    pictures = ROOT / "embedded" / "pictures"
    command = [sys.executable, "-m", "diffclip_hf.demo", str(ROOT / "embedded" / "diffclip-emoji")]
    with (
        tempfile.TemporaryDirectory() as folder,
        served([*command, "--examples", str(pictures)], Path(folder)) as url,
        chromium(1200, 1330) as driver,
    ):
        page = DemoPage(driver, url)
        page.upload_and_see(pictures / "bicycle.png")
        page.write("bicycle, motorcycle, house, dog face, rocket, pizza")
        page.classify()
        page.overlay()
        driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
        # Until nothing moves.
        time.sleep(2)
        with Image.open(BytesIO(driver.get_screenshot_as_png())) as shot:
            shot.convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]))
