"""What the value of one parameter means: of which type it is, how else it may be spelled, and where it must lie."""

import contextlib
import math
import os
import re
import reprlib

import yaml

# What None means, which papermill makes of "None" and YAML of "null".
NOTHING = {"pretrained": "none", "other_starts": "none", "weights_dir": ""}
# Where values must lie that a notebook would refuse only after hours of training.
RANGES = {
    "epsilons": (0, 255),
    "train_epsilon": (0, 255),
    "noise_sigma": (0.001, 1),
    "other_sigmas": (0.001, 1),
    "learning_rate": (1e-8, 1),
    "magnifications": (1, math.inf),
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
    "seed": (0, 2**32 - 1),
}
# Beyond it not every whole number has a float, as which JSON and most libraries hold it.
LARGEST = 2**53
# By type: what is asked for, how it is spelled, and how a list of it is.
KINDS = {
    "int": ("a whole number", " (such as 64)", "[100, 200]"),
    "float": ("a number", " (such as 0.1)", "[2, 4]"),
    "bool": ("true or false", "", "[true, false]"),
    "str": ("text", " (put it in quotes; with papermill, use -r instead of -p)", '["A", "F"]'),
}
TRUE_OR_FALSE = {"true": True, "yes": True, "on": True, "1": True}
TRUE_OR_FALSE |= {"false": False, "no": False, "off": False, "0": False}


class ParameterError(ValueError):
    """A profile, a parameter or a data folder that cannot be meant."""


def read(name, annotation, value):
    """The value of a parameter as it is meant, of the type that its annotation names; one without a known type as it is.

    Raises ParameterError, with the right spelling, for what cannot be meant.
    """
    kind = kind_of(annotation)
    if kind not in KINDS:
        return value
    asked, spelled, example = KINDS[kind]
    if not annotation.startswith("list["):
        meant = _read_one(name, kind, value)
        if meant is None:
            raise ParameterError(f"{name} must be {asked}, not {said(value)}{spelled}")
        return _in_range(name, meant)
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            value = read_yaml(text, f"{name}: {said(text)}")
        else:  # one path may hold commas
            value = [text] if os.path.isfile(text) else re.split(r"\s*,\s*", text)
    items = list(value) if isinstance(value, list | tuple) else [value]
    meant = [None if item == "" else _read_one(name, kind, item) for item in items]
    if None in meant:
        wrong = items[meant.index(None)]
        empty = " (or [] for none)" if wrong in (None, "") else ""
        raise ParameterError(
            f"{name} must be a list, such as {example}{empty}; {said(wrong)} in it is not {asked}"
        )
    return [_in_range(name, each) for each in meant]


def kind_of(annotation):
    """The type of one value: "int" for "list[int]"."""
    return annotation.removeprefix("list[").removesuffix("]")


def _read_one(name, kind, value):
    """One value as this kind; None where it cannot be meant so."""
    if isinstance(value, str):  # without the quotes that a list or a profile would need
        value = re.sub(r"""^(["'])(.*)\1$""", r"\2", value.strip())
    if kind == "bool":
        return TRUE_OR_FALSE.get(str(value).lower())
    if kind == "str" and name in NOTHING and str(value).lower() in ("none", "null", "~"):
        return NOTHING[name]
    if kind == "str" and isinstance(value, str):
        return value
    for number in (int, float):
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = number(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return None
    if kind == "str":  # what papermill makes of 1.10 is not what was typed
        return str(value) if isinstance(value, int) else None
    if kind == "int":
        return int(value) if value == int(value) else None
    return value


def _in_range(name, value):
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if isinstance(value, str) or low <= value <= high:
        return value
    asked = f"{low} to {high}" if high < math.inf else f"{low} or more"
    levels = f" (if you meant gray levels: {value:g}/255 is {value / 255:.3g})" if "sigma" in name else ""
    raise ParameterError(f"{name} must be {asked}, not {value!r}{levels}")


def said(value):
    """A value as a message shows it, however large it is."""
    try:
        text = repr(value) if isinstance(value, str | int | float) else reprlib.repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:80]}…"


class _Loader(yaml.SafeLoader):
    """YAML in which a date is text, and no name may be given twice."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text, where):
    """What a YAML text holds, without running code from it; raises ParameterError, naming `where`, for what cannot be read."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of 5,000 digits
        raise ParameterError(f"{where} is not readable YAML: {' '.join(str(error).split())[:300]}") from None
