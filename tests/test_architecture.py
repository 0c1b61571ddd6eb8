"""The rules of the layout hold for every file, and each notices what breaks it.

`architecture_rules.py` has the rules: import arrows, rooms, one home per constant, names, sizes, no unsafe loading.
"""

from pathlib import Path

import pytest

from tests.architecture_rules import (
    FORMAT_NUMBERS,
    LINKED,
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    NAMES_CLASSES,
    ROOT,
    RULES,
    Rule,
    Source,
    clear_names,
    fits_on_a_screen,
    import_arrows,
    light_core,
    linked_folders,
    no_module_classes,
    one_home_for_constants,
    reasoned_silence,
    rooms,
    safe_loading,
    sources,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_obeys(rule: Rule) -> None:
    complaints = [f"{source.path}:{problem}" for source in sources() for problem in rule(source)]
    assert not complaints, "\n".join([rule.__doc__ or "", *complaints])


def test_the_walk_sees_real_files_once() -> None:
    paths = [source.path for source in sources()]
    assert {"qat/numbers/catalog.py", "tests/test_architecture.py"} <= set(paths)
    assert len(paths) == len({(ROOT / path).resolve() for path in paths})
    for name in LINKED:
        expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / name).rglob("*.py")}
        assert expected == {path for path in paths if path.startswith(f"{name}/")}


def test_the_exceptions_are_needed() -> None:
    """A file that no longer names a class leaves the table."""
    for path in NAMES_CLASSES:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert no_module_classes(Source("qat/elsewhere.py", text)), path


def test_folders_are_linked() -> None:
    assert linked_folders(ROOT) == []


A_NAME = "nvfp4"
BROKEN: list[tuple[Rule, str, str]] = [
    (import_arrows, "qat/quantizer.py", "from qat.checkpoints.hf import load"),
    (import_arrows, "qat/quantizer.py", "def f():\n    from qat import trainers"),
    (import_arrows, "qat/quantizer.py", "from .kernels import load"),
    (import_arrows, "kernels/load.py", "import qat.checkpoints.hf"),
    (import_arrows, "engines/vllm.py", "from ...trainers.job import Job"),
    (import_arrows, "checkpoints/export.py", "import importlib\nimportlib.import_module('qat.trainers.job')"),
    (import_arrows, "checkpoints/export.py", "def f():\n    import qat.trainers.job"),
    (import_arrows, "trainers/job.py", "from qat.kernels.load import load"),
    (import_arrows, "configs/recipe.py", "import qat.scheme"),
    (import_arrows, "qat/cli.py", "from qat.trainers.job import Job"),
    (import_arrows, "qat/__init__.py", "from qat import checkpoints"),
    (import_arrows, "checkpoints/hf.py", "import kernels"),
    (import_arrows, "trainers/data.py", "def f():\n    from checkpoints.hf import load"),
    (light_core, "qat/quantizer.py", "def f():\n    import transformers"),
    (light_core, "qat/training/ops.py", "import triton.language as tl"),
    (light_core, "qat/__init__.py", "def f():\n    from datasets import load_dataset"),
    (light_core, "trainers/callbacks.py", "import wandb"),
    (light_core, "trainers/strategy.py", "try:\n    import deepspeed\nexcept ImportError:\n    pass"),
    (light_core, "trainers/evaluate.py", "class A:\n    from lm_eval import tasks"),
    (light_core, "qat/cli.py", "import wandb"),
    (rooms, "qat/sites.py", "def f():\n    from qat.adapters import adapter_for"),
    (rooms, "qat/numbers/format.py", "from qat.training.ops import fake_quantize"),
    (rooms, "qat/training/ops.py", "def f():\n    from qat.serving.packed import pack"),
    (rooms, "qat/serving/inputs.py", "import qat.sites"),
    (rooms, "qat/init/scales.py", "from qat.surgery import apply"),
    (rooms, "qat/quantizer.py", "from qat.sites import Site"),
    (no_module_classes, "qat/surgery.py", "isinstance(module, nn.Linear)"),
    (no_module_classes, "trainers/optim.py", "from qat.adapters.linear import QatLinear\nisinstance(m, QatLinear)"),
    *[(one_home_for_constants, "kernels/a/triton.py", f"x = -{number}") for number in sorted(FORMAT_NUMBERS)],
    (one_home_for_constants, "qat/numbers/numerics.py", "limit = 448.0"),
    (one_home_for_constants, "qat/scheme.py", f"def f(format: str = {A_NAME!r}):\n    return format"),
    (one_home_for_constants, "checkpoints/export.py", f"table = {{{A_NAME!r}: 1}}"),
    (clear_names, "qat/utils.py", ""),
    (clear_names, "trainers/_helpers.py", ""),
    (clear_names, "checkpoints/common/shards.py", ""),
    (fits_on_a_screen, "qat/quantizer.py", "x = 1"),
    (fits_on_a_screen, "qat/quantizer.py", '"""Doc."""\n' * (MAX_FILE_LINES + 1)),
    (fits_on_a_screen, "qat/quantizer.py", '"""Doc."""\ndef f():\n' + "    x = 1\n" * MAX_FUNCTION_LINES),
    (reasoned_silence, "qat/quantizer.py", "x = 1  # noqa"),
    (reasoned_silence, "qat/quantizer.py", "x = 1  # noqa: E501"),
    (reasoned_silence, "qat/quantizer.py", "x = 1  # type: ignore  # the stub is out of date"),
    (reasoned_silence, "qat/quantizer.py", "x = 1  # type: ignore[assignment]"),
    (reasoned_silence, "qat/quantizer.py", "x = 1  # type: ignore[assignment]  # noqa: E501"),
    (reasoned_silence, "qat/quantizer.py", "x = 1  # type: ignore  # noqa: E501  the stub is out of date"),
    (reasoned_silence, "qat/quantizer.py", "# ruff: noqa"),
    (reasoned_silence, "qat/quantizer.py", "# mypy: ignore-errors"),
    (safe_loading, "checkpoints/resume.py", "import pickle"),
    (safe_loading, "checkpoints/resume.py", "def f():\n    from dill import loads"),
    (safe_loading, "checkpoints/resume.py", "from torch import load"),
    (safe_loading, "checkpoints/resume.py", "torch.load(path)"),
    (safe_loading, "checkpoints/resume.py", "torch.load(path, weights_only=False)"),
    (safe_loading, "checkpoints/resume.py", "np.load(path, allow_pickle=True)"),
    (safe_loading, "trainers/job.py", "eval(text)"),
    (safe_loading, "trainers/job.py", "exec(text)"),
    (safe_loading, "checkpoints/hf.py", "load(path, trust_remote_code=True)"),
    (safe_loading, "checkpoints/hf.py", "options = {'trust_remote_code': True}"),
    (safe_loading, "checkpoints/hf.py", "trust_remote_code: bool = True"),
    (safe_loading, "checkpoints/hf.py", "config.trust_remote_code = True"),
    (safe_loading, "checkpoints/hf.py", "def f(a, trust_remote_code=True, b=1): ..."),
    (safe_loading, "checkpoints/hf.py", "def f(*, trust_remote_code=True): ..."),
]
ALLOWED: list[tuple[Rule, str, str]] = [
    (import_arrows, "trainers/job.py", "from qat.checkpoints.hf import load\nfrom qat.training.objectives import Loss"),
    (import_arrows, "kernels/matmul/triton.py", "from qat.kernels.device import round_to\nimport qat.training.ops"),
    (import_arrows, "qat/cli.py", "def f():\n    from qat.trainers import job\n    import qat.kernels.load"),
    (import_arrows, "qat/__init__.py", "if TYPE_CHECKING:\n    from qat.trainers.job import Job"),
    (
        rooms,
        "qat/serving/inputs.py",
        "from qat.training.activations import vllm_scales\nfrom qat.errors import FormatError",
    ),
    (no_module_classes, "qat/adapters/linear.py", "isinstance(module, nn.Linear)"),
    (no_module_classes, "qat/surgery.py", "nn.functional.linear(x, weight)"),
    (light_core, "checkpoints/hf.py", "import transformers"),
    (light_core, "qat/cli.py", "def f():\n    import wandb"),
    (light_core, "trainers/callbacks.py", "def f():\n    import wandb"),
    (one_home_for_constants, "qat/numbers/catalog.py", f"limit, name = 448, {A_NAME!r}"),
    (one_home_for_constants, "qat/numbers/numerics.py", f'"""{A_NAME}"""\naddress = "127.0.0.1"\nwidth = 128'),
    (fits_on_a_screen, "kernels/a/triton.py", '"""Doc."""\ndef f():\n' + "    x = 1\n" * MAX_FUNCTION_LINES),
    (reasoned_silence, "qat/quantizer.py", "x = 1  # type: ignore[assignment]  # torch returns a float"),
    (reasoned_silence, "qat/quantizer.py", "x = 1  # noqa: E501, B006  # the address cannot be broken"),
    (reasoned_silence, "qat/quantizer.py", "x = '# noqa'"),
    (safe_loading, "checkpoints/resume.py", "model.eval()\ntorch.load(path, weights_only=True)"),
    (safe_loading, "checkpoints/hf.py", "f(trust_remote_code=config.trust)\nf(trust_remote_code=False)"),
]


@pytest.mark.parametrize(("case", "complaints"), [*((c, 1) for c in BROKEN), *((c, 0) for c in ALLOWED)])
def test_rules_report_what_breaks_them(case: tuple[Rule, str, str], complaints: int) -> None:
    rule, path, text = case
    assert len(rule(Source(path, text))) == complaints


@pytest.mark.parametrize("damage", ["package", "absolute", "copied", "elsewhere"])
def test_wrong_links_are_reported(tmp_path: Path, damage: str) -> None:
    (tmp_path / "qat").mkdir()
    for name in LINKED:
        (tmp_path / name).mkdir()
        (tmp_path / "qat" / name).symlink_to(Path("..") / name)
    assert linked_folders(tmp_path) == []
    link = tmp_path / "qat" / "kernels"
    if damage == "package":
        (tmp_path / "kernels" / "__init__.py").touch()
    else:
        link.unlink()
    if damage == "absolute":
        link.symlink_to(tmp_path / "kernels")
    elif damage == "copied":
        link.mkdir()
    elif damage == "elsewhere":
        link.symlink_to(Path("..") / "trainers")
    assert len(linked_folders(tmp_path)) == 1
