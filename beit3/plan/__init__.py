"""Planning: memory, time and traffic of a run on GPUs that are not here, for `beit3 plan`.

Counted: parameters (of the very networks, without numbers), activations (`beit3.model.memory`), operations
(`beit3.model.flops`), bytes between GPUs. From data sheets: the GPUs. Assumed, and said so wherever it is printed: the
share of the peak that is reached, the efficiency of the links, and what is added for CUDA and fragmentation.
"""
