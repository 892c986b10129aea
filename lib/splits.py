"""Which images a model learns from and which it is tested on, and what crosses between them."""

import re

import imagehash
import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from lib import data

# Of the sample's 922 images at 100X and 200X, pairs within a case differ in 4 bits or more, pairs across cases in 16 or more.
NEAR = 10
FEW_CASES = (
    15  # below this in a class, a test side of five cases takes too much from training: five folds instead
)
FOLDS = 5
TEST_CASES = 5  # the fewest cases in a class that still give an interval


def by_image(index, seed, folds=1):
    """The papers' split: in each class floor(0.8 n) train, floor(0.1 n) validation, the rest test (Li & Liu 2023, Table 1).

    With several folds every image is in one of the tests: each class is dealt into that many parts, one for test, and of the rest
    floor(0.1 n) for validation. Images of one case fall on several sides, so this split leaks. Returns the index, once for each
    fold, with split, split_by and fold. Raises ValueError where a class has fewer than ten images, or than folds.
    """
    rng = np.random.default_rng(seed)
    tables = [index.assign(split="train", split_by="image", fold=fold) for fold in range(folds)]
    for label in data.CLASSES:
        rows = rng.permutation(np.flatnonzero(index["label"] == label))
        train, validation = len(rows) * 8 // 10, len(rows) // 10
        if len(rows) < (needed := max(10, folds)):
            raise ValueError(
                f"{len(rows)} {label} images are too few to split: at least {needed} are needed."
            )
        tests = np.array_split(rows, folds) if folds > 1 else [rows[train + validation :]]
        for table, test in zip(tables, tests, strict=True):
            rest = rows[~np.isin(rows, test)]
            table.loc[test, "split"] = "test"
            table.loc[rest[len(rest) - validation :], "split"] = "validation"
    return pd.concat(tables, ignore_index=True)


def by_case(index, seed, folds=1):
    """The honest split: no case on two sides. Returns the index with split, split_by and fold.

    In one fold, where each class has fifteen cases or more: in each class a fifth of the cases (at least five, so that there is an
    interval) for test, a tenth (at least two) for validation. In several, and five where a class has fewer cases
    (StratifiedGroupKFold): every row once a fold, in each fold one part for test, and from the rest, in each class, cases that hold
    at least a tenth of the images for validation. Raises ValueError where a class has fewer than five cases, or than folds.
    """
    smallest = index.groupby("label")["case"].nunique().reindex(list(data.CLASSES), fill_value=0)
    # A case that holds both classes is drawn with those of the class that fewer cases hold.
    rarer = smallest.idxmin()
    cases = index.groupby("case")["label"].agg(
        lambda labels: rarer if (labels != labels.iloc[0]).any() else labels.iloc[0]
    )
    if smallest.min() < (needed := max(FOLDS, folds)):
        raise ValueError(
            f"Too few cases to split by case: {smallest['benign']} benign and {smallest['malignant']} malignant, "
            f"at least {needed} of each are needed. Use split_by: image, {'fewer folds, ' * (folds > FOLDS)}more magnifications or more subtypes."
        )
    rng = np.random.default_rng(seed)
    if folds == 1 and smallest.min() >= FEW_CASES:
        side = {}
        for label in data.CLASSES:
            shuffled = rng.permutation(cases.index[cases == label].to_numpy(copy=True))
            test = max(TEST_CASES, len(shuffled) // 5)
            validation = max(2, len(shuffled) // 10)
            side |= dict.fromkeys(shuffled, "train")
            side |= dict.fromkeys(shuffled[:test], "test")
            side |= dict.fromkeys(shuffled[test : test + validation], "validation")
        return index.assign(split=index["case"].map(side), split_by="case", fold=0)

    # Here, since only notebook 01 splits and importing it takes a second.
    from sklearn.model_selection import StratifiedGroupKFold

    tables, sizes = [], index["case"].value_counts()
    splitter = StratifiedGroupKFold(folds if folds > 1 else FOLDS, shuffle=True, random_state=seed)
    for fold, (rest, test) in enumerate(splitter.split(index, index["label"], index["case"])):
        table = index.assign(split="train", split_by="case", fold=fold)
        table.loc[test, "split"] = "test"
        held = cases[sorted(set(index["case"].iloc[rest]))]
        for label in data.CLASSES:
            shuffled = rng.permutation(held.index[held == label].to_numpy(copy=True))
            if not len(shuffled):
                continue
            images = sizes[shuffled].cumsum()
            chosen = shuffled[: 1 + np.searchsorted(images, images.iloc[-1] / 10)]
            table.loc[table["case"].isin(chosen), "split"] = "validation"
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def source_magnification(pretrained):
    """200 for starting weights "200X", which 02 trains on that magnification; None for any other starting weights."""
    match = re.fullmatch(r"(\d+)X", pretrained)
    if match and int(match[1]) not in data.MAGNIFICATIONS:
        raise ValueError(
            f"Unknown starting weights {pretrained!r}: magnifications are {list(data.MAGNIFICATIONS)}."
        )
    return int(match[1]) if match else None


def source_magnifications(starts):
    """The magnifications that several starting weights are trained on, sorted, each once."""
    return sorted({source_magnification(start) for start in starts} - {None})


def make(selected, source=None, split_by="image", seed=0, folds=1):
    """Both splits of the selected images, the one to train on (`split_by`) first; by case only where there are cases enough.

    source: images of other magnifications, for starting weights only, or None. They fall on the same side as their case where
    the split is by case. folds: of either split; by case five in place of one where cases are few. Raises ValueError where the
    split to train on cannot be made.
    """
    source = source if source is not None and len(source) else None
    everything = selected if source is None else pd.concat([selected, source], ignore_index=True)

    def split(kind):
        if kind == "case":
            return [by_case(everything, seed, folds)]
        return [by_image(part, seed, folds) for part in (selected, source) if part is not None]

    other = {"image": "case", "case": "image"}
    if split_by not in other:
        raise ValueError(
            f"Unknown split_by {split_by!r}: use image (as the papers split), case, or fold (as published)."
        )
    tables = split(split_by)
    try:
        tables += split(other[split_by])
    except ValueError as error:
        tqdm.write(f"only split by {split_by}: {error}")
    return pd.concat(tables, ignore_index=True)


def near_duplicates(pixels, table):
    """Pairs of images that look alike: a list of (image, image), by perceptual hash (64 bits, at most NEAR of them different).

    pixels: uint8 (n, S, W, 3), in the order of the table's rows.
    """
    hashes = [int(str(imagehash.phash(Image.fromarray(pixels[row]))), 16) for row in range(len(table))]
    hashes = np.array(hashes, np.uint64)
    names, pairs = table["image"].to_numpy(), []
    for row in range(len(table) - 1):
        near = np.flatnonzero(np.bitwise_count(hashes[row + 1 :] ^ hashes[row]) <= NEAR)
        pairs += [(names[row], names[row + 1 + other]) for other in near]
    return pairs


def leaks(table, pairs):
    """What crosses from training to test in each split: a row for each split_by, folds pooled.

    pairs: of `near_duplicates`. Columns: split_by, cases (with images in training and outside it), test_images, shared_case (test
    images whose case is in training), near_duplicates (test images with a near duplicate in training).
    """
    near = {}
    for one, two in pairs:
        near.setdefault(one, set()).add(two)
        near.setdefault(two, set()).add(one)
    found = []
    for split_by, rows in table.groupby("split_by"):
        crossing, tested, shared, alike = set(), 0, 0, 0
        for _, fold in rows.groupby("fold"):
            train, test = (fold[fold["split"] == side] for side in ("train", "test"))
            known = set(train["image"])
            crossing |= set(data.cases_on_two_sides(fold))
            tested += len(test)
            shared += int(test["case"].isin(set(train["case"])).sum())
            alike += sum(bool(near.get(image, set()) & known) for image in test["image"])
        found.append((split_by, len(crossing), tested, shared, alike))
    return pd.DataFrame(found, columns=["split_by", "cases", "test_images", "shared_case", "near_duplicates"])


def counts(table):
    """Images and cases per split_by, fold, split and label, as in the report's `split`."""
    keys = ["split_by", "fold", "split", "label"]
    return table.groupby(keys).agg(images=("image", "size"), cases=("case", "nunique")).reset_index()
