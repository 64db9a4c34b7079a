"""The optimizers under a name that nothing shadows: ``from secondorder.optim import HessianFree``.

Where ``import optim`` finds the package beside this one, this is the same module. Where it finds another (a
``optim.py`` or a folder ``optim/`` of the user, another distribution), ours is loaded from its place.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optim import *  # noqa: F403

NAME = "optim"
PLACE = Path(__file__).parent.parent / NAME / "__init__.py"


def _is_ours(origin: str | None) -> bool:
    return origin is not None and Path(origin).resolve() == PLACE.resolve()


def _found() -> ModuleType:
    loaded = sys.modules.get(NAME)
    if loaded is not None and _is_ours(getattr(loaded, "__file__", None)):
        return loaded
    # Looking for a module runs nothing of it.
    spec = None if loaded is not None else importlib.util.find_spec(NAME)
    if spec is not None and _is_ours(spec.origin):
        return importlib.import_module(NAME)
    spec = importlib.util.spec_from_file_location(
        __name__, PLACE, submodule_search_locations=[str(PLACE.parent)]
    )
    if spec is None or spec.loader is None or not PLACE.is_file():
        raise ModuleNotFoundError(
            f"secondorder.optim must lie beside secondorder, but there is no {PLACE}. Reinstall secondorder."
        )
    module = importlib.util.module_from_spec(spec)
    # Its own relative imports look for it there.
    sys.modules[__name__] = module
    spec.loader.exec_module(module)
    return module


sys.modules[__name__] = _found()
