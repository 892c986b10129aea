"""The study's parameters: profiles, what the notebooks declare, and the checks that keep a typo from running for hours."""

import ast
import contextlib
import difflib
import json
import math
import re
from pathlib import Path

import yaml

from lib import runs

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
# Values of data_root: drawn tissue, and the database, downloaded where it is missing.
NO_FOLDER = ("synthetic", "breakhis")
# Where values must lie that a notebook would refuse only after hours of training.
RANGES = {
    "epsilons": (0, 255),
    "train_epsilon": (0, 255),
    "noise_sigma": (0, 1),
    "other_sigmas": (0, 1),
    "pgd_steps": (1, math.inf),
    "audit_steps": (0, math.inf),
    "square_queries": (0, math.inf),
    "audit_images": (0, math.inf),
    "noise_samples": (1, math.inf),
    "epochs": (1, math.inf),
    "patience": (0, math.inf),
    "batch_size": (2, math.inf),
    "image_size": (32, math.inf),
    "folds": (1, math.inf),
    "drawn_cases": (2, math.inf),
    "drawn_images": (1, math.inf),
    "seed": (0, math.inf),
}


class ParameterError(ValueError):
    """A profile, a parameter or a data folder that cannot be meant."""


def load(name, notebooks=runs.ROOT / "notebooks"):
    """The parameters of a profile: `notebooks/profiles/<name>.yaml`, or the YAML file at that path.

    Raises ParameterError when there is none, or when it is not one flat mapping.
    """
    profiles = Path(notebooks) / "profiles"
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else profiles / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in profiles.glob("*.yaml"))
        raise ParameterError(f"no profile {name!r}{_nearest(str(name), known)}")
    try:
        profile = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(profile, dict) or any(isinstance(value, dict) for value in profile.values()):
        raise ParameterError(f"{path} must be flat: lines of the form 'name: value'")
    return {"run": path.stem} | {str(name): value for name, value in profile.items()}


def declared_in(notebook):
    """The parameters that a notebook declares: name -> (annotation as text, "" without one; default).

    They are the assignments of constants in its cell with the tag `parameters`; a notebook without that cell has none.
    """
    declared = {}
    for cell in cells(notebook):
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            for node in ast.parse("".join(cell["source"])).body:
                if isinstance(node, ast.AnnAssign) and node.value is not None:
                    declared[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value))
                elif isinstance(node, ast.Assign):
                    declared[node.targets[0].id] = ("", ast.literal_eval(node.value))
    return declared


def resolve(profile, data_root, settings, stages):
    """All parameters of a study, checked against what its notebooks declare.

    Paths are made absolute: those of a profile from the repository, those of the command line from where it was typed.
    """
    declared = {}
    for notebook in stages:
        declared |= {name: annotation for name, (annotation, _) in declared_in(notebook).items()}
    given = {
        name: (value, runs.ROOT, f"profile {profile}")
        for name, value in load(profile, stages[0].parent).items()
    }
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ParameterError(f"--set {setting}: write --set NAME=VALUE")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ParameterError(f"--set {setting}: the value is not readable YAML") from None
        # A number or an empty value is a fine text where a text is asked for (--set run=7).
        value = text if declared.get(name) == "str" and not isinstance(value, str) else value
        given[name] = (value, Path.cwd(), f"--set {setting}")
    if data_root is not None:
        given["data_root"] = (str(data_root), Path.cwd(), "--data-root")

    parameters = {}
    for name, (value, base, where) in given.items():
        if name not in declared:
            raise ParameterError(f"{where}: unknown parameter {name!r}{_nearest(name, sorted(declared))}")
        parameters[name] = _absolute(name, _checked(name, declared[name], value, where), base)
    run, folder = parameters["run"], parameters.get("data_root", "synthetic")
    if not re.fullmatch(r"\w[\w.-]*", run):
        raise ParameterError(f"run {run!r} must be a plain folder name")
    if folder not in NO_FOLDER and not Path(folder).is_dir():
        raise ParameterError(
            f"data_root {folder} is not a folder: give the one that holds BreaKHis_v1 (make data fills data/), or your images and their "
            "images.csv"
        )
    for other in parameters.get("compare_with", []):
        if not (runs.home() / "reports" / other / "results.json").is_file():
            raise ParameterError(
                f"compare_with: there is no published report {other!r}; run it first, or leave it out"
            )
    for recipe in parameters.get("recipes", []):
        recipe_parts(recipe)
    augmentation_parts(parameters.get("augmentation", "plain"))
    for name in parameters.get("other_augmentations", []):
        augmentation_parts(name, "other_augmentations")
    starts = [Path(start).stem for start in parameters.get("other_starts", [])]
    if len(set(starts)) < len(starts):
        raise ParameterError("other_starts: two have the same name, which their trainings go by; rename one")
    _refuse_unknown([parameters.get("noise_drawn", "anew")], NOISE_DRAWN, "noise_drawn")
    _refuse_unknown([parameters.get("split_by", SPLITS[0])], SPLITS, "split_by")
    for name, example in (("recipes", "[fgsm]"), ("epsilons", "[1, 2, 4]")):
        if not parameters.get(name, [1]):
            raise ParameterError(f"{name} must name at least one, such as {example}")
    for name, value in parameters.items():
        if isinstance(value, list) and len(set(value)) < len(value):
            raise ParameterError(f"{name}: {value} names one twice")
    _refuse_unknown([parameters.get("primary_defense", DEFENSES[0])], DEFENSES, "primary_defense")
    return parameters


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


def _checked(name, annotation, value, where):
    """The value, with texts such as "1e-3" made numbers where a float is asked for (YAML reads them as text)."""
    if annotation.startswith("list["):
        if not isinstance(value, list):
            raise ParameterError(f"{where}: {name} must be a list ({annotation}), such as [{value}]")
        return [_checked(name, annotation[5:-1], item, where) for item in value]
    if annotation == "float" and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool}.get(annotation, object)
    if not isinstance(value, kinds) or (isinstance(value, bool) and annotation in ("int", "float")):
        raise ParameterError(f"{where}: {name} must be {annotation}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ParameterError(f"{where}: {name} must be finite, not {value!r}")
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if isinstance(value, int | float) and not low <= value <= high:
        asked = f"{low} to {high}" if high < math.inf else f"{low} or more"
        raise ParameterError(f"{where}: {name} must be {asked}, not {value!r}")
    return value


def _absolute(name, value, base):
    if name == "other_starts":
        return [_absolute("pretrained", start, base) for start in value]
    is_path = (
        (name == "data_root" and value not in NO_FOLDER)
        or (name == "weights_dir" and value)
        or (name == "pretrained" and ("/" in value or value.endswith(".safetensors")))
    )
    return str((base / Path(value).expanduser()).resolve()) if is_path else value


def _nearest(name, known):
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known) or 'none'}"


def cells(notebook):
    """The cells of a notebook as stored. Raises ParameterError where the file is no notebook."""
    try:
        return json.loads(Path(notebook).read_text("utf-8"))["cells"]
    except (ValueError, KeyError):
        raise ParameterError(f"{notebook} is not a readable notebook") from None
