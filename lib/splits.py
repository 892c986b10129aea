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
MOST = 0.6  # largest share of a class's images that one held-out side may take, so that training keeps a good part
FEW = 8  # training images of a class; with fewer, the counts are shown (8 is what `by_image` leaves of its minimum of ten)
SIDES = ("train", "validation", "test")


def by_image(index, seed, folds=1):
    """The papers' split: in each class floor(0.8 n) train, floor(0.1 n) validation, the rest test (Li & Liu 2023, Table 1).

    With several folds every image is in one of the tests: each class is dealt into that many parts, one for test, and of the rest
    floor(0.1 n) for validation. Images of one case fall on several sides, so this split leaks. Returns the index, once for each
    fold, with split, split_by and fold. Raises ValueError where a class has fewer than ten images, or than folds.
    """
    for label in data.CLASSES:
        if (found := (index["label"] == label).sum()) < (needed := max(10, folds)):
            raise ValueError(f"{found} {label} images are too few to split: at least {needed} are needed.")
    rng = np.random.default_rng(seed)
    tables = [index.assign(split="train", split_by="image", fold=fold) for fold in range(folds)]
    for label in data.CLASSES:
        rows = rng.permutation(np.flatnonzero(index["label"] == label))
        train, validation = len(rows) * 8 // 10, len(rows) // 10
        tests = np.array_split(rows, folds) if folds > 1 else [rows[train + validation :]]
        for table, test in zip(tables, tests, strict=True):
            rest = rows[~np.isin(rows, test)]
            table.loc[test, "split"] = "test"
            table.loc[rest[len(rest) - validation :], "split"] = "validation"
    return pd.concat(tables, ignore_index=True)


def by_case(index, seed, folds=1, parts=None):
    """The honest split: no case on two sides. Returns the index with split, split_by and fold.

    In one fold, where each class has fifteen cases or more: in each class a fifth of the cases (at least five, so that there is an
    interval) for test, a tenth (at least two) for validation. In several, and five where a class has fewer cases
    (StratifiedGroupKFold): every row once a fold, in each fold one part for test, and from the rest, in each class, cases that hold
    at least a tenth of the images for validation. Cases are taken in random order, but never most of a class's images (`MOST`).
    parts: the magnifications that models are trained on (`trained_parts`); by default all together. Each part gets both classes in
    training and validation where that is possible (`check` says where it is not).
    Raises ValueError where a class has fewer than five cases, or than folds.
    """
    smallest = index.groupby("label")["case"].nunique().reindex(list(data.CLASSES), fill_value=0)
    # A case that holds both classes is drawn with those of the class that fewer cases hold.
    rarer = smallest.idxmin()
    cases = index.groupby("case")["label"].agg(
        lambda labels: rarer if (labels != labels.iloc[0]).any() else labels.iloc[0]
    )
    if smallest.min() < (needed := max(FOLDS, folds)):
        fewer = "fewer folds, " if folds > FOLDS else ""
        raise ValueError(
            f"Too few cases to split by case: {smallest['benign']} benign and {smallest['malignant']} malignant, "
            f"at least {needed} of each are needed. Use split_by: image, {fewer}more magnifications or more subtypes."
        )
    parts = parts or trained_parts(index)
    sizes = {label: _case_sizes(index, label, parts) for label in data.CLASSES}
    if folds == 1 and smallest.min() >= FEW_CASES:
        rng, side = np.random.default_rng(seed), dict.fromkeys(cases.index, "train")
        for label in data.CLASSES:
            shuffled = rng.permutation(cases.index[cases == label].to_numpy(copy=True))
            studied = sizes[label][["all", 0]]  # starting weights are not tested
            test = _held_out(shuffled, studied, count=max(TEST_CASES, len(shuffled) // 5))
            rest = shuffled[~np.isin(shuffled, test)]
            validation = _held_out(rest, sizes[label], count=max(2, len(shuffled) // 10))
            side |= dict.fromkeys(test, "test") | dict.fromkeys(validation, "validation")
        return index.assign(split=index["case"].map(side), split_by="case", fold=0)

    # Here, since only notebook 01 splits and importing it takes a second.
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(folds if folds > 1 else FOLDS, shuffle=True, random_state=seed)
    dealt = [
        set(index["case"].iloc[test]) for _, test in splitter.split(index, index["label"], index["case"])
    ]
    table = _in_folds(index, dealt, cases, sizes, seed)
    if missing := _count_empty(table, parts):
        # The splitter evens out images; where a class has few cases, that may cost one fold all of them.
        other = _in_folds(index, _dealt(cases, sizes, rarer, len(dealt), seed), cases, sizes, seed)
        table = other if _count_empty(other, parts) < missing else table
    return table


def _case_sizes(index, label, parts):
    """A row for each case: all its images, and under 0, 1, ... those of this class in each part."""
    rows = index[index["label"] == label]
    columns = {"all": index["case"].value_counts()}
    for number, part in enumerate(parts):
        columns[number] = rows.loc[rows["magnification"].isin(part), "case"].value_counts()
    return pd.DataFrame(columns).fillna(0).astype(int)


def _held_out(shuffled, sizes, count=0, share=0.0):
    """Cases to leave training: in their order, until there are `count`, with this share of the images and some of every part.

    Skips a case that would take the total past `MOST`, or leave none of a part for training.
    """
    sizes = sizes.loc[shuffled].to_numpy()
    whole = sizes.sum(axis=0)
    chosen, taken = [], 0 * whole
    for case, own in zip(shuffled, sizes, strict=True):
        enough = len(chosen) >= count and taken[0] >= share * whole[0]
        if enough and ((taken > 0) | (whole == 0)).all():
            break
        after = taken + own
        if after[0] <= MOST * whole[0] and ((after < whole) | (whole == 0)).all():
            chosen.append(case)
            taken = after
    return chosen


def _in_folds(index, tests, cases, sizes, seed):
    """The table of folds with these sets of test cases; validation is drawn from the rest."""
    rng, tables = np.random.default_rng(seed), []
    for fold, test in enumerate(tests):
        side = dict.fromkeys(cases.index, "train") | dict.fromkeys(test, "test")
        rest = cases[~cases.index.isin(test)]
        for label in data.CLASSES:
            shuffled = rng.permutation(rest.index[rest == label].to_numpy(copy=True))
            side |= dict.fromkeys(_held_out(shuffled, sizes[label], share=0.1), "validation")
        tables.append(index.assign(split=index["case"].map(side), split_by="case", fold=fold))
    return pd.concat(tables, ignore_index=True)


def _dealt(cases, sizes, rarer, folds, seed):
    """The sets of test cases of each fold, dealt one by one, large cases first, so that each fold gets some of both classes."""
    rng, tests = np.random.default_rng(seed), [[] for _ in range(folds)]
    for label in sorted(data.CLASSES, key=lambda label: label != rarer):
        images = sizes[label][0]
        shuffled = rng.permutation(cases.index[cases == label].to_numpy(copy=True))
        for case in images[shuffled].sort_values(ascending=False, kind="stable").index:
            # Folds with fewer than two cases come first: if two folds held all the rest, one case would be left to train and validate on.
            have = [images[test] for test in tests]
            order = [(min((each > 0).sum(), 2), each.sum(), fold) for fold, each in enumerate(have)]
            tests[min(order)[-1]].append(case)
    return tests


def trained_parts(selected, source=None, sources=()):
    """The magnifications that models are trained on: those of the selected images together, then each source by itself.

    source: images of other magnifications, or None; sources: magnifications that starting weights are trained on.
    """
    studied = sorted(selected["magnification"].unique())
    alone = {*sources, *(() if source is None else source["magnification"])}
    return [studied, *([each] for each in sorted(alone) if [each] != studied)]


def check(table, parts):
    """Raise ValueError, with the counts, where a side of a fold lacks a class; say where few images are left to train on.

    table: of one split; parts: as in `trained_parts`. Sources need no test side: no model is judged on them.
    """
    split_by, empty, few = table["split_by"].iloc[0], [], []
    for fold, part, counts in _tallies(table, parts):
        at = "" if part == parts[0] else f", starting weights at {part[0]}X"
        sides = [f"{side} {row['benign']} + {row['malignant']}" for side, row in counts.iterrows()]
        said = f"fold {fold}{at}: {', '.join(sides)}"
        if (counts == 0).any(axis=None):
            empty.append(said)
        elif counts.loc["train"].min() < FEW or (counts.loc["train"] < counts.loc["validation"]).any():
            few.append(said)
    if empty:
        raise ValueError(
            f"The split by {split_by} leaves a side without one of the classes ({_first(empty)}; images, benign + malignant): "
            "take more images, fewer folds, or another split_by."
        )
    if few:
        tqdm.write(
            f"The split by {split_by} leaves few images to train on ({_first(few)}; benign + malignant): "
            "results of such a fold are unreliable."
        )


def _first(said, most=3):
    more = f"; and {len(said) - most} more" if len(said) > most else ""
    return "; ".join(said[:most]) + more


def _tallies(table, parts):
    """For each part and fold (fold, part, images); images: a row for each side that is needed, a column for each class."""
    for part in parts:
        needed = list(SIDES if part == parts[0] else SIDES[:2])
        rows = table[table["magnification"].isin(part)]
        for fold in sorted(table["fold"].unique()):
            own = rows[rows["fold"] == fold]
            counts = pd.crosstab(own["split"], own["label"])
            yield fold, part, counts.reindex(index=needed, columns=list(data.CLASSES), fill_value=0)


def _count_empty(table, parts):
    return sum((counts == 0).sum(axis=None) for *_, counts in _tallies(table, parts))


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


def make(selected, source=None, split_by="image", seed=0, folds=1, sources=()):
    """Both splits of the selected images, the one to train on (`split_by`) first; the other only where it can be made.

    source: images of other magnifications, for starting weights only, or None. They fall on the same side as their case where
    the split is by case. folds: of either split; by case five in place of one where cases are few. sources: all magnifications
    that starting weights are trained on, also selected ones. Raises ValueError where the split to train on cannot be made, or
    leaves a side without images of a class (`check`).
    """
    source = source if source is not None and len(source) else None
    everything = selected if source is None else pd.concat([selected, source], ignore_index=True)
    parts = trained_parts(selected, source, sources)

    beside = [] if source is None else [source]
    apart = [rows.reset_index(drop=True) for each in beside for _, rows in each.groupby("magnification")]

    def each_by_image(tables):
        return pd.concat([by_image(each, seed, folds) for each in tables], ignore_index=True)

    def split(kind):
        # Starting weights are trained on the first split alone.
        needed = parts if kind == split_by else parts[:1]
        if kind == "case":
            table = by_case(everything, seed, folds, needed)
        else:
            table = each_by_image([selected, *beside])
            if _count_empty(table, needed):  # drawn together, one of several sources may get none of a class
                table = each_by_image([selected, *apart])
        check(table, needed)
        return table

    other = {"image": "case", "case": "image"}
    if split_by not in other:
        raise ValueError(
            f"Unknown split_by {split_by!r}: use image (as the papers split), case, or fold (as published)."
        )
    tables = [split(split_by)]
    try:
        tables.append(split(other[split_by]))
    except ValueError as error:
        tqdm.write(f"split by {split_by} only, since the other split cannot be made: {error}")
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
