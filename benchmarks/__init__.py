"""Scripts that measure sparse_optim; each states the bytes that its ideal implementation moves."""

import os

# must be said before torch is loaded. OpenMP threads that spin at barriers for milliseconds, the default,
# made a training step 7 to 20 times slower on two cores that other programs wanted too; threads that never
# spin make small operations 3 times slower on a quiet machine; a short spin cost nothing in either case
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# the profiler, which counts allocations, announces itself on standard error
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
