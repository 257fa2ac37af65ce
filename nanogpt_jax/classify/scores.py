"""Accuracy, F1 and the confusion matrix of a classifier, in numpy."""

# N texts, Y labels

import numpy as np

SUMMARY = "loss {loss:.4f}, accuracy {accuracy:.4f}, macro-F1 {macro_f1:.4f}"  # of `scores`, for str.format


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, n_labels: int) -> np.ndarray:
    """labels, predicted [N] -> counts [Y, Y] int64: rows are labels, columns predictions."""
    return np.bincount(labels.astype(np.int64) * n_labels + predicted, minlength=n_labels**2).reshape(n_labels, -1)


def precision_recall_f1(confusion: np.ndarray) -> np.ndarray:
    """[Y, 3]; 0 in place of 0/0. F1 = 2 · right / (labelled + predicted)."""
    right, labelled, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    scores = [right / np.maximum(n, 1) for n in (predicted, labelled)] + [
        2 * right / np.maximum(labelled + predicted, 1)
    ]
    return np.stack(scores, axis=1)


def macro_f1(confusion: np.ndarray) -> float:
    """The unweighted mean of the labels' F1, over labels that occur or were predicted."""
    occurs = confusion.sum(0) + confusion.sum(1) > 0
    return float(precision_recall_f1(confusion)[occurs, 2].mean())


def scores(log_probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """log_probabilities [N, Y], labels [N] -> {"loss": mean nats a text, "accuracy", "macro_f1"}."""
    picked = np.take_along_axis(log_probabilities.astype(np.float64), labels[:, None].astype(np.int64), axis=1)
    predicted = log_probabilities.argmax(1)
    confusion = confusion_matrix(labels, predicted, log_probabilities.shape[1])
    right = float((predicted == labels).mean())
    return {"loss": float(-picked.mean()), "accuracy": right, "macro_f1": macro_f1(confusion)}
