"""The baseline for a classifier: TF-IDF of words and pairs of words, and logistic regression. Needs scikit-learn."""

# N texts, Y labels

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer  # pyright: ignore[reportMissingImports]
from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]

from nanogpt_jax.classify.data import Texts


def log_probabilities(train: Texts, texts: Texts, class_weights: str) -> np.ndarray:
    """Log-probabilities [N, Y] of `texts`, learned from `train`; class_weights: none or balanced."""
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    regression = LogisticRegression(
        C=10, max_iter=1000, class_weight="balanced" if class_weights == "balanced" else None
    )
    regression.fit(words.fit_transform(train.texts), train.labels)
    return np.log(np.maximum(regression.predict_proba(words.transform(texts.texts)), 1e-12))
