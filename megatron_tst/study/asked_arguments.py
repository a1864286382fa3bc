"""What the runs of a study have as arguments, with what the study leaves to Megatron."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.study.config import StudyConfig, StudyRun

Parser = Callable[[Sequence[str]], Mapping[str, Any]]
"""Megatron's own: from a command line to all arguments by name."""

# Flags whose argument is called otherwise.
_NAMES = {"fp8_format": "fp8", "fp4_format": "fp4"}
_LEGACY_SPLIT = "969, 30, 1"


@dataclass(frozen=True)
class AskedArguments:
    """The arguments of each run of a study, of the types that Megatron gives them.

    Attributes:
        study: with the precision that its runs have.
        parse: as the flags of superposition are none of Megatron's, it is called without them.
    """

    study: StudyConfig
    parse: Parser
    _parsed: dict[str, Mapping[str, Any]] = field(default_factory=dict, init=False)

    def of(self, run: StudyRun) -> dict[str, Any]:
        """All of them by name, as they are when Megatron has started.

        An argument that Megatron takes from a corpus or a tokenizer is None where it is not asked
        for.
        """
        model = run.settings.model
        if model not in self._parsed:
            # Once a model: a parser of all arguments takes long to build.
            try:
                self._parsed[model] = self.parse(list(_of_megatron(run.arguments)))
            except UsageError as error:
                raise UsageError(f"arguments, or models.{model}: {error}.") from error
        parsed = self._parsed[model]
        own = run.settings.arguments(self.study.warmup_share, self.study.decay_share)
        of_run = {name_of(flag): text for flag, text in zip(own[::2], own[1::2], strict=True)}
        typed = {name: type(parsed[name])(text) for name, text in of_run.items() if name in parsed}
        return _as_started({**parsed, **typed}, self.study.processes)


def name_of(flag: str) -> str:
    """The argument of a flag, which has its dashes or not."""
    name = flag.removeprefix("--").replace("-", "_")
    return _NAMES.get(name, name)


def names_of(arguments: Sequence[str]) -> set[str]:
    """The arguments that a command line has flags of."""
    return {name_of(part) for part in arguments if part.startswith("--")}


def _of_megatron(arguments: Sequence[str]) -> Iterator[str]:
    """Without the flags of superposition, each with its value."""
    is_kept = True
    for part in arguments:
        is_kept = not part.startswith("--tst-") if part.startswith("--") else is_kept
        if is_kept:
            yield part


def _as_started(parsed: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """With what ``validate_args`` of megatron/training/arguments.py works out of what is asked."""
    found = dict(parsed)
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    if hidden and found["ffn_hidden_size"] is None:
        gated = int(4 * hidden * 2 / 3 / 64) * 64
        found["ffn_hidden_size"] = gated if found["swiglu"] else 4 * hidden
    if hidden and heads and found["kv_channels"] is None:
        found["kv_channels"] = hidden // heads
    if found["num_experts"] and found["moe_ffn_hidden_size"] is None:
        found["moe_ffn_hidden_size"] = found["ffn_hidden_size"]
    if not found["group_query_attention"]:
        # Megatron leaves 1 there or sets the number of heads, by the class of the model.
        found["num_query_groups"] = None
    if found["data_path"] and found["split"] is None:
        found["split"] = _LEGACY_SPLIT
    if found["full_validation"]:
        # Counted when the set is read.
        found["eval_iters"] = None
    found["global_batch_size"] = found["global_batch_size"] or _one_micro_batch(found, processes)
    return found


def _one_micro_batch(arguments: Mapping[str, Any], processes: int) -> int | None:
    """One of each data-parallel rank, which Megatron takes for a batch by default."""
    ranks = processes
    for kind in ("tensor_model", "pipeline_model", "context"):
        ranks //= arguments[f"{kind}_parallel_size"]
    return arguments["micro_batch_size"] and arguments["micro_batch_size"] * ranks
