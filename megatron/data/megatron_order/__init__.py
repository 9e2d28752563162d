"""`DATA_ORDER=megatron`: the sample order of Megatron-DeepSpeed as Argonne runs it, bit for bit.

Unlike the stateless order it depends on the length of the run, and its arrays are built and cached.
"""
