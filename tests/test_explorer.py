import ipywidgets
import pytest
import torch

from lib import attacks, explorer, models


@pytest.fixture(scope="module")
def shown():
    return models.build("none"), torch.rand(1, 3, 32, 32), torch.tensor([1])


def test_the_curve_is_what_the_attack_gives(shown):
    model, image, label = shown
    epsilons = [0, 4 / 255, 8 / 255]
    curve = explorer.epsilon_curve(model, image, label, epsilons)
    expected = [models.p_malignant(model, batch)[0] for batch in attacks.fgsm(model, image, label, epsilons)]
    assert [p for _, p in curve] == pytest.approx(expected, abs=1e-5)


def test_moving_the_slider_redraws_and_uses_no_output_widget(shown):
    box = explorer.epsilon_slider(*shown)
    slider, picture, message = box.children
    before = picture.value
    slider.value = len(slider.options) - 1
    assert picture.value != before and picture.value[:4] == b"\x89PNG" and message.value == ""
    slider.value = 0
    assert picture.value == before
    assert slider.options[-1][0] == "16/255"
    assert not any(isinstance(child, ipywidgets.Output) for child in box.children)
