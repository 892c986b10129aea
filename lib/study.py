"""The headless runner: all notebooks in order, only where something changed, then one report (`python -m lib.study quick`).

Also the few helpers with which a notebook finds its run folder (`run_folder`), asks for what an earlier notebook wrote
(`require`) and keeps finished work (`is_current`, `write_recipe`). Everything heavy is imported where it is used, so that an
unchanged study is checked in a second.
"""

import argparse
import ast
import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"

# Which notebook writes what under runs/<run>/; the first pattern that fits counts.
WRITERS = (
    ("split.csv", "01_data_split"),
    ("dataset.json", "01_data_split"),
    ("models/gaussian_noise*", "04_gaussian_noise_defense"),
    ("history/gaussian_noise*", "04_gaussian_noise_defense"),
    ("predictions/gaussian_noise*", "04_gaussian_noise_defense"),
    ("models/merged_fgsm*", "05_adversarial_training_defense"),
    ("history/merged_fgsm*", "05_adversarial_training_defense"),
    ("predictions/merged_fgsm*", "05_adversarial_training_defense"),
    ("models/adversarial_training*", "05_adversarial_training_defense"),
    ("history/adversarial_training*", "05_adversarial_training_defense"),
    ("predictions/adversarial_training*", "05_adversarial_training_defense"),
    ("models/*", "02_transfer_learning"),
    ("history/*", "02_transfer_learning"),
    ("predictions/*-none*", "02_transfer_learning"),
    ("predictions*", "03_fgsm_attack"),
    ("attacks.csv", "03_fgsm_attack"),
    ("*", "06_comparison"),
)
# The runner itself; every other module writes numbers, words or figures of a stage.
NO_RESULTS = ("__init__", "study")
PACKAGES = (
    "torch",
    "torchvision",
    "torchxrayvision",
    "numpy",
    "pandas",
    "scipy",
    "scikit-learn",
    "papermill",
)

# For the kernels, measured on two cores. Threads that spin long while they wait make torch ten times slower once anything
# else runs on the machine; this much spinning costs 7 % on an idle one. Memory given back to the system after each batch
# and taken again costs a fifth of the training time; with glibc it is kept instead.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "10000",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# A training cell may take hours; a cell that hangs must end some day.
CELL_TIMEOUT = 12 * 3600
START_TIMEOUT = 180
# nbclient waits 4 s for a cell's last output, which a busy machine with two cores can miss.
OUTPUT_TIMEOUT = 120


class ParameterError(ValueError):
    """A profile, a parameter or a data folder that cannot be meant."""


class StudyError(RuntimeError):
    """A stage failed, another study holds the run, or the report could not be published; the text says which."""


# ---------------------------------------------------------------------------------------------- what notebooks use


def home():
    """The absolute folder that holds runs/ and reports/: STUDY_HOME where it is set, otherwise the repository."""
    return Path(os.environ.get("STUDY_HOME") or ROOT).absolute()


def run_folder(run):
    """The folder of one run, `runs/<run>` under `home()`; it need not exist yet."""
    return home() / "runs" / run


def require(run, name):
    """The path of `runs/<run>/<name>`, which an earlier notebook wrote.

    Raises FileNotFoundError, saying which notebook to run, when it is not there.
    """
    path = run_folder(run) / name
    if not path.exists():
        writer = next(writer for pattern, writer in WRITERS if fnmatch(name, pattern))
        raise FileNotFoundError(
            f"runs/{run}/{name} is missing: run notebooks/{writer}.ipynb first (with run={run!r})"
        )
    return path


def as_list(value):
    """A list parameter as a list: `papermill -p epsilons "[1, 2, 4]"` hands it over as text."""
    return yaml.safe_load(value) if isinstance(value, str) else value


def dataset(run):
    """What 01 noted about the images of a run: name, synthetic, images, cases, fingerprint."""
    return json.loads(require(run, "dataset.json").read_text("utf-8"))


def parameters_used(run):
    """The parameters with which the runner last ran the stages of a run; empty where the notebooks were run by hand."""
    records = sorted((run_folder(run) / "stages").glob("[0-9][0-9].json"))
    return {name: value for file in records for name, value in _read_json(file).get("parameters", {}).items()}


def is_current(path, recipe):
    """Whether `path` was finished from this very recipe and is undamaged, so that the work need not be done again.

    recipe: a dict of JSON values with everything that the file depends on (see `code_hash`). A current file is also marked as
    used: the runner removes what has a recipe and was neither written nor asked for when its stage ran.
    """
    path = Path(path)
    beside = _recipe_file(path)
    made = _read_json(beside)
    if not path.is_file() or made.get("recipe") != _plain(recipe) or made.get("sha256") != file_hash(path):
        return False
    os.utime(path)
    os.utime(beside)
    return True


def write_recipe(path, recipe):
    """Note, atomically and as the last step, from what the finished file `path` was made.

    The note stands under "recipe" and "sha256" in the JSON beside it (`models/baseline.json` for
    `models/baseline.safetensors`, `x.json` for `x.csv.gz`); other keys of that JSON stay.
    """
    beside = _recipe_file(path)
    write_json(beside, _read_json(beside) | {"recipe": _plain(recipe), "sha256": file_hash(path)})


@contextlib.contextmanager
def whole_file(path):
    """`with whole_file(path) as part:` what is written to the file `part` becomes `path` at the end, or nothing does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            yield part
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path):
    """While `path` is written: an OSError because the disk is full says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        words = (
            f"could not write {path} ({error.strerror}): free some space and run again, finished work is kept"
        )
        raise OSError(error.errno, words) from error


def code_hash(*modules):
    """Twelve hexadecimal digits over the code of the named `lib` modules: `code_hash("models", "training")`.

    Comments, docstrings and layout do not count: hours of training are not thrown away for a better sentence.
    """
    code = []
    for module in sorted(modules):
        tree = ast.parse((ROOT / "lib" / f"{module}.py").read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        code.append((module, ast.unparse(tree)))
    return _digest(code)[:12]


# ---------------------------------------------------------------------------------------------- provenance


def library_versions():
    """The versions of Python and of the packages that numbers depend on, by name."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def commit():
    """The short commit of the code, with "-dirty" where code or profiles differ from it; "" outside of git.

    Reports are left out: publishing one must not make the next one's commit look changed.
    """

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return ""
        changed = git("status", "--porcelain", "--", "lib", "notebooks", "pyproject.toml", "requirements.txt")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name():
    """The machine that computes, in words: the name of the GPU, otherwise "cpu" with its cores and architecture."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {os.cpu_count()} cores, {platform.machine()}"


# ---------------------------------------------------------------------------------------------- parameters


def load_profile(name, notebooks=NOTEBOOKS):
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


def parameters_of(notebook):
    """The parameters that a notebook declares: name -> (annotation as text, "" without one; default).

    They are the assignments of constants in its cell with the tag `parameters`; a notebook without that cell has none.
    """
    declared = {}
    for cell in _cells(notebook):
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            for node in ast.parse("".join(cell["source"])).body:
                if isinstance(node, ast.AnnAssign) and node.value is not None:
                    declared[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value))
                elif isinstance(node, ast.Assign):
                    declared[node.targets[0].id] = ("", ast.literal_eval(node.value))
    return declared


def _all_parameters(profile, data_root, settings, notebooks):
    """All parameters of a study, checked against what its notebooks declare.

    Paths are made absolute: those of a profile from the repository, those of the command line from where it was typed.
    """
    declared = {}
    for notebook in _stages(notebooks):
        declared |= {name: annotation for name, (annotation, _) in parameters_of(notebook).items()}
    given = {
        name: (value, ROOT, f"profile {profile}") for name, value in load_profile(profile, notebooks).items()
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
    if folder != "synthetic" and not Path(folder).is_dir():
        raise ParameterError(f"data_root {folder} is not a folder: give the one that holds BreaKHis_v1")
    return parameters


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
    return value


def _absolute(name, value, base):
    is_path = (
        (name == "data_root" and value != "synthetic")
        or (name == "weights_dir" and value)
        or (name == "pretrained" and ("/" in value or value.endswith(".safetensors")))
    )
    return str((base / Path(value).expanduser()).resolve()) if is_path else value


def _nearest(name, known):
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known) or 'none'}"


# ---------------------------------------------------------------------------------------------- the study


def run_study(profile, data_root=None, settings=(), force=False, notebooks=NOTEBOOKS):
    """Run every notebook whose parameters, code or inputs changed, publish the report, and return its index.html.

    profile: a name or a YAML path. data_root: a BreaKHis folder that replaces the profile's data. settings: texts of the form
    "NAME=VALUE" (YAML values). force: run every stage anew, finished work inside it included.
    Raises ParameterError before anything is touched, StudyError when a stage or the publishing fails; finished stages, finished
    work inside a stage and the last good report stay.
    """
    from filelock import FileLock, Timeout

    began = time.monotonic()
    parameters = _all_parameters(profile, data_root, settings, notebooks)
    # Kernels run inside the run folder, where a relative STUDY_HOME would mean another place.
    os.environ["STUDY_HOME"] = str(home())
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folder = run_folder(parameters["run"])
    for name in ("stages", "notebooks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _run_stages(_stages(notebooks), parameters, folder, force)
            report = _publish_if_changed(_stages(notebooks), parameters["run"], folder)
    except Timeout:
        raise StudyError(
            f"another study is running on {folder}; wait for it, or choose another run name"
        ) from None
    print(f"finished in {time.monotonic() - began:.0f} s: {_shown(report)}", flush=True)
    return report


def _stages(notebooks):
    """The stages in order. A notebook numbered 00 is a welcome page, not a stage."""
    stages = [path for path in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb")) if path.name[:2] != "00"]
    if not stages:
        raise ParameterError(f"no notebooks 01_*.ipynb under {notebooks}")
    return stages


def _run_stages(stages, parameters, folder, force):
    for number, notebook in enumerate(stages):
        declared = parameters_of(notebook)
        own = {name: parameters.get(name, default) for name, (_, default) in declared.items()}
        inputs = {}
        for earlier in stages[:number]:
            inputs |= _record(folder, earlier).get("outputs", {})
        key = _key(notebook, own, inputs)
        others = [_record(folder, stage) for stage in stages if stage != notebook]
        if not force and _is_unchanged(folder, notebook, key, others[number:]):
            print(f"{notebook.stem:<34} unchanged, skipped", flush=True)
            continue
        started = time.monotonic()
        try:
            stale = _run_stage(folder, notebook, key, own, inputs, others, force)
        except StudyError:
            print(f"{notebook.stem:<34} failed after {time.monotonic() - started:.0f} s", flush=True)
            raise
        note = f", removed {stale} files of an earlier recipe" if stale else ""
        print(f"{notebook.stem:<34} ran in {time.monotonic() - started:.0f} s{note}", flush=True)


def _key(notebook, parameters, inputs):
    """What a stage's results depend on, in one hash."""
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in _cells(notebook)]
    code = code_hash(*_modules_named_in("\n".join(text for _, text in sources)))
    values = [(name, _as_floats(value)) for name, value in parameters.items()]
    return _digest([sources, code, values, inputs, _data_state(parameters.get("data_root"))])


def _modules_named_in(source):
    """The modules of `lib` that a source imports, directly and through each other."""
    modules = {file.stem: file for file in (ROOT / "lib").glob("*.py") if file.stem not in NO_RESULTS}
    imports = r"^[ \t]*(?:from lib import (\([^)]*\)|[^\n#]*)|(?:from|import) lib\.(\w+))"
    found, texts = set(), [source]
    while texts:
        words = " ".join(" ".join(match) for match in re.findall(imports, texts.pop(), re.MULTILINE))
        new = set(re.findall(r"\w+", words)) & set(modules) - found
        found |= new
        texts.extend(modules[name].read_text("utf-8") for name in new)
    return found


def _data_state(data_root):
    """Names, sizes and times of a data folder's files; None for drawn tissue, which its parameters determine."""
    if data_root in (None, "synthetic"):
        return None
    return _listing(Path(data_root), skip=())


def _is_unchanged(folder, notebook, key, later):
    """A finished stage with this key whose outputs are all there as it left them, or as a later stage left them."""
    record = _record(folder, notebook)
    executed = folder / "notebooks" / notebook.name
    if not record.get("finished") or record["key"] != key or not executed.is_file():
        return False
    listing = _listing(folder)
    rewritten = set().union(*(_claims(record, listing) for record in later))
    return record["notebook"] == file_hash(executed) and all(
        name in listing and (name in rewritten or file_hash(folder / name) == sha256)
        for name, sha256 in record["outputs"].items()
    )


def _run_stage(folder, notebook, key, parameters, inputs, others, force):
    """Run one notebook and record what it wrote; returns how many files of an earlier recipe it left and we removed."""
    record_file = folder / "stages" / f"{notebook.name[:2]}.json"
    previous, before = _record(folder, notebook), _listing(folder)
    mine = _claims(previous, before).difference(*(_claims(record, before) for record in others))
    if force:
        _remove(folder, mine & set(before))
        previous, before, mine = {}, _listing(folder), set()
    # A killed stage is known by this: whatever differs from `before` is its unfinished work.
    unfinished = {"finished": False, "outputs": previous.get("outputs", {})}
    write_json(record_file, unfinished | {"before": previous.get("before", before)})

    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    executed = folder / "notebooks" / notebook.name
    _execute(notebook, executed, parameters, folder)
    seconds = round(time.monotonic() - clock, 1)

    after = _listing(folder)
    written = {name for name, state in after.items() if before.get(name) != state}
    # Files of other parameters must not be taken for results of these.
    stale = {
        name
        for name in (mine & set(after)) - written
        if name.startswith("figures/") or _has_recipe(folder / name)
    }
    _remove(folder, stale)
    outputs = {name: file_hash(folder / name) for name in sorted((written | (mine & set(after))) - stale)}
    record = {
        "finished": True,
        "key": key,
        "parameters": parameters,
        # What an earlier stage wrote and this one only marked as used is not its output.
        "outputs": {name: sha256 for name, sha256 in outputs.items() if inputs.get(name) != sha256},
        "notebook": file_hash(executed),
        "started": started,
        "seconds": seconds,
    }
    write_json(record_file, record)
    return len(stale)


def _claims(record, listing):
    """The files that a stage's record stands for; of an unfinished stage also all that appeared or changed since."""
    claims = set(record.get("outputs", ()))
    if "before" in record:
        claims |= {name for name, state in listing.items() if record["before"].get(name) != state}
    return claims


def _execute(notebook, executed, parameters, folder):
    """Run a notebook with papermill, its kernel's stderr on ours; raises StudyError that names notebook, cell and error."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    def literal(path):
        # papermill fills in braces in paths.
        return str(path).replace("{", "{{").replace("}", "}}")

    try:
        result = papermill.execute_notebook(
            literal(notebook),
            literal(executed),
            parameters=parameters,
            kernel_name="python3",
            cwd=folder,
            progress_bar={"desc": notebook.stem, "leave": False},
            stderr_file=_Terminal(),
            start_timeout=START_TIMEOUT,
            execution_timeout=CELL_TIMEOUT,
            iopub_timeout=OUTPUT_TIMEOUT,
            # The kernel's remarks on its own transport are no news of the study.
            extra_arguments=["--IPKernelApp.log_level=50"],
        )
    except PapermillExecutionError as error:
        problem = f"{error.ename}: {error.evalue}"
        raise _stage_error(notebook, executed, error.exec_count, problem, error.traceback) from None
    except (RuntimeError, TimeoutError) as error:
        # nbclient: the kernel did not start, died, or a cell took too long.
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if type(error).__name__ == "DeadKernelError":
            problem += " (the kernel's process ended; too little memory is a common cause)"
        raise _stage_error(notebook, executed, None, problem) from None
    for cell in result.cells:
        # papermill takes a SystemExit for success and leaves the rest of the notebook out.
        if any(output.get("ename") == "SystemExit" for output in cell.get("outputs", ())):
            problem = "SystemExit: a notebook must not end itself"
            raise _stage_error(notebook, executed, cell.execution_count, problem)


def _stage_error(notebook, executed, count, problem, traceback=()):
    """count: the kernel's execution count of the failing cell; None means the last cell that was started."""
    added = ("injected-parameters", "papermill-error-cell-tag")
    cells = [cell for cell in _cells(executed) if not set(added) & set(cell["metadata"].get("tags", ()))]
    number = next((i for i, cell in enumerate(cells) if count and cell.get("execution_count") == count), None)
    if number is None:
        number = max(
            (i for i, cell in enumerate(cells) if cell["metadata"].get("papermill", {}).get("start_time")),
            default=0,
        )
    lines = "".join(cells[number]["source"]).splitlines()
    found = re.search(rf"Cell In\[{count}\], line (\d+)", re.sub(r"\x1b\[[\d;]*m", "", "\n".join(traceback)))
    at = int(found[1]) - 1 if found else -1
    first = max(0, at - 4)
    excerpt = [
        f"  {'>' if i == at else ' '} {line}" for i, line in enumerate(lines) if first <= i < first + 9
    ]
    return StudyError(
        "\n".join(
            [
                f"{_shown(notebook)}, cell {number + 1} (counted from 1, text cells too):",
                *excerpt,
                problem[:2000],
                f"The whole traceback: {_shown(executed)}. Finished work is kept; the last published report is as it was.",
            ]
        )
    )


class _Terminal:
    """Takes the kernel's stderr and writes its finished lines above the progress bar."""

    def __init__(self):
        self.rest = ""

    def write(self, text):
        from tqdm import tqdm

        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            # Of a progress bar in the kernel only the last state is worth a line.
            tqdm.write(line.rstrip("\r").rsplit("\r", 1)[-1], file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


def _publish_if_changed(stages, run, folder):
    """Publish unless the report is there, untouched, from the same stages and code; returns its index.html."""
    report = home() / "reports" / run
    note = folder / "stages" / "published.json"
    records = [_record(folder, stage) for stage in stages]
    state = _digest(
        [code_hash("report"), [(record["key"], record["notebook"], record["outputs"]) for record in records]]
    )
    published, now = _read_json(note), commit()
    # A report that says "-dirty" is made again once its code is committed.
    committed = published.get("commit", "").endswith("-dirty") and now and not now.endswith("-dirty")
    files = published.get("files")
    if published.get("state") == state and not committed and files == _hashes(report):
        return report / "index.html"
    for executed in (folder / "notebooks").glob("*.ipynb"):
        if executed.name not in [stage.name for stage in stages]:
            executed.unlink()
    provenance = {
        "commit": now,
        "versions": library_versions(),
        "device": device_name(),
        "started": min(record["started"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records), 1),
    }
    from lib.report import publish

    try:
        publish(run, provenance)
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(
            f"the report could not be published: {error}\nThe stages' results are kept; the last published report is as it was."
        ) from error
    write_json(note, {"state": state, "commit": now, "files": _hashes(report)})
    return report / "index.html"


# ---------------------------------------------------------------------------------------------- files


def _cells(notebook):
    try:
        return json.loads(Path(notebook).read_text("utf-8"))["cells"]
    except (ValueError, KeyError):
        raise StudyError(f"{_shown(notebook)} is not a readable notebook") from None


def _record(folder, stage):
    return _read_json(folder / "stages" / f"{stage.name[:2]}.json")


def _listing(folder, skip=("notebooks", "stages")):
    """Every file under a folder, hidden ones and the folders to skip left out: relative name -> [bytes, time in ns]."""
    listing = {}
    for where, folders, names in os.walk(folder):
        top = Path(where) == Path(folder)
        folders[:] = sorted(name for name in folders if name[0] != "." and not (top and name in skip))
        for name in sorted(names):
            path = Path(where, name)
            if name[0] != "." and path.is_file():
                state = path.stat()
                listing[path.relative_to(folder).as_posix()] = [state.st_size, state.st_mtime_ns]
    return listing


def _hashes(folder):
    return {name: file_hash(folder / name) for name in _listing(folder, skip=())}


def _recipe_file(path):
    path = Path(path)
    return path.with_name(path.name.removesuffix(".gz")).with_suffix(".json")


def _has_recipe(path):
    return "recipe" in _read_json(_recipe_file(path))


def _remove(folder, names):
    for name in names:
        (folder / name).unlink(missing_ok=True)


def file_hash(path):
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(value):
    return json.loads(json.dumps(value))


def _as_floats(value):
    """Numbers as floats, so that 4 and 4.0 are one parameter value."""
    if isinstance(value, list):
        return [_as_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _read_json(path):
    """The object in a JSON file; {} where there is none, or a damaged one."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path, value):
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def _shown(path):
    """A path as short as it can be said from here."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


def main(arguments=None, notebooks=NOTEBOOKS):
    """The command line; returns the exit status: 0 done, 1 a stage or the publishing failed, 2 wrong use, 130 stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.study", description="Run the study and publish its report."
    )
    parser.add_argument("profile", help="a profile in notebooks/profiles/ (smoke, quick, ...) or a YAML file")
    parser.add_argument(
        "--data-root", metavar="DIR", help="a folder with BreaKHis images, instead of the profile's"
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="change one parameter; may be repeated",
    )
    parser.add_argument("--force", action="store_true", help="run everything anew, unchanged or not")
    parser.add_argument(
        "--home", metavar="DIR", help="where runs/ and reports/ lie (default: the repository)"
    )
    options = parser.parse_args(arguments)
    if options.home:
        os.environ["STUDY_HOME"] = str(Path(options.home).absolute())
    try:
        run_study(options.profile, options.data_root, options.set, options.force, notebooks)
    except ParameterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StudyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here, finished work is kept", file=sys.stderr)
        return 130
    return 0


def _terminate(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    # Ended from outside, the kernel is shut down as after Ctrl-C.
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
