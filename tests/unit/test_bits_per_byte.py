"""Bits per byte of text, against every token on its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from megatron_tst.evaluation.bits_per_byte import bits_per_byte
from megatron_tst.evaluation.folder import LoadedModel, check_model_folder, load_model
from tests.tiny_llama import CONTEXT, CPU, log_probabilities, save_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(check_model_folder(model), "auto", CPU)


def bits_by_hand(
    loaded: LoadedModel, text: str, window: int, stride: int
) -> list[tuple[int, float]]:
    """Of each token: how many tokens its prediction sees, and its bits."""
    tokens = [loaded.tokenizer.eos_token_id, *loaded.tokenizer.encode(text)]
    found = []
    for position in range(1, len(tokens)):
        # The first window reaches to position ``window``, each further one by ``stride``.
        steps = max(-(-(position - window) // stride), 0)
        end = min(window + steps * stride, len(tokens) - 1)
        begin = max(end - window, 0)
        nats = -log_probabilities(loaded, tokens[begin : position + 1])[-1]
        found.append((position - begin, nats / math.log(2)))
    return found


TEXTS = (
    "Grün ist the colour of money. " * 7,
    "one\r\ntwo",
    "x",
    "y" * CONTEXT,
    "z" * (CONTEXT + 1),
)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (20, 20), (20, 7), (1, 1)])
def test_bits_per_byte_are_those_computed_by_hand(
    loaded: LoadedModel, window: int | None, stride: int | None
) -> None:
    found = bits_per_byte(loaded, TEXTS, window, stride, batch_size=3)
    width = window or CONTEXT
    by_hand = [bits_by_hand(loaded, text, width, stride or width // 2) for text in TEXTS]
    bits = [sum(cost for _, cost in text) for text in by_hand]
    sizes = [len(text.encode()) for text in TEXTS]
    # float32 in another order of batches.
    assert found.bits == pytest.approx(sum(bits), rel=1e-6)
    assert (found.bytes, found.tokens, found.documents) == (sum(sizes), sum(sizes), len(TEXTS))
    assert found.value == pytest.approx(sum(bits) / sum(sizes), rel=1e-6)
    of_positions = [[b for text in by_hand for n, b in text if n == k + 1] for k in range(width)]
    assert found.position_bits == pytest.approx([sum(costs) for costs in of_positions], rel=1e-5)
    assert found.position_tokens == tuple(map(len, of_positions))
    residuals = [b - found.value * size for b, size in zip(bits, sizes, strict=True)]
    spread = math.sqrt(sum(r * r for r in residuals) / (len(TEXTS) - 1) * len(TEXTS))
    assert found.stderr == pytest.approx(spread / sum(sizes), rel=1e-4)


def test_bits_per_byte_do_not_depend_on_batches_or_on_windows_that_hold_the_text(
    loaded: LoadedModel,
) -> None:
    expected = bits_per_byte(loaded, TEXTS).bits
    for batch_size in (2, 64):
        assert bits_per_byte(loaded, TEXTS, batch_size=batch_size).bits == pytest.approx(
            expected, rel=1e-6
        )
    short = TEXTS[1]
    for window, stride in ((len(short) + 1, 1), (CONTEXT, CONTEXT)):
        found = bits_per_byte(loaded, [short], window, stride)
        assert found.bits == pytest.approx(bits_per_byte(loaded, [short]).bits, rel=1e-6)
        assert found.stderr is None


def test_the_token_that_a_tokenizer_puts_in_front_comes_first(model: Path) -> None:
    loaded = load_model(check_model_folder(model), "auto", CPU)
    begin = 5
    token = loaded.tokenizer.convert_ids_to_tokens(begin)
    loaded.tokenizer.bos_token = token
    loaded.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, begin)]
    )
    tokens = loaded.tokenizer.encode("abc")
    assert tokens[0] == begin
    found = bits_per_byte(loaded, ["abc"])
    assert found.tokens == 3
    expected = -sum(log_probabilities(loaded, tokens)) / math.log(2)
    assert found.bits == pytest.approx(expected, rel=1e-6)


def test_without_a_token_in_front_the_first_counts_as_any(loaded: LoadedModel) -> None:
    class NoEnd:
        """The tokenizer, without an end of document."""

        bos_token_id = eos_token_id = None

        def __getattr__(self, name: str) -> Any:
            return getattr(loaded.tokenizer, name)

        def __len__(self) -> int:
            return 256

    text = "abc"
    found = bits_per_byte(LoadedModel(loaded.model, NoEnd()), [text])
    rest = sum(log_probabilities(loaded, loaded.tokenizer.encode(text))) / math.log(2)
    assert found.bits == pytest.approx(8 - rest, rel=1e-6)


def test_a_text_that_spells_a_control_token_is_text(loaded: LoadedModel) -> None:
    end = loaded.tokenizer.eos_token
    assert loaded.tokenizer.encode(end) == [loaded.tokenizer.eos_token_id]
    assert bits_per_byte(loaded, [f"a {end} b"]).tokens == len(f"a {end} b")


def test_windows_that_the_model_cannot_have(loaded: LoadedModel) -> None:
    for window, stride, message in (
        (CONTEXT + 1, None, f"--window 65: use 1 to {CONTEXT}"),
        (8, 9, "--stride 9: use 1 to 8"),
        (8, 0, "--stride 0: use 1 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            bits_per_byte(loaded, ["text"], window, stride)
