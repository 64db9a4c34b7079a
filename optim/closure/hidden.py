"""Hidden states of a network, seen by hooks while a closure runs for the first time in a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from secondorder.operators.curvature import GradientBlock

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class HiddenStates:
    """Outputs of modules in the first run of a closure.

    Args:
        modules: Whose outputs they are; empty for all recurrent modules of torch that are called.

    Raises:
        TypeError: ``modules`` holds something else.
    """

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self._modules = tuple(modules) if isinstance(modules, Sequence) else (modules,)
        for module in self._modules:
            if not isinstance(module, nn.Module):
                raise TypeError(f"structural must hold torch.nn.Modules, got {type(module).__name__}.")
        self._seen: list[Tensor] = []

    def watching(self, closure: Any) -> Any:
        """The closure, whose first call is watched; what is no function as it is."""
        if not callable(closure):
            return closure
        remaining = [self._hooks]

        def watched() -> Any:
            with remaining.pop()() if remaining else contextlib.nullcontext():
                return closure()

        return watched

    def block(self, weight: float) -> GradientBlock:
        """That of ``weight / 2`` times the mean square of their entries.

        Raises:
            RuntimeError: none was seen.
        """
        if not self._seen:
            what = "modules of structural=" if self._modules else "nn.RNN, nn.LSTM, nn.GRU or cell of theirs"
            raise RuntimeError(
                f"structural_damping needs hidden states, but no {what} gave outputs with a graph while a"
                " closure ran; give step a closure, and name the modules in structural=."
            )
        # As one tensor: of a cell one state is a function of another, which a block may not see.
        whole = self._seen if len(self._seen) == 1 else [torch.cat([s.reshape(-1) for s in self._seen])]
        # In half precision the weight may vanish.
        states = whole[0].to(torch.promote_types(whole[0].dtype, torch.float32))
        return GradientBlock((weight / states.numel() * states,), (states,))

    def clear(self) -> None:
        """Forget them: they hold the graph."""
        self._seen = []

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        self.clear()
        handles = [module.register_forward_hook(self._see) for module in self._modules]
        if not handles:
            handles = [register_module_forward_hook(self._see_recurrent)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see_recurrent(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, RECURRENT):
            self._see(module, args, output)

    def _see(self, module: nn.Module, _: Any, output: Any) -> None:
        # The second of an nn.RNN are the last of the first.
        states = tree_leaves(output[0] if isinstance(module, nn.RNNBase) else output)
        self._seen += [state for state in states if isinstance(state, Tensor) and state.requires_grad]
