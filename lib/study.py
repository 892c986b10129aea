"""The headless runner: all notebooks in order, only where something changed, then one report (`python -m lib.study quick`).

Everything heavy is imported where it is used, so that an unchanged study is checked in a second.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from lib import profiles, runs

NOTEBOOKS = runs.ROOT / "notebooks"
# The stages in order; the last one gathers what all others wrote. Other notebooks in the folder are nobody's stage.
STAGES = (
    "01_data_split",
    "02_transfer_learning",
    "03_fgsm_attack",
    "04_gaussian_noise_defense",
    "05_adversarial_training_defense",
    "07_robustness_audit",
    "06_comparison",
)
WELCOME = "00_welcome"
OPTIONAL = ("04_gaussian_noise_defense",)  # a study may go without; the others need each other
DESCRIPTIONS = (
    "images.csv",
    "dsfold*.txt",
)  # in a folder of images, small files that say what the images are

# The runner itself; every other module writes numbers, words or figures of a stage.
NO_RESULTS = ("__init__", "profiles", "runs", "study", "values")

# For the kernels, measured on two cores. Threads that spin long while they wait make torch ten times slower once anything
# else runs on the machine; this much spinning costs 7 % on an idle one. Memory given back to the system after each batch
# and taken again costs a fifth of the training time; with glibc it is kept instead.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "10000",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}

# Pixels shown in one training from which on the time of all is foretold: minutes on two cores.
LONG = 1e8
FIRST_TRAINING = "02_transfer_learning"
TIMING = "import json, sys; from lib import training; print(training.seconds_ahead(json.load(sys.stdin), sys.argv[1]))"

# A training cell may take hours; a cell that hangs must end some day.
CELL_TIMEOUT = 12 * 3600
START_TIMEOUT = 180
# nbclient waits 4 s for a cell's last output, which a busy machine with two cores can miss.
OUTPUT_TIMEOUT = 120


class StudyError(RuntimeError):
    """A stage failed, another study holds the run, or the report could not be published; the text says which."""


def run_study(profile, data_root=None, settings=(), force=False, notebooks=NOTEBOOKS, without=()):
    """Run every notebook whose parameters, code or inputs changed, publish the report, and return its index.html.

    profile: a name or a YAML path. data_root: a BreaKHis folder that replaces the profile's data. settings: texts of the form
    "NAME=VALUE". force: run every stage anew, finished work inside it included. without: numbers or names of notebooks to leave
    out, of `OPTIONAL`.
    Raises ParameterError before anything is touched, StudyError when a stage or the publishing fails; finished stages, finished
    work inside a stage and the last good report stay.
    """
    from filelock import Timeout

    began = time.monotonic()
    stages = _stages(notebooks)
    parameters = profiles.resolve(profile, data_root, settings, stages)
    # Kernels run inside the run folder, where a relative STUDY_HOME would mean another place.
    os.environ["STUDY_HOME"] = str(runs.home())
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The kernels take `lib` from where this runner has it, not from wherever it is installed.
    paths = [str(runs.ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    folder = runs.folder(parameters["run"])
    stages = _left(stages, without, folder)
    for name in ("stages", "notebooks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        with runs.locked(folder / ".lock", timeout=0):
            runs.restore_report(parameters["run"])
            records = _run_stages(stages, parameters, folder, force)
            report = _publish_if_changed(records, parameters["run"], folder)
    except Timeout:
        raise StudyError(
            f"another study is running on {folder}; wait for it, or choose another run name"
        ) from None
    print(f"finished in {time.monotonic() - began:.0f} s: {_shown(report)}", flush=True)
    return report


def _stages(notebooks):
    """The notebooks of the study in their order; says which others lie beside them."""
    stages = [Path(notebooks) / f"{name}.ipynb" for name in STAGES]
    if missing := [stage.name for stage in stages if not stage.is_file()]:
        raise profiles.ParameterError(f"{notebooks} lacks {', '.join(missing)}")
    others = {path.name for path in Path(notebooks).glob("*.ipynb") if path.stem != WELCOME}
    if others := sorted(others.difference(stage.name for stage in stages)):
        print(f"not part of the study, ignored: {', '.join(others)}", flush=True)
    return stages


def _left(stages, without, folder):
    """The stages without those that are named; results of such a one must not be there, they would be compared."""
    numbers = {name: name.split("_")[0] for name in OPTIONAL}
    if unknown := set(without).difference(numbers, numbers.values()):
        raise profiles.ParameterError(
            f"notebook {', '.join(sorted(unknown))} cannot be left out, only {', '.join(OPTIONAL)}"
        )
    left_out = [name for name, number in numbers.items() if {name, number} & set(without)]
    if ran := [name for name in left_out if _ran(folder, name)]:
        raise profiles.ParameterError(
            f"the run {folder.name} holds results of {', '.join(ran)}: choose another run name"
        )
    return [stage for stage in stages if stage.stem not in left_out]


def _ran(folder, name):
    """Whether a notebook ran for this run, by its record (an earlier version's goes by the number) or by what it writes."""
    wrote = [pattern for pattern, writer in runs.WRITERS if writer == name]
    return any(any(folder.glob(pattern)) for pattern in (f"stages/{name.split('_')[0]}*.json", *wrote))


def overview():
    """How far each run is: dicts with run, images (what was studied), finished (stages), next (the notebook to run) and report."""
    found = []
    for folder in sorted(path for path in (runs.home() / "runs").glob("[!.]*") if path.is_dir()):
        finished = [name for name in STAGES if _record(folder, name).get("finished")]
        if not finished:
            continue
        about = runs.read_json(folder / "dataset.json")
        report = runs.report(folder.name) / "index.html"
        waiting = [name for name in STAGES if name not in finished]
        found.append(
            {
                "run": folder.name,
                "images": f"{about.get('images', 0)} of {about.get('name', 'unknown')}",
                "finished": f"{len(finished)} of {len(STAGES)}",
                "next": waiting[0] if waiting else "",
                "report": _shown(report) if report.exists() else "",
            }
        )
    return found


def _run_stages(stages, parameters, folder, force):
    """Run the stages that changed; returns what is recorded of all of them, {name: record}."""
    declared = {stage: profiles.declared_in(stage) for stage in stages}
    everything = {
        name: default for own in declared.values() for name, (_, default) in own.items()
    } | parameters
    for file in (folder / "stages").glob("*.json"):
        if file.stem not in ("published", *(stage.stem for stage in stages)):
            file.unlink()  # of a notebook that is no stage any more; its parameters would be taken for this study's
    records, inputs = {stage.stem: _record(folder, stage.stem) for stage in stages}, {}
    for number, notebook in enumerate(stages):
        own = {name: everything[name] for name in declared[notebook]}
        # The last stage notes the parameters of all others, also those that changed nothing of what they wrote.
        noted = everything if notebook == stages[-1] else own
        key = _key(notebook, own, noted, inputs)
        others = [records[stage.stem] for stage in stages if stage != notebook]
        if not force and _is_unchanged(folder, notebook, records[notebook.stem], key, others[number:]):
            print(f"{notebook.stem:<34} unchanged, skipped", flush=True)
        else:
            if notebook.stem == FIRST_TRAINING:
                _foretell(everything, folder)
            started = time.monotonic()
            try:
                records[notebook.stem], stale = _run_stage(
                    folder, notebook, records[notebook.stem], key, own, inputs, others, force
                )
            except StudyError:
                print(f"{notebook.stem:<34} failed after {time.monotonic() - started:.0f} s", flush=True)
                raise
            note = f", removed {stale} files of an earlier recipe" if stale else ""
            print(f"{notebook.stem:<34} ran in {time.monotonic() - started:.0f} s{note}", flush=True)
        inputs = inputs | records[notebook.stem]["outputs"]
    return records


def _foretell(parameters, folder):
    """Say before the first training how long all of them take on this machine, where that is minutes."""
    images = runs.read_json(folder / "dataset.json").get("images", 0)
    if images * parameters["epochs"] * parameters["image_size"] ** 2 < LONG:
        return
    # In a process of its own, which leaves no memory taken. What fails there the notebook will say.
    command = [sys.executable, "-c", TIMING, str(folder / "split.csv")]
    done = subprocess.run(command, input=json.dumps(parameters), capture_output=True, text=True)
    if done.returncode == 0 and (minutes := float(done.stdout) / 60) > 2:
        said = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.0f} minutes"
        print(
            f"all trainings together take about {said} on this machine, less what is kept from before; attacks come on top",
            flush=True,
        )


def _key(notebook, parameters, noted, inputs):
    """What a stage's results depend on, in one hash. parameters: its own; noted: those that it writes down."""
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in profiles.cells(notebook)]
    code = runs.code_hash(*_modules_named_in("\n".join(text for _, text in sources)))
    values = [(name, _as_floats(value)) for name, value in noted.items()]
    beside = [runs.report(run) / "results.json" for run in parameters.get("compare_with", [])]
    weights = [
        Path(start) for start in (parameters.get("pretrained", ""), *parameters.get("other_starts", []))
    ]
    read = [runs.file_hash(path) if os.path.isfile(path) else None for path in (*beside, *weights)]
    folders = [_data_state(parameters.get("data_root")), _data_state(parameters.get("weights_dir") or None)]
    return runs.digest([sources, code, values, inputs, folders, read])


def _modules_named_in(source):
    """The modules of `lib` that a source imports, directly and through each other."""
    modules = {file.stem: file for file in (runs.ROOT / "lib").glob("*.py") if file.stem not in NO_RESULTS}
    imports = r"^[ \t]*(?:from lib import (\([^)]*\)|[^\n#]*)|(?:from|import) lib\.(\w+))"
    found, texts = set(), [source]
    while texts:
        words = " ".join(" ".join(match) for match in re.findall(imports, texts.pop(), re.MULTILINE))
        new = set(re.findall(r"\w+", words)) & set(modules) - found
        found |= new
        texts.extend(modules[name].read_text("utf-8") for name in new)
    return found


def _data_state(data_root):
    """The files of a folder; of the whole database, which is always the same, those of its folds alone.

    None for synthetic tissue, and for the database before it is downloaded.
    """
    if data_root in (None, "synthetic"):
        return None
    if data_root == "breakhis":
        from lib import database

        files = _file_states(runs.home() / "data" / "BreaKHis_v1")
        images = sum(name.endswith(".png") for name in files)
        if images not in (0, database.TOTAL):
            return files
        return {
            name: state for name, state in files.items() if any(map(Path(name).match, DESCRIPTIONS))
        } or None
    return _file_states(Path(data_root))


def _file_states(folder):
    """Each file's size and times, the last of which no program can set back; of those that say what images are, the content."""
    states = {}
    for name, state in _listing(folder, skip=()).items():
        path = folder / name
        described = any(map(path.match, DESCRIPTIONS))
        states[name] = runs.file_hash(path) if described else [*state, path.stat().st_ctime_ns]
    return states


def _is_unchanged(folder, notebook, record, key, later):
    """A finished stage with this key whose outputs are all there as it left them, or as a later stage left them."""
    executed = folder / "notebooks" / notebook.name
    if not record.get("finished") or record["key"] != key or not executed.is_file():
        return False
    listing = _listing(folder)
    rewritten = set().union(*(_claims(record, listing) for record in later))
    return record["notebook"] == runs.file_hash(executed) and all(
        name in listing and (name in rewritten or runs.file_hash(folder / name) == sha256)
        for name, sha256 in record["outputs"].items()
    )


def _run_stage(folder, notebook, previous, key, parameters, inputs, others, force):
    """Run one notebook; returns the record of what it wrote, and how many files of an earlier recipe it left and we removed."""
    record_file = folder / "stages" / f"{notebook.stem}.json"
    before = _listing(folder)
    mine = _claims(previous, before).difference(*(_claims(record, before) for record in others))
    if force:
        _remove(folder, mine & set(before))
        previous, before, mine = {}, _listing(folder), set()
    # A killed stage is known by this: whatever differs from `before` is its unfinished work.
    unfinished = {"finished": False, "outputs": previous.get("outputs", {})}
    runs.write_note(record_file, unfinished | {"before": previous.get("before", before)})

    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    executed = folder / "notebooks" / notebook.name
    environment = _execute(notebook, executed, parameters, folder)
    seconds = round(time.monotonic() - clock, 1)

    after = _listing(folder)
    written = {name for name, state in after.items() if before.get(name) != state}
    # Files of other parameters must not be taken for results of these.
    stale = {
        name
        for name in (mine & set(after)) - written
        if name.startswith(("figures/", "history/")) or runs.recipe_of(folder / name)
    }
    _remove(folder, stale)
    outputs = {
        name: runs.file_hash(folder / name) for name in sorted((written | (mine & set(after))) - stale)
    }
    record = {
        "finished": True,
        "key": key,
        "parameters": parameters,
        # What an earlier stage wrote and this one only marked as used is not its output.
        "outputs": {name: sha256 for name, sha256 in outputs.items() if inputs.get(name) != sha256},
        "notebook": runs.file_hash(executed),
        "started": started,
        "seconds": seconds,
        "environment": environment,
    }
    runs.write_note(record_file, record)
    return record, len(stale)


def _claims(record, listing):
    """The files that a stage's record stands for; of an unfinished stage also all that appeared or changed since."""
    claims = set(record.get("outputs", ()))
    if "before" in record:
        claims |= {name for name, state in listing.items() if record["before"].get(name) != state}
    return claims


def _execute(notebook, executed, parameters, folder):
    """Run a notebook with papermill, its kernel's stderr on ours; returns what computed there (`runs.environment`).

    Raises StudyError that names notebook, cell and error.
    """
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from papermill.exceptions import PapermillExecutionError

    class OwnKernel(AsyncKernelManager):
        """Looks for "python3" in no folder, so that it is always this very environment's."""

        def _kernel_spec_manager_default(self):
            return KernelSpecManager(kernel_dirs=[])

    def literal(path):
        # papermill fills in braces in paths.
        return str(path).replace("{", "{{").replace("}", "}}")

    try:
        with runs.writing(executed):
            result = papermill.execute_notebook(
                literal(notebook),
                literal(executed),
                parameters=parameters,
                kernel_name="python3",
                kernel_manager_class=OwnKernel,
                cwd=folder,
                progress_bar={"desc": notebook.stem, "leave": False},
                stderr_file=_Terminal(),
                start_timeout=START_TIMEOUT,
                execution_timeout=CELL_TIMEOUT,
                iopub_timeout=OUTPUT_TIMEOUT,
                # All its files are written: unloading its libraries would only take two seconds a stage.
                shutdown_kernel="immediate",
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
    shown = [output.get("data", {}) for cell in result.cells for output in cell.get("outputs", ())]
    said = [data[runs.ENVIRONMENT] for data in shown if runs.ENVIRONMENT in data]
    return said[0] if said else runs.environment()


def _stage_error(notebook, executed, count, problem, traceback=()):
    """count: the kernel's execution count of the failing cell; None means the last cell that was started."""
    added = ("injected-parameters", "papermill-error-cell-tag")
    cells = [
        cell for cell in profiles.cells(executed) if not set(added) & set(cell["metadata"].get("tags", ()))
    ]
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


def _publish_if_changed(records, run, folder):
    """Publish unless the report is there, untouched, from the same stages and code; returns its index.html."""
    report = runs.home() / "reports" / run
    note = folder / "stages" / "published.json"
    state = runs.digest(
        [
            runs.code_hash("report"),
            [(record["key"], record["notebook"], record["outputs"]) for record in records.values()],
        ]
    )
    environments = [record["environment"] for record in records.values()]
    # A stage of uncommitted code that has not changed since is one of the commit that now holds it, and its report is made again.
    now = runs.commit()
    commits = [now if each["commit"].endswith("-dirty") else each["commit"] for each in environments]
    files, commit = _hashes(report), _joined(commits)
    published = _record(folder, "published")
    committed = "-dirty" in published.get("commit", "") and "-dirty" not in commit
    if published.get("state") == state and not committed and files == published["files"]:
        return report / "index.html"
    for executed in (folder / "notebooks").glob("*.ipynb"):
        if executed.stem not in records:
            executed.unlink()
    written = [name for record in records.values() for name in record["outputs"]]
    histories = [name for name in written if name.startswith("history/") and name.endswith(".csv")]
    provenance = {
        "commit": commit,
        "versions": _versions([each["versions"] for each in environments]),
        "device": _joined(each["device"] for each in environments),
        "started": min(record["started"] for record in records.values()),
        "seconds": round(sum(record["seconds"] for record in records.values()), 1),
        "training_seconds": round(sum(_seconds(folder / name) for name in histories), 1),
    }
    from lib.report import publish

    try:
        publish(run, provenance)
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(
            f"the report could not be published: {error}\nThe stages' results are kept; the last published report is as it was."
        ) from error
    runs.write_note(note, {"state": state, "commit": commit, "files": _hashes(report)})
    return report / "index.html"


# ---------------------------------------------------------------------------------------------- files


def _versions(stages):
    """The packages that the stages ran with, also those that ran long ago: "2.9.0 and 2.10.0" where they differ."""
    names = dict.fromkeys(name for stage in stages for name in stage)
    return {name: _joined(stage.get(name) for stage in stages) for name in names}


def _joined(values):
    """What the stages say, each thing once: "2.9.0 and 2.10.0"."""
    return " and ".join(dict.fromkeys(value for value in values if value))


def _seconds(history):
    """How long a training took, whenever that was."""
    with open(history, newline="") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file))


def _record(folder, name):
    """What was recorded of a stage, or of the "published" report; {} where nothing was, or what is there is damaged, which is said."""
    file = folder / "stages" / f"{name}.json"
    record = runs.read_note(file)
    if not record and os.path.lexists(file):
        print(f"{_shown(file)} is damaged and is ignored: what it recorded runs again", flush=True)
    return record


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
    return {name: runs.file_hash(folder / name) for name in _listing(folder, skip=())}


def _remove(folder, names):
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _as_floats(value):
    """Numbers as floats, so that 4 and 4.0 are one parameter value."""
    if isinstance(value, list):
        return [_as_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


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
    parser.add_argument(
        "--without",
        metavar="NN",
        action="append",
        default=[],
        help="leave a notebook out: 04, or its whole name",
    )
    parser.add_argument("--force", action="store_true", help="run everything anew, unchanged or not")
    parser.add_argument(
        "--home", metavar="DIR", help="where runs/ and reports/ lie (default: the repository)"
    )
    options = parser.parse_args(arguments)
    if options.home:
        os.environ["STUDY_HOME"] = options.home
    try:
        run_study(options.profile, options.data_root, options.set, options.force, notebooks, options.without)
    except profiles.ParameterError as error:
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
