"""lorashelf: N LoRA adapters, K slots; merged, kept safe on disk, and routed.

>>> import lorashelf
>>> sorted(lorashelf.METHODS)[:3]
['cat', 'dare_linear', 'dare_linear_svd']
"""

import importlib
import typing

from . import early  # noqa: F401  first, as it is for the seconds in which the rest is imported
from .adapter import Adapter, BaseId, Factors, Modules
from .algebra import combine, compress, gram, inner, norm
from .errors import LorashelfError
from .flow import plan_add, plan_cluster, plan_remove, plan_set, plan_update
from .manifest import Manifest, Plan, Slot
from .merging import METHODS, Within, merge, merge_method
from .partition import PARTITIONERS, partition, partitioner
from .peft_format import read_adapter, write_adapter
from .policy import POLICIES, policy
from .recipe import Budget, Recipe, Settings, new_settings
from .router import route, routes
from .shelf import Shelf
from .similarity import METRICS, similarity
from .snapshot import Snapshot
from .version import VERSION

if typing.TYPE_CHECKING:
    from .backends.base_model import base_folder
    from .backends.hf import HFBackend
    from .clustering import cluster_by_loss
    from .evaluation import evaluate
    from .tasks import read_tasks

__version__ = VERSION
_LATE = {  # the language model's side: name → the module that it is imported from when it is asked for
    "HFBackend": "backends.hf",
    "base_folder": "backends.base_model",
    "cluster_by_loss": "clustering",
    "evaluate": "evaluation",
    "read_tasks": "tasks",
}

__all__ = [
    "METHODS",
    "METRICS",
    "PARTITIONERS",
    "POLICIES",
    "Adapter",
    "BaseId",
    "Budget",
    "Factors",
    "HFBackend",
    "LorashelfError",
    "Manifest",
    "Modules",
    "Plan",
    "Recipe",
    "Settings",
    "Shelf",
    "Slot",
    "Snapshot",
    "Within",
    "__version__",
    "base_folder",
    "cluster_by_loss",
    "combine",
    "compress",
    "evaluate",
    "gram",
    "inner",
    "merge",
    "merge_method",
    "new_settings",
    "norm",
    "partition",
    "partitioner",
    "plan_add",
    "plan_cluster",
    "plan_remove",
    "plan_set",
    "plan_update",
    "policy",
    "read_adapter",
    "read_tasks",
    "route",
    "routes",
    "similarity",
    "write_adapter",
]


def __getattr__(name: str) -> typing.Any:
    if name in _LATE:
        return getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
