"""lorashelf: N LoRA adapters in K slots or in a number of bytes; merged or coded, kept safe on disk, and routed.

>>> import lorashelf
>>> {'linear', 'ties', 'pico'} <= set(lorashelf.METHODS)
True
"""

import importlib
import typing

from . import early as early  # first: it handles Ctrl-C while the rest is imported
from .version import VERSION

if typing.TYPE_CHECKING:
    from .errors import LorashelfError
    from .evaluation.measure import evaluate
    from .export.driver import export_shelf
    from .export.formats import FORMATS
    from .formats.coded.files import read_coded
    from .formats.peft import read_adapter, write_adapter
    from .lora.adapter import Adapter, BaseId, Factors, Modules
    from .lora.algebra import combine, compress, gram, inner, norm
    from .lora.similarity import METRICS, similarity
    from .merging import METHODS, MergeSpec, Within, merge, merge_method
    from .models.base_model import base_folder
    from .models.engines import ENGINES, open_model
    from .models.hf import HFBackend
    from .placement.clustering import Clustering, cluster
    from .placement.partitioners import PARTITIONERS, partition, partitioner
    from .placement.policies import POLICIES, PlacementSpec, policy
    from .search.cluster import cluster_by_loss
    from .serving.attachment import attach
    from .shelf.arrival import candidates, plan_add
    from .shelf.manifest import Manifest
    from .shelf.plan import Plan
    from .shelf.plans import plan_cluster, plan_remove, plan_set, plan_update
    from .shelf.routing import route, routes
    from .shelf.settings import Budget, Settings, new_settings
    from .shelf.shelf import Shelf
    from .shelf.slot import Slot
    from .shelf.snapshot import Snapshot
    from .tasks.folders import read_tasks

__version__ = VERSION
_NAMES = {  # module → the names imported from it on first use
    "errors": ("LorashelfError",),
    "evaluation.measure": ("evaluate",),
    "export.driver": ("export_shelf",),
    "export.formats": ("FORMATS",),
    "formats.coded.files": ("read_coded",),
    "formats.peft": ("read_adapter", "write_adapter"),
    "lora.adapter": ("Adapter", "BaseId", "Factors", "Modules"),
    "lora.algebra": ("combine", "compress", "gram", "inner", "norm"),
    "lora.similarity": ("METRICS", "similarity"),
    "merging": ("METHODS", "MergeSpec", "Within", "merge", "merge_method"),
    "models.base_model": ("base_folder",),
    "models.engines": ("ENGINES", "open_model"),
    "models.hf": ("HFBackend",),
    "placement.clustering": ("Clustering", "cluster"),
    "placement.partitioners": ("PARTITIONERS", "partition", "partitioner"),
    "placement.policies": ("POLICIES", "PlacementSpec", "policy"),
    "search.cluster": ("cluster_by_loss",),
    "serving.attachment": ("attach",),
    "shelf.manifest": ("Manifest",),
    "shelf.plan": ("Plan",),
    "shelf.slot": ("Slot",),
    "shelf.arrival": ("candidates", "plan_add"),
    "shelf.plans": ("plan_cluster", "plan_remove", "plan_set", "plan_update"),
    "shelf.routing": ("route", "routes"),
    "shelf.settings": ("Budget", "Settings", "new_settings"),
    "shelf.shelf": ("Shelf",),
    "shelf.snapshot": ("Snapshot",),
    "tasks.folders": ("read_tasks",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "ENGINES",
    "FORMATS",
    "METHODS",
    "METRICS",
    "PARTITIONERS",
    "POLICIES",
    "Adapter",
    "BaseId",
    "Budget",
    "Clustering",
    "Factors",
    "HFBackend",
    "LorashelfError",
    "Manifest",
    "MergeSpec",
    "Modules",
    "PlacementSpec",
    "Plan",
    "Settings",
    "Shelf",
    "Slot",
    "Snapshot",
    "Within",
    "__version__",
    "attach",
    "base_folder",
    "candidates",
    "cluster",
    "cluster_by_loss",
    "combine",
    "compress",
    "evaluate",
    "export_shelf",
    "gram",
    "inner",
    "merge",
    "merge_method",
    "new_settings",
    "norm",
    "open_model",
    "partition",
    "partitioner",
    "plan_add",
    "plan_cluster",
    "plan_remove",
    "plan_set",
    "plan_update",
    "policy",
    "read_adapter",
    "read_coded",
    "read_tasks",
    "route",
    "routes",
    "similarity",
    "write_adapter",
]


def __getattr__(name: str) -> typing.Any:
    """Import a public name on first use, so that a command loads only what it needs."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
