"""vllm-ascend's own code for a 310P on the experts of our FP16 files, two versions, over a second reading of its
operators; see `test_experts.py`."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qat.checkpoints.simulated import load_simulated
from tests.ascend.places import ENGINES, by_engine
from tests.ascend.test_experts import wrong
from tests.checkpoints.test_simulated_experts import EXPERTS, apart, tiny
from tests.checkpoints.test_simulated_half_experts import FINER, export_half, inputs, one_by_one

pytestmark = pytest.mark.ascend
DAMAGE = ["neighbours' scales", "shifted rows", "gates and what they gate", "experts in another order"]
SAID = {
    "scheme": "AscendW8A8DynamicFusedMoEMethod310",
    "missing": [],
    "unexpected": [],
    "checked": ["npu_quant_grouped_matmul_dequant", "npu_swiglu"],
}


@pytest.mark.parametrize("version", ENGINES)
def test_our_files(version: str, tmp_path: Path) -> None:
    out, given = tmp_path / "out", tmp_path / "inputs"
    export_half(tiny("qwen3_moe", tmp_path), out)
    save_file(dict(zip(("x", "chosen", "shares"), inputs(), strict=True)), given)
    jobs = [[str(out), EXPERTS, str(given), str(tmp_path / "y")]]
    for what in DAMAGE:
        folder = tmp_path / what
        folder.mkdir()
        for file in out.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        (file,) = out.glob("*.safetensors")
        save_file(dict(wrong(*one, what) for one in load_file(file).items()), folder / file.name)
        jobs.append([str(folder), EXPERTS, str(given), str(folder / "y")])
    said = by_engine(version, "_310P", jobs, tmp_path, "consume_experts.py")
    assert said == [SAID] * len(jobs)
    truth = one_by_one(out, *inputs())
    y, *others = (load_file(job[3])["y"] for job in jobs)
    assert apart(y, *truth) <= FINER
    own = load_simulated(out).get_submodule(EXPERTS)(*inputs())
    assert float((own == y).float().mean()) > 0.99
    for what, other in zip(DAMAGE, others, strict=True):
        assert apart(other, *truth) > 10 * FINER, what
