"""Shows a model the test images, as they are and under attack, and keeps the rows of the predictions table."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lib import attacks, data, evaluation, models, runs, training

ATTACKS = ("random_noise", "fgsm", "pgd", "transfer_fgsm")
BATCH_PIXELS = 2**19  # of the images attacked at once; bounds the memory of a backward pass


def checkpoint(folder, model, fold=0):
    """Where a run keeps a model's weights: models/<model>.safetensors, with the fold's number from the second fold on."""
    return folder / "models" / f"{model}{f'_fold{fold}' if fold else ''}.safetensors"


def starting_weights(folder, pretrained, fold=0):
    """What `models.build` starts from: the checkpoint that 02 trained on another magnification for "200X", else as given."""
    magnification = data.source_magnification(pretrained)
    return checkpoint(folder, f"source_{magnification}X", fold) if magnification else pretrained


def start_recipe(start):
    """Starting weights for a recipe: the hash of a checkpoint, or the name."""
    return runs.file_hash(start) if Path(start).is_file() else str(start)


def attack_table(epsilons, pgd_steps):
    """What each attack name means in this run, one row an attack: steps, restarts, step size, queries, precision.

    epsilons: fractions in [0, 1]; queries counts passes through the model for an image, at most.
    """
    starts = 2
    rows = {
        "none": (0, 0, "", 1),
        "random_noise": (0, 0, "", 1),
        "fgsm": (1, 0, "epsilon", 2),
        "pgd": (pgd_steps, starts - 1, f"{2.5 / pgd_steps:g} epsilon", 2 + starts * (2 * pgd_steps + 1)),
        "transfer_fgsm": (1, 0, "epsilon", 1),
    }
    columns = ["name", "description", "steps", "restarts", "step_size", "queries", "epsilons", "precision"]
    shown = " ".join(f"{epsilon * 255:g}/255" for epsilon in epsilons)
    return pd.DataFrame(
        [
            (name, attacks.DESCRIPTIONS[name], *values, "0" if name == "none" else shown, "float32")
            for name, values in rows.items()
        ],
        columns=columns,
    )


def evaluate(
    folder,
    name,
    images,
    names,
    *,
    side="test",
    epsilons=(),
    pgd_steps=0,
    seed=0,
    source="baseline",
    margins=None,
):
    """The model's predictions on one side's images of every fold under each attack of `names`. Returns the rows.

    folder: the run's; images: `data.Images`; epsilons: fractions in [0, 1]; source: the model whose FGSM images
    `transfer_fgsm` shows; margins(fold) gives, for a model without a network, a function from images (n, H, W, 3) to margins.
    Each attack's rows (PGD: each epsilon's) are a file in predictions/, kept: the same call goes on where it was killed.
    """
    makes_rows = (evaluation.predict, evaluation.prediction_rows)
    code = runs.code_hash(data.decode, data.Side, models.load, perturb, margins, *makes_rows)
    rows = []
    for fold in images.folds:
        shown = images.side(side, fold)
        batch, labels = shown.tensors()
        path, source_path = checkpoint(folder, name, fold), checkpoint(folder, source, fold)
        fitted_to = f"{name} on {images.side('train', fold).fingerprint}"
        network = answer = None
        for attack in names:
            if attack == "transfer_fgsm" and name == source:
                continue  # its own FGSM images are not a transfer
            kept = []
            transfers = attack == "transfer_fgsm"
            groups = (
                [(epsilon,) for epsilon in epsilons]
                if attack == "pgd"
                else [(0.0,) if attack == "none" else tuple(epsilons)]
            )
            for group in groups:
                recipe = {
                    "model": fitted_to if margins else runs.file_hash(path),
                    "source": runs.file_hash(source_path) if transfers else "",
                    "images": [shown.fingerprint, list(batch.shape)],
                    "attack": [attack, list(group), pgd_steps if attack == "pgd" else 0],
                    "seed": seed,
                    "split_by": shown.table["split_by"].iloc[0],
                    "code": code,
                }
                tail = (f"-{group[0] * 255:g}" if attack == "pgd" else "") + (
                    "" if side == "test" else f"-{side}"
                )
                piece = folder / "predictions" / f"{name}-{attack}{tail}-{recipe['split_by']}{fold}.csv.gz"
                kept.append(piece.name)
                if runs.is_current(piece, recipe):
                    rows.append(evaluation.read_piece(piece))
                    continue
                if network is None and margins is None:
                    network = _load(path)
                if answer is None and margins:
                    answer = margins(fold)
                attacker = _load(source_path) if transfers else network
                made = perturb(
                    attacker, batch, labels, attack, group, pgd_steps, seed, f"{name} under {attack}"
                )
                part = pd.concat(
                    [
                        evaluation.prediction_rows(
                            shown.table,
                            model=name,
                            attack=attack,
                            epsilon=epsilon,
                            margins=answer(perturbed.permute(0, 2, 3, 1).numpy())
                            if answer
                            else evaluation.predict(network, perturbed),
                            seed=seed,
                            source_model=source if transfers else "",
                            **({} if attack == "none" else {"clean": batch, "perturbed": perturbed}),
                        )
                        for epsilon, perturbed in zip(group, made, strict=True)
                    ],
                    ignore_index=True,
                )
                evaluation.write_piece(part, piece)
                runs.write_recipe(piece, recipe)
                rows.append(part)
            if attack == "pgd":
                _remove_others(folder, f"{name}-pgd-*-{recipe['split_by']}{fold}", side, kept)
    return pd.concat(rows, ignore_index=True)


def _remove_others(folder, pattern, side, kept):
    """Pieces of epsilons that are no longer asked for would enter the table as if they belonged to this run."""
    for piece in (folder / "predictions").glob(f"{pattern}.csv.gz"):
        if piece.name not in kept and ("-validation-" in piece.name) == (side == "validation"):
            runs.discard(piece)


def evaluate_without_network(folder, images, names, *, epsilons=(), seed=0, source="baseline"):
    """`evaluate` for always_malignant and for color_only, fitted to the training images (whole fields of view)."""

    def color_only(fold):
        train = images.side("train", fold)
        return models.fit_color_only((image / 255 for image in train.pixels), train.labels)

    answers = {"always_malignant": lambda fold: models.always_malignant, "color_only": color_only}
    options = {"epsilons": epsilons, "seed": seed, "source": source}
    return [
        evaluate(folder, name, images, names, margins=margins, **options) for name, margins in answers.items()
    ]


def examples(model, side, epsilon, among=8):
    """Positions of two images of each class: one that the model gets right and FGSM at epsilon turns, one that stands.

    They are the first such of the first `among` images of the class; where there is no such image, the first others.
    """
    batch, labels = side.tensors()
    chosen = []
    for label in (0, 1):
        mine = np.flatnonzero(side.labels == label)[:among]
        (turned,) = perturb(model, batch[mine], labels[mine], "fgsm", [epsilon])
        before, after = (
            (evaluation.predict(model, shown) > 0) == (label == 1) for shown in (batch[mine], turned)
        )
        falls, stands = mine[before & ~after], mine[before & after]
        chosen += [*falls[:1], *stands[:1], *np.setdiff1d(mine, [*falls[:1], *stands[:1]])][:2]
    return [int(k) for k in chosen]


def batch_size(images):
    """How many images of this size to attack at once."""
    return max(8, BATCH_PIXELS // (images.shape[-1] * images.shape[-2]))


def _load(path):
    return models.load(path).to(training.device(), memory_format=torch.channels_last)


def perturb(model, images, labels, attack, epsilons, pgd_steps=0, seed=0, label=None):
    """The images under one attack: a list of float32 batches (n, 3, H, W) on the CPU, one for each epsilon (a fraction).

    Random parts depend on `seed` and the epsilon only. `label` names the work where it takes long enough to show progress.
    """
    if attack == "none":
        return [images]
    generators = [
        torch.Generator().manual_seed(seed * 100_003 + round(epsilon * 255_000)) for epsilon in epsilons
    ]
    if attack == "random_noise":
        return [
            attacks.random_noise(images, epsilon, generator)
            for epsilon, generator in zip(epsilons, generators, strict=True)
        ]
    done = [[] for _ in epsilons]
    size = batch_size(images)
    for start in tqdm(range(0, len(images), size), desc=label, unit="batch", delay=10, leave=False):
        x, y = (part[start : start + size].to(training.device()) for part in (images, labels))
        x = x.contiguous(memory_format=torch.channels_last)
        if attack in ("fgsm", "transfer_fgsm"):
            batches = attacks.fgsm(model, x, y, epsilons)
        elif attack == "pgd":
            batches = (
                attacks.pgd(
                    model, x, y, epsilon, pgd_steps, attacks.pgd_step_size(epsilon, pgd_steps), generator
                )
                for epsilon, generator in zip(epsilons, generators, strict=True)
            )
        else:
            raise ValueError(f"Unknown attack {attack!r}: use random_noise, fgsm, transfer_fgsm or pgd.")
        for kept, batch in zip(done, batches, strict=True):
            kept.append(batch.cpu())
    return [torch.cat(kept) for kept in done]
