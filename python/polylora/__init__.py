"""polylora: multi-LoRA kernels. Every row of a batch may use another adapter of another rank.

The ops are ``torch.ops.polylora.*`` (documented in :mod:`polylora.ops`); :class:`polylora.Plan` groups the rows of a
step; :class:`polylora.SliceTable` says where the weights lie; :class:`polylora.AdapterPool` holds loaded adapters;
:mod:`polylora.engines.hf` puts them under a Hugging Face model.
"""

from polylora._library import has_cuda_kernels, load_library

load_library()

from polylora import ops  # noqa: E402  (the ops must be registered before their fakes)
from polylora.plan import Plan, plan_size  # noqa: E402
from polylora.pool import AdapterPool  # noqa: E402
from polylora.table import SliceTable  # noqa: E402

__version__ = "0.1.0"
__all__ = ["AdapterPool", "Plan", "SliceTable", "__version__", "attach", "has_cuda_kernels", "ops", "plan_size"]


def attach(model, **options):
    """Puts polylora under a Hugging Face model: :class:`polylora.engines.hf.HfEngine`, its options and errors."""
    from polylora.engines.hf import HfEngine  # needs transformers, which the ops do not

    return HfEngine(model, **options)
