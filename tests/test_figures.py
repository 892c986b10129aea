"""Each figure draws the data that it was given, also when pieces of it are missing."""

import base64

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from nbclient import NotebookClient
from PIL import Image

from lib import audit, evaluation, figures, wording

pytestmark = pytest.mark.filterwarnings("error")


def drawn(figure):
    """The figure, checked to draw without a warning."""
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    return figure


def texts(figure):
    """Every text in the figure, in one string."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text")))


def predictions(
    attacks=(("none", 0), ("fgsm", 1), ("fgsm", 4), ("pgd", 4)), models=("baseline", "gaussian_noise")
):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"image": [f"{k}.png" for k in range(24)], "case": [f"14-{k // 2}" for k in range(24)]}
    )
    table = table.assign(
        label=np.repeat(["benign", "malignant"], 12), subtype="A", magnification=100, split="test"
    )
    table = table.assign(split_by="case", fold=0)
    rows = [
        evaluation.prediction_rows(
            table, model=model, attack=attack, epsilon=k / 255, margins=rng.normal(size=24), seed=0
        )
        for model in models
        for attack, k in attacks
    ]
    return pd.concat(rows)


def split_rows():
    """Case c0 has an image on both sides by image, and none has by case."""
    table = pd.DataFrame({"image": list("abcdef"), "case": ["c0", "c0", "c1", "c2", "c3", "c4"]})
    table["label"] = ["benign", "benign", "malignant", "malignant", "benign", "malignant"]
    by_image = table.assign(
        split=["train", "test", "train", "validation", "train", "test"], split_by="image", fold=0
    )
    by_case = table.assign(split=["test", "test", "train", "validation", "train", "test"], split_by="case")
    return pd.concat([by_image, by_case.assign(fold=0), by_case.assign(fold=1)])


# ---------------------------------------------------------------- saving


def test_show_saves_the_figure_with_its_tissue_mark(tmp_path):
    def figure():
        return figures.noise_zoom(np.zeros((16, 16, 3)), np.ones((16, 16, 3)), 0.1)

    first = figures.show(figure(), tmp_path, "zoom", "An image and noise", tissue=True)
    again = figures.show(figure(), tmp_path, "again", "An image and noise")
    for name, mark in (("zoom", "yes"), ("again", "no")):
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert image.info["Shows tissue"] == mark
            assert 850 <= image.width <= 950
    assert first.data == (tmp_path / "figures/zoom.png").read_bytes()
    assert again.metadata == {"filename": "figures/again.png", "alt": "An image and noise"}
    # The same figure is the same file, to the byte.
    assert figures.show(figure(), tmp_path, "zoom", "An image and noise").data == again.data
    assert figures.show_again(tmp_path, "again").metadata == again.metadata
    with pytest.raises(FileNotFoundError, match="whose name starts with 04"):
        figures.show_again(tmp_path, "04_noise")


def test_a_notebook_tells_which_file_its_figure_is(tmp_path):
    code = "from lib import figures\nimport numpy as np\n"
    code += "figure = figures.noise_zoom(np.zeros((9, 9, 3)), np.ones((9, 9, 3)), 0.1)\n"
    code += f"figures.show(figure, {str(tmp_path)!r}, 'zoom', 'what it shows')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    (output,) = notebook.cells[0].outputs
    assert output.metadata["image/png"] == {"filename": "figures/zoom.png", "alt": "what it shows"}
    assert base64.b64decode(output.data["image/png"]) == (tmp_path / "figures/zoom.png").read_bytes()


def test_drawing_leaves_the_callers_settings_alone():
    import matplotlib
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    drawn(figures.class_counts(split_rows()))
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize("name", ["$\\frac{$", "a$b$c", "$x^2$", "50 \\% {", "_private_"])
def test_names_are_text_wherever_they_are_drawn(name):
    """Two dollar signs would start a formula, and one that is none would end the notebook."""
    images = np.zeros((2, 8, 12, 3), np.uint8)
    figure = drawn(figures.sample_grid(images, ["benign", "malignant"], [name, name], f"Samples of {name}"))
    assert [axes.get_title() for axes in figure.axes] == [name, name]
    assert figure.get_suptitle() == f"Samples of {name}"
    history = pd.DataFrame({"epoch": [1, 2]}).assign(
        **{f"{side}_{what}": 0.5 for side in ("train", "validation") for what in ("loss", "accuracy")}
    )
    assert wording.model_name(name) in texts(drawn(figures.learning_curves({name: history}, name)))
    rows = evaluation.metrics(predictions(models=("baseline", name)))
    drawn(figures.comparison_heatmap(rows, split_by="case"))
    drawn(figures.confusion_matrices(rows[rows["attack"] == "none"]))
    figure = drawn(figures.accuracy_curves(rows, split_by="case"))
    formulas = [text for text in figure.findobj(Text) if text.get_text() and text.get_parse_math()]
    assert all("$" not in text.get_text() for text in formulas)


def test_sample_grid_has_a_row_for_each_class():
    images = np.stack([np.full((8, 12, 3), k, np.uint8) for k in range(5)])
    labels = ["malignant", "benign", "malignant", "malignant", "benign"]
    captions = [f"a long caption of picture {k}" for k in range(5)]
    figure = drawn(figures.sample_grid(images, labels, captions, "Samples"))
    shown = {axes.get_title().replace("\n", " "): axes for axes in figure.axes if axes.images}
    assert set(shown) == set(captions)
    for k, caption in enumerate(captions):
        assert (np.asarray(shown[caption].images[0].get_array()) == k).all()
    for caption, label in zip(captions, labels, strict=True):
        assert shown[caption].get_subplotspec().rowspan.start == ["benign", "malignant"].index(label)
    assert len(drawn(figures.sample_grid(images[:1], labels[:1], captions[:1], "One")).axes) == 1


def test_class_counts_are_on_the_bars():
    figure = drawn(figures.class_counts(split_rows()))
    assert len(figure.axes) == 4
    images, cases = figure.axes[:2]
    for axes in (images, cases):
        benign, malignant = (
            [bar.get_height() for bar in bars if bar.get_height()] for bars in axes.containers
        )
        assert (benign, malignant) == ([2, 1], [1, 1, 1])
    assert "fold 1 of 2" in figure.axes[2].get_title()
    one_class = split_rows().query("label == 'benign' and split_by == 'image'")
    assert len(drawn(figures.class_counts(one_class)).axes) == 2


def test_split_overlap_shows_the_cases_on_both_sides():
    figure = drawn(figures.split_overlap(split_rows()))
    (axes,) = figure.axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [2, 1, 2, 2, 0, 3]
    by_image, by_case = (label.get_text() for label in axes.get_yticklabels())
    assert "1 of 2 test images" in by_image
    assert "0 of 3 test images" in by_case


def test_color_by_case_tells_the_share_between_cases():
    level = np.array([10, 20, 100, 110])
    images = np.broadcast_to(level[:, None, None, None], (4, 2, 2, 3)).astype(np.uint8)
    figure = drawn(
        figures.color_by_case(images, ["benign", "benign", "malignant", "malignant"], list("aabb"))
    )
    between = 90**2 / (90**2 + 10**2)
    assert f"{between:.0%} of the variance" in figure.axes[0].get_title()
    points = np.concatenate([c.get_offsets() for c in figure.axes[0].collections])
    assert sorted(points[:, 0]) == [10, 15, 20, 100, 105, 110]
    assert "all images alike" in texts(drawn(figures.color_by_case(images[:1], ["benign"], ["a"])))


# ---------------------------------------------------------------- training


def history(epochs, **columns):
    epoch = np.arange(1, epochs + 1)
    table = pd.DataFrame(
        {"epoch": epoch, "train_loss": 1 / epoch, "validation_loss": (epoch - 2.0) ** 2 + 0.5}
    )
    table = table.assign(
        train_accuracy=0.9, validation_accuracy=0.1 * epoch, learning_rate=0.001, seconds=1.0
    )
    return table.assign(**columns)


def test_learning_curves_mark_the_epoch_of_the_lowest_validation_loss():
    figure = drawn(figures.learning_curves({"baseline": history(4), "other": history(1)}, "Training"))
    loss, accuracy = figure.axes
    train, validation, star = loss.lines[:3]
    assert (train.get_linestyle(), validation.get_linestyle()) == ("--", "-")
    np.testing.assert_allclose(train.get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_allclose(validation.get_ydata(), [1.5, 0.5, 1.5, 4.5])
    assert (star.get_marker(), list(star.get_xdata()), list(star.get_ydata())) == ("*", [2], [0.5])
    assert list(accuracy.lines[2].get_ydata()) == [pytest.approx(0.2)]
    assert loss.lines[0].get_color() == figures.MODEL_COLORS["baseline"]
    missing = history(3, train_accuracy=np.nan, validation_loss=np.nan)
    assert not [
        line
        for line in drawn(figures.learning_curves({"m": missing}, "", folds=5)).axes[0].lines
        if line.get_marker() == "*"
    ]


# ---------------------------------------------------------------- attacks and defenses on images


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_adversarial_panels_show_the_amplified_change(kind):
    clean = np.full((2, 3, 8, 8), 0.5, np.float32)
    change = np.float32(4 / 255) * np.array([1, -1], np.float32)[:, None, None, None]
    arguments = (kind(clean), kind(clean + change), [0.9, 0.2], [0.3, 0.4], ["malignant", "benign"])
    figure = drawn(figures.adversarial_panels(*arguments, 4 / 255, 20))
    assert len(figure.axes) == 6
    panels = np.array(figure.axes).reshape(3, 2)
    np.testing.assert_allclose(panels[1, 0].images[0].get_array(), 0.5 + 20 * 4 / 255, atol=1e-5)
    np.testing.assert_allclose(panels[1, 1].images[0].get_array(), 0.5 - 20 * 4 / 255, atol=1e-5)
    np.testing.assert_allclose(panels[2, 0].images[0].get_array(), 0.5 + 4 / 255, atol=1e-5)
    assert panels[0, 0].get_title() == "P(malignant) 0.90\n✓ says malignant"
    assert panels[2, 0].get_title() == "P(malignant) 0.30\n✗ says benign"
    assert panels[2, 1].get_title() == "P(malignant) 0.40\n✓ says benign"
    assert "4/255" in texts(figure)
    assert "× 20" in texts(figure)


def test_noise_zoom_enlarges_the_same_part_of_both():
    image = np.random.default_rng(0).random((3, 32, 40))
    figure = drawn(figures.noise_zoom(image, image + 0.3, 0.3))
    left, right = figure.axes
    assert left.child_axes[0].get_xlim() == right.child_axes[0].get_xlim() == (5, 9)
    assert np.asarray(right.images[0].get_array()).max() <= 1
    assert "sigma = 0.3" in texts(figure)


# ---------------------------------------------------------------- results


def test_accuracy_curves_hold_the_metrics():
    metrics = evaluation.metrics(predictions())
    figure = drawn(figures.accuracy_curves(metrics))
    fgsm, pgd = figure.axes
    assert (fgsm.get_title(), pgd.get_title()) == ("FGSM", "PGD")
    assert [label.get_text() for label in fgsm.get_xticklabels()] == ["0", "1/255", "4/255"]
    rows = metrics.query("subset == 'all' and model == 'baseline'")
    line = next(line for line in fgsm.lines if line.get_color() == figures.MODEL_COLORS["baseline"])
    expected = rows[rows["attack"].isin(["none", "fgsm"])].sort_values("epsilon")["accuracy"]
    assert list(line.get_ydata()) == list(expected)
    assert list(line.get_xdata()) == [0, 1, 2]
    band = fgsm.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(rows.loc[rows["attack"].isin(["none", "fgsm"]), "accuracy_low"].min())
    chance = fgsm.lines[-1]
    assert list(chance.get_ydata()) == [0.5, 0.5]


def test_accuracy_over_sigma_holds_the_metrics():
    metrics = evaluation.metrics(predictions())
    figure = drawn(figures.accuracy_over_sigma(metrics, {"baseline": 0.0, "gaussian_noise": 0.1}))
    clean = metrics[(metrics["attack"] == "none") & (metrics["subset"] == "all")].set_index("model")
    left, pgd, right = figure.axes
    names = ["baseline", "gaussian_noise"]
    assert list(left.lines[0].get_xdata()) == [0, 0.1]
    assert list(left.lines[0].get_ydata()) == clean["accuracy"][names].tolist()
    assert list(right.lines[1].get_ydata()) == clean["sensitivity"][names].tolist()
    under = metrics[(metrics["attack"] == "pgd") & (metrics["subset"] == "all")].set_index("model")
    assert list(pgd.lines[-1].get_ydata()) == under["accuracy"][names].tolist()
    assert "4/255" in texts(figure) and "sigma" in texts(figure) and "PGD" in texts(figure)


def test_accuracy_curves_do_without_intervals_and_attacks():
    metrics = evaluation.metrics(predictions()).assign(accuracy_low=np.nan, accuracy_high=np.nan)
    figure = drawn(figures.accuracy_curves(metrics, attacks=("pgd", "square")))
    assert len(figure.axes) == 1
    assert len(figure.axes[0].lines) == 3
    clean = metrics[metrics["attack"] == "none"]
    assert drawn(figures.accuracy_curves(clean)).axes[0].get_title() == "clean"
    read = pd.DataFrame(evaluation.records(metrics))
    assert len(drawn(figures.accuracy_curves(read)).axes) == 2


def test_metrics_of_two_splits_are_not_mixed():
    both = evaluation.metrics(pd.concat([predictions(), predictions().assign(split_by="image")]))
    with pytest.raises(ValueError, match="case, image"):
        figures.accuracy_curves(both)
    with pytest.raises(ValueError, match="No metrics"):
        figures.comparison_heatmap(both, split_by="fold")
    assert "split by image" in texts(figures.comparison_heatmap(both, split_by="image")).replace("\n", " ")


def test_confusion_matrices_show_counts_and_shares_of_the_true_class():
    metrics = evaluation.metrics(predictions())
    rows = metrics.query("subset == 'all' and attack == 'pgd'")
    figure = drawn(figures.confusion_matrices(rows))
    first = rows.iloc[0]
    shown = [text.get_text() for text in figure.axes[0].texts]
    counts = [first["tn"], first["fp"], first["fn"], first["tp"]]
    assert shown == [f"{count}\n{count / 12:.0%}" for count in counts]
    assert figure.axes[0].get_title() == "baseline\nPGD 4/255"
    malignant = drawn(figures.confusion_matrices(metrics.query("subset == 'malignant'")))
    assert "no images" in texts(malignant)
    assert "nan%" not in texts(malignant)


def test_comparison_heatmap_has_a_number_for_each_model_and_attack():
    metrics = evaluation.metrics(predictions())
    axes = drawn(figures.comparison_heatmap(metrics)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "clean",
        "FGSM 1/255",
        "FGSM 4/255",
        "PGD 4/255",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["baseline", "Gaussian\nnoise"]
    cells = axes.collections[0].get_array().reshape(4, 2)
    row = metrics.query("subset == 'all' and model == 'gaussian_noise' and attack == 'pgd'").iloc[0]
    assert cells[3, 1] == pytest.approx(row["accuracy"])
    without = metrics[~((metrics["model"] == "baseline") & (metrics["attack"] == "pgd"))]
    cells = (
        drawn(figures.comparison_heatmap(without, value="auroc"))
        .axes[0]
        .collections[0]
        .get_array()
        .reshape(4, 2)
    )
    assert np.ma.getmaskarray(cells)[3].tolist() == [True, False]


def test_a_papers_values_stand_beside_ours():
    def record(table, quantity, tested, published, measured, n=100, paper="A"):
        spread = {"low": None, "high": None} if table == "confusion matrices" else {"low": 0.1, "high": 0.9}
        named = {"paper": paper, "table": table, "quantity": quantity, "tested": tested}
        return named | {"published": published, "measured": measured, "n": n} | spread

    records = [
        record("split", "benign images, test", "", 65, 65),
        record("metrics", "model B: accuracy", "clean images", 0.75, 0.5),
        record("metrics", "model B: accuracy", "its own FGSM images at 4/255", 0.75, 0.25),
        record("metrics", "model B: precision", "clean images", 0.6, None, None),
        *(
            record("confusion matrices", f"model B: {cell}", on, published, measured, 80)
            for on, measured in (("clean images", 40), ("its own FGSM images at 4/255", 20))
            for cell, published in (("tp", 300), ("tn", 400), ("fp", 200), ("fn", 100))
        ),
        record("Table 2", "original model: accuracy", "clean images", 0.98, 0.9, paper="B"),
    ]
    figure = figures.beside_paper(records, "A")
    assert "published beside ours, FGSM at 4/255" in texts(drawn(figure)).replace("\n", " ")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "model B: accuracy",
        "model B: precision",
    ]
    assert len(right.get_yticklabels()) == 4
    published = {tuple(point) for point in right.collections[0].get_offsets().tolist()}
    assert published == {(0.3, 0), (0.4, 1), (0.2, 2), (0.1, 3)}, "cells are shares of their matrix"
    ours = {round(float(x), 3) for line in right.lines for x in line.get_xdata()}
    assert {0.5, 0.25} <= ours
    assert "ours, its own FGSM images" in texts(figure)
    assert len(figures.beside_paper(records, "B").axes) == 1


# ---------------------------------------------------------------- the audit


def test_transfer_matrix_has_its_own_images_on_the_diagonal():
    made = predictions()
    made = pd.concat(
        [
            made,
            *(
                made[(made["attack"] == "fgsm") & (made["model"] == model)].assign(
                    attack="transfer_fgsm", source_model=source, margin=lambda rows: -rows["margin"]
                )
                for model, source in (("baseline", "gaussian_noise"), ("gaussian_noise", "baseline"))
            ),
        ]
    )
    metrics = evaluation.metrics(made)
    figure = drawn(figures.transfer_matrix(metrics, 4 / 255))
    own = metrics[
        (metrics["attack"] == "fgsm") & (metrics["subset"] == "all") & (metrics["epsilon"] == 4 / 255)
    ]
    own = own.set_index("model")["accuracy"]
    numbers = [float(text.get_text()) for text in figure.axes[0].texts]
    assert numbers[0] == pytest.approx(own["baseline"], abs=0.005)
    assert numbers[3] == pytest.approx(own["gaussian_noise"], abs=0.005)
    assert numbers[1] == pytest.approx(1 - own["baseline"], abs=0.005)
    assert len(drawn(figures.comparison_heatmap(metrics)).axes[0].get_yticklabels()) == 6


def test_curves_of_both_directions_have_a_panel_each():
    figure = drawn(
        figures.accuracy_curves(
            evaluation.metrics(predictions()), attacks=("fgsm",), values=("sensitivity", "specificity")
        )
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == ["sensitivity under FGSM", "specificity under FGSM"]


def test_every_image_has_one_smallest_epsilon():
    metrics = evaluation.metrics(evaluation.with_worst_case(predictions()))
    figure = drawn(figures.smallest_epsilons(metrics))
    bars = np.array([[bar.get_width() for bar in part] for part in figure.axes[0].containers])
    assert bars.shape == (4, 2) and (bars >= 0).all(), "clean, 1/255, 4/255 and none; two models"
    assert bars.sum(axis=0) == pytest.approx(1)
    rows = metrics[(metrics["subset"] == "all") & (metrics["model"] == "gaussian_noise")]
    worst = rows[rows["attack"] == "worst_case"].set_index("epsilon")["accuracy"]
    clean = rows.loc[rows["attack"] == "none", "accuracy"].item()
    assert bars[:, 1] == pytest.approx(
        [1 - clean, clean - worst[1 / 255], worst.iloc[0] - worst[4 / 255], worst[4 / 255]]
    )


def test_ssim_curves_start_at_the_original():
    rows = predictions().assign(ssim=0.9, l2=1.0)
    figure = drawn(figures.ssim_curves(audit.distances(rows)))
    assert [axes.get_title() for axes in figure.axes] == ["FGSM", "PGD"]
    fgsm, pgd = ([list(line.get_ydata()) for line in axes.lines] for axes in figure.axes)
    assert fgsm == [pytest.approx([1, 0.9, 0.9])] * 2 and pgd == [pytest.approx([1, 0.9])] * 2
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0", "1/255", "4/255"]
    assert drawn(figures.ssim_curves(audit.distances(rows.assign(l2=0.0)))), "no attack changed anything"


def test_steps_curves_mark_the_restarts():
    rows = [
        {"model": model, "epsilon": 4 / 255, "steps": steps, "restarts": restarts, "step_size": 1.0, "n": 8}
        | {"accuracy": 0.9 - steps / 100, "margin": 1.0, "zero_gradient": None}
        for model in ("baseline", "gaussian_noise")
        for steps, restarts in ((0, 0), (5, 1), (20, 1), (20, 4))
    ]
    figure = drawn(figures.steps_curves(pd.DataFrame(rows)))
    lines = figure.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [3, 1, 3, 1]
    assert "8 test images" in texts(figure)


def test_reliability_has_a_panel_for_each_condition():
    points = pd.DataFrame({"p": [0.2, 0.8], "malignant": [0.1, 0.9], "n": [5, 5]})
    kept = pd.DataFrame({"abstained": np.arange(30) / 30, "accuracy": np.linspace(0.8, 1.0, 30)})
    curves = {
        (model, words): (points, kept) for model in ("baseline", "other") for words in ("clean", "FGSM")
    }
    figure = drawn(figures.reliability_and_abstention(curves, "Reliability"))
    assert [axes.get_title() for axes in figure.axes] == ["clean", "FGSM", "least sure left out"]
    assert len(figure.axes[2].lines) == 4
    # Of thirty images eleven can go unanswered until fewer than twenty are left.
    assert all(line.get_xdata().max() == 10 / 30 for line in figure.axes[2].lines)


def test_certified_accuracy_falls_with_the_radius():
    rows = pd.DataFrame({"radius": [0.1, np.nan, 0.3, 0.2], "right": [True, True, True, False], "sigma": 0.1})
    figure = drawn(figures.certified_curves(rows.assign(model="baseline")))
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [0.3, 0.3, 0.1, 0] and line.get_ydata().tolist() == [
        0,
        0.25,
        0.5,
        0.5,
    ]
    drawn(figures.certified_curves(rows.assign(model="baseline", right=False)))


def test_the_trade_off_sets_the_worst_case_over_clean():
    everything = evaluation.with_worst_case(predictions())
    metrics = evaluation.metrics(everything)
    figure = drawn(figures.trade_off(metrics, 4 / 255))
    worst = metrics[(metrics["attack"] == "worst_case") & (metrics["subset"] == "all")]
    worst = worst[worst["epsilon"] == 4 / 255].set_index("model")["balanced_accuracy"]
    points = [container.lines[0].get_ydata()[0] for container in figure.axes[0].containers]
    assert points == pytest.approx([worst["baseline"], worst["gaussian_noise"]])
