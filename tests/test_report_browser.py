"""The pages in a real browser: nothing goes wrong, every plot is drawn, light and dark, narrow and printed."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from report_records import fill

from ovexport.artifacts import RunFolder
from ovexport.report.compare import write_comparison
from ovexport.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCHEMES = {"dark": 0, "light": 1}
PROBE = """<script>
addEventListener("load", () => {
  const paper = getComputedStyle(document.body).backgroundColor;
  const plots = [...document.querySelectorAll("svg")].map(svg => ({
    title: svg.querySelector("title").textContent,
    width: svg.getBoundingClientRect().width,
    height: svg.getBoundingClientRect().height,
    marks: [...svg.querySelectorAll("path, use")].filter(mark => {
      const box = mark.getBBox(), style = getComputedStyle(mark);
      return (box.width || box.height) && (style.stroke !== "none" || style.fill !== "none");
    }).length,
    inks: [...new Set([...svg.querySelectorAll("text")].map(text => getComputedStyle(text).fill))],
  }));
  const seen = {paper, plots, title: document.title, over: document.documentElement.scrollWidth - innerWidth};
  const note = document.createElement("pre");
  note.id = "probe";
  note.textContent = JSON.stringify(seen);
  document.body.append(note);
});
</script>"""

pytestmark = pytest.mark.browser


class Browser:
    """Headless Chromium with a profile of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, page: Path, *options: str) -> tuple[str, list[str]]:
        """What it wrote to stdout, and the messages of the page's console."""
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
        flags += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0"]
        done = subprocess.run(
            [str(BROWSER), "--headless", *flags, f"--user-data-dir={self.folder}", *options, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def look(self, page: Path, scheme: str, width: int) -> dict[str, Any]:
        """What a script sees of the page, whose own policy forbids any script."""
        text = page.read_text(encoding="utf-8")
        probed = page.with_name(f"{page.name}.probe.html")
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        probed.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
        shown = (f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--window-size={width},900")
        dumped, console = self.run(probed, *shown, "--dump-dom")
        assert console == []
        found = re.search(r'<pre id="probe">(.*?)</pre>', dumped, re.DOTALL)
        assert found is not None
        return dict(json.loads(unescape(found.group(1))))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    if BROWSER is None:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("no Chromium or Chrome is installed")
    return Browser(tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def pages(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with every figure there can be, and a comparison of that run with one that has few."""
    folder = tmp_path_factory.mktemp("pages")
    full = fill(RunFolder(shutil.copytree(finished_run.path, folder / "full")))
    return {
        "report": write_report(full),
        "comparison": write_comparison([finished_run, full], folder / "compare.html"),
    }


def contrast(first: str, second: str) -> float:
    """The ratio of two colours' luminances as WCAG 2 defines it; 4.5 is asked of small text."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_every_plot_is_drawn_and_its_text_can_be_read(
    browser: Browser, pages: dict[str, Path], name: str, scheme: str
) -> None:
    seen = browser.look(pages[name], scheme, 1200)
    assert len(seen["plots"]) == {"report": 8, "comparison": 2}[name]
    for plot in seen["plots"]:
        assert plot["width"] > 300, plot["title"]
        assert plot["height"] > 80, plot["title"]
        assert plot["marks"] > 5, plot["title"]
        assert all(contrast(ink, seen["paper"]) >= 4.5 for ink in plot["inks"]), plot
    assert (contrast(seen["paper"], "rgb(255, 255, 255)") > 10) == (scheme == "dark")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_console_is_empty_and_nothing_is_fetched(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, name: str, scheme: str
) -> None:
    picture = tmp_path / "page.png"
    look = (f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--window-size=1200,3000")
    _, console = browser.run(pages[name], *look, f"--screenshot={picture}")
    assert console == []
    assert picture.stat().st_size > 50_000


def test_a_page_that_fetches_or_runs_something_would_be_noticed(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    text = pages["report"].read_text(encoding="utf-8")
    for number, fault in enumerate(("<script>document.title = 'run'</script>", '<img src="picture.png" alt="">')):
        page = tmp_path / f"{number}.html"
        page.write_text(text.replace("</body>", f"{fault}</body>"), encoding="utf-8")
        dumped, console = browser.run(page, "--dump-dom")
        assert any("Content Security Policy" in line for line in console)
        assert "<title>run</title>" not in dumped


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_narrow_window_scrolls_its_tables_and_not_the_page(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    assert browser.look(pages[name], "light", 400)["over"] <= 0


def test_markup_in_an_answer_is_not_run(browser: Browser, pages: dict[str, Path]) -> None:
    assert browser.look(pages["report"], "light", 1200)["title"] != "run"


def test_what_is_folded_on_the_screen_is_printed(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    text = pages["report"].read_text(encoding="utf-8")
    folded = tmp_path / "folded.html"
    folded.write_text(re.sub(r"details::details-content \{[^}]*\}", "", text), encoding="utf-8")
    assert sheets(browser, pages["report"], tmp_path) > sheets(browser, folded, tmp_path)


def sheets(browser: Browser, page: Path, folder: Path) -> int:
    """How many pages of paper it takes."""
    printed = folder / f"{page.stem}.pdf"
    browser.run(page, f"--print-to-pdf={printed}")
    return len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes()))
