"""Where the planner's advice is from, in words: the paper, and our studies (docs/results.md).

The paper (arXiv 2605.06546) has large models and one run a setting, our studies small models and
seeds. Where they differ, a plan says so. A test compares the gaps with the tables of the studies.
"""

from __future__ import annotations

from megatron_tst.common.units import MINUS, PLUS_MINUS

LARGEST_STUDIED_PARAMETERS = 443_008

_STUDY = "127k parameters, 3000 steps, three seeds: docs/results.md"

OUTPUT_ONLY_GAP = f"{MINUS}0.008 {PLUS_MINUS} 0.006"
"""Nats, the baseline's final loss minus that of s = 2, r = 0.3; those below likewise."""
SHORT_GAPS = {2: f"+0.021 {PLUS_MINUS} 0.019", 6: f"{MINUS}0.180 {PLUS_MINUS} 0.023"}
"""By bag size, r = 0.3."""

SOURCES = (
    "Losses are interpolated in the tables of the paper (arXiv 2605.06546): models of 270M to "
    "10B-A1B, one run a setting, no seeds. Runs with seeds that decide are of models up to "
    f"{LARGEST_STUDIED_PARAMETERS // 1000}k parameters, where no larger bag was better than s = 2 "
    "(docs/results.md)."
)
ABOUT_OUTPUT_ONLY = (
    "Output-only superposition is better than the baseline in the paper, which gives no number, "
    f"and worse in one of two comparisons with three seeds: {OUTPUT_ONLY_GAP} nats at s = 2, "
    f"r = 0.3 ({_STUDY}); the other, of 1.1M parameters, is undecided. Train it beside a baseline "
    "of as many steps."
)
EQUAL_DATA = (
    "at equal data the baseline wins in the paper (3B), and either may in small models with seeds "
    "(docs/results.md)"
)
SHORT_RUNS = (
    "In short runs superposition can lose: against the baseline "
    + " and ".join(f"s = {size} was at {gap} nats" for size, gap in SHORT_GAPS.items())
    + f" ({_STUDY})."
)
RATIOS = (
    "in the paper there is less to gain below, and above 0.5 phase 2 does not recover fully "
    "(undecided in small models with seeds: docs/results.md)."
)
