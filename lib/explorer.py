"""Turn epsilon and watch the answer change: one image, one gradient, a slider.

The pictures are drawn by one function for the slider and for the static figure above it. They go into an `Image` widget:
a headless run with Output widgets can hang, and a redrawn figure would flicker.
"""

import io

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure

from lib import attacks, models
from lib.evaluation import format_epsilon

STOPS = 33  # of the slider, from 0 to LARGEST
LARGEST = 16 / 255


def epsilon_curve(model, image, label, epsilons):
    """P(malignant) of FGSM images over epsilon, as a list of (epsilon, probability), from one backward pass.

    image: float32 (1, 3, H, W) in [0, 1]; label: int64 (1,); epsilons: fractions.
    """
    batches = torch.cat(list(attacks.fgsm(model, image, label, epsilons)))
    return list(zip(epsilons, models.p_malignant(model, batches).tolist(), strict=True))


def epsilon_figure(shown, curve, epsilon):
    """The image the model is given and the curve of P(malignant) over epsilon, with the current point.

    shown: the FGSM image at epsilon, float32 (1, 3, H, W) in [0, 1]; curve: of `epsilon_curve`; epsilon: a fraction, one of
    the curve's. Returns a matplotlib Figure.
    """
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    left.imshow(shown[0].permute(1, 2, 0).clamp(0, 1).numpy())
    left.set_axis_off()
    nearest, now = min(curve, key=lambda point: abs(point[0] - epsilon))
    answer = "malignant" if now > 0.5 else "benign"
    left.set_title(f"under FGSM at {format_epsilon(nearest)}" if nearest else "clean image", fontsize=10)
    right.plot([e * 255 for e, _ in curve], [p for _, p in curve], color="#0173b2", marker=".")
    right.plot(nearest * 255, now, "o", color="#d55e00", markersize=9)
    right.axhline(0.5, color="0.6", linestyle=":", linewidth=1)
    right.set(xlabel="epsilon (gray levels of 255)", ylabel="P(malignant)", ylim=(-0.03, 1.03))
    right.set_title(f"{format_epsilon(nearest)}: P(malignant) = {now:.2f}, answer: {answer}", fontsize=10)
    right.spines[["top", "right"]].set_visible(False)
    return figure


def epsilon_slider(model, image, label):
    """A slider over epsilon with the picture of `epsilon_figure` below it: an ipywidgets VBox.

    image: float32 (1, 3, H, W) in [0, 1]; label: int64 (1,), the true class. Errors show as words under the slider.
    """
    epsilons = [LARGEST * k / (STOPS - 1) for k in range(STOPS)]
    images = list(attacks.fgsm(model, image, label, epsilons))
    curve = list(zip(epsilons, models.p_malignant(model, torch.cat(images)).tolist(), strict=True))
    slider = widgets.SelectionSlider(
        options=[(format_epsilon(epsilon), k) for k, epsilon in enumerate(epsilons)],
        description="epsilon",
        continuous_update=False,
        layout=widgets.Layout(width="480px"),
    )
    picture, message = widgets.Image(format="png"), widgets.HTML()

    def redraw(change):
        try:
            k = change["new"]
            drawn = io.BytesIO()
            epsilon_figure(images[k], curve, epsilons[k]).savefig(drawn, format="png", dpi=100)
            picture.value, message.value = drawn.getvalue(), ""
        except Exception as error:  # an error in a callback is otherwise lost without a word
            message.value = f"Could not draw: {error}"

    slider.observe(redraw, "value")
    redraw({"new": slider.value})
    return widgets.VBox([slider, picture, message])
