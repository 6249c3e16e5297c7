"""Shape annotations are checked while the tests run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices, for the tests of sharding; the others use the first.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

from jaxtyping import install_import_hook

install_import_hook("jaxdiff", "beartype.beartype")
