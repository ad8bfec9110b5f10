"""Object storage: caches, heads and results under ``s3://`` and ``gs://``, through fsspec.

Whatever is read comes through a local disk cache (``mirror.py``), because features are memory-mapped; whatever is
written is made on the local disk and uploaded, under a lease that refuses a second writer (``lease.py``).
"""

from calib.storage.folders import as_named, local, writing
from calib.storage.location import Remote, parse

__all__ = ["Remote", "as_named", "local", "parse", "writing"]
