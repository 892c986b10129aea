"""A notebook in a real browser, in JupyterLab or by Voilà, for the tests and the measurement of the explorer's latency."""

import atexit
import contextlib
import functools
import os
import shutil
import socket
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
    notebook = Path(notebook)
    lab = ["jupyterlab", "--allow-root", "--ServerApp.port=0", "--IdentityProvider.token="]
    lab += [f"--ServerApp.root_dir={notebook.parent}", "--LabApp.news_url=None"]
    lab += ["--LabApp.expose_app_in_browser=True"]
    with _server(lab, notebook.parent, home) as address, _page() as page:
        page.goto(f"{address.split('/lab')[0]}/lab/tree/{notebook.name}")
        # While its kernel starts, a notebook takes no notice of a click.
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext")
        page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.ready; }")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_selector(HANDLE, state="attached")  # far down, it may not be drawn yet
        yield page


@contextlib.contextmanager
def demo(notebook, home):
    """The same of the notebook as one page by Voilà."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    notebook = Path(notebook)
    voila = ["voila", str(notebook), f"--port={port}", "--Voila.tornado_settings=allow_remote_access="]
    with _server(voila, notebook.parent, home) as address, _page() as page:
        page.goto(address)
        page.wait_for_selector(HANDLE)
        yield page


@functools.cache
def _playwright():
    """One for the process: a second one cannot be started while the first lives."""
    from playwright.sync_api import sync_playwright

    started = sync_playwright().start()
    atexit.register(started.stop)
    return started


@contextlib.contextmanager
def _page():
    browser = _playwright().chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.said = []
    page.on("console", lambda said: page.said.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: page.said.append(str(error)))
    yield page
    browser.close()


@contextlib.contextmanager
def _server(arguments, folder, home):
    """The address of `python -m arguments` on a folder, without the settings of whoever runs it."""
    places = ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR")
    own = {name: str(folder.parent / name.lower()) for name in places}
    command = [sys.executable, "-m", *arguments, "--no-browser"]
    said = folder.parent / "server.log"
    with open(said, "w") as log:
        environment = os.environ | own | {"STUDY_HOME": str(home), "PYTHONUNBUFFERED": "1"}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 120
        while not (found := [word for word in said.read_text().split() if word.startswith("http://")]):
            assert server.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.2)
        yield found[0]
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
