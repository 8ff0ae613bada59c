"""Records what the published pipeline's tools make, for the tests and for `builder.export_template`.

Run it in an environment of its own, with torch and with what the pipeline had:

    pip install transformers==4.57.6 nvidia-modelopt==0.43.0 'huggingface_hub<1'
    python tests/published/record.py

It writes builder/data/transformers-4.57-configs.json (the defaults of the config classes), configs.json here (configs
as that transformers saves them of a template), published80.json and releases.json here (digests of whole artifacts,
made by the pipeline's steps from `base80`, a miniature of 80 layers, and from the bases of `bases.py`).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from bases import make_base
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

HERE = Path(__file__).parent
DEFAULTS = HERE.parents[1] / "builder" / "data" / "transformers-4.57-configs.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DROPPED = (
    *("_name_or_path", "name_or_path", "_commit_hash", "_auto_class", "attn_implementation"),
    *("_attn_implementation_internal", "base_model_tp_plan", "base_model_pp_plan", "torch_dtype", "output_attentions"),
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0.dev0",
    "use_cache": True,
    "vocab_size": 160,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "pad_token_id": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "unknown_to_the_class": {"b": 1, "a": "é"},
    "use_cache": True,
    "vocab_size": 96,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 96,
}
CONFIGS: tuple[dict[str, Any], ...] = (
    LLAMA,
    LLAMA | {"pad_token_id": 128004, "num_key_value_heads": None, "bos_token_id": None, "_name_or_path": "x"},
    LLAMA
    | {"rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 32, "return_dict": True, "temperature": 1.0},
    LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "tokenizer_class": "T"},
    {key: value for key, value in LLAMA.items() if not key.endswith("token_id")},
    MISTRAL,
    {key: value for key, value in MISTRAL.items() if key not in ("head_dim", "sliding_window", "num_key_value_heads")},
    QWEN2,
    QWEN2 | {"use_sliding_window": True, "pad_token_id": 3, "layer_types": None},
    QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, "rope_scaling": None},
)
RELEASES: tuple[dict[str, Any], ...] = (
    {"config": LLAMA, "seed": 1, "max_bytes": 90_000, "shards": [2, 3]},
    {"config": MISTRAL | {"pad_token_id": 2}, "seed": 2, "max_bytes": 1_000_000, "shards": [1, 1, 1]},
    {"config": LLAMA | {"attention_bias": True, "pad_token_id": 0}, "seed": 3, "max_bytes": 20_000, "shards": [5]},
)


def record_defaults() -> dict[str, Any]:
    common = PretrainedConfig().to_dict()
    classes = {}
    for family in FAMILIES:
        config = AutoConfig.for_model(family)
        own = {key: value for key, value in config.to_dict().items() if key not in common or value != common[key]}
        given = inspect.signature(type(config).__init__).parameters
        computed = {key: None for key in own if key in given and given[key].default is None}
        classes[family] = own | computed
        classes[family].pop("model_type")
    settings = GenerationConfig().to_dict() | PretrainedConfig._get_global_generation_defaults()
    kept = {"use_cache", "transformers_version", "_from_model_config", "bos_token_id", "pad_token_id", "eos_token_id"}
    for name in (*DROPPED, "transformers_version"):
        common.pop(name, None)
    return {
        "classes": classes,
        "common": common,
        "dropped": sorted(DROPPED),
        "generation": {key: value for key, value in settings.items() if key not in kept},
    }


def shrink(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.vocab_size, config.use_cache = 1, 2, False
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


def save_template(base_config: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(base_config))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shrink(folder), torch_dtype=torch.bfloat16)
        model.to_empty(device="cpu").save_pretrained(folder)
        files = [json.loads((folder / file).read_text()) for file in ("config.json", "generation_config.json")]
    return {"base": base_config, "template": list(files[0].items()), "generation": files[1]}


def export_layers(base: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of the merged artifact but injected ones, and the first layer's config files."""
    import modelopt.torch.export as exporting
    import modelopt.torch.quantization as quantizing
    from modelopt.torch.quantization.qtensor import nvfp4_tensor

    nvfp4_tensor.fp4_compatible = lambda: False  # it asks for a GPU's capability, and dies without one
    weights = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}
    full = AutoConfig.from_pretrained(base)
    model = AutoModelForCausalLM.from_config(full, torch_dtype=torch.bfloat16)
    model.load_state_dict(weights)
    holder = torch.nn.Module()
    holder.layers = torch.nn.ModuleList(model.model.layers)
    holder.lm_head = model.lm_head
    quantizing.quantize(holder, quantizing.NVFP4_DEFAULT_CFG, forward_loop=None)
    merged, texts = {}, {}
    for index, layer in enumerate(holder.layers):
        config = shrink(base)
        stand_in = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in (stand_in.model.embed_tokens, stand_in.model.norm, stand_in.lm_head):
                parameter.weight.zero_()
        layer.self_attn.layer_idx = 0
        stand_in.model.layers[0] = layer
        with tempfile.TemporaryDirectory() as name:
            exporting.export_hf_checkpoint(stand_in, dtype=torch.bfloat16, export_dir=name)
            for tensor_name, tensor in load_file(Path(name) / "model.safetensors").items():
                if tensor_name.startswith("model.layers.0."):
                    merged[tensor_name.replace("layers.0.", f"layers.{index}.", 1)] = tensor
            if not texts:
                texts = {path.name: path.read_text() for path in Path(name).glob("*.json")}
    for edge in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        merged[edge] = weights[edge]
    return merged, texts


def publish(base: Path, target: Path, max_bytes: int) -> None:
    """The pipeline's merge: inject, pack, patch, copy."""
    merged, texts = export_layers(base)
    for name in [name for name in merged if name.endswith(".weight_scale_2")]:
        merged.setdefault(name.replace(".weight_scale_2", ".input_scale"), torch.tensor(1.0))
    target.mkdir()
    total = sum(tensor.nbytes for tensor in merged.values())
    if total <= max_bytes * 1.05:
        save_file(merged, target / "model.safetensors")
    else:
        count = -(-total // max_bytes)
        files: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
        sizes, weight_map = [0] * count, {}
        for name in sorted(merged):
            least = sizes.index(min(sizes))
            files[least][name] = merged[name]
            sizes[least] += merged[name].nbytes
            weight_map[name] = f"model-{least + 1:05d}-of-{count:05d}.safetensors"
        for index, tensors in enumerate(files):
            save_file(tensors, target / f"model-{index + 1:05d}-of-{count:05d}.safetensors")
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
    config, source = json.loads(texts["config.json"]), json.loads((base / "config.json").read_text())
    config["num_hidden_layers"], config["vocab_size"] = source["num_hidden_layers"], source["vocab_size"]
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "architectures"):
        if key in source:
            config[key] = source[key]
    quantization = config["quantization_config"]
    quantization["ignore"] = [*quantization.get("ignore", []), "lm_head"]
    quantization["config_groups"]["group_0"]["input_activations"]["dynamic"] = True
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("generation_config.json", "hf_quant_config.json"):
        (target / name).write_text(texts[name])
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copy(base / name, target / name)


def digest_release(release: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        make_base(Path(name) / "base", release["config"], release["seed"])
        return release | {"files": digest_published(Path(name) / "base", release["max_bytes"])}


def digest_published(base: Path, max_bytes: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "published"
        publish(base, target, max_bytes)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(target.iterdir())}


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main() -> None:
    assert transformers.__version__ == "4.57.6", transformers.__version__
    DEFAULTS.write_text(json.dumps(record_defaults(), indent=2, sort_keys=True) + "\n", "utf-8")
    write(HERE / "configs.json", [save_template(copy.deepcopy(config)) for config in CONFIGS])
    write(HERE / "published80.json", digest_published(HERE / "base80", 400_000))
    write(HERE / "releases.json", [digest_release(release) for release in RELEASES])


if __name__ == "__main__":
    main()
