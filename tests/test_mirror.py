"""Tests mirror the tree: a file's tests are where its path says, or stand in the table below with a reason.

`qat/init/gptq.py` is tested by `tests/qat/init/test_gptq.py`. A folder that is one subject (a kernel, a target) may
have one test file of the folder's name, and `<folder>/cpu.py` one called `test_<folder>_cpu.py`.
"""

from pathlib import Path, PurePosixPath

import pytest

from tests.architecture_rules import FOLDERS, ROOT, Source, sources

ELSEWHERE = {
    "checkpoints/layouts/__init__.py": "checkpoints/layouts/test_target.py: a target is found by its folder",
    "checkpoints/layouts/arguments.py": "checkpoints/layouts/test_support.py: both ways for every supported pair",
    "checkpoints/layouts/bits.py": "checkpoints/layouts/test_reader.py: the arithmetic of every reader",
    "checkpoints/layouts/kinds.py": "checkpoints/layouts/test_support.py: the words of the tables' rows",
    "checkpoints/layouts/stored.py": "checkpoints/layouts/test_compressed_tensors.py: its streams of bits",
    "checkpoints/names.py": "checkpoints/test_export_plan.py: names are half of the plan",
    "checkpoints/positions.py": "trainers/test_limits.py: what a table of positions limits",
    "checkpoints/record.py": "checkpoints/test_export.py: a record is read back from an export",
    "qat/init/rotations.py": "qat/init/test_rotate.py: where a matrix can stand, by what the step does there",
    "qat/init/step.py": "qat/init/test_calibration.py: every step is run there",
    "engines/experts.py": "engines/test_transformers.py: experts that the engine serves",
    "engines/front.py": "engines/test_serve.py: over a socket, as clients see it",
    "engines/replies.py": "engines/test_serve.py: over a socket, as clients see it",
    "kernels/cached_attention/decode/triton.py": "kernels/test_cached_attention.py: every code that it reads",
    "kernels/cached_attention/merge/triton.py": "kernels/test_cached_attention.py: whatever is longer than a piece",
    "kernels/effective_scales/triton.py": "kernels/test_fake_quantize.py: one process interprets both",
    "kernels/fake_quantize/rounding/triton.py": "kernels/test_fake_quantize.py: and its quotients in test_quotients.py",
    "kernels/fake_quantize_input/triton.py": "kernels/test_fake_quantize.py: one process interprets both",
    "kernels/packed_linear/decode/ascend.py": "kernels/test_npu.py: every code under every scale",
    "kernels/packed_linear/decode/triton.py": "kernels/test_packed_linear.py: every code that it multiplies",
    "kernels/packed_linear/dense/choose.py": "kernels/test_tiles.py: with the other closed-form rules",
    "kernels/packed_linear/dense/triton.py": "kernels/test_packed_linear.py: the same operator, for many tokens",
    "kernels/packed_linear/panels/triton.py": "kernels/test_packed_linear.py: one operator, two orders of words",
    "kernels/quantize_input/codes/triton.py": "kernels/test_quantize_input.py: the arithmetic of that kernel",
    "kernels/quantize_pack/triton.py": "kernels/test_fake_quantize.py: one process interprets both",
    "kernels/quantized_matmul/block_scaled/triton.py": "kernels/test_quantized_matmul.py: the same product elsewhere",
    "qat/__init__.py": "test_imports.py: names that are found without importing the rest",
    "qat/adapters/__init__.py": "qat/test_surgery.py: a list of files, tested by what is found through it",
    "qat/adapters/embedding.py": "qat/test_quantizer.py: the modules that a quantizer meets first",
    "qat/adapters/linear.py": "qat/test_quantizer.py: the modules that a quantizer meets first",
    "qat/errors.py": "qat/test_config.py: types without code, and the nearest name",
    "qat/options.py": "qat/test_cli.py: options are half of the command",
    "qat/same_tensor.py": "qat/test_quantizer.py: what its readers get",
    "qat/training/step_weight.py": "qat/test_modes.py: what is held in a step",
    "qat/zero.py": "trainers/test_zero_strategy.py: what DeepSpeed's engine has divided",
    "qat/sites.py": "qat/test_surgery.py: sites are what surgery leaves",
    "trainers/adapted.py": "trainers/test_run.py: between initialisation and the first step",
    "trainers/announced.py": "trainers/test_run.py: printed before the first step of every run",
    "trainers/analysis_plots.py": "trainers/test_analyze.py: pictures of the same analysis",
    "trainers/device.py": "trainers/test_inspect.py: devices that people type",
    "trainers/estimate_table.py": "trainers/test_estimate.py: the estimate as printed",
    "trainers/exportable.py": "trainers/test_called.py: what is refused before the first step",
    "trainers/fit.py": "trainers/test_run.py: the loop of a run",
    "trainers/job.py": "configs/test_configs.py: every recipe is a job",
    "trainers/lora_footprint.py": "trainers/test_footprint.py: what adapters weigh is a part of what a job weighs",
    "trainers/machine.py": "trainers/test_machines.py: what is said of a machine that misbehaves",
    "trainers/overlap.py": "trainers/test_data.py: compares two sets of rows",
    "trainers/parts.py": "trainers/test_run.py: a dataclass",
    "trainers/sensitivity_plot.py": "trainers/test_sensitivity.py: the picture of the same table",
}


def places(path: str) -> list[str]:
    """Test files, from the repository root, that may be this file's own."""
    file = PurePosixPath("tests") / path
    places = [file.parent / f"test_{file.stem}.py"]
    if len(file.parts) > 3:
        folder = file.parent
        places += [folder.parent / f"test_{folder.name}.py", folder.parent / f"test_{folder.name}_{file.stem}.py"]
    return [place.as_posix() for place in places]


def untested(root: Path, source: Source) -> bool:
    """Whether no test file has this file's name; an `__init__.py` that is only a docstring needs none."""
    only_words = len(source.tree.body) == 1 and source.path.endswith("__init__.py")
    return not only_words and not any((root / place).is_file() for place in places(source.path))


SOURCES = [source for source in sources() if source.layer != "tests"]


def test_every_file_is_tested_where_its_path_says() -> None:
    missing = [s.path for s in SOURCES if untested(ROOT, s) and s.path not in ELSEWHERE]
    assert not missing, f"give each a test file of its name, or a line in ELSEWHERE: {missing}"


@pytest.mark.parametrize("path", ELSEWHERE)
def test_the_table_is_true(path: str) -> None:
    """The file is there, still without a test file of its own, and the one that is named exists."""
    place, _, reason = ELSEWHERE[path].partition(": ")
    assert any(source.path == path and untested(ROOT, source) for source in SOURCES)
    assert (ROOT / "tests" / place).is_file() and reason


def test_where_tests_are_looked_for(tmp_path: Path) -> None:
    assert places("qat/scheme.py") == ["tests/qat/test_scheme.py"]
    assert places("qat/init/gptq.py")[0] == "tests/qat/init/test_gptq.py"
    assert "tests/kernels/test_packed_linear_cpu.py" in places("kernels/packed_linear/cpu.py")
    assert "tests/checkpoints/layouts/test_fp8.py" in places("checkpoints/layouts/fp8/write.py")
    assert untested(tmp_path, Source("qat/scheme.py", "x = 1")) and "qat" in FOLDERS
    assert not untested(tmp_path, Source("qat/init/__init__.py", '"""Doc."""'))
