"""A tiny model, and what msmodelslim and our export make of it: once per type and session."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch import nn

from qat.checkpoints.layouts.ascend.types import BY_NAME
from tests.ascend.exchanged import KINDS, Kind
from tests.ascend.places import by_msmodelslim
from tests.checkpoints.exports import Pair, export_pair
from tests.tiny import tiny_model

Model = Callable[[str], Path]
Produced = Callable[[str], Path]
Exported = Callable[..., tuple[Path, nn.Module]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model that a type is made of: Qwen3 with one layer, whose attention adds biases where the type has them; its
    tokenizer by the name that older versions of transformers know."""
    root = tmp_path_factory.mktemp("ascend")

    @cache
    def of(bias: bool) -> Path:
        folder = tiny_model("qwen3", root / f"model-{bias}", num_hidden_layers=1, attention_bias=bias)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return lambda name: of(not BY_NAME[name].unbiased)


@pytest.fixture(scope="session")
def produced(model: Model) -> Produced:
    """The folder that msmodelslim writes for a type."""

    @cache
    def make(name: str) -> Path:
        return by_msmodelslim(model(name), model(name).parent / name, config(KINDS[name]))

    return make


@pytest.fixture(scope="session")
def exported(model: Model) -> Exported:
    """Our export of a type, and the model that it is of."""

    @cache
    def make(
        name: str, target: str = "ascend", pair: Pair | None = None, rule: str = "ascend"
    ) -> tuple[Path, nn.Module]:
        out = model(name).parent / f"ours-{name}-{target}"
        return out, export_pair(model(name), out, pair or KINDS[name].pair, target, activation_rule=rule)

    return make


def config(kind: Kind) -> dict[str, object]:
    """msmodelslim's YAML for every linear layer of one kind."""
    act = {"scope": kind.act[0], "dtype": kind.act[1], "symmetric": kind.symmetric}
    act["method"] = "none" if kind.act[1] == "float" else "minmax"
    weight = {"scope": kind.weight[0], "dtype": kind.weight[1], "symmetric": True, "method": "minmax"}
    process = {
        "type": "linear_quant",
        "qconfig": {"act": act, "weight": weight},
        "include": ["*"],
        "exclude": ["lm_head"],
    }
    label = {"w_bit": 8, "a_bit": 8, "is_sparse": False, "kv_cache": False}
    metadata = {"config_id": "tiny", "score": 90, "verified_model_types": ["Qwen3-8B"], "label": label}
    spec = {
        "runner": "auto",
        "process": [process],
        "save": [{"type": "ascendv1_saver", "part_file_size": 0}],
        "dataset": "mix_calib.jsonl",
    }
    return {"apiversion": "modelslim_v1", "metadata": metadata, "spec": spec}
