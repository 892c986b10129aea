"""What the two papers published, where their numbers contradict themselves, and a run's numbers beside them.

Li & Liu, "Adversarial Attack and Defense in Breast Cancer Deep Learning Systems", Bioengineering 2023, 10(8), 973, and a student
paper by Alam, Raim, Saifee and Santo, which names no venue and no year. Everything here is a pure function of the published
numbers and of a run's table of predictions and split.
"""

from itertools import combinations, product

import numpy as np

from lib import data, database, decoding, evaluation, wording

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
# How far a metric of Alam et al. may be from the value it was rounded to. They call all but accuracy "approximately", "around" or
# "near" a value, and every such value is a multiple of five points; accuracy is in whole points.
ROUNDED = dict.fromkeys(("sensitivity", "specificity", "precision", "recall"), 0.025) | {"accuracy": 0.005}
COARSER = dict.fromkeys(ROUNDED, 0.05)
ROUNDING = (
    "Alam et al. call their sensitivity, specificity, precision and recall approximate, and all of these values are multiples of five "
    "points. Here each is taken as rounded to the nearest five points (off by at most 2.5), and accuracy as rounded to whole points "
    "(off by at most 0.5). A contradiction is what such rounding cannot explain; each one says whether it would remain with "
    "every value off by five points."
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
INFERRED = ("magnifications", "subtypes")  # of Li & Liu: `selections` with their numbers of images
TRAINING = (
    (
        "the augmentation is not given: always a random square of the field of view, flips and right-angle rotations, as tissue has "
        "no upright and these make no new pixel values; more where it is named",
        ["augmentation"],
    ),
    (
        "the course of the learning rate is not given: it falls to 0 along a cosine, which needs no further parameter",
        [],
    ),
    (
        "momentum of the running statistics is not given: 0.3, as torch's 0.1 is too slow for a short training",
        [],
    ),
    (
        "which epoch is kept is not given: the one with the least loss on clean validation images, for their defense too, "
        "as accuracy hardly tells epochs apart on few images",
        [],
    ),
    (
        "the precision of training is not given: bfloat16 where the processor is made for it, as it halves the time; every reported "
        "number is computed in float32",
        ["precision"],
    ),
    (
        "images that are stored at another size than 700 x 460, halved or squeezed to a square as in some copies of the database, "
        "are brought back to that shape, with the detail that they have left",
        [],
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
            "no magnification or subtype is named: all benign subtypes and ductal carcinoma at 100X is an inference, as no other choice "
            "of subtypes and magnifications has their numbers of images",
            [],
        ),
        (
            "FGSM's epsilon is not given: the one at which our baseline, on validation images, falls nearest to theirs, as the fall "
            "is all that is known",
            [],
        ),
        (
            "how strong the noise is, is not given: about a tenth of the value range shows in an image and leaves its nuclei "
            "visible",
            ["noise_sigma", "other_sigmas"],
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
            "their model B has additional measures to tell authentic from manipulated images, which they do not describe (a detector "
            "is the natural reading): not built here yet, so ours is the merged training alone",
            [],
        ),
        (
            "on which images model B was tested is not given: clean, under its own FGSM and under model A's, since each asks something else",
            [],
        ),
        *TRAINING,
    ],
}


def selections(benign, malignant):
    """Every choice of whole subtypes, at the same magnifications for both classes, with these numbers of images.

    Returns (magnifications, benign subtypes, malignant subtypes) for each, as tuples.
    """
    kinds = list(data.SUBTYPES)
    subtypes = {"benign": _subsets(kinds[:4]), "malignant": _subsets(kinds[4:])}
    wanted = {"benign": benign, "malignant": malignant}
    found = []
    for magnifications in _subsets(data.MAGNIFICATIONS):
        columns = [data.MAGNIFICATIONS.index(each) for each in magnifications]
        fitting = [
            [some for some in subtypes[label] if sum(_images(some, columns)) == wanted[label]]
            for label in data.CLASSES
        ]
        found += [(magnifications, *both) for both in product(*fitting)]
    return found


def _subsets(items):
    return [some for size in range(1, len(items) + 1) for some in combinations(items, size)]


def _images(subtypes, columns):
    """The images of each of these subtypes at the magnifications in these columns of `database.COUNTS`."""
    return [sum(database.COUNTS[subtype][column] for column in columns) for subtype in subtypes]


def _inferred_selection():
    """How Li & Liu's magnification and subtypes follow from their numbers of images, and whether only one choice has these."""
    benign, malignant = (sum(PUBLISHED_SPLITS[LI][label]) for label in data.CLASSES)
    found = selections(benign, malignant)
    tried = len(_subsets(data.MAGNIFICATIONS)) * len(_subsets(range(4))) ** 2
    choices = []
    for magnifications, *both in found:
        columns = [data.MAGNIFICATIONS.index(each) for each in magnifications]
        sums = [
            f"{' + '.join(map(str, _images(some, columns)))} images of {', '.join(some)}" for some in both
        ]
        choices.append(f"{' against '.join(sums)} at {', '.join(f'{each}X' for each in magnifications)}")
    sentence = (
        f"no magnification or subtype is named, but only {len(found)} of {tried:,} choices of them in BreaKHis has {benign} benign and "
        f"{malignant} malignant images: {'; '.join(choices)}. That these are the images they used is an inference"
    )
    return sentence, len(found) == 1


def contradictions():
    """What the published numbers say about each other, by computation: (paper, sentence, whether they agree).

    Metrics of Alam et al. are taken as rounded (`ROUNDED`); what does not agree even so says whether it would with `COARSER` too.
    """
    return [(LI, *each) for each in _of_li()] + [(ALAM, *each) for each in _of_alam()]


def _of_li():
    found = [_inferred_selection()]
    published = {
        (table, what, quantity): value for paper, table, what, quantity, value in CLAIMS if paper == LI
    }
    benign, malignant = (PUBLISHED_SPLITS[LI][label][2] for label in data.CLASSES)
    for model in ("original model", "trained with noise"):
        right = round(published["Table 2", model, "accuracy"] * (benign + malignant))
        of_malignant = round(published["Table 3", model, "malignant accuracy"] * malignant)
        of_benign = right - of_malignant
        found.append(
            (
                f"{model}: Tables 2 and 3 imply {of_benign} of {benign} benign and {of_malignant} of {malignant} malignant test "
                "images right when clean",
                0 <= of_benign <= benign,
            )
        )
    return [
        *found,
        (
            f"Table 3 holds the {malignant} malignant test images alone: a model that always answers malignant has "
            f"{malignant} of {malignant} there, and {malignant / (benign + malignant):.0%} on the whole test set. What benign images "
            "do under FGSM is not published, so whether the model trained with noise then leans to malignant cannot be told",
            True,
        ),
    ]


def _of_alam():
    published = {what: _metrics_of(what) for what in CONDITIONS[ALAM]}
    test = dict(zip(data.CLASSES, (PUBLISHED_SPLITS[ALAM][label][2] for label in data.CLASSES), strict=True))
    matrices = {
        "images": [said["tp"] + said["tn"] + said["fp"] + said["fn"] for said in published.values()],
        "benign images": [said["tn"] + said["fp"] for said in published.values()],
        "malignant images": [said["tp"] + said["fn"] for said in published.values()],
    }
    sizes = (sum(test.values()), test["benign"], test["malignant"])
    found = [
        (
            f"the matrices of {', '.join(published)} hold {', '.join(f'{n:,}' for n in held)} {name}; all are of one test set, which has {size}",
            set(held) == {size},
        )
        for (name, held), size in zip(matrices.items(), sizes, strict=True)
    ]
    for what, said in published.items():
        rounded, coarser = (_metrics_agree(said, test, width) for width in (ROUNDED, COARSER))
        for (sentence, agrees), (_, explained) in zip(rounded, coarser, strict=True):
            if not agrees:
                sentence += f"; five points would {'explain it' if explained else 'not explain it either'}"
            found.append((f"{what}: {sentence}", agrees))
    whole = sum(map(sum, PUBLISHED_SPLITS[ALAM].values()))
    found.append((f"the split holds {whole:,} images, the text says {SAID[ALAM]:,}", whole == SAID[ALAM]))
    return found


def _metrics_of(what):
    return {
        quantity: value for paper, _, tested, quantity, value in CLAIMS if (paper, tested) == (ALAM, what)
    }


def _metrics_agree(said, test, width):
    """Whether one model's published values allow each other: (sentence, whether they agree) for each pair that is bound together.

    said: {quantity: value}; test: images of each class in the test set; width: how far each quantity may be from its value.
    """
    tp, tn, fp, fn = (said[cell] for cell in ("tp", "tn", "fp", "fn"))
    near = {quantity: (said[quantity] - most, said[quantity] + most) for quantity, most in width.items()}
    by_matrix = {
        "accuracy": (tp + tn) / (tp + tn + fp + fn),
        "sensitivity": tp / (tp + fn),
        "specificity": tn / (tn + fp),
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
    }
    if said["recall"] == said["sensitivity"]:  # the same sentence twice
        del by_matrix["recall"]
    found = [
        (
            f"{quantity} is given as {said[quantity]:.2f}, the matrix has {value:.3f}",
            _meet(near[quantity], (value, value)),
        )
        for quantity, value in by_matrix.items()
    ]
    rates = "sensitivity", "specificity"
    low, high = (extreme(said[rate] for rate in rates) for extreme in (min, max))

    def precision(sensitivity, specificity):
        right = sensitivity * test["malignant"]
        return right / (right + (1 - specificity) * test["benign"])

    implied = tuple(precision(*ends) for ends in zip(*(near[rate] for rate in rates), strict=True))
    return [
        *found,
        (
            f"accuracy is given as {said['accuracy']:.2f}; it must lie between sensitivity and specificity, {low:.2f} and {high:.2f}",
            _meet(
                near["accuracy"], (min(near[rate][0] for rate in rates), max(near[rate][1] for rate in rates))
            ),
        ),
        (
            f"sensitivity and recall are one quantity, given as {said['sensitivity']:.2f} and {said['recall']:.2f}",
            _meet(near["sensitivity"], near["recall"]),
        ),
        (
            f"precision is given as {said['precision']:.2f}; sensitivity, specificity and the test set's {test['benign']} benign and "
            f"{test['malignant']} malignant images imply {precision(*(said[rate] for rate in rates)):.3f}",
            _meet(near["precision"], implied),
        ),
    ]


def _meet(one, two):
    """Whether two ranges (low, high) have a value in common, their ends included."""
    return max(one[0], two[0]) <= min(one[1], two[1]) + 1e-9


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


def deviations(paper, parameters, images=None, epsilon=None):
    """How a run differs from a paper's recipe, and what was chosen where the paper is silent: sentences.

    parameters: the run's; images: how many it stands on; epsilon: the one (a fraction) that stands for the paper's, None where
    none was chosen.
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
            inferred = ", which is inferred" if paper == LI and name in INFERRED else ""
            said.append(f"{name} {_words(used)} instead of {_words(asked)}{inferred}")
    said += _depending_on(paper, parameters, epsilon)
    chest = str(parameters.get("pretrained", "")).startswith("densenet121")
    for text, names in OPEN[paper] + [CHEST_WEIGHTS] * chest:
        values = [f"{name} {_words(parameters[name], 'none')}" for name in names if name in parameters]
        said.append(f"{text} ({', '.join(values)})" if values else text)
    return said


def _depending_on(paper, parameters, epsilon):
    """The deviations that a run has or has not, by its parameters."""
    said, size = [], parameters.get("image_size")
    if size != decoding.FIELD_OF_VIEW[1]:
        theirs = (
            'their text says "cropped to 224 x 224 x 3"'
            if paper == LI
            else "how theirs become square is not given"
        )
        said.append(
            f"images are resized to a height of {size or 'image_size'} pixels before squares are cut from them, so that nothing is squeezed "
            f"(random squares in training, the middle one in tests); {theirs}"
        )
    drawn = parameters.get("noise_drawn", "anew")
    if paper == LI and drawn != "once":
        said.append(
            'noise is drawn anew for every batch, as noise in training most often is, although their text ("before training the model", '
            '"at the beginning of the training phase") points to noise drawn once, which noise_drawn once gives'
        )
    if paper == LI:
        clipped = "they are not" if drawn == "anew_unclipped" else "they are, so that images stay images"
        said.append(f"whether noisy images are clipped to the range of pixel values is not given: {clipped}")
    merged = parameters.get("train_epsilon")
    if paper == ALAM and epsilon is not None and merged is not None and not np.isclose(merged / 255, epsilon):
        said.append(
            f"the merged images are made at {wording.format_epsilon(merged / 255)}, the models attacked at "
            f"{wording.format_epsilon(epsilon)}, as chosen on validation images; the paper gives neither epsilon"
        )
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
    nearest = {paper: nearest_epsilon(predictions, paper) for paper in PUBLISHED_SPLITS}
    for paper, table, what, quantity, published in CLAIMS:
        chosen = nearest[paper]
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
    said = {
        paper: deviations(paper, parameters, int(counts.max()), chosen and chosen[0])
        for paper, chosen in nearest.items()
    }
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
