"""Digests of everything numeric that the project makes, to prove that a change of structure changed no number.

    python -m tests.digests BEFORE.json             # on the old commit
    python -m tests.digests AFTER.json BEFORE.json  # on the new one: lists what differs; then exits 1
    python -m tests.digests AFTER.json BEFORE.json --real   # also ten steps of the embedded model, about six minutes

Covered: a tiny model exported under every pair of formats of every target, ten training steps of it under five
schemes (losses, trained tensors), and with `--real` ten steps of the quickstart and its export. Compare on one machine:
other processors add in another order.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import qat
from qat.checkpoints.layouts import READERS, TARGETS, support
from qat.errors import UnsupportedError
from tests.checkpoints.exports import export_pair
from tests.tiny import tiny_model
from tests.trainers import jobs

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10
SEARCH = {"init": ({"kind": "scales", "weighted": False},)}
SKIP = [{"match": "*", "skip": "not a projection"}]
NV, MX = "nvfp4", "mxfp4"
SCHEMES: dict[str, dict[str, Any]] = {
    "nv-smooth-gptq": {
        "rules": [{"match": "*_proj", "weight": NV, "input": NV}, *SKIP],
        "init": ["smooth", "gptq"],
    },
    "int4-asym": {"rules": [{"match": "*_proj", "weight": "int4_g32_asym"}, *SKIP], "learn": "lsq"},
    "mx": {
        "rules": [
            {"match": "*embed_tokens", "weight": MX},
            {"match": "*_proj", "weight": MX, "input": MX},
            {"match": "lm_head", "skip": "head"},
        ]
    },
    "fp8-static": {
        "rules": [{"match": "*_proj", "weight": "fp8_tensor", "input": "fp8_tensor"}, *SKIP],
        "estimator": "ste",
    },
    "if4": {"rules": [{"match": "*_proj", "weight": "if4"}, *SKIP]},
}


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of every tensor (type, shape, bytes) in the safetensors files below `folder`."""
    digests = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                tensor = file.get_tensor(name).contiguous()
                head = f"{tensor.dtype}{list(tensor.shape)}".encode()
                raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                digests[name] = hashlib.sha256(head + raw).hexdigest()
    return digests


def of_exports(root: Path) -> dict[str, str]:
    """One digest per target and pair of formats."""
    source = tiny_model("llama", root / "model", hidden_size=256, num_hidden_layers=1)
    found = {}
    for target, layout in ((name, TARGETS[name]) for name in READERS):
        for weight, input in support.pairs(layout.ROWS):
            out = root / target / f"{weight}-{input}"
            label = f"export {target} {weight} {input}"
            try:
                export_pair(source, out, (weight, input), target, **({} if input else SEARCH))
                found[label] = _joined(folder_digests(out))
            except UnsupportedError:  # fused layers under one scale per tensor, which only trained ones share
                found[label] = "refused"
    return found


def of_training(root: Path) -> dict[str, str]:
    """Losses and trained tensors of ten steps of a tiny model, per scheme."""
    source = tiny_model("llama", root / "model", num_hidden_layers=1)
    found = {}
    for name, scheme in SCHEMES.items():
        path = jobs.write(root, source, name=name, scheme=scheme, steps=STEPS)
        found |= _of_run(qat.load_job(path), name)
    return found


def of_quickstart(root: Path) -> dict[str, str]:
    """Ten steps of the quickstart and its export."""
    job = qat.load_job(ROOT / "configs/quickstart.yaml", [f"steps={STEPS}", f"runs={root / 'runs'}"])
    found = _of_run(job, "quickstart")
    qat.export(job.folder, root / "export")
    return found | {f"quickstart export {name}": digest for name, digest in folder_digests(root / "export").items()}


def _of_run(job: Any, label: str) -> dict[str, str]:
    report = qat.train(job)
    rows = {row["name"]: [row[key] for key in ("nll", "kl")] for row in report["rows"]}
    return {
        f"train {label} rows": json.dumps(rows, sort_keys=True),
        f"train {label} curve": json.dumps(jobs.curve(job)),
        f"train {label} student": _joined(folder_digests(job.folder / "checkpoints" / "best")),
    }


def _joined(digests: dict[str, str]) -> str:
    values = sorted(digests.values())  # names of a student's own state may change, numbers may not
    return hashlib.sha256(json.dumps(values).encode()).hexdigest() + f" ({len(values)} tensors)"


def main() -> None:
    """Record, and compare where a file to compare with is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("--real", action="store_true", help="also ten steps of the quickstart and its export")
    parser.add_argument("--keep", type=Path, help="folder for the runs and exports, which stay")
    given = parser.parse_args()
    torch.set_num_threads(2)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = given.keep or Path(temporary)
        parts = [("exports", of_exports), ("training", of_training)] + [("real", of_quickstart)] * given.real
        for name, part in parts:
            (root / name).mkdir(parents=True)
            found |= part(root / name)
    given.out.write_text(json.dumps(found, indent=1))
    if given.before:
        before = json.loads(given.before.read_text())
        different = sorted(name for name in found.keys() | before if found.get(name) != before.get(name))
        print("\n".join(f"{name}: {before.get(name)} -> {found.get(name)}" for name in different))
        print(f"{len(found.keys() | before) - len(different)} equal, {len(different)} differ")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
