"""The shipped demonstration: everyday prompts, SmolLM2's own answers, and a reward that everyone can compute."""

from .feedback import FEEDBACK, held_out_prompts, training_prompts, training_records

__all__ = ["FEEDBACK", "held_out_prompts", "training_prompts", "training_records"]
