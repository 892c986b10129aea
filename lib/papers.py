"""What the two papers published, where their numbers contradict themselves, and a run's numbers beside them.

Li & Liu, Bioengineering 2023, 10(8), 973, and the student paper of Alam et al. Everything here is a pure function of the
published numbers and of a run's table of predictions and split.
"""

import numpy as np

from lib import data, evaluation, wording

LI, ALAM = "Li & Liu 2023", "Alam et al."
COLUMNS = [
    *("paper", "table", "quantity", "tested", "published", "measured", "low", "high", "n"),
    *("deviations", "reason"),
]
TESTED = {  # the attack -> the images that a model was tested on
    "none": "clean images",
    "fgsm": "its own FGSM images",
    "transfer_fgsm": "the baseline's FGSM images",
}
SIDES = ("train", "validation", "test")
SAID = {ALAM: 7902}  # how many images there are in all, in the text
PUBLISHED_SPLITS = {  # images: Li & Liu, Table 1; Alam et al., table of the split
    LI: {"benign": (515, 64, 65), "malignant": (722, 90, 91)},
    ALAM: {"benign": (1984, 248, 248), "malignant": (4343, 542, 544)},
}
# What was tested -> the model and attack that stand for it here. Where the paper does not say on which images, all that fit.
CONDITIONS = {
    LI: {
        "original model": [("baseline", "none")],
        "trained with noise": [("gaussian_noise", "none")],
        "original model under FGSM": [("baseline", "fgsm")],
        "trained with noise under FGSM": [("gaussian_noise", "fgsm"), ("gaussian_noise", "transfer_fgsm")],
    },
    ALAM: {
        "model A": [("baseline", "none")],
        "model A under FGSM": [("baseline", "fgsm")],
        "model B": [("merged_fgsm", "none"), ("merged_fgsm", "fgsm"), ("merged_fgsm", "transfer_fgsm")],
    },
}
# paper, table, what was tested, quantity, published value; "malignant accuracy" counts malignant test images alone.
CLAIMS = (
    (LI, "Table 2", "original model", "accuracy", 0.9872),
    (LI, "Table 2", "trained with noise", "accuracy", 0.9808),
    (LI, "Table 3", "original model", "malignant accuracy", 0.9890),
    (LI, "Table 3", "trained with noise", "malignant accuracy", 0.9670),
    (LI, "Table 3", "original model under FGSM", "malignant accuracy", 0.1099),
    (LI, "Table 3", "trained with noise under FGSM", "malignant accuracy", 0.2747),
    *(
        (ALAM, "metrics" if published <= 1 else "confusion matrices", condition, quantity, published)
        for condition, values in {
            "model A": (0.96, 0.90, 0.90, 0.85, 0.90, 450, 470, 50, 30),
            "model A under FGSM": (0.25, 0.30, 0.25, 0.15, 0.30, 125, 250, 375, 250),
            "model B": (0.75, 0.70, 0.70, 0.60, 0.65, 300, 400, 200, 100),
        }.items()
        for quantity, published in zip(
            ("accuracy", "sensitivity", "specificity", "precision", "recall", "tp", "tn", "fp", "fn"),
            values,
            strict=True,
        )
    ),
)
# The fall that fixes the epsilon they do not give: the attacked model, on which images, to which accuracy.
FALLS = {LI: ("malignant", 0.1099), ALAM: ("all", 0.25)}
RECIPES = {
    LI: {
        "magnifications": [100],
        "subtypes": ["A", "F", "PT", "TA", "DC"],
        "split_by": "image",
        "folds": 1,
        "image_size": 224,
        "pretrained": "chest X-rays",
        "epochs": 400,
        "patience": 0,
        "batch_size": 32,
        "learning_rate": 0.001,
    },
    ALAM: {
        "magnifications": [],
        "subtypes": [],
        "split_by": "image",
        "folds": 1,
        "pretrained": "transfer learning",
    },
}
TRAINING = (
    (
        "which augmentation is not given: always a random square of the field of view, flips and right-angle rotations, as tissue has "
        "no upright and these make no new pixel values; more where it is named",
        ["augmentation"],
    ),
    (
        "the learning rate's course is not given: it falls to 0 along a cosine, which needs no further parameter",
        [],
    ),
    (
        "momentum of the running statistics is not given: 0.3, as torch's 0.1 is too slow for a short training",
        [],
    ),
    (
        "which epoch is kept is not given: the one with the least validation loss, as accuracy hardly tells epochs apart on few images",
        [],
    ),
    (
        "how 700 x 460 pixels become square for a test is not given: the square in the middle, so that nothing is squeezed",
        ["image_size"],
    ),
    (
        "the precision of training is not given: bfloat16 where the processor is made for it, as it halves the time; every reported "
        "number is computed in float32",
        ["precision"],
    ),
)
CHEST_WEIGHTS = (
    "which chest X-ray weights, and how color enters them, is not given: those of all sets of X-rays, the first convolution for each "
    "of three channels with a third of its weights, so that a gray image gives what it gave",
    ["pretrained"],
)
# What a paper does not say: what was chosen and why, and the parameters of a run that hold it.
OPEN = {
    LI: [
        (
            "FGSM's epsilon is not given: the one at which our baseline, on validation images, falls nearest to theirs, as the fall "
            "is all that is known",
            [],
        ),
        (
            "how strong the noise is, is not given: about a tenth of the value range shows in an image and leaves its nuclei to be "
            "seen",
            ["noise_sigma", "other_sigmas"],
        ),
        (
            "whether noise is drawn once or anew, and clipped or not, is not given: by default anew for every batch and clipped, as "
            "noise in training most often is, and so that images stay images; before or after squares, flips and turns is the same "
            "noise",
            ["noise_drawn"],
        ),
        (
            "whose gradient attacks the model trained with noise is not given: its own first, which an attacker who knows it would "
            "take, then the baseline's images",
            [],
        ),
        *TRAINING,
    ],
    ALAM: [
        (
            "optimizer, rate, batch, epochs, size and starting weights are not given: Adam and those of the run, the same for both models",
            ["learning_rate", "batch_size", "epochs", "image_size", "pretrained"],
        ),
        (
            "FGSM's epsilon is not given: the one at which our model A, on validation images, falls nearest to theirs, as the fall "
            "is all that is known",
            [],
        ),
        (
            "how long model B trains is not given: half the epochs over twice the images, so that it has the updates of model A",
            [],
        ),
        (
            "at which epsilon the merged images are made is not given: one that is hard to see; they are made "
            "of whole images, before cropping, and rounded to 8 bits as files would be",
            ["train_epsilon"],
        ),
        (
            "on which images model B was tested is not given: clean, under its own FGSM and under model A's, since each asks something else",
            [],
        ),
        *TRAINING,
    ],
}


def contradictions():
    """What the published numbers say about each other, by computation: (paper, sentence, whether they agree)."""
    found = []
    totals = {
        paper: {label: sum(sides) for label, sides in PUBLISHED_SPLITS[paper].items()}
        for paper in PUBLISHED_SPLITS
    }
    published = {(paper, table, what, quantity): value for paper, table, what, quantity, value in CLAIMS}
    (_, _, benign), (_, _, malignant) = PUBLISHED_SPLITS[LI]["benign"], PUBLISHED_SPLITS[LI]["malignant"]
    for model in ("original model", "trained with noise"):
        right = round(published[LI, "Table 2", model, "accuracy"] * (benign + malignant))
        of_malignant = round(published[LI, "Table 3", model, "malignant accuracy"] * malignant)
        found.append(
            (
                LI,
                f"{model}: Tables 2 and 3 imply {right - of_malignant} of {benign} benign test images right",
                0 <= right - of_malignant <= benign,
            )
        )
    found.append(
        (
            LI,
            f"Table 3 holds the {malignant} malignant test images alone: a model that always answers malignant has "
            f"{malignant} of {malignant} there, and {malignant / (benign + malignant):.0%} on the whole test set",
            True,
        )
    )
    benign, malignant = (PUBLISHED_SPLITS[ALAM][label][2] for label in ("benign", "malignant"))
    for what in CONDITIONS[ALAM]:
        said = {
            quantity: value
            for (paper, _, condition, quantity), value in published.items()
            if condition == what
        }
        tp, tn, fp, fn = (said[cell] for cell in ("tp", "tn", "fp", "fn"))
        n = tp + tn + fp + fn
        low, high = sorted((said["sensitivity"], said["specificity"]))
        found += [
            (
                ALAM,
                f"{what}: the matrix holds {n} images, the test set {benign + malignant}",
                n == benign + malignant,
            ),
            (
                ALAM,
                f"{what}: {tp + fn} malignant images in the matrix, {malignant} in the test set",
                tp + fn == malignant,
            ),
            (
                ALAM,
                f"{what}: accuracy {said['accuracy']:.2f} must lie between sensitivity and specificity, {low:.2f} and {high:.2f}",
                low <= said["accuracy"] <= high,
            ),
            (
                ALAM,
                f"{what}: sensitivity and recall are one quantity, given as {said['sensitivity']:.2f} and {said['recall']:.2f}",
                said["sensitivity"] == said["recall"],
            ),
        ]
        for quantity, value in {
            "accuracy": (tp + tn) / n,
            "sensitivity": tp / (tp + fn),
            "specificity": tn / (tn + fp),
            "precision": tp / (tp + fp),
        }.items():
            found.append(
                (
                    ALAM,
                    f"{what}: {quantity} is {said[quantity]:.2f} in the text and {value:.3f} by the matrix",
                    abs(said[quantity] - value) < 0.005,
                )
            )
    whole = sum(totals[ALAM].values())
    said = SAID[ALAM]
    found.append((ALAM, f"the split holds {whole:,} images, the text says {said:,}", whole == said))
    return found


def nearest_epsilon(predictions, paper):
    """The epsilon at which the baseline, on validation images under FGSM, comes nearest to a paper's fall.

    predictions: the table, with rows of split "validation". Returns (epsilon, accuracy, reached), reached False where it stays
    above the published value, and half an image more, at every epsilon; None without such rows.
    """
    images, target = FALLS[paper]
    rows = predictions[
        (predictions["split"] == "validation")
        & (predictions["model"] == "baseline")
        & (predictions["attack"] == "fgsm")
    ]
    if images == "malignant":
        rows = rows[rows["label"] == "malignant"]
    if rows.empty:
        return None
    by_epsilon = evaluation.is_right(rows).groupby(rows["epsilon"])
    accuracy = by_epsilon.mean()
    epsilon = (accuracy - target).abs().idxmin()
    return (
        float(epsilon),
        float(accuracy[epsilon]),
        bool((accuracy <= target + 0.5 / by_epsilon.size()).any()),
    )


def deviations(paper, parameters, images=None):
    """How a run differs from a paper's recipe, and what was chosen where the paper is silent: sentences.

    parameters: the run's; images: how many it stands on.
    """
    said = []
    theirs = sum(map(sum, PUBLISHED_SPLITS[paper].values()))
    if images not in (None, theirs):
        said.append(f"{images:,} images instead of {theirs:,}")
    for name, asked in RECIPES[paper].items():
        if name not in parameters:  # a notebook run by hand leaves no record of it
            said.append(f"{name} is not recorded; theirs is {_words(asked)}")
            continue
        used = parameters[name]
        if not _is_asked(name, used, asked):
            said.append(f"{name} {_words(used)} instead of {_words(asked)}")
    chest = str(parameters.get("pretrained", "")).startswith("densenet121")
    for text, names in OPEN[paper] + [CHEST_WEIGHTS] * chest:
        values = [f"{name} {_words(parameters[name], 'none')}" for name in names if name in parameters]
        said.append(f"{text} ({', '.join(values)})" if values else text)
    return said


def _is_asked(name, used, asked):
    if name == "pretrained":
        return used != "none" if asked == "transfer learning" else str(used).startswith("densenet121")
    whole = {"magnifications": data.MAGNIFICATIONS, "subtypes": data.SUBTYPES}
    if name in whole:  # in any order; none named means all
        return set(used or whole[name]) == set(asked or whole[name])
    return used == asked


def _words(value, empty="all"):
    if isinstance(value, list):
        return ", ".join(map(str, value)) or empty
    return str(value)


def records(predictions, split, parameters):
    """Every published number beside ours, as `papers` of results.json.

    predictions: the table; split: of `splits.counts`; parameters: the run's. measured is null, with a `reason`, where the run
    has no such model or attack.
    """
    found, counts = [], split.groupby(["split_by", "fold"])["images"].sum()
    parameters = parameters | {
        "folds": split.loc[split["split_by"] == parameters["split_by"], "fold"].nunique()
    }
    for paper, table in PUBLISHED_SPLITS.items():
        ours = split[(split["split_by"] == "image") & (split["fold"] == 0)].set_index(["label", "split"])[
            "images"
        ]
        for label, sides in table.items():
            for side, published in zip((*SIDES, "all"), (*sides, sum(sides)), strict=True):
                at = list(SIDES) if side == "all" else [side]
                there = label in ours and set(at) <= set(ours[label].index)
                measured = int(ours[label][at].sum()) if there else None
                found.append(_counted(paper, f"{label} images, {side}", published, measured))
        if paper in SAID:
            found.append(_counted(paper, "images", SAID[paper], int(ours.sum()) if len(ours) else None))
    for paper, table, what, quantity, published in CLAIMS:
        chosen = nearest_epsilon(predictions, paper)
        for model, attack in CONDITIONS[paper][what]:
            record = _record(paper, table, f"{what}: {quantity}", TESTED[attack], published)
            rows = predictions[
                (predictions["split"] == "test")
                & (predictions["model"] == model)
                & (predictions["attack"] == attack)
                & (predictions["split_by"] == parameters["split_by"])
                & predictions["source_model"].isin(evaluation.SOURCES)
            ]
            if attack != "none":
                if chosen is None:
                    found.append(record | {"reason": "no validation images were attacked to choose epsilon"})
                    continue
                epsilon, _, reached = chosen
                rows = rows[np.isclose(rows["epsilon"], epsilon)]
                record["tested"] += f" at {wording.format_epsilon(epsilon)}"
                if not reached:
                    record["reason"] = (
                        "their fall is not reached at any epsilon of the run; the nearest is shown"
                    )
            if rows.empty:
                found.append(record | {"reason": f"the run has no {model} under {attack}"})
            else:
                found.append(record | measure(rows, quantity))
    said = {paper: deviations(paper, parameters, int(counts.max())) for paper in PUBLISHED_SPLITS}
    return [record | {"deviations": said[record["paper"]]} for record in found]


def _counted(paper, quantity, published, measured):
    reason = "" if measured is not None else "the run has no split by image"
    table = "Table 1" if paper == LI else "split"
    return _record(paper, table, quantity, "", published) | {"measured": measured, "reason": reason}


def _record(paper, table, quantity, tested, published):
    values = (paper, table, quantity, tested, published, None, None, None, None, [], "")
    return dict(zip(COLUMNS, values, strict=True))


def measure(rows, quantity):
    """One published quantity, measured on test rows of one evaluation: measured, low, high (95 %, over cases) and n.

    Counts (tp, tn, fp, fn) have no interval: they grow with the test set.
    """
    found = evaluation.metrics(rows).iloc[0]
    if quantity in ("tp", "tn", "fp", "fn"):
        return {"measured": int(found[quantity]), "n": len(rows)}
    name = {"malignant accuracy": "sensitivity", "recall": "sensitivity"}.get(quantity, quantity)
    counted = {"sensitivity": ["tp", "fn"], "specificity": ["tn", "fp"], "precision": ["tp", "fp"]}
    n = int(found[counted[name]].fillna(0).sum()) if name in counted else len(rows)
    if n == 0:
        return {"n": 0, "reason": "no image to count"}
    (values,) = evaluation.records(found[[name, f"{name}_low", f"{name}_high"]].to_frame().T)
    return dict(zip(("measured", "low", "high"), values.values(), strict=True)) | {"n": n}
