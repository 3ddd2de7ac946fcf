from __future__ import annotations

import os

from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile(
    "gr", deadline=None, max_examples=int(os.environ.get("GR_TEST_EXAMPLES", "100"))
)
settings.load_profile("gr")
