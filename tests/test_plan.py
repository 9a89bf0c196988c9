"""The memory planner: what it counts is what torch allocates, and what it proposes fits."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile

from tests.command import done, trimtab
from tests.tiny_folder import feedback_file, tiny_folder
from trimtab import planner
from trimtab.config import RunConfig, resolve
from trimtab.dry import Hollow
from trimtab.errors import ConfigError
from trimtab.logprobs import squares
from trimtab.logprobs.layout import cost
from trimtab.logprobs.reference import AdapterOff, FrozenCopy
from trimtab.logprobs.score import Scorer, choose_layout, install
from trimtab.planner import SHEETS, Device, Planner, Stated, place, propose
from trimtab.run import resolve_precision, shortest

# of transformers and peft, about each other's names
pytestmark = pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}
ROOMY = Device("a test", 1e12)
STATED = Stated(30, 20, 3, 12)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "tiny", **SIZES)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "tiny" / "config.json").read_text())
    return tmp_path


def config(**more: Any) -> RunConfig:
    values = {
        "data": "stated",
        "model": "./bare",
        "batch_size": 4,
        "finetune": "full",
        "precision": "float32",
        "samples": 0,
    }
    return resolve({**values, **more})


def planned(where: Device = ROOMY, stated: Stated = STATED, **more: Any) -> planner.Forecast:
    asked = config(**more)
    return Planner(asked, stated.examples(asked.objective()), asked.objective(), where).forecast(asked)


def allocated(work: Callable[[], Any]) -> int:
    """The most that torch's own allocator held while this ran, beyond what it held before."""
    gc.collect()  # or the model of the test before might be freed meanwhile, and count as memory gained
    with profile(profile_memory=True, use_kineto=True) as seen:
        work()
    events = sorted((e.start_ns(), e.nbytes()) for e in seen.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
    live = peak = 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    return peak


# --- the ledger against torch's allocator -----------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {"method": "dpo"},
    {"method": "dpo", "precision": "bfloat16"},
    {"method": "dpo", "layout": "padded"},
    {"method": "dpo", "precision": "float64"},
    {"method": "dpo", "finetune": "lora", "precision": "bfloat16"},
    {"method": "dpo", "weights": "bfloat16", "precision": "bfloat16"},
    {"method": "dpo", "finetune": "lora", "weights": "bfloat16", "precision": "bfloat16"},
    {"method": "dpo", "reference": "copy", "token_budget": 150},
    {"method": "dpo", "gradient_checkpointing": True},
    {"method": "dpo", "gradient_checkpointing": True, "token_budget": 150},
    {"method": "dpo", "finetune": "lora", "gradient_checkpointing": True},
    {"method": "kto", "precision": "bfloat16", "gradient_checkpointing": True},
    {"method": "kto", "precision": "bfloat16"},
    {"method": "plackett_luce"},
    {"method": "tdpo2", "finetune": "lora"},
    {"method": "sft"},
    {"method": "dro"},
    {"method": "reward_model"},
    {"method": "process_reward"},
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Each thread of a product has buffers of its own, which are much in a model as small as this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(str(v) for v in c.values()))
def test_a_step_takes_what_torch_then_allocates(case: dict[str, Any], tmp_path: Path) -> None:
    """The same step with real weights: every byte that the allocator gave out."""
    asked = config(**case)
    objective, precision = asked.objective(), resolve_precision(asked.precision, asked.weights)
    held = torch.float64 if precision == torch.float64 else getattr(torch, asked.weights)
    examples = STATED.examples(objective)
    found = Planner(asked, examples, objective, ROOMY).forecast(asked)
    model = planner._with_adapter(planner._made(planner.sizes_of("./tiny"), objective, held), asked, objective)
    install(model, precision, found.mode)
    scorer = Scorer(model, found.mode, asked.token_budget)
    trainer = planner._trainer(asked, objective, scorer, examples, str(tmp_path / "run"))
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kind = planner.reference_kind(asked) if "reference" in objective.needs else "none"
    reference = {"adapter": lambda: AdapterOff(scorer, ""), "copy": lambda: FrozenCopy(model, scorer, precision, "")}
    trainer.reference = reference.get(kind, lambda: planner._Constant(model.config))()
    planner._gradients(trained)
    planner._optimise(trainer)
    state = sum(t.numel() * t.element_size() for s in trainer.optimizer.state.values() for t in s.values())  # type: ignore[union-attr]
    assert found.reference == pytest.approx(weights if kind == "copy" else 0, abs=100)  # buffers are copied, too
    assert found.optimiser == state
    assert found.trained == sum(p.numel() for p in trained)
    peaks = []
    for part, later in found.steps.heaviest:
        model.zero_grad()
        before = weights + found.reference + state
        if later:
            planner._gradients(trained)
            before += sum(p.grad.numel() * p.grad.element_size() for p in trained)
        peaks.append(before + allocated(lambda part=part: trainer.training_step(model, part)))  # type: ignore[misc]
    # where nothing is padded transformers leaves the mask out, which takes contents to know
    assert 0.98 <= found.step / max(peaks) <= (1.1 if case.get("layout") == "padded" else 1.02)


def test_the_check_takes_what_torch_then_allocates() -> None:
    asked = config()
    objective = asked.objective()
    examples = STATED.examples(objective)
    counted = Planner(asked, examples, objective, ROOMY).check
    model = planner._made(planner.sizes_of("./tiny"), objective, torch.float32)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    real = weights + allocated(lambda: choose_layout(model, shortest(examples), "auto"))
    assert 0.98 <= counted / real <= 1.1  # the plain forward has a mask here that it has not there


def test_hollow_tensors_leave_nothing_behind() -> None:
    """After the model is gone the ledger is at 0, and torch is as it was."""
    from trimtab.logprobs import attention
    from trimtab.logprobs.layout import Block

    before = (Block.parts, torch.nn.Module._apply, attention.PRODUCTS)
    hollow = Hollow(fused=True)
    with hollow.on() as ledger:
        model = planner._made(planner.sizes_of("./bare"), config().objective(), torch.float32)
        assert ledger.live > 0 and not attention.PRODUCTS
    del model
    assert ledger.live == 0
    assert (Block.parts, torch.nn.Module._apply, attention.PRODUCTS) == before


def test_a_copy_of_a_hollow_model_is_hollow_in_the_same_ledger() -> None:
    """A copy that took a copy of the mode corrupted the heap: torch's fake tensors carry it with them."""
    hollow = Hollow()
    with hollow.on() as ledger:
        model = planner._made(planner.sizes_of("./bare"), config().objective(), torch.float32)
        one = ledger.live
        twin: Any = copy.deepcopy(model)
        assert ledger.live == pytest.approx(2 * one, rel=0.01)
    assert all(p.fake_mode is hollow.mode for p in twin.parameters())


def test_a_real_step_after_a_hollow_one_is_right() -> None:
    """What the engine keeps for later (masks) must not be hollow."""
    asked = config(precision="bfloat16")
    examples = Stated(30, 20, 3, 4).examples(asked.objective())

    def scored() -> torch.Tensor:
        torch.manual_seed(0)
        model = planner._made(planner.sizes_of("./tiny"), asked.objective(), torch.float32)
        install(model, torch.bfloat16, "packed")
        return Scorer(model, "packed", 2048).score(examples)[0].detach()

    before = scored()
    squares._causal.cache_clear()  # or the hollow step would find the real one's
    Planner(asked.model_copy(update={"layout": "packed"}), examples, asked.objective(), ROOMY).forecast(asked)
    assert torch.equal(scored(), before)


def test_matrix_products_are_those_of_the_sizes() -> None:
    """Three products a weight and token (forward, and two backward) in the layers, as many and one more in the head. Behind the
    last layer's attention there are the four tokens alone whose states are read."""
    found = planned(method="sft", stated=Stated(40, 1, 2, 4), batch_size=4, precision="float32", layout="packed")
    tokens, layers = 4 * 40, 4
    h, i, v = SIZES["hidden_size"], SIZES["intermediate_size"], found.parameters
    one = h * h * 2 + h * h // 2 * 2 + 3 * h * i
    v = (found.parameters - layers * (one + 2 * h) - h) // h
    products = 2 * (3 * (tokens * layers * one - (tokens - 4) * 3 * h * i) + 4 * 4 * h * v)
    attention = 7 * 2 * layers * 4 * 40 * 40 * h  # two forward, five backward
    # the first layer's inputs need no gradient only where the embedding is frozen, which it is not
    assert found.flops[torch.float32] == pytest.approx(products + attention, rel=0.02)


# --- what a run consists of ---------------------------------------------------------------------------------------------


def test_the_heaviest_pass_is_the_runs_own() -> None:
    """Lengths differ: of the batches that the run will make, the microbatch with most tokens."""
    feedback_file(Path("pairs.jsonl"), "comparison", 40)
    asked = config(data="pairs.jsonl", model="./tiny", token_budget=100, max_steps=3)
    from trimtab.prepare import make_template, prepare

    data = prepare(asked, asked.objective(), make_template(asked))
    plan = Planner(asked, data.train, asked.objective(), ROOMY)
    found = plan.forecast(asked).steps
    assert found.count == 3
    order = planner.Batches(len(data.train), 4, 0).epoch(0)[:3]
    costs = [[cost(data.train[i], "shared") for i in b] for b in order]
    assert found.tokens == pytest.approx(sum(map(sum, costs)) / 3)
    parts = [sum(b[j] for j in part) for b in costs for part in planner_fill(b, 100)]
    part, later = found.heaviest[0]
    assert sum(cost(e, "shared") for e in part) == max(parts) and isinstance(later, bool)
    # a lighter one that finds gradients may need more
    after = [sum(b[j] for j in part) for b in costs for part in planner_fill(b, 100)[1:]]
    assert max(after) in [sum(cost(e, "shared") for e in part) for part, later in found.heaviest if later]
    whole = plan.forecast(asked.model_copy(update={"max_steps": -1, "epochs": 2.0})).steps
    assert whole.count == 2 * len(planner.Batches(len(data.train), 4, 0))


def planner_fill(costs: list[int], budget: int) -> list[list[int]]:
    from trimtab.tokens.batch import fill

    return fill(costs, budget)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"token_budget": 120}, {"token_budget": 2048}),
        ({"finetune": "lora"}, {}),
        ({}, {"reference": "copy"}),
        ({"gradient_checkpointing": True}, {}),
        ({"optimizer": "sgd"}, {}),
        ({"precision": "float32"}, {"precision": "float64"}),
    ],
)
def test_what_saves_memory_is_seen_to(less: dict[str, Any], more: dict[str, Any]) -> None:
    assert planned(**less).step < planned(**more).step


def test_heap_and_process_are_of_a_cpu_only() -> None:
    cpu, gpu = planned(), planned(place("h100-80", None, None))
    assert gpu.process == 0 and gpu.phases["step"] == gpu.step
    held = cpu.weights + cpu.optimiser + cpu.gradients
    assert cpu.gradients == pytest.approx(cpu.weights, rel=0.01)  # buffers have none
    passing = cpu.process + held + planner.PASS * (cpu.step - held) + planner.HOLES * cpu.weights
    assert cpu.process > 1e8 and cpu.phases["step"] == pytest.approx(passing)
    assert cpu.peak == max(cpu.phases.values())


def test_with_checkpointing_what_comes_and_goes_takes_more_of_the_heap() -> None:
    cpu, gpu = (planned(where, gradient_checkpointing=True) for where in (ROOMY, place("h100-80", None, None)))
    held = cpu.weights + cpu.optimiser + cpu.gradients
    passing = planner.AGAIN * (cpu.first - held) + cpu.step - cpu.first
    assert cpu.phases["step"] == pytest.approx(cpu.process + held + passing + planner.HOLES * cpu.weights)
    assert planner.AGAIN > planner.PASS and cpu.step >= cpu.first > held
    assert gpu.phases["step"] == gpu.step


def test_a_copy_to_sample_from_finds_pieces_in_the_heap() -> None:
    same, low = (planned(samples=4, precision=p, finetune="lora") for p in ("float32", "bfloat16"))
    assert same.phases["samples"] == same.process + same.samples
    assert low.phases["samples"] == pytest.approx(low.process + low.samples + planner.HOLES * low.weights)
    gpu = planned(place("h100-80", None, None), samples=4, precision="bfloat16", finetune="lora")
    assert gpu.phases["samples"] == gpu.samples > 0
    none = planned(samples=0, precision="bfloat16", finetune="lora")
    assert none.phases["samples"] == none.process


# --- time ---------------------------------------------------------------------------------------------------------------


def test_layers_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config()
    plan = Planner(asked, STATED.examples(asked.objective()), asked.objective(), ROOMY)
    monkeypatch.setattr(plan, "_timed", lambda found, sizes: 10.0 + 2.0 * sizes.num_hidden_layers)
    seconds, how = plan.seconds(plan.forecast(asked))
    assert seconds == pytest.approx(10.0 + 2.0 * 4) and how == "timed here with 1 and 3 of 4 layers"


def test_the_whole_model_is_timed_where_that_does_not_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config()
    plan = Planner(asked, STATED.examples(asked.objective()), asked.objective(), ROOMY)
    monkeypatch.setattr(plan, "_timed", lambda found, sizes: 0.1 * sizes.num_hidden_layers**2)
    found = plan.forecast(asked)
    assert plan.seconds(found) == (pytest.approx(1.6), "timed here")
    monkeypatch.setattr(planner, "PATIENCE", 1.0)
    assert plan.seconds(found)[1] == "timed here with 1 and 3 of 4 layers"


@pytest.mark.parametrize(
    ("steps", "taken", "counted"),
    [(7, [50, 40, 30, 20, 3, 1, 2], 2), (1, [50, 4], 4)],  # with one step in all it is made again
)
def test_the_steps_in_which_memory_grows_do_not_count(
    steps: int, taken: list[int], counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(max_steps=steps)
    plan = Planner(asked, STATED.examples(asked.objective()), asked.objective(), ROOMY)
    found = plan.forecast(asked)
    clock = iter([tick for seconds in taken for tick in (0.0, float(seconds))])
    monkeypatch.setattr(planner, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(planner, "_tokens", lambda batch, scorer: 1)
    assert plan._timed(found, plan.sizes) == counted * found.steps.tokens
    assert next(clock, None) is None  # all were made


def test_a_model_too_large_to_be_tried_is_timed_by_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config()
    plan = Planner(asked, STATED.examples(asked.objective()), asked.objective(), ROOMY)
    found = plan.forecast(asked)
    monkeypatch.setattr(plan, "_room", lambda found: False)
    monkeypatch.setattr(planner, "rate", lambda dtype, *shape: 1e12)
    monkeypatch.setattr(planner, "bandwidth", lambda: 1e10)
    seconds, how = plan.seconds(found)
    assert seconds == pytest.approx(found.flops[torch.float32] / 1e12 + found.moved / 1e10)
    assert how == "from matrix products measured here: 1.00 TFLOP/s in float32"


def test_the_reference_of_a_timed_step_is_near_its_random_weights() -> None:
    """Else the loss is flat there: its gradients were below 1e-38, which take an Intel Xeon ten times as long."""
    asked, sizes = config(), planner.sizes_of("./tiny")
    sizes.vocab_size = 20_000
    examples, model = STATED.examples(asked.objective()), planner._made(sizes, asked.objective(), torch.float32)
    install(model, torch.float32, "shared")
    ours = Scorer(model, "shared", asked.token_budget).score_all(examples)[0]
    assert (ours.sum() - planner._Constant(sizes).logps(examples).sum()).abs() < 2 * len(ours)


def test_a_step_is_timed_here() -> None:
    asked = config(method="kto", finetune="lora")
    plan = Planner(asked, STATED.examples(asked.objective()), asked.objective(), ROOMY)
    seconds, _ = plan.seconds(plan.forecast(asked))
    assert 0 < seconds < 60


def test_a_stated_device_is_a_roofline() -> None:
    asked = config(precision="bfloat16")
    slow, fast = (
        Planner(asked, STATED.examples(asked.objective()), asked.objective(), place(name, None, None))
        for name in ("l4-24", "h100-80")
    )
    found = slow.forecast(asked)
    assert torch.bfloat16 in found.flops and fast.seconds(found)[0] < slow.seconds(found)[0]
    low, wide = 121e12 * planner.REACH, 0.3e12 * planner.REACH_BYTES
    rates = {torch.bfloat16: low, torch.float32: 30.3e12 * planner.REACH}
    wanted = sum(n / rates[kind] for kind, n in found.flops.items()) + found.moved / wide
    assert slow.seconds(found)[0] == pytest.approx(wanted)


# --- devices and proposals ----------------------------------------------------------------------------------------------


def test_devices() -> None:
    assert place("a100-40", None, None).memory == pytest.approx((SHEETS["a100-40"][0] - planner.CONTEXT_GB) * 1e9)
    assert place(None, None, None).memory > 1e8 and not place(None, None, None).flops
    assert place(None, 3.0, None).memory == 3e9
    assert place(None, 24.0, 100.0).flops[torch.bfloat16] == 1e14
    with pytest.raises(ConfigError, match='device is "h100".*Did you mean "h100-80"'):
        place("h100", None, None)
    with pytest.raises(ConfigError, match="states memory and rate"):
        place("h100-80", 3.0, None)
    with pytest.raises(ConfigError, match="state its memory, too"):
        place(None, None, 3.0)


def test_the_proposal_fits_and_changes_as_little_as_it_can() -> None:
    asked = config(reference="copy", token_budget=4096, batch_size=12)
    examples = Stated(60, 40, 3, 12).examples(asked.objective())

    def given(memory: float) -> tuple[planner.Forecast, dict[str, Any]] | None:
        plan = Planner(asked, examples, asked.objective(), Device("a test", memory))
        plan.process = 0.0
        plan.check = 0
        return propose(plan, asked)

    whole = given(1e12)
    assert whole is not None and whole[1] == {}
    seen = []
    for share in (0.8, 0.5, 0.3, 0.2, 0.15, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05):
        found = given(whole[0].peak * share)
        if found is None:
            break
        forecast, change = found
        assert forecast.peak <= whole[0].peak * share
        resolve({**{k: v for k, v in asked.flat().items() if v is not None}, **change})  # the flags are accepted
        seen.append(tuple(change))
    assert seen[0] == ("token_budget",)
    assert "finetune" in seen[-1]
    assert given(1.0) is None


def test_a_budget_is_as_large_as_fits() -> None:
    asked = config(token_budget=4096, batch_size=12)
    plan = Planner(asked, Stated(60, 40, 3, 12).examples(asked.objective()), asked.objective(), ROOMY)
    plan.process, plan.check = 0.0, 0
    half = plan.forecast(asked.model_copy(update={"token_budget": 1024})).peak
    plan.device = Device("a test", half)
    found = propose(plan, asked)
    assert found is not None and found[1] == {"token_budget": 1024}


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_needs_no_weights() -> None:
    told = done(
        "plan", "--model", "./bare", "--method", "dpo", "--finetune", "full", "--prompt_tokens", 50, "--rows", 20
    )
    assert "prompts of 50 and answers of 128 tokens: 20 examples, 2 optimiser steps of 16" in told
    assert re.search(r"expected peak memory: \d\.\d\d GB of [\d.]+ \(this machine\): fits", told)
    assert re.search(r"expected time: [\d.]+ s per optimiser step", told)
    assert "this setting fits as it is" in told


def test_the_command_reads_a_file() -> None:
    feedback_file(Path("thumbs.jsonl"), "thumb", 20)
    told = done("plan", "thumbs.jsonl", "--model", "./tiny", "--method", "kto", "--device", "l4-24")
    assert "thumbs.jsonl: 18 examples, 2 optimiser steps of 16" in told
    assert "GB of 23.0 (l4-24): fits" in told and "from stated rates" in told
    assert "process" not in told  # the GPU's memory holds none


def test_what_does_not_fit_is_said() -> None:
    told = done("plan", "--model", "./bare", "--memory_gb", 0.01, "--rows", 20)
    assert "does not fit" in told and "no setting fits" in told


def test_refusals() -> None:
    feedback_file(Path("pairs.jsonl"), "comparison", 12)
    assert trimtab("plan", "pairs.jsonl", "--model", "./tiny", "--rows", 3).error == (
        'error: The option "rows" has no effect here: the file has its own. Remove it.'
    ).removeprefix("error: ")
    Path("judge.py").write_text("def odd(prompt, answer):\n    return 1.0\n")
    more = ("--method", "rloo", "--judge", "rule:judge.py:odd", "--model", "./tiny")
    assert "with judge they are yet to be sampled" in trimtab("plan", "pairs.jsonl", *more).error
    assert "There is no option" in trimtab("plan", "--model", "./bare", "--learnin_rate", 3).error
    assert "No such model folder" in trimtab("plan", "--model", "./absent").error
