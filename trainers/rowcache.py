"""One token at a time for many documents at once, each at its own place: keys and values lie in buffers made once.

transformers' own cache grows by copying all of itself at every token, and its rows have one length. Here a row's next
token goes to the row's own column, so a finished document makes room for a new one. Models whose attention is not plain
(other kinds of cache, windows shorter than a document) go in step instead, all rows at the same place; whether rows may
differ is tried out on the model itself, not concluded from its class.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qat.float32 import float32_names

_WRONG = 0.1  # relative difference of logits above which a model does not keep its rows apart; BF16 rounds by 0.01


class _Layer(DynamicLayer):
    """Keys and values of one layer, in buffers (rows, heads, columns, width)."""

    keys: Tensor
    values: Tensor

    def __init__(self, places: "Rows") -> None:
        super().__init__()
        self.places = places

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each row into its column; gives all columns in use."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = (
                new.new_zeros(*new.shape[:2], self.places.columns, new.shape[3]) for new in (key_states, value_states)
            )
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[self.places.index, :, self.places.place] = new[:, :, 0]
        used = self.places.used
        return self.keys[:, :, :used], self.values[:, :, :used]

    def get_seq_length(self) -> int:
        """Columns before the one being written."""
        return self.places.used - 1

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]


class Rows:
    """Rows of one model, fed by `step`.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        rows: how many.
        columns: the longest document.
        apart: whether rows may be at different places.
    """

    def __init__(self, model: Any, rows: int, columns: int, apart: bool = True) -> None:
        self.model, self.columns, self.apart = model, columns, apart
        self.device = next(model.parameters()).device
        self.index = torch.arange(rows, device=self.device)
        self.used = 0
        self.place = torch.zeros_like(self.index)
        self._cache: Any = None
        self._takes_places = "position_ids" in inspect.signature(model.forward).parameters
        if apart:
            self._cache = DynamicCache(config=model.config)
            self._cache.layers = [_Layer(self) for _ in self._cache.layers]

    @torch.no_grad()
    def step(self, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """The logits (rows, vocabulary) after one more token of each row.

        Args:
            ids: the tokens.
            places: of each in its document; 0 begins a new one in this row (in step: in all rows).
        """
        step = torch.tensor(ids, device=self.device)[:, None]
        if not self.apart:
            output = self.model(input_ids=step, past_key_values=self._cache if places[0] else None, use_cache=True)
            self._cache = output.past_key_values
            return _last(output)
        self.place, self.used = torch.tensor(places, device=self.device), max(places) + 1
        seen = (torch.arange(self.used, device=self.device) <= self.place[:, None]).long()
        where = {"position_ids": self.place[:, None]} if self._takes_places else {}
        output = self.model(input_ids=step, attention_mask=seen, past_key_values=self._cache, use_cache=True, **where)
        return _last(output)

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on; not in step."""
        assert self.apart
        chosen = torch.tensor(rows, device=self.device)
        self.index = torch.arange(len(rows), device=self.device)
        for layer in self._cache.layers:
            layer.keep(chosen)


def _last(output: Any) -> Tensor:
    logits: Tensor = output.logits[:, -1].float()
    return logits


def apart(model: Any, columns: int) -> bool:
    """Whether rows of this model may be at different places: tried on two rows, of which one begins anew."""
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, TypeError, ValueError):  # a config that describes no cache of this kind
        return False
    windows = [getattr(layer, "sliding_window", None) or columns for layer in layers]
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return False
    return min(windows) >= columns and _kept_apart(model)


def _kept_apart(model: Any) -> bool:
    vocabulary = int(model.config.get_text_config().vocab_size)
    draw = torch.randint(vocabulary, (3, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Rows(model, 2, 6)
    second = [(token, place) for place, token in enumerate(draw[1][:2])]
    second += [(token, place) for place, token in enumerate(draw[2][:4])]
    for place, (token, (other, at)) in enumerate(zip(draw[0], second, strict=True)):
        logits = rows.step([token, other], [place, at])
    with torch.no_grad():
        for found, ids in zip(logits, (draw[0], draw[2][:4]), strict=True):
            truth = model(input_ids=torch.tensor([ids], device=rows.device), use_cache=False).logits[0, -1].float()
            if not (found - truth).norm() <= _WRONG * truth.norm():
                return False
    return True


@contextlib.contextmanager
def in_bf16(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The model's float32 parameters as BF16 inside, except those it keeps in float32; the originals return."""
    kept = float32_names(model) if wanted else frozenset()
    parameters = [p for name, p in model.named_parameters(remove_duplicate=False) if wanted and name not in kept]
    originals = [(p, p.data) for p in {id(p): p for p in parameters}.values() if p.dtype == torch.float32]
    try:
        for parameter, data in originals:
            parameter.data = data.to(torch.bfloat16)
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data


def fast_bf16(device: torch.device) -> bool:
    """Whether BF16 is faster than float32 there: on GPUs, and on CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every release
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def rows_that_fit(model: Any, columns: int, most: int, bytes_free: int) -> int:
    """At most `most` rows, and no more than take a quarter of the free memory, by what a full-size model caches."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    one = 4 * config.num_hidden_layers * heads * width * columns  # keys and values, two bytes each
    return max(1, min(most, bytes_free // 4 // one))
