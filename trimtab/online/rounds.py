"""Sample, judge, learn: batches of examples that the policy writes itself, a round at a time.

A round is an epoch of the Trainer. It takes the next prompts, samples answers from the policy as it is, asks the judge, keeps
all of it on disk, and makes of it what the method learns from. Rounds are functions of the seed and the policy, so a run
that is resumed finds its rounds again: what was sampled and judged is read, not repeated.

    rounds/0001/samples.jsonl        token ids, a line per prompt as it is written
    rounds/0001/judgements.jsonl     what the judge said, a line per prompt
    rounds/0001/records.jsonl        both as canonical feedback: any offline method can learn from it
    rounds/0001/columns.safetensors  behaviour log-probs, advantages, ...: constants of the round (methods on rollouts)
    rounds/0001/round.json           figures of the round
    rounds/0001/watch.json           what train and test judge say of held-out answers of the policy that it begins with
    rounds/0001/weights              the policy that it begins with, for a server that samples (of the last round alone)
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trimtab.credit.clip import importance
from trimtab.errors import CheckFailed, ConfigError, DataError
from trimtab.feedback.convert import Pairs, convert
from trimtab.feedback.records import Comparison, Demonstration, Ranking, Record, Score, Thumb
from trimtab.judges import records as judged_as
from trimtab.judges.base import Failure, Judge, Judgement, Preference, Question, Ranks, Scores, Verdicts
from trimtab.judges.round_robin import RoundRobin
from trimtab.logprobs.reference import AdapterOff
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.base import Objective
from trimtab.online.kept import Drawn, Kept, write_whole
from trimtab.online.sample import Answer, sample, sampler, stop_ids
from trimtab.online.select import keep
from trimtab.online.served import AT_ONCE, Served
from trimtab.online.watch import FILE as WATCHED
from trimtab.online.watch import Watch
from trimtab.tokens.batch import Example
from trimtab.tokens.template import Template
from trimtab.update.weights import save_weights

WEIGHTS = "weights"  # in a round's folder
CHECKED = 8  # prompts whose first answers tell whether a server has the policy's weights


@dataclass(frozen=True)
class Plan:
    """What a round is.

    Attributes:
        prompts, answers: prompts of a round, answers to each.
        keep: how many of them are learned from, and the temperature of their choice (RSO); None: all.
        partner: share of the reference in the geometric mixture that one more answer comes from, 1: the reference itself;
            None: there is none. A method on pairs meets it as another answer, one on rollouts as what the others are to beat.
        passes: times that a round's examples are learned from.
        batch_size: examples of an optimiser step.
        longest: tokens of an answer.
        pairs: which pairs of a prompt's answers a method on pairs learns from.
        threshold: score from which a thumb goes up; None: the round's median.
        end_penalty: subtracted from the score of an answer that did not come to its end (missing-EOS rule).
        overlong: (buffer, factor): DAPO's soft penalty on the last ``buffer`` tokens before ``longest``.
        length_penalty: subtracted for each token.
        keep_all: also learn from all earlier rounds.
        redraw: prompts whose answers are all scored alike are replaced by the next ones, this many times at most.
        largest_gap: nats per token by which sampler and engine may differ on average before the run stops.
        correct_gap: cap of the weight exp(engine - sampler) on the advantages, of each token or, where the method's ratio is,
            of the whole answer; None: no correction.
    """

    prompts: int
    answers: int
    passes: int
    batch_size: int
    longest: int
    seed: int
    temperature: float = 1.0
    keep: tuple[int, float] | None = None
    pairs: Pairs = "best-worst"
    tie_threshold: float = 0.0
    threshold: float | None = None
    end_penalty: float = 0.0
    overlong: tuple[int, float] | None = None
    length_penalty: float = 0.0
    keep_all: bool = False
    redraw: int = 0
    largest_gap: float = 0.1
    correct_gap: float | None = None
    partner: float | None = None

    def examples(self, kind: type[Record]) -> int:
        """How many examples a round gives at most."""
        n = self.keep[0] if self.keep else self.answers + (self.partner is not None)
        pairs = {"all": n * (n - 1) // 2, "best-worst": 1, "best-random": 1, "adjacent": n - 1, "tournament": n - 1}[
            self.pairs
        ]
        each = {Comparison: pairs, Thumb: n, Score: n}
        return self.prompts * each.get(kind, 1)  # a ranking, a demonstration or a group of rollouts per prompt

    def steps(self, kind: type[Record]) -> int:
        """Optimiser steps of a round."""
        return self.passes * max(1, -(-self.examples(kind) // self.batch_size))


class Rounds:
    """The batches of an online run; the Trainer sees an epoch of :meth:`Plan.steps` batches for each round.

    Args:
        prompts: one example per prompt, without completions.
        folder: where the rounds are kept.
        precision: of the weights that answers are sampled with.
        served: the server that samples; None: the policy does so here.
    """

    def __init__(
        self,
        prompts: Sequence[Example],
        plan: Plan,
        judge: Judge,
        template: Template,
        folder: Path,
        precision: torch.dtype,
        served: Served | None = None,
    ) -> None:
        if plan.prompts > len(prompts):
            raise DataError(f"a round takes {plan.prompts} prompts, and the data has {len(prompts)}. Lower it.")
        self.prompts, self.plan, self.judge, self.template = list(prompts), plan, judge, template
        self.folder, self.precision, self.served = folder, precision, served
        self.handed: int | None = None  # the round whose policy the server was given
        self.gap: dict[str, float] = {}  # of the server's log-probs in this round
        self.learner: Any  # the Update that these batches belong to; it says so itself
        self.examples: list[Example] = []  # of the round; the Trainer's data set, changed in place
        self.figures: dict[str, float] = {}  # of the round, logged with every step
        self.current = 0
        self.watch: Watch | None = None
        self.tell: Callable[[Sequence[str]], None] = lambda notes: None  # hears what the first round's labels are like

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    @property
    def kind(self) -> type[Record]:
        """The records that a round gives the method."""
        view = self.learner.objective.feedback
        return Ranking if view is Rollouts else view.record  # type: ignore[no-any-return]

    @property
    def shown(self) -> int:
        """How many of a prompt's answers may be learned from: a partner is no example to a method on rollouts."""
        both = self.plan.partner is not None and self.learner.objective.feedback is not Rollouts
        return self.plan.answers + both

    @cached_property
    def asked(self) -> Judge:
        """Who is asked: a judge of pairs about pairs, where the method learns from them, else each against each."""
        plan, rollouts = self.plan, self.learner.objective.feedback is Rollouts
        in_pairs = self.judge.kind == "pairwise" and self.kind is Comparison and self.shown == 2
        self._refuse_strength("probability" if in_pairs else "reward_difference")
        if self.judge.kind != "pairwise":
            if rollouts and plan.partner is not None:
                raise ConfigError(
                    f"with partner_mix {self.learner.objective.name()} learns how often an answer beats the partner's, and the "
                    f"judge gives each answer a number ({self.judge.kind}). Name a judge of pairs, or remove partner_mix."
                )
            return self.judge
        if rollouts and plan.partner is not None:
            return RoundRobin(self.judge, only_last=True)
        if not in_pairs:
            return RoundRobin(self.judge)
        if plan.end_penalty or plan.length_penalty or plan.overlong:
            raise ConfigError(
                "a judge of pairs gives no scores that a penalty could be subtracted from. Remove end_penalty, token_penalty and "
                "overlong_buffer, or sample more than 2 answers, which are then compared each with each."
            )
        return self.judge

    def _refuse_strength(self, found: str) -> None:
        """A pair has one number, and a method that learns from it says what it takes it for."""
        wanted = getattr(self.learner.objective, "strength", "ignored")
        if self.learner.objective.duel and wanted != "ignored" and self.shown > 2:
            raise ConfigError(
                f"{self.learner.objective.name()} has strength: {wanted} and learns how often each answer beats the policy's. Of "
                f"{self.shown} answers to a prompt these are two numbers, which a pair's strength does not tell; of two answers "
                "one is what the other leaves of 1. Set answers: 2, or strength: ignored (the better one always wins)."
            )
        if self.kind is Comparison and wanted not in ("ignored", found):
            told = {
                "probability": "the probability that it is the better one",
                "reward_difference": "how far its score (a judge of pairs: its win rate) lies above the other's",
            }
            raise ConfigError(
                f"{self.learner.objective.name()} has strength: {wanted}, and that of the better answer of a pair is here "
                f"{told[found]}. Set strength: {found}, or ignored; a judge of pairs with answers: 2 gives probabilities."
            )

    def __len__(self) -> int:
        return self.plan.steps(self.kind)

    def __iter__(self) -> Iterator[list[int]]:
        self.examples[:] = self.make(self.current)
        self._settle()
        if self.watch and self.current % self.watch.every == 0:
            file = self.folder / f"{self.current + 1:04d}" / WATCHED
            self.figures |= self.watch.look(self.current, self.learner, file)
        per_pass = len(self) // self.plan.passes
        for number in range(self.plan.passes):
            noise = torch.Generator().manual_seed(1_000_003 * self.plan.seed + 1009 * self.current + number)
            order = torch.randperm(len(self.examples), generator=noise).tolist()
            order = [order[i % len(order)] for i in range(max(len(order), per_pass))]  # no step without an example
            yield from (order[a:b] for a, b in pairwise(len(order) * i // per_pass for i in range(per_pass + 1)))

    @cached_property
    def method(self) -> Objective:
        """As it was configured; the learner's own is the one that a round's labels settled."""
        found: Objective = self.learner.objective
        return found

    def _settle(self) -> None:
        """A round is to the method what a file is: its settings follow from these labels, and it may refuse the first ones.

        Each round settles anew, by what is learned from in it: a policy that improves gets more thumbs up in every round.
        """
        configured = self.method
        self.learner.denominator(self.examples)  # makes the view of all of them, as labels only
        labels = self.learner.whole
        self.learner.objective = settled = configured.settle(labels)
        was, now = asdict(configured), asdict(settled)
        self.figures |= {f"settled/{k}": v for k, v in now.items() if v != was[k] and isinstance(v, float)}
        if self.current == 0:
            refusal, notes = settled.advise(labels)
            if refusal:
                raise DataError(
                    f"round 1: {refusal}. Another judge, more answers, or the options that make labels of scores "
                    "(score_threshold, pairs) may help."
                )
            self.tell(notes)

    # --- a round -------------------------------------------------------------------------------------------------------

    def make(self, number: int) -> list[Example]:
        """The examples of round ``number``, counted from 0, and of those before it where all are kept."""
        earlier = [e for n in range(number) for e in self._made(n)] if self.plan.keep_all else []
        return [*earlier, *self._made(number)]

    def _made(self, number: int) -> list[Example]:
        kept, self.gap = Kept(self.folder / f"{number + 1:04d}"), {}
        drawn, verdicts = self._drawn(number, kept)
        own, scores = self._own(drawn, verdicts)
        figures = _figures(own, drawn, self.plan.answers) | self.gap
        if self.served:
            figures["sampler/retokenised"] = float(sum(not a.logps for d in drawn for a in d.answers))
        if self.plan.keep:
            own, short = keep(own, *self.plan.keep, self.plan.seed, number)
            scores = judged_as.scores(own)[0]
            figures |= {
                "kept/reward": float(np.mean([s.score for s in scores] or [np.nan])),
                "kept/short": float(short),
            }
        if self.learner.main:
            said_of = scores or self._pairs(own)
            write_whole(kept.records, "".join(json.dumps(s.to_json(), ensure_ascii=False) + "\n" for s in said_of))
        answers = {
            (d.place, self._text(a)): a for d in drawn for a in reversed(d.answers[: self.shown])
        }  # of two that read alike, the first
        where = {self.prompts[d.place].record.prompt: d.place for d in drawn}
        records = self._records(own, scores)
        if self.learner.objective.partner:
            last = {self.prompts[d.place].record.prompt: self._text(d.answers[self.plan.answers]) for d in drawn}
            records = [replace(r, target=last[r.prompt]) for r in records]
        if not records:
            raise DataError(
                f"round {number + 1}: nothing can be learned from the answers to {len(drawn)} prompts. {verdicts} Where all are "
                "judged alike, more answers, a higher temperature or another judge help."
            )
        said = [[answers[where[r.prompt], c] for c in r.completions] for r in records]
        examples = [
            Example(self.prompts[where[r.prompt]].prompt, tuple(a.ids for a in row), r)
            for r, row in zip(records, said, strict=True)
        ]
        if self.kind is Ranking and self.learner.objective.feedback is not Rollouts:
            figures["lists/left_out"] = float(len(drawn) - len(records))
        self.figures = kept.figures() or figures
        if self.learner.objective.feedback is Rollouts:
            greedy = {self.prompts[d.place].record.prompt: j for d, j in zip(drawn, verdicts.judgements, strict=True)}
            examples = self._credited(kept, examples, said, greedy)
        if self.learner.main:
            write_whole(kept.about, json.dumps({**self.figures, "judge": verdicts.to_json()}, indent=1))
        return examples

    def _drawn(self, number: int, kept: Kept) -> tuple[list[Drawn], Verdicts]:
        """Sample and judge; prompts whose answers are all judged alike make room for others."""
        order = self._order(number)
        drawn = self._sampled(number, kept, [next(order) for _ in range(self.plan.prompts)])
        verdicts = self._judged(kept, drawn)
        for _ in range(self.plan.redraw):
            told = [i for i, j in enumerate(verdicts.judgements) if _varied(j)]
            if len(told) == len(drawn):
                break
            more = self._sampled(number, kept, [next(order) for _ in range(len(drawn) - len(told))])
            also = self._judged(kept, more)
            drawn = [*(drawn[i] for i in told), *more]
            verdicts = Verdicts(
                (*(verdicts.questions[i] for i in told), *also.questions),
                (*(verdicts.judgements[i] for i in told), *also.judgements),
                verdicts.notes + also.notes,
            )
        return drawn, verdicts

    def _order(self, number: int) -> Iterator[int]:
        """Places of prompts, without end: one permutation after the other; a round begins ``plan.prompts`` after the last."""
        at, n = number * self.plan.prompts, len(self.prompts)
        while True:
            noise = torch.Generator().manual_seed(1_000_003 * self.plan.seed + at // n)
            yield int(torch.randperm(n, generator=noise)[at % n])
            at += 1

    # --- sampling and judging ------------------------------------------------------------------------------------------

    def _sampled(self, number: int, kept: Kept, places: Sequence[int]) -> list[Drawn]:
        """Answers to these prompts: those that are kept, the others from the policy, each process its share."""
        known = kept.drawn()
        missing = [p for p in dict.fromkeys(places) if p not in known]
        share, alone = self.learner.share(len(missing)), self.learner.alone
        if missing:
            self._hand_over(number, kept)
        mine: dict[int, Drawn] = {}
        policy = self.learner.scorer.model
        with nullcontext(policy) if self.served else sampler(policy, self.precision) as model:
            at_once = max(1, (AT_ONCE if self.served else 64) // self.plan.answers)
            for part in (share[a : a + at_once] for a in range(0, len(share), at_once)):
                found = self._answers(model, [missing[i] for i in part], number)
                if self.served:
                    self._check_server(found[:CHECKED])
                mine |= dict(zip(part, found, strict=True))
                if alone:  # kept as soon as it is written
                    kept.add_drawn(found)
        new = self.learner.gathered(mine, len(missing))
        if self.learner.main and not alone:
            kept.add_drawn(new)
        known |= {d.place: d for d in new}
        return [known[p] for p in places]

    def _hand_over(self, number: int, kept: Kept) -> None:
        """Give the server the policy that this round begins with, in the first one too: who knows what it had before."""
        if self.served is None or self.served.reload is None or self.handed == number:
            return
        if self.learner.main:
            folder = kept.folder / WEIGHTS
            save_weights(self.learner.scorer.model, folder)
            self.template.tokenizer.save_pretrained(folder)
            self.served.load(folder.resolve())
            for old in self.folder.glob(f"*/{WEIGHTS}"):
                if old != folder:
                    shutil.rmtree(old)
        self.learner.gathered({0: None} if self.learner.main else {}, 1)  # nobody asks before it is there
        self.handed = number

    def _check_server(self, drawn: Sequence[Drawn]) -> None:
        """A few new answers under the engine, before they are kept or judged: other weights than the policy's show here."""
        if self.plan.temperature == 1:
            rows = [replace(self.prompts[d.place], completions=(d.answers[0].ids,)) for d in drawn]
            logps = self.learner.scorer.score_all(rows)[0]
            self.gap = self._gap(logps - _told([d.answers[0] for d in drawn]).to(logps))

    def _answers(self, model: nn.Module, places: Sequence[int], number: int) -> list[Drawn]:
        plan, ids, tokenizer = self.plan, [self.prompts[p].prompt for p in places], self.template.tokenizer
        seed = 1_000_003 * plan.seed + number
        write: Any = partial(sample, model, tokenizer)
        if self.served:
            write = partial(self.served.sample, stop_ids(model, tokenizer), tokenizer)
        answers = write(
            ids, per_prompt=plan.answers, max_new_tokens=plan.longest, seed=seed, temperature=plan.temperature
        )
        if plan.partner is not None:
            answers = [[*a, *p] for a, p in zip(answers, self._partner(model, ids, seed, plan.partner), strict=True)]
        if "greedy" in self.learner.objective.needs:
            greedy = write(ids, max_new_tokens=plan.longest, seed=seed, temperature=0.0)
            answers = [[*a, *g] for a, g in zip(answers, greedy, strict=True)]
        return [Drawn(p, tuple(a)) for p, a in zip(places, answers, strict=True)]

    def _partner(self, model: nn.Module, ids: Sequence[Sequence[int]], seed: int, share: float) -> list[list[Answer]]:
        """One answer to each prompt from policy^(1-b) reference^b / Z, b the ``share``, token by token."""
        plan, reference = self.plan, self.learner.reference
        how: Any = {"max_new_tokens": plan.longest, "temperature": plan.temperature}
        how["seed"] = seed + 500_009  # not the noise of the policy's own
        with sampler(reference.scorer.model, self.precision, bare=isinstance(reference, AdapterOff)) as other:
            mixture = None if share == 1 else (other, share)
            return sample(other if share == 1 else model, self.template.tokenizer, ids, mixture=mixture, **how)

    def _text(self, answer: Answer) -> str:
        return str(self.template.tokenizer.decode(list(answer.ids), skip_special_tokens=True))

    def _judged(self, kept: Kept, drawn: Sequence[Drawn]) -> Verdicts:
        """What the judge says of them; what is kept is not asked again. One process asks, all of them hear."""
        questions = []
        for d in drawn:
            record = self.prompts[d.place].record
            questions.append(Question(record.prompt, tuple(map(self._text, d.answers)), origin=record.origin))
        mine: dict[int, list[Judgement]] = {}
        if self.learner.main:
            known = kept.judged()
            asked = [i for i, d in enumerate(drawn) if d.place not in known]
            for part in (asked[a : a + 16] for a in range(0, len(asked), 16)):  # a judge that dies costs 16 at most
                found = self.asked.judge([questions[i] for i in part]).judgements
                said = {drawn[i].place: j for i, j in zip(part, found, strict=True)}
                kept.add_judged(said)
                known |= said
            mine[0] = [known[d.place] for d in drawn]
        (judgements,) = self.learner.gathered(mine, 1)
        return Verdicts(tuple(questions), tuple(self._shaped(d, j) for d, j in zip(drawn, judgements, strict=True)))

    def _shaped(self, drawn: Drawn, judgement: Judgement) -> Judgement:
        """The judge's numbers less the plan's penalties for answers that are long or did not end."""
        if not isinstance(judgement, Scores):
            return judgement
        pairs = zip(drawn.answers, judgement.scores, strict=True)
        return Scores(tuple(s if isinstance(s, Failure) else s - self._penalty(a) for a, s in pairs))

    def _penalty(self, answer: Answer) -> float:
        plan, n = self.plan, len(answer.ids)
        found = plan.length_penalty * n + (0.0 if answer.ended else plan.end_penalty)
        if plan.overlong:
            buffer, factor = plan.overlong
            found += factor * min(max(n - (plan.longest - buffer), 0), buffer) / buffer
        return found

    # --- what is learned from ------------------------------------------------------------------------------------------

    def _own(self, drawn: Sequence[Drawn], verdicts: Verdicts) -> tuple[Verdicts, list[Score]]:
        """Verdicts on the sampled answers alone: the greedy one is a measure, not an example."""
        k = self.shown
        judgements = (Scores(j.scores[:k]) if isinstance(j, Scores) else j for j in verdicts.judgements)
        questions = (replace(q, completions=q.completions[:k]) for q in verdicts.questions)
        own = Verdicts(tuple(questions), tuple(judgements), verdicts.notes)
        return own, [] if self.asked.kind == "pairwise" else judged_as.scores(own)[0]

    def _pairs(self, verdicts: Verdicts) -> list[Comparison]:
        """What a judge of pairs said."""
        if self.asked.kind != "pairwise":
            return []
        return judged_as.comparisons(verdicts, tie_band=self.plan.tie_threshold)[0]

    def _records(self, verdicts: Verdicts, scores: list[Score]) -> list[Any]:
        plan, kind, rollouts = self.plan, self.kind, self.learner.objective.feedback is Rollouts
        if kind is Ranking:
            ranked = judged_as.rankings(verdicts, at_least=1 if rollouts else 2)[0]
            if rollouts:
                return ranked
            # a list of equals is to a method on lists what a tie is to one on pairs; to some, so is one with a tie in it
            at_least = [len(r.ranks) if self.learner.objective.untied else 2 for r in ranked]
            return [r for r, n in zip(ranked, at_least, strict=True) if len(set(r.ranks)) >= n]
        if self.asked.kind == "pairwise":
            return [p for p in self._pairs(verdicts) if self.learner.objective.ties or not p.tie]
        if not scores or kind is Score:
            return list(scores)
        if kind is Comparison:
            made, _ = convert(scores, to="comparison", pairs=plan.pairs, tie_threshold=plan.tie_threshold)
            return [p for p in made if self.learner.objective.ties or not p.tie]
        if kind is Thumb:
            threshold = float(np.median([s.score for s in scores])) if plan.threshold is None else plan.threshold
            return list(convert(scores, to="thumb", threshold=threshold)[0])
        if kind is Demonstration:  # the best of n
            best = judged_as.rankings(verdicts, at_least=1)[0]
            return [Demonstration(r.prompt, r.ranked[r.ranks.index(1)], origin=r.origin) for r in best]
        raise DataError(
            f"a round gives no {kind.__name__.lower()} records, which {self.learner.objective.name()} needs."
        )

    # --- rollouts: constants of the round --------------------------------------------------------------------------------

    def _credited(
        self, kept: Kept, examples: list[Example], said: list[list[Answer]], judged: dict[Any, Judgement]
    ) -> list[Example]:
        """The examples with their columns, computed by the policy that sampled them, or read."""
        counts = [sum(len(c) for c in e.completions) for e in examples]
        if not kept.columns.exists():
            columns, memory = self._credit(examples, counts, said, judged)
            if self.learner.main:
                save_file({**columns, **{f"memory.{k}": v for k, v in memory.items()}}, f"{kept.columns}.part")
                Path(f"{kept.columns}.part").replace(kept.columns)
            self.learner.gathered({0: None} if self.learner.main else {}, 1)  # nobody reads before it is written
        stored = load_file(kept.columns)
        memory = {k.removeprefix("memory."): v for k, v in stored.items() if k.startswith("memory.")}
        if memory:
            self.learner.memory = {k: v.to(self.learner.scorer.device) for k, v in memory.items()}
        columns = {k: v.split(counts) for k, v in stored.items() if not k.startswith("memory.")}
        if "reference" in columns:
            each = torch.cat([b - r for b, r in zip(columns["behaviour"], columns["reference"], strict=True)])
            self.figures["kl"] = each.sum().item() / sum(map(len, said))
        return [replace(e, columns={k: v[i] for k, v in columns.items()}) for i, e in enumerate(examples)]

    def _credit(
        self, examples: list[Example], counts: list[int], said: list[list[Answer]], judged: dict[Any, Judgement]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        objective, share = self.learner.objective, self.learner.share(len(examples))
        mine: dict[int, dict[str, torch.Tensor]] = {}
        if share:
            y = self.learner.scored([examples[i] for i in share])
            known = {"behaviour": y.token_logps, **{k: y.extra(k) for k in self.learner.extras}}
            if "reference" in objective.needs:
                known["reference"] = y.ref_token_logps
            parts = {k: v.detach().cpu().split([counts[i] for i in share]) for k, v in known.items()}
            mine = {i: {k: v[j].clone() for k, v in parts.items()} for j, i in enumerate(share)}
        rows = self.learner.gathered(mine, len(examples))
        whole = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
        length = torch.tensor([len(c) for e in examples for c in e.completions])
        y = Completions(whole["behaviour"], length, whole.get("reference"), {k: whole[k] for k in self.learner.extras})
        columns = {k: v for k, v in whole.items() if k in ("behaviour", "reference")}
        if "greedy" in objective.needs:
            base = [_greedy_score(judged[e.record.prompt]) for e in examples for _ in e.completions]
            columns["baseline"] = torch.tensor(base).to(y.length)[y.owner]
        batch = replace(Rollouts.of(y, examples), columns=columns)
        earned, memory = objective.credit(batch, self.learner.memory)
        columns |= {k: v.detach().contiguous() for k, v in earned.items()}
        if self.plan.temperature == 1:
            told = _told([a for row in said for a in row]).to(whole["behaviour"])
            self._compare(whole["behaviour"] - told, columns, y)
        return columns, {k: v.detach().cpu().contiguous() for k, v in memory.items()}

    def _compare(self, gap: torch.Tensor, columns: dict[str, torch.Tensor], y: Completions) -> None:
        """Sampler and engine are two programs for one distribution: how far apart, and what follows from it."""
        self.figures |= self._gap(gap)
        cap = self.plan.correct_gap
        if cap is not None:
            # a token whose log-prob the sampler did not tell weighs 1
            weight = importance(y, gap.nan_to_num(0.0), cap, self.learner.objective.by_answer)
            columns["advantage"] = columns["advantage"] * weight

    def _gap(self, gap: torch.Tensor) -> dict[str, float]:
        """Mean difference of sampler and engine in nats a token, where a sampler tells log-probs; a large one stops the run."""
        gap = gap[~gap.isnan()]
        if not len(gap):
            if self.plan.correct_gap is not None:
                raise ConfigError(
                    "correct_sampling needs the sampler's log-probs, and the server tells none. Remove it."
                )
            return {}
        found = gap.abs().mean().item()
        if found > self.plan.largest_gap:
            why = "float32 precision, or a higher bound."
            if self.served:
                why = (
                    "The server has other weights than the policy (sampler_reload must give them to it, and it must forget what "
                    "it has in cache), another precision, or sampling options of its own that it does not give up."
                )
            raise CheckFailed(
                f"sampler and engine differ by {found:.3g} nats a token on the same answers (allowed "
                f"{self.plan.largest_gap:g}): the samples are not the policy's. {why}"
            )
        return {"sampler_gap": found}


def _told(answers: Sequence[Answer]) -> torch.Tensor:
    """[N] the sampler's own log-prob of every token of the answers, NaN where it told none."""
    return torch.tensor([v for a in answers for v in a.logps or (math.nan,) * len(a.ids)])


def _varied(judgement: Judgement) -> bool:
    """Whether one answer was found better than another."""
    match judgement:
        case Scores(scores):
            return len({s for s in scores if not isinstance(s, Failure)}) > 1
        case Preference(first):
            return first != 0.5
        case Ranks(ranks):
            return len(set(ranks)) > 1
        case Failure():
            return False


def _greedy_score(judgement: Judgement) -> float:
    last = judgement.scores[-1] if isinstance(judgement, Scores) else judgement
    if not isinstance(last, float | int):
        raise DataError(f"the judge failed on a greedy answer ({last}), and the method needs its score.")
    return float(last)


def _figures(verdicts: Verdicts, drawn: Sequence[Drawn], k: int) -> dict[str, float]:
    """What a round is like, in the words that users search for."""
    rows = [[s for s in j.scores if not isinstance(s, Failure)] for j in verdicts.judgements if isinstance(j, Scores)]
    scores, answers = [s for row in rows for s in row], [a for d in drawn for a in d.answers[:k]]
    return {
        **(
            {}
            if not scores
            else {
                "reward": float(np.mean(scores)),
                "reward_std": float(np.mean([np.std(row) for row in rows if row])),
            }
        ),
        "frac_reward_zero_std": float(np.mean([not _varied(j) for j in verdicts.judgements])),
        "completions/mean_length": float(np.mean([len(a.ids) for a in answers])),
        "completions/clipped_ratio": float(np.mean([not a.ended for a in answers])),
        "judge/failed": float(verdicts.failed.total()),
        **{f"judge/{k}": v for k, v in verdicts.position.items()},
    }
