"""Every method of the foundation on real data with SmolLM2-135M-Instruct: one run each through the command line.

    python benchmarks/real_data.py            # all runs, then the table
    python benchmarks/real_data.py NAME ...   # these runs only
    python benchmarks/real_data.py --table    # the table of the runs that are there

Runs are folders under runs/real-data; one that is finished is not run again. The data lies in $TRIMTAB_DATA
(default: ../shared/data beside the checkout).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

DATA = Path(os.environ.get("TRIMTAB_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUT = Path("runs/real-data")
HH = "hh-rlhf/harmless-base-test.jsonl.gz"
QA = "finegrained-qa-feedback/dev_feedback.json"
EN, ZH = "llamafactory/dpo_en_demo.json", "zh/llamafactory/dpo_zh_demo.json"
LONG = "--max_length 2048"

RUNS = {
    "sft-self-instruct": ("self-instruct/seed_tasks.jsonl", "--method sft --epochs 3 --batch_size 8"),
    "dpo-hh-lora": (HH, "--method dpo --finetune lora"),
    "dpo-hh-full": (HH, "--method dpo --finetune full"),
    "kto-halueval": ("halueval/general_data.json", "--method kto --limit 1000 --desirable_weight 0.27"),
    "todo-finegrained": (QA, "--method todo --limit 100 --beta 0.1"),
    "dpo-en": (EN, f"--method dpo --batch_size 8 {LONG}"),
    "simpo-en": (EN, f"--method simpo --batch_size 8 {LONG}"),
    "dpo-zh": (ZH, f"--method dpo --batch_size 8 {LONG}"),
    "simpo-zh": (ZH, f"--method simpo --batch_size 8 {LONG}"),
    "bco-halueval": ("halueval/general_data.json", "--method bco --match_prompts tfidf --limit 1000"),
    "lipo-finegrained": (
        QA,
        "--method lipo --by ranks --limit 150 --shape 'finegrained ranking'",
    ),  # a third of the lists has ties
    "reward-model-hh": (HH, "--method reward_model --limit 1000"),
}
JUDGED = {"reward-model-hh": "llmbar/natural.json"}  # scored with the model afterwards
SHOWN = ("rewards/accuracies", "rewards/auc", "accuracies/three_way", "nll")


def main() -> None:
    if "--table" not in sys.argv:
        asked = [a for a in sys.argv[1:] if not a.startswith("-")]
        for name in asked or RUNS:
            file, flags = RUNS[name]
            card = OUT / name / "run.json"
            if not card.exists() or json.loads(card.read_text())["status"] != "finished":
                command = [sys.executable, "-m", "trimtab", "train", str(DATA / file), *shlex.split(flags)]
                subprocess.run([*command, "--output", str(OUT / name)], check=False)
            if name in JUDGED and card.exists():
                out = ["--policy", str(OUT / name), "--out", str(OUT / name / "judged.jsonl")]
                command = [sys.executable, "-m", "trimtab", "score", str(DATA / JUDGED[name]), *out]
                told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
                (OUT / name / "judged.txt").write_text(f"{JUDGED[name]}: {told.rpartition('; ')[2]}")
    print(table())


def table() -> str:
    """Markdown: one line per run that is there."""
    lines = [
        "| run | rows: kept, held out, left out | held out before | after (95 % interval) | KL, nats | steps, minutes, peak GB |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name in RUNS:
        file = OUT / name / "run.json"
        card = json.loads(file.read_text()) if file.exists() else {}
        if card.get("status") != "finished":
            continue
        data, engine = card["data"], card["engine"]
        dropped = "; ".join(f"{n} {reason}" for reason, n in data["dropped"].items()) or "none"
        before, after = card["evaluation"].get("before", {}), card["evaluation"].get("after", {})
        show = lambda e: "<br>".join(f"{k} {_interval(e[k])}" for k in SHOWN if k in e)  # noqa: E731
        shift, judged = data.get("prompt_shift"), OUT / name / "judged.txt"
        also = f"prompt AUC {shift['auc_before']:.3f}, matched {shift['auc_after']:.3f}" if shift else ""
        also += judged.read_text() if judged.exists() else ""
        kl = _interval(card["samples"]["kl"]) if card.get("samples", {}).get("kl") else ""
        cost = f"{card.get('steps')}, {card.get('seconds', 0) / 60:.0f}, {engine.get('peak_memory_gb')}"
        rows = f"{data['train']:,}, {data['held_out']:,}, {dropped}"
        cells = (
            f"{name} `{RUNS[name][1]}`",
            rows,
            show(before),
            "<br>".join(filter(None, [show(after), also])),
            kl,
            cost,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


if __name__ == "__main__":
    main()
