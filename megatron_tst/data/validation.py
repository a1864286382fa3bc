"""The same validation samples at every evaluation."""

from __future__ import annotations

from typing import Any

from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_tst.common.errors import UsageError


class FixedValidationDataset(Dataset[dict[str, Any]]):
    """Repeats the first samples of a validation dataset, once for every evaluation.

    Megatron reads on in the validation split from one evaluation to the next, so that two losses of
    a run, or of two runs of different length, are measured on different text. For runs of different
    length to read the same, ask the builder for ``samples_per_evaluation`` samples: the order in
    which Megatron shuffles them depends on their number.

    Args:
        dataset: validation dataset.
        samples_per_evaluation: evaluation steps times the global batch size.
        total_samples: samples of all evaluations of the run.

    Raises:
        UsageError: the dataset has fewer samples than an evaluation reads.
    """

    split = Split.valid
    """Tells Megatron's data loader which batch sizes to use."""

    def __init__(
        self, dataset: Dataset[dict[str, Any]], samples_per_evaluation: int, total_samples: int
    ) -> None:
        available = len(dataset)  # type: ignore[arg-type]
        if not 1 <= samples_per_evaluation <= available:
            raise UsageError(
                f"An evaluation reads {samples_per_evaluation} samples (--eval-iters times the "
                f"global batch size) and the validation split has {available}: change --eval-iters "
                "or enlarge the split."
            )
        self.dataset = dataset
        self.samples_per_evaluation = samples_per_evaluation
        self.total_samples = total_samples

    def __len__(self) -> int:
        return self.total_samples

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """The sample that every evaluation reads in this place; None is passed on."""
        if idx is None:
            return self.dataset[idx]
        return self.dataset[idx % self.samples_per_evaluation]
