"""Continues a prompt with a model in a Hugging Face folder, by transformers' own generation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command
from megatron_tst.evaluation.folder import (
    DTYPE_HELP,
    DtypeName,
    check_model_folder,
    device_of,
    load_model,
)
from megatron_tst.evaluation.generation import generate


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="?", help="default: standard input")
    add("--model", type=Path, required=True, help="Hugging Face folder with safetensors weights")
    add("--max-new-tokens", type=int, default=100, help="default: 100")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    add("--top-p", type=float, default=1.0, help="of the probability to sample from (default: 1)")
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add("--dtype", choices=get_args(DtypeName), default="auto", help=DTYPE_HELP)
    add("--device", default="auto", help="default: the GPU where there is one")
    options = parser.parse_args(arguments)
    prompt = _read_prompt() if options.prompt is None else options.prompt
    folder = check_model_folder(options.model)
    loaded = load_model(folder, options.dtype, device_of(options.device))
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    text = generate(
        loaded,
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(text)
    return 0


def _read_prompt() -> str:
    try:
        # The end of line that echo and editors add is none of the text.
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt on standard input is not text ({error}).") from error
