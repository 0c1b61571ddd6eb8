"""peft itself around a prepared model: its adapters are rounded with the weight, and what is exported or pushed is what
was trained."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qat
from qat.checkpoints.exported import load_exported
from qat.errors import ConfigError, UnsupportedError
from qat.sites import weights
from qat.training.low_rank import updated
from tests.tiny import tiny_model
from tests.trainers.plugging import check_export, made

peft = pytest.importorskip("peft")
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("wrapped") / "model")


def config(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": PROJECTIONS, **settings})


def model_of(source: Path, learn: str = "none") -> Any:
    rules = [
        {"match": "*_proj", "weight": "nvfp4", "input": "nvfp4"},
        {"match": "*", "skip": "not a projection"},
    ]
    return made(source, {"rules": rules, "init": [], "learn": learn})


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(seed))


def train(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_what_is_trained_is_exported(source: Path, tmp_path: Path, dora: bool, way: str) -> None:
    plain = model_of(source)
    before = {path: site.value() for path, site in weights(plain).items()}
    model = plain
    if way == "add_adapter":
        plain.add_adapter(config(use_dora=dora))
    else:
        model = peft.get_peft_model(plain, config(use_dora=dora))
    losses = train(model)
    assert losses[-1] < losses[0]
    names = [name for name, _ in model.named_parameters()]
    check_export(model, tmp_path / "out")
    assert [name for name, _ in model.named_parameters()] == names  # peft's layers are back
    assert train(model, 1)[0] < losses[-1]
    written = dict(load_exported(tmp_path / "out").named_parameters())
    changed = {path for path, value in before.items() if not torch.equal(written[f"{path}.weight"].data, value)}
    assert changed == {path for path in before if path.rpartition(".")[2] in PROJECTIONS}


def test_the_update_is_that_of_the_one_function(source: Path) -> None:
    plain = model_of(source)
    model = peft.get_peft_model(plain, config(use_rslora=True))
    train(model)
    layer = plain.model.layers[0].mlp.down_proj
    base, x = layer.base_layer, torch.randn(3, 256)
    total = updated(base.weight, layer.lora_A.default.weight, layer.lora_B.default.weight, 12 / 2)
    expected = nn.functional.linear(base.input_quantizer(x), base.weight_quantizer(total))
    assert torch.equal(layer.eval()(x), expected)
    with model.disable_adapter():
        assert torch.equal(layer(x), base(x)) and not torch.equal(layer(x), expected)
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.base_model.model.model.layers[0].mlp.down_proj.lora_B.default.weight.zero_()
    assert torch.equal(layer(x), expected)
    assert torch.equal(again.base_model.model.model.layers[0].mlp.down_proj(x), base(x))


def test_dropout_leaves_out_whole_columns(source: Path) -> None:
    plain = model_of(source)
    model = peft.get_peft_model(plain, config(lora_dropout=0.5))
    train(model)
    layer = plain.model.layers[1].mlp.down_proj.train()
    x = torch.randn(1, 256).expand(6, 256)
    out = layer(x)
    assert all(torch.equal(row, out[0]) for row in out) and not torch.equal(layer(x), out)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_merging_by_peft_and_by_the_export_agree(source: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(model_of(source), config())
    train(model)
    qat.export(model, tmp_path / "ours")
    merged = model.merge_and_unload()
    qat.export(merged, tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(_bytes(tensor), _bytes(theirs[name])) for name, tensor in ours.items())


def test_what_is_pushed_is_what_is_trained(source: Path, tmp_path: Path) -> None:
    """Whether the pusher was made before peft came, or after."""
    plain = model_of(source)
    early = qat.PackedWeights(plain, source=source)
    first = dict(early)
    model = peft.get_peft_model(plain, config())
    late = qat.PackedWeights(model, source=source)
    for _ in range(2):
        train(model, 1)
        qat.export(model, tmp_path / "out", overwrite=True)
        written = load_file(tmp_path / "out" / "model.safetensors")
        for pushed in (dict(early), dict(late)):
            assert pushed.keys() == written.keys()
            assert all(torch.equal(_bytes(tensor), _bytes(written[name])) for name, tensor in pushed.items())
    assert any(not torch.equal(_bytes(tensor), _bytes(written[name])) for name, tensor in first.items())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head \(Linear\)"),
        ({"target_modules": ["embed_tokens"]}, r"model.embed_tokens \(Embedding\)"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head \(ModulesToSaveWrapper\)"),
        ({"lora_bias": True}, "adapter 'default' is more than LoRA or DoRA"),
    ],
)
def test_what_cannot_be_rounded_with_a_weight_is_refused(source: Path, settings: Any, words: str) -> None:
    model = peft.get_peft_model(model_of(source), config(**settings))
    for use in (lambda: model(ids()), lambda: qat.export(model, "nowhere"), lambda: qat.PackedWeights(model)):
        with pytest.raises(UnsupportedError, match=words):
            use()


def test_other_tuners_and_prompts_are_refused(source: Path, tmp_path: Path) -> None:
    ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(UnsupportedError, match=r"k_proj \(Linear\)"):
        peft.get_peft_model(model_of(source), ia3)(ids())
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedError, match="learns prompts"):
        qat.export(peft.get_peft_model(model_of(source), prompts), tmp_path / "out")


def test_an_adapter_that_is_added_later_is_noticed(source: Path, tmp_path: Path) -> None:
    plain = model_of(source)
    model = peft.get_peft_model(plain, config())
    train(model)
    model.add_adapter("second", config(target_modules=["k_proj"]))
    model.set_adapter("second")
    train(model)
    check_export(model, tmp_path / "out")
    model.base_model.set_adapter(["default", "second"])
    train(model, 1)
    model.add_adapter("third", config())
    model.base_model.set_adapter(["default", "third"])
    with pytest.raises(UnsupportedError, match="active at once"):
        model(ids())


def test_frozen_scales_are_told(source: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(model_of(source, "dual_lsq"), config())
    with pytest.warns(UserWarning, match="peft froze the scales"):
        model(ids())
    for name, parameter in model.named_parameters():
        if name.endswith("log_scale"):
            parameter.requires_grad_(True)
    scales = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("log_scale")}
    train(model)
    assert any(not torch.equal(p, scales[name]) for name, p in model.named_parameters() if name in scales)
    check_export(model, tmp_path / "out")


def test_refits_go_on(source: Path, tmp_path: Path) -> None:
    rules = [{"match": "*_proj", "weight": "int4_g64"}, {"match": "*", "skip": "not a projection"}]
    plain = made(source, {"rules": rules, "init": [], "learn": "refit"}, refit_every=1)
    starts = {path: site.quantizer.start.clone() for path, site in weights(plain).items()}
    model = peft.get_peft_model(plain, config())
    train(model, 2)
    moved = {path for path, site in weights(plain).items() if not torch.equal(site.quantizer.start, starts[_own(path)])}
    assert {_own(path).rpartition(".")[2] for path in moved} == set(PROJECTIONS)
    check_export(model, tmp_path / "out")
    caged = made(source, {"rules": rules, "init": []}, cage={"strength": 1.0}, steps=3)
    with pytest.raises(ConfigError, match="cage moves weights, which peft leaves frozen"):
        train(peft.get_peft_model(caged, config()))


def _own(path: str) -> str:
    return path.removesuffix(".base_layer")
