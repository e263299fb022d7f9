"""Scripts that measure sparse_optim; each states the bytes that its ideal implementation moves."""

import os

# must be said before torch is loaded: OpenMP threads that spin at every barrier made a training step 7 to 20
# times slower where other programs wanted the same two cores (5.6 and 6.0 s against 0.3 and 0.8 s)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
