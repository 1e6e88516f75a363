"""Training an ONNX graph; the only package that imports torch."""

import os

# A thread of torch's OpenMP waits for its next piece of work by spinning, 300,000 times by default.
# Beside other programs small networks train several times slower for it; this many are enough on an
# idle machine, too. A value that the user set stands. It counts before torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
