"""How results are said to people: names, numbers, sentences and tables, the same in notebooks, figures and the summary."""

import re
from html import escape

import pandas as pd
from IPython.display import HTML

ATTACK_NAMES = {
    "none": "clean",
    "random_noise": "random noise",
    "transfer_fgsm": "transferred FGSM",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "apgd_ce": "APGD-CE",
    "fab": "FAB",
    "square": "Square",
    "worst_case": "worst case",
}


def model_name(model):
    """A model's name for a reader: "adversarial training"."""
    return str(model).replace("_", " ").replace("fgsm", "FGSM").replace("gaussian", "Gaussian")


def as_text(name):
    """Someone's name for a run, folder, case or file, for Markdown: shown letter by letter, never taken for markup.

    What HTML or Markdown would take for its own becomes an entity; an underscore inside a word and brackets that make no link stay.
    """
    line = escape(" ".join(str(name).split()), quote=False)
    return re.sub(r"[\\`*|~$]|\](?=[(\[])|(?<!\w)_|_(?!\w)", lambda mark: f"&#{ord(mark[0])};", line)


def attack_name(attack, epsilon=None):
    """An attack's name for a reader, with its epsilon: "PGD 4/255", or "clean" where there is none."""
    name = ATTACK_NAMES.get(attack, str(attack).replace("_", " "))
    return name if epsilon is None or attack == "none" else f"{name} {format_epsilon(epsilon)}"


def format_epsilon(epsilon):
    """An epsilon in [0, 1] as "k/255": 4 / 255 is "4/255", 0.1 is "25.5/255", no change is "0"."""
    k = round(float(epsilon) * 255, 2)
    return f"{k:g}/255" if k else "0"


def sentences(metrics):
    """Rows of `metrics` for one subset as sentences: a model's clean result, then one sentence for each attack on it."""
    lines = []
    for (model, split_by), rows in metrics.groupby(["model", "split_by"], sort=False):
        name = f"{model_name(model)} (split by {split_by})"
        for row in rows[rows["attack"] == "none"].to_dict("records"):
            lines.append(
                f"**{name}**, clean: {share(row['tp'] + row['tn'], row['n'])} right{interval(row)}; "
                f"sensitivity {number(row['sensitivity'])}{interval(row, 'sensitivity')}, "
                f"specificity {number(row['specificity'])}{interval(row, 'specificity')}."
            )
        for attack, attacked in rows[rows["attack"] != "none"].groupby("attack", sort=False):
            parts = [
                f"{number(row['accuracy'])}{interval(row)} at {format_epsilon(row['epsilon'])}"
                for row in attacked.sort_values("epsilon").to_dict("records")
            ]
            lines.append(f"**{name}** under {attack_name(attack)}: accuracy {', '.join(parts)}.")
    return lines


def gains(comparisons):
    """What each model has over the baseline, from rows of `comparisons`: a sentence a model, clean first, then by attack."""
    lines = []
    compared = comparisons[comparisons["model_b"] == "baseline"]
    for (model, split_by), rows in compared.groupby(["model_a", "split_by"], sort=False):
        rows = rows.assign(last=rows["attack"] != "none").sort_values(["last", "attack", "epsilon"])
        parts = [
            f"{difference(row['difference'], row)} {'under ' * row['last']}{attack_name(row['attack'], row['epsilon'])}"
            for row in rows.to_dict("records")
        ]
        lines.append(
            f"**{model_name(model)} (split by {split_by})** against the baseline: {', '.join(parts)}."
        )
    return lines


def difference(value, row, unit=" points"):
    """A difference of two rates in points, with the interval that `row` holds as low and high where there is one."""
    between = "" if pd.isna(row["low"]) else f" [{points(row['low'])}, {points(row['high'])}]"
    return f"{points(value)}{unit}{between}"


def points(value):
    """A difference of two rates in points, whole ones but where that would make nothing of it."""
    exact, whole = 100 * value, round(100 * value)
    return f"{whole:+d}" if whole or abs(exact) < 0.05 else f"{exact:+.1f}"


def readable(rows, columns):
    """A table for a notebook, as HTML: a value and its interval in one cell, epsilons as k/255, "–" for what does not exist.

    rows: those of `metrics`, `comparisons`, `checks` or others with such columns, as a DataFrame or dicts; columns: the names shown.
    """
    rows = pd.DataFrame(rows)

    def text(row, name):
        value = row[name]
        if value is None or pd.isna(value):
            return "–"
        if name == "epsilon":
            return format_epsilon(value)
        if not isinstance(value, float):
            return escape(str(value))
        if value.is_integer() and value > 1:  # a count in a column with gaps
            return f"{value:.0f}"
        low, high = (
            ("low", "high")
            if name in ("difference", "leakage", "measured")
            else (f"{name}_low", f"{name}_high")
        )
        return (
            f"{value:.3f}" if name.startswith("p_") else number(value) + between(row.get(low), row.get(high))
        )

    side = {name: "right" if pd.api.types.is_numeric_dtype(rows[name]) else "left" for name in columns}
    lines = [
        "".join(f'<th style="text-align: {side[name]}">{escape(heading(name))}</th>' for name in columns)
    ]
    lines += [
        "".join(f'<td style="text-align: {side[name]}">{text(row, name)}</td>' for name in columns)
        for row in rows.to_dict("records")
    ]
    return HTML("<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>")


def heading(name):
    """A column's name for a reader: "balanced accuracy", "AUROC"."""
    return "AUROC" if name == "auroc" else name.replace("_", " ")


def number(value):
    """A fraction with two decimals, or "–" where it is undefined."""
    return "–" if value is None or pd.isna(value) else f"{value:.2f}"


def share(count, n):
    """A share as a fraction with its counts: "0.91 (73 of 80)"."""
    return f"{number(count / n)} ({int(count)} of {int(n)})"


def interval(row, rate="accuracy"):
    """The 95 % interval of one of a row's fractions in brackets, nothing where there is none."""
    return between(row[f"{rate}_low"], row[f"{rate}_high"])


def between(low, high):
    """The same from its ends."""
    return "" if low is None or pd.isna(low) else f" [{low:.2f}, {high:.2f}]"
