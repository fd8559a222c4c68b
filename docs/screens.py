"""Take the screenshots of the report and the demo: `python docs/screens.py`, from the repository's root.

Opens both in Chromium and writes docs/images/report.png and docs/images/demo.png. Needs playwright, gradio and a
Chromium on the PATH.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
OUTPUT = Path("outputs") / "docs" / "screens"


def main() -> None:
    finder = [sys.executable, "localization_heads_finder.py", f"output_dir={OUTPUT}"]
    subprocess.run(finder, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright, demo() as address:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(SWITCHES))
        report(browser.new_page(viewport={"width": 1280, "height": 2104}))
        compare(browser.new_page(viewport={"width": 1280, "height": 1900}), address)
        browser.close()
    for name in ("report.png", "demo.png"):
        image = Image.open(IMAGES / name).convert("RGB")
        image.quantize(256).save(IMAGES / name, optimize=True)
        print(f"wrote docs/images/{name}")  # noqa: T201


def report(page: Page) -> None:
    """Take a screenshot of the top of the report, with the best samples first."""
    page.goto((ROOT / OUTPUT / "tiny" / "report.html").as_uri())
    page.locator("label:has-text('Order') select").select_option(label="best first: highest IoU")
    page.wait_for_timeout(1500)
    page.screenshot(path=IMAGES / "report.png")


def compare(page: Page, address: str) -> None:
    """Take a screenshot of the first example with two expressions and two sets of heads."""
    page.goto(address)
    page.wait_for_selector("#boxes img", timeout=60_000)
    page.fill("#expression textarea", "the frog; the left owl")
    before = page.get_attribute("#boxes img", "src")
    page.click("#ground")
    page.wait_for_function("src => document.querySelector('#boxes img').src !== src", arg=before)
    page.click("#compare input")
    page.wait_for_selector("#boxes_b img", state="visible")
    page.wait_for_timeout(1500)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=IMAGES / "demo.png")


@contextmanager
def demo() -> Iterator[str]:
    """Serve the demo while the block runs; yields its address."""
    command = [sys.executable, "-u", "-m", "localization_heads.apps.demo", "open_browser=false", "device=cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
