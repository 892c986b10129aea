import time
from datetime import UTC, datetime
from io import BytesIO

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

from lib import attacks, data, evaluation, explorer, models, robustness

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def side(drawn):
    index = data.index_images(drawn)
    table = index.assign(split="test", split_by="case", fold=0)
    pixels, table = data.load_pixels(table, 32)
    return data.Images(table, pixels).side("test")


@pytest.fixture(scope="module")
def networks():
    return {"baseline": models.build("none", seed=0), "adversarial_training": models.build("none", seed=1)}


@pytest.fixture
def shown(networks, side):
    return explorer.Explorer(networks, side, background=False)


def test_the_curve_is_what_the_attack_gives():
    model, image, label = models.build("none"), torch.rand(1, 3, 32, 32), torch.tensor([1])
    epsilons = [0, 4 / 255, 8 / 255]
    curve = explorer.epsilon_curve(model, image, label, epsilons)
    expected = [models.p_malignant(model, batch)[0] for batch in attacks.fgsm(model, image, label, epsilons)]
    assert [p for _, p in curve] == pytest.approx(expected, abs=1e-5)


def test_the_figure_has_a_curve_for_each_model():
    curves = {name: [(0, 0.2), (4 / 255, 0.9)] for name in ("baseline", "adversarial_training")}
    left, right = explorer.epsilon_figure(torch.rand(1, 3, 8, 8), curves, 4 / 255).axes
    assert left.get_title() == "under FGSM at 4/255 on baseline"
    assert [line.get_label() for line in right.lines[:3:2]] == [
        "baseline: malignant",
        "adversarial training: malignant",
    ]


@pytest.mark.parametrize("attack", explorer.SHOWN)
def test_what_is_shown_is_what_the_table_says(networks, side, attack):
    """One image alone and in a batch may differ in the last bits; the decision and the image may not."""
    answers = explorer.Answers(networks["baseline"], "baseline", side, 3, attack, pgd_steps=3, seed=5)
    stops = [0, 8, 32]
    answers.answer(stops)
    chosen = [explorer.STOPS[k] for k in stops]
    images, labels = side.tensors()
    made = robustness.perturb(networks["baseline"], images[[3]], labels[[3]], attack, chosen, 3, 5)
    for k, epsilon, image in zip(stops, chosen, made, strict=True):
        assert torch.equal(answers.images[k], image)
        row = answers.rows[k]
        margin = evaluation.predict(networks["baseline"], torch.cat([image, images]))[0]
        assert row["margin"] == pytest.approx(margin, rel=1e-5) and (row["margin"] > 0) == (margin > 0)
        assert row["linf"] <= epsilon + 1e-6 and row["epsilon"] == epsilon
    assert answers.rows[0]["linf"] == 0 and answers.rows[0]["ssim"] == 1


def test_the_smallest_epsilon_is_the_first_stop_with_another_decision(networks, side):
    answers = explorer.Answers(networks["baseline"], "baseline", side, 0, "fgsm")
    answers.rows = {k: {"margin": 1.0 if k < 5 else -1.0} for k in (0, 3, 5, 9)}
    assert answers.flips_at() == explorer.STOPS[5]
    answers.rows = {k: {"margin": 1.0} for k in range(33)}
    assert answers.flips_at() is None
    assert explorer.Answers(networks["baseline"], "baseline", side, 0, "fgsm").missing(near=10)[:3] == [
        0,
        10,
        9,
    ]


def test_before_anything_is_moved_only_what_is_shown_is_computed(shown):
    (answers,) = shown.known.values()
    assert set(answers.rows) == {0, 8}
    shown.epsilon.value = 16
    assert answers.missing() == []
    assert "turned" in shown.words.value or "benign" in shown.words.value or "malignant" in shown.words.value


def test_turning_epsilon_changes_picture_words_and_curve(shown, side):
    before = shown.pictures.value, shown.words.value, shown.curve.value
    shown.epsilon.value = 32
    assert all(
        new != old
        for new, old in zip((shown.pictures.value, shown.words.value, shown.curve.value), before, strict=True)
    )
    assert shown.typed.value == "16" and "16/255" in shown.words.value
    (answers,) = shown.known.values()
    panels = np.asarray(Image.open(BytesIO(shown.pictures.value)))
    size = 7 * 32
    assert panels.shape == (size, 3 * size + 2 * explorer.GAP, 4)
    last = answers.images[32][0].permute(1, 2, 0).numpy()
    assert np.array_equal(panels[::7, -size::7, :3], (last * 255).round().astype(np.uint8))
    assert f"{answers.rows[32]['p_malignant']:.2f}" in shown.words.value
    shown.epsilon.value = 8
    assert shown.pictures.value == before[0]
    assert not any(isinstance(each, ipywidgets.Output) for each in shown.view.children)


def test_all_models_stand_side_by_side(shown):
    shown.compare.value = True
    assert "adversarial training" in shown.words.value and "baseline" in shown.words.value
    assert np.asarray(Image.open(BytesIO(shown.pictures.value))).shape[1] == 4 * 224 + 3 * explorer.GAP
    assert shown.curve.value.count("<polyline") == 2 and "adversarial training" in shown.curve.value


def test_images_are_filtered_and_browsed(shown, side, networks):
    count = len(side)
    assert len(shown.image.options) == count
    shown.filter.value = "benign"
    chosen = [position for _, position in shown.image.options]
    assert chosen == np.flatnonzero(side.labels == 0).tolist() and shown.image.value == chosen[0]
    shown.after.click()
    assert shown.image.value == chosen[1]
    shown.before.click()
    shown.before.click()
    assert shown.image.value == chosen[-1]
    assert side.table["image"].iloc[chosen[-1]] in shown.caption.value
    shown.filter.value = "right"
    margins = evaluation.predict(networks["baseline"], side.tensors()[0])
    right = (margins > 0) == (side.labels == 1)
    assert [position for _, position in shown.image.options] == np.flatnonzero(right).tolist()
    shown.model.value = "adversarial_training"
    margins = evaluation.predict(networks["adversarial_training"], side.tensors()[0])
    right = (margins > 0) == (side.labels == 1)
    assert [position for _, position in shown.image.options] == np.flatnonzero(right).tolist()
    shown.filter.value, shown.case.value = "all", side.table["case"].iloc[5]
    assert [position for _, position in shown.image.options] == np.flatnonzero(
        side.table["case"] == shown.case.value
    ).tolist()
    shown.filter.value = "benign" if side.labels[5] else "malignant"
    assert "No image is left" in shown.message.value


@pytest.mark.parametrize(
    ("typed", "words"),
    [("four", "not a number"), ("17", "out of range"), ("-1", "out of range"), ("nan", "out of range")],
)
def test_what_cannot_be_an_epsilon_is_told_in_words(shown, typed, words):
    before = shown.epsilon.value
    shown.typed.value = typed
    assert words in shown.message.value and shown.epsilon.value == before
    shown.typed.value = "2.5"
    assert shown.epsilon.value == 5 and shown.message.value == ""


def test_an_error_is_told_in_words(shown, networks):
    shown.known.clear()
    broken = torch.nn.Linear(2, 2)
    shown.networks = {"baseline": broken, "adversarial_training": broken}
    shown.epsilon.value = 3
    assert "This did not work: " in shown.message.value
    assert "<" not in shown.message.value.split("work: ")[1]


def test_in_the_background_the_shown_stop_comes_first_and_all_follow(networks, side):
    view = explorer.Explorer(networks, side)
    view.epsilon.value = 20
    deadline = time.monotonic() + 60
    while view.thread is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    (answers,) = view.known.values()
    assert list(answers.rows)[:3] == [0, 8, 20] and answers.missing() == []
    assert "Computing" not in view.words.value and "10/255" in view.words.value


def png(mode="RGB", size=(120, 90), color=(200, 120, 160)):
    drawn = BytesIO()
    Image.new(mode, size, color if mode == "RGB" else 7).save(drawn, "png")
    return drawn.getvalue()


def test_own_images_of_a_folder_are_cropped_and_answered(networks, tmp_path):
    wide = np.zeros((92, 240, 3), np.uint8)
    wide[:, 50:190] = 200  # the central part of the shape of a field of view
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "notes.txt").write_text("no image")
    own = explorer.own_images(tmp_path, networks["baseline"], 32)
    assert own.table["image"].tolist() == ["wide.png"] and (own.pixels[:, :, 3:-3] == 200).all()
    assert own.pixels.shape == (1, 32, data.field_width(32), 3)
    margin = evaluation.predict(networks["baseline"], own.tensors()[0])[0]
    assert own.table["label"].iloc[0] == ("malignant" if margin > 0 else "benign")
    view = explorer.Explorer({"mine": networks["baseline"]}, own, background=False)
    assert "an image of your own" in view.caption.value and "mine" in view.words.value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no image", "bad.png is not a readable image"),
        (png("L"), "bad.png is not an RGB image"),
        (png(size=(40, 90)), "bad.png is 40 x 90 pixels: at least 49 x 32"),
        (png()[:200], "bad.png is not a readable image"),
    ],
)
def test_what_is_no_image_is_told_in_words(shown, networks, content, words):
    with pytest.raises(ValueError, match=words):
        explorer.own_images({"bad.png": content}, networks["baseline"], 32)
    before = shown.caption.value
    shown.upload.value = [
        {"name": "bad.png", "type": "image/png", "size": 1, "content": content, "last_modified": NOW}
    ]
    assert words in shown.message.value and shown.caption.value == before


def test_an_upload_is_browsed_instead(shown):
    files = [("a.png", (200, 120, 160)), ("b.png", (90, 60, 120))]
    shown.upload.value = [
        {"name": name, "type": "image/png", "size": 1, "content": png(color=color), "last_modified": NOW}
        for name, color in files
    ]
    assert [name.split(": ")[1] for name, _ in shown.image.options] == ["a.png", "b.png"]
    assert "a.png" in shown.caption.value and shown.message.value == ""
    shown.after.click()
    assert "b.png" in shown.caption.value


def test_a_folder_without_images_says_what_is_read(networks, tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        explorer.own_images(tmp_path, networks["baseline"], 32)
