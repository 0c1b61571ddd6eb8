"""A tiny model, and what msmodelslim and our export make of it: once per type and session."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch import nn

from tests.ascend.exchanged import KINDS, Kind
from tests.ascend.places import by_msmodelslim
from tests.checkpoints.exports import Pair, export_pair
from tests.tiny import tiny_model

Produced = Callable[[str], Path]
Exported = Callable[..., tuple[Path, nn.Module]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with one layer; its tokenizer by the name that older versions of transformers know."""
    folder = tiny_model("qwen3", tmp_path_factory.mktemp("ascend") / "model", num_hidden_layers=1)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


@pytest.fixture(scope="session")
def produced(model: Path) -> Produced:
    """The folder that msmodelslim writes for a type."""

    @cache
    def make(name: str) -> Path:
        return by_msmodelslim(model, model.parent / name, config(KINDS[name]))

    return make


@pytest.fixture(scope="session")
def exported(model: Path) -> Exported:
    """Our export of a type, and the model that it is of."""

    @cache
    def make(name: str, target: str = "ascend", pair: Pair | None = None) -> tuple[Path, nn.Module]:
        out = model.parent / f"ours-{name}-{target}"
        return out, export_pair(model, out, pair or KINDS[name].pair, target, activation_rule="ascend")

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
