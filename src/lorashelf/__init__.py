"""lorashelf: N LoRA adapters, K slots; merged, kept safe on disk, and routed.

>>> import lorashelf
>>> sorted(lorashelf.METHODS)[:3]
['cat', 'dare_linear', 'dare_linear_svd']
"""

import importlib
import typing

from . import early  # noqa: F401  first, as it is for the seconds in which the rest is imported
from .errors import LorashelfError
from .formats.peft import read_adapter, write_adapter
from .lora.adapter import Adapter, BaseId, Factors, Modules
from .lora.algebra import combine, compress, gram, inner, norm
from .lora.similarity import METRICS, similarity
from .merging import METHODS, Within, merge, merge_method
from .placement.partitioners import PARTITIONERS, partition, partitioner
from .placement.policies import POLICIES, policy
from .shelf.manifest import Manifest, Plan, Slot
from .shelf.plans import plan_add, plan_cluster, plan_remove, plan_set, plan_update
from .shelf.routing import route, routes
from .shelf.settings import Budget, Recipe, Settings, new_settings
from .shelf.shelf import Shelf
from .shelf.snapshot import Snapshot
from .version import VERSION

if typing.TYPE_CHECKING:
    from .evaluation.compare import evaluate
    from .models.base_model import base_folder
    from .models.hf import HFBackend
    from .search.cluster import cluster_by_loss
    from .tasks.folders import read_tasks

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
