"""Numbers with the same bits on every machine.

A forward pass rounds in an order of its own only where it sums and where it calls a function of a library. Here sums
are exact or follow a fixed tree, and functions are made of what IEEE 754 rounds in one way. So neither the processor,
nor its instruction set, nor the number of threads, nor a GPU changes a bit.

In: torch operations of a model, as they are dispatched. Out: their results, each a function of the operands alone.

    functions   exp, sin, log and what is made of them, in float64
    sums        sums, means, softmax and norms by a fixed tree
    loops       the same arithmetic as compiled loops, for the CPU
    products    matrix products as sums of integers, which no order of work can change
    attention   a model's own attention, some queries at a time
    operations  what torch operations are left alone, and the table of those that are replaced
    elements, reductions, places  what takes their place
    exact       the context in which a model runs

To let another operation through, add it to the names in `operations`, if it rounds nothing, or a function beside its
like in `elements`, `reductions` or `places`.
"""
