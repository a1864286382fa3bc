"""CTranslate2: run.py describes the arguments and the result."""

import ctranslate2
import numpy
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer


def run(folder, work, case):
    TransformersConverter(str(folder)).convert(str(work / "model"), force=True)
    generator = ctranslate2.Generator(str(work / "model"), compute_type="float32")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode(case["text"])
    [made] = generator.generate_batch(
        [encoded.tokens],
        max_length=len(case["tokens"]),
        min_length=len(case["tokens"]),
        include_prompt_in_result=False,
    )
    logits = generator.forward_batch([case["ids"] + case["tokens"]])
    return {
        "ids": encoded.ids,
        "tokens": made.sequences_ids[0],
        "logits": numpy.array(logits)[0].tolist(),
    }
