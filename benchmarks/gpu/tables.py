"""The table of benchmarks/gpu/check.py: what was measured beside what the roofline predicts."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.measuring import Row
from benchmarks.gpu.training import BAG_SIZE, LINEAR, TE_ARMS, VOCABULARY
from benchmarks.roofline import GPUS, MODELS, Cost, Gpu, linear_cost, loss_costs, step_seconds

# Of a step of benchmarks/gpu/training.py.
LOCAL_POSITIONS, TE_POSITIONS = 32 * 512, 16 * 2048
# Of Nsight Compute, and their heads.
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "bytes read",
    "dram__bytes_write.sum": "bytes written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of DRAM",
    "smsp__inst_executed.sum": "instructions",
}


def tables(outcomes: Sequence[Row], rows: Mapping[str, Sequence[Row]]) -> str:
    """All tables as Markdown.

    Args:
        outcomes: how each process ended.
        rows: what the stages have measured.
    """
    gpu = measured_gpu(rows["ceilings"])
    parts = [*machine(rows["ceilings"], gpu), "", "| stage | process | ended | s |", rule(4)]
    for outcome in outcomes:
        parts.append(line(*(outcome[key] for key in ("stage", "name", "ended", "seconds"))))
    contestants = [*rows["kernels"], *rows["linear"]]
    if contestants:
        parts += ["", *contestant_table(contestants, gpu)]
    if rows.get("counters"):
        parts += ["", line("kernel", *METRICS.values()), rule(1 + len(METRICS))]
        parts += [line(row["kernel"], *(row[name] for name in METRICS)) for row in rows["counters"]]
    for row in rows.get("resume", ()):
        parts += [
            "",
            f"Killed after step {row['killed_after']}, resumed at {row['resumed_at']}, switch at "
            f"{row['switch']}: {row['steps']} losses differ by {row['largest_difference']:.2g} of "
            "themselves at most",
        ]
    arms = [*rows["training"], *rows["te"]]
    if arms:
        parts += ["", *arm_table(arms, gpu)]
    return "\n".join(parts) + "\n"


def counters(path: Path) -> list[Row]:
    """A row a kernel of what Nsight Compute wrote; none if there is no such file."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    # Between messages of its own; below the heads are units, without a number of the kernel.
    found = csv.DictReader(text for text in lines if text.startswith('"'))
    return [
        {
            "kernel": row["Kernel Name"],
            **{name: float(row[name].replace(",", "")) for name in METRICS},
        }
        for row in found
        if row["ID"]
    ]


def measured_gpu(rows: Sequence[Row]) -> Gpu | None:
    """The card by its measured ceilings, if both are there."""
    found = {row["what"]: row for row in rows}
    if not {"copy", "product"} <= found.keys():
        return None
    bandwidth = found["copy"]["bytes_per_second"]
    return Gpu("this card", bandwidth, found["product"]["flops_per_second"])


def machine(rows: Sequence[Row], gpu: Gpu | None) -> Iterator[str]:
    """Card, versions and ceilings, a line each."""
    for row in rows:
        if row["what"] == "machine":
            yield f"{row['card']}, driver {row['driver']}, Python {row['python']}"
            yield ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    if gpu:
        yield (
            f"copy {gpu.bytes_per_second / 1e9:.4g} GB/s, "
            f"bf16 product {gpu.flops_per_second / 1e12:.4g} TFLOP/s"
        )


def contestant_table(rows: Sequence[Row], gpu: Gpu | None) -> Iterator[str]:
    """Kernels: bytes on paper by the measured time, and the least times."""
    heads = ["model", "operation", "s", "contestant", "ms", "timed", "peak, MB", "GB/s"]
    heads += ["of copy bandwidth", "least here, ms", *(f"least {known.name}, ms" for known in GPUS)]
    yield line(*heads)
    yield rule(len(heads))
    for row in rows:
        cost = Cost(**row["cost"]) if row["cost"] else None
        elapsed = row["milliseconds"]
        # Products may be bound by arithmetic, so that their bytes say nothing.
        rate = cost.bytes_moved / elapsed / 1e6 if cost and elapsed and not cost.flops else None
        yield line(
            *(row[key] for key in ("model", "operation", "bag_size", "contestant")),
            *(elapsed, row["timed"], row.get("peak_megabytes"), rate),
            rate * 1e9 / gpu.bytes_per_second if rate and gpu else None,
            *(1e3 * cost.seconds(card) if cost and card else None for card in (gpu, *GPUS)),
        )


def arm_table(rows: Sequence[Row], gpu: Gpu | None) -> Iterator[str]:
    """Steps end to end: matrix products and loss on paper beside what they took."""
    heads = ["arm", "phase", "ms a step", "peak, MB", "last loss", "products and loss at least, ms"]
    yield line(*heads)
    yield rule(len(heads))
    for row in rows:
        predicted = least_step(row, gpu) if gpu and not row["is_tiny"] else None
        values = (row[key] for key in ("arm", "phase", "milliseconds", "peak_megabytes", "loss"))
        yield line(*values, predicted)


def least_step(row: Row, gpu: Gpu) -> float | None:
    """Milliseconds of the products of a step of 270M and its loss, without attention and the rest.

    None where the roofline has no such loss.
    """
    model, n = MODELS["270M"], TE_POSITIONS if row["arm"] in TE_ARMS else LOCAL_POSITIONS
    seconds = step_seconds(model, n, gpu)
    if row["design"] == LINEAR:
        # Its products are those of the step.
        kernel_bytes = linear_cost(n, VOCABULARY, model.hidden).kernel_bytes
        return 1e3 * (seconds + Cost(kernel_bytes).seconds(gpu))
    bags = BAG_SIZE if row["phase"] == 1 else 1
    cost = loss_costs(n, VOCABULARY, bags).get(row["design"])
    return 1e3 * (seconds + cost.seconds(gpu)) if cost else None


def line(*values: object) -> str:
    """A row; numbers with four digits, and nothing for None."""
    return f"| {' | '.join(map(cell, values))} |"


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    # A bar would end the cell.
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def rule(columns: int) -> str:
    return "|---" * columns + "|"
