"""BreaKHis as tables: index a folder, select, read a split (`splits` makes it).

A table has one row per image; everything about an image is read from its file name
(Spanhol et al. 2016): SOB_B_TA-14-4659-40-001.png is biopsy procedure, class, subtype, year, slide, magnification, number.
Images of another source are listed in images.csv (`image_list`).
"""

import hashlib
import mimetypes
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from lib import files, image_list, runs
from lib.image_list import LIST

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
FILE_NAME = re.compile(
    r"SOB_(?P<letter>[BM])_(?P<subtype>A|F|PT|TA|DC|LC|MC|PC)-(?P<year>\d+)-(?P<slide>\d+)(?P<part>[A-Z]*)"
    r"-(?P<magnification>40|100|200|400)-(?P<number>\d+)\.(?i:png)"
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
        "image": name[:-4] + ".png",
        "label": label,
        "subtype": match["subtype"],
        "patient": case + match["part"],
        "case": case,
        "magnification": int(match["magnification"]),
    }


def index_images(root, skip_bad_files=False):
    """One row per image below `root` (BreaKHis_v1, its parent, or any folder that holds such files), sorted by name.

    With a file `images.csv` in the folder, the images are those of its rows (`image_list.read`). Columns: image, path, label,
    subtype, patient, case, magnification, sha256 (of the file's bytes, and of the page where the list names one) and, where the
    list has it, page. What systems leave in folders is skipped; what else is left out is said.
    Raises FileNotFoundError without images; ValueError for a name that breaks the pattern, a row that cannot be meant, an image that
    is there twice, cases that may be one, and in a list one image under two cases or labels. With `skip_bad_files` bad files and
    rows are left out, and said.
    """
    root = Path(os.path.abspath(Path(root).expanduser()))
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root} is not a folder: give the folder that holds BreaKHis_v1.")
    listed = is_listed(root)
    rows, bad = image_list.read(root, CLASSES) if listed else _named(root)
    if bad:
        refuse(bad, "bad", skip_bad_files)
    if not rows:
        raise FileNotFoundError(
            f"No BreaKHis images under {root}: expected .../SOB_B_A-14-22549AB-100-001.png. Give the folder that holds BreaKHis_v1 "
            f"(linked folders below it are not looked into), or list your own images in {root / LIST}."
        )
    if listed:
        image_list.unify(rows)
    paths = [row["path"] for row in rows]
    _say_left_out(root, files.beside(paths) if listed else files.below(root), paths)
    index = pd.DataFrame(rows).sort_values("image", ignore_index=True)
    twice = index["image"][index["image"].duplicated()].unique()
    if len(twice):
        raise ValueError(
            f"{len(twice)} images appear twice under {root} ({', '.join(twice[:3])}): give a folder that holds one copy of each."
        )
    index = _with_hashes(index, skip_bad_files)
    if listed:
        _check_slides(index)
    _check_contents(index, listed)
    return index


def is_listed(root):
    """Whether a folder holds other images than BreaKHis's, listed in images.csv."""
    return os.path.isfile(Path(root).expanduser() / LIST)


def _named(root):
    """The images of a folder by their names: rows, and what is wrong with the others.

    Raises ValueError where some are there only as copies in another format.
    """
    rows, bad, copies = [], [], {}
    for path in files.below(root):
        if path.suffix.lower() == ".png":
            try:
                rows.append(parse_name(path.name) | {"path": str(path)})
                if not path.is_file():
                    raise ValueError(
                        f"{rows.pop()['path']} is a link that leads nowhere: replace or remove it."
                    )
            except ValueError as error:
                bad.append(str(error))
        elif _is_picture(path) and FILE_NAME.fullmatch(f"{path.stem}.png"):
            copies[f"{path.stem}.png"] = path
    only = sorted(set(copies) - {row["image"] for row in rows})
    if only:
        raise ValueError(
            f"{len(only)} images of BreaKHis under {root} are there only as copies in another format, such as {copies[only[0]].name}; "
            f"{len(rows)} are there as .png. Take the published .png files, convert the copies to .png under the same names, or list "
            f"all images in {root / LIST}."
        )
    return rows, bad


def _is_picture(path):
    return (mimetypes.guess_type(path.name)[0] or "").startswith("image/")


def _say_left_out(root, found, paths):
    """Say how many pictures among the files that were found are not at these paths, by their endings."""
    taken = set(map(os.path.realpath, paths))
    left = [path for path in found if _is_picture(path) and os.path.realpath(path) not in taken]
    if left:
        endings = pd.Series([path.suffix.lower() for path in left]).value_counts()
        told = ", ".join(f"{count} {ending}" for ending, count in endings.items())
        tqdm.write(f"{root}: other pictures are left out: {told}, such as {left[0].name}")


def _with_hashes(index, skip_bad_files):
    """The index with sha256: of each file's bytes, and of the page where one is named."""
    hashes, unreadable = [], []
    for path in tqdm(index["path"], desc="reading", unit="image", delay=10):
        try:
            hashes.append(runs.file_hash(path))
        except OSError as error:
            hashes.append(None)
            unreadable.append(f"{path} cannot be read ({error.strerror})")
    if unreadable:
        refuse(unreadable, "unreadable", skip_bad_files)
    index = index.assign(sha256=hashes).dropna(subset="sha256").reset_index(drop=True)
    if "page" in index:
        index["sha256"] = list(map(page_hash, index["sha256"], index["page"]))
    return index


def page_hash(sha256, page):
    """What stands for an image, given the sha256 of its file and the page that a list names: text, "" where it names none."""
    return hashlib.sha256(f"page {page} of {sha256}".encode()).hexdigest() if page else sha256


def _check_slides(index):
    """Raises ValueError where a list gives images of one slide of BreaKHis to several cases."""
    names = index["path"].map(lambda path: FILE_NAME.fullmatch(Path(path).name))
    slides = names.map(lambda match: f"{match['year']}-{match['slide']}" if match else None)
    for slide, cases in index.groupby(slides)["case"].unique().items():
        if len(cases) > 1:
            raise ValueError(
                f"{LIST}: images of BreaKHis's slide {slide} are listed under {len(cases)} cases ({', '.join(cases[:4])}): give them one, "
                "or the split leaks."
            )


def _check_contents(index, listed):
    """Several files with the same content: refused under two cases or labels of a list, otherwise said.

    BreaKHis itself has some, and what its file names say cannot be corrected: those are said in a list too.
    """
    same = [rows for _, rows in index[index["sha256"].duplicated(keep=False)].groupby("sha256", sort=False)]
    clash = [
        rows
        for rows in same
        if len(rows[["case", "label"]].drop_duplicates()) > 1
        and not all(FILE_NAME.fullmatch(Path(path).name) for path in rows["path"])
    ]
    if listed and clash:
        raise ValueError(
            f"{LIST} has the same picture, file for file the same content, under two cases or two labels ({len(clash)}):\n"
            f"{_lines(map(_told, clash))}\nGive each one case and one label, or take out the rows that are wrong: in two cases a picture "
            "can lie on both sides of a split."
        )
    if same:
        tqdm.write(
            f"the same picture, with the same content, is there under several names ({len(same)}):\n{_lines(map(_told, same))}"
        )


def say_alike(pairs, table):
    """Say which images of different cases look alike. pairs: of `splits.near_duplicates`; table: with image, case and label."""
    rows = table.set_index("image", drop=False)
    across = [rows.loc[list(pair)] for pair in pairs if rows["case"][pair[0]] != rows["case"][pair[1]]]
    if across:
        tqdm.write(
            f"images of different cases that look alike ({len(across)} pairs): compare them before you train, since a picture that is "
            f"there twice should have one case, or it can lie on both sides of the split.\n{_lines(map(_told, across))}"
        )


def _told(rows):
    return " and ".join(f"{row.image} (case {row.case}, {row.label})" for row in rows.itertuples())


def _lines(texts):
    """The first ten texts, a line each."""
    texts = list(texts)
    return "\n".join([f"  {text}" for text in texts[:10]] + ["  ..."] * (len(texts) > 10))


def refuse(messages, what, skip):
    """Raises ValueError with what is wrong with some files, or says it where they are to be left out."""
    if not skip:
        raise ValueError(
            f"{len(messages)} {what} files:\n{_lines(messages)}\nMend them, or set skip_bad_files to true to leave out what cannot be mended."
        )
    tqdm.write(f"left out {len(messages)} {what} files:\n{_lines(messages)}")


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

    Raises ValueError where that does not hold, and where the file is not as notebook 01 wrote it.
    """
    if runs.is_damaged(path):
        raise ValueError(f"{path} is not as notebook 01 wrote it: run notebook 01 again.")
    text = dict.fromkeys(("image", "label", "subtype", "case", "patient", "page"), str)
    table = pd.read_csv(path, dtype=text, keep_default_na=False)
    for (split_by, fold), rows in table.groupby(["split_by", "fold"]):
        if rows["image"].duplicated().any():
            raise ValueError(f"{path}: an image is listed twice in fold {fold} of the split by {split_by}.")
        crossing = cases_on_two_sides(rows)
        if split_by == "case" and len(crossing):
            raise ValueError(
                f"{path}: cases on two sides of fold {fold}: {', '.join(crossing[:5])}. Run notebook 01 again."
            )
    return table


def cases_on_two_sides(rows):
    """The cases of one fold that have images both in training and in test or validation, sorted."""
    sides = rows.assign(training=rows["split"] == "train").groupby("case")["training"].nunique()
    return sorted(sides.index[sides > 1])


def labels_of(table):
    """int64 (n,): 0 benign, 1 malignant."""
    return (table["label"] == "malignant").to_numpy().astype(np.int64)
