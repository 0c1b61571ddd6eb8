"""Lightning's strategy for DeepSpeed, with what quantized training needs of it. Imported where it is asked for.

Lightning refuses all but CUDA. DeepSpeed's engine does run on CPUs with gloo, which is how it is tested, so that check
is left out here.
"""

import argparse
import logging
import warnings
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from qat import sharded
from qat.trainers.zero import ZeroConfig, engine_config
from qat.zero import Division


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed around a `QatModule`.

    Args:
        zero: stage and offload.
        clip: largest norm of the gradient, which the engine clips itself.
        mixed: whether the forward pass computes in BF16.
        timeout: of a process that waits for others.
    """

    def __init__(self, zero: ZeroConfig, clip: float, mixed: bool, timeout: timedelta) -> None:
        # DeepSpeed calls what newer versions of torch name otherwise.
        warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated.*", category=FutureWarning)
        super().__init__(config=engine_config(zero, clip, mixed), timeout=timeout, logging_level=logging.ERROR)
        self.zero = zero
        self.division: Division | None = None

    def setup_environment(self) -> None:
        """Without Lightning's check for CUDA."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Take the processes that are connected already."""
        import deepspeed

        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        deepspeed.init_distributed(self._process_group_backend, verbose=False, dist_init_required=False)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed

        self.division = Division(model, model.student, sharded.blocks(model.student), self.zero.stage)
        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index or 0),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        self.division.begin(engine, deepspeed.zero.register_external_parameter)
        return engine, wrapped

    def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided by the accumulation count already."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def on_train_end(self) -> None:
        """Give every process the whole model back, and drop the optimizer."""
        if self.division is not None:
            self.optimizers = []
            self.division.end()
            self.division = None
            self.model = self.lightning_module
            if self.root_device.type == "cuda":
                torch.cuda.empty_cache()
