"""What a value means, however papermill, YAML, the command line or a hand in JupyterLab spell it."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from papermill.cli import _resolve_type

from lib import profiles, runs, study, values

STAGES = [study.NOTEBOOKS / f"{name}.ipynb" for name in study.STAGES]


@pytest.mark.parametrize(
    ("name", "annotation", "written", "meant"),
    [
        ("skip_bad_files", "bool", "false", False),
        ("skip_bad_files", "bool", "no", False),
        ("skip_bad_files", "bool", "Off", False),
        ("skip_bad_files", "bool", "0", False),
        ("skip_bad_files", "bool", "True", True),
        ("skip_bad_files", "bool", "yes", True),
        ("noise_sigma", "float", "1e-1", 0.1),
        ("noise_sigma", "float", "1", 1),
        ("magnifications", "list[int]", "100", [100]),
        ("magnifications", "list[int]", "100,200", [100, 200]),
        ("magnifications", "list[int]", "[100, 200.0]", [100, 200]),
        ("magnifications", "list[int]", "[]", []),
        ("epsilons", "list[float]", "[1, 2, 4]", [1, 2, 4]),
        ("epsilons", "list[float]", "4", [4]),
        ("subtypes", "list[str]", "F", ["F"]),
        ("subtypes", "list[str]", "A, F", ["A", "F"]),
        ("image_size", "int", "64.0", 64),
        ("seed", "int", "1e0", 1),
        ("pretrained", "str", "None", "none"),
        ("pretrained", "str", "null", "none"),
        ("other_starts", "list[str]", "[None, '200X']", ["none", "200X"]),
        ("other_starts", "list[str]", "None", ["none"]),
        ("weights_dir", "str", "None", ""),
        ("weights_dir", "str", "''", ""),
        ("run", "str", "7", "7"),
        ("run", "str", "2024-01-01", "2024-01-01"),
    ],
)
def test_every_way_of_writing_a_value_means_the_same(name, annotation, written, meant):
    """Typed after --set, after papermill -r and -p, and in a profile, where YAML reads it."""
    for value in (written, _resolve_type(written), values.read_yaml(written, "a profile")):
        found = values.read(name, annotation, value)
        assert found == meant and type(found) is type(meant), value
        assert values.read(name, annotation, found) == found, "read once more, it stays"


@pytest.mark.parametrize(
    ("name", "annotation", "value", "words"),
    [
        ("skip_bad_files", "bool", "maybe", "skip_bad_files must be true or false, not 'maybe'"),
        ("skip_bad_files", "bool", None, "must be true or false, not None"),
        ("seed", "int", 1.5, "seed must be a whole number, not 1.5 (such as 64)"),
        ("seed", "int", True, "must be a whole number, not True"),
        ("seed", "int", 10**400, "must be a whole number, not 1000"),
        ("seed", "int", "9" * 5000, "must be a whole number, not '999"),
        ("noise_sigma", "float", "inf", "must be a number, not 'inf'"),
        (
            "magnifications",
            "list[int]",
            "100X",
            "a list, such as [100, 200]; '100X' in it is not a whole number",
        ),
        ("magnifications", "list[int]", {"a": 1}, "{'a': 1} in it is not a whole number"),
        ("magnifications", "list[int]", None, "such as [100, 200] (or [] for none); None in it"),
        ("subtypes", "list[str]", "", "(or [] for none); '' in it is not text"),
        ("subtypes", "list[str]", "[A", "subtypes: '[A' is not readable YAML"),
        (
            "run",
            "str",
            1.1,
            "run must be text, not 1.1 (put it in quotes; with papermill, use -r instead of -p)",
        ),
        ("run", "str", False, "run must be text, not False"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_right_spelling(name, annotation, value, words):
    with pytest.raises(values.ParameterError) as error:
        values.read(name, annotation, value)
    assert words in str(error.value) and len(str(error.value)) < 400


def test_a_number_too_long_to_be_written_is_refused():
    with pytest.raises(values.ParameterError, match="not a number of thousands of digits"):
        values.read("seed", "int", 10**5000)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"seed: {'9' * 5000}", "is not readable YAML: Exceeds the limit"),
        ("seed: 2024-13-45", "seed must be a whole number, not '2024-13-45'"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("seed: [" * 5000, "is not readable YAML"),
        ("? [seed]\n: 1", "is not readable YAML"),
        ("1: 2", "unknown parameter '1'"),
        ("~: 2", "unknown parameter 'None'"),
        ("- seed", "must be flat"),
        ("", "must be flat"),
        ("seed: {a: 1}", "must be flat"),
        ("seed: !!python/object/apply:os.system [ls]", "is not readable YAML"),
        ("seed: !!binary aGVsbG8=", "seed must be a whole number, not b'hello'"),
        ("subtypes: &a [*a]", "in it is not text"),
        (LAUGHS.replace("j: &j", "subtypes: &j"), "unknown parameter 'a'"),
        (f"subtypes: [{'[' * 50}{']' * 50}]", "in it is not text"),
        ('data_root: "a\\0b"', "is not a "),
        ("data_root: ~nobody_of_this_name/x", "is not a path"),
        (f"data_root: {'n' * 300}", "is not a folder"),
        (f"run: {'n' * 300}", "must be a plain folder name"),
        ("data_root: loop", "is not a "),
        ('compare_with: ["a\\0b"]', "there is no published report"),
        (f"compare_with: [{'n' * 300}]", "there is no published report"),
        ("seed: 1\n" + "#" * 200_000, "is too large for a profile"),
        ("run: 1.10", "run must be text, not 1.1 (put it in quotes"),
        (b"run: \xff\xfe", "is not readable YAML"),
    ],
)
def test_an_odd_profile_ends_in_one_sentence(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    profile = tmp_path / "odd.yaml"
    profile.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(values.ParameterError) as error:
        profiles.resolve(profile, None, (), STAGES)
    assert words in str(error.value) and len(str(error.value)) < 1000


def test_small_epsilons_beside_larger_ones_are_said_and_studied(capsys):
    settings = ("epsilons=[0.25, 1, 4]", "train_epsilon=0.5")
    found = profiles.resolve("smoke", None, settings, STAGES)
    assert found["epsilons"] == [0.25, 1, 4] and found["train_epsilon"] == 0.5
    assert "below one gray level: 0.25/255, 0.5/255. No 8-bit image" in capsys.readouterr().out
    profiles.resolve("smoke", None, (), STAGES)
    assert capsys.readouterr().out == ""


def test_a_report_to_compare_with_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    (tmp_path / "reports" / "other").mkdir(parents=True)
    (tmp_path / "reports" / "other" / "results.json").write_text('{"run": "oth')
    with pytest.raises(values.ParameterError, match="is damaged; publish it again, or leave it out"):
        profiles.resolve("smoke", None, ["compare_with=other"], STAGES)


def by_papermill(folder, *arguments):
    """What a notebook with a few parameters has after the check, by papermill's own command line."""
    cells = [
        new_code_cell(
            'run: str = "quick"\nskip_bad_files: bool = False\nmagnifications: list[int] = [100]\nimage_size: int = 64\n'
            'pretrained: str = "200X"\nepsilons: list[float] = [2, 4]',
            metadata={"tags": ["parameters"]},
        ),
        new_code_cell("from lib import profiles\n\nprofiles.check(globals())"),
        new_code_cell(
            "import json\nfrom pathlib import Path\n"
            'Path("found.json").write_text(json.dumps({name: globals()[name] for name in __annotations__}))'
        ),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / "in.ipynb")
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar", *arguments]
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def test_papermills_own_command_line_means_what_was_typed(tmp_path):
    typed = [
        "run",
        "7",
        "skip_bad_files",
        "no",
        "magnifications",
        "100,200",
        "image_size",
        "64.0",
        "pretrained",
        "None",
    ]
    asked = [word for pair in zip(["-p"] * 5, typed[::2], typed[1::2], strict=True) for word in pair]
    profile = ["-f", str(study.NOTEBOOKS / "profiles" / "smoke.yaml")]
    done = by_papermill(tmp_path, *profile, *asked, "-y", "epsilons: 4", "--inject-paths")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "run": "7",
        "skip_bad_files": False,
        "magnifications": [100, 200],
        "image_size": 64,
        "pretrained": "none",
        "epsilons": [4],
    }


def test_papermill_is_told_of_a_name_that_no_notebook_has(tmp_path):
    done = by_papermill(tmp_path, "-p", "epsilon", "[1, 2]")
    assert done.returncode == 1 and not (tmp_path / "found.json").exists()
    assert "ParameterError: unknown parameter 'epsilon': did you mean 'epsilons'?" in done.stderr
