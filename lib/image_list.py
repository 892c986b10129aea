"""The list of images that are not named as BreaKHis names them, images.csv: read as people and spreadsheets write it.

What is certainly one name (Unicode forms, spaces, capital letters, a spreadsheet's decimals) is made one and said; what may be one
is refused until the list decides, or one patient could lie on both sides of a split.
"""

import functools
import os
import re
import unicodedata
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from lib import files

LIST = "images.csv"
LISTED = ("path", "label", "case", "magnification")
MAGNIFICATION = re.compile(r"[x×]?\s*(\d{1,6})([.,]0*)?\s*[x×]?", re.IGNORECASE)
PAGE = re.compile(r"0*([1-9]\d{0,3})(\.0*)?")
NUMBER = re.compile(r"(\d+)[.,]0+")  # 7 as a spreadsheet may write it
SLIDE = re.compile(r"(\d+-\d+)[a-z]+")  # with the letters of one part, as in 14-21998AB


def read(root, labels):
    """The rows of `root`/images.csv and, in words, what is wrong with the others.

    labels: those that a row may have. A row is a dict of image (the path below `root`, with slashes), path, label, case, patient,
    magnification, subtype and, where the list has such a column, page: text, counted from 1, "" where none is named.
    Raises ValueError where the file is no such table.
    """
    table = _table(root / LIST)
    rows, bad, lines, of_systems = [], [], {}, []
    names_in = functools.cache(files.names_in)
    for line, row in enumerate(table.to_dict("records"), 2):
        if not any(row.values()):
            continue
        if files.left_by_system(Path(row["path"].replace("\\", "/")).name):
            of_systems.append(row["path"])
            continue
        path = Path(os.path.normpath(files.find(root, row["path"], names_in)))
        page = found[1] if (found := PAGE.fullmatch(row.get("page", ""))) else ""
        problem = _problem(row, path, root, labels)
        if not problem and (path, page) in lines:
            problem = f"{row['path']} is already listed on line {lines[path, page]}"
        if problem:
            bad.append(f"line {line} of {LIST}: {problem}")
            continue
        lines[path, page] = line
        image = unicodedata.normalize("NFC", path.relative_to(root).as_posix())
        known = {name: row.get(name, "") for name in ("label", "case", "subtype")}
        known["magnification"] = int(MAGNIFICATION.fullmatch(row["magnification"])[1])
        if "page" in row:
            known["page"] = page
        rows.append(known | {"image": f"{image} page {page}" if page else image, "path": str(path)})
    if of_systems:
        tqdm.write(
            f"{LIST}: rows left out that name hidden files or files of a system ({len(of_systems)}), such as {of_systems[0]}"
        )
    return rows, bad


def unify(rows):
    """Give what is certainly one label, case or subtype its first spelling in all rows, and say so.

    Raises ValueError, naming them, where two cases may be one.
    """
    for column, what in (("label", "labels"), ("case", "cases"), ("subtype", "subtypes")):
        spellings = {}
        for row in rows:
            written = spellings.setdefault(_same(row[column]), {})
            written[row[column]] = None
            row[column] = _clean(next(iter(written)))
        several = [list(written) for written in spellings.values() if len(written) > 1]
        if several:
            tqdm.write(
                f"{LIST}: {what} written in several ways, each taken as one ({len(several)}): {_examples(several)}"
            )
    for row in rows:
        row["label"], row["patient"] = _same(row["label"]), row["case"]
    alike = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        alike.setdefault(_alike(case), []).append(case)
    unclear = [cases for cases in alike.values() if len(cases) > 1]
    if unclear:
        raise ValueError(
            f"{LIST} may name one patient in several ways ({len(unclear)}): {_examples(unclear)}. Where they are one patient, write them "
            "alike, or the split leaks. Where they are several, tell them apart by more than zeros, punctuation, accents or the letters "
            "after a slide number: 'A 7' and 'B 007', say, in place of '7' and '007'."
        )


def _examples(groups):
    """The first groups of names, in words: "'7' and '007'; 'p 1' and 'p-1'; ..."."""
    told = [" and ".join(map(repr, names[:4])) + " ..." * (len(names) > 4) for names in groups[:5]]
    return "; ".join(told + ["..."] * (len(groups) > 5))


def _table(path):
    """The list as text, its columns named in lower case, outer spaces taken off the cells."""
    try:
        listed = pd.read_csv(
            path, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig"
        )
    except ValueError as error:  # pandas' own errors and those of the encoding are such
        raise ValueError(f"{path} is not a table in UTF-8 with commas between the cells: {error}") from error
    if not isinstance(listed.index, pd.RangeIndex):
        raise ValueError(f"{path}: a line has more cells than the first, which names the columns.")
    if listed.empty:
        raise ValueError(f"{path} lists no image.")
    listed = listed.fillna("").rename(columns=lambda name: _clean(name).lower())
    if lacks := [name for name in LISTED if name not in listed]:
        raise ValueError(
            f"{path} lacks the columns {', '.join(lacks)}: its first line must name {','.join(LISTED)}, with commas between."
        )
    columns = [re.sub(r"\.\d+$", "", name) for name in listed]  # pandas calls a second column case case.1
    if twice := [name for name in (*LISTED, "subtype", "page") if columns.count(name) > 1]:
        raise ValueError(f"{path} names the columns {', '.join(twice)} twice: leave one of each.")
    return listed.loc[:, ~listed.columns.duplicated()].apply(lambda column: column.str.strip())


def _problem(row, path, root, labels):
    """What is wrong with a row of a list, in words; None where nothing is."""
    if _same(row["label"]) not in labels:
        return f"label {row['label']!r} is neither {' nor '.join(labels)}"
    if not _clean(row["case"]):
        return "no case; images of one patient must share one, or the split leaks"
    if not MAGNIFICATION.fullmatch(row["magnification"]):
        return f"magnification {row['magnification']!r} is not a whole number (e.g. 100)"
    if row.get("page") and not PAGE.fullmatch(row["page"]):
        return f"page {row['page']!r} is not the number of a page, counted from 1"
    if not path.is_relative_to(root):
        return f"{path} lies outside of {root}, where a change of it would not be noticed: copy it into that folder"
    if os.path.islink(path) and not os.path.exists(path):
        return f"{row['path']} is a link that leads nowhere"
    if not os.path.isfile(path):
        return f"no file {row['path']!r} in {root}"
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        return f"{row['path']} is a link to a file outside of {root}: copy that file in place of the link"
    return None


def _clean(text):
    """A name as it is seen: in one Unicode form, with single spaces, without characters that cannot be seen."""
    seen = [each for each in text if each.isspace() or unicodedata.category(each) not in ("Cc", "Cf")]
    return unicodedata.normalize("NFC", " ".join("".join(seen).split()))


def _same(text):
    """What all spellings of what is certainly one name have in common."""
    text = unicodedata.normalize("NFC", _clean(text).casefold())
    return NUMBER.sub(r"\1", text) if NUMBER.fullmatch(text) else text


def _alike(text):
    """What all spellings of what may be one name have in common: its words and numbers, in order."""
    text = _same(text)
    text = SLIDE.sub(r"\1", text) if SLIDE.fullmatch(text) else text
    text = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))
    # A plus stays: HER2+ is not HER2.
    words = "".join(" " if unicodedata.category(each)[0] in "PSZC" and each != "+" else each for each in text)
    parts = re.findall(r"\d+|[^\d\s]+", words)
    return tuple(part.lstrip("0") or part[:1] for part in parts) or text
