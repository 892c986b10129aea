"""The BreaKHis database itself: download, unpack, count, and the five folds that were published with it.

`python -m lib.database` (or `make data`) puts it under data/; a copy that is already there is used as it is.
"""

import errno
import lzma
import shutil
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from lib import data, files, runs

URL = "http://www.inf.ufpr.br/vri/databases/BreaKHis_v1.tar.gz"
# Images at 40X, 100X, 200X and 400X of each subtype (Spanhol et al. 2016, Table 1).
COUNTS = {
    "A": (114, 113, 111, 106),
    "F": (253, 260, 264, 237),
    "PT": (109, 121, 108, 115),
    "TA": (149, 150, 140, 130),
    "DC": (864, 903, 896, 788),
    "LC": (156, 170, 163, 137),
    "MC": (205, 222, 196, 169),
    "PC": (145, 142, 135, 138),
}
TOTAL = 7909
NOTE = (
    "BreaKHis: for research, see the terms at web.inf.ufpr.br/vri/databases (CC BY 4.0 as third parties state it). Cite Spanhol, "
    "Oliveira, Petitjean, Heutte: A Dataset for Breast Cancer Histopathological Image Classification, IEEE Trans. Biomed. Eng. "
    "63(7), 2016, doi:10.1109/TBME.2015.2496264."
)
# What the system says of a name that is both a file and a folder, or too long.
BAD_NAMES = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
FOLDS = ("fold1", "fold2", "fold3", "fold4", "fold5")


def fetch(folder=None, url=URL):
    """The folder BreaKHis_v1 below `folder` (by default data/): downloaded and unpacked first where it is missing.

    Half a download goes on where it ended. Raises ConnectionError where the network fails, ValueError for a damaged archive, one
    that reaches out of its folder or one without it; nothing half done is left under the final name.
    """
    folder = Path(folder or runs.home() / "data")
    done, archive = folder / "BreaKHis_v1", folder / "BreaKHis_v1.tar.gz"
    if done.is_dir():
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder / ".BreaKHis_v1.lock"):  # two runs that start together download once
        if not done.is_dir():
            print(NOTE, file=sys.stderr)
            try:
                runs.download(url, archive, "downloading BreaKHis")
            except ConnectionError as error:
                raise ConnectionError(f"{error}, or put it there by hand as {archive}.") from error
            _unpack(archive, done)
            archive.unlink()
    return done


def missing(index):
    """What an index lacks of the whole database, in words; "" where it is complete.

    index: of `data.index_images`.
    """
    found = index.groupby(["subtype", "magnification"]).size()
    lacks = [
        f"{subtype} at {magnification}X: {found.get((subtype, magnification), 0)} of {count}"
        for subtype, counts in COUNTS.items()
        for magnification, count in zip(data.MAGNIFICATIONS, counts, strict=True)
        if found.get((subtype, magnification), 0) != count
    ]
    return f"{len(index)} of {TOTAL} images; {'; '.join(lacks)}" if lacks else ""


def check(index, allow_incomplete=False):
    """Refuses, or says, what an index lacks of the whole database. Raises ValueError unless told to go on."""
    lacks = missing(index)
    if lacks and not allow_incomplete:
        raise ValueError(
            f"The database is incomplete: {lacks}. Complete that folder (a download is made anew where its folder is moved away), or set "
            "allow_incomplete to true to go on with what is there."
        )
    if lacks:
        tqdm.write(f"not the whole database: {lacks}")


def _unpack(archive, done):
    """The files of the archive's BreaKHis_v1 folder, to `done`, whole or not at all."""
    half = done.with_name(f"{done.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar, runs.writing(half):
            for member in tqdm(tar, desc="unpacking", unit="file", delay=10):
                target = (half.parent / member.name).resolve()
                if not target.is_relative_to(half.parent.resolve()):
                    raise ValueError(f"{archive}: {member.name!r} reaches out of its folder: refused.")
                if not member.isfile() or not target.is_relative_to(done.resolve()):
                    continue  # folders are made below; a link, or a file beside, is nothing that the database holds
                target = half / target.relative_to(done.resolve())
                if files.left_by_system(target.relative_to(half)):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "wb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file)
            while tar.fileobj.read(2**20):
                pass  # to its end, where the checksum is: damage can look like the end of the list of files
        if not half.is_dir():
            raise ValueError(f"it holds no folder {done.name}")
        half.rename(done)
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, OSError) as error:
        # A full disk, say, is not the archive's fault; what gzip and bz2 find wrong with it has no number.
        if getattr(error, "errno", None) not in (None, *BAD_NAMES):
            raise
        archive.unlink()
        raise ValueError(
            f"The archive is damaged or not BreaKHis ({error}): deleted, run again to download it anew."
        ) from error
    finally:
        shutil.rmtree(half, ignore_errors=True)


def split_by_fold(root, index, selected, source=None, seed=0, sources=()):
    """The five folds as published: the selected images five times, with split, split_by "fold" and fold 0 to 4.

    root: a folder that holds dsfold1.txt to dsfold5.txt anywhere below it, with lines name|magnification|fold|train or test.
    index: all images that are there (`data.index_images`), selected: those to split, source: images of other magnifications, for
    starting weights only, or None; they are split by the same files.
    sources: all magnifications that starting weights are trained on, also selected ones.
    A tenth of the training images of each class and magnification is drawn for validation, one where there are two to nine.
    The folds are by patient folder, so cases lie on both sides: how many is said. An image may be tested in several folds.
    Raises FileNotFoundError without the files, ValueError where a file names something that is no BreaKHis image, one
    that a whole database does not hold, or one twice, or lacks a selected one, or where a side lacks a class (`splits.check`).
    """
    # Here, since the runner imports this module, and perceptual hashes take long to import.
    from lib import splits

    wanted = selected if source is None else pd.concat([selected, source], ignore_index=True)
    whole = not missing(index)
    rng = np.random.default_rng(seed)
    tables = []
    for fold, name in enumerate(FOLDS):
        paths = [path for path in files.below(root) if path.name == f"ds{name}.txt"]
        if not paths:
            raise FileNotFoundError(
                f"No ds{name}.txt under {root}: the five folds are published beside the database (mkfold.tar.gz). Put its files there."
            )
        if len(paths) > 1:
            raise ValueError(
                f"{len(paths)} files ds{name}.txt under {root}: leave one ({paths[0]} or {paths[1]})."
            )
        (path,) = paths
        try:
            lines = _fold_lines(path)
            unknown = lines["image"][~lines["image"].isin(index["image"])]
            if whole and len(unknown):
                raise ValueError(
                    f"it names {len(unknown)} images that the database does not hold, the first {unknown.iloc[0]}"
                )
            side = lines.set_index("image")["split"].str.strip()
            table = wanted.assign(split=wanted["image"].map(side), split_by="fold", fold=fold)
            left = table["image"][~table["split"].isin(["train", "test"])]
            if len(left):
                raise ValueError(f"it says nothing of {len(left)} images, the first {left.iloc[0]}")
        except ValueError as error:
            raise ValueError(f"{path}: {error}. Take the file anew from mkfold.tar.gz.") from error
        # By magnification too: starting weights are trained, and validated, on one alone.
        for _, train in table[table["split"] == "train"].groupby(["label", "magnification"]):
            drawn = rng.permutation(train.index)[: max(len(train) > 1, len(train) // 10)]
            table.loc[drawn, "split"] = "validation"
        crossing = data.cases_on_two_sides(table[table["split"] != "validation"])
        tqdm.write(f"fold {fold + 1} as published: {len(crossing)} cases lie both in training and in test")
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    splits.check(table, splits.trained_parts(selected, source, sources))
    return table


def _fold_lines(path):
    """The lines of a fold file. Raises ValueError for one that is no such line, or an image that is named twice."""
    names = ["image", "magnification", "number", "split", "more"]
    lines = pd.read_csv(path, sep="|", header=None, names=names, dtype=str, keep_default_na=False)
    if lines["more"].fillna("").any():
        raise ValueError("a line has more than four parts")
    for image in lines["image"]:
        if data.FILE_NAME.fullmatch(image) is None:
            raise ValueError(f"{image!r} is no name of a BreaKHis image")
    if lines["image"].duplicated().any():
        raise ValueError(f"it names {lines['image'][lines['image'].duplicated()].iloc[0]} twice")
    return lines


if __name__ == "__main__":
    try:
        root = fetch(*sys.argv[1:2])
        lacks = missing(data.index_images(root))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if lacks:
        sys.exit(f"{root} is incomplete: {lacks}. Move it away and run again to download it anew.")
    print(f"{root} is complete")
