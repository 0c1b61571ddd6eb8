"""Tiny random Hugging Face models with a real tokenizer, on disk, for every test that needs a checkpoint.

Sizes divide by every block size of the catalogue (hidden 128, intermediate 256, head 32). Weights are drawn
wider than a fresh initialisation and norms are not all ones, so that a lost norm, scale or permutation
changes the logits.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

KINDS = ("llama", "qwen3", "mistral", "gemma", "qwen3_moe")
VOCABULARY = 384

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_SPECIFIC: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "gemma": (
        "gemma3_text",
        {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 64},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
    ),
    # For tests of one thing each, beside KINDS: no SDPA; no positions and no SDPA; a nested config and a vision tower.
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, "tie_word_embeddings": True}),
    "gemma3": ("gemma3", {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 64}),
}
_TOWER = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": 300,
    "eoi_token_index": 301,
    "image_token_index": 302,
}
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = (
    "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox.",
    "A language model predicts the next token; training lowers the loss of the prediction.",
    'Numbers such as 0, 1, 12, 345 and 6.78 appear in the text, in (parentheses) or "quotes".',
)


def tiny_model(kind: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Save a random BF16 model of `kind` (see KINDS and what stands beside them, or any model_type of transformers)
    with tokenizer and generation config; returns `folder`.

    `overrides` go to the model's config, for example `num_hidden_layers=1` or `tie_word_embeddings=True`.
    """
    model_type, specific = _SPECIFIC.get(kind, (kind, {}))
    settings = {**_COMMON, **specific, **overrides}
    if kind == "gemma":  # both kinds of attention, whatever the number of layers
        types = ("sliding_attention", "full_attention")
        settings.setdefault("layer_types", [types[i % 2] for i in range(settings["num_hidden_layers"])])
    if kind == "gemma3":
        settings = {"text_config": settings, "tie_word_embeddings": settings["tie_word_embeddings"], **_TOWER}
    config = CONFIG_MAPPING[model_type](**settings)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter += 0.1 * torch.randn_like(parameter)
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of up to VOCABULARY tokens with a ChatML template; all text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=_CHATML,
        model_max_length=_COMMON["max_position_embeddings"],
    )
