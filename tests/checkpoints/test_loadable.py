"""What an engine on an NPU does not load is refused before training, by the command that would train."""

import json
from pathlib import Path
from typing import Any

import pytest

from qat.checkpoints.loadable import check_loadable
from qat.cli import main
from qat.errors import UnsupportedError
from qat.scheme import Scheme
from qat.surgery import apply
from qat.trainers.exportable import student_without_numbers
from qat.trainers.job import load_job
from tests.checkpoints.exports import pair_rules
from tests.qat.adapters.test_experts import KINDS
from tests.tiny import tiny_model
from tests.trainers import jobs

REST = {"match": "*", "skip": "the rest"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


HALF = {"activation_rule": "ascend_310p", "round_bf16": False}


def student(source: Path, *rules: dict[str, Any], folder: Path, **how: Any) -> Any:
    scheme = {"rules": [*rules, REST], "activation_rule": "ascend", **how}
    job = load_job(jobs.write(folder, source, scheme=scheme))
    options = {"learn": "none", "init": (), "fused": ()}
    return apply(student_without_numbers(job, source), Scheme.model_validate({**scheme, **options}), defer_init=True)


def test_what_loads_is_said(source: Path, tmp_path: Path) -> None:
    model = student(source, pair_rules("int8_channel", "int8_token"), folder=tmp_path)
    assert check_loadable(model, source, "vllm-ascend", "a2") == [
        "vllm-ascend on a2 loads this with --target compressed-tensors or ascend"
    ]
    assert check_loadable(model, source, "mindie", "a3")[0] == "mindie on a3 loads this with --target ascend"
    static = student(source, pair_rules("int8_channel", "int8_tensor"), folder=tmp_path)
    assert check_loadable(static, source, "vllm-ascend", "a3")[0] == "vllm-ascend on a3 loads this with --target ascend"


@pytest.mark.parametrize(
    ("rules", "engine", "device", "message"),
    [
        (
            [("nvfp4", "nvfp4", "*_proj")],
            "vllm-ascend",
            "950",
            "q_proj is nvfp4 with nvfp4 inputs, but vllm-",
        ),
        ([("mxfp4", "mxfp4", "*_proj")], "vllm-ascend", "a2", r"a2 loads .*W8A8_DYNAMIC \(ascend\)"),
        ([("int4_g64", None, "*_proj")], "vllm-ascend", "a2", "q_proj is int4_g64, but vllm-ascend on a2 loads"),
        (
            [("int4_channel", "int8_token", "*_proj")],
            "vllm-ascend",
            "a2",
            "vllm-ascend on a2 loads no export of this model: ascend: .*_proj: only experts can be W4A8_DYNAMIC",
        ),
        ([("int8_channel", "int8_token", "*_proj")], "vllm-ascend", "310p", "computes in FP16.*train for a2, a3, 950"),
        (
            [("int8_channel", "int8_token", "*.q_proj"), ("int8_channel", None, "*_proj")],
            "vllm-ascend",
            "a2",
            "fuse these layers.*q_proj is int8_channel/int8_token, .*k_proj is int8_channel/None",
        ),
    ],
)
def test_what_does_not_is_refused(
    rules: list[Any], engine: Any, device: Any, message: str, source: Path, tmp_path: Path
) -> None:
    model = student(source, *(pair_rules(*rule) for rule in rules), folder=tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        check_loadable(model, source, engine, device)


def test_layers_that_no_one_layout_holds_together(source: Path, tmp_path: Path) -> None:
    """Each loads from some layout; together they have none that the engine reads."""
    mlp, attention = pair_rules("fp8_b128", "fp8_g128", "*.mlp.*"), pair_rules("mxfp8", "mxfp8", "*.self_attn.*_proj")
    model = student(source, mlp, attention, folder=tmp_path)
    with pytest.raises(UnsupportedError, match=r"loads no export of this model: no layout holds all its layers"):
        check_loadable(model, source, "vllm-ascend", "950")


MX_EXPERTS = [("mxfp8", "mxfp8", "W8A8_MXFP8"), ("mxfp4", "mxfp4", "W4A4_MXFP4"), ("mxfp4", "mxfp8", "W4A8_MXFP")]


@pytest.mark.parametrize(("weight", "input", "name"), MX_EXPERTS)
def test_experts_of_mx_types(weight: str, input: str, name: str, tmp_path: Path) -> None:
    """vllm-ascend runs all three, where their columns are pairs of groups; SGLang's loader has the first only."""
    sizes = {**KINDS["qwen3_moe"], "num_hidden_layers": 1}
    rule = pair_rules(weight, input, "*.experts.*")
    for inner in (64, 96):
        source = tiny_model("qwen3_moe", tmp_path / f"model-{inner}", **{**sizes, "moe_intermediate_size": inner})
        model = student(source, rule, folder=tmp_path)
        if inner == 64:
            assert "--target" in check_loadable(model, source, "vllm-ascend", "950")[0]
            if name == "W8A8_MXFP8":
                assert check_loadable(model, source, "sglang-ascend", "950")
                continue
            with pytest.raises(UnsupportedError, match=r"gate_proj is mxfp4.* loads of experts W8A8_MXFP8 \(ascend\)$"):
                check_loadable(model, source, "sglang-ascend", "950")
            continue
        said = (
            "down_proj has 96 columns, an odd number of groups of 32, and vllm-ascend takes scales of experts in pairs"
        )
        with pytest.raises(UnsupportedError, match=said):
            check_loadable(model, source, "vllm-ascend", "950")


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_the_command_refuses_before_a_step(source: Path, tmp_path: Path, capsys: Any, option: list[str]) -> None:
    scheme = {"rules": [pair_rules("nvfp4", "nvfp4"), REST], "activation_rule": "ascend", "init": []}
    job = jobs.write(tmp_path, source, scheme=scheme, engine="vllm-ascend", device="a2", steps=2)
    assert main(["train", str(job), *option]) == 2
    assert "nvfp4" in capsys.readouterr().err and not (tmp_path / "runs" / "tiny" / "metrics.csv").exists()


@pytest.mark.parametrize("engine", [{"engine": "vllm-ascend", "device": "950"}, {}])
def test_inputs_that_no_operator_makes(engine: dict[str, str], source: Path, tmp_path: Path, capsys: Any) -> None:
    """The engine loads FP8 in blocks, but rounds inputs to MXFP8, or not at all: nothing to train by its rule."""
    scheme = {"rules": [pair_rules("fp8_b128", "fp8_g128"), REST], "activation_rule": "ascend", "init": []}
    assert main(["train", str(jobs.write(tmp_path, source, scheme=scheme, steps=2, **engine)), "--dry-run"]) == 2
    assert "ascend has no operator for fp8_g128 inputs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "vllm-ascend"}, "go together"),
        ({"device": "a2"}, "go together"),
        ({"engine": "vllm-ascend", "device": "a9"}, "'a2'"),
        ({"engine": "vllm-ascend", "device": "a2"}, "set scheme.activation_rule: ascend"),
    ],
)
def test_jobs_that_say_half_of_it(source: Path, tmp_path: Path, changes: Any, message: str, capsys: Any) -> None:
    assert main(["train", str(jobs.write(tmp_path, source, **changes))]) == 2
    assert message in capsys.readouterr().err


def test_the_whole_road(source: Path, tmp_path: Path, capsys: Any) -> None:
    """train, export, verify --engine, generate and eval, as a user types them."""
    scheme = {"rules": [pair_rules("int8_channel", "int8_tensor_asym"), REST], "activation_rule": "ascend", "init": []}
    job = jobs.write(tmp_path, source, scheme=scheme, engine="vllm-ascend", device="a2", steps=2)
    run, out = str(tmp_path / "runs" / "tiny"), str(tmp_path / "out")
    assert main(["train", str(job)]) == 0
    assert main(["export", run, out, "--target", "ascend"]) == 0
    assert main(["verify", out, "--engine", "vllm-ascend"]) == 0
    assert "vllm-ascend: 7 layers load on a2, a3" in capsys.readouterr().out
    assert main(["generate", out, "The fox", "--tokens", "3"]) == 0
    assert main(["eval", out, "--tokens", "256", "--teacher", str(source)]) == 0
    assert "export: NLL" in capsys.readouterr().out
    scores = {}
    for rule in ("ascend", "vllm"):
        assert main(["eval", out, "--tokens", "256", "--activation-rule", rule, "--json"]) == 0
        scores[rule] = json.loads(capsys.readouterr().out)["rows"][-1]["nll"]
    assert scores["ascend"] != scores["vllm"]
    assert main(["eval", str(source), "--tokens", "256", "--activation-rule", "vllm"]) == 2
    assert "goes with an export" in capsys.readouterr().err


def test_caches_that_an_engine_reads(source: Path, tmp_path: Path) -> None:
    def said(
        cached: str, engine: Any, device: Any, pair: tuple[str, str] = ("int8_channel", "int8_token")
    ) -> list[str]:
        cache = {"match": "*.self_attn", "key": cached, "value": cached}
        return check_loadable(student(source, cache, pair_rules(*pair), folder=tmp_path), source, engine, device)

    first, remark = said("int8_column", "vllm-ascend", "a2")
    assert first == "vllm-ascend on a2 loads this with --target ascend"
    assert "unrounded keys and values of a prompt" in remark
    for engine in ("mindie", "sglang-ascend"):
        with pytest.raises(
            UnsupportedError, match=f"are int8_column, but of quantized caches {engine} on a3 reads none"
        ):
            said("int8_column", engine, "a3")
    with pytest.raises(UnsupportedError, match="of quantized caches vllm-ascend on 950 reads none"):
        said("int8_column", "vllm-ascend", "950", ("mxfp8", "mxfp8"))
    for other in ("fp8_tensor", "int8_token"):
        with pytest.raises(UnsupportedError, match=rf"{other}, but .* on a2 reads C8 of ascend \(int8_column\)"):
            said(other, "vllm-ascend", "a2")


def test_fp16_models_are_for_one_device(source: Path, tmp_path: Path) -> None:
    model = student(source, pair_rules("int8_channel", "int8_token"), folder=tmp_path, **HALF)
    first, remark = check_loadable(model, source, "vllm-ascend", "310p")
    assert first == "vllm-ascend on 310p loads this with --target ascend" and "scales per token" in remark
    with pytest.raises(UnsupportedError, match="this is an FP16 model, for 310p; train it with"):
        check_loadable(model, source, "vllm-ascend", "a2")
    with pytest.raises(UnsupportedError, match="mindie on 310p loads nothing that is written here"):
        check_loadable(model, source, "mindie", "310p")
    static = student(source, pair_rules("int8_channel", "int8_tensor_asym"), folder=tmp_path, **HALF)
    assert len(check_loadable(static, source, "vllm-ascend", "310p")) == 1


def test_the_whole_road_in_fp16(source: Path, tmp_path: Path, capsys: Any) -> None:
    """As above, for a 310P."""
    scheme = {"rules": [pair_rules("int8_channel", "int8_tensor_asym"), REST], "init": [], **HALF}
    on = {"engine": "vllm-ascend", "device": "310p"}
    wrong = jobs.write(tmp_path, source, scheme={**scheme, "activation_rule": "ascend"}, **on)
    assert main(["train", str(wrong)]) == 2
    assert "set scheme.activation_rule: ascend_310p, or leave engine out" in capsys.readouterr().err
    job = jobs.write(tmp_path, source, scheme=scheme, steps=2, **on)
    run, out = str(tmp_path / "runs" / "tiny"), str(tmp_path / "out")
    assert main(["train", str(job)]) == 0
    assert main(["export", run, out]) == 2
    assert "--target ascend" in capsys.readouterr().err
    assert main(["export", run, out, "--target", "ascend"]) == 0
    assert main(["verify", out, "--engine", "vllm-ascend"]) == 0
    assert "vllm-ascend: 7 layers load on 310p (" in capsys.readouterr().out
    assert main(["generate", out, "The fox", "--tokens", "3"]) == 0
    found = {}
    for folder in (out, run):
        capsys.readouterr()
        assert main(["eval", folder, "--tokens", "256", "--json"]) == 0
        found[folder] = json.loads(capsys.readouterr().out)["rows"][-1]["nll"]
    assert 0 < abs(found[out] - found[run]) < 0.02 * found[run]
