"""Deliberate mistakes, one at a time, in a copy of the tree: the named tests must fail on each.

    python -m tests.mutations                 # all; about ten minutes in two processes
    python -m tests.mutations kl group        # those whose file or meaning has one of these words

Prints a Markdown table, and ends with 1 where a mistake was not caught or its line is not in the code any more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """What is broken: in ``file`` below trimtab/, ``old`` becomes ``new``; ``tests`` are pytest's arguments below tests/."""

    meaning: str
    file: str
    old: str
    new: str
    tests: str


OPTIMA = "online/test_known_optima.py"
MUTATIONS = [
    # sign
    Mutation("RLOO descends its reward", "objectives/rloo.py", "return -batch.per_prompt", "return batch.per_prompt", f"{OPTIMA} -k rloo"),
    Mutation("RLOO is paid for the KL", "objectives/rloo.py", "batch.score - self.beta", "batch.score + self.beta", f"{OPTIMA} -k rloo"),
    Mutation("PPO is paid for the KL", "objectives/ppo.py", "batch.score) - beta", "batch.score) + beta", f"{OPTIMA} -k ppo"),
    Mutation("ReMax is paid for the KL", "objectives/remax.py", "won - paid, self", "won + paid, self", f"{OPTIMA} -k remax"),
    Mutation("GRPO is paid for the KL", "objectives/grpo.py", "gain - self.beta", "gain + self.beta", f"{OPTIMA} -k grpo"),
    Mutation("Nash-MD leaves the reference", "objectives/nash_md.py", "0.5 - self.tau", "0.5 + self.tau", OPTIMA),
    Mutation("XPO with alpha 0 is not online DPO", "objectives/xpo.py", "self.alpha *", "(self.alpha + 1e-3) *", "objectives/test_xpo.py"),
    Mutation("XPO's bonus turned round", "objectives/xpo.py", "+ self.alpha", "- self.alpha", "objectives/test_xpo.py"),
    # baseline
    Mutation("an answer is in its own baseline", "credit/group.py", "mean = (_sum(reward, group) - reward) / others.clamp(min=1)", "mean = _sum(reward, group) / (others + 1)", f"{OPTIMA} -k rloo"),
    Mutation("no baseline: the others are added", "credit/group.py", "reward - mean, 0)", "reward + mean, 0)", f"{OPTIMA} -k rloo"),
    Mutation("groups mixed up", "credit/group.py", "index_add(0, group, values)\n    return total[group]", "index_add(0, group, values)\n    return total.flip(0)[group]", f"{OPTIMA} test_credit.py objectives/test_rloo.py"),
    Mutation("GRPO's group not centred", "credit/group.py", "return reward - _sum(reward, group) / _sum(torch.ones_like(reward), group)", "return reward", f"{OPTIMA} -k grpo"),
    Mutation("ReMax without the greedy answer", "objectives/remax.py", "batch.score - batch.baseline", "batch.score", "objectives/test_remax.py"),
    Mutation("the critic's next value ignored", "credit/gae.py", "gamma * y.following(value)", "0 * y.following(value)", "test_credit.py"),
    Mutation("REINFORCE++ not whitened", "objectives/reinforce_pp.py", 'whiten(reward_to_go(y, reward, self.gamma))', 'reward_to_go(y, reward, self.gamma)', "objectives/test_reinforce_pp.py"),
    # mask
    Mutation("the score a token too early", "credit/gae.py", "y.length[y.owner] - 1", "y.length[y.owner] - 2", f"{OPTIMA} test_credit.py"),
    Mutation("the next answer's value after the end", "logprobs/scored.py", "tokens.roll(-1).masked_fill(ends, 0)", "tokens.roll(-1)", "test_credit.py"),
    Mutation("answers summed into the wrong prompt", "logprobs/scored.py", "values.new_zeros(len(self)).index_add(0, self.prompt, values)", "values.new_zeros(len(self)).index_add(0, self.prompt.flip(0), values)", f"{OPTIMA} test_every_objective.py -k rloo"),
    Mutation("ties of the clip: PPO takes the larger", "credit/clip.py", "torch.minimum(", "torch.maximum(", "objectives/test_ppo.py"),
    # several processes
    Mutation("ZeRO: every microbatch is taken for the last", "update/zero.py", "is_boundary=sync_gradients", "is_boundary=True", "reliability/test_zero.py -k one_process"),
    Mutation("ZeRO: none is", "update/zero.py", "is_boundary=sync_gradients", "is_boundary=False", "reliability/test_zero.py -k one_process"),
    Mutation("ZeRO: the critic is loaded into shards again", "update/trainer.py", "critic is not None and engine_of(self.model) is None", "critic is not None", "reliability/test_zero.py -k kill"),
    Mutation("ZeRO-3: cut again after each forward", "logprobs/sharded.py", "    offload._remove_module_hooks()\n", "", "reliability/test_zero.py -k one_process"),
    Mutation("shards: hooks of gradient checkpointing copied twice", "logprobs/sharded.py", "    base_model(frame).disable_input_require_grads()\n", "", "reliability/test_sharded.py -k kill"),
    # rows with one prompt
    Mutation("padded: positions twice as far", "logprobs/layout.py", "positions = torch.arange(width).expand", "positions = (2 * torch.arange(width)).expand", "test_layouts.py -k deepseek_v2"),
    Mutation("goes on from a prompt: a token too early", "logprobs/layout.py", "return torch.cat(parts) + first", "return torch.cat(parts) + max(first - 1, 0)", "test_layouts.py -k go_on"),
    Mutation("goes on from a prompt: from its neighbour", "logprobs/layout.py", "prompt = slice(block.start, block.start + block.prompt - 1)", "prompt = slice(0, block.prompt - 1)", "test_layouts.py -k go_on"),
    Mutation("goes on from a prompt: what it kept is recomputed", "logprobs/score.py", "kept.closed = True", "pass", "test_invariance.py -k policy_reads"),
    Mutation("goes on from a prompt: beyond the budget", "update/trainer.py", "and sum(costs) <= self.scorer.budget", "", "test_invariance.py -k policy_reads"),
    Mutation("shared prompts: rows out of order", "logprobs/score.py", "for j in np.argsort(order)", "for j in range(len(order))", "test_invariance.py -k one_prompt"),
    Mutation("shared prompts: beyond the budget", "logprobs/score.py", "used + more <= budgets * self.budget", "True", "test_invariance.py -k one_prompt"),
    Mutation("shared prompts: read again for each row", "logprobs/score.py", 'self.mode == "shared" and', "False and", "test_invariance.py -k read"),
    Mutation("shared prompts: known log-probs taken for the next row's", "update/trainer.py", "if logps is None else logps for logps in known", "for logps in known", "test_invariance.py -k at_sampling"),
    # estimator
    Mutation("k2 twice as large", "credit/kl.py", "log_ratio**2 / 2", "log_ratio**2", "test_kl.py"),
    Mutation("k3 backwards", "credit/kl.py", "back = -log_ratio.clamp(min=-FAR)", "back = log_ratio.clamp(min=-FAR)", "test_kl.py"),
    Mutation("corrected without its ratio", "credit/kl.py", "return ratio * kl", "return kl", f"test_kl.py {OPTIMA}"),
    Mutation("k1 is k3", "credit/kl.py", '"k1":\n            return log_ratio\n', '"k1":\n            return kl(log_ratio, "k3")\n', "test_kl.py"),
    Mutation("GAE without lambda", "credit/gae.py", "gamma * gae_lambda)", "gamma)", "test_credit.py"),
    Mutation("the controller steers away", "credit/controller.py", "(1 + error", "(1 - error", "test_credit.py"),
    # samples
    Mutation("RSO accepts at twice the temperature", "online/select.py", "(scores[i] - best) / beta", "(scores[i] - best) / (2 * beta)", "online/test_select.py"),
    Mutation("best of n takes the worst", "online/select.py", "found.append(max(judged", "found.append(min(judged", "online/test_select.py online/test_best_of.py"),
    # the engine
    Mutation("rows of a second block overwrite", "logprobs/chunk.py", "first=rows.start == 0", "first=True", "test_chunk.py"),
    Mutation("a second block of the vocabulary overwrites", "logprobs/chunk.py", "first=vocab.start == 0", "first=True", "test_chunk.py"),
    Mutation("the soft-cap's slope left out", "logprobs/chunk.py", "delta.mul_(slope)", "delta.mul_(1.0)", "test_chunk.py"),
    Mutation("the scale left out of the gradient", "logprobs/chunk.py", "if ctx.scale != 1.0:", "if False:", "test_chunk.py"),
    Mutation("overwritten probabilities used again", "logprobs/chunk.py", "kept, ctx.kept = ctx.kept[::-1], []", "kept = ctx.kept[::-1]", "test_chunk.py"),
    Mutation("memory given back", "logprobs/pages.py", "mallopt(MMAP_MAX, 0), ", "", "test_pages.py"),
    Mutation("kernels of every shape are kept", "logprobs/score.py", "    keep_few_kernels()\n", "", "test_pages.py -k kernels"),
    Mutation("the user's own number of kernels overruled", "logprobs/pages.py", "os.environ.setdefault(name, str(KERNELS))", "os.environ[name] = str(KERNELS)", "test_pages.py -k kernels"),
    Mutation("the user's own settings overruled", "logprobs/pages.py", "return False\n    try", "pass\n    try", "test_pages.py"),
    Mutation("flex: another answer is seen", "logprobs/flex.py", " & ((owner[k] == 0) | (owner[q] == owner[k]))", "", "test_flex.py"),
    Mutation("flex: another prompt is seen", "logprobs/flex.py", "own = (group[q] == group[k]) & (", "own = (", "test_flex.py"),
    Mutation("flex: what all begin with is not seen", "logprobs/flex.py", "(own | (k < opening))", "own", "test_flex.py"),
    Mutation("flex: no window", "logprobs/flex.py", "< window if window else q >= k", "< 10**6", "test_flex.py"),
    Mutation("flex: no soft-cap", "logprobs/flex.py", "_bent(softcap) if softcap else None", "None", "test_flex.py"),
    Mutation("a layout's gradient is not looked at", "logprobs/score.py", "and gradient <= min(100 * tolerance, 0.5)", "", "test_layouts.py"),
    Mutation("norms: the mean's part of the gradient", "logprobs/norm.py", "div_(-x.shape[-1])", "div_(-0.9 * x.shape[-1])", "test_norm.py -k finite"),
    Mutation("norms: the weight's gradient", "logprobs/norm.py", "slope = rows @ along", "slope = rows.square() @ along", "test_norm.py -k finite"),
    Mutation("norms: the gradient of somebody else overwritten", "logprobs/norm.py", "g.mul_(w) if own else g * w", "g.mul_(w)", "test_norm.py"),
    Mutation("norms: rounded before experts", "logprobs/norm.py", "        and runs(layer.mlp, MLP)\n", "", "test_norm.py -k replaced"),
    Mutation("norms: the last one rounded", "logprobs/norm.py", "yield module, _normed\n", "yield module, _normed_for_products\n", "test_norm.py -k autocasts"),
    Mutation("norms: left behind", "logprobs/score.py", "    restore(base)\n", "", "test_norm.py -k uninstalled"),
    Mutation("an interrupted adapter stays half off", "run.py", "            adapter_on(trainer.scorer.model)\n", "", "test_cli.py -k switched_on"),
    Mutation("gate: the other factor's gradient", "logprobs/gate.py", "silu_backward(slope * u, g)", "silu_backward(slope, g)", "test_gate.py"),
    Mutation("gate: of another type", "logprobs/gate.py", " if g.dtype == u.dtype else silu(g) * u", "", "test_gate.py"),
    Mutation("gate: of another function", "logprobs/gate.py", " and isinstance(module.act_fn, nn.SiLU | SiLUActivation)", "", "test_gate.py"),
    Mutation("a cache is filled with as little at once as is learnt", "logprobs/reference.py", "e in part], BEFOREHAND)", "e in part])", "test_invariance.py -k two_budgets"),
    Mutation("a reference in a step takes other passes than learning", "logprobs/reference.py", "Tensor:\n        return self.scorer.score_all(examples, budgets)", "Tensor:\n        return self.scorer.score_all(examples, 2)", "test_invariance.py -k two_budgets"),
    Mutation("clipping: never", "update/clipping.py", "if norm + TINY > most else None", "if False else None", "test_clipping.py"),
    Mutation("clipping: always, of short gradients too", "update/clipping.py", " if norm + TINY > most else None", "", "test_clipping.py"),
    Mutation("clipping: an optimiser that does not divide", "update/clipping.py", "type(optimizer) is not torch.optim.AdamW", "not isinstance(optimizer, torch.optim.AdamW)", "test_clipping.py -k divides"),
    Mutation("clipping: to another norm", "update/trainer.py", "clip(optimizer, self.args.max_grad_norm)", "clip(optimizer, 1.0)", "test_clipping.py -k learns_the_same"),
    Mutation("clipping: the Trainer's own all the same", "update/trainer.py", "is None and divides(optimizer):", "is None and False:", "test_clipping.py -k learns_the_same"),
    Mutation("clipping: nothing without a gradient", "update/clipping.py", "torch.zeros(()), *(", "*(", "test_clipping.py -k nothing"),
    Mutation("clipping: in double precision", "update/clipping.py", " and p.dtype == torch.float32", "", "test_clipping.py -k divides"),
    Mutation("products: the input's gradient", "logprobs/products.py", "times(g, w.T) if to_x", "times(-g, w.T) if to_x", "test_products.py"),
    Mutation("products: a slice as it lies", "logprobs/products.py", "return t if t.is_contiguous()", "return t if True", "test_products.py -k lies"),
    Mutation("products: on every processor", "logprobs/products.py", 'mkl.is_available() and "GenuineIntel" not in about', "mkl.is_available()", "test_products.py -k serves"),
    Mutation("bfloat16 where it is slower", "logprobs/products.py", '("avx512_bf16" in about and "GenuineIntel" not in about)', '"avx512_bf16" in about', "test_products.py -k auto"),
    Mutation("plan: far from random weights", "planner.py", "self.logp = -math.log(sizes.get_text_config().vocab_size)", "self.logp = -2.0", "test_plan.py -k random_weights"),
    Mutation("products: no bias", "logprobs/products.py", "found if b is None else found.add_(b)", "found", "test_products.py"),
    Mutation("products: a weight laid out in every pass", "logprobs/products.py", "if module not in packs:", "if True:", "test_products.py -k laid_out_once"),
    Mutation("products: old weights", "logprobs/products.py", "    finally:\n        _packs = None", "    finally:\n        pass", "test_products.py"),
    Mutation("products: laid out while learning", "logprobs/products.py", " and not torch.is_grad_enabled()", "", "test_products.py -k learns"),
    Mutation("what somebody else has replaced", "logprobs/rewritten.py", 'if "forward" not in vars(module) or _is_ours(module):', "if True:", "test_products.py -k somebody"),
    Mutation("rotary: the other way", "logprobs/rotary.py", "value=-way", "value=way", "test_rotary.py"),
    Mutation("rotary: halves of the angles", "logprobs/rotary.py", "_turn(slope, cos, second, first, -1)", "_turn(slope, cos, first, second, -1)", "test_rotary.py -k finite"),
    Mutation("rotary: of another function", "logprobs/rotary.py", "is_code(known.get(NAME), ROTARY) and ", "", "test_rotary.py -k replaced"),
    Mutation("rotary: rounded without autocast", "logprobs/rotary.py", " or x.dtype not in (cos.dtype, low)", "", "test_rotary.py -k other_types"),
    Mutation("last layer: rows that are not read", "logprobs/last_layer.py", "index_select(1, trimtab_read.rows)", "index_select(1, trimtab_read.rows.flip(0))", "test_last_layer.py"),
    Mutation("last layer: whole again", "logprobs/last_layer.py", "if trimtab_read is None or more:", "if True:", "test_last_layer.py"),
    Mutation("last layer: without what came before", "logprobs/last_layer.py", "found: Tensor = states + ", "found: Tensor = ", "test_last_layer.py"),
    Mutation("casts kept for ever", "logprobs/score.py", "            torch.clear_autocast_cache()", "            pass", "test_casts.py -k converted"),
    Mutation("casts not kept in a step", "update/trainer.py", "once = nullcontext() if together or", "once = nullcontext() if True or together or", "test_casts.py -k step_converts"),
    Mutation("casts not kept in scoring", "logprobs/score.py", "with evaluating(self.model), casts_kept(), ", "with evaluating(self.model), ", "test_casts.py -k scoring_converts"),
    Mutation("keys learn nothing", "logprobs/attention.py", "asked, *sources = (_cut(t, own) for t in (q, k, v))", "asked, *sources = (_cut(t, own) for t in (q, k.detach(), v))", "test_layouts.py -k llama"),
    Mutation("what some begin with is taken for all", "logprobs/layout.py", "min(e.prompt for e in examples), max(e.prompt for e in examples)", "examples[0].prompt, examples[1].prompt", "test_layouts.py -k begin_with"),
    Mutation("a prompt is left without its last token", "logprobs/layout.py", "min(len(e.prompt) for e in examples) - 1)", "min(len(e.prompt) for e in examples))", "test_layouts.py -k begin_with"),
    Mutation("goes on from a prompt without what all begin with", "logprobs/layout.py", "(*block.before, prompt), elsewhere", "(prompt,), elsewhere", "test_layouts.py -k go_on"),
    Mutation("what all begin with learns nothing", "logprobs/attention.py", "return list(rows[: len(block.before)])", "return [t.detach() for t in rows[: len(block.before)]]", "test_layouts.py -k llama"),
    Mutation("the next rows are taken for what all begin with", "logprobs/squares.py", "torch.arange(there.start, there.stop) for", "torch.arange(there.start + 1, there.stop + 1) for", "test_squares.py"),
    Mutation("what all begin with learns from the next columns", "logprobs/squares.py", "slice(at, at + n)))", "slice(at + 1, at + n + 1)))", "test_squares.py"),
    Mutation("another pass's keys are looked for in this row", "logprobs/squares.py", "square.part.rows) + elsewhere", "square.part.rows)", "test_squares.py"),
    Mutation("what lies behind the last is another group's", "logprobs/squares.py", "t[-1:].expand(", "0 * t[-1:].expand(", "test_squares.py -k number"),
    Mutation("products: other answers seen", "logprobs/squares.py", "        added[:n] = -torch.inf\n", "", "test_squares.py"),
    Mutation("products: what comes later is seen", "logprobs/squares.py", ".triu_(1)", ".triu_(2)", "test_squares.py"),
    Mutation("products: the prompt learns nothing from its answers", "logprobs/squares.py", "if ctx.own:", "if False:", "test_squares.py"),
    Mutation("products: another pass's keys learn", "logprobs/squares.py", "if ctx.own:", "if True:", "test_squares.py"),
    Mutation("products: keys' gradient not scaled", "logprobs/squares.py", "to_seen[0].mul_(ctx.scaling)", "to_seen[0].mul_(1.0)", "test_squares.py"),
    Mutation("products: a slope behind the last row", "logprobs/squares.py", "chunk.at.start :].zero_()", "chunk.at.start :].fill_(1)", "test_squares.py"),
    Mutation("products: weights of long squares kept", "logprobs/squares.py", "torch.bfloat16: 1024,", "torch.bfloat16: 2048,", "test_squares.py -k long"),
    Mutation("products: of short rows in float32", "logprobs/attention.py", "(129, 1024)", "(2, 1024)", "test_squares.py -k pay"),
    # weights in low precision
    Mutation("the weight does not follow its master", "update/master.py", 'p.copy_(state["master"])', "pass", "test_held_weights.py"),
    Mutation("the master starts anew", "update/master.py", "self.state[p][name] = value.detach().clone().to(p.device)", "pass", "test_held_weights.py"),
    Mutation("gradients added up in bfloat16", "update/master.py", "p.grad_dtype = torch.float32", "pass", "test_held_weights.py"),
    Mutation("weights loaded in float32 all the same", "run.py", 'dtype if config.weights == "float32" else torch.bfloat16', "dtype", "test_held_weights.py"),
    Mutation("what cannot be is tried", "config.py", "    _refuse_weights(config)\n", "", "test_held_weights.py"),
    # the planner
    Mutation("a copied hollow model takes a copy of its mode", "dry.py", 'vars(self.mode)["__deepcopy__"] = lambda memo: self.mode', "pass", "test_plan.py -k copy_of_a_hollow"),
    Mutation("hollow masks stay", "dry.py", "(attention, layout, squares)", "(attention, layout)", "test_plan.py -k real_step_after"),
    Mutation("freed memory stays on the ledger", "dry.py", "self.live -= size", "pass", "test_plan.py -k leave_nothing"),
    Mutation("a frozen copy costs nothing", "planner.py", "reference = ledger.live - weights", "reference = 0", "test_plan.py -k copy"),
    Mutation("a pass that finds gradients is not looked for", "planner.py", "for when in (False, True):", "for when in (False,):", "test_plan.py -k heaviest"),
    Mutation("gradients are taken for what passes", "planner.py", "held = self.weights + self.reference + self.optimiser + self.gradients", "held = self.weights + self.reference + self.optimiser", "test_plan.py -k heap"),
    Mutation("the whole model is timed however long it takes", "planner.py", "(1 + REPEATS) * whole < PATIENCE", "True", "test_plan.py -k layers"),
    Mutation("all steps count in a plan's time", "planner.py", "median(taken[1:][-COUNTED:])", "median(taken)", "test_plan.py -k memory_grows"),
    Mutation("nothing is given back", "logprobs/pages.py", "ctypes.CDLL(None).malloc_trim(0)", "pass", "test_pages.py"),
    Mutation("the optimiser's moments outlive the training", "update/trainer.py", "self.optimizer.state.clear()", "pass", "test_pages.py"),
    Mutation("nothing is given back after learning", "run.py", "trainer.forget()\n        give_back()", "trainer.forget()", "test_pages.py"),
]  # fmt: skip


def tried(mutation: Mutation) -> str:
    """``caught``, or what happened instead."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder) / "tree"
        for name in ("trimtab", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
            shutil.copy(ROOT / name, tree)
        file = tree / "trimtab" / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            return f"the line is there {text.count(mutation.old)} times"
        file.write_text(text.replace(mutation.old, mutation.new))
        words = [f"tests/{w}" if w.endswith(".py") else w for w in mutation.tests.split()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *words],
            cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        # 1: a test failed. Others (nothing collected, a broken import) would be no proof
        return {0: "NOT CAUGHT", 1: "caught"}.get(done.returncode, f"pytest ended with {done.returncode}")


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(w in f"{m.file} {m.meaning}".lower() for w in words)]
    print("| mistake | file | tests | |\n|---|---|---|---|", flush=True)
    bad = 0
    with ThreadPoolExecutor(2) as pool:
        for mutation, found in zip(chosen, pool.map(tried, chosen), strict=True):
            bad += found != "caught"
            print(f"| {mutation.meaning} | {mutation.file} | {mutation.tests} | {found} |", flush=True)
    print(f"\n{len(chosen) - bad} of {len(chosen)} caught")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
