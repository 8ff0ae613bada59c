"""One YAML file in, a finished release of a quantized language model out.

A release is *planned* from its manifest, its base model is *measured* and *quantized* one decoder layer at a time by
workers under any executor, the parts are *assembled* and *fixed* into an artifact, and the artifact is *verified*,
*described*, *locked* and *published*. `stages` is the table of contents; the modules stand in the order data flows.
"""

import os

# Threads of OpenMP wait for each other by spinning, which a busy machine does not forgive: of a small model, perplexity
# took 43 s beside other work, and takes 5 s where they sleep. It has to be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
