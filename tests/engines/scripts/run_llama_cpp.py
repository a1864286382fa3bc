"""llama.cpp as xllamacpp packs it: run.py describes the arguments and the result."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import xllamacpp
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[3]
# Documents, and what tokenizers are known to split in several ways.
TEXTS = [
    *((ROOT / "docs" / name).read_text() for name in ("training.md", "cluster.md")),
    "\n \n\n \t\t \t\n  \n   \n 3 33 333 3333 33333 3.3 3..3 ------======= \r\n\r\n x",
    "I've 'told he's there, 'RE you sure? 'D We'Ve a'lL \u2019s '''''' ......!!!!!!??????",
    "e\u0301 caf\u00e9 \u00a0x\u3000y \u5b83\u662f\u4e2d \u0627\u0644 \uff11\uff12 \u00b2",
    "\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f \x01\x7f\u2028 x<|endoftext|>y",
]


def run(folder, work, case):
    sources = next(Path(sys.prefix).glob("sources/*/thirdparty/llama.cpp"))
    model = work / "model.gguf"
    convert = ROOT / "examples/llama_cpp/convert.py"
    command = [sys.executable, convert, sources, folder, model, "--outtype", "f32"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    server = _serve(model)

    def ask(path, **content):
        data = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, data, headers)
        return json.load(urllib.request.urlopen(request))

    def ids_of(text):
        return ask("/tokenize", content=text, parse_special=True)["tokens"]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ids_of(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text[:40]
    length = len(case["tokens"])
    made = ask("/completion", prompt=case["ids"], n_predict=length, top_k=1, return_tokens=True)
    sequence = case["ids"] + case["tokens"]
    logprobs = {}
    # It leaves out those of tokens that end within a character.
    for end in range(len(case["ids"]), len(sequence)):
        one = {"n_predict": 1, "temperature": -1, "n_probs": len(tokenizer)}
        answer = ask("/completion", prompt=sequence[:end], **one)
        for position in answer.get("completion_probabilities", []):
            found = {token["id"]: token["logprob"] for token in position["top_logprobs"]}
            logprobs[end - 1] = [found[token] for token in range(len(tokenizer))]
    return {"ids": ids_of(case["text"]), "tokens": made["tokens"], "logprobs": logprobs}


def _serve(model):
    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.n_ctx, settings.n_parallel, settings.verbosity = 128, 1, 0
    # By default keys, values and their products are in half precision.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    without = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.flash_attn_type = without
    return xllamacpp.Server(settings)
