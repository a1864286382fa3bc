"""Optimizer kernels for the CPU in place of Transformer Engine's and apex's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """Adam that updates all parameters of a group in one call, with the state of GPU optimizers.

    Like Transformer Engine's and apex's, and unlike torch's, it counts the steps of a group and not
    of each parameter: the distributed optimizer of Megatron cannot resume torch's.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: coefficient of the decay.
        adam_w_mode: decay the weights themselves (AdamW) instead of adding an L2 penalty.
        capturable: of no meaning on a CPU.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        self._update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(parameter) for parameter in parameters]
            if not parameters:
                continue
            beta1, beta2 = group["betas"]
            self._update(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(group["step"]))] * len(parameters),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Euclidean norm over all tensors, [1] float32; the second result is upstream's, unused."""
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    norms = torch._foreach_norm(tensors, 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def scale(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], factor: float
) -> None:
    """Writes the first list, multiplied by ``factor``, into the second, casting to its dtypes."""
    source, target = tensor_lists
    if source is target:
        torch._foreach_mul_(target, factor)
        return
    # Scaled before the cast, so that a bfloat16 destination is rounded once.
    torch._foreach_copy_(target, source if factor == 1.0 else torch._foreach_mul(source, factor))
