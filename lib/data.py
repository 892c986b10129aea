"""BreaKHis as tables: index a folder, select, read a split (`splits` makes it).

A table has one row per image; everything about an image is read from its file name
(Spanhol et al. 2016): SOB_B_TA-14-4659-40-001.png is biopsy procedure, class, subtype, year, slide, magnification, number.
Images of another source stand in a list beside them, images.csv.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from lib import runs

DATABASE = "BreaKHis"  # as a run on its images is called
CLASSES = ("benign", "malignant")
SUBTYPES = {
    "A": "adenosis",
    "F": "fibroadenoma",
    "PT": "phyllodes_tumor",
    "TA": "tubular_adenoma",
    "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
}
MAGNIFICATIONS = (40, 100, 200, 400)
LIST = "images.csv"  # what is known about images that are not named as BreaKHis names them
LISTED = ("path", "label", "case", "magnification")
FILE_NAME = re.compile(
    r"SOB_(?P<letter>[BM])_(?P<subtype>A|F|PT|TA|DC|LC|MC|PC)-(?P<year>\d+)-(?P<slide>\d+)(?P<part>[A-Z]*)"
    r"-(?P<magnification>40|100|200|400)-(?P<number>\d+)\.png"
)


def parse_name(name):
    """What a BreaKHis file name says: a dict of image, label, subtype, patient, case, magnification.

    The case is the slide number without its suffix letters: 14-21998AB and 14-21998CD are one case.
    Raises ValueError for a name that breaks the pattern, or a subtype that is not one of its class.
    """
    match = FILE_NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is not a BreaKHis file name (expected one like SOB_B_A-14-22549AB-100-001.png): rename it or move it away."
        )
    label = "benign" if match["letter"] == "B" else "malignant"
    if (list(SUBTYPES).index(match["subtype"]) < 4) != (label == "benign"):
        raise ValueError(f"{name!r} contradicts itself: {SUBTYPES[match['subtype']]} is not {label}.")
    case = f"{match['year']}-{match['slide']}"
    return {
        "image": name,
        "label": label,
        "subtype": match["subtype"],
        "patient": case + match["part"],
        "case": case,
        "magnification": int(match["magnification"]),
    }


def index_images(root, skip_bad_files=False):
    """One row per image below `root` (BreaKHis_v1, its parent, or any folder that holds such files), sorted by name.

    With a file `images.csv` in the folder, the images are those of its rows: path (from the folder), label (benign or malignant),
    case, magnification and, if there, subtype.
    Columns: image, path, label, subtype, patient, case, magnification, sha256 (of the file's bytes).
    Raises FileNotFoundError without images, ValueError for a name that breaks the pattern, a row that cannot be meant, or an image
    that is there twice; with `skip_bad_files` bad files and rows are left out, and said.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give the folder that holds BreaKHis_v1.")
    rows, bad = _listed(root) if is_listed(root) else _named(root)
    if bad:
        refuse(bad, "bad", skip_bad_files)
    if not rows:
        raise FileNotFoundError(
            f"No BreaKHis images under {root}: expected .../SOB_B_A-14-22549AB-100-001.png. Give the folder that holds BreaKHis_v1 "
            f"(linked folders below it are not looked into), or list your own images in {root / LIST}."
        )
    index = pd.DataFrame(rows).sort_values("image", ignore_index=True)
    twice = index["image"][index["image"].duplicated()].unique()
    if len(twice):
        raise ValueError(
            f"{len(twice)} images are there twice under {root} ({', '.join(twice[:3])}): give a folder that holds one copy."
        )
    index["sha256"] = [
        hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for path in tqdm(index["path"], desc="reading", unit="image", delay=10)
    ]
    return index


def is_listed(root):
    """Whether a folder holds other images than BreaKHis's, listed in images.csv."""
    return (Path(root).expanduser() / LIST).is_file()


def _named(root):
    """The images of a folder by their names: rows, and what is wrong with the others."""
    rows, bad = [], []
    for path in sorted(root.rglob("*.png")):
        try:
            rows.append(parse_name(path.name) | {"path": str(path.resolve())})
        except ValueError as error:
            bad.append(str(error))
    return rows, bad


def _listed(root):
    """The images of a folder by its list: rows, and what is wrong with the others."""
    try:
        listed = pd.read_csv(
            root / LIST, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig"
        )
    except ValueError as error:  # pandas' own errors and those of the encoding are such
        raise ValueError(
            f"{root / LIST} is not a table in UTF-8 with commas between the cells: {error}"
        ) from error
    if not isinstance(listed.index, pd.RangeIndex):
        raise ValueError(f"{root / LIST}: a line has more cells than the first, which names the columns.")
    if listed.empty:
        raise ValueError(f"{root / LIST} lists no image.")
    listed = listed.fillna("").rename(columns=str.strip).apply(lambda column: column.str.strip())
    if lacks := [name for name in LISTED if name not in listed]:
        raise ValueError(
            f"{root / LIST} lacks the columns {', '.join(lacks)}: its first line must name {','.join(LISTED)}, with commas between."
        )
    rows, bad, lines = [], [], {}
    for line, row in enumerate(listed.to_dict("records"), 2):
        if not any(row.values()):
            continue
        path = (root / row["path"]).resolve()
        problem = _problem(row, path, root)
        if not problem and path in lines:
            problem = f"{row['path']} stands in line {lines[path]} already"
        if problem:
            bad.append(f"line {line} of {LIST}: {problem}")
            continue
        lines[path] = line
        known = {name: row[name] for name in ("label", "case")}
        known |= {"magnification": int(float(row["magnification"])), "subtype": row.get("subtype", "")}
        rows.append(known | {"image": row["path"], "patient": row["case"], "path": str(path)})
    return rows, bad


def _problem(row, path, root):
    """What is wrong with a row of a list, in words; None where nothing is."""
    if row["label"] not in CLASSES:
        return f"label {row['label']!r} is neither {' nor '.join(CLASSES)}"
    if not row["case"]:
        return "no case; images of one patient must share one, or the split leaks"
    if not re.fullmatch(r"\d{1,6}(\.0*)?", row["magnification"]):
        return f"magnification {row['magnification']!r} is no whole number, such as 100"
    if not path.is_relative_to(root.resolve()):
        return f"{path} lies outside of {root}, where a change of it would not be noticed"
    if not path.is_file():
        return f"no file {path}"
    return None


def refuse(messages, what, skip):
    """Raises ValueError with what is wrong with some files, or says it where they are to be left out."""
    listed = "\n".join(f"  {message}" for message in messages[:10]) + (
        "\n  ..." if len(messages) > 10 else ""
    )
    if not skip:
        raise ValueError(
            f"{len(messages)} {what} files:\n{listed}\nSet skip_bad_files to true to leave them out."
        )
    tqdm.write(f"left out {len(messages)} {what} files:\n{listed}")


def fingerprint(index):
    """A short hash of names and contents, and of what a list says: two data sets with one fingerprint are the same."""
    told = ("label", "case", "magnification", "subtype")
    lines = []
    for row in index[["image", "sha256", *told]].to_dict("records"):
        line = f"{row['image']} {row['sha256']}"
        named = parse_name(row["image"]) if FILE_NAME.fullmatch(row["image"]) else {}
        if any(row[name] != named.get(name) for name in told):
            line += "".join(f" {row[name]}" for name in told)
        lines.append(line)
    text = "\n".join(sorted(lines))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def select(index, magnifications=(), subtypes=()):
    """The rows of these magnifications and subtypes (all where empty; of BreaKHis their codes), renumbered.

    Raises ValueError for ones that neither BreaKHis nor the index knows, and where a class would be missing.
    """
    magnifications, subtypes = runs.as_list(magnifications), runs.as_list(subtypes)
    known = {*MAGNIFICATIONS, *index["magnification"]}, {*SUBTYPES, *index["subtype"]}
    unknown = [m for m in magnifications if m not in known[0]] + [s for s in subtypes if s not in known[1]]
    if unknown:
        raise ValueError(
            f"Unknown magnification or subtype {unknown}: magnifications are {sorted(known[0])}, subtypes {sorted(known[1])}."
        )
    rows = index
    if len(magnifications):
        rows = rows[rows["magnification"].isin(magnifications)]
    if len(subtypes):
        rows = rows[rows["subtype"].isin(subtypes)]
    missing = [label for label in CLASSES if label not in set(rows["label"])]
    if missing:
        raise ValueError(
            f"No {' and no '.join(missing)} image at magnifications {list(magnifications) or 'all'} with subtypes "
            f"{list(subtypes) or 'all'}: both classes are needed. The folder holds {_counts(index)} (starting weights such as 200X are trained on images of that magnification)."
        )
    return rows.reset_index(drop=True)


def _counts(index):
    counts = index.groupby(["magnification", "label"]).size()
    return ", ".join(f"{n} {label} at {magnification}X" for (magnification, label), n in counts.items())


def load_split(path):
    """Read a split table, checked: no case on two sides of a fold where it says it is by case, no image twice in a fold.

    Raises ValueError where that does not hold.
    """
    text = dict.fromkeys(("image", "label", "subtype", "case", "patient"), str)
    table = pd.read_csv(path, dtype=text, keep_default_na=False)
    for (split_by, fold), rows in table.groupby(["split_by", "fold"]):
        if rows["image"].duplicated().any():
            raise ValueError(f"{path}: an image is listed twice in fold {fold} of the split by {split_by}.")
        crossing = cases_on_two_sides(rows)
        if split_by == "case" and len(crossing):
            raise ValueError(
                f"{path}: cases on two sides of fold {fold}: {', '.join(crossing[:5])}. Make the split anew."
            )
    return table


def cases_on_two_sides(rows):
    """The cases of one fold that have images both in training and in test or validation, sorted."""
    sides = rows.assign(training=rows["split"] == "train").groupby("case")["training"].nunique()
    return sorted(sides.index[sides > 1])


def labels_of(table):
    """int64 (n,): 0 benign, 1 malignant."""
    return (table["label"] == "malignant").to_numpy().astype(np.int64)
