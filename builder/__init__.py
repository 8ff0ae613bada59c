"""One YAML file in, a finished release of a quantized language model out.

A release is *planned* from its manifest, its base model is *measured* and *quantized* one decoder layer at a time by
workers under any executor, the parts are *assembled* and *fixed* into an artifact, and the artifact is *verified*,
*described*, *locked* and *published*. `stages` is the table of contents; the modules stand in the order data flows.
"""
