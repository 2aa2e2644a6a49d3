"""Operations -> bytes alive: every storage that a step makes, counted from its birth to its end, and the highest sum.

Concerns no equation of the paper. Works on tensors without memory (fake ones) as on real ones, so that an estimate and
its check are one count; LAVIS logs only what a GPU's allocator has reached after the fact.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, under `with`, the bytes of all new storages that are still alive, by the label they were made under.

    Kernels' own workspaces are invisible here: what counts is what the operations return.

    Args:
        ignore: tensors that are no part of the count (parameters and buffers, which are counted elsewhere).
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label = "other"
        self._labels: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._watchers: dict[int, weakref.ref[Any]] = {}
        self._ignored = {tensor.untyped_storage()._cdata: tensor for tensor in ignore}
        self._alive: Counter[str] = Counter()
        self._peak: dict[str, int] = {}
        self._peak_total = 0
        self._total = 0

    @property
    def alive(self) -> Mapping[str, int]:
        """Bytes now alive, by label."""
        return +self._alive

    @property
    def peak(self) -> Mapping[str, int]:
        """Bytes by label at the moment when their sum was highest."""
        return self._peak

    @contextlib.contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Storages made inside belong to `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def watch(self, tensor: Tensor, label: str) -> None:
        """Count a tensor under `label`, whether it is new or known under another one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            self._alive[self._labels[key]] -= self._sizes[key]
            self._alive[label] += self._sizes[key]
            self._labels[key] = label
        elif key not in self._ignored:
            self._add(storage, label)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes and storage._cdata not in self._ignored:
                    self._add(storage, self.label)
        return out

    def _add(self, storage: torch.UntypedStorage, label: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._labels[key], self._sizes[key] = label, size
        self._watchers[key] = weakref.ref(storage, lambda _: self._drop(key))
        self._alive[label] += size
        self._total += size
        if self._total > self._peak_total:
            self._peak_total, self._peak = self._total, dict(+self._alive)

    def _drop(self, key: int) -> None:
        size = self._sizes.pop(key)
        self._alive[self._labels.pop(key)] -= size
        self._total -= size
        del self._watchers[key]
