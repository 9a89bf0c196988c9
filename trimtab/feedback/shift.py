"""Good and bad answers may have been given to different prompts. Weights that make up for it (BCO's distribution matching).

A classifier of prompts says how much likelier a prompt is to come with a good answer than with a bad one. Bad answers get
that ratio as weight, so that their prompts count as those of the good answers do. A prompt is judged by a classifier that
has not seen it, and the two kinds weigh the same in the fit: only then are its odds p(x|good)/p(x|bad), without a prior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import numpy as np

from trimtab.errors import ConfigError, DataError, FeedbackKindError
from trimtab.feedback.records import Conversation, Record, Thumb

Embed = Callable[[list[str]], Any]  # texts -> [n, d], an array or a sparse matrix
LOW, HIGH = 0.5, 10.0  # bounds of the ratio in the trainer of BCO's authors
FOLDS, LEAST = 5, 10  # parts for cross-fitting; different prompts of each kind below which nothing can be said
# a letter of a script without spaces is a word of its own
WORDS = r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"


@dataclass(frozen=True)
class Shift:
    """The weights, and what they did.

    Attributes:
        weights: one for each record: the ratio for bad answers, 1 for good ones.
        others: the same for records that the classifier did not learn from.
        auc_before: how well prompts of good and bad answers can be told apart (0.5: not at all), cross-validated.
        auc_after: the same once bad answers have their weights.
        accuracy: of the classifier, cross-validated, the two kinds counted alike.
        mean_weight: of bad answers; 1 where the ratio is right and none is clipped.
        clipped: share of bad answers whose ratio was out of bounds.
    """

    weights: tuple[float, ...]
    others: tuple[float, ...]
    auc_before: float
    auc_after: float
    accuracy: float
    mean_weight: float
    clipped: float

    def to_json(self) -> dict[str, float]:
        """What the run card says."""
        return {name: round(value, 4) for name, value in asdict(self).items() if isinstance(value, float)}

    def __str__(self) -> str:
        return (
            f"prompts of good and bad answers: AUC {self.auc_before:.3f} before matching, {self.auc_after:.3f} after (0.5 is no "
            f"difference); weights of bad answers: mean {self.mean_weight:.2f}, {self.clipped:.0%} clipped"
        )


def prompt_shift(
    records: Sequence[Record],
    others: Sequence[Record] = (),
    embed: Embed | None = None,
    *,
    low: float = LOW,
    high: float = HIGH,
    seed: int = 0,
) -> Shift:
    """Weights for the bad answers among thumbs, such that their prompts are distributed as those of the good answers.

    Args:
        records: thumbs to learn the ratio from; each is weighed by a classifier that has not seen its prompt.
        others: thumbs to weigh only (held-out rows).
        embed: what a prompt looks like to the classifier; TF-IDF of words and pairs of words where it is None.
        low, high: bounds of the ratio.
        seed: of the parts for cross-fitting.

    Raises:
        FeedbackKindError: a record is not a thumb.
        DataError: too few prompts, or numbers from ``embed`` that cannot be used.
    """
    if not 0 < low < high:
        raise ConfigError(f"the ratio cannot be held between {low:g} and {high:g}: expected 0 < low < high.")
    good, bad_others = _desirable(records), ~_desirable(others)
    texts = [prompt_text(r.prompt) for r in (*records, *others)]
    _refuse_few(texts[: len(records)], good)
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    features = _features((embed or tfidf)(list(place)), len(place))
    row = np.array([place[text] for text in texts])
    mine, rest = row[: len(records)], row[len(records) :]

    even = balanced(good)
    score = cross_fitted(features[mine], good, even, mine, seed)
    log_ratio = calibrated(score, good, even)
    weight = np.where(good, 1.0, _held(log_ratio(score), low, high))
    matched = balanced(good, weight)
    after = cross_fitted(features[mine], good, matched, mine, seed)
    weight_others = np.ones(len(rest))
    if bad_others.any():
        whole = _fit(features[mine], good, even).decision_function(features[rest[bad_others]])
        weight_others[bad_others] = _held(log_ratio(whole), low, high)
    ratio = log_ratio(score)
    return Shift(
        weights=tuple(weight.tolist()),
        others=tuple(weight_others.tolist()),
        auc_before=_auc(good, score, even),
        auc_after=_auc(good, after, matched),
        accuracy=float(even[(ratio > 0) == good].sum() / even.sum()),
        mean_weight=float(weight[~good].mean()),
        clipped=float(((ratio < np.log(low)) | (ratio > np.log(high)))[~good].mean()),
    )


def prompt_text(prompt: Conversation) -> str:
    """A conversation as the text that is embedded."""
    return "\n".join(message.content for message in prompt)


# --- what a prompt looks like ------------------------------------------------------------------------------------------


def embedder(name: str) -> Embed:
    """``tfidf``, or the ``encode`` of the sentence-transformers model of that name."""
    if name == "tfidf":
        return tfidf
    try:
        return import_module("sentence_transformers").SentenceTransformer(name).encode  # type: ignore[no-any-return]
    except Exception as e:  # whatever the hub, the files or the package say
        raise ConfigError(
            f"match_prompts: {name} could not be loaded as a sentence-transformers model ({str(e).splitlines()[0]}). "
            "Name another one, or use tfidf or policy."
        ) from e


def tfidf(texts: list[str]) -> Any:
    """Words and pairs of neighbouring words, weighted by how rare they are; rows have length 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        words = TfidfVectorizer(token_pattern=WORDS, ngram_range=(1, 2), max_features=20_000, sublinear_tf=True)
        return words.fit_transform(texts)
    except ValueError as e:
        raise DataError(f"the prompts have no words to tell them apart by ({e}). Use match_prompts: none.") from e


def _features(found: Any, n: int) -> Any:
    """Rows of about length 1, whatever the units were: one strength of regularisation then suits all."""
    from scipy import sparse

    if sparse.issparse(found):
        return found.tocsr()
    x = np.asarray(found, dtype=np.float64)
    if x.ndim != 2 or len(x) != n or not np.isfinite(x).all():
        raise DataError(f"the embedding of {n} prompts has shape {x.shape}; expected {n} rows of finite numbers.")
    return (x - x.mean(0)) / np.maximum(x.std(0), 1e-12) / np.sqrt(x.shape[1])


# --- the ratio -----------------------------------------------------------------------------------------------------------


def balanced(good: Any, weight: Any = 1.0) -> Any:
    """The weights, scaled so that both kinds weigh the same. Without this the odds would hold the prior n_good/n_bad."""
    weight = np.broadcast_to(weight, good.shape)
    return len(good) / 2 * weight / np.where(good, weight[good].sum(), weight[~good].sum())


def cross_fitted(x: Any, good: Any, weight: Any, prompt: Any, seed: int) -> Any:
    """The classifier's score of each row, from a fit on other prompts."""
    from sklearn.model_selection import StratifiedGroupKFold

    score = np.zeros(len(good))
    parts = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    for rest, part in parts.split(x, good, prompt):
        score[part] = _fit(x[rest], good[rest], weight[rest]).decision_function(x[part])
    return score


def calibrated(score: Any, good: Any, weight: Any) -> Callable[[Any], Any]:
    """score -> log p(good)/p(bad), by a line through the cross-fitted scores (Platt); 0 where they say nothing."""
    line = _fit(score[:, None], good, weight, strength=1e6)
    slope, start = line.coef_[0, 0], line.intercept_[0]
    return lambda s: slope * s + start if slope > 0 else np.zeros_like(s)


def _fit(x: Any, good: Any, weight: Any, strength: float = 1.0) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=1000).fit(x, good.astype(int), sample_weight=weight)


def _auc(good: Any, score: Any, weight: Any) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(good, score, sample_weight=weight))


def _held(log_ratio: Any, low: float, high: float) -> Any:
    return np.exp(np.clip(log_ratio, np.log(low), np.log(high)))


# --- what it cannot be done with ------------------------------------------------------------------------------------------


def _desirable(records: Sequence[Record]) -> Any:
    for r in records:
        if not isinstance(r, Thumb):
            raise FeedbackKindError(
                f"{r.origin}: prompts are matched between thumbs up and thumbs down; this is a {type(r).__name__.lower()}."
            )
    return np.array([r.desirable for r in records], dtype=bool)  # type: ignore[attr-defined]


def _refuse_few(texts: Sequence[str], good: Any) -> None:
    for kind, mask in (("up", good), ("down", ~good)):
        n = len({text for text, yes in zip(texts, mask, strict=True) if yes})
        if n < LEAST:
            raise DataError(
                f"{n} different prompts have a thumb {kind}: too few to tell prompts of good and bad answers apart (at least "
                f"{LEAST}). Use match_prompts: none."
            )
