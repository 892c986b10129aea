"""The explorer in JupyterLab and by Voilà, as a person meets it: real server, kernel and browser, which drags and types."""

import io
import shutil

import numpy as np
import papermill
import pytest
from browser import CHROMIUM, HANDLE, demo, drag, opened
from PIL import Image

from lib import loading, models, profiles, study
from lib.answers import Answers

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium (Debian: apt-get install chromium), so no page was opened"
)


@pytest.fixture(scope="module")
def page(smoke, tmp_path_factory):
    """Notebook 03, prepared for the smoke study, in the browser; all its cells have run."""
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
    # A copy: the notebook writes its predictions and figures anew.
    shutil.copytree(smoke[0] / "runs", folder / "home" / "runs")
    with opened(folder / "notebooks" / "03.ipynb", folder / "home") as page:
        page.locator(HANDLE).scroll_into_view_if_needed()
        yield page


def words(page):
    return page.locator("div[role=status] table").inner_text()


def name_of_image(page):
    return page.locator(".jp-OutputArea b", has_text="SOB_").last.inner_text()


def shown(page):
    """The picture on the screen, as an array."""
    source = page.locator(".widget-image").get_attribute("src")
    content = page.evaluate(
        "async source => Array.from(new Uint8Array(await (await fetch(source)).arrayBuffer()))", source
    )
    return np.asarray(Image.open(io.BytesIO(bytes(content))))


def wait_for_epsilon(page, expected):
    """Wait until this epsilon is answered: its column has a value. Words change again while more answers come in from behind."""
    page.wait_for_function(
        "expected => document.querySelectorAll('div[role=status] th')[2]?.innerText === expected"
        " && document.querySelector('div[role=status] td')",
        arg=expected,
    )


def test_the_slider_turns_the_picture_and_the_words(page, smoke):
    drag(page, 0.5)
    wait_for_epsilon(page, "8/255")
    first = shown(page)
    drag(page, 1.0)
    wait_for_epsilon(page, "16/255")
    said, last = words(page), shown(page)
    assert not np.array_equal(first, last)
    assert np.array_equal(first[:, : first.shape[0]], last[:, : last.shape[0]]), "the original stays"
    folder = smoke[0] / "runs" / "smoke"
    side = loading.open_images(folder / "split.csv", 32, [100], "case").side("test")
    position = side.table.index[side.table["image"] == name_of_image(page)][0]
    network = models.load(folder / "models" / "baseline.safetensors")
    answers = Answers(network, "baseline", side, position, "fgsm")
    answers.answer([0, 32])
    row = answers.rows[32]
    assert f"{row['p_malignant']:.2f}" in said and f"{row['ssim']:.3f}" in said
    adversarial = answers.images[32][0].permute(1, 2, 0).numpy()
    on_screen = last[:: last.shape[0] // 32, -last.shape[0] :: last.shape[0] // 32, :3]
    assert np.array_equal(on_screen, (adversarial * 255).round().astype(np.uint8))


def test_an_epsilon_can_be_typed_and_words_are_refused(page):
    typed = page.get_by_label("in 255ths")
    typed.fill("2.5")
    typed.press("Enter")
    wait_for_epsilon(page, "2.5/255")
    typed.fill("four")
    typed.press("Enter")
    page.get_by_text("is not a number: type one from 0 to 16").wait_for()
    assert "2.5/255" in words(page)


def test_it_goes_by_keyboard(page):
    page.locator(HANDLE).focus()
    page.keyboard.press("ArrowRight")
    wait_for_epsilon(page, "3/255")
    assert page.get_by_label("in 255ths").input_value() == "3"


def test_the_next_image_comes_with_a_button(page):
    before, picture = name_of_image(page), shown(page)
    page.get_by_text("next ▶").click()
    page.wait_for_function(
        "before => ![...document.querySelectorAll('.jp-OutputArea b')].some(each => each.innerText === before)",
        arg=before,
    )
    assert name_of_image(page) != before and not np.array_equal(shown(page), picture)


def test_a_thumbnail_is_chosen_with_a_click(page):
    before = shown(page)
    third = page.locator("[class*='explorer-'][class*='-2']").first
    name = third.get_attribute("title").split(": ")[1]
    assert name != name_of_image(page)
    third.click()
    page.get_by_text(f"{name}, case").wait_for()
    assert name_of_image(page) == name and not np.array_equal(shown(page), before)


def test_sigma_is_turned_where_noise_is_chosen(page):
    page.get_by_label("attack").select_option("Gaussian noise")
    wait_for_epsilon(page, "sigma 0.06")  # the slider stays where it stood, at 3/255
    drag(page, 0.5)
    wait_for_epsilon(page, "sigma 0.16")
    assert page.get_by_label("of the range 0 to 1").input_value() == "0.16"
    page.get_by_label("attack").select_option("FGSM")
    wait_for_epsilon(page, "8/255")


def test_nothing_is_said_on_the_console(page):
    assert page.said == []
    assert (
        page.locator(
            ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']", has_text="Error"
        ).count()
        == 0
    )


def test_voila_shows_the_welcome_page_with_all_models_and_no_code(smoke, tmp_path):
    (tmp_path / "notebooks").mkdir()
    notebook = shutil.copy(study.NOTEBOOKS / "00_welcome.ipynb", tmp_path / "notebooks")
    with demo(notebook, smoke[0]) as page:
        drag(page, 1.0)
        wait_for_epsilon(page, "16/255")
        rows = page.locator("div[role=status] tr")  # the head, the baseline, the defenses as they answer
        rows.nth(1 + len(profiles.DEFENSES)).wait_for()
        said = words(page)
        assert all(name in said for name in ("baseline", "Gaussian noise", "adversarial training"))
        page.get_by_label("saliency").select_option("Grad-CAM")
        page.get_by_text("Below: Grad-CAM").wait_for()
        assert page.get_by_text("explorer.view_of").count() == 0
        # Voilà's page itself asks the network for fonts and formulas.
        assert [said for said in page.said if "Failed to load resource" not in said] == []
