"""A confusion matrix as a table and as a picture."""

# Y labels

from io import BytesIO
from typing import Any

import numpy as np

from nanogpt_jax.classify.rows import Label
from nanogpt_jax.classify.scores import precision_recall_f1
from nanogpt_jax.host.messages import printable


def table(confusion: np.ndarray, labels: list[Label]) -> str:
    """confusion [Y, Y] with precision, recall and F1, for a terminal."""
    names = [printable(label) for label in labels]
    first = max(map(len, [*names, "label"]))
    columns = [name[:12] for name in names]
    widths = [max(len(c), 5) for c in columns]
    head = [f"{'label':<{first}}", *(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))]
    lines = ["rows: the label; columns: what was predicted", "  ".join([*head, "precision  recall      F1"])]
    for name, row, (p, r, f) in zip(names, confusion, precision_recall_f1(confusion), strict=True):
        counts = [f"{n:>{w}}" for n, w in zip(row, widths, strict=True)]
        lines.append("  ".join([f"{name:<{first}}", *counts, f"{p:9.4f}  {r:6.4f}  {f:6.4f}"]))
    return "\n".join(lines)


def picture(plt: Any, confusion: np.ndarray, labels: list[Label], kind: str) -> bytes:
    """confusion [Y, Y], drawn with matplotlib's `plt` as a file of the kind "svg", "png", "pdf" ..."""
    Y = len(labels)
    # matplotlib reads text between two $ as mathematics
    names = [printable(label)[:24].replace("$", r"\$") for label in labels]
    side = 0.6 * min(Y, 60)  # inches; with more labels, the cells shrink, to bound memory
    figure, axis = plt.subplots(figsize=(2.5 + side, 2 + side), layout="constrained")
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(Y), names, rotation=45, ha="right")
    axis.set_yticks(range(Y), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    if Y <= 30:
        for i, j in np.ndindex(Y, Y):
            axis.text(j, i, confusion[i, j], ha="center", va="center", color="white" if share[i, j] > 0.5 else "black")
    file = BytesIO()
    figure.savefig(file, format=kind)
    return file.getvalue()
