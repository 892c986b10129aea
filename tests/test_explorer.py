import gc
import time
import weakref
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from io import BytesIO
from types import SimpleNamespace

import ipywidgets
import numpy as np
import pytest
import torch
from ipywidgets.widgets import widget
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from scipy.special import expit

from lib import (
    data,
    decoding,
    evaluation,
    explorer,
    loading,
    models,
    pictures,
    profiles,
    robustness,
    runs,
    saliency,
    training,
)
from lib.answers import SHOWN, UNKNOWN, Answers

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def side(drawn):
    index = data.index_images(drawn)
    table = index.assign(split="test", split_by="case", fold=0)
    pixels, table = loading.load_pixels(table, 32)
    return loading.Images(table, pixels).side("test")


@pytest.fixture(scope="module")
def networks():
    return {"baseline": models.build("none", seed=0), "adversarial_training": models.build("none", seed=1)}


@pytest.fixture
def shown(networks, side):
    return explorer.Explorer(networks, side, background=False)


@pytest.fixture
def alone(networks, side):
    return explorer.Explorer({"baseline": networks["baseline"]}, side, background=False)


@pytest.mark.parametrize(
    ("attack", "at", "on"), [("fgsm", "8/255", " on baseline"), ("gaussian_noise", "sigma 0.16", "")]
)
def test_the_still_figure_has_the_explorers_curves(networks, side, attack, at, on):
    left, right = explorer.still_figure(networks, side, 3, attack).axes
    assert left.get_title() == f"{SHOWN[attack]} at {at}{on}"
    for line, point, (name, network) in zip(
        right.lines[:4:2], right.lines[1:4:2], networks.items(), strict=True
    ):
        answers = Answers(network, name, side, 3, attack)
        answers.answer([16])
        said = expit(evaluation.predict(network, answers.images[16])[0])
        where = answers.axis.stops[16] * answers.axis.unit
        assert point.get_xydata()[0] == pytest.approx([where, said], abs=1e-4)
        assert len(line.get_xdata()) == len(answers.axis.stops)
        word = "malignant" if said > 0.5 else "benign"
        assert line.get_label() == f"{name.replace('_', ' ')}: {word}"


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "random_noise"])
def test_what_is_shown_is_what_the_table_says(networks, side, attack):
    """One image alone and in a batch may differ in the last bits; the decision and the image may not."""
    answers = Answers(networks["baseline"], "baseline", side, 3, attack, pgd_steps=3, seed=5)
    stops = [0, 8, 32]
    answers.answer(stops)
    chosen = [pictures.EPSILON.stops[k] for k in stops]
    images, labels = side.tensors()
    made = robustness.perturb(networks["baseline"], images[[3]], labels[[3]], attack, chosen, 3, 5)
    for k, epsilon, image in zip(stops, chosen, made, strict=True):
        assert torch.equal(answers.images[k], image)
        row = answers.rows[k]
        margin = evaluation.predict(networks["baseline"], torch.cat([image, images]))[0]
        assert row["margin"] == pytest.approx(margin, rel=1e-3) and (row["margin"] > 0) == (margin > 0)
        assert row["linf"] <= epsilon + 1e-6 and row["epsilon"] == epsilon
    assert answers.rows[0]["linf"] == 0 and answers.rows[0]["ssim"] == 1


def test_noise_is_what_the_defense_is_trained_on(networks, side):
    answers = Answers(networks["baseline"], "baseline", side, 2, "gaussian_noise", seed=7)
    answers.answer([0, 10])
    noise = training.add_gaussian_noise(0.1)
    images, _ = side.tensors()
    expected = noise(None, images[[2]], None, torch.Generator().manual_seed(7))
    assert torch.equal(answers.images[10], expected) and torch.equal(answers.images[0], images[[2]])
    assert answers.rows[10]["p_malignant"] == pytest.approx(
        expit(evaluation.predict(networks["baseline"], expected)[0]), abs=1e-4
    )


@pytest.mark.parametrize("method", saliency.METHODS)
def test_the_map_is_that_of_the_image_shown(networks, side, method):
    answers = Answers(networks["baseline"], "baseline", side, 0, "fgsm")
    answers.answer([0, 4])
    assert answers.has(4) and not answers.has(4, method) and 4 in answers.missing(method=method)
    answers.answer([0, 4], method)
    assert answers.has(4, method)
    expected = saliency.METHODS[method](networks["baseline"], answers.images[4])[0].numpy()
    assert np.allclose(answers.maps[method, 4], expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(answers.maps[method, 4], answers.maps[method, 0])


def test_the_smallest_epsilon_is_the_first_stop_with_another_decision(networks, side):
    answers = Answers(networks["baseline"], "baseline", side, 0, "fgsm")
    answers.rows = {k: {"margin": 1.0 if k < 5 else -1.0} for k in (0, 1, 2, 4, 5, 9)}
    assert answers.turns_at() is None, "it may turn at 3"
    answers.rows[3] = {"margin": 1.0}
    assert answers.turns_at() == 5
    answers.rows = {k: {"margin": 1.0} for k in range(33)}
    assert answers.turns_at() is None
    fresh = Answers(networks["baseline"], "baseline", side, 0, "fgsm")
    assert fresh.missing(near=10)[:3] == [0, 10, 9]


def test_before_anything_is_moved_only_what_is_shown_is_computed(shown):
    assert [set(answers.rows) for answers in shown.known.values()] == [{0, 8}, {0, 8}]
    shown.epsilon.value = 8
    assert all(answers.missing() == [] for answers in shown.known.values())
    assert "turned" in shown.words.value or "benign" in shown.words.value or "malignant" in shown.words.value


def test_turning_epsilon_changes_picture_words_and_curve(alone):
    before = alone.pictures.value, alone.words.value, alone.curve.value
    alone.epsilon.value = 16
    after = alone.pictures.value, alone.words.value, alone.curve.value
    assert all(new != old for new, old in zip(after, before, strict=True))
    assert alone.typed.value == "16" and "16/255" in alone.words.value
    (answers,) = alone.known.values()
    panels = np.asarray(Image.open(BytesIO(alone.pictures.value)))
    size = 7 * 32
    assert panels.shape == (size, 3 * size + 2 * pictures.GAP, 4)
    last = answers.images[32][0].permute(1, 2, 0).numpy()
    assert np.array_equal(panels[::7, -size::7, :3], (last * 255).round().astype(np.uint8))
    assert f"{answers.rows[32]['p_malignant']:.2f}" in alone.words.value
    alone.epsilon.value = 4
    assert alone.pictures.value == before[0]
    assert not any(isinstance(each, ipywidgets.Output) for each in alone.view.children)


def test_all_models_stand_side_by_side_where_there_are_several(shown, alone):
    assert shown.compare.value and not alone.compare.value and alone.compare.disabled
    assert "adversarial training" in shown.words.value and "baseline" in shown.words.value
    assert np.asarray(Image.open(BytesIO(shown.pictures.value))).shape[1] == 4 * 224 + 3 * pictures.GAP
    assert shown.curve.value.count("<polyline") == 2 and "adversarial training" in shown.curve.value
    shown.compare.value = False
    assert shown.curve.value.count("<polyline") == 1


def test_noise_turns_sigma_and_epsilon_comes_back(shown):
    shown.attack.value = "gaussian_noise"
    assert (shown.epsilon.description, shown.epsilon.max, shown.stop) == ("sigma", 0.32, 8)
    assert "sigma 0.08" in shown.words.value and shown.typed.value == "0.08"
    assert "sigma of the noise" in shown.curve.value and "noisy" not in shown.caption.value
    before = shown.pictures.value
    shown.seed.value = 5
    assert shown.pictures.value != before, "another noise"
    shown.typed.value = "0.1"
    assert shown.stop == 10 and "sigma 0.10" in shown.words.value
    shown.attack.value = "fgsm"
    assert (shown.epsilon.description, shown.epsilon.max, shown.stop) == ("epsilon", 16, 10)
    assert "5/255" in shown.words.value and shown.seed.disabled


def test_what_a_defense_was_trained_at_is_marked_on_its_own_axis(networks, side):
    view = explorer.Explorer(
        networks, side, attack="gaussian_noise", trained_at=0.1, pgd_steps=2, background=False
    )
    assert "trained at" in view.curve.value and "sigma 0.08" in view.words.value
    view.attack.value = "fgsm"
    assert "trained at" not in view.curve.value


@pytest.mark.parametrize("method", saliency.METHODS)
def test_where_the_model_looks_stands_below(alone, method):
    alone.saliency.value = method
    panels = np.asarray(Image.open(BytesIO(alone.pictures.value)))
    size = 7 * 32
    assert panels.shape == (2 * size + pictures.GAP, 3 * size + 2 * pictures.GAP, 4)
    below = panels[-size:]
    assert (below[:, size + pictures.GAP : 2 * size + pictures.GAP, 3] == 0).all(), "nothing under the change"
    assert not np.array_equal(below[:, :size], below[:, -size:]) and method in alone.caption.value
    alone.saliency.value = "off"
    assert np.asarray(Image.open(BytesIO(alone.pictures.value))).shape[0] == size


def test_a_thumbnail_picks_its_image(alone, side):
    def framed():
        return [place for place, each in enumerate(alone.thumbnails) if pictures.FRAMED in each._dom_classes]

    assert "1 of" in alone.count.value and framed() == [0]
    page = alone.looks.value
    assert page.count("data:image/jpeg") == explorer.PAGE
    alone.thumbnails[3].click()
    assert alone.image.value == 3 and "4 of" in alone.count.value and framed() == [3]
    assert alone.looks.value is page, "the pictures of a page are painted once"
    assert alone.thumbnails[3].tooltip.endswith(side.table["image"].iloc[3])
    alone.image.value = len(side) - 1
    rest = len(side) % explorer.PAGE or explorer.PAGE
    assert alone.looks.value.count("data:image/jpeg") == rest
    assert [button.layout.display for button in alone.thumbnails].count("none") == explorer.PAGE - rest
    alone.thumbnails[0].click()
    assert alone.image.value == len(side) - rest and framed() == [0]


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
    shown.typed.value = typed
    assert words in shown.message.value and shown.stop == 8
    shown.typed.value = "2.5"
    assert shown.stop == 5 and shown.message.value == ""


def test_an_error_is_told_in_words(shown, networks):
    shown.known.clear()
    broken = torch.nn.Linear(2, 2)
    shown.networks = {"baseline": broken, "adversarial_training": broken}
    shown.epsilon.value = 3
    assert "This did not work: " in shown.message.value
    assert "<" not in shown.message.value.split("work: ")[1]


def test_in_the_background_the_shown_stop_comes_first_and_all_follow(networks, side):
    view = explorer.Explorer({"baseline": networks["baseline"]}, side)
    view.epsilon.value = 10
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
    assert own.pixels.shape == (1, 32, decoding.field_width(32), 3)
    margin = evaluation.predict(networks["baseline"], own.tensors()[0])[0]
    assert own.labels[0] == (margin > 0) and own.table["label"].iloc[0] == UNKNOWN
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


def upload(view, *files):
    """Give files, (name, color), to an explorer as a browser does."""
    view.upload.value = [
        {"name": name, "type": "image/png", "size": 1, "content": png(color=color), "last_modified": NOW}
        for name, color in files
    ]


PINK, VIOLET, BROWN = (200, 120, 160), (90, 60, 120), (120, 90, 60)


class Linear(torch.nn.Module):
    """Answers by the red of an image; two of opposite sign always disagree, and fall at the same epsilon."""

    def __init__(self, sign):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(sign * 10.0))

    def forward(self, images):
        lead = self.weight * (images[:, 0].mean((1, 2)) - 0.55)
        return torch.stack([-lead, lead], 1)


@pytest.fixture
def pair():
    return {"one": Linear(1), "other": Linear(-1)}


@pytest.fixture
def browsed(pair, side):
    return explorer.Explorer(pair, side, background=False)


def names(view):
    return [name for name, _ in view.image.options]


def test_uploads_are_browsed_beside_each_other_and_the_studys_images_come_back(browsed, side):
    before = names(browsed), browsed.caption.value, browsed.pictures.value
    assert browsed.source.layout.display == browsed.truth.layout.display == "none"
    browsed.case.value = side.table["case"].iloc[5]
    upload(browsed, ("a.png", PINK), ("b.png", VIOLET))
    assert names(browsed) == ["unknown: a.png", "unknown: b.png"] and browsed.source.value == "own"
    assert "a.png" in browsed.caption.value and browsed.message.value == ""
    assert browsed.source.layout.display is browsed.truth.layout.display is None
    browsed.after.click()
    assert "b.png" in browsed.caption.value
    upload(browsed, ("c.png", BROWN))
    assert [name.split(": ")[1] for name in names(browsed)] == ["a.png", "b.png", "c.png"]
    assert "c.png" in browsed.caption.value and "3 of 3" in browsed.count.value
    browsed.source.value = "study"
    assert (names(browsed), browsed.caption.value, browsed.pictures.value) == before
    assert browsed.truth.layout.display == "none" and len(browsed.case.options) > 1
    browsed.source.value = "own"
    assert len(names(browsed)) == 3 and "a.png" in browsed.caption.value


def test_of_files_with_one_name_all_stay(browsed, networks, tmp_path):
    upload(browsed, ("a.png", PINK), ("a.png", VIOLET))
    upload(browsed, ("a.png", BROWN))
    assert names(browsed) == ["unknown: a.png", "unknown: a.png (2)", "unknown: a.png (3)"]
    colors = [tuple(int(value) for value in image[16, 24]) for image in browsed.side.pixels]
    assert colors == [PINK, VIOLET, BROWN]
    for folder, color in (("x", PINK), ("y", VIOLET)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(png(color=color))
    own = explorer.own_images([tmp_path / "x/a.png", tmp_path / "y/a.png"], networks["baseline"], 32)
    assert own.table["image"].tolist() == ["a.png", "a.png (2)"]
    assert [tuple(int(value) for value in image[16, 24]) for image in own.pixels] == [PINK, VIOLET]


@pytest.mark.parametrize("chosen", ["one", "other"])
def test_each_model_is_led_away_from_its_own_answer_where_nobody_knows_the_truth(pair, side, chosen):
    view = explorer.Explorer(pair, side, background=False)
    view.model.value = chosen
    upload(view, ("a.png", PINK))
    view.epsilon.value = 16
    one, other = sorted(view.known.values(), key=lambda answers: answers.name, reverse=True)
    assert (one.rows[0]["margin"] > 0) != (other.rows[0]["margin"] > 0)
    for answers in (one, other):
        margins = [answers.rows[k]["margin"] * np.sign(answers.rows[0]["margin"]) for k in (0, 1)]
        assert margins[1] < margins[0], "toward the other class"
    assert one.turns_at() == other.turns_at(), "models that mirror each other fall at the same epsilon"
    assert "the attacked model's own answer" in view.caption.value


def test_the_user_may_say_the_truth(pair, side):
    view = explorer.Explorer(pair, side, background=False)
    upload(view, ("a.png", PINK), ("b.png", VIOLET))
    view.after.click()
    view.truth.value = "benign"
    assert names(view) == ["unknown: a.png", "benign: b.png"] and view.image.value == 1
    assert "you say it is benign" in view.caption.value
    answers = {each.name: each for each in view.known.values()}
    assert all(each.label.item() == 0 for each in answers.values())
    (wrong,) = (name for name, each in answers.items() if each.rows[0]["margin"] > 0)
    cells = {line.split("</span> ")[1].split("<")[0]: line for line in view.words.value.split("<tr>")[2:]}
    assert "wrong already" in cells[wrong]
    assert "wrong already" not in cells[({"one", "other"} - {wrong}).pop()]
    view.before.click()
    assert view.truth.value == UNKNOWN and "own answer" in view.caption.value
    view.after.click()
    assert view.truth.value == "benign"
    for kind, left in (("benign", ["benign: b.png"]), ("malignant", None)):
        view.filter.value = kind
        assert "No image is left" in view.message.value if left is None else names(view) == left
    right = "right" if wrong != "one" else "wrong"
    view.filter.value = "all"
    view.filter.value = right
    assert names(view) == ["benign: b.png"], "what nobody knows is neither right nor wrong"
    view.filter.value = "all"
    view.image.value = 1
    view.truth.value = UNKNOWN
    assert names(view) == ["unknown: a.png", "unknown: b.png"] and "own answer" in view.caption.value


def test_a_model_that_is_wrong_already_is_not_called_unbreakable(browsed, side, pair):
    margins = evaluation.predict(pair["one"], side.tensors()[0])
    wrong = np.flatnonzero((margins > 0) != (side.labels == 1))
    browsed.compare.value = False
    browsed.image.value = int(wrong[0])
    assert "wrong already" in browsed.words.value and "not up to here" not in browsed.words.value


def test_own_images_given_by_the_caller_stay_the_callers(pair):
    own = explorer.own_images({"a.png": png()}, pair["one"], 32)
    view = explorer.Explorer(pair, own, background=False)
    assert view.truth.layout.display is None and view.source.layout.display == "none"
    view.truth.value = "malignant"
    upload(view, ("a.png", PINK))
    assert names(view) == ["malignant: a.png", "unknown: a.png (2)"]
    assert own.table["label"].tolist() == [UNKNOWN]


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", "a|b*c_d"])
def test_names_are_text_in_the_explorer(pair, side, name):
    table = side.table.assign(image=name, case=name)
    view = explorer.Explorer({name: pair["one"]}, replace(side, table=table), background=False)
    upload(view, (name, PINK))
    for words in ("", "no number"):
        view.typed.value = words or view.typed.value
        for whose in ("study", "own"):
            view.source.value = whose
            said = "".join(
                each.value
                for each in (view.caption, view.words, view.curve, view.message, view.looks, view.count)
            )
            assert "<img" not in said and escape(name) in view.caption.value
            assert escape(name.replace("_", " ")) in view.words.value
    view.upload.value = [
        {"name": name, "type": "image/png", "size": 1, "content": b"none", "last_modified": NOW}
    ]
    assert escape(name) in view.message.value and "<img" not in view.message.value


def in_cell(monkeypatch, cell, run, code="explore()"):
    """As if a front end had asked for this run of a cell."""
    asked = {
        "metadata": {"cellId": cell} if cell else {},
        "header": {"msg_id": run},
        "content": {"code": code},
    }
    monkeypatch.setattr(explorer, "get_ipython", lambda: SimpleNamespace(get_parent=lambda: asked))


@pytest.mark.parametrize("cell", ["a1", None])
def test_an_explorer_is_freed_when_its_cell_is_run_again(pair, side, monkeypatch, cell):
    before, made, out = len(widget._instances), [], []
    for run in range(8):
        in_cell(monkeypatch, cell, f"run {run}")
        for _ in range(2):  # two in one cell
            view = explorer.Explorer(pair, side, background=False)
            made.append(weakref.ref(view))
            out.append(view.view)  # as Out does
    in_cell(monkeypatch, "another", "run 9", "other()")
    beside = explorer.Explorer(pair, side, background=False)
    del view
    gc.collect()
    assert [each() is not None for each in made] == [False] * 14 + [True] * 2
    assert all(each.view.children for each in (made[-1](), made[-2](), beside))
    in_cell(monkeypatch, cell, "run 10")
    last = explorer.Explorer(pair, side, background=False)
    beside.close()
    last.close()
    assert len(widget._instances) == before


def test_a_closed_explorer_stops_answering(pair, side):
    view = explorer.Explorer(pair, side, pgd_steps=50)
    view.attack.value = "pgd"
    thread = view.thread
    view.close()
    thread.join(60)
    assert not thread.is_alive() and not view.known


def test_outside_of_a_notebook_explorers_live_side_by_side(pair, side):
    views = [explorer.Explorer(pair, side, background=False) for _ in range(3)]
    assert all(view.view.children for view in views)


def test_a_kernel_frees_an_explorer_when_its_cell_runs_again():
    code = """
import gc, numpy as np, pandas as pd
from lib import decoding, explorer, loading, models
network = models.build("none")
table = pd.DataFrame({"image": ["a", "b"], "label": ["benign", "malignant"], "case": ["1", "2"]})
table = table.assign(subtype="", magnification=100, split="test", split_by="case", fold=0)
pixels = np.random.default_rng(0).integers(0, 255, (2, 32, decoding.field_width(32), 3), dtype=np.uint8)
side = loading.Side(table, pixels, np.array([0, 1]), "")
"""
    explore = "explorer.Explorer({'one': network}, side).view"
    count = "gc.collect(); sum(type(each) is explorer.Explorer for each in gc.get_objects())"
    cells = [new_code_cell(each) for each in (code, *[explore] * 8, count)]
    ran = NotebookClient(new_notebook(cells=cells), timeout=240, kernel_name="python3").execute()
    assert ran.cells[-1].outputs[-1]["data"]["text/plain"] == "1"


def test_what_systems_leave_beside_own_images_is_skipped(networks, tmp_path, capsys):
    (tmp_path / "MINE.PNG").write_bytes(png())
    for name in ("._MINE.PNG", ".hidden.png"):
        (tmp_path / name).write_bytes(b"left by a system")
    own = explorer.own_images(tmp_path, networks["baseline"], 32)
    assert own.table["image"].tolist() == ["MINE.PNG"] and capsys.readouterr().out == ""


def test_own_images_are_shown_as_they_are_meant(networks, capsys):
    clear, file = Image.new("RGBA", (120, 90), (0, 0, 0, 0)), BytesIO()
    clear.paste((200, 120, 160, 255), (0, 0, 120, 45))
    clear.save(file, "png")
    own = explorer.own_images({"a.png": file.getvalue()}, networks["baseline"], 32)
    assert (own.pixels[0, -10:] == 255).all()
    assert capsys.readouterr().out == "transparent in part, laid on white (1): a.png\n"


def test_the_name_of_a_model_is_no_formula(networks, shown):
    figure = explorer.still_figure({"$\\frac{$": networks["baseline"]}, shown.side, 0)
    figure.draw_without_rendering()  # would end in a parser of formulas
    (legend,) = figure.legends
    assert legend.get_texts()[0].get_text().startswith("$\\frac{$: ")


def test_images_may_be_gone_once_they_are_shown(networks, tmp_path):
    (tmp_path / "mine.png").write_bytes(png())
    view = explorer.Explorer(
        {"mine": networks["baseline"]},
        explorer.own_images(tmp_path, networks["baseline"], 32),
        background=False,
    )
    (tmp_path / "mine.png").unlink()
    view.epsilon.value = 9
    assert "9/255" in view.words.value and view.message.value == ""
    with pytest.raises(ValueError, match=r"mine\.png is not a readable image: .*No such file"):
        explorer.own_images([tmp_path / "mine.png"], networks["baseline"], 32)


def test_a_folder_without_images_says_what_is_read(networks, tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        explorer.own_images(tmp_path, networks["baseline"], 32)


def test_a_run_is_opened_with_all_its_models(smoke, monkeypatch):
    monkeypatch.setenv("STUDY_HOME", str(smoke[0]))
    view = explorer.of_run("smoke", background=False)
    assert list(view.networks) == ["baseline", *profiles.DEFENSES]
    predictions = robustness.read(runs.folder("smoke"), ["gaussian_noise"])
    row = predictions[
        (predictions["image"] == view.side.table["image"].iloc[0]) & (predictions["attack"] == "none")
    ].iloc[0]
    answers = next(answers for answers in view.known.values() if answers.name == "gaussian_noise")
    assert answers.rows[0]["margin"] == pytest.approx(row["margin"], rel=2e-3)


def test_a_run_without_a_baseline_names_the_notebook_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="01_data_split"):
        explorer.of_run("nothing")
    (runs.folder("nothing")).mkdir(parents=True)
    (runs.folder("nothing") / "split.csv").touch()
    with pytest.raises(FileNotFoundError, match="02_transfer_learning"):
        explorer.of_run("nothing")
