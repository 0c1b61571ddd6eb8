"""Where `make test-ascend` puts other people's code, and running a script of this folder."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.kernels.processes import ROOT, in_a_process

HERE = Path(__file__).parent
ASCEND = ROOT / ".ascend"
ENGINES = ("0.23.0.post1", "0.30.0rc2")
RULES = ASCEND / "src" / "torch_npu" / "torch_npu" / "op_plugin" / "meta" / "_meta_registrations.py"
MSMODELSLIM = ASCEND / "msmodelslim" / "bin" / "msmodelslim"
TRITON_ASCEND = ASCEND / "triton" / "bin" / "python"


def by_triton_ascend(script: str) -> str:
    """What a script prints in the environment with triton-ascend."""
    command = [str(TRITON_ASCEND), str(HERE / script)]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def by_engine(
    version: str, device: str, jobs: list[list[str]], scratch: Path, script: str = "consume.py"
) -> list[dict[str, Any]]:
    """What vllm-ascend of that version says of checkpoints, see `consume.py` and its neighbours `consume_*.py`."""
    file = scratch / f"jobs-{version}-{device}.json"
    file.write_text(json.dumps(jobs))
    source, vllm = ASCEND / "src" / f"vllm_ascend-{version}", version.partition(".post")[0].partition("rc")[0]
    arguments = (str(source), device, vllm, str(RULES), str(file))
    said: list[dict[str, Any]] = json.loads(in_a_process(HERE / script, *arguments).splitlines()[-1])
    return said


def by_msmodelslim(model: Path, out: Path, config: dict[str, Any]) -> Path:
    """The folder that msmodelslim writes on a CPU; `config` as its YAML files have it, which JSON is, too."""
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(config))
    command = [
        str(MSMODELSLIM),
        "quant",
        "--model_type",
        "Qwen3-8B",
        "--model_path",
        str(model),
        "--save_path",
        str(out),
    ]
    command += ["--device", "cpu", "--config_path", str(file), "--trust_remote_code", "False"]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out
