"""The self tests need a process on the virtual GPU (`make test-gpu`), else they are not there."""

import os

collect_ignore_glob = [] if os.environ.get("VGPU_ACTIVE") == "1" else ["*"]
