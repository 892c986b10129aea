"""The study's figures: pure functions, data in and a matplotlib Figure out.

No pyplot state: nothing pops up and nothing has to be closed. A model has the same color and an attack the same line
everywhere; epsilons are shown as k/255. `show` saves a figure beside the run and hands it to the notebook.
"""

import functools
import io
import re
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse

from lib import evaluation, papers, runs, wording

WIDTH = 8.2  # inches; at 110 dots an inch the width of a report's page, about 900 pixels
NO_BREAK = "\N{NO-BREAK SPACE}"
FEW = 20  # images; a share of fewer is not drawn
PALETTE = sns.color_palette("colorblind")
STYLE = {
    **sns.axes_style("whitegrid"),
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "axes.titleweight": "normal",
    "grid.color": "0.9",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "text.parse_math": False,  # a $ in the name of a case or a model is a $
}
CLASS_COLORS = {"benign": PALETTE[0], "malignant": PALETTE[1]}
MODEL_COLORS = {
    "baseline": PALETTE[7],
    "gaussian_noise": PALETTE[0],
    "gaussian_noise_recalibrated": PALETTE[9],
    "merged_fgsm": PALETTE[1],
    "adversarial_training": PALETTE[2],
    "color_only": PALETTE[4],
    "always_malignant": (0.1, 0.1, 0.1),
}
SPARE_COLORS = [*(PALETTE[k] for k in (3, 5, 6, 8)), (0.5, 0.23, 0.03), (0.18, 0.0, 0.29)]
# In the order in which figures list them: from no attack to the strongest.
ATTACK_LINES = {
    "none": "-",
    "random_noise": ":",
    "transfer_fgsm": "-.",
    "fgsm": "--",
    "pgd": "-",
    "apgd_ce": (0, (5, 1)),
    "fab": (0, (3, 1, 1, 1)),
    "square": (0, (1, 1)),
    "worst_case": (0, (8, 2)),
}
RIGHT, WRONG = "✓", "✗"
CELLS = {"tp": "true positives", "tn": "true negatives", "fp": "false positives", "fn": "false negatives"}


def show(figure, folder, name, alt, tissue=False):
    """Save a figure as folder/figures/<name>.png and return it as an image for the last line of a notebook cell.

    alt: what the figure shows, for those who do not see it; tissue: whether it shows tissue, written into the PNG as
    "Shows tissue" so that a report can keep such figures apart. The notebook's output says which file it is.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=STYLE["figure.dpi"], facecolor="white")
    image = Image.open(drawn).convert("RGB")
    pictures = any(np.ndim(each.get_array()) == 3 for axes in figure.axes for each in axes.images)
    if not pictures:
        # Charts have few colors: a palette makes them four times smaller.
        image = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    # No date and no version: the same figure is the same file.
    about = PngInfo()
    about.add_text("Shows tissue", "yes" if tissue else "no")
    about.add_itxt("Description", alt)
    with runs.whole_file(Path(folder) / "figures" / f"{name}.png") as part:
        image.save(part, format="png", pnginfo=about, optimize=True)
    return show_again(folder, name)


def show_again(folder, name):
    """A figure that `show` saved, as an image for a notebook's output. Raises FileNotFoundError where its notebook has not run."""
    from IPython.display import Image as Displayed
    from PIL import Image

    file = Path(folder) / "figures" / f"{name}.png"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing: run the notebook whose name starts with {name[:2]} first."
        )
    with Image.open(file) as image:
        about = {"filename": f"figures/{name}.png", "alt": image.info["Description"]}
    return Displayed(data=file.read_bytes(), format="png", metadata=about)


def _styled(draw):
    """Draws in the study's style and leaves the caller's settings alone."""

    @functools.wraps(draw)
    def wrapper(*arguments, **options):
        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)

    return wrapper


def _panels(rows, columns, height, title, **options):
    """A Figure of the report's width with a wrapped title, and its axes as an array (rows, columns)."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, 66, break_long_words=False).replace(NO_BREAK, " "))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def colors_of(models):
    """The color of each model, the same in every figure; unknown ones take the spare colors in their order."""
    spare = [model for model in models if model not in MODEL_COLORS]
    extra = {model: SPARE_COLORS[k % len(SPARE_COLORS)] for k, model in enumerate(spare)}
    return {model: MODEL_COLORS.get(model, extra.get(model)) for model in models}


def _in_order(names, known):
    """Names in the order of the known ones, the others after them by the alphabet."""
    known = list(known)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def _pixels(images):
    """Pictures (N, H, W, 3) for imshow, of a tensor or array (N, 3, H, W) or (N, H, W, 3)."""
    images = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images)
    images = images.transpose(0, 2, 3, 1) if images.shape[1] == 3 and images.shape[-1] != 3 else images
    return images if images.dtype == np.uint8 else np.clip(images, 0, 1)


def _picture(axes, pixels, title=None):
    axes.imshow(pixels)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    if title:
        axes.set_title(title, fontsize=9)


# ---------------------------------------------------------------- the data


@_styled
def sample_grid(images, labels, captions, title):
    """Sample images in a row for each class.

    images: uint8 (N, H, W, 3); labels: "benign" or "malignant", (N,); captions: text over each image, (N,).
    """
    images, labels = _pixels(images), np.asarray(labels)
    classes = _in_order(labels, CLASS_COLORS)
    members = [np.flatnonzero(labels == name) for name in classes]
    columns = max(map(len, members))
    cell = WIDTH / max(columns, 3)
    # A letter of the captions is about 0.075 inches wide.
    captions = [textwrap.fill(str(caption), int(cell / 0.075)) for caption in captions]
    lines = max(caption.count("\n") + 1 for caption in captions)
    height = len(classes) * (cell * images.shape[1] / images.shape[2] + 0.15 + 0.15 * lines) + 0.5
    figure, grid = _panels(len(classes), columns, height, title)
    for name, chosen, row in zip(classes, members, grid, strict=True):
        for axes in row[len(chosen) :]:
            axes.axis("off")
        for axes, k in zip(row, chosen, strict=False):
            _picture(axes, images[k], captions[k])
        row[0].set_ylabel(name, color=CLASS_COLORS.get(name), fontweight="bold")
    return figure


@_styled
def class_counts(split):
    """Images and cases of each class on each side, a row of panels for each way of splitting.

    split: the table split.csv. Of several folds the first is shown.
    """
    kinds = sorted(split["split_by"].unique(), reverse=True)
    figure, grid = _panels(len(kinds), 2, 2.7 * len(kinds) + 0.5, "Images and cases of each class")
    for kind, row in zip(kinds, grid, strict=True):
        rows, note = _first_fold(split[split["split_by"] == kind])
        counts = rows.groupby(["split", "label"]).agg(images=("image", "size"), cases=("case", "nunique"))
        for axes, unit in zip(row, ("images", "cases"), strict=True):
            sns.barplot(
                counts.reset_index(),
                x="split",
                y=unit,
                hue="label",
                ax=axes,
                palette=CLASS_COLORS,
                saturation=1,
                order=_in_order(rows["split"], ("train", "validation", "test")),
                hue_order=_in_order(rows["label"], CLASS_COLORS),
            )
            for bars in axes.containers:
                axes.bar_label(bars, fontsize=9, padding=1)
            axes.margins(y=0.15)
            axes.legend_.remove()
            axes.set(
                title=f"{unit.capitalize()}, split by {kind}{note}", xlabel="", ylabel=f"number of {unit}"
            )
    handles = [matplotlib.patches.Patch(color=color, label=name) for name, color in CLASS_COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _first_fold(rows):
    folds = rows["fold"].nunique()
    return rows[rows["fold"] == rows["fold"].min()], f" (fold 1 of {folds})" if folds > 1 else ""


@_styled
def split_overlap(split):
    """How many cases lie on both sides of each way of splitting, and how many test images that concerns.

    split: the table split.csv. One side is training, the other validation and test; of several folds the first.
    """
    kinds = sorted(split["split_by"].unique(), reverse=True)
    figure, grid = _panels(1, 1, 0.75 * len(kinds) + 1.9, "Cases that a model is trained on and tested on")
    axes, names = grid[0, 0], []
    for place, kind in enumerate(kinds):
        rows, note = _first_fold(split[split["split_by"] == kind])
        training = rows["split"] == "train"
        seen, held_out = set(rows.loc[training, "case"]), set(rows.loc[~training, "case"])
        test = rows[rows["split"] == "test"]
        leaked = int(test["case"].isin(seen).sum())
        start = 0
        for part, color, hatch in [
            (seen - held_out, PALETTE[7], None),
            (seen & held_out, PALETTE[3], "///"),
            (held_out - seen, PALETTE[9], None),
        ]:
            axes.barh(place, len(part), left=start, color=color, hatch=hatch, edgecolor="white", height=0.55)
            if part:
                axes.text(start + len(part) / 2, place, len(part), ha="center", va="center", fontweight="bold",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.8})  # fmt: skip
            start += len(part)
        names.append(f"by {kind}{note}\n{leaked} of {len(test)} test images\nare of a training case")
    axes.set(xlabel="number of cases", ylim=(len(kinds) - 0.5, -0.5))
    axes.set_yticks(range(len(kinds)), names)
    axes.grid(False, axis="y")
    kinds = [("training only", PALETTE[7], None), ("both sides", PALETTE[3], "///")]
    kinds.append(("validation or test only", PALETTE[9], None))
    handles = [matplotlib.patches.Patch(fc=c, hatch=h, ec="white", label=name) for name, c, h in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


@_styled
def color_by_case(images, labels, cases):
    """Mean red and blue of each image, and the mean and spread of each case: stain tells the case.

    images: uint8 (N, H, W, 3); labels: "benign" or "malignant", (N,); cases: (N,).
    The panel's title says which share of the color's variance (red, green and blue) lies between cases.
    """
    colors = np.stack([np.asarray(image).mean(axis=(0, 1)) for image in images])
    cases, labels = np.asarray(cases, str), np.asarray(labels)
    names, case = np.unique(cases, return_inverse=True)
    centers = (
        np.column_stack([np.bincount(case, channel) for channel in colors.T]) / np.bincount(case)[:, None]
    )
    total = ((colors - colors.mean(0)) ** 2).sum()
    between = ((centers[case] - colors.mean(0)) ** 2).sum()
    figure, grid = _panels(1, 1, 5.2, "Mean color of each image, by case and class")
    axes = grid[0, 0]
    for name in _in_order(labels, CLASS_COLORS):
        color, marker = CLASS_COLORS.get(name, PALETTE[7]), "o" if name == "benign" else "^"
        mine = np.flatnonzero(labels == name)
        for k in np.unique(case[mine]):
            points = colors[mine[case[mine] == k]][:, [0, 2]]
            if len(points) > 2:  # one standard deviation each way
                variance, directions = np.linalg.eigh(np.cov(points.T))
                width, height = 2 * np.sqrt(variance.clip(0))
                angle = np.degrees(np.arctan2(*directions[::-1, 0]))
                place = centers[k, [0, 2]]
                axes.add_patch(Ellipse(place, width, height, angle=angle, fc=color, ec=color, alpha=0.25))
        axes.scatter(
            colors[mine, 0],
            colors[mine, 2],
            s=9,
            color=color,
            marker=marker,
            alpha=0.45,
            lw=0,
            label=f"{name}, an image",
        )
        own = np.unique(case[mine])
        axes.scatter(
            centers[own, 0],
            centers[own, 2],
            s=60,
            color=color,
            marker=marker,
            ec="black",
            zorder=3,
            label=f"{name}, mean of a case (ellipse: its standard deviation)",
        )
    share = (
        f"{between / total:.0%} of the variance in color lies between cases" if total else "all images alike"
    )
    axes.set(xlabel="mean of red (0 to 255)", ylabel="mean of blue (0 to 255)")
    axes.set_title(f"{len(colors)} images of {len(names)} cases: {share}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, markerscale=1)
    return figure


# ---------------------------------------------------------------- training


@_styled
def learning_curves(histories, title, folds=1):
    """Loss and accuracy by epoch, validation solid and training dashed, the chosen epoch marked with a star.

    histories: {model: DataFrame with epoch, train_loss, validation_loss, train_accuracy, validation_accuracy};
    missing values are left out; of several folds, the first. The chosen epoch is the one with the lowest validation loss.
    """
    figure, grid = _panels(1, 2, 3.9, title + (f" (first of {folds} folds)" if folds > 1 else ""))
    colors = colors_of(list(histories))
    for model, history in histories.items():
        style = {"color": colors[model], "marker": "." if len(history) < 40 else None}
        for axes, quantity in zip(grid[0], ("loss", "accuracy"), strict=True):
            axes.plot(history["epoch"], history[f"train_{quantity}"].astype(float), "--", alpha=0.7, **style)
            validation = history[f"validation_{quantity}"].astype(float)
            axes.plot(history["epoch"], validation, "-", label=wording.model_name(model), **style)
            if history["validation_loss"].notna().any():
                best = history["validation_loss"].astype(float).idxmin()
                axes.plot(
                    history["epoch"][best], validation[best], "*", ms=13, mec="black", color=colors[model]
                )
    grid[0, 0].set(title="Loss", xlabel="epoch", ylabel="loss (nats an image)", ylim=(0, None))
    grid[0, 1].set(
        title="Accuracy", xlabel="epoch", ylabel="accuracy (fraction of images)", ylim=(-0.02, 1.02)
    )
    for axes in grid[0]:
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles = [Line2D([], [], color=colors[model], label=wording.model_name(model)) for model in histories]
    handles += [
        Line2D([], [], color="0.3", label="validation"),
        Line2D([], [], color="0.3", ls="--", label="training"),
    ]
    handles.append(Line2D([], [], color="0.6", marker="*", ms=11, mec="black", ls="", label="chosen epoch"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


# ---------------------------------------------------------------- attacks and defenses on images


@_styled
def adversarial_panels(
    images, perturbed, probabilities_before, probabilities_after, labels, epsilon, amplification
):
    """Original, perturbation and adversarial image, one below the other, a column for each image.

    images, perturbed: (N, 3, H, W) in [0, 1]; probabilities: P(malignant), (N,); labels: "benign" or "malignant",
    (N,); epsilon: in [0, 1]; amplification: the factor by which the perturbation is enlarged around middle gray.
    """
    before, after, labels = _pixels(images), _pixels(perturbed), np.asarray(labels)
    change = np.clip(0.5 + (after.astype(float) - before) * amplification, 0, 1)
    columns = len(before)
    cell = WIDTH / max(columns, 3)
    title = f"Original, perturbation (at most {wording.format_epsilon(epsilon)}) and adversarial image"
    figure, grid = _panels(3, columns, 3 * (cell * before.shape[1] / before.shape[2] + 0.35) + 0.6, title)
    rows = ["original", f"perturbation\n(× {amplification:g}, gray: none)", "adversarial"]
    for k, column in enumerate(grid.T):
        for axes, pixels in zip(column, (before[k], change[k], after[k]), strict=True):
            _picture(axes, pixels)
        largest = np.abs(after[k].astype(float) - before[k]).max()
        column[1].set_title(f"largest change {largest * 255:.2g}/255", fontsize=9)
        for axes, probability in ((column[0], probabilities_before[k]), (column[2], probabilities_after[k])):
            answer = "malignant" if probability > 0.5 else "benign"
            right = answer == labels[k]
            text = f"P(malignant) {probability:.2f}\n{RIGHT if right else WRONG} says {answer}"
            axes.set_title(
                text, fontsize=9, color="black" if right else "#b0000f", fontweight=None if right else "bold"
            )
        column[2].set_xlabel(f"truth: {labels[k]}", fontsize=9, color=CLASS_COLORS.get(labels[k]))
    for axes, text in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(text, fontsize=9)
    return figure


@_styled
def noise_zoom(image, noisy, sigma):
    """An image and the same with Gaussian noise, each with a part of it enlarged four times.

    image, noisy: (3, H, W) or (H, W, 3) in [0, 1]; sigma: standard deviation of the noise in [0, 1].
    """
    pair = [_pixels(np.asarray(picture)[None])[0] for picture in (image, noisy)]
    high, wide = pair[0].shape[:2]
    title = f"Gaussian noise with a standard deviation of {sigma:g} (pixels: 0 to 1)"
    figure, grid = _panels(1, 2, WIDTH / 2 * high / wide + 0.8, title)
    # The enlarged part lies at the upper left, its enlargement at the lower right: neither hides the other.
    top, left, side = high // 8, wide // 8, max(2, min(high, wide) // 8)
    for axes, pixels, text in zip(grid[0], pair, ("original", f"with noise, sigma = {sigma:g}"), strict=True):
        _picture(axes, pixels)
        axes.set_title(text)
        inset = axes.inset_axes(
            [1 - 0.5 * min(high, wide) / wide - 0.02, 0.02, 0.5 * min(high, wide) / wide, 0.5]
        )
        inset.imshow(pixels, aspect="equal")
        inset.set(xlim=(left, left + side), ylim=(top + side, top), xticks=[], yticks=[])
        inset.grid(False)
        for spine in inset.spines.values():
            spine.set(color="black", linewidth=1.5, visible=True)
        axes.indicate_inset_zoom(inset, edgecolor="black", alpha=1, linewidth=1.2)
    return figure


# ---------------------------------------------------------------- results


@_styled
def accuracy_curves(metrics, attacks=("fgsm", "pgd"), split_by=None, values=("accuracy",)):
    """Accuracy against epsilon: a panel for each attack, a line for each model, with 95 % intervals over cases.

    metrics: rows of `evaluation.metrics`; split_by may be left out where there is only one; values: rates to show instead of
    accuracy, a panel each. The dotted line is what answering malignant always gets.
    """
    rows = _chosen(metrics, split_by)
    clean = rows[rows["attack"] == "none"]
    attacks = [attack for attack in attacks if (rows["attack"] == attack).any()] or ["none"]
    models = _in_order(set(rows["model"]) - {"always_malignant"}, MODEL_COLORS)
    colors = colors_of(models)
    epsilons = sorted({0.0, *rows.loc[rows["attack"].isin(attacks), "epsilon"]})
    place = {epsilon: k for k, epsilon in enumerate(epsilons)}
    shown = [(attack, value) for attack in attacks for value in values]
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    named = " and ".join(values).capitalize()
    title = f"{named} against epsilon, the largest change of a channel value: all images{_how_many(rows)}"
    figure, grid = _panels(lines, columns, 3.3 * lines + 1.1, title, sharey=True, sharex=True)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    for axes, (attack, value) in zip(grid.flat, shown, strict=False):
        for model in models:
            mine = rows[(rows["model"] == model) & (rows["attack"] == attack) & (attack != "none")]
            start = clean[clean["model"] == model].assign(source_model="")
            sources = mine["source_model"].fillna("").unique() if len(mine) else [""]
            for source in sources:
                points = pd.concat([start, mine[mine["source_model"].fillna("") == source]])
                points = points.sort_values("epsilon")
                x = points["epsilon"].map(place).to_numpy(float)
                y, low, high = (
                    points[name].to_numpy(float) for name in (value, f"{value}_low", f"{value}_high")
                )
                axes.plot(x, y, color=colors[model], linestyle=ATTACK_LINES.get(attack, "-"), marker="o")
                axes.fill_between(x, low, high, color=colors[model], alpha=0.12, linewidth=0)
        always = {"accuracy": _malignant_share(rows), "balanced_accuracy": 0.5, "sensitivity": 1}
        axes.axhline(always.get(value, 0), color="0.1", linestyle=":", linewidth=1.3, zorder=1)
        title = (
            wording.attack_name(attack)
            if len(values) == 1
            else f"{value} under {wording.attack_name(attack)}"
        )
        axes.set(title=title.replace("_", " "), ylim=(-0.03, 1.03))
        axes.set_xticks(range(len(epsilons)), [wording.format_epsilon(e) for e in epsilons])
        axes.tick_params("x", rotation=45 if len(epsilons) * columns > 16 else 0, labelbottom=True)
        axes.set_xlabel("epsilon (not to scale)")
    for row in grid:
        row[0].set_ylabel(
            "accuracy (fraction of images)" if values == ("accuracy",) else "fraction of images"
        )
    handles = [
        Line2D([], [], color=colors[model], marker="o", label=wording.model_name(model)) for model in models
    ]
    handles.append(Line2D([], [], color="0.1", ls=":", label="always malignant"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    return figure


@_styled
def smallest_epsilons(metrics, split_by=None):
    """How images spread over the smallest epsilon that fools them: a bar for each model, its parts the shares of images.

    metrics: rows of `evaluation.metrics` with the worst case. An image stands there up to its own smallest epsilon.
    """
    rows = _chosen(metrics, split_by)
    models = _in_order(rows.loc[rows["attack"] == "worst_case", "model"], MODEL_COLORS)
    rows = rows[rows["attack"].isin(["none", "worst_case"]) & rows["model"].isin(models)]
    standing = rows.pivot_table("accuracy", "model", "epsilon").loc[models]
    shares = [1 - standing[0.0], *(-standing.diff(axis=1)[each] for each in standing.columns[1:])]
    names = [
        "wrong unattacked",
        *map(wording.format_epsilon, standing.columns[1:]),
        "stands at every epsilon",
    ]
    colors = ["0.55", *sns.color_palette("rocket", len(names) - 2), "0.88"]
    title = f"The smallest epsilon that fools an image{_how_many(rows)}"
    figure, grid = _panels(1, 1, 1.6 + 0.38 * len(models), title)
    axes, left = grid[0, 0], np.zeros(len(models))
    for name, share, color in zip(names, [*shares, standing.iloc[:, -1]], colors, strict=True):
        axes.barh(range(len(models)), share, left=left, color=color, label=name, height=0.72)
        left += share.to_numpy()
    axes.set_yticks(range(len(models)), map(wording.model_name, models))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlim=(0, 1), xlabel="fraction of images")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, title="first fooled at")
    return figure


@_styled
def ssim_curves(distances):
    """How alike attacked images and originals look: mean SSIM over epsilon, a panel for each attack, 95 % bands over cases.

    distances: rows of `audit.distances` of one split and seed, of which FGSM and PGD are shown.
    """
    attacks = [attack for attack in ("fgsm", "pgd") if (distances["attack"] == attack).any()] or ["fgsm"]
    rows = distances[distances["attack"].isin(attacks)].sort_values("epsilon")
    models = _in_order(set(rows["model"]), MODEL_COLORS)
    colors, epsilons = colors_of(models), sorted({0.0, *rows["epsilon"]})
    title = "How alike attacked images and their originals look"
    figure, grid = _panels(1, len(attacks), 4.0, title, sharey=True)
    for axes, attack in zip(grid.flat, attacks, strict=True):
        for model in models:
            points = rows[(rows["model"] == model) & (rows["attack"] == attack)]
            x = [0, *map(epsilons.index, points["epsilon"])]  # a clean image is its own original
            y, low, high = ([1.0, *points[name]] for name in ("ssim", "ssim_low", "ssim_high"))
            axes.plot(x, y, marker="o", color=colors[model], label=wording.model_name(model))
            axes.fill_between(x, low, high, color=colors[model], alpha=0.12, linewidth=0)
        axes.set(title=wording.attack_name(attack), xlabel="epsilon (not to scale)", ylim=(None, 1.01))
        axes.set_xticks(range(len(epsilons)), [wording.format_epsilon(each) for each in epsilons])
    grid.flat[0].set_ylabel("mean SSIM (1: the same picture)")
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
    return figure


@_styled
def accuracy_over_sigma(metrics, sigmas, split_by=None):
    """What noise in training does: accuracy clean and under FGSM and PGD, and clean sensitivity and specificity, over sigma.

    metrics: rows of `evaluation.metrics`; sigmas: {model: sigma in [0, 1]}, 0 for the baseline.
    """
    rows = _chosen(metrics, split_by)
    rows = rows[rows["model"].isin(list(sigmas))]
    rows = rows.assign(sigma=rows["model"].map(sigmas)).sort_values("sigma")
    title = f"Gaussian noise in training: what its standard deviation changes{_how_many(rows)}"
    attacks = [attack for attack in ("fgsm", "pgd") if (rows["attack"] == attack).any()]
    figure, grid = _panels(1, len(attacks) + 1, 4.4, title, sharey=True)
    *panels, right = grid[0]
    epsilons = [0.0, *sorted(rows.loc[rows["attack"].isin(attacks), "epsilon"].unique())]
    shades = dict(zip(epsilons, sns.color_palette("viridis", len(epsilons)), strict=True))
    for axes, attack in zip(panels, attacks, strict=True):
        for epsilon, color in shades.items():
            line = rows[(rows["attack"] == (attack if epsilon else "none")) & (rows["epsilon"] == epsilon)]
            x, y, low, high = (
                line[name].to_numpy(float) for name in ("sigma", "accuracy", "accuracy_low", "accuracy_high")
            )
            name = wording.format_epsilon(epsilon) if epsilon else "clean"
            axes.plot(x, y, color=color, marker="o", label=name)
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        axes.set(title=f"All test images, {wording.attack_name(attack)}")
    clean = rows[rows["attack"] == "none"]
    for (name, color), marker in zip(CLASS_COLORS.items(), "so", strict=True):
        share = {"benign": "specificity", "malignant": "sensitivity"}[name]
        values = clean["sigma"], clean[share].astype(float)
        right.plot(*values, color=color, marker=marker, label=f"{share} ({name})")
    panels[0].set(ylabel="accuracy (fraction of images)", ylim=(-0.03, 1.03))
    right.set(title="Clean, by class", ylabel="fraction of the class")
    ticks = sorted(set(sigmas.values()))
    for axes in grid[0]:
        axes.set_xlabel("sigma (of the range 0 to 1)")
        axes.set_xticks(ticks, [f"{sigma:g}" for sigma in ticks])
        columns = 1 if axes is right else 3
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
        axes.legend(ncols=columns, frameon=False, fontsize=8, columnspacing=1.0, handlelength=1.4, **below)
    return figure


@_styled
def beside_paper(records, paper):
    """A paper's published values and ours: shares on the left, confusion matrices as shares of their images on the right.

    records: those of `papers.records`. Where the paper does not say on which images it tested, ours stand once for each.
    """
    rows = pd.DataFrame(records)
    rows = rows[(rows["paper"] == paper) & (rows["tested"] != "")].reset_index(drop=True)
    cells = rows["table"] == "confusion matrices"
    condition = rows["quantity"].str.split(": ").str[0]
    total = rows[cells].drop_duplicates("quantity").groupby(condition)["published"].sum()
    rows.loc[cells, "published"] /= condition[cells].map(total)
    rows.loc[cells, "measured"] /= rows.loc[cells, "n"]
    parts = [part for part in (rows[~cells], rows[cells]) if len(part)]
    longest = max(part["quantity"].nunique() for part in parts)
    figure, grid = _panels(
        1, len(parts), 0.3 * longest + 1.6, f"{paper}: published beside ours{_tested_at(rows)}"
    )
    tested = rows["tested"].str.split(" at ").str[0]
    marks = dict(zip(papers.TESTED.values(), "osv", strict=True))
    colors = dict(zip(marks, (PALETTE[2], PALETTE[3], PALETTE[0]), strict=True))
    for axes, part in zip(grid[0], parts, strict=True):
        names = list(dict.fromkeys(part["quantity"]))
        places = part["quantity"].map(names.index).astype(float)
        published = part.drop_duplicates("quantity")["published"]
        axes.scatter(
            published, range(len(names)), s=60, marker="D", facecolors="none", edgecolors="0.1", zorder=3
        )
        for on, mark in marks.items():
            mine = part[tested[part.index] == on]
            several = part.groupby("quantity")["tested"].transform("nunique")[mine.index] > 1
            y = places[mine.index] + 0.22 * several * (list(marks).index(on) - 1)
            value, low, high = (mine[name].to_numpy(float) for name in ("measured", "low", "high"))
            axes.errorbar(
                value,
                y,
                xerr=np.clip([value - low, high - value], 0, None),
                fmt=mark,
                color=colors[on],
                ms=4.5,
                lw=1.2,
                zorder=2,
            )
        spelled = [re.sub(r"\b[tf][pn]$", lambda found: CELLS[found[0]], name) for name in names]
        axes.set_yticks(range(len(names)), spelled, fontsize=8)
        axes.set(xlim=(-0.03, 1.03), ylim=(len(names) - 0.4, -0.6))
        axes.set_xlabel("share of the matrix" if part is not parts[0] else "value (0 to 1)")
    handles = [Line2D([], [], ls="", marker="D", mfc="none", mec="0.1", label="published")]
    handles += [
        Line2D([], [], ls="", marker=mark, color=colors[on], label=f"ours, {on}")
        for on, mark in marks.items()
        if (tested == on).any()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _tested_at(records):
    """At which epsilon attacked images were made, for a title."""
    found = records["tested"].str.split(" at ").str[1].dropna().unique()
    return f", FGSM at {found[0]}".replace(" ", NO_BREAK) if len(found) == 1 else ""


def _chosen(metrics, split_by):
    """The rows of all images and one way of splitting."""
    metrics = pd.DataFrame(metrics)
    kinds = sorted(metrics["split_by"].unique())
    if split_by is None and len(kinds) > 1:
        raise ValueError(
            f"These metrics hold several ways of splitting: choose split_by among {', '.join(kinds)}."
        )
    rows = metrics[(metrics["subset"] == "all") & (metrics["split_by"] == (split_by or kinds[0]))]
    # Images transferred from other models than the baseline have a matrix of their own.
    rows = rows[rows["source_model"].fillna("").isin(evaluation.SOURCES)]
    if rows.empty:
        raise ValueError(f"No metrics with split_by {split_by!r}.")
    return rows


def _how_many(rows):
    """How much the numbers rest on: "(94 images of 61 cases)", with spaces at which no title is broken."""
    first = rows.sort_values("n", ascending=False).iloc[0]
    said = f"({first['n']} images of {first['n_cases']} cases, split by {first['split_by']})"
    return " " + said.replace(" ", NO_BREAK)


def _malignant_share(rows):
    """The accuracy of answering malignant always."""
    first = rows.sort_values("n", ascending=False).iloc[0]
    malignant = 0 if pd.isna(first["tp"]) else first["tp"] + first["fn"]
    return malignant / first["n"]


@_styled
def confusion_matrices(rows):
    """A confusion matrix for each row of `evaluation.metrics`: counts, and the share of the true class.

    A class without images says so.
    """
    rows = pd.DataFrame(rows)
    models = _in_order(rows["model"], MODEL_COLORS)
    rows = rows.sort_values("model", key=lambda names: names.map(models.index), kind="stable")
    rows = rows.sort_values("epsilon", kind="stable")
    columns = min(max(len(models), 2), 5)
    lines = -(-len(rows) // columns)
    figure, grid = _panels(
        lines,
        columns,
        lines * (0.82 * WIDTH / columns + 1.1) + 0.5,
        "What the models answer: counts, and shares of the true class",
    )
    for axes in grid.flat[len(rows) :]:
        axes.axis("off")
    for k, (axes, row) in enumerate(zip(grid.flat, rows.to_dict("records"), strict=False)):
        counts = pd.DataFrame([[row["tn"], row["fp"]], [row["fn"], row["tp"]]]).astype(float).to_numpy()
        # Null counts stay null: 0 of 0 is no share.
        total = counts.sum(axis=1, keepdims=True)
        share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
        text = [
            ["" if np.isnan(s) else f"{c:.0f}\n{s:.0%}" for c, s in zip(*pair, strict=True)]
            for pair in zip(counts, share, strict=True)
        ]
        sns.heatmap(
            data=share,
            ax=axes,
            annot=np.array(text),
            fmt="",
            cmap="Blues",
            vmin=0,
            vmax=1,
            cbar=False,
            square=True,
            linewidths=1,
            linecolor="0.8",
            annot_kws={"fontsize": 10},
            xticklabels=["benign", "malignant"],
            yticklabels=["benign", "malignant"],
        )
        axes.grid(False)
        for place in np.flatnonzero(np.isnan(share[:, 0])):
            blank = {"facecolor": "white", "edgecolor": "none"}
            axes.text(1, place + 0.5, "no images", ha="center", va="center", color="0.4", bbox=blank)
        axes.tick_params(length=0, labelrotation=0)
        axes.tick_params("y", labelrotation=90)
        for label in axes.get_yticklabels():
            label.set_verticalalignment("center")
        name = textwrap.fill(wording.model_name(row["model"]), 20)
        axes.set_title(f"{name}\n{wording.attack_name(row['attack'], row['epsilon'])}", fontsize=9.5)
        axes.set_xlabel("answer")
        axes.set_ylabel("truth" if k % columns == 0 else "")
    return figure


def _heatmap(axes, cells, models, rows, label):
    """Fractions as colors with their numbers: a column for each of `models`, a row for each name in `rows`."""
    sns.heatmap(
        data=cells,
        ax=axes,
        annot=True,
        fmt=".2f",
        cmap="viridis",
        vmin=0,
        vmax=1,
        linewidths=0.5,
        linecolor="white",
        annot_kws={"fontsize": 9},
        cbar_kws={"label": label},
        xticklabels=[wording.model_name(model).replace(" ", "\n") for model in models],
        yticklabels=rows,
    )
    axes.tick_params(length=0, labelrotation=0)
    axes.grid(False)


@_styled
def comparison_heatmap(metrics, value="accuracy", split_by=None):
    """Every model (columns) under every attack and epsilon (rows), with numbers; blank where it was not run.

    metrics: rows of `evaluation.metrics`; value: a column of them, a fraction.
    """
    rows = _chosen(metrics, split_by)
    models = _in_order(rows["model"], MODEL_COLORS)
    attacks = _in_order(rows["attack"], ATTACK_LINES)
    table = rows.astype({value: float}).set_index(["attack", "epsilon", "model"])[value]
    runs = sorted({key[:2] for key in table.index}, key=lambda run: (attacks.index(run[0]), run[1]))
    cells = np.array([[table.get((*run, model), np.nan) for model in models] for run in runs], float)
    name = wording.heading(value)
    title = f"{name[0].upper()}{name[1:]}{_how_many(rows)}"
    figure, grid = _panels(1, 1, 0.27 * len(runs) + 1.6, title)
    axes = grid[0, 0]
    _heatmap(axes, cells, models, [wording.attack_name(*run) for run in runs], f"{name} (fraction)")
    for k in range(1, len(runs)):
        if runs[k][0] != runs[k - 1][0]:
            axes.axhline(k, color="black", linewidth=1)
    axes.set(xlabel="model", ylabel="attack and epsilon")
    return figure


# ---------------------------------------------------------------- the audit


@_styled
def transfer_matrix(metrics, epsilon, split_by=None):
    """Accuracy of every model (rows) on the FGSM images of every model (columns) at one epsilon; its own on the diagonal.

    metrics: rows of `evaluation.metrics`, transfers from all models among them; epsilon: a fraction.
    """
    metrics = pd.DataFrame(metrics)
    own = _chosen(metrics, split_by)
    rows = metrics[
        (metrics["subset"] == "all")
        & (metrics["split_by"] == own["split_by"].iloc[0])
        & metrics["attack"].isin(["fgsm", "transfer_fgsm"])
        & np.isclose(metrics["epsilon"], epsilon)
    ]
    rows = rows.assign(source=rows["source_model"].where(rows["attack"] != "fgsm", rows["model"]))
    sources, models = (_in_order(rows[name], MODEL_COLORS) for name in ("source", "model"))
    table = rows.astype({"accuracy": float}).groupby(["model", "source"])["accuracy"].mean()
    cells = np.array([[table.get((m, s), np.nan) for s in sources] for m in models], float)
    title = (
        f"Accuracy on FGSM images at {wording.format_epsilon(epsilon)} made for each model{_how_many(own)}"
    )
    figure, grid = _panels(1, 1, 0.5 * len(models) + 2, title)
    axes = grid[0, 0]
    _heatmap(axes, cells, sources, [wording.model_name(each) for each in models], "accuracy (fraction)")
    axes.set(
        xlabel="the images were made for (diagonal: for the model itself)", ylabel="the images are shown to"
    )
    return figure


@_styled
def steps_curves(audit):
    """What more steps of PGD find: accuracy and mean margin over the number of steps, a line for each model.

    audit: rows of `robustness.pgd_by_steps`. Stars are the settings with more restarts.
    """
    audit = pd.DataFrame(audit)
    first = audit.iloc[0]
    title = f"PGD at {wording.format_epsilon(first['epsilon'])} by its steps, {first['n']} test images"
    figure, grid = _panels(1, 2, 3.9, title)
    models = _in_order(audit["model"], MODEL_COLORS)
    colors = colors_of(models)
    names = {
        "accuracy": "accuracy (fraction of images)",
        "margin": "mean margin left (logits)",
    }
    for axes, (value, label) in zip(grid[0], names.items(), strict=True):
        for model in models:
            mine = audit[audit["model"] == model]
            more = mine["restarts"] > 1
            line = mine[~more].sort_values("steps")
            axes.plot(line["steps"], line[value], color=colors[model], marker="o")
            axes.plot(mine.loc[more, "steps"], mine.loc[more, value], "*", color=colors[model], ms=10)
        axes.set_xscale("symlog", linthresh=1)
        steps = sorted(audit["steps"].unique())
        axes.set_xticks(steps, [f"{k}" for k in steps])
        axes.minorticks_off()
        axes.set(xlabel="steps (0: clean)", ylabel=label)
    grid[0, 0].set_ylim(-0.03, 1.03)
    handles = [
        Line2D([], [], color=colors[model], marker="o", label=wording.model_name(model)) for model in models
    ]
    handles.append(Line2D([], [], color="0.3", marker="*", ms=10, ls="", label="with more restarts"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


@_styled
def reliability_and_abstention(curves, title):
    """Share of malignant images over P(malignant), a panel for each condition, and accuracy when the least sure are not answered.

    curves: {(model, name of the condition): (points of `audit.calibration`, table of `audit.abstention`)}, of two conditions.
    """
    conditions = list(dict.fromkeys(condition for _, condition in curves))
    models = _in_order({model for model, _ in curves}, MODEL_COLORS)
    colors, styles = colors_of(models), dict(zip(conditions, ("-", "--"), strict=True))
    figure, grid = _panels(1, 3, 3.9, title, sharey=True)
    panels, last = dict(zip(conditions, grid[0], strict=False)), grid[0, -1]
    for (model, condition), (points, kept) in curves.items():
        style = {"color": colors[model], "linestyle": styles[condition]}
        panels[condition].plot(points["p"], points["malignant"], marker="o", **style)
        enough = kept.head(max(1, len(kept) - FEW + 1))  # of the last few answers a share says little
        last.plot(enough["abstained"], enough["accuracy"], **style)
    for condition, axes in panels.items():
        axes.plot([0, 1], [0, 1], color="0.1", linestyle=":", linewidth=1.3)
        axes.set(title=condition, xlabel="P(malignant), mean of a bin", ylabel="share that is malignant")
    last.set(
        title="least sure left out", xlabel="share of images not answered", ylabel="accuracy on the others"
    )
    last.set(ylim=(-0.03, 1.03))
    last.yaxis.set_tick_params(labelleft=True)
    handles = [Line2D([], [], color=colors[model], label=wording.model_name(model)) for model in models]
    handles += [Line2D([], [], color="0.3", ls=styles[name], label=name) for name in conditions]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


@_styled
def certified_curves(certified):
    """Certified accuracy over the Euclidean radius, a line for each model: right, and certain to stay so within the radius.

    certified: rows with model, sigma, right (bool) and radius (pixel values in [0, 1], null where the smoothed model abstains).
    """
    certified = pd.DataFrame(certified)
    models = _in_order(certified["model"], MODEL_COLORS)
    colors = colors_of(models)
    count = len(certified[certified["model"] == models[0]])
    sigma = certified["sigma"].iloc[0]
    figure, grid = _panels(1, 1, 3.9, f"Randomized smoothing with noise of {sigma:g}, {count} test images")
    axes = grid[0, 0]
    for model in models:
        mine = certified[certified["model"] == model]
        radii = np.sort(mine.loc[mine["right"], "radius"].dropna().to_numpy())[::-1]
        steps = np.arange(1, len(radii) + 1) / len(mine)
        x, y = np.r_[radii[:1], radii, 0], np.r_[[0] * len(radii[:1]), steps, len(radii) / len(mine)]
        axes.step(x, y, where="post", color=colors[model])
    axes.set(xlabel="radius (Euclidean, pixel values in [0, 1])", ylabel="certified accuracy (fraction)")
    axes.set(ylim=(-0.03, 1.03), xlim=(0, None))
    handles = [Line2D([], [], color=colors[model], label=wording.model_name(model)) for model in models]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


@_styled
def trade_off(metrics, epsilon, split_by=None):
    """Which defense, at what cost: balanced accuracy in the worst case at one epsilon over clean, with 95 % intervals over cases.

    metrics: rows of `evaluation.metrics`; epsilon: a fraction.
    """
    value = "balanced_accuracy"
    rows = _chosen(metrics, split_by)
    worst = rows[(rows["attack"] == "worst_case") & np.isclose(rows["epsilon"], epsilon)]
    name = wording.heading(value)
    title = f"What a defense holds and what it costs: {name}{_how_many(rows)}"
    figure, grid = _panels(1, 1, 4.6, title)
    axes = grid[0, 0]
    models = _in_order(worst["model"], MODEL_COLORS)
    colors = colors_of(models)
    for model in models:
        mine = worst["model"] == model, (rows["model"] == model) & (rows["attack"] == "none")
        y, x = worst[mine[0]].iloc[0], rows[mine[1]].iloc[0]
        spread = [
            [[each[value] - each[f"{value}_low"]], [each[f"{value}_high"] - each[value]]] for each in (x, y)
        ]
        # With few cases an interval can lie beside its value.
        spread = [
            None if np.isnan(np.array(each, float)).any() else np.array(each, float).clip(0)
            for each in spread
        ]
        label = wording.model_name(model)
        axes.errorbar(x[value], y[value], spread[1], spread[0], fmt="o", color=colors[model], label=label)
    left = min(0.4, axes.get_xlim()[0])
    axes.plot([0, 1], [0, 1], color="0.1", linestyle=":", linewidth=1.3)
    axes.set(xlim=(left, 1.02), ylim=(-0.03, 1.03))
    axes.set(
        xlabel=f"clean {name} (fraction)",
        ylabel=f"{name} in the worst case at {wording.format_epsilon(epsilon)}",
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
