"""vllm-ascend's own code on the C8 caches of checkpoints: run by test_caches.py, in a process of its own, as

    consume_caches.py SOURCE DEVICE VLLM RULES JOBS

with arguments as of `consume.py`. A job is [folder, inputs, outputs]: queries (tokens, heads, width), keys and values
of the first attention layer, the number of tokens of a prompt ("prompt"), and where what comes out goes. The engine's
config names the parameters and chooses their method, whose loaders take what is stored; then its attention backend
reads the prompt in one piece ("first"), the rest of the tokens one by one ("decoded"), and all of it again in two
pieces ("pieces"). Its caches go to "key_codes" and "value_codes", (tokens, heads, width).
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.ascend import consume, metas
from tests.ascend.attention_operators import OPERATORS
from tests.ascend.vllm_parts import CURRENT, Config

PATH = "model.layers.0.self_attn"
PAGE, PAGES = 128, 3


class AttentionLayerBase(nn.Module):
    """A layer of which the engine sees the type."""

    layer_name = PATH


class WeightsMapper:
    """vLLM's, as far as suffixes go."""

    def __init__(self, orig_to_new_suffix: dict[str, str] | None = None, **named: Any) -> None:
        self.suffixes = orig_to_new_suffix or {}

    def __or__(self, other: "WeightsMapper") -> "WeightsMapper":
        return WeightsMapper({**self.suffixes, **other.suffixes})

    def renamed(self, name: str) -> str | None:
        """Where a stored tensor goes, None where no suffix is its own."""
        return next((name.removesuffix(a) + b for a, b in self.suffixes.items() if name.endswith(a)), None)


def put_in_place(rules: Path, seen: set[str]) -> None:
    """What caches need beside `consume.engine`."""
    npu: Any = importlib.import_module("torch_npu")
    vars(npu).update(metas.checked(OPERATORS, metas.load(rules), seen))
    parts = {
        "vllm.model_executor.layers.attention_layer_base": {"AttentionLayerBase": AttentionLayerBase},
        "vllm.model_executor.models.utils": {"WeightsMapper": WeightsMapper},
    }
    for name, part in parts.items():
        vars(importlib.import_module(name)).update(part)
    CURRENT.cache_config = SimpleNamespace(cache_dtype="int8", block_size=PAGE)
    Config.get_cache_scale_mapper = staticmethod(WeightsMapper)  # type: ignore[attr-defined]  # 0.30 asks its base


def backend(heads: int, of_keys: int, width: int) -> tuple[Any, Any]:
    """The engine's module of attention, and an implementation as its constructor leaves it."""
    attention = consume.module("attention.attention_v1")
    attention._EXTRA_CTX = SimpleNamespace(capturing=False)
    attention.notify_kv_cache_written = lambda: None
    impl = object.__new__(attention.AscendAttentionBackendImpl)
    vllm_config = SimpleNamespace(kv_transfer_config=None, cache_config=SimpleNamespace(block_size=PAGE))
    vars(impl).update(
        num_heads=heads, num_kv_heads=of_keys, head_size=width, hidden_size=heads * width, scale=width**-0.5,
        key_cache=None, value_cache=None, attn_type="decoder", kv_sharing_target_layer_name=None, sinks=None,
        is_kv_producer=False, vllm_config=vllm_config, enable_c8_quant=True, use_bnsd_kv_cache=False,
    )  # fmt: skip
    return attention, impl


def loaded(folder: Path, impl: Any) -> tuple[Any, list[str], str]:
    """An attention layer with the stored scales and offsets, the names that nothing took, and its method."""
    config = consume.config_of(folder)
    layer: Any = AttentionLayerBase()
    layer.impl = impl
    method = config.get_quant_method(layer, f"{PATH}.attn")
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it makes a model of that type
    try:
        method.create_weights(layer)
    finally:
        torch.set_default_dtype(usual)
    own = {f"{PATH}.attn.{name}": parameter for name, parameter in layer.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    renamed = getattr(config, "get_cache_scale", None) or config.get_cache_scale_mapper().renamed
    left, given = [], set()
    for name in (name for name in tensors if name.startswith(PATH) and "kv_cache" in name):
        place = renamed(name)
        if place in own:
            own[place].weight_loader(own[place], tensors[name].squeeze())
            given.add(place)
        else:
            left.append(name)
    left += sorted(own.keys() - given)
    method.process_weights_after_loading(layer)
    return layer, left, type(method.quant_method).__name__


def metadata(state: Any, first: int, last: int) -> SimpleNamespace:
    """Of one sequence, whose tokens from `first` on come now; its pages are not in order."""
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    slots = torch.tensor([int(table[0, at // PAGE]) * PAGE + at % PAGE for at in range(first, last)])
    return SimpleNamespace(
        attn_state=state, num_actual_tokens=last - first, slot_mapping=slots, model_runner_type="generate",
        seq_lens_list=[last], seq_lens=torch.tensor([last]), block_tables=table, actual_seq_lengths_q=[last - first],
        attn_mask=None, causal=True, num_decode_tokens=0, num_decodes=0, num_prefills=1,
    )  # fmt: skip


def job(folder: str, inputs: str, out: str) -> dict[str, Any]:
    given = load_file(inputs)
    query, key, value, prompt = given["query"], given["key"], given["value"], int(given["prompt"])
    tokens, heads, width = query.shape
    config_first = consume.config_of(Path(folder))  # its imports come before those of attention, as in a server
    assert config_first.enable_c8_quant
    attention, impl = backend(heads, key.shape[1], width)
    layer, left, scheme = loaded(Path(folder), impl)
    states = attention.AscendAttentionState
    pages = tuple(torch.zeros(PAGES, PAGE, key.shape[1], width, dtype=torch.int8) for _ in range(2))

    def forward(state: Any, first: int, last: int) -> Tensor:
        part = slice(first, last)
        made = torch.empty_like(query[part])
        return impl.forward(layer, query[part], key[part], value[part], pages, metadata(state, first, last), made)

    made = {"first": forward(states.PrefillNoCache, 0, prompt)}
    made["decoded"] = torch.cat([forward(states.DecodeOnly, at, at + 1) for at in range(prompt, tokens)])
    table = metadata(states.DecodeOnly, 0, tokens).slot_mapping
    for name, cache in zip(("key_codes", "value_codes"), pages, strict=True):
        blocks = cache.view(PAGES, key.shape[1], width // 32, PAGE, 32).permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
        made[name] = blocks[table].contiguous()
    halves = forward(states.PrefillNoCache, 0, prompt), forward(states.ChunkedPrefill, prompt, tokens)
    made["pieces"] = torch.cat(halves)
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, out)
    return {"scheme": scheme, "left": left, "impl": type(impl).__name__, "dtype": str(layer.kv_cache_torch_dtype)}


def main(source: str, device: str, vllm: str, rules: str, jobs: str) -> None:
    seen = consume.engine(source, device, vllm, rules)
    put_in_place(Path(rules), seen)
    consume.tell(jobs, seen, lambda one: job(*one))


if __name__ == "__main__":
    main(*sys.argv[1:])
