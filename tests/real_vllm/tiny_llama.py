"""A Llama that nobody trained: config, tokenizer and weights, the same bytes each time, without any library.

`python tiny_llama.py FOLDER`. It talks nonsense at the speed of a real model of its size.
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

HIDDEN = 256
LAYERS = 4
HEADS = 4
INTERMEDIATE = 512
POSITIONS = 2048

SPECIAL = ("<s>", "</s>", "<unk>")


def write(folder: Path) -> Path:
    """Write the model, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _vocabulary()
    _json(folder / "config.json", _config(len(vocabulary)))
    _json(folder / "tokenizer.json", _tokenizer(vocabulary))
    _json(folder / "tokenizer_config.json", _tokenizer_config())
    _weights(folder / "model.safetensors", dict(_shapes(len(vocabulary))))
    return folder


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def _config(words: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": words,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _vocabulary() -> dict[str, int]:
    """Return the special tokens, then one token a byte, as a byte-level tokenizer writes bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*SPECIAL, *map(chr, printable), *(chr(256 + i) for i, _ in enumerate(others))]
    return {letter: i for i, letter in enumerate(letters)}


def _tokenizer(vocabulary: dict[str, int]) -> dict[str, object]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary[word], "content": word, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for word in SPECIAL
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None},
    }  # fmt: skip


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "unk_token": SPECIAL[2],
        "model_max_length": POSITIONS,
        "clean_up_tokenization_spaces": False,
    }


def _shapes(words: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (words, HIDDEN)
    for layer in range(LAYERS):
        part = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{part}.self_attn.{name}.weight", (HIDDEN, HIDDEN)
        yield f"{part}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{part}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{part}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"{part}.input_layernorm.weight", (HIDDEN,)
        yield f"{part}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (words, HIDDEN)


def _weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write safetensors: the header's length, the header, and the tensors in its order."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * _count(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, offset + size)}
        offset += size
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    dice = random.Random(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(told)) + told)
        for shape in shapes.values():
            file.write(_ones(_count(shape)) if len(shape) == 1 else _noise(_count(shape), dice))


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def _ones(count: int) -> bytes:
    return b"\x80\x3f" * count


def _noise(count: int, dice: random.Random) -> bytes:
    """Return bfloat16 numbers from ±1/32 to ±1/16: random signs and mantissas under one exponent."""
    low = bytes(0x80 | byte & 0x7F for byte in range(256))  # the exponent's last bit, and the mantissa
    high = bytes(byte & 0x80 | 0x3D for byte in range(256))
    data = bytearray(2 * count)
    data[0::2] = dice.randbytes(count).translate(low)
    data[1::2] = dice.randbytes(count).translate(high)
    return bytes(data)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
