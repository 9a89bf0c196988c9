"""A controlled world: a tiny language model of the project's own, and judges whose true utility is a formula.

What a method promises can be checked here against the truth, in seconds and over many seeds. Prompts and answers come
from a grammar (:mod:`trimtab.world.grammar`), the worth of an answer is computed from the text
(:mod:`trimtab.world.utility`), and feedback on the model's own answers is given by judges with known faults
(:mod:`trimtab.world.judge`).
"""
