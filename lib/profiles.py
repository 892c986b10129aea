"""The study's parameters: profiles, what the notebooks declare, and the checks that keep a typo from running for hours."""

import ast
import difflib
import inspect
import json
import os
import re
from pathlib import Path

from lib import runs, values
from lib.values import ParameterError

DEFENSES = ("gaussian_noise", "gaussian_noise_recalibrated", "merged_fgsm", "adversarial_training")
# Of adversarial training: examples by one of these attacks, and what may be added with "+".
RECIPE_ATTACKS = ("fgsm", "pgd")
RECIPE_EXTRAS = ("noise", "averaged")
# What may be added with "+" to the flips, turns and squares that every training has.
AUGMENTATIONS = ("scale", "stain", "balanced")
# How noise in training is drawn (`training.noisy_training`).
NOISE_DRAWN = ("anew", "anew_unclipped", "once")
# Ways to split: as the papers do, no case on two sides, and as published with the database.
SPLITS = ("image", "case", "fold")
PRECISIONS = ("auto", "float32", "bfloat16")
# Values of data_root: synthetic tissue, and the database, downloaded where it is missing.
NO_FOLDER = ("synthetic", "breakhis")
# How the cell begins in which papermill puts the values that it was given.
INJECTED = "# Parameters\n"
# The longest profile here has 2 kB.
LARGEST_PROFILE = 10**5


def load(name, notebooks=runs.ROOT / "notebooks"):
    """The parameters of a profile: `notebooks/profiles/<name>.yaml`, or the YAML file at that path.

    Raises ParameterError when there is none, or when it is not one flat mapping.
    """
    profiles = Path(notebooks) / "profiles"
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else profiles / f"{name}.yaml"
    if not os.path.isfile(path):
        known = sorted(file.stem for file in profiles.glob("*.yaml"))
        raise ParameterError(f"no profile {name!r}{_nearest(str(name), known)}")
    if path.stat().st_size > LARGEST_PROFILE:
        raise ParameterError(
            f"{path} is too large for a profile: a profile is a few lines of the form 'name: value'"
        )
    profile = values.read_yaml(path.read_bytes(), path)
    if not isinstance(profile, dict) or any(isinstance(value, dict) for value in profile.values()):
        raise ParameterError(f"{path} must be flat: lines of the form 'name: value'")
    return {"run": path.stem} | {str(name): value for name, value in profile.items()}


def check(namespace):
    """Read a notebook's parameters as they are meant, in place: `profiles.check(globals())` below their cell.

    namespace: the notebook's variables, of which those with an annotation are its parameters. papermill and people write a value
    in several ways: 100 or "100, 200" for a list, "no" for False, 64.0 for 64, None for "none". Raises ParameterError for what
    cannot be meant, where the runner does, and says how to spell it; also for a name that papermill was given and no notebook has.
    """
    known = load("quick")
    for cell in namespace.get("In", ()):
        for name in re.findall(r"^(\w+) = ", cell, re.MULTILINE) if cell.startswith(INJECTED) else ():
            if name not in known and not name.startswith("PAPERMILL_"):
                raise ParameterError(f"unknown parameter {name!r}{_nearest(name, sorted(known))}")
    declared = {
        name: annotation
        for name, kind in namespace.get("__annotations__", {}).items()
        if name in namespace and values.kind_of(annotation := inspect.formatannotation(kind)) in values.KINDS
    }
    given = {name: (namespace[name], runs.ROOT, "") for name in declared}
    namespace.update(_settled(given, declared))


def declared_in(notebook):
    """The parameters that a notebook declares: name -> (annotation as text, "" without one; default).

    They are the assignments of constants in its cell with the tag `parameters`; a notebook without that cell has none. Raises
    ParameterError where that cell holds something else.
    """
    declared = {}
    for cell in cells(notebook):
        if "parameters" not in cell.get("metadata", {}).get("tags", []):
            continue
        try:
            for node in ast.parse("".join(cell["source"])).body:
                if isinstance(node, ast.AnnAssign) and node.value is not None:
                    declared[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value))
                elif isinstance(node, ast.Assign):
                    declared[node.targets[0].id] = ("", ast.literal_eval(node.value))
        except (SyntaxError, ValueError, AttributeError) as error:
            raise ParameterError(
                f"{notebook}: its parameters must be lines of the form 'name: type = constant' ({error})"
            ) from None
    return declared


def resolve(profile, data_root, settings, stages):
    """All parameters of a study, checked against what its notebooks declare.

    Paths are made absolute: those of a profile from the repository, those of the command line from where it was typed.
    """
    declared = {}
    for notebook in stages:
        declared |= {name: annotation for name, (annotation, _) in declared_in(notebook).items()}
    given = {
        name: (value, runs.ROOT, f"profile {profile}: ")
        for name, value in load(profile, stages[0].parent).items()
    }
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ParameterError(f"--set {setting}: write --set NAME=VALUE")
        given[name.strip()] = (text, Path.cwd(), f"--set {setting}: ")
    if data_root is not None:
        given["data_root"] = (str(data_root), Path.cwd(), "--data-root: ")
    return _settled(given, declared)


def _settled(given, declared):
    """The values that are given, {name: (value, where its paths start, what to say before an error)}, as they are meant."""
    parameters = {}
    for name, (value, base, where) in given.items():
        if name not in declared:
            raise ParameterError(f"{where}unknown parameter {name!r}{_nearest(name, sorted(declared))}")
        try:
            parameters[name] = _absolute(name, values.read(name, declared[name], value), base)
        except ParameterError as error:
            raise ParameterError(f"{where}{error}") from None
    _check_together(parameters)
    return parameters


def _check_together(parameters):
    """Refuse what no study, or no notebook with these parameters, can do, before hours of work."""
    run, folder = parameters["run"], parameters.get("data_root", "synthetic")
    if not re.fullmatch(r"\w[\w.-]{0,99}", run):
        raise ParameterError(
            f"run {values.said(run)} must be a plain folder name: letters, digits, dots, hyphens and underscores, such as quick_2"
        )
    if folder not in NO_FOLDER and not os.path.isdir(folder):
        raise ParameterError(
            f"data_root {folder} is not a folder: give the one that holds BreaKHis_v1 (make data fills data/), or your images and their "
            "images.csv"
        )
    for name, example in (("recipes", "[fgsm]"), ("epsilons", "[1, 2, 4]")):
        if not parameters.get(name, [1]):
            raise ParameterError(f"{name} must name at least one, such as {example}")
    for name, value in parameters.items():
        if isinstance(value, list) and len(set(value)) < len(value):
            raise ParameterError(f"{name}: {value} lists a value twice; leave one")
    for other in parameters.get("compare_with", []):
        report = runs.report(other) / "results.json"
        if other == run:
            raise ParameterError(f"compare_with: {other!r} is this run itself; leave it out")
        if not os.path.isfile(report):
            raise ParameterError(
                f"compare_with: there is no published report {other!r}; run it first, or leave it out"
            )
        if not runs.read_json(report):
            raise ParameterError(f"compare_with: {report} is damaged; publish it again, or leave it out")
    for recipe in parameters.get("recipes", []):
        recipe_parts(recipe)
    augmentation_parts(parameters.get("augmentation", "plain"))
    for name in parameters.get("other_augmentations", []):
        augmentation_parts(name, "other_augmentations")
    starts = [Path(start).stem for start in parameters.get("other_starts", [])]
    if len(set(starts)) < len(starts):
        raise ParameterError("other_starts: two have the same name, which their trainings go by; rename one")
    if (size := parameters.get("image_size", 32)) % 32:
        raise ParameterError(
            f"image_size must be a multiple of 32 pixels, such as {size - size % 32}, not {size}"
        )
    _refuse_unknown([parameters.get("noise_drawn", "anew")], NOISE_DRAWN, "noise_drawn")
    _refuse_unknown([parameters.get("split_by", SPLITS[0])], SPLITS, "split_by")
    _refuse_unknown([parameters.get("precision", "auto")], PRECISIONS, "precision")
    _refuse_unknown([parameters.get("primary_defense", DEFENSES[0])], DEFENSES, "primary_defense")
    _check_gray_levels(parameters)


def _check_gray_levels(parameters):
    """Refuse epsilons that only make sense as fractions, and say which ones change no image of 8 bits."""
    epsilons, strength = parameters.get("epsilons"), parameters.get("train_epsilon", 1)
    if not epsilons:
        return
    if 0 in epsilons:
        raise ParameterError("epsilons: leave 0 out; results on clean images are always shown")
    if max(epsilons) < 1:
        raise ParameterError(
            f"epsilons {epsilons} are counted in 255ths, and below 1 no 8-bit image changes: name at least one of 1 or more"
            f" (if you meant fractions of the value range: {[float(f'{each * 255:.4g}') for each in epsilons]})"
        )
    if strength < min(1, *epsilons):
        raise ParameterError(
            f"train_epsilon {strength} is counted in 255ths, below one gray level and below all epsilons: that trains no defense"
            f" (if you meant a fraction of the value range: {strength * 255:.4g})"
        )
    if small := sorted({each for each in (*epsilons, strength) if each < 1}):
        print(
            f"below one gray level: {', '.join(f'{each:g}/255' for each in small)}. No 8-bit image can change by so little; results "
            "there are shown, but no headline, main comparison or audit is made there."
        )


def recipe_parts(recipe):
    """The parts of a recipe of adversarial training: "pgd+noise" is ["pgd", "noise"]. Raises ParameterError for unknown ones."""
    attack, *extras = parts = recipe.split("+")
    _refuse_unknown([attack], RECIPE_ATTACKS, "recipes", recipe)
    _refuse_unknown(extras, RECIPE_EXTRAS, "recipes", recipe)
    return parts


def augmentation_parts(name, parameter="augmentation"):
    """The parts of an augmentation: "scale+stain" is ["scale", "stain"], "plain" has none. Raises ParameterError for unknown ones."""
    if name == "plain":
        return []
    parts = name.split("+")
    _refuse_unknown(parts, AUGMENTATIONS if len(parts) > 1 else ("plain", *AUGMENTATIONS), parameter, name)
    return parts


def _refuse_unknown(parts, known, parameter, text=""):
    for part in parts:
        if part not in known:
            whole = f" (in {text!r})" if text else ""
            raise ParameterError(f"{parameter}: there is no {part!r}{whole}{_nearest(part, known)}")


def _absolute(name, value, base):
    if name == "other_starts":
        return [_absolute("pretrained", start, base) for start in value]
    is_path = (
        (name == "data_root" and value not in NO_FOLDER)
        or (name == "weights_dir" and value)
        or (name == "pretrained" and ("/" in value or value.endswith(".safetensors")))
    )
    if not is_path:
        return value
    try:
        return str((base / Path(value).expanduser()).resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a null byte, no such user
        raise ParameterError(f"{name}: {values.said(value)} is not a path ({error})") from None


def _nearest(name, known):
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known) or 'none'}"


def cells(notebook):
    """The cells of a notebook as stored. Raises ParameterError where the file is no notebook."""
    try:
        found = json.loads(Path(notebook).read_text("utf-8"))["cells"]
        return [cell for cell in found if cell["cell_type"] and isinstance("".join(cell["source"]), str)]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ParameterError(f"{notebook} is not a readable notebook") from None
