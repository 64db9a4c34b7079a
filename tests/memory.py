"""Peak bytes of live tensor storages, counted at the dispatcher: repeatable, unlike the resident set."""

import gc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts storages made inside; those that come from outside, parameters and data, do not count."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in self._tensors((args, kwargs)):
            self._sizes.setdefault(tensor.untyped_storage()._cdata, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, key):
        self.live -= self._sizes.pop(key, 0)

    @staticmethod
    def _tensors(tree):
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(function):
    gc.collect()
    with PeakMemory() as memory:
        function()
    return memory.peak
