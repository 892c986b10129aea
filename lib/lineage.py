"""Whether what earlier notebooks left in a run still belongs together.

A notebook that is run again leaves the files of those after it as they were. So each finished file notes beside it
(`runs.write_recipe`) from which sides of the split it was made ("sides", `loading.Side.origin`), from which checkpoints ("models",
`checkpoints`) and, in a cascade of attacks, after which piece ("pieces"), and whoever takes one asks `check` first.
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


def check_alike(paths, split):
    """Raise StaleError unless pieces of predictions agree in images, seed and the steps of each attack, and no fold lacks an epsilon.

    paths: of predictions/; split: rows of split.csv.
    """
    found, first, epsilons = {}, {}, {}
    for path in map(Path, paths):
        made = runs.recipe_of(path)
        side, (attack, at, steps) = made["sides"][0], made["attack"]
        values = {
            f"steps of {attack}": steps,
            "seed": made["seed"],
            "image_size": side["image_size"],
            "magnifications": side["magnifications"],
        }
        for name, value in values.items():
            other, where = first.setdefault(name, (value, path))
            if value != other:
                found[path] = f"made with {name} {value}"
                found.setdefault(where, f"made with {name} {other}")
        evaluated = made["name"], attack, made["source"], side["split_by"], side["split"]
        of_fold = epsilons.setdefault(evaluated, {}).setdefault(side["fold"], {})
        of_fold |= dict.fromkeys(at, path)
    for (*_, split_by, _), of_folds in epsilons.items():
        every = {epsilon: path for of_fold in of_folds.values() for epsilon, path in of_fold.items()}
        for fold in split.loc[split["split_by"] == split_by, "fold"].unique():
            lacking = [path for epsilon, path in every.items() if epsilon not in of_folds.get(fold, {})]
            found |= dict.fromkeys(lacking, f"fold {fold} was not shown the same attack at the same epsilons")
    if found:
        raise StaleError(_message(found, "again with the same values"))


def check_dataset(run, split, predictions):
    """Raise StaleError unless dataset.json describes the images of the split, and the predictions are on those.

    split: rows of split.csv, which notebook 01 writes just before; predictions: the table.
    """
    about, rows = runs.dataset(run), split.drop_duplicates("image")
    rows = rows[rows["magnification"].isin(about["magnifications"])]
    again = f"run notebooks/01_data_split.ipynb again (with run={run!r})."
    if data.fingerprint(rows) != about["fingerprint"]:
        raise StaleError(f"runs/{run}/dataset.json describes other images than split.csv: {again}")
    if other := set(predictions["magnification"]) ^ set(about["magnifications"]):
        raise StaleError(
            f"runs/{run}/dataset.json and the predictions differ in magnification {sorted(map(int, other))}: give all notebooks the same "
            f"magnifications, and {again}"
        )


def check_trained_at(folder, train_epsilon):
    """Raise StaleError where a defense of the run was trained at another epsilon, in 255ths, than the one that is to be reported."""
    for name in ("merged_fgsm", "adversarial_training"):
        made = runs.recipe_of(folder / "models" / f"{name}.safetensors").get("train_epsilon")
        if made not in (None, train_epsilon):
            raise StaleError(
                f"{name} was trained at train_epsilon {made:g}, not {train_epsilon:g}: set train_epsilon to {made:g} here too, or run "
                f"notebooks/05_adversarial_training_defense.ipynb again (with run={folder.name!r})."
            )


def outdated(paths, split):
    """Which of these finished files no longer belong to the split (rows of split.csv) and the run's models, or are damaged."""
    known = {}
    return [path for path in map(Path, paths) if _problem(path, split, None, known)]


def parameters_used(folder):
    """The parameters with which the runner made what a run holds; {} where a notebook was run by hand with others since, which is said."""
    used = runs.runner_parameters(folder.name)
    made = runs.recipe_of(folder / "models" / "baseline.safetensors")
    found = [(name, made.get(name)) for name in ("epochs", "batch_size", "learning_rate")]
    for piece in (folder / "predictions").glob("*.csv.gz"):
        made = runs.recipe_of(piece)
        attack, _, steps = made["attack"]
        found += [("seed", made["seed"]), ("image_size", made["sides"][0]["image_size"])]
        if attack == "pgd":
            found.append(("pgd_steps", steps))
    for name, value in found:
        if name in used and used[name] != value:
            print(
                f"parameters are left out of results.json: the runner used {name} {used[name]}, but a notebook run by hand since then {value}",
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
        return "has no record of what it was made from"
    if not runs.is_whole(path):
        return "damaged: it changed after it was written"
    for side in made.get("sides", ()):
        key = repr(side)
        if key not in known:
            known[key] = _fingerprint(split, side) == side["fingerprint"]
        if not known[key]:
            return f"made from other {side['split']} images than the split holds now"
        if image_size not in (None, side["image_size"]):
            return f"made at {side['image_size']} pixels, not at {image_size}"
    for part, folder in (("models", "models"), ("pieces", "predictions")):
        for name, sha256 in made.get(part, {}).items():
            source = _run_of(path) / folder / name
            if source not in known:
                known[source] = runs.file_hash(source) if source.is_file() else None
            if known[source] not in (None, sha256):  # finished work may outlive what it was made from
                return f"made from another {name} than {folder}/ holds now"
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


def _message(found, again="again"):
    folder = _run_of(next(iter(found)))
    names = {path.relative_to(folder).as_posix(): problem for path, problem in found.items()}
    lines = [f"  {name}: {problem}" for name, problem in names.items()]
    if len(lines) > MOST_NAMED:
        lines = [*lines[:MOST_NAMED], f"  and {len(lines) - MOST_NAMED} more"]
    notebooks = sorted({f"notebooks/{runs.writer(name)}.ipynb" for name in names})
    return "\n".join(
        [
            f"Files of the run {folder.name} are missing or do not belong together:",
            *lines,
            f"Run {', then '.join(notebooks)} {again} (with run={folder.name!r}). Delete any listed file that is still unchanged afterwards.",
        ]
    )
