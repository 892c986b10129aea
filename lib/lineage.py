"""Whether what earlier notebooks left in a run still belongs together.

A notebook that is run again leaves the files of those after it as they were. So each finished file notes beside it
(`runs.write_recipe`) from which sides of the split it was made ("sides", `loading.Side.origin`) and from which checkpoints
("models", `checkpoints`), and whoever takes one asks `check` first.
"""

import sys
from pathlib import Path

from lib import data, runs

MOST_NAMED = 10  # files in one message


class StaleError(ValueError):
    """Files are missing, or were made from other images, models or settings than the run holds now; the text says what to do."""


def checkpoints(*paths):
    """What a recipe says of the checkpoints that something is made from: {file name: sha256}."""
    return {path.name: runs.file_hash(path) for path in paths}


def check(paths, split, image_size=None):
    """Raise StaleError, naming the notebooks to run again, unless each file is there, whole, and made from this split and these models.

    paths: finished files in runs/<run>/ or one folder below it; split: rows of split.csv that hold the sides they were made from;
    image_size: pixels, where it must be this one.
    """
    found, known = {}, {}
    for path in map(Path, paths):
        if problem := _problem(path, split, image_size, known):
            found[path] = problem
    if found:
        raise StaleError(_message(found))


def check_alike(paths):
    """Raise StaleError unless pieces of predictions agree in image size, seed and the steps of each attack.

    paths: of predictions/. The first piece that has a value sets it for the others.
    """
    found, first = {}, {}
    for path in map(Path, paths):
        made = runs.recipe_of(path)
        attack, _, steps = made["attack"]
        values = {
            f"steps of {attack}": steps,
            "seed": made["seed"],
            "image size": made["sides"][0]["image_size"],
        }
        for name, value in values.items():
            other, where = first.setdefault(name, (value, path.name))
            if value != other:
                found[path] = f"made with {name} {value}, but {where} with {other}"
    if found:
        raise StaleError(_message(found))


def check_dataset(run, split):
    """Raise StaleError unless dataset.json describes the images of the split (rows of split.csv); 01 writes both, one after the other."""
    about, rows = runs.dataset(run), split.drop_duplicates("image")
    rows = rows[rows["magnification"].isin(about["magnifications"])]
    if data.fingerprint(rows) != about["fingerprint"]:
        raise StaleError(
            f"runs/{run}/dataset.json describes other images than split.csv: run notebooks/01_data_split.ipynb again (with run={run!r})."
        )


def parameters_used(folder):
    """The parameters with which the runner made what a run holds; {} where a notebook was run by hand with others since, which is said."""
    used = runs.parameters_used(folder.name)
    made = runs.recipe_of(folder / "models" / "baseline.safetensors")
    found = [(name, made.get(name)) for name in ("epochs", "batch_size", "learning_rate")]
    for piece in (folder / "predictions").glob("*.csv.gz"):
        made = runs.recipe_of(piece)
        attack, _, steps = made["attack"]
        found += [("seed", made["seed"]), ("image_size", made["sides"][0]["image_size"])]
        found += [("pgd_steps", steps)] * (attack == "pgd")
    for name, value in found:
        if name in used and used[name] != value:
            print(
                f"parameters are not recorded: the runner had {name} {used[name]}, but {value} was used since by hand",
                file=sys.stderr,
            )
            return {}
    return used


def _problem(path, split, image_size, known):
    """Why a file cannot be taken, in words, or None. known: what was computed for the files before it."""
    if not path.is_file():
        return "missing"
    made = runs.recipe_of(path)
    if not {"sides", "models"} & set(made):
        return "nothing beside it says what it was made from"
    if not runs.is_whole(path):
        return "damaged, it is not as it was written"
    for side in made.get("sides", ()):
        key = repr(side)
        if key not in known:
            known[key] = _fingerprint(split, side) == side["fingerprint"]
        if not known[key]:
            return f"made from other {side['split']} images than the split holds now"
        if image_size not in (None, side["image_size"]):
            return f"made at {side['image_size']} pixels, not at {image_size}"
    for name, sha256 in made.get("models", {}).items():
        checkpoint = _run_of(path) / "models" / name
        if checkpoint not in known:
            known[checkpoint] = runs.file_hash(checkpoint) if checkpoint.is_file() else None
        if known[checkpoint] not in (None, sha256):  # finished work may outlive the checkpoint
            return f"made from another {name} than models/ holds now"
    return None


def _fingerprint(split, side):
    """The fingerprint of one side as the split holds it now."""
    rows = split[split["magnification"].isin(side["magnifications"])]
    for name in ("split_by", "fold", "split"):
        rows = rows[rows[name] == side[name]]
    return data.fingerprint(rows)


def _run_of(path):
    """The folder runs/<run> that a file lies in, or one folder below it."""
    return path.parent if (path.parent / "split.csv").exists() else path.parents[1]


def _message(found):
    folder = _run_of(next(iter(found)))
    names = {path.relative_to(folder).as_posix(): problem for path, problem in found.items()}
    lines = [f"  {name}: {problem}" for name, problem in names.items()]
    if len(lines) > MOST_NAMED:
        lines = [*lines[:MOST_NAMED], f"  and {len(lines) - MOST_NAMED} more"]
    notebooks = sorted({f"notebooks/{runs.writer(name)}.ipynb" for name in names})
    return "\n".join(
        [
            f"The run {folder.name} lacks files, or holds some that do not belong together:",
            *lines,
            f"Run {', then '.join(notebooks)} again (with run={folder.name!r}); delete what that does not write anew.",
        ]
    )
