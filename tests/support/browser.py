"""A headless Chromium for tests of pages, and screenshots of a page:

    python -m tests.support.browser PAGE.html IMAGE.png [--step N] [--gate N] [--dark] [--size 1200x800]

CHROMIUM gives the path of Chromium; by default it is searched on the PATH. Without it, or without playwright,
tests that need it are skipped, or fail with HRM_BROWSER=1.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing() -> str | None:
    """The reason why there is no browser; None if there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is missing: pip install -e '.[dev]'"
    return None if _chromium() else f"no Chromium: set CHROMIUM or the PATH to find {', '.join(NAMES)}"


@contextmanager
def chromium() -> Iterator["Browser"]:
    """A browser with a new profile. Skips the test if there is none, or fails it with HRM_BROWSER=1."""
    if reason := missing():
        if os.environ.get("HRM_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=_chromium(), args=list(FLAGS))
        yield browser
        browser.close()


def _chromium() -> str | None:
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes a screenshot of a page of hrm.solving.player.")
    parser.add_argument("page", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--step", type=int, help="the step to show (default: the last)")
    parser.add_argument("--gate", type=int, help="the gate to show over the board, from 0")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--size", default="1200x800", help="size of the window (default 1200x800)")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    with chromium() as browser:
        page = browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme="dark" if args.dark else "light",
            reduced_motion="reduce",
        )
        page.goto(args.page.resolve().as_uri())
        if args.step is not None:
            page.fill("#step", str(args.step))
        if args.gate is not None:
            page.check(f"input[name=gate][value='{args.gate}']")
        page.evaluate("() => document.activeElement.blur()")
        page.screenshot(path=args.image)


if __name__ == "__main__":
    main()
