"""What `strategy: deepspeed` can be told, and what it needs."""

from importlib.util import find_spec
from typing import Any, Literal

from qat.config import Strict

BUCKET = 50_000_000  # numbers that are summed over devices at once
PCIE, HOST_MEMORY = 25e9, 100e9  # bytes per second between host and device, and of a machine's memory
ADAM_BYTES = 28  # that AdamW reads and writes per parameter


class ZeroConfig(Strict):
    """DeepSpeed's ZeRO.

    Attributes:
        stage: what is divided among the devices: 1 the optimizer's state, 2 gradients too, 3 parameters too.
        offload: what lies in the host's memory: "optimizer" (moments and masters; AdamW then runs on the CPU), or
            "all" (with stage 3: parameters too, of which a block at a time is on the device).
    """

    stage: Literal[1, 2, 3] = 2
    offload: Literal["none", "optimizer", "all"] = "none"


def missing() -> str | None:
    """Why DeepSpeed cannot be used here, or None."""
    if find_spec("deepspeed") is not None:
        return None
    return (
        "strategy deepspeed needs a package that is not installed: DS_BUILD_OPS=0 pip install deepspeed (nothing is "
        "compiled); strategy=fsdp divides as ZeRO-3 does and needs none"
    )


def divided(zero: ZeroConfig, devices: int, states: dict[str, int]) -> dict[str, int]:
    """Bytes on one device of the states that `qat.trainers.footprint` counts undivided.

    The optimizer has masters beside the parameters; averages are divided as parameters are; scales are counted whole.
    """
    share = {name: count // devices for name, count in states.items()}
    found = {**states, "Adam moments": share["Adam moments"], "masters of the optimizer": share["gradients"]}
    if zero.stage >= 2:
        found["gradients"] = share["gradients"]
    if zero.stage == 3:
        found |= {name: share[name] for name in ("master weights", "average of weights", "teacher")}
    host: tuple[str, ...] = () if zero.offload == "none" else ("Adam moments", "masters of the optimizer")
    host += ("master weights", "average of weights") if zero.offload == "all" else ()
    return {**found, **dict.fromkeys(host, 0), "gradients being summed": 4 * BUCKET}


def host_seconds(zero: ZeroConfig, trained: int, parameters: int, devices: int, passes: float) -> float:
    """Of a step: gradients to the host, AdamW there for all devices of the machine, and parameters back; with "all"
    a device's share of them once per forward and backward pass too."""
    if zero.offload == "none":
        return 0.0
    step = 8 * trained / devices / PCIE + ADAM_BYTES * trained / HOST_MEMORY
    return step + (passes * 8 * parameters / devices / PCIE if zero.offload == "all" else 0.0)


def engine_config(zero: ZeroConfig, clip: float, mixed: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration; Lightning adds the accumulation.

    Parameters are float32 and autocast is torch's, as on one device: DeepSpeed's "bf16" would train copies in BF16,
    and round weights to it before they are quantized. Nothing is kept whole between uses, so that what is written into
    a share is what the next pass reads.
    """
    divided: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": zero.stage == 3,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "memory_efficient_linear": False,
    }
    if zero.offload != "none":
        divided["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if zero.offload == "all":
        divided["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "zero_optimization": divided,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # AdamW is torch's there too: DeepSpeed's would be compiled
        "gradient_clipping": clip,
        "train_micro_batch_size_per_gpu": 1,  # of its speed log, which nobody reads
    }
    if mixed:
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": ["torch.nn.Conv3d"],  # whose gradients would be summed in BF16
        }
    return config
