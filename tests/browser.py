"""A notebook in JupyterLab in a real browser, for the tests and for the measurement of the explorer's latency."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 240_000  # milliseconds; a kernel imports torch on a busy machine
HANDLE = ".widget-slider .noUi-handle"


@contextlib.contextmanager
def opened(notebook, home):
    """A Playwright page on the notebook in JupyterLab, all cells run and a slider there; `page.said` holds the console's errors.

    notebook: a path; home: STUDY_HOME of its kernel. Needs `CHROMIUM`.
    """
    from playwright.sync_api import sync_playwright

    notebook = Path(notebook)
    with _server(notebook.parent, home) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.said = []
        page.on("console", lambda said: page.said.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto(f"{address}/lab/tree/{notebook.name}")
        # While its kernel starts, a notebook takes no notice of a click.
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext")
        page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.ready; }")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_selector(HANDLE, state="attached")  # far down, it may not be drawn yet
        yield page
        browser.close()


@contextlib.contextmanager
def _server(folder, home):
    """The address of a JupyterLab on a folder, without the settings of whoever runs it."""
    places = ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR")
    own = {name: str(folder.parent / name.lower()) for name in places}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    command += [
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.news_url=None",
        "--LabApp.expose_app_in_browser=True",
    ]
    said = folder.parent / "lab.log"
    with open(said, "w") as log:
        environment = os.environ | own | {"STUDY_HOME": str(home)}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 120
        while not (found := [word for word in said.read_text().split() if word.startswith("http://")]):
            assert server.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.2)
        yield found[0].split("/lab")[0]
    finally:
        server.terminate()
        server.wait(30)


def drag(page, share):
    """Drag the slider's handle to a share of its length."""
    handle = page.locator(HANDLE)
    at, line = handle.bounding_box(), page.locator(".widget-slider .noUi-base").bounding_box()
    y = at["y"] + at["height"] / 2
    page.mouse.move(at["x"] + at["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(line["x"] + share * line["width"], y, steps=4)
    page.mouse.up()
