"""SmolLM2 in GGUF: into a `LlamaForCausalLM` and its tokenizer.

GGUF keeps the rows of each head of q and k as llama.cpp rotates them: pairs of neighbours (2 i, 2 i + 1) turn together. The model of
transformers turns (i, i + d / 2), so the rows go back: of a head ``(d / 2, 2)`` becomes ``(2, d / 2)``. Quantised weights (Q4_1: 4 bits
with a scale and a least value for 32; Q8_0: 8 bits with a scale) are decoded, then rounded to bfloat16, the type that the model
was published in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from accelplug import files
from accelplug.errors import AccelplugError
from accelplug.weights.tensors import Arrays, write_json, write_tensors

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3
"""The type of tokens that are special, in GGUF."""


def write_smollm2(source: Path, folder: Path) -> None:
    """Convert a GGUF file of the architecture ``llama`` with a byte-level tokenizer.

    Raises
    ------
    AccelplugError
        If it cannot be read, or is of another architecture or tokenizer.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:
        raise AccelplugError(f"{source.name} cannot be read as GGUF: {error}. Fetch it again.") from error
    facts: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    kind = facts.get("general.architecture"), facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind != ("llama", "gpt2", "smollm"):
        raise AccelplugError(f"{source.name}: expected a llama with the tokenizer gpt2 of smollm, got {kind}. Report it.")
    config = _llama_config(facts)
    arrays: Arrays = {}
    for tensor in reader.tensors:
        rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        part = tensor.name.split(".")[-2]
        arrays[_llama_name(tensor.name)] = _unrotated(rows, heads[part]) if part in heads else rows
    write_tensors(folder / "model.safetensors", arrays, "bfloat16")
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)
    _write_tokenizer(facts, folder)


def _llama_name(name: str) -> str:
    """Our name of a tensor: ``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``."""
    *head, part, end = name.split(".")
    known = LAYER if head else TOP
    if part not in known:
        raise AccelplugError(
            f"The weight file holds {name}, which the conversion does not know. Is it another release? Report it."
        )
    return ".".join(["model.layers", head[1], known[part], end] if head else [known[part], end])


def _unrotated(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, (heads * d, width), in the order of transformers; see the module."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _llama_config(facts: dict[str, Any]) -> dict[str, Any]:
    heads = facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.embedding_length"] // heads,
        "max_position_embeddings": facts["llama.context_length"],
        "rope_theta": facts["llama.rope.freq_base"],
        "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 9),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE over words and single digits, as SmolLM2 was trained with."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    files.write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": facts["tokenizer.chat_template"],
        **{f"{ours}_token": tokens[facts[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in named.items()},
    }
    write_json(folder / "tokenizer_config.json", settings)
