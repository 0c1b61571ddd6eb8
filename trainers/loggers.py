"""Who else receives what a run measures: Weights & Biases and TensorBoard, each connected before the first baseline.

metrics.csv and the report do not depend on them. They also get what only a chart over time shows (`quantizer_metrics`),
and at the end the report's plots.
"""

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

from qat.errors import ConfigError
from qat.trainers.job import Job

TENSORBOARD = "tensorboard"  # folder in the run's


def wanted(job: Job) -> bool:
    """Whether anyone does."""
    return job.wandb is not None or job.tensorboard


def start_loggers(job: Job) -> list[Any]:
    """Connected: a run should not learn after its baselines that it cannot log in.

    Raises:
        ConfigError: a package is not installed, or wandb does not start.
    """
    return [*_tensorboard(job), *_wandb(job)]


def finish_loggers(loggers: list[Any], run: Path) -> None:
    """Send the report's plots and close; what goes wrong is a warning, since the run is finished and its numbers are
    safe."""
    if not loggers:
        return
    from lightning.pytorch.loggers import WandbLogger
    from matplotlib.image import imread

    pictures = sorted((run / "plots").glob("*.png"))
    for logger in loggers:
        try:
            if isinstance(logger, WandbLogger):
                for picture in pictures:
                    logger.log_image(f"plots/{picture.stem}", [str(picture)])
                logger.experiment.finish()
            else:
                for picture in pictures:
                    logger.experiment.add_image(f"plots/{picture.stem}", imread(picture)[..., :3], dataformats="HWC")
                logger.experiment.close()
        except Exception as error:  # whatever a service raises
            warnings.warn(f"{type(logger).__name__}: {type(error).__name__}: {error}", stacklevel=2)


def _tensorboard(job: Job) -> list[Any]:
    if not job.tensorboard:
        return []
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("the job asks for tensorboard, which is not installed: pip install tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    return [TensorBoardLogger(job.folder, name=TENSORBOARD, version="", default_hp_metric=False)]


def _wandb(job: Job) -> list[Any]:
    if job.wandb is None:
        return []
    try:
        import wandb
        from lightning.pytorch.loggers import WandbLogger
    except ModuleNotFoundError as error:
        raise ConfigError(f"the job asks for wandb, which is not installed: pip install wandb ({error})") from error
    # Said to the run: wandb reads its variables once per process, and Lightning's `offline` sets one for later runs.
    mode = "offline" if job.wandb.offline else os.environ.get("WANDB_MODE", "online")
    logger = WandbLogger(project=job.wandb.project, name=job.name, save_dir=job.folder, log_model=False, mode=mode)
    try:
        _ = logger.experiment
    except (wandb.Error, OSError) as error:
        raise ConfigError(
            f"wandb does not start ({str(error).strip() or type(error).__name__}); log in with `wandb login`, set "
            "wandb.offline=true, or leave wandb out"
        ) from error
    return [logger]
