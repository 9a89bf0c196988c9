"""Rules that look at the curves the way an experienced eye does. Each finding has numbers, a meaning and a remedy.

A rule fires only on what the run shows, compares means of the first and last fifth of a curve, and asks that the change
be larger than its own noise. Thresholds stand here, together, so that they can be argued with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.report.charts import GUIDES, LN2, Points
from trimtab.report.folder import RunFolder, descend, intervals, total
from trimtab.report.stats import Interval
from trimtab.report.text import number, plural

CHOSEN_FALL_WATCH, CHOSEN_FALL_BAD = 5.0, 20.0  # nats per answer
REWARD_FALL = 0.5  # implicit reward of chosen below the reference, when log-probabilities were not logged
FEW_STEPS = 20  # logged steps below which a loss may still be finding its way
STUCK_SHARE = 0.003  # of the first loss: all that a loss has moved in the whole run
SATURATED = 0.99  # accuracy from which a larger margin teaches nothing
EXPLODED = 2.0  # growth of the margin while the accuracy is saturated
OVERFIT_GAP = 0.15  # training accuracy above held-out accuracy
TURNED = 0.02  # share by which held-out loss may rise above its minimum
LONGER = 1.3  # growth of the answers
SPIKE = 20.0  # gradient norm against its median
KL_FAR = 30.0  # nats per answer
CUT_ROWS = 0.01  # share of rows cut by the length limit
DROPPED = 0.2  # share of rows that were not used
SAME_ANSWER = 0.3  # share of prompts that got the most common answer


@dataclass(frozen=True)
class Alarm:
    """One finding. ``grave`` ones make the verdict doubtful, the others deserve a look."""

    grave: bool
    title: str
    evidence: str
    meaning: str
    remedy: str
    chart: str = ""


def find_alarms(run: RunFolder) -> list[Alarm]:
    """Everything odd in a run, gravest first."""
    found = [*_checks(run), *_not_finite(run), *_stuck(run), *_displaced(run), *_saturated(run), *_overfit(run)]
    found += [
        *_swapped(run),
        *_length(run),
        *_gradient(run),
        *_distance(run),
        *_samples(run),
        *_data(run),
        *_engine(run),
    ]
    return sorted(found, key=lambda alarm: not alarm.grave)


@dataclass(frozen=True)
class _Ends:
    first: float
    last: float
    noise: float

    @property
    def change(self) -> float:
        return self.last - self.first

    def moved(self, by: float) -> bool:
        """Changed by at least ``by`` in its direction, and by more than twice the noise."""
        return (self.change >= by if by > 0 else self.change <= by) and abs(self.change) > 2 * self.noise


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _ends(points: Points, steady: bool) -> _Ends | None:
    """Means of the first and last fifth; of ``steady`` curves (held-out, the same rows each time) the end points."""
    values = [y for _, y in _finite(points)]
    if len(values) < 2:
        return None
    if steady:
        return _Ends(values[0], values[-1], 0.0)
    if len(values) < 8:
        return None
    size = max(3, len(values) // 5)
    head, tail = values[:size], values[-size:]
    a, b = sum(head) / size, sum(tail) / size
    spread = (sum((y - a) ** 2 for y in head) + sum((y - b) ** 2 for y in tail)) / (size - 1)
    return _Ends(a, b, math.sqrt(spread / size))


def _best_ends(run: RunFolder, key: str) -> tuple[_Ends, str] | None:
    """Held-out, where the same rows were measured twice; else training, whose batches differ in more than the model."""
    held = _held_out_ends(run, key)
    if held is not None:
        return held, "on the held-out rows"
    ends = _ends(run.curves.get(key, []), steady=False)
    return None if ends is None else (ends, "in training")


def _held_out_ends(run: RunFolder, key: str) -> _Ends | None:
    """From the held-out curve, or from the card's evaluation before and after."""
    held = _ends(run.curves.get("eval/" + key, []), steady=True)
    before, after = (intervals(run.section("evaluation", when)).get(key) for when in ("before", "after"))
    if held is None and before is not None and after is not None:
        return _Ends(before.value, after.value, 0.0)
    return held


def _from_to(ends: _Ends) -> str:
    return f"from {number(ends.first)} to {number(ends.last)}"


def _checks(run: RunFolder) -> list[Alarm]:
    checks = run.card.get("checks")
    failed = [c for c in checks if isinstance(c, dict) and c.get("ok") is False] if isinstance(checks, list) else []
    return [
        Alarm(
            True,
            f"Check failed: {c.get('name', 'unnamed')}",
            str(c.get("detail") or "No detail was recorded."),
            "An invariant that every healthy run satisfies does not hold, so the figures may not mean what they say.",
            "Repair this first, then train again.",
        )
        for c in failed
    ]


def _not_finite(run: RunFolder) -> list[Alarm]:
    bad = sorted(
        (min(x for x, y in points if not math.isfinite(y)), key)
        for key, points in run.curves.items()
        if any(not math.isfinite(y) for _, y in points)
    )
    if not bad:
        return []
    step, key = bad[0]
    names = ", ".join(name for _, name in bad[:4]) + (", ..." if len(bad) > 4 else "")
    return [
        Alarm(
            True,
            "NaN or infinity",
            f"First in {key} at step {number(int(step))}; in all: {names}.",
            "A value left the range of numbers. Every weight after it may be spoilt.",
            "Go back to the checkpoint before that step. Usual causes: an empty answer, float16, too high a "
            "learning rate.",
            _chart_of(key),
        )
    ]


def _stuck(run: RunFolder) -> list[Alarm]:
    losses = [y for _, y in _finite(run.curves.get("loss", []))]
    if len(losses) < 5:
        return []
    rates = [y for _, y in run.curves.get("learning_rate", [])]
    cause = " The learning rate was 0 at every logged step." if rates and not any(rates) else ""
    if not any(losses):
        return [
            Alarm(
                True,
                "The loss is exactly 0",
                f"At all {len(losses)} logged steps.{cause}",
                "Nothing is being learnt: the mask is empty, or policy and reference are the same weights.",
                "Look at the trained tokens of one row, and at which weights the reference uses.",
                "loss",
            )
        ]
    first, reach = losses[0], max(losses) - min(losses)
    if reach <= STUCK_SHARE * abs(first):
        at = " at ln 2, where policy and reference are equal" if abs(first - LN2) < 0.01 else ""
        return [
            Alarm(
                True,
                "Nothing moves",
                f"Over {len(losses)} logged steps the loss stayed within {number(reach)} of {number(first)}{at}."
                + cause,
                "The policy is what it was at the start.",
                "Raise the learning rate, check that the adapters are trainable, and that they are switched off in the "
                "reference only.",
                "loss",
            )
        ]
    ends = _ends(run.curves["loss"], steady=False)
    held = _held_out_ends(run, "loss")
    if ends is None or len(losses) < FEW_STEPS or (held is not None and held.change < -0.005 * abs(held.first)):
        return []
    evidence = f"It went {_from_to(ends)} (means of the first and last fifth), noise {number(ends.noise)}.{cause}"
    if ends.moved(0.01 * abs(ends.first) or 1e-9):
        meaning, remedy = "Training pulls in the wrong direction.", "Lower the learning rate."
        return [Alarm(False, "The training loss rose", evidence, meaning, remedy, "loss")]
    if ends.change > -max(2 * ends.noise, 0.005 * abs(ends.first)):
        meaning = "Whatever was learnt is still smaller than the difference between batches."
        remedy = "Train longer, raise the learning rate, or use larger batches."
        return [Alarm(False, "No clear fall of the training loss", evidence, meaning, remedy, "loss")]
    return []


def _displaced(run: RunFolder) -> list[Alarm]:
    remedy = "Try DPOP or an NLL term on the chosen answers, a larger beta, or a smaller learning rate."
    meaning = "Likelihood displacement: probability leaves the answers people preferred, and goes somewhere unseen."
    found = _best_ends(run, "logps/chosen")
    if found is not None:
        ends, where = found
        if ends.moved(-CHOSEN_FALL_WATCH):
            rejected = _best_ends(run, "logps/rejected")
            beside = f" Rejected went {_from_to(rejected[0])}." if rejected else ""
            return [
                Alarm(
                    ends.change <= -CHOSEN_FALL_BAD,
                    "The chosen answers became less likely",
                    f"Their log-probability {where} fell by {number(-ends.change)} nats, {_from_to(ends)}.{beside}",
                    meaning + " A small fall is common with DPO and need not hurt; the samples decide.",
                    remedy,
                    "logps",
                )
            ]
        return []
    found = _best_ends(run, "rewards/chosen") if run.card.get("reference") else None
    if found is not None and found[0].last < -REWARD_FALL and found[0].moved(-REWARD_FALL):
        return [
            Alarm(
                False,
                "The chosen answers became less likely than under the reference",
                f"Their implicit reward {found[1]} went {_from_to(found[0])}.",
                meaning,
                remedy,
                "rewards",
            )
        ]
    return []


def _saturated(run: RunFolder) -> list[Alarm]:
    accuracy, margin = _ends(run.curves.get("rewards/accuracies", []), False), None
    points = _finite(run.curves.get("rewards/margins", []))
    if accuracy is not None and accuracy.last >= SATURATED and len(points) >= 10:
        values = [y for _, y in points]
        size = max(2, len(values) // 10)
        middle = sum(values[len(values) // 2 - size : len(values) // 2]) / size
        last = sum(values[-size:]) / size
        margin = (middle, last) if middle > 0 and last >= EXPLODED * middle else None
    if accuracy is None or margin is None:
        return []
    return [
        Alarm(
            False,
            "Accuracy is saturated and the margin keeps exploding",
            f"Training accuracy ends at {number(accuracy.last)}; since half-way the margin grew "
            f"from {number(margin[0])} to {number(margin[1])}.",
            "Every training pair is already right; what still grows is confidence, not knowledge.",
            "Fewer epochs, a larger beta, IPO or label smoothing; choose the checkpoint by the held-out curve.",
            "margins",
        )
    ]


def _overfit(run: RunFolder) -> list[Alarm]:
    found: list[Alarm] = []
    points = _finite(run.curves.get("eval/loss", []))
    train = _ends(run.curves.get("loss", []), False)
    if len(points) >= 3:
        best_step, best = min(points, key=lambda p: p[1])
        last = points[-1][1]
        late = sum(x > best_step for x, _ in points)
        if late >= 2 and last > best + TURNED * abs(best) and (train is None or train.change < 0):
            found.append(
                Alarm(
                    False,
                    "The held-out loss turned upwards",
                    f"Lowest at step {number(int(best_step))} with {number(best)}; it ended at {number(last)}.",
                    "From there on the model learnt these rows rather than what they have in common.",
                    f"Use the checkpoint nearest to step {number(int(best_step))}, or train for fewer epochs.",
                    "loss",
                )
            )
    train = _ends(run.curves.get("rewards/accuracies", []), False)
    held = _finite(run.curves.get("eval/rewards/accuracies", []))
    if train is not None and held and train.last - held[-1][1] >= OVERFIT_GAP:
        found.append(
            Alarm(
                False,
                "Training is far ahead of held-out",
                f"Accuracy {number(train.last)} in training, {number(held[-1][1])} on the held-out rows.",
                "Part of what was learnt does not carry over to new prompts.",
                "More or cleaner data, fewer epochs, a larger beta. Judge the run by the held-out figure alone.",
                "accuracies",
            )
        )
    return found


def _swapped(run: RunFolder) -> list[Alarm]:
    accuracy = intervals(run.section("evaluation", "after")).get("rewards/accuracies")
    if accuracy is None or not (accuracy.bounded and accuracy.high < 0.5):
        return []
    return [
        Alarm(
            True,
            "Held-out pairs are ranked worse than by a coin",
            f"Held-out accuracy after training: {accuracy}.",
            "The model prefers what the data call rejected.",
            "Look at ten rows: chosen and rejected may be swapped, or the two halves may come from different sources.",
            "accuracies",
        )
    ]


def _length(run: RunFolder) -> list[Alarm]:
    samples = intervals(run.section("samples"))
    before, after = samples.get("length_before"), samples.get("length_after")
    meaning = "Longer answers please many judges without being better, and cost more to serve."
    remedy = "Judge with length control; try SimPO, R-DPO or length-normalised DPO; balance lengths in the data."
    if before is not None and after is not None and before.value > 0:
        grew = after.value / before.value
        apart = not (before.bounded and after.bounded) or after.low > before.high or after.high < before.low
        if grew >= LONGER and apart:
            return [
                Alarm(
                    False,
                    "The answers grew longer",
                    f"On the sampled prompts from {number(before.value)} to {number(after.value)} tokens, "
                    f"{number(grew)} times as long.",
                    meaning,
                    remedy,
                    "length",
                )
            ]
        if grew <= 1 / LONGER / 1.2 and apart:
            return [
                Alarm(
                    False,
                    "The answers became much shorter",
                    f"On the sampled prompts from {number(before.value)} to {number(after.value)} tokens.",
                    "The model may have learnt to say less rather than to say better.",
                    "Read the samples below; check the length limits and where the end-of-text token is trained.",
                    "length",
                )
            ]
        return []
    for key in ("length/samples", "length/completion", "length"):
        ends = _ends(run.curves.get(key, []), steady=False)
        if ends is not None and ends.first > 0 and ends.moved((LONGER - 1) * ends.first):
            return [
                Alarm(False, "The answers grow", f"Mean length {_from_to(ends)} tokens.", meaning, remedy, "length")
            ]
    return []


def _gradient(run: RunFolder) -> list[Alarm]:
    points = _finite(run.curves.get("grad_norm", []))
    if len(points) < 5:
        return []
    ordered = sorted(y for _, y in points)
    median = ordered[len(ordered) // 2]
    if ordered[-1] == 0:
        return [
            Alarm(
                True,
                "No gradient arrives",
                f"The gradient norm is 0 at all {len(points)} logged steps.",
                "No trainable weight takes part in the loss.",
                "Check which weights are trainable, and gradient checkpointing with frozen embeddings.",
                "grad_norm",
            )
        ]
    step, peak = max(points, key=lambda p: p[1])
    if median > 0 and peak > SPIKE * median:
        return [
            Alarm(
                False,
                "A spike in the gradient",
                f"{number(peak)} at step {number(int(step))}, {number(peak / median, 2)} times "
                f"the median {number(median)}.",
                "One batch pulled the model much harder than the rest.",
                "Clip the gradient, and look at the rows of that step: very long, empty or duplicated answers.",
                "grad_norm",
            )
        ]
    return []


def _distance(run: RunFolder) -> list[Alarm]:
    measured = Interval.from_json(run.section("samples").get("kl"))
    curve = _finite(run.curves.get("kl", []))
    tail = [y for _, y in curve[-max(3, len(curve) // 5) :]]
    value = measured.value if measured is not None else sum(tail) / len(tail) if len(tail) >= 3 else None
    if value is None:
        return []
    where = f"{measured} nats" if measured is not None else f"{number(value)} nats over the last logged steps"
    if value > KL_FAR:
        return [
            Alarm(
                False,
                "Far from the reference",
                f"KL: {where} per answer.",
                "At this distance the model has usually lost something that the objective does not measure.",
                "Larger beta, smaller learning rate, or an earlier checkpoint; check abilities outside the data.",
                "kl",
            )
        ]
    if (measured is not None and measured.bounded and measured.high < 0) or (measured is None and value < -1):
        return [
            Alarm(
                False,
                "Negative KL",
                f"KL: {where} per answer. A divergence cannot be below zero.",
                "The estimator was fed with answers the policy did not sample, or sampled with other settings.",
                "Score with the temperature and the truncation used for sampling.",
                "kl",
            )
        ]
    return []


def _samples(run: RunFolder) -> list[Alarm]:
    answers = [row["after"].strip() for row in run.samples if isinstance(row.get("after"), str)]
    if len(answers) < 5:
        return []
    found: list[Alarm] = []
    empty = sum(not answer for answer in answers)
    if empty / len(answers) >= 0.05:
        found.append(
            Alarm(
                True,
                "Empty answers",
                f"{empty} of {len(answers)} prompts got an empty answer after training.",
                "The model learnt to stop at once.",
                "Check that the end-of-text token is not the whole answer anywhere in the data.",
            )
        )
    filled = [answer for answer in answers if answer]
    most = max((filled.count(answer) for answer in set(filled)), default=0)
    before = [row["before"].strip() for row in run.samples if isinstance(row.get("before"), str)]
    usual = max((before.count(answer) for answer in set(before)), default=0)
    prompts = {str(row.get("prompt")) for row in run.samples}
    if len(prompts) >= 5 and most / len(answers) >= SAME_ANSWER and most > usual:
        found.append(
            Alarm(
                True,
                "One answer for everything",
                f"{most} of {len(answers)} answers are the same text; before training it was {usual}.",
                "The model found a phrase that pays and repeats it.",
                "Larger beta or KL weight, an earlier checkpoint, a judge that sees the prompt.",
            )
        )
    return found


def _data(run: RunFolder) -> list[Alarm]:
    data, found = run.section("data"), []
    tokens = descend(data, "tokens")
    rows, records = total(data.get("rows")), total(data.get("records"))
    cut, lost = total(tokens.get("truncated_rows")), total(tokens.get("eos_lost"))
    if (records and cut / records > CUT_ROWS) or lost > 0:
        ending = f" {plural(int(lost), 'answer')} lost the end-of-text token." if lost else ""
        found.append(
            Alarm(
                bool(records and lost / records > CUT_ROWS),
                "Rows were cut",
                f"{plural(int(cut), 'row')} exceeded the length limit.{ending}",
                "A model trained on answers without an end does not learn to stop; "
                "a cut pair may have lost its difference.",
                "Raise the length limit, or drop the long rows on purpose.",
                "data",
            )
        )
    dropped = total(descend(data, "dropped"))
    if rows and dropped / rows > DROPPED:
        found.append(
            Alarm(
                False,
                "Much of the file was not used",
                f"{plural(int(dropped), 'row')} of {number(int(rows))} were dropped; "
                "the reasons are in the data section.",
                "What is left may no longer represent the file.",
                "Repair the rows or choose another reading of them.",
                "data",
            )
        )
    return found


def _engine(run: RunFolder) -> list[Alarm]:
    fallback = run.section("engine").get("fallback")
    if not fallback or not isinstance(fallback, str):
        return []
    return [
        Alarm(
            False,
            "The engine used its fallback",
            fallback,
            "The results are the same by construction; speed and memory are not.",
            "Nothing to do for this run; the cause is worth removing before a long one.",
            "engine",
        )
    ]


def _chart_of(key: str) -> str:
    bare = key.removeprefix("eval/")
    return next((guide.id for guide in GUIDES if any(bare == name for name, _, _ in guide.keys)), "")
