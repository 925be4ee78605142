"""Draw docs/ui-results.png and docs/ui-run.png: the MLflow UI in Chromium, on a running server.

make ui                                                    # in another terminal
python docs/draw_ui_pictures.py http://127.0.0.1:5000 --run-id RUN_ID
"""

import shutil
from pathlib import Path

import click
from playwright.sync_api import sync_playwright

from har.tracking.ui import VIEW

DOCS = Path(__file__).parent
# The page goes on asking the server, so there is no end to wait for.
SETTLE_MS = 4000


@click.command()
@click.argument("address")
@click.option("--experiment-id", default="1", show_default=True)
@click.option("--run-id", required=True, help="Whose page to draw.")
def main(address: str, experiment_id: str, run_id: str) -> None:
    """Draw both pictures."""
    runs = f"/#/experiments/{experiment_id}/runs"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1500, "height": 720}, base_url=address)
        page.goto(f"{runs}?viewStateShareKey={VIEW}")
        page.get_by_text("top_3_accuracy").wait_for()
        page.get_by_role("button", name="Toggle sidebar").click()
        page.get_by_role("button", name="Close").last.click()
        page.wait_for_timeout(SETTLE_MS)
        page.screenshot(path=DOCS / "ui-results.png")
        page.set_viewport_size({"width": 1500, "height": 1100})
        page.goto(f"{runs}/{run_id}")
        page.get_by_text("Description").wait_for()
        page.wait_for_timeout(SETTLE_MS)
        if page.get_by_text("Show more").count():
            page.get_by_text("Show more").first.click()
        page.wait_for_timeout(SETTLE_MS)
        page.screenshot(path=DOCS / "ui-run.png")
        browser.close()


if __name__ == "__main__":
    main()
