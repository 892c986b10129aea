"""What a run records: every part of `results.json` that follows from its tables, and the results of other runs beside it."""

import json
import sys

import pandas as pd

from lib import audit, checks, data, evaluation, papers, runs, splits

COSTLY = ("audit_steps", "square_queries")  # of the attacks that only some runs make
# Parameters that change no model: they name files, or add models, attacks or votes and leave what else is there as it is.
_FILES = {"run", "compare_with", "data_root", "weights_dir", "skip_bad_files", "allow_incomplete"}
_ADDED = {"epsilons", *COSTLY, "audit_images", "noise_samples", "other_augmentations", "other_sigmas"}
NOT_OF_MODELS = _FILES | _ADDED | {"other_starts", "recipes", "primary_defense"}
LEAKS_BETWEEN = ("split_by", "seed", "precision")  # in what two runs may differ to say what a split is worth


def statistics(table, split, used, dataset, audited, beside=()):
    """All that follows from the tables of a run, as `results.json` has it, {part: DataFrame or list of rows}.

    table: the predictions; split: the rows of split.csv at the run's magnifications; used: the run's parameters; dataset: what
    `runs.dataset` says of it; audited: the rows of audit.csv; beside: tables of predictions of other runs, for the leakage.
    """
    everything, epsilon = evaluation.with_worst_case(table), used["train_epsilon"] / 255
    metrics, counts = evaluation.metrics(everything), splits.counts(split)
    return {
        "split": counts,
        "metrics": metrics,
        "comparisons": evaluation.comparisons(everything, used["primary_defense"], epsilon),
        "leakage": evaluation.leakage([table, *beside]),
        "smallest_epsilons": audit.smallest_epsilons(metrics),
        "distances": audit.distances(table),
        "reliability": audit.reliability(table),
        "checks": checks.verdicts(table, audited, epsilon),
        "papers": papers.records(table, counts, used) if dataset["name"] == data.DATABASE else [],
    }


def plain(parts):
    """Tables as lists of rows for JSON; all else as it is."""
    return {
        name: evaluation.records(part) if isinstance(part, pd.DataFrame) else part
        for name, part in parts.items()
    }


def published(names, dataset):
    """The results of other published reports by name, to show beside; reports on other images are skipped with a message.

    dataset: that of this run. Raises FileNotFoundError where there is no such report.
    """
    found = {}
    for name in names:
        path = runs.report(name) / "results.json"
        if not path.exists():
            raise FileNotFoundError(
                f"No published report {name!r} to compare with: run it first, or take it out of compare_with."
            )
        results = json.loads(path.read_text("utf-8"))
        if results["dataset"]["fingerprint"] == dataset["fingerprint"]:
            found[name] = results
        else:
            print(f"{name} is skipped: it is a report on other images", file=sys.stderr)
    return found


def made_alike(one, two, but=LEAKS_BETWEEN):
    """Whether the models of two runs were made alike, given their parameters, but for those named; recipes are not compared."""
    ignored = NOT_OF_MODELS.union(but)
    left, right = ({name: each[name] for name in each if name not in ignored} for each in (one, two))
    return left == right


def tables(other, used):
    """The tables of predictions of other reports (`published`) whose models were made as this run's, but for split and seed.

    used: this run's parameters. One by the other split that is left out, since what else differs would pass for leakage, is said.
    """
    found = []
    for name, them in other.items():
        if made_alike(used, them["parameters"]):
            found.append(evaluation.read_piece(runs.report(name) / "predictions.csv.gz"))
        elif them["parameters"].get("split_by") != used["split_by"]:
            print(f"not used for the leakage: the models of {name} were made otherwise", file=sys.stderr)
    return found


def trainings(histories):
    """What each training came to at the epoch that was kept, the one with the least validation loss: a row a model.

    histories: {model: DataFrame of its history}.
    """
    rows = []
    for model, history in histories.items():
        kept = history.loc[history["validation_loss"].idxmin()]
        row = {"model": model, "epochs": len(history), "kept": int(kept["epoch"])}
        names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
        rows.append(row | {name: float(kept[name]) for name in names})
    return pd.DataFrame(rows)
