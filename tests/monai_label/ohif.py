"""OHIF in a headless Chromium, with a DICOM SEG over its scan."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

CHROMIUM = shutil.which("chromium")
MISSING = CHROMIUM is None or importlib.util.find_spec("playwright") is None
WITHOUT_GPU = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def open_segmentation(server: str, study: str, description: str, picture: Path) -> list[str]:
    """Open a study with one of its DICOM SEGs in MONAI Label's OHIF, in three planes, and take a picture.

    Args:
        server: address of MONAI Label.
        study: StudyInstanceUID.
        description: the segmentation's SeriesDescription.
        picture: PNG to write.

    Returns:
        The names in the list of segments.
    """
    from playwright.sync_api import sync_playwright  # only here: it is in no set of requirements

    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=WITHOUT_GPU)
        page = browser.new_page(viewport={"width": 1280, "height": 560})
        page.set_default_timeout(120_000)
        page.goto(f"{server}/ohif/segmentation?StudyInstanceUIDs={study}")
        page.get_by_text("Confirm and Hide").click()
        page.locator("[data-cy=study-browser-thumbnail-no-image]").filter(has_text=description).dblclick()
        page.get_by_text("Yes", exact=True).click()
        page.get_by_text("Add Segment").wait_for()
        page.locator("[data-cy=Layout]").click()
        page.get_by_text("MPR", exact=True).click()
        page.locator("[data-cy=viewport-pane]").nth(2).wait_for()
        page.wait_for_timeout(10_000)  # nothing tells that the last pixels are drawn
        page.screenshot(path=picture)
        names = page.locator("[data-cy=data-row]").all_inner_texts()
        browser.close()
    return [name.split("\n")[-1] for name in names]
