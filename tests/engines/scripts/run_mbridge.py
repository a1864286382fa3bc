"""mbridge, from an exported folder into Megatron's weights and out again: run.py has the arguments.

Its models need Transformer Engine. Here the weights go into modules of the names and shapes that
those would have, which are those of the checkpoint that the folder was exported from.
"""

import tempfile
from itertools import product
from pathlib import Path

import torch
from mbridge import AutoBridge
from megatron.core import parallel_state
from safetensors.torch import load_file

from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_index import find_checkpoint


def run(folder, work, case):
    store = torch.distributed.FileStore(tempfile.mktemp(), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    bridge = AutoBridge.from_pretrained(str(folder), dtype=torch.float32)
    expected = _weights(TorchDistCheckpoint(find_checkpoint(Path(f"{folder}-megatron"))))
    model = _modules(expected)
    with torch.no_grad():
        bridge.load_weights([model], str(folder))
    _same_bits(model.state_dict(), expected)
    _same_bits(dict(bridge.export_weights([model])), load_file(folder / "model.safetensors"))
    return {"weights": len(expected)}


def _weights(checkpoint):
    """Of the checkpoint, by the names that Transformer Engine's modules have for them."""
    shapes = checkpoint.shapes()
    has_experts = any(".experts." in key for key in shapes)
    # Norms have two names there, for modules that hold them and for those that do not.
    other = "linear_fc1.layer_norm_weight" if has_experts else "pre_mlp_layernorm"
    found = {}
    for key, shape in shapes.items():
        if "input_layernorm" in key or other in key:
            continue
        if not key.startswith("decoder.layers."):
            found[key] = checkpoint.read(key)
            continue
        is_stack = ".experts." in key
        for layer, expert in product(range(shape[0]), range(shape[1]) if is_stack else [None]):
            name = key.replace("layers.", f"layers.{layer}.", 1)
            index = (layer,)
            if is_stack:
                name = name.replace("experts.experts.", "experts.") + str(expert)
                index = (layer, expert)
            found[name] = checkpoint.read(key, index)
    return found


def _modules(weights):
    """Modules that hold what is to be loaded, under these names."""
    root = torch.nn.Module()
    for name, weight in weights.items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(last, torch.nn.Parameter(torch.zeros_like(weight)))
    layers = root.decoder.layers._modules
    for index, layer in layers.items():
        layer.layer_number = int(index) + 1
    root.decoder.layers = torch.nn.ModuleList(layers.values())
    return root


def _same_bits(found, expected):
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name].view(torch.int32), weight.view(torch.int32)), name
