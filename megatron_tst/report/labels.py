"""Names groups of runs by the settings that set them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_tst.common.units import TIMES
from megatron_tst.report.compared_settings import LENGTH_SETTINGS, SUPERPOSITION_SETTINGS, differing
from megatron_tst.report.describing import Setting, phases_of
from megatron_tst.settings.config import SETTINGS, default_weighting
from megatron_tst.settings.phases import is_superposed

_NAMES = {"learning_rate": "lr", "global_batch_size": "batch size"}


def labels_of(settings: Sequence[dict[str, Setting]], counts: Sequence[int]) -> list[str]:
    """Names each group by what sets it apart from what most runs have."""
    others = [
        name
        for name in differing(settings)
        if name not in (*SUPERPOSITION_SETTINGS, *LENGTH_SETTINGS)
    ]
    usual = {name: _most_common(settings, counts, name) for name in ("total_steps", *others)}
    labels = []
    for one in settings:
        parts = [superposition_label(one)]
        steps, usual_steps = one.get("total_steps"), usual["total_steps"]
        if steps != usual_steps:
            parts.append(f"{float(steps or 0) / float(usual_steps or 1):.3g}{TIMES} steps")
        parts += [_shown(name, one.get(name)) for name in others if one.get(name) != usual[name]]
        labels.append(" ".join(parts))
    return _told_apart(labels, settings)


def superposition_label(settings: Mapping[str, Setting]) -> str:
    """The superposition of a run, with what is not the published choice."""
    if not is_superposed(settings):
        return "baseline"
    sizes = ",".join(str(phase.bag_size) for phase in phases_of(settings)[:-1])
    if drawn := settings.get("bag_sizes"):
        sizes = str(drawn).replace(",", "|")
    ratio = float(settings.get("step_ratio", 0))
    parts = [f"s={sizes} r={ratio:.4g}"]
    for name, known in SETTINGS.items():
        if name == "target_weighting":
            parts.append(weighting_label(settings) or "")
        parts.append(known.named(settings.get(name, known.default)))
    return " ".join(filter(None, parts))


def weighting_label(settings: Mapping[str, Setting]) -> str | None:
    """Target weights that are not the default of the bag size; None for those that are."""
    weighting = settings.get("target_weighting")
    default = default_weighting(int(settings.get("bag_size", 1)))
    exponent = settings.get("power_law_exponent", 1.0)
    if weighting == "power-law" and exponent != 1.0:
        return f"power-law {exponent:g}"
    return None if weighting in (None, default) else str(weighting)


def _most_common(
    settings: Sequence[Mapping[str, Setting]], counts: Sequence[int], name: str
) -> Setting | None:
    votes: Counter[Setting | None] = Counter()
    for one, count in zip(settings, counts, strict=True):
        votes[one.get(name)] += count
    return votes.most_common(1)[0][0]


def _shown(name: str, value: Setting | None) -> str:
    shown = "not recorded" if value is None else f"{value:g}" if _is_number(value) else str(value)
    return f"{_NAMES.get(name, name)} {shown}"


def _is_number(value: Setting) -> bool:
    return isinstance(value, float)


def _told_apart(labels: list[str], settings: Sequence[dict[str, Setting]]) -> list[str]:
    """Adds to labels that several groups share all settings in which these groups differ."""
    found = []
    for label, one in zip(labels, settings, strict=True):
        twins = [other for other, its in zip(settings, labels, strict=True) if its == label]
        extra = [_shown(name, one.get(name)) for name in differing(twins)]
        found.append(" ".join([label, *extra]))
    return found
