#!/usr/bin/env python3
"""Writes what Hugging Face transformers computes, for tests/model/golden_test to compare with.

    python3 tests/python/make_goldens.py tests/model/goldens

writes the files that are committed. Per case:
  config.json         as transformers writes it, by some cases in the form of transformers 4
  checkpoint.json     {shard: {tensor: {dtype, shape, mean, shift}}}: the recipe of the weights
  golden.safetensors  per prompt length n, all fp32:
    n.prompt               [n] token ids
    n.positions            [p] the positions sampled
    n.layer<i>.k, .v       [p, num_kv_heads, head_dim] at those positions, keys rotated
    n.layer<i>.k_sum, v_sum  [num_kv_heads, head_dim] signed sum over all positions
    n.signs                [n] the signs
    n.logits               [vocab_size] after the last position
and rope_cases.json beside them: rotations of these and of real models' configurations. With --checkpoints the models themselves are saved too, by
transformers, instead of recipes. Needs torch, transformers and safetensors.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import golden_cases

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def build_model(case):
    config = golden_cases.hf_config(case.model_type, case.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, shift = golden_cases.distribution(name, parameter.shape)
            values = golden_cases.tensor_values(name, tuple(parameter.shape), mean, shift)
            parameter.copy_(torch.from_numpy(values))
    return model


def old_form(config, kind_key):
    """Converts config.json to the form of transformers 4, with rope_theta and rope_scaling."""
    parameters = dict(config.pop("rope_parameters"))
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {kind_key: kind, **parameters}
    config["torch_dtype"] = config.pop("dtype")
    return config


def config_json(case, model):
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["dtype"] = case.dtype
    config.pop("transformers_version", None)
    return old_form(config, case.old_kind_key) if case.old_rope else config


def checkpoint_recipe(case, model):
    """Deals out the tensors to the shards in turn."""
    names = ["model.safetensors"]
    if case.shards > 1:
        names = [f"model-{i + 1:05}-of-{case.shards:05}.safetensors" for i in range(case.shards)]
    recipe = {name: {} for name in names}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        mean, shift = golden_cases.distribution(name, parameter.shape)
        recipe[names[i % case.shards]][name] = {
            "dtype": DTYPE_NAMES[case.dtype], "shape": list(parameter.shape),
            "mean": mean, "shift": shift}
    return recipe


def reference(case, model):
    golden = {}
    for length in golden_cases.LENGTHS:
        prompt = golden_cases.prompt_tokens(case, length, model.config.vocab_size)
        with torch.no_grad():
            out = model(input_ids=torch.from_numpy(prompt)[None], use_cache=True)
        positions = golden_cases.sampled_positions(length)
        signs = golden_cases.position_signs(length)
        golden[f"{length}.prompt"] = prompt
        golden[f"{length}.positions"] = np.array(positions)
        golden[f"{length}.signs"] = signs
        golden[f"{length}.logits"] = out.logits[0, -1].numpy()
        for i, layer in enumerate(out.past_key_values.layers):
            for kind, tensor in (("k", layer.keys), ("v", layer.values)):
                values = tensor[0].transpose(0, 1).numpy()  # [length, num_kv_heads, head_dim]
                golden[f"{length}.layer{i}.{kind}"] = values[positions]
                golden[f"{length}.layer{i}.{kind}_sum"] = np.tensordot(
                    signs, values.astype(np.float64), axes=1)
    return {name: np.ascontiguousarray(a, dtype=np.float32) for name, a in golden.items()}


def write_case(case, folder, save_checkpoint):
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(case)
    save_file(reference(case, model), folder / "golden.safetensors")
    if save_checkpoint:
        size = "1GB" if case.shards == 1 else "300KB"
        model.to(getattr(torch, case.dtype)).save_pretrained(folder, max_shard_size=size)
        return
    (folder / "config.json").write_text(json.dumps(config_json(case, model), indent=1) + "\n")
    (folder / "checkpoint.json").write_text(
        json.dumps(checkpoint_recipe(case, model), indent=0) + "\n")


def rope_case(name, model_type, overrides, length):
    config = golden_cases.hf_config(model_type, overrides)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        inv_freq, factor = 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    written = json.loads(config.to_json_string(use_diff=True))
    written.pop("transformers_version", None)
    return {"name": name, "config": written, "num_tokens": length,
            "inv_freq": [float(f) for f in inv_freq], "attention_factor": float(factor)}


def write_rope_cases(path):
    configs = [(n, m, c) for n, (m, c) in golden_cases.ROPE_ONLY.items()]
    configs += [(c.name, c.model_type, c.config) for c in golden_cases.CASES]
    cases = [rope_case(*config, length) for config in configs
             for length in golden_cases.ROPE_LENGTHS
             if length == 1000 or config[2]["rope_parameters"]["rope_type"] == "dynamic"]
    lines = ",\n".join(json.dumps(case) for case in cases)
    path.write_text(f"[\n{lines}\n]\n")


def write_all(folder, save_checkpoints):
    torch.set_num_threads(2)
    for case in golden_cases.CASES:
        write_case(case, folder / case.name, save_checkpoints)
        print(case.name, file=sys.stderr)
    write_rope_cases(folder / "rope_cases.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--checkpoints", action="store_true",
                        help="save the models with transformers instead of their recipes")
    options = parser.parse_args()
    write_all(options.folder, options.checkpoints)


if __name__ == "__main__":
    main()
