"""Where a command computes: what the user asked for, or the first GPU where there is one."""

import torch

from qat.errors import ConfigError


def torch_device(name: str) -> torch.device:
    """The device for `--device`: auto, cpu, cuda or cuda:1, tried out.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used ({reason}); give auto, cpu, cuda or cuda:1") from error
    return device
