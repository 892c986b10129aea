"""The explorer in JupyterLab, as a person meets it: a real server, a real kernel, a real browser that drags and types."""

import io
import os
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import papermill
import pytest
from PIL import Image

from lib import data, explorer, models, profiles, study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 240_000  # milliseconds; a kernel imports torch on a busy machine


@pytest.fixture(scope="module")
def lab(smoke, tmp_path_factory):
    """The address of a JupyterLab on notebook 03, prepared for the smoke study."""
    if not CHROMIUM:
        pytest.skip(
            "no Chromium: install it (Debian: apt-get install chromium) to test the explorer in JupyterLab"
        )
    folder = tmp_path_factory.mktemp("lab")
    notebook = study.NOTEBOOKS / "03_fgsm_attack.ipynb"
    own = profiles.declared_in(notebook)
    (folder / "notebooks").mkdir()
    papermill.execute_notebook(
        notebook,
        folder / "notebooks" / "03.ipynb",
        {name: value for name, value in profiles.load("smoke").items() if name in own},
        prepare_only=True,
        progress_bar=False,
    )
    places = {
        name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    }
    # A copy: the notebook writes its predictions and figures anew.
    shutil.copytree(smoke[0] / "runs", folder / "home" / "runs")
    environment = os.environ | places | {"STUDY_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    command += [
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder / 'notebooks'}",
        "--LabApp.news_url=None",
    ]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        address, deadline = None, time.monotonic() + 120
        while address is None and time.monotonic() < deadline:
            found = [line for line in (folder / "lab.log").read_text().split() if line.startswith("http://")]
            address = found[0].split("/lab")[0] if found else None
            time.sleep(0.2)
        assert address, (folder / "lab.log").read_text()
        urllib.request.urlopen(f"{address}/api").read()
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(lab):
    """Notebook 03 in the browser, all cells run; what the console said as errors in `page.said`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.said = []
        page.on("console", lambda said: page.said.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto(f"{lab}/lab/tree/03.ipynb")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_selector(".widget-slider .noUi-handle")
        yield page
        browser.close()


def words(page):
    return page.locator("div[role=status] table").inner_text()


def shown(page):
    """The picture on the screen, as an array."""
    source = page.locator(".widget-image").get_attribute("src")
    content = page.evaluate(
        "async source => Array.from(new Uint8Array(await (await fetch(source)).arrayBuffer()))", source
    )
    return np.asarray(Image.open(io.BytesIO(bytes(content))))


def drag(page, share):
    """Drag the handle to a share of the slider, and wait for the words to follow."""
    before = words(page)
    handle = page.locator(".widget-slider .noUi-handle")
    handle.scroll_into_view_if_needed()
    at, line = handle.bounding_box(), page.locator(".widget-slider .noUi-base").bounding_box()
    y = at["y"] + at["height"] / 2
    page.mouse.move(at["x"] + at["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(line["x"] + share * line["width"], y, steps=4)
    page.mouse.up()
    page.wait_for_function(
        "before => document.querySelector('div[role=status] table').innerText !== before", arg=before
    )


def test_the_slider_turns_the_picture_and_the_words(page, smoke):
    drag(page, 0.5)
    first = shown(page)
    drag(page, 1.0)
    said, last = words(page), shown(page)
    assert "16/255" in said and not np.array_equal(first, last)
    assert np.array_equal(first[:, : first.shape[0]], last[:, : last.shape[0]]), "the original stays"
    folder = smoke[0] / "runs" / "smoke"
    side = data.open_images(folder / "split.csv", 32, [100], "case").side("test")
    name = page.locator(".jp-OutputArea b", has_text="SOB_").last.inner_text()
    position = side.table.index[side.table["image"] == name][0]
    network = models.load(folder / "models" / "baseline.safetensors")
    answers = explorer.Answers(network, "baseline", side, position, "fgsm")
    answers.answer([0, len(explorer.STOPS) - 1])
    row = answers.rows[len(explorer.STOPS) - 1]
    assert f"{row['p_malignant']:.2f}" in said and f"{row['ssim']:.3f}" in said
    adversarial = answers.images[len(explorer.STOPS) - 1][0].permute(1, 2, 0).numpy()
    on_screen = last[:: last.shape[0] // 32, -last.shape[0] :: last.shape[0] // 32, :3]
    assert np.array_equal(on_screen, (adversarial * 255).round().astype(np.uint8))


def test_an_epsilon_can_be_typed_and_words_are_refused(page):
    typed = page.get_by_label("in 255ths")
    typed.fill("2.5")
    typed.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('div[role=status] table').innerText.includes('2.5/255')"
    )
    typed.fill("four")
    typed.press("Enter")
    page.get_by_text("is not a number: type gray levels").wait_for()
    assert "2.5/255" in words(page)


def test_it_goes_by_keyboard(page):
    page.locator(".widget-slider .noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "() => document.querySelector('div[role=status] table').innerText.includes('3/255')"
    )


def test_the_next_image_comes_with_a_button(page):
    before = page.locator(".jp-OutputArea b", has_text="SOB_").last.inner_text()
    page.get_by_title("next image").click()
    page.wait_for_function(
        "before => ![...document.querySelectorAll('.jp-OutputArea b')].some(each => each.innerText === before)",
        arg=before,
    )


def test_nothing_is_said_on_the_console(page):
    assert page.said == []
    assert (
        page.locator(
            ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']", has_text="Error"
        ).count()
        == 0
    )
