"""Public: ``with secondorder.decompose.decompose(): ...``."""

from secondorder.autodiff.decompose import decompose

__all__ = ["decompose"]
