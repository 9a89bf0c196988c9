"""Run card, plots, verdict: one self-contained HTML file per run. Nothing of ours is imported but the errors."""

from trimtab.report.html import write_report
from trimtab.report.stats import Interval, bootstrap_interval, mean_interval, paired_gain, proportion_interval

__all__ = ["Interval", "bootstrap_interval", "mean_interval", "paired_gain", "proportion_interval", "write_report"]
