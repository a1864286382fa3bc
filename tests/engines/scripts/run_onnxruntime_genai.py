"""ONNX Runtime GenAI: run.py describes the arguments and the result."""

import subprocess
import sys

import onnxruntime_genai as genai


def run(folder, work, case):
    model_folder, cache = work / "model", work / "cache"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder]
    command += ["-o", model_folder, "-p", "fp32", "-e", "cpu", "-c", cache]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    model = genai.Model(str(model_folder))
    ids = genai.Tokenizer(model).encode(case["text"]).tolist()
    params = genai.GeneratorParams(model)
    length = len(case["ids"]) + len(case["tokens"]) + 1
    params.set_search_options(max_length=length, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(case["ids"])
    tokens = []
    for _ in case["tokens"]:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    # What its generator gives as logits is not that of one position.
    return {"ids": ids, "tokens": tokens}
