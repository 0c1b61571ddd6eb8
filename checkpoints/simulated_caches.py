"""C8 caches of Ascend checkpoints as vllm-ascend runs them, on this machine: keys and values through the simulated
operators that write and read them (`qat.serving.npu_attention`), in a model for text and scores, and beside fake
quantization for `qat verify --engine`.

The product of attention itself is transformers' in a model, and the simulated operator's in the check.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.adapters.attention import QatAttention
from qat.checkpoints.caches import StoredQuantizer, stored_caches
from qat.checkpoints.layouts import ExportedFolder
from qat.checkpoints.layouts.reader import NPU_RULE
from qat.serving import npu_attention
from qat.training.activations import fake_quantize_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PAGE, _PAGES, _TOKENS = 8, (2, 0, 1), 20  # the last page is not full, and they do not lie in order


class SimulatedSide(StoredQuantizer):
    """Writes keys or values (..., heads x width) and reads them back."""

    def quantize(self, x: Tensor) -> Tensor:
        """What attention gets of x."""
        scale = self.get_buffer("stored")
        return npu_attention.read(npu_attention.rounded(x, scale), scale).to(x.dtype)


def simulate_caches(model: "PreTrainedModel") -> None:
    """Put the operators in place of the fake quantization of caches that have a scale for each channel."""
    for module in model.modules():
        if isinstance(module, QatAttention) and module.key_quantizer.format.is_columnwise:
            for name in ("key_quantizer", "value_quantizer"):
                own = module.get_submodule(name)
                assert isinstance(own, StoredQuantizer)
                module.add_module(name, SimulatedSide(own.format, own.rule, own.static()))
            module.first_unrounded = True


def simulated_and_trained(exported: ExportedFolder, path: str) -> tuple[Tensor, Tensor]:
    """What the last token of a short text attends to in the attention layer `path`: by simulated operators, from pages,
    and by fake quantization, both (query heads, width). Some keys and values lie beyond the range."""
    (fmt, key_scale), (_, value_scale) = stored_caches(exported)[path].values()
    assert key_scale is not None and value_scale is not None
    config = exported.config.get("text_config") or exported.config
    queries = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // queries)
    heads = len(key_scale) // width
    generator = torch.Generator().manual_seed(0)
    scales = [scale.view(heads, width) for scale in (key_scale, value_scale)]
    given = [(torch.randn(_TOKENS, heads, width, generator=generator) * 48 * scale).bfloat16() for scale in scales]
    query = (torch.randn(1, queries, width, generator=generator) / given[0].float().std()).bfloat16()
    table = torch.tensor([_PAGES])
    slots = torch.tensor([_PAGES[at // _PAGE] * _PAGE + at % _PAGE for at in range(_TOKENS)])
    pages = []
    for x, scale in zip(given, scales, strict=True):
        pages.append(npu_attention.empty_pages(len(_PAGES), _PAGE, heads, width))
        npu_attention.scatter_pa_kv_cache(npu_attention.rounded(x, scale), pages[-1], slots)
    scaling = width**-0.5
    found = npu_attention.fused_infer_attention_score(
        query, (pages[0], pages[1]), (scales[0], scales[1]), table, [_TOKENS], scaling
    )
    key, value = (
        fake_quantize_input(x.float().flatten(1), fmt, NPU_RULE, "ste", scale.flatten()).view_as(x)
        for x, scale in zip(given, scales, strict=True)
    )
    asked, key, value = (
        side.transpose(0, 1)[None] for side in (query.float(), key, value)
    )  # (1, heads, tokens, width)
    expected = torch.nn.functional.scaled_dot_product_attention(asked, key, value, scale=scaling, enable_gqa=True)
    return found[0].float(), expected[0, :, 0]
