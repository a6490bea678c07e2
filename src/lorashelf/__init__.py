"""lorashelf: N LoRA adapters, K slots; merged, kept safe on disk, and routed.

>>> import lorashelf
>>> sorted(lorashelf.METHODS)[:3]
['cat', 'dare_linear', 'dare_linear_svd']
"""

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

__version__ = VERSION

__all__ = [
    "METHODS",
    "METRICS",
    "PARTITIONERS",
    "POLICIES",
    "Adapter",
    "BaseId",
    "Budget",
    "Factors",
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
    "combine",
    "compress",
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
    "route",
    "routes",
    "similarity",
    "write_adapter",
]
